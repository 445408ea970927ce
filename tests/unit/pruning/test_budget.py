"""Budgets: the least pruning that meets them, as measured on the result."""

from __future__ import annotations

import gzip
import math
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
import onnx_asr.pruning.channels as channel_pruning
from onnx_asr.errors import OptionError
from onnx_asr.json_values import plain
from onnx_asr.networks.cost import cost
from onnx_asr.networks.latency import Latency, Stopwatch
from onnx_asr.networks.operations import Probe
from onnx_asr.numerics.scores import cheapest_keep
from onnx_asr.pruning.budget import STEPS, Budget, smallest_share
from tests.graphs import digits, images, index, residual_net


@pytest.mark.parametrize("needed", [0, 1, 499, 500, 998, 999])
def test_the_search_finds_the_smallest_share(needed: int) -> None:
    tried = []

    def costs(share: float) -> float:
        tried.append(share)
        return 100.0 if round(share * STEPS) < needed else 10.0

    assert smallest_share(Budget("flops", 0.5), 150.0, costs) == needed / STEPS
    assert len(tried) <= 10


def test_what_cannot_be_reached_or_needs_no_pruning_is_refused() -> None:
    with pytest.raises(OptionError, match=r"target-flops 0.1 cannot be reached.*0.3 of"):
        smallest_share(Budget("flops", 0.1), 100.0, lambda share: 30.0)
    with pytest.raises(OptionError, match=r"2,000 is not below the 1,000 bytes"):
        smallest_share(Budget("size", 2000), 1000.0, lambda share: 0.0)


@pytest.mark.parametrize(
    ("measure", "limit", "words"),
    [
        ("latency", 1.0, "target-latency 1 is out of range"),
        ("latency", 0.0, "target-latency 0 is out of range"),
        ("flops", 1.5, "target-flops 1.5 is out of range"),
        ("flops", float("nan"), "out of range"),
        ("size", -1.0, "or a number of bytes"),
    ],
)
def test_bad_budgets_are_refused(measure: Any, limit: float, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Budget(measure, limit)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("measure", "attribute"), [("flops", "flops"), ("size", "size")])
def test_channels_are_removed_within_a_budget_and_no_more(scope: Any, measure: Any, attribute: str) -> None:
    model = digits("mobilenet")
    result = onnx_asr.prune_channels(model, onnx_asr.ChannelPruneOptions(scope=scope, **{f"target_{measure}": 0.4}))
    before, after = getattr(result.before, attribute), getattr(result.after, attribute)
    assert after <= 0.4 * before
    milder = onnx_asr.prune_channels(model, onnx_asr.ChannelPruneOptions(result.sparsity - 1 / STEPS, scope=scope))
    assert getattr(milder.after, attribute) > 0.4 * before
    assert result.options.budget == Budget(measure, 0.4)
    assert plain(result)["options"]["sparsity"] == result.sparsity
    assert result.latency is None


def test_a_size_may_be_a_number_of_bytes() -> None:
    result = onnx_asr.prune_channels(digits("resnet"), onnx_asr.ChannelPruneOptions(target_size=150_000))
    assert 140_000 < len(result.model.SerializeToString()) <= 150_000


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_zeros_fit_a_gzipped_size(scope: Any) -> None:
    model = digits("resnet")
    result = onnx_asr.prune(model, options=onnx_asr.PruneOptions(target_size=100_000, scope=scope))
    assert 80_000 < len(gzip.compress(result.model.SerializeToString(), 1)) <= 100_100
    assert result.after.compressed <= 100_000


def nonzero_flops(model: onnx.ModelProto) -> int:
    """Multiplications and additions with every weight other than zero, by the sizes of the outputs."""
    places = {}
    shapes = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    found = index(model)
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            dims = [] if node.op_type == "Gemm" else shapes[node.output[0]].type.tensor_type.shape.dim[2:]
            places[node.output[0]] = np.count_nonzero(found.value(node.input[1])) * int(
                np.prod([dim.dim_value for dim in dims])
            )
    return 2 * int(sum(places.values()))


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "sensitivity"])
def test_zeros_fit_a_share_of_the_operations(scope: Any) -> None:
    model = residual_net()
    data = images(48, seed=1) if scope == "sensitivity" else None
    result = onnx_asr.prune(model, data, onnx_asr.PruneOptions(target_flops=0.3, scope=scope, samples=32))
    assert cost(index(result.model), Probe()).nonzero_flops == nonzero_flops(result.model)
    assert 0.28 * nonzero_flops(model) < nonzero_flops(result.model) <= 0.3 * nonzero_flops(model)
    if scope == "sensitivity":  # weights that are read at many places are the dear ones
        by_weights = onnx_asr.prune(model, data, onnx_asr.PruneOptions(result.sparsity, scope=scope, samples=32))
        assert nonzero_flops(by_weights.model) > nonzero_flops(result.model)


