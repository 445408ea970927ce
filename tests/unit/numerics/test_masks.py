"""Masks against sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_asr.numerics.masks import (
    block_scores,
    find_n_of_m,
    keep_count,
    keep_largest,
    keep_n_of_m,
    random_ranks,
    spread_blocks,
)

small = hnp.arrays(np.float64, hnp.array_shapes(max_dims=3, max_side=4), elements=st.integers(0, 4).map(float))


@given(scores=st.lists(small, min_size=1, max_size=3), share=st.floats(0, 1))
def test_exactly_the_largest_are_kept_and_ties_broken_by_position(scores: list[np.ndarray], share: float) -> None:
    flat = [float(value) for score in scores for value in score.ravel()]
    keep = round(share * len(flat))
    masks = keep_largest(scores, keep)
    assert [mask.shape for mask in masks] == [score.shape for score in scores]
    chosen = sorted(range(len(flat)), key=lambda place: (-flat[place], place))[:keep]
    expected = np.isin(np.arange(len(flat)), chosen)
    np.testing.assert_array_equal(np.concatenate([mask.ravel() for mask in masks]), expected)


@given(scores=st.lists(small, min_size=1, max_size=3), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_with_a_seed_exactly_the_largest_are_kept_and_ties_spread(
    scores: list[np.ndarray], share: float, seed: int
) -> None:
    flat = np.concatenate([score.ravel() for score in scores])
    keep = round(share * flat.size)
    masks = keep_largest(scores, keep, seed)
    mask = np.concatenate([each.ravel() for each in masks])
    assert int(mask.sum()) == keep
    if 0 < keep < flat.size:
        assert flat[mask].min() >= flat[~mask].max()
        threshold = flat[mask].min()
        ties = [int((score == threshold).sum()) for score in scores]
        kept = [int((each & (score == threshold)).sum()) for each, score in zip(masks, scores, strict=True)]
        if threshold > 0:
            exact = [sum(kept) * count / sum(ties) for count in ties]
            emptied = sum(count > 0 and not each.any() for count, each in zip(ties, masks, strict=True))
            assert emptied == 0 or max(kept) <= 1
            assert all(abs(a - b) < 1 + len(scores) for a, b in zip(kept, exact, strict=True))


def test_scores_that_differ_by_rounding_are_tied() -> None:
    scores = [np.full(100, 1 + 1e-15), np.full(100, 1.0), np.full(100, 1 - 1e-15)]
    assert [int(mask.sum()) for mask in keep_largest(scores, 150, seed=0)] == [50, 50, 50]
    assert [int(mask.sum()) for mask in keep_largest(scores, 150)] == [100, 50, 0]


def test_random_ranks_are_those_of_every_machine() -> None:
    assert random_ranks(8, 0).tolist() == random_ranks(8, 0).tolist()
    assert sorted(random_ranks(8, 3, 1).tolist()) == list(range(8))
    assert random_ranks(6, 0).tolist() == [3, 2, 1, 0, 4, 5]


def test_a_seed_spreads_ties_within_groups() -> None:
    mask = keep_n_of_m(np.ones((64, 8, 1)), 2, 4, seed=0)
    assert (mask.reshape(64, 2, 4).sum(axis=2) == 2).all()
    assert (np.abs(mask.mean(axis=0) - 0.5) < 0.25).all()
    distinct = np.random.default_rng(0).random((5, 8, 3))
    np.testing.assert_array_equal(keep_n_of_m(distinct, 2, 4, seed=0), keep_n_of_m(distinct, 2, 4))


def test_nothing_and_everything() -> None:
    scores = [np.ones((2, 2)), np.ones(3)]
    assert not any(mask.any() for mask in keep_largest(scores, 0))
    assert all(mask.all() for mask in keep_largest(scores, 7))
    assert keep_largest([], 0) == []


@given(size=st.integers(0, 10**7), sparsity=st.floats(0, 1))
def test_survivors_are_what_rounding_leaves(size: int, sparsity: float) -> None:
    assert abs(size - keep_count(size, sparsity) - sparsity * size) <= 0.5
    assert 0 <= keep_count(size, sparsity) <= size


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
@given(outputs=st.integers(1, 3), inputs=st.integers(1, 17), taps=st.integers(1, 3), seed=st.integers(0, 99))
def test_groups_run_along_the_input_channels(n: int, m: int, outputs: int, inputs: int, taps: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 5, (outputs, inputs, taps)).astype(float)
    mask = keep_n_of_m(scores, n, m)
    assert mask.shape == scores.shape
    for output in range(outputs):
        for tap in range(taps):
            for start in range(0, inputs, m):
                group = scores[output, start : start + m, tap]
                order = sorted(range(len(group)), key=lambda place: (-group[place], place))
                kept = np.isin(np.arange(len(group)), order[:n])
                np.testing.assert_array_equal(mask[output, start : start + m, tap], kept)


@given(groups=st.integers(1, 2), outputs=st.integers(1, 9), height=st.integers(2, 5), seed=st.integers(0, 99))
def test_blocks_are_means_and_spread_to_their_members(groups: int, outputs: int, height: int, seed: int) -> None:
    scores = np.random.default_rng(seed).random((groups, outputs, 3, 2))
    blocks = block_scores(scores, height)
    assert blocks.shape == (groups, -(-outputs // height), 3, 2)
    spread = spread_blocks(blocks > 0.5, height, outputs)
    assert spread.shape == scores.shape
    for start in range(0, outputs, height):
        members = scores[:, start : start + height]
        np.testing.assert_allclose(blocks[:, start // height], members.mean(axis=1))
        assert (spread[:, start : start + height] == (blocks[:, start // height] > 0.5)[:, None]).all()


def dense_mask(outputs: int, inputs: int, taps: int = 1) -> np.ndarray:
    return np.ones((outputs, inputs, taps), bool)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (5, 8), (7, 16)])
@pytest.mark.parametrize("inputs", [16, 17, 35])
def test_a_pattern_is_found_whatever_the_last_group(n: int, m: int, inputs: int) -> None:
    scores = np.random.default_rng(0).random((6, inputs, 3))
    assert find_n_of_m(keep_n_of_m(scores, n, m)) == (n, m)


def test_the_pattern_of_the_smallest_group_is_found() -> None:
    """1:2 everywhere is 2:4 and 4:8 as well."""
    mask = dense_mask(4, 16)
    mask[:, ::2] = False
    assert find_n_of_m(mask) == (1, 2)


@pytest.mark.parametrize(("fuller", "found"), [(0, (2, 4)), (1, None)])
def test_one_group_with_too_much_is_no_pattern(fuller: int, found: tuple[int, int] | None) -> None:
    mask = keep_n_of_m(np.random.default_rng(0).random((5, 8, 1)), 2, 4)
    mask[:fuller, :4] = True
    assert find_n_of_m(mask) == found


@pytest.mark.parametrize(("emptied", "found"), [(2, (2, 4)), (3, None)])
def test_a_tenth_of_the_groups_may_hold_less(emptied: int, found: tuple[int, int] | None) -> None:
    """Two of 20 groups, but not three."""
    mask = keep_n_of_m(np.random.default_rng(0).random((5, 16, 1)), 2, 4)
    mask[:emptied, :4] = False
    assert find_n_of_m(mask) == found


@pytest.mark.parametrize(("left", "found"), [(2, (2, 4)), (3, (4, 8))])
def test_a_last_short_group_has_the_same_limit(left: int, found: tuple[int, int]) -> None:
    """Three of three are too many for 2:4, but not for 4:8, which two groups of 2:4 follow as well."""
    mask = keep_n_of_m(np.random.default_rng(0).random((5, 11, 1)), 2, 4)
    mask[:, 8:] = False
    mask[2, 8 : 8 + left] = True
    assert find_n_of_m(mask) == found


@pytest.mark.parametrize("mask", [dense_mask(3, 16), ~dense_mask(3, 16), dense_mask(3, 1), ~dense_mask(3, 1)])
def test_dense_empty_and_narrow_weights_have_no_pattern(mask: np.ndarray) -> None:
    assert find_n_of_m(mask) is None


def test_scattered_zeros_are_no_pattern() -> None:
    assert find_n_of_m(np.random.default_rng(0).random((8, 32, 3)) < 0.5) is None
