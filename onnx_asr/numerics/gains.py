"""Channel rules: from the moments of a channel in the dense and the pruned network to new parameters.

Every rule ends in a per-channel affine map of the pruned channel, ``z -> gain * z + shift``. It is written either into
the weights and bias of the producing node, or into the BatchNormalization that follows,

    BN(g z + c) = gamma (g z + c - mu) / S + beta,  S = sqrt(var + eps)
                = gamma (z - mu') / S' + beta       with mu' = (mu - c) / g, S' = S / g.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from onnx_asr.arrays import Floats, Mask
from onnx_asr.numerics.moments import Moments

DEAD_RATIO = 1e-5
"""Below this ratio of its standard deviation to its reference's, or to its own mean, a channel carries rounding noise:
the float32 mean of a constant channel is off by up to 3e-7 of its value, which looks like a deviation."""

_VARIANCE_FLOOR = 1e-12
_MIN_VAR_OVER_EPS = 1e-3
_MAX_STATISTIC = 6e4  # below the largest float16


@dataclass(frozen=True)
class ChannelAffine:
    """The map ``z -> gain * z + shift`` of every channel, float64, shape [C]."""

    gain: Floats
    shift: Floats


@dataclass(frozen=True)
class BatchNormParameters:
    """Parameters of an ONNX BatchNormalization: ``scale (x - mean) / sqrt(var + epsilon) + bias``, each [C]."""

    scale: Floats
    bias: Floats
    mean: Floats
    var: Floats
    epsilon: float

    @property
    def deviation(self) -> Floats:
        """``S = sqrt(var + eps)``; NaN where a stored variance is below ``-eps``, which callers reject."""
        with np.errstate(invalid="ignore"):
            return np.asarray(np.sqrt(self.var + self.epsilon))

    @property
    def slope(self) -> Floats:
        """Factor on the input, ``a = scale / S``."""
        return np.asarray(self.scale / self.deviation)

    @property
    def moments(self) -> Moments:
        """The stored statistics as moments of one observation, for use as a reference (docs/method.md, ``paired``)."""
        return Moments(1.0, self.mean, self.var)


def paired(dense: Moments, pruned: Moments, correlation: Floats | None = None, power: float = 0.0) -> ChannelAffine:
    """Match the pruned channel's mean and standard deviation to the dense channel's on the same samples.

        gain = s_d / s_p * max(rho, 0)^power,  shift = m_d - gain m_p

    A dead channel (``s_p`` is zero, or rounding noise compared with ``s_d`` or ``m_p``) keeps gain 1; only its mean is
    corrected. The correlation ``rho`` is needed where ``power`` is not 0, which trusts every gain fully.
    """
    gain = raw_gain(dense, pruned)
    if power and correlation is not None:
        gain = np.where(is_live(dense, pruned), gain * paired_shrinkage(correlation, power), gain)
    return ChannelAffine(gain, dense.mean - gain * pruned.mean)


def paired_shrinkage(correlation: Floats, power: float) -> Floats:
    """Factor on the raw gain in :func:`paired`, ``max(rho, 0)^power``."""
    return np.asarray(np.maximum(correlation, 0.0) ** power)


def is_live(dense: Moments | None, pruned: Moments) -> Mask:
    """[C] whether pruned channels carry signal, see :data:`DEAD_RATIO`."""
    level = np.abs(pruned.mean)
    return pruned.std > DEAD_RATIO * (level if dense is None else np.maximum(dense.std, level))


def raw_gain(dense: Moments, pruned: Moments) -> Floats:
    """Raw variance matching ``sqrt(v_d / v_p)`` (ASR paper, Algorithm 1); 1 for dead channels."""
    return np.divide(dense.std, pruned.std, out=np.ones_like(dense.std), where=is_live(dense, pruned))


def layerwise_gain(dense: Moments, pruned: Moments) -> Floats:
    """One factor per layer, ``sqrt(mean v_d / mean v_p)`` (ASR paper, baseline LW); 1 where the layer is dead."""
    live = is_live(dense, pruned).any()
    return np.full_like(pruned.mean, np.sqrt(dense.var.mean() / pruned.var.mean()) if live else 1.0)


def asr_gain(dense: Moments, pruned: Moments, prior: Literal["median", "mean"] | float = "median") -> Floats:
    """Raw gain, shrunk toward 1 where the channel's variance is small (ASR paper, Algorithm 1).

        s = v_p / (v_p + lam),  gain = s sqrt(v_d / v_p) + (1 - s)

    ``prior`` says what ``lam`` is: the layer's median or mean of ``v_p``, or a fixed value. A ``lam`` of zero (half of
    the channels dead) becomes a small floor, so that live channels keep their raw gain and dead ones get 1.
    """
    reliability = asr_reliability(pruned, prior)
    return reliability * raw_gain(dense, pruned) + (1.0 - reliability)


def asr_reliability(pruned: Moments, prior: Literal["median", "mean"] | float = "median") -> Floats:
    """Weight of the raw gain in :func:`asr_gain`, ``s = v_p / (v_p + lam)``."""
    variance = pruned.var
    lam = float(np.median(variance) if prior == "median" else np.mean(variance) if prior == "mean" else prior)
    return np.asarray(variance / (variance + max(lam, _VARIANCE_FLOOR)))


def recalibrate(bn: BatchNormParameters, mean: Floats, var: Floats) -> BatchNormParameters:
    """Replace the running statistics with measured ones; a channel without variance keeps its stored variance."""
    return replace(bn, mean=mean, var=np.where(var > 0, var, bn.var))


def absorb(bn: BatchNormParameters, affine: ChannelAffine) -> BatchNormParameters:
    """Parameters with which ``BN'(z) = BN(gain z + shift)``.

    The map goes into mean and variance. It goes into scale and bias where the gain is not positive, the variance
    ``(var + eps) / gain^2 - eps`` would be negative or tiny compared with eps, or a value would exceed float16.
    """
    gain, shift = affine.gain, affine.shift
    positive = gain > 0
    safe = np.where(positive, gain, 1.0)
    with np.errstate(over="ignore", divide="ignore"):
        mean = (bn.mean - shift) / safe
        var = (bn.var + bn.epsilon) / np.square(safe) - bn.epsilon
    in_range = (var < _MAX_STATISTIC) & (np.abs(mean) < _MAX_STATISTIC)
    in_statistics = positive & (var > _MIN_VAR_OVER_EPS * bn.epsilon) & in_range
    folded_bias = bn.bias + bn.scale * (shift + (gain - 1.0) * bn.mean) / bn.deviation
    return replace(
        bn,
        scale=np.where(in_statistics, bn.scale, bn.scale * gain),
        bias=np.where(in_statistics, bn.bias, folded_bias),
        mean=np.where(in_statistics, mean, bn.mean),
        var=np.where(in_statistics, var, bn.var),
    )
