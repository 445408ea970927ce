"""Moments against numpy in float64 on the whole sample."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_asr.numerics.moments import Moments, PairMoments


def flat(tensor: np.ndarray, axis: int) -> np.ndarray:
    """[C, n] in float64."""
    return np.moveaxis(tensor.astype(np.float64), axis, 0).reshape(tensor.shape[axis], -1)


def chunks_of(count: int, cuts: list[int]) -> list[slice]:
    edges = [0, *sorted({cut % count for cut in cuts} - {0}), count]
    return [slice(a, b) for a, b in pairwise(edges)]


def samples(rng: np.random.Generator, shape: tuple[int, ...], axis: int, ratio: float) -> np.ndarray:
    """Channels of very different scales, whose means are ``ratio`` standard deviations from zero."""
    channels = shape[axis]
    scale = 10.0 ** rng.uniform(-2, 2, channels)
    form = [1] * len(shape)
    form[axis] = channels
    sign = rng.choice([-1.0, 1.0], channels)
    return ((rng.standard_normal(shape) + ratio * sign.reshape(form)) * scale.reshape(form)).astype(np.float32)


SHAPES = [((24, 5, 4, 3), 1), ((24, 4, 3, 5), -1), ((24, 4, 3, 5), 3), ((24, 5), 1), ((24, 7, 5), 2), ((24, 5, 9), -2)]


@given(
    case=st.sampled_from(SHAPES),
    cuts=st.lists(st.integers(0, 23), max_size=6),
    exponent=st.floats(0, 4),
    seed=st.integers(0, 99),
)
def test_chunks_give_the_moments_of_all_samples(case, cuts, exponent, seed):
    (shape, axis), ratio = case, 10.0**exponent
    x = samples(np.random.default_rng(seed), shape, axis, ratio)
    parts = [Moments.of(x[part], axis) for part in chunks_of(len(x), cuts)]
    found = reduce(Moments.merge, parts)
    exact = flat(x, axis)
    assert found.count == exact.shape[1]
    assert found.mean.dtype == found.m2.dtype == np.float64
    np.testing.assert_allclose(found.mean, exact.mean(1), rtol=1e-6)
    np.testing.assert_allclose(found.var, exact.var(1), rtol=1e-6 * max(1.0, ratio / 10))
    np.testing.assert_allclose(found.std, exact.std(1), rtol=1e-6 * max(1.0, ratio / 10))


@given(
    case=st.sampled_from(SHAPES),
    cuts=st.lists(st.integers(0, 23), max_size=6),
    exponent=st.floats(0, 4),
    rho=st.floats(-1, 1),
    seed=st.integers(0, 99),
)
def test_pairs_give_cross_moment_and_correlation(case, cuts, exponent, rho, seed):
    shape, axis = case
    rng = np.random.default_rng(seed)
    x = samples(rng, shape, axis, 10.0**exponent)
    noise = samples(rng, shape, axis, 0.0)
    y = (rho * x + np.sqrt(1 - rho**2) * noise).astype(np.float32)
    found = reduce(PairMoments.merge, [PairMoments.of(x[part], y[part], axis) for part in chunks_of(len(x), cuts)])
    p, q = flat(x, axis), flat(y, axis)
    p, q = p - p.mean(1, keepdims=True), q - q.mean(1, keepdims=True)
    size = np.sqrt((p * p).sum(1) * (q * q).sum(1))
    error = 1e-6 * max(1.0, 10**exponent / 10)
    assert (np.abs(found.cross - (p * q).sum(1)) <= error * size).all()
    assert (np.abs(found.correlation - (p * q).sum(1) / size) <= error).all()
    for part, whole in ((found.dense, x), (found.pruned, y)):
        np.testing.assert_allclose(part.mean, flat(whole, axis).mean(1), rtol=1e-5, atol=1e-5 * flat(whole, axis).std())
        np.testing.assert_allclose(part.var, flat(whole, axis).var(1), rtol=error)


def test_negative_axis_and_channels_last_agree_with_channels_first():
    x = np.random.default_rng(0).standard_normal((6, 5, 4, 3)).astype(np.float32)
    first = Moments.of(x, 1)
    last = Moments.of(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), -1)
    np.testing.assert_allclose(first.mean, last.mean, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(first.m2, last.m2, rtol=1e-6)
    np.testing.assert_array_equal(Moments.of(x, -3).m2, first.m2)


def test_half_precision_is_summed_in_more():
    x = (np.random.default_rng(0).standard_normal((64, 3, 40, 40)) + 50).astype(np.float16)
    found = Moments.of(x)
    exact = flat(x, 1)
    np.testing.assert_allclose(found.mean, exact.mean(1), rtol=1e-6)
    np.testing.assert_allclose(found.var, exact.var(1), rtol=1e-5)  # sums of squares leave float16's range here
    np.testing.assert_allclose(PairMoments.of(x, -x).correlation, -1, rtol=1e-6)


def test_one_chunk_larger_than_a_cache_block():
    x = samples(np.random.default_rng(0), (9, 3, 130, 131), 1, 100.0)
    exact = flat(x, 1)
    np.testing.assert_allclose(Moments.of(x).var, exact.var(1), rtol=1e-5)
    y = x[::-1]
    p, q = exact - exact.mean(1, keepdims=True), flat(y, 1) - exact.mean(1, keepdims=True)
    found = PairMoments.of(x, y)
    assert (np.abs(found.cross - (p * q).sum(1)) <= 1e-5 * found.dense.m2).all()


def test_constant_channels_have_correlation_zero():
    x = np.random.default_rng(0).standard_normal((8, 2, 3, 3)).astype(np.float32)
    y = x.copy()
    y[:, 1] = 0.0
    np.testing.assert_allclose(PairMoments.of(x, y).correlation, [1.0, 0.0], atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_overflowing_channels_show_in_the_moments_without_a_warning():
    x = np.random.default_rng(0).standard_normal((8, 2, 3, 3)).astype(np.float32)
    x[:, 1] *= np.float32(1e30)
    found = PairMoments.of(x, x)
    assert not found.pruned.is_finite
    assert found.correlation[0] == pytest.approx(1)


def test_merging_nothing_changes_nothing():
    empty = Moments(0.0, np.zeros(2), np.zeros(2))
    some = Moments.of(np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32))
    for merged in (empty.merge(some), some.merge(empty)):
        np.testing.assert_allclose(merged.mean, some.mean)
        np.testing.assert_allclose(merged.m2, some.m2)
    assert empty.merge(empty).count == 0


def test_pairs_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        PairMoments.of(np.zeros((2, 3, 4)), np.zeros((2, 3, 5)))
