"""Scores and allocation against their definitions, spelt out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_asr.errors import OptionError
from onnx_asr.numerics.scores import cheapest_keep, erk_shares, lamp, proportional_keep, row_normalised, saliency
from onnx_asr.pruning.options import SCORES, PruneOptions
from onnx_asr.pruning.zeros import prune
from tests.graphs import copy, dense_net, images, net, parameter, residual_net, run, set_parameter

weights = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.integers(-3, 3).map(float)
)


@given(weight=weights)
def test_lamp_is_a_share_of_all_that_are_no_smaller(weight: np.ndarray) -> None:
    flat = np.square(weight).ravel()
    order = sorted(range(flat.size), key=lambda place: (-flat[place], place))
    expected = np.zeros(flat.size)
    for rank, place in enumerate(order):
        above = sum(flat[other] for other in order[: rank + 1])
        expected[place] = flat[place] / above if above else 0.0
    np.testing.assert_allclose(lamp(weight).ravel(), expected)


@given(weight=weights)
def test_row_scores_are_magnitudes_over_the_root_mean_square_of_their_row(weight: np.ndarray) -> None:
    expected = np.zeros(weight.shape)
    for row, values in enumerate(weight):
        if values.any():
            expected[row] = np.abs(values) / np.sqrt(np.mean(values**2))
    np.testing.assert_allclose(row_normalised(weight), expected)


@given(weight=weights, scale=st.floats(0.1, 10))
def test_row_scores_do_not_see_the_scale_of_a_row(weight: np.ndarray, scale: float) -> None:
    scaled = weight * np.geomspace(1, scale, len(weight))[:, None]
    np.testing.assert_allclose(row_normalised(scaled), row_normalised(weight), rtol=1e-9)


def test_saliency_is_what_the_best_compensation_leaves() -> None:
    """Removing one weight and refitting the others raises the squared error by its score."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(500, 6)) @ generator.normal(size=(6, 6))
    rows = generator.normal(size=(3, 6))
    centred = x - x.mean(axis=0)
    scores = saliency(rows, (centred.T @ centred / len(x))[None], 0.0)
    for row, weight in enumerate(rows):
        target = centred @ weight
        for place in range(6):
            rest = np.delete(centred, place, axis=1)
            fitted = rest @ np.linalg.lstsq(rest, target, rcond=None)[0]
            assert scores[row, place] == pytest.approx(np.square(target - fitted).mean(), rel=1e-6)


@given(shapes=st.lists(st.tuples(*[st.integers(1, 8)] * 4), min_size=1, max_size=5), share=st.floats(0, 1))
def test_erk_keeps_exactly_that_many_and_small_layers_denser(shapes: list[tuple[int, ...]], share: float) -> None:
    sizes = [int(np.prod(shape)) for shape in shapes]
    keep = round(share * sum(sizes))
    counts = proportional_keep(erk_shares(shapes, sizes), sizes, keep)
    assert sum(counts) == keep
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    for (a, size_a, raw_a), (b, size_b, raw_b) in zip(
        zip(counts, sizes, raw, strict=True), list(zip(counts, sizes, raw, strict=True))[1:], strict=False
    ):
        if raw_a > raw_b:
            assert a / size_a >= b / size_b - 1 / size_a - 1 / size_b


def grouped_net() -> onnx.ModelProto:
    return net(
        """
        g (float[N,4,8,8] x) => (float[N,6,8,8] z) {
          y = Conv <group=2, pads=[1,1,1,1]> (x, a_w, a_b)
          r = Relu (y)
          z = Conv (r, b_w)
        }
        """,
        a_w=(6, 2, 3, 3),
        a_b=(6,),
        b_w=(6, 6, 1, 1),
    )


def patches(x: np.ndarray, size: int) -> np.ndarray:
    """[rows, C, size, size], padded as much as keeps the shape."""
    pad = size // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1], size, size)


def expected_scores(model: onnx.ModelProto, score: str, x: np.ndarray) -> list[np.ndarray]:
    hidden = run(model, {"x": x}, ["y", "r", "z"])
    scores = []
    for position, source, output in ((0, x, hidden["y"]), (2, hidden["r"], hidden["z"])):
        weight = parameter(model, position, 1).astype(np.float64)
        groups = source.shape[1] // weight.shape[1]
        if score in ("activation", "variance"):
            if score == "activation":
                factor = np.sqrt(np.square(source.astype(float)).mean(axis=(0, 2, 3)))
            else:
                factor = source.astype(float).std(axis=(0, 2, 3))
                factor = factor / np.sqrt(output.astype(float).var(axis=(0, 2, 3)).mean())
            by_group = np.repeat(factor.reshape(groups, -1), len(weight) // groups, axis=0)
            scores.append(np.abs(weight) * by_group[:, :, None, None])
            continue
        result = np.empty_like(weight)
        windows = patches(source, weight.shape[2]).astype(float)
        for channel in range(len(weight)):
            group = channel // (len(weight) // groups)
            inputs = windows[:, group * weight.shape[1] : (group + 1) * weight.shape[1]].reshape(len(windows), -1)
            gram = np.cov(inputs.T, bias=True)
            damped = gram + (1e-2 * np.diag(gram).mean() + 1e-12) * np.eye(len(gram))
            result[channel] = (weight[channel].ravel() ** 2 / np.diag(np.linalg.inv(damped))).reshape(weight.shape[1:])
        scores.append(result)
    return scores


@pytest.mark.parametrize("score", ["activation", "variance", "gram"])
def test_data_aware_scores_choose_what_their_definition_chooses(score: str) -> None:
    model, x = grouped_net(), images(40, seed=3, shape=(4, 8, 8))
    result = prune(model, x, PruneOptions(0.5, score=score, samples=len(x)))  # type: ignore[arg-type]
    scores = expected_scores(model, score, x)
    kept = [parameter(result.model, position, 1) != 0 for position in (0, 2)]
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    threshold = np.median(np.concatenate([values.ravel() for values in scores]))
    for values, mask in zip(scores, kept, strict=True):
        clear = np.abs(values - threshold) > 1e-3 * threshold
        np.testing.assert_array_equal(mask[clear], (values > threshold)[clear])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0.6}, {"sparsity": 0.6, "scope": "erk"}, {"pattern": "2:4"}, {"pattern": "4x1", "sparsity": 0.5}],
)
def test_every_score_works_with_every_pattern(score: str, options: dict[str, Any]) -> None:
    model, x = dense_net(), images(24, seed=1)
    data = x if score in ("activation", "variance", "gram") else None
    result = prune(model, data, PruneOptions(score=score, samples=len(x), **options))  # type: ignore[arg-type]
    onnx.checker.check_model(result.model, full_check=True)
    total = sum(layer.size for layer in result.layers)
    if "pattern" not in options:
        assert sum(layer.zeros for layer in result.layers) == round(0.6 * total)
    assert result.options.score == score


