"""Channel rules against the formulas written out channel by channel."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_asr.numerics.gains import (
    BatchNormParameters,
    ChannelAffine,
    absorb,
    asr_gain,
    layerwise_gain,
    paired,
    raw_gain,
    recalibrate,
)
from onnx_asr.numerics.moments import Moments

COUNT = 50.0


def moments(mean, var) -> Moments:
    return Moments(COUNT, np.asarray(mean, float), COUNT * np.asarray(var, float))


@st.composite
def pairs(draw) -> tuple[Moments, Moments]:
    """Moments of a dense and a pruned layer; all of the pruned channels are alive."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    channels = draw(st.integers(1, 9))
    return tuple(  # type: ignore[return-value]
        moments(rng.normal(0, 3, channels), 10.0 ** rng.uniform(-3, 2, channels)) for _ in range(2)
    )


def deviation(m: Moments, channel: int) -> float:
    return math.sqrt(m.m2[channel] / m.count)


@given(pair=pairs())
def test_raw(pair):
    dense, pruned = pair
    for channel, gain in enumerate(raw_gain(dense, pruned)):
        assert gain == pytest.approx(deviation(dense, channel) / deviation(pruned, channel))


@given(pair=pairs(), power=st.sampled_from([0.0, 0.5, 1.0, 2.0]), seed=st.integers(0, 99))
def test_paired(pair, power, seed):
    dense, pruned = pair
    rho = np.random.default_rng(seed).uniform(-1, 1, len(dense.mean))
    found = paired(dense, pruned, rho, power)
    for channel in range(len(dense.mean)):
        trust = max(rho[channel], 0.0) ** power if power else 1.0
        gain = deviation(dense, channel) / deviation(pruned, channel) * trust
        assert found.gain[channel] == pytest.approx(gain)
        # what it is for: the repaired channel has the dense one's mean, and its deviation where it is trusted fully
        assert found.gain[channel] * pruned.mean[channel] + found.shift[channel] == pytest.approx(dense.mean[channel])
        if not power:
            assert found.gain[channel] * deviation(pruned, channel) == pytest.approx(deviation(dense, channel))


@given(pair=pairs())
def test_layerwise(pair):
    dense, pruned = pair
    channels = range(len(dense.mean))
    total_d = sum(dense.m2[c] / COUNT for c in channels) / len(channels)
    total_p = sum(pruned.m2[c] / COUNT for c in channels) / len(channels)
    np.testing.assert_allclose(layerwise_gain(dense, pruned), [math.sqrt(total_d / total_p) for _ in channels])


@given(pair=pairs(), prior=st.one_of(st.sampled_from(["median", "mean"]), st.floats(1e-3, 1e3)))
def test_asr(pair, prior):
    dense, pruned = pair
    variances = [float(m2) / COUNT for m2 in pruned.m2]
    lam = {"median": statistics.median(variances), "mean": statistics.fmean(variances)}.get(prior, prior)
    found = asr_gain(dense, pruned, prior)
    for channel, variance in enumerate(variances):
        s = variance / (variance + lam)
        raw = deviation(dense, channel) / deviation(pruned, channel)
        assert found[channel] == pytest.approx(s * raw + (1 - s))
        assert min(1.0, raw) - 1e-9 <= found[channel] <= max(1.0, raw) + 1e-9


