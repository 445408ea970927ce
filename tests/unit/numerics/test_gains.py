"""Channel rules against their formulas, channel by channel in plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from onnx_asr.numerics.gains import (
    BatchNormParameters,
    ChannelAffine,
    absorb,
    asr_gain,
    asr_reliability,
    is_live,
    layerwise_gain,
    paired,
    raw_gain,
    recalibrate,
)
from onnx_asr.numerics.moments import Moments


def moments(mean: Any, var: Any) -> Moments:
    return Moments(10.0, np.asarray(mean, float), 10.0 * np.asarray(var, float))


DENSE = moments([0.5, -1.0, 2.0, 0.0], [4.0, 1.0, 0.25, 1.0])
PRUNED = moments([0.2, -0.5, 1.0, 3.0], [1.0, 1.0, 1.0, 0.0])  # the last channel is dead


def test_raw_gain() -> None:
    np.testing.assert_allclose(raw_gain(DENSE, PRUNED), [2.0, 1.0, 0.5, 1.0])


def test_layerwise_gain_is_one_factor() -> None:
    np.testing.assert_allclose(layerwise_gain(DENSE, PRUNED), [math.sqrt((6.25 / 4) / (3 / 4))] * 4)
    np.testing.assert_array_equal(layerwise_gain(DENSE, moments([0.0] * 4, [0.0] * 4)), [1.0] * 4)


@pytest.mark.parametrize(("prior", "lam"), [("median", 1.0), ("mean", 0.75), (3.0, 3.0)])
def test_asr_gain(prior: Any, lam: float) -> None:
    share = 1 / (1 + lam)
    expected = [share * 2 + 1 - share, 1.0, share * 0.5 + 1 - share, 1.0]
    np.testing.assert_allclose(asr_gain(DENSE, PRUNED, prior), expected)


def test_asr_with_a_median_of_zero_keeps_raw_gains_of_live_channels() -> None:
    found = moments([0.0] * 4, [0.25, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(asr_gain(DENSE, found, "median"), [4.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(asr_gain(DENSE, moments([0.0] * 4, [0.0] * 4), 0.0), [1.0] * 4)


variances = st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3)


@given(dense=variances, found=variances, prior=st.sampled_from(["median", "mean", 0.0, 1.0]))
def test_asr_lies_between_one_and_raw(dense: list[float], found: list[float], prior: Any) -> None:
    d, p = moments([0.0] * 3, dense), moments([0.0] * 3, found)
    raw, gain = raw_gain(d, p), asr_gain(d, p, prior)
    slack = 1e-9 * raw + 1e-9
    assert (gain >= np.minimum(raw, 1.0) - slack).all()
    assert (gain <= np.maximum(raw, 1.0) + slack).all()


def test_paired_matches_mean_and_deviation() -> None:
    affine = paired(DENSE, PRUNED)
    live = slice(0, 3)
    np.testing.assert_allclose((affine.gain * PRUNED.std)[live], DENSE.std[live])
    np.testing.assert_allclose(affine.gain * PRUNED.mean + affine.shift, DENSE.mean)
    assert affine.gain[3] == 1.0


def test_paired_shrinks_by_the_correlation_and_never_turns_a_channel_over() -> None:
    rho = np.array([0.25, 1.0, -0.5, 0.5])
    affine = paired(DENSE, PRUNED, rho, 0.5)
    np.testing.assert_allclose(affine.gain, [1.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(affine.gain * PRUNED.mean + affine.shift, DENSE.mean)


def test_rounding_noise_is_no_signal() -> None:
    """A constant of 3 with the deviation that float32 rounding leaves: its gain would be a million."""
    noisy = moments([3.0], [(3e-7) ** 2])
    np.testing.assert_array_equal(raw_gain(moments([1.0], [1.0]), noisy), [1.0])
    small = moments([0.0], [(1e-7) ** 2])  # but small channels of a small dense channel are channels
    np.testing.assert_allclose(raw_gain(moments([0.0], [(2e-7) ** 2]), small), [2.0])


def test_recalibrate_keeps_the_variance_of_a_dead_channel() -> None:
    bn = BatchNormParameters(*(np.array([1.0, 2.0]) for _ in range(4)), 1e-5)
    new = recalibrate(bn, np.array([5.0, 6.0]), np.array([7.0, 0.0]))
    np.testing.assert_array_equal(new.mean, [5.0, 6.0])
    np.testing.assert_array_equal(new.var, [7.0, 2.0])
    np.testing.assert_array_equal(new.scale, bn.scale)


def apply(bn: BatchNormParameters, z: np.ndarray) -> np.ndarray:
    """ONNX BatchNormalization in inference mode, by its definition."""
    return bn.scale * (z - bn.mean) / np.sqrt(bn.var + bn.epsilon) + bn.bias


@given(
    scale=st.floats(-3, 3),
    bias=st.floats(-3, 3),
    mean=st.floats(-5, 5),
    var=st.sampled_from([0.0, 1e-30, 1e-12, 1e-6, 1e-3, 1.0, 100.0]),
    epsilon=st.sampled_from([1e-5, 1e-3, 1e-12]),
    gain=st.one_of(st.sampled_from([0.0, 1.0, 1e-6, 1e3, -1.0]), st.floats(0.01, 50)),
    shift=st.floats(-10, 10),
)
def test_absorb_is_the_affine_map_before_the_batchnorm(
    scale: float, bias: float, mean: float, var: float, epsilon: float, gain: float, shift: float
) -> None:
    arrays = [np.array([value]) for value in (scale, bias, mean, var)]
    bn = BatchNormParameters(*arrays, epsilon)
    new = absorb(bn, ChannelAffine(np.array([gain]), np.array([shift])))
    assert (new.var >= 0).all()
    assert new.epsilon == epsilon
    for value in (new.scale, new.bias, new.mean, new.var):
        assert np.isfinite(value).all()
    z = np.linspace(-3, 3, 7)
    expected = apply(bn, gain * z + shift)
    size = 1 + np.abs(scale) * (np.abs(gain * 3) + np.abs(shift) + np.abs(mean)) / math.sqrt(var + epsilon)
    np.testing.assert_allclose(apply(new, z), expected, atol=1e-9 * size)


@given(gain=st.floats(1e-4, 1e4), shift=st.floats(-1e3, 1e3), var=st.floats(1e-8, 1e4))
def test_absorbed_parameters_fit_half_precision(gain: float, shift: float, var: float) -> None:
    assume(gain > 0)
    bn = BatchNormParameters(np.array([1.0]), np.array([0.0]), np.array([0.5]), np.array([var]), 1e-5)
    new = absorb(bn, ChannelAffine(np.array([gain]), np.array([shift])))
    for value in (new.mean, new.var):
        assert (np.abs(value) < 65504).all()


def absorbed(gain: float, shift: float = 0.0, var: float = 1.0, epsilon: float = 1e-5) -> BatchNormParameters:
    bn = BatchNormParameters(np.array([1.5]), np.array([0.5]), np.array([0.0]), np.array([var]), epsilon)
    return absorb(bn, ChannelAffine(np.array([gain]), np.array([shift])))


@pytest.mark.parametrize("value", [5.9e4, 6.1e4])
def test_statistics_that_float16_may_not_hold_go_into_scale_and_bias(value: float) -> None:
    """The limit is 6e4; float16 ends at 65,504, and rounds what is above 65,520 to infinity."""
    for new, statistic in (
        (absorbed(1 / math.sqrt(value)), "var"),
        (absorbed(1.0, value), "mean"),
        (absorbed(1.0, -value), "mean"),
    ):
        written = abs(getattr(new, statistic)[0])
        assert written == (pytest.approx(value, rel=1e-4) if value < 6e4 else {"var": 1.0, "mean": 0.0}[statistic])
        assert (new.scale[0] == 1.5 and new.bias[0] == 0.5) == (value < 6e4)
        assert np.isfinite(np.float16(written))


@pytest.mark.parametrize(("ratio", "in_statistics"), [(1.1e-3, True), (0.9e-3, False), (-0.5, False)])
def test_variances_tiny_against_epsilon_go_into_the_scale(ratio: float, in_statistics: bool) -> None:
    """A variance of `ratio` times epsilon, in a BatchNormalization whose own variance is 0."""
    gain = 1 / math.sqrt(1 + ratio)
    new = absorbed(gain, var=0.0, epsilon=1e-3)
    assert new.var[0] == (pytest.approx(ratio * 1e-3) if in_statistics else 0.0)
    assert new.scale[0] == pytest.approx(1.5 if in_statistics else 1.5 * gain, rel=1e-12)


def test_a_channel_is_live_above_a_hundred_thousandth_of_its_reference() -> None:
    found = moments([3.0, 3.0, 0.0, 0.0], [(3.3e-5) ** 2, (2.7e-5) ** 2, (1.1e-5) ** 2, (0.9e-5) ** 2])
    dense = moments([0.0] * 4, [1.0] * 4)
    np.testing.assert_array_equal(is_live(dense, found), [True, False, True, False])
    np.testing.assert_array_equal(is_live(None, found), [True, False, True, True])


def test_the_reliability_has_a_floor_where_the_prior_is_zero() -> None:
    found = moments([0.0] * 3, [1e-12, 3e-12, 0.0])
    np.testing.assert_allclose(asr_reliability(found, 0.0), [0.5, 0.75, 0.0])


def test_absorb_leaves_scale_and_bias_where_statistics_can_take_it() -> None:
    bn = BatchNormParameters(*(np.array([value]) for value in (1.5, 0.5, 0.2, 4.0)), 1e-5)
    new = absorb(bn, ChannelAffine(np.array([2.0]), np.array([1.0])))
    assert (new.scale[0], new.bias[0]) == (1.5, 0.5)
    np.testing.assert_allclose(new.mean, [(0.2 - 1.0) / 2])
    np.testing.assert_allclose(new.var + 1e-5, [(4.0 + 1e-5) / 4])