def test_scores_of_folded_graphs_do_not_see_the_scale_of_channels() -> None:
    """A channel scaled up, and down again in the next layer, is the same function: 'variance' chooses alike."""
    model, x = grouped_net(), images(40, seed=3, shape=(4, 8, 8))
    scaled = copy(model)
    factor = np.array([1, 30, 0.02, 5, 0.1, 1], np.float32)
    set_parameter(scaled, 0, 1, parameter(model, 0, 1) * factor[:, None, None, None])
    set_parameter(scaled, 0, 2, parameter(model, 0, 2) * factor)
    set_parameter(scaled, 2, 1, parameter(model, 2, 1) / factor[None, :, None, None])
    masks = [
        parameter(prune(item, x, PruneOptions(0.5, score="variance", scope="layer", samples=40)).model, 2, 1) != 0
        for item in (model, scaled)
    ]
    np.testing.assert_array_equal(*masks)


def test_plain_magnitude_without_batchnormalization_is_noted() -> None:
    model = grouped_net()
    (note,) = prune(model, options=PruneOptions(0.5)).notes
    assert "--score variance" in note
    assert prune(model, options=PruneOptions(0.5, score="row")).notes == ()
    assert prune(dense_net(), options=PruneOptions(0.5)).notes == ()


def test_a_score_and_its_data_belong_together() -> None:
    model = residual_net()
    with pytest.raises(OptionError, match="needs calibration samples"):
        prune(model, options=PruneOptions(0.5, score="gram"))
    with pytest.raises(OptionError, match="does not use calibration data: drop --data"):
        prune(model, images(8, seed=0), PruneOptions(0.5))
    with pytest.raises(OptionError, match="unknown"):
        prune(model, options=PruneOptions(0.5, score="best"))  # type: ignore[arg-type]


def hull_cost(zeros: int, corners: list[tuple[int, float]]) -> float:
    """The lower hull at a number of zeros: the lowest chord between any two points above it."""
    values = [cost for x, cost in corners if x == zeros]
    for (left, low), (right, high) in itertools.combinations(corners, 2):
        if left < zeros < right:
            values.append(low + (high - low) * (zeros - left) / (right - left))
    return min(values)


def test_zeros_go_to_the_segment_of_the_smallest_slope() -> None:
    """Slopes of 1 and then 2 in the first layer, 1.5 in the second."""
    zeros, costs = [[10, 20], [10]], [[10.0, 30.0], [15.0]]
    assert [cheapest_keep([20, 20], zeros, costs, keep) for keep in (35, 20, 15)] == [[15, 20], [10, 10], [5, 10]]


@given(
    costs=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=3),
    share=st.floats(0, 1),
)
def test_the_cheapest_allocation_is_that_of_a_search(costs: list[list[int]], share: float) -> None:
    sizes, zeros = [5, 7, 4][: len(costs)], [[1, 3, 4], [2, 4, 6], [1, 2, 3]][: len(costs)]
    held = [tried[-1] for tried in zeros]
    wanted = round(share * sum(held))
    corners = [
        [(0, 0.0), *zip(tried, np.maximum.accumulate(cost).astype(float).tolist(), strict=True)]
        for tried, cost in zip(zeros, costs, strict=True)
    ]
    choices = itertools.product(*(range(most + 1) for most in held))
    best = min(
        sum(hull_cost(z, points) for z, points in zip(choice, corners, strict=True))
        for choice in choices
        if sum(choice) == wanted
    )
    counts = cheapest_keep(sizes, zeros, costs, sum(sizes) - wanted)
    got = [size - count for size, count in zip(sizes, counts, strict=True)]
    assert sum(got) == wanted
    assert sum(hull_cost(z, points) for z, points in zip(got, corners, strict=True)) == pytest.approx(best)


def test_allocation_beyond_what_was_tried_is_a_last_resort() -> None:
    zeros, costs = [[5, 8], [5, 8]], [[1.0, np.inf], [2.0, 3.0]]
    assert cheapest_keep([10, 10], zeros, costs, 7) == [5, 2]
    assert cheapest_keep([10, 10], zeros, costs, 5) == [3, 2]
    assert cheapest_keep([10, 10], zeros, costs, 0) == [0, 0]
    assert cheapest_keep([1], [[0, 1]], [[0.0, 1.0]], 1) == [1]
