"""Per-channel moments of tensors that arrive in chunks.

Within a chunk: two passes (mean, then centred second moment) per sample and channel in float32. Between samples and
chunks: Chan's formula in float64,

    delta = m_b - m_a
    m     = m_a + delta n_b / n
    M2    = M2_a + M2_b + delta^2 n_a n_b / n            (cross moments alike, with delta_x delta_y)

so that nothing cancels where the mean is large against the standard deviation. Moments of infinite values are not
finite; callers check :attr:`Moments.is_finite`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from onnx_asr.arrays import Array, Floats

_BLOCK = 1 << 17  # elements: 512 KiB of float32


@dataclass(frozen=True)
class Moments:
    """Count, mean and centred second moment of every channel, float64, shape [C]."""

    count: float
    mean: Floats
    m2: Floats

    @property
    def var(self) -> Floats:
        """Biased variance ``M2 / n``."""
        return self.m2 / max(self.count, 1.0)

    @property
    def is_finite(self) -> bool:
        """Whether every value was finite, and small enough to be squared in float32."""
        return bool(np.isfinite([self.mean, self.m2]).all())

    @property
    def std(self) -> Floats:
        """Square root of the biased variance."""
        return np.sqrt(self.var)

    @np.errstate(over="ignore", invalid="ignore")
    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan, Golub and LeVeque)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")
    def of(cls, tensor: Array, axis: int = 1) -> Moments:
        """Moments of a tensor's channels over all its other axes."""
        samples = _by_sample(tensor, axis)
        parts = [(mean, np.vecdot(centred, centred)) for mean, centred in map(_centre, _blocks(samples))]
        means, inner = map(np.concatenate, zip(*parts, strict=True))
        return _between(means, inner, samples.shape[2])


@dataclass(frozen=True)
class PairMoments:
    """Moments of the same channels in two networks on the same samples, and their cross moment, shape [C]."""

    dense: Moments
    pruned: Moments
    cross: Floats

    @property
    @np.errstate(over="ignore", invalid="ignore")
    def correlation(self) -> Floats:
        """Correlation of each channel between the two networks; 0 where either is constant."""
        scale = np.sqrt(self.dense.m2 * self.pruned.m2)
        return np.clip(np.divide(self.cross, scale, out=np.zeros_like(scale), where=scale > 0), -1.0, 1.0)

    @np.errstate(over="ignore", invalid="ignore")
    def merge(self, other: PairMoments) -> PairMoments:
        """Moments of both samples together."""
        count = self.dense.count + other.dense.count
        product = (other.dense.mean - self.dense.mean) * (other.pruned.mean - self.pruned.mean)
        weight = self.dense.count * other.dense.count / count if count else 0.0
        cross = self.cross + other.cross + product * weight
        return PairMoments(self.dense.merge(other.dense), self.pruned.merge(other.pruned), cross)

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")
    def of(cls, dense: Array, pruned: Array, axis: int = 1) -> PairMoments:
        """Moments of a dense and a pruned tensor of the same shape.

        Raises:
            ValueError: When the shapes differ.
        """
        if dense.shape != pruned.shape:
            raise ValueError(f"dense tensor of shape {dense.shape}, pruned of shape {pruned.shape}")
        x, y = _by_sample(dense, axis), _by_sample(pruned, axis)
        parts = []
        blocks = zip(map(_centre, _blocks(x)), map(_centre, _blocks(y)), strict=True)
        for (x_mean, x_centred), (y_mean, y_centred) in blocks:
            pairs = ((x_centred, x_centred), (y_centred, y_centred), (x_centred, y_centred))
            parts.append((x_mean, y_mean, *(np.vecdot(*pair) for pair in pairs)))
        x_means, y_means, x_inner, y_inner, inner_cross = map(np.concatenate, zip(*parts, strict=True))
        positions = x.shape[2]
        first, second = _between(x_means, x_inner, positions), _between(y_means, y_inner, positions)
        offsets = (x_means - first.mean) * (y_means - second.mean)  # float64: the means of all samples are
        cross = inner_cross.sum(axis=0, dtype=np.float64) + positions * offsets.sum(axis=0)
        return cls(first, second, cross)


Key = TypeVar("Key")
Found = TypeVar("Found", Moments, PairMoments)


class Accumulator(dict[Key, Found]):
    """Moments by key, merged over chunks in their order."""

    def add(self, key: Key, chunk: Found) -> None:
        """Merge the moments of a key's next chunk."""
        self[key] = self[key].merge(chunk) if key in self else chunk


def _by_sample(tensor: Array, axis: int) -> Array:
    """View as [samples, C, positions] in float32 or float64."""
    axis %= tensor.ndim
    shape = tensor.shape
    if tensor.dtype not in (np.float32, np.float64):
        tensor = tensor.astype(np.float32)
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    if after == 1:  # no positions behind the channels: the rows of the chunk count as one sample
        return np.ascontiguousarray(tensor.reshape(before, shape[axis]).T)[None]
    return tensor.reshape(before, shape[axis], after)


def _blocks(samples: Array) -> Iterator[Array]:
    """Groups of samples that stay in the cache while they are read twice."""
    step = max(1, _BLOCK // max(1, samples.shape[1] * samples.shape[2]))
    for start in range(0, len(samples), step):
        yield samples[start : start + step]


def _centre(block: Array) -> tuple[Array, Array]:
    """Mean of every sample and channel, and the block without it."""
    mean = block.mean(axis=2)
    return mean.astype(np.float64), block - mean[:, :, None]


def _between(means: Floats, inner: Array, positions: int) -> Moments:
    """Join samples of equal size, from their means and centred second moments [samples, C]."""
    mean = means.mean(axis=0)
    m2 = inner.sum(axis=0, dtype=np.float64) + positions * np.square(means - mean).sum(axis=0)
    return Moments(float(len(means) * positions), mean, m2)