def test_prices_justify_the_entries_kept() -> None:
    sizes, zeros = [100, 100], [[50, 100], [50, 100]]
    costs = [[1.0, 3.0], [1.0, 3.0]]
    assert cheapest_keep(sizes, zeros, costs, 150) == [50, 100]
    assert cheapest_keep(sizes, zeros, costs, 1050, [1.0, 10.0]) == [100, 95]
    assert cheapest_keep(sizes, zeros, costs, 550, [1.0, 10.0]) == [100, 45]
    assert cheapest_keep(sizes, zeros, costs, 0, [1.0, 10.0]) == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target_flops": 0.5, "pattern": "2:4"}, "drop target-flops"),
        ({"target_flops": 0.5, "sparsity": 0.5}, "give one of them"),
        ({"target_flops": 0.5, "target_size": 0.5}, "target-size and target-flops each say how much to prune"),
        ({"target_size": 10}, "cannot be reached"),
    ],
)
def test_budgets_that_do_not_go_with_zeros(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        onnx_asr.prune(digits("resnet"), options=onnx_asr.PruneOptions(**arguments))


def test_shapes_are_of_inputs() -> None:
    with pytest.raises(OptionError, match="no input 'y'"):
        onnx_asr.prune(
            digits("resnet"), options=onnx_asr.PruneOptions(target_flops=0.5), input_shapes={"y": (1, 1, 8, 8)}
        )


def weights(model: onnx.ModelProto) -> int:
    return sum(math.prod(item.dims) for item in model.graph.initializer)


class Scale(Stopwatch):
    """Measures parameters as times: a machine without noise, on a net whose parameters all cost the same."""

    measured: list[tuple[float, float]] = []  # noqa: RUF012

    def time(self, model: onnx.ModelProto, seconds: float = 3.0) -> Latency:
        ratio = weights(model) / weights(digits("resnet"))
        ratio *= 1.05 if seconds > 1 else 1.0  # the longer measurement finds the model slower than the search did
        self.measured.append((seconds, ratio))
        return Latency(1.0, ratio, ratio, ratio, ratio, 9, {})


def test_latency_is_searched_and_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_pruning, "Stopwatch", Scale)
    Scale.measured = []
    result = onnx_asr.prune_channels(digits("resnet"), onnx_asr.ChannelPruneOptions(target_latency=0.5))
    assert result.latency is not None
    assert result.latency.ratio == pytest.approx(1.05 * weights(result.model) / weights(digits("resnet")))
    assert 0.4 < result.latency.ratio <= 0.5
    searched = [ratio for seconds, ratio in Scale.measured if seconds < 1]
    again = [ratio for seconds, ratio in Scale.measured if seconds > 1]
    assert len(searched) <= 10
    assert again[0] > 0.5 >= again[-1]
    assert all(ratio > 0.5 for ratio in again[:-1])
    with pytest.raises(OptionError, match=r"target-latency 1e-06 cannot be reached"):
        onnx_asr.prune_channels(digits("resnet"), onnx_asr.ChannelPruneOptions(target_latency=1e-6))


def test_no_net_is_measured_until_it_happens_to_be_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """With multiples of 8 channels, many sparsities give the same net; the long measurement runs once per net."""
    monkeypatch.setattr(channel_pruning, "Stopwatch", Scale)
    Scale.measured = []
    half = onnx_asr.prune_channels(digits("resnet"), onnx_asr.ChannelPruneOptions(0.5, multiple=8)).model
    limit = 1.01 * weights(half) / weights(digits("resnet"))
    result = onnx_asr.prune_channels(digits("resnet"), onnx_asr.ChannelPruneOptions(target_latency=limit, multiple=8))
    assert weights(result.model) < weights(half)
    again = [ratio for seconds, ratio in Scale.measured if seconds > 1]
    assert len(again) == len(set(again)) == 2