def test_asr_with_a_median_of_zero_keeps_the_raw_gain_of_live_channels():
    dense = moments([0.0] * 5, [1.0, 4.0, 9.0, 1.0, 1.0])
    pruned = moments([0.0] * 5, [0.25, 1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(asr_gain(dense, pruned, "median"), [2.0, 2.0, 1.0, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(asr_gain(dense, pruned, 0.0), [2.0, 2.0, 1.0, 1.0, 1.0], rtol=1e-6)


def test_dead_channels_keep_their_gain_and_have_their_mean_corrected():
    # no variance; rounding noise on a large mean; rounding noise against the dense deviation
    dense = moments([1.0, 2.0, 3.0, 4.0], [4.0, 4.0, 4.0, 4.0])
    pruned = moments([7.0, 1e4, 0.5, 0.0], [0.0, (3e-7 * 1e4) ** 2, (1e-6) ** 2, 1.0])
    for gain in (raw_gain(dense, pruned), paired(dense, pruned, np.full(4, 0.5)).gain):
        np.testing.assert_allclose(gain, [1.0, 1.0, 1.0, 2.0])
    weighted = paired(dense, pruned, np.array([0.0, -1.0, 0.5, 0.5]), 1.0)
    np.testing.assert_allclose(weighted.gain, [1.0, 1.0, 1.0, 1.0])  # the last: 2 * 0.5
    np.testing.assert_allclose(weighted.shift, dense.mean - pruned.mean)
    np.testing.assert_allclose(asr_gain(dense, pruned)[:3], 1.0)
    dead = moments([1.0, 2.0], [0.0, 0.0])
    np.testing.assert_array_equal(layerwise_gain(moments([0.0, 0.0], [1.0, 2.0]), dead), [1.0, 1.0])


@given(
    seed=st.integers(0, 999),
    smallest=st.sampled_from([1e-12, 1e-6, 1e-2]),
    spread=st.sampled_from([0.3, 2.0, 6.0]),
    zeros=st.booleans(),
)
def test_absorb_is_the_batchnorm_of_the_corrected_channel(seed, smallest, spread, zeros):
    rng = np.random.default_rng(seed)
    c = 8
    scale, bias, mean = rng.normal(1, 1, c), rng.normal(0, 1, c), rng.normal(0, 2, c)
    var = 10.0 ** rng.uniform(math.log10(smallest), 1, c)
    gain, shift = 10.0 ** rng.uniform(-spread, spread, c), rng.normal(0, 1, c)
    if zeros:
        gain[::3] = 0.0
    eps = 1e-5
    new = absorb(BatchNormParameters(scale, bias, mean, var, eps), ChannelAffine(gain, shift))
    assert new.epsilon == eps
    assert (new.var >= 0).all()
    for channel in range(c):
        for z in (-3.0, 0.0, 0.7, 5.0):
            corrected = gain[channel] * z + shift[channel]
            root = math.sqrt(var[channel] + eps)
            wanted = scale[channel] * (corrected - mean[channel]) / root + bias[channel]
            deviation = math.sqrt(new.var[channel] + eps)
            found = new.scale[channel] * (z - new.mean[channel]) / deviation + new.bias[channel]
            # relative to the largest term of the sums, which may cancel
            size = abs(scale[channel]) / root * (abs(gain[channel] * z) + abs(shift[channel]) + abs(mean[channel]))
            assert found == pytest.approx(wanted, abs=1e-9 * (size + abs(bias[channel]) + 1))
    # every new value can be stored, in float16 too
    for value in (new.mean, new.var):
        assert (np.abs(value) < 65504).all()


def test_absorb_leaves_scale_and_bias_where_the_statistics_can_take_it():
    bn = BatchNormParameters(np.array([2.0]), np.array([1.0]), np.array([0.5]), np.array([4.0]), 1e-5)
    new = absorb(bn, ChannelAffine(np.array([2.0]), np.array([0.3])))
    assert (new.scale, new.bias) == (bn.scale, bn.bias)
    assert new.mean[0] == pytest.approx((0.5 - 0.3) / 2)
    assert new.var[0] == pytest.approx((4.0 + 1e-5) / 4 - 1e-5)


def test_recalibrate_replaces_statistics_but_keeps_the_variance_of_constant_channels():
    bn = BatchNormParameters(np.array([2.0, 3.0]), np.array([1.0, 1.5]), np.zeros(2), np.array([4.0, 5.0]), 1e-3)
    new = recalibrate(bn, np.array([7.0, 8.0]), np.array([0.25, 0.0]))
    np.testing.assert_array_equal(new.mean, [7.0, 8.0])
    np.testing.assert_array_equal(new.var, [0.25, 5.0])
    np.testing.assert_array_equal(new.scale, bn.scale)
    np.testing.assert_array_equal(new.bias, bn.bias)
    assert new.epsilon == bn.epsilon


def test_slope_and_stored_reference():
    bn = BatchNormParameters(np.array([2.0]), np.array([1.0]), np.array([0.5]), np.array([0.21]), 0.04)
    assert bn.slope[0] == pytest.approx(2.0 / 0.5)
    assert bn.moments.mean[0] == 0.5
    assert bn.moments.var[0] == pytest.approx(0.21)
