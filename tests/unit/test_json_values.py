"""Every public result as JSON values: real results, those with numbers that are not finite among them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr.demo.pipeline import DemoResult, DemoRow
from onnx_asr.json_values import MERGED, key, plain
from tests.graphs import images, net, pruned, residual_net

MODEL, DATA = residual_net(), images(48, seed=1)
FEW = onnx_asr.RepairOptions("paired", samples=32, verify_samples=16)
FIDELITY = {"samples", "top1", "top5", "agreement", "kl", "snr_db", "detection_error", "metric", "mean_ap", "mean_ap50"}
COST = {"parameters", "nonzeros", "flops", "nonzero_flops", "size", "compressed", "unknown"}
REPAIR = {
    *("options", "improved", "modified", "verification", "candidates", "sparsity", "calibration"),
    *("points", "skipped", "notes", "seconds"),
}


def constant_channel() -> onnx.ModelProto:
    """The first channel never varies, so that no ratio of variances is defined."""
    model = net("g (float[N,3,8,8] x) => (float[N,2,8,8] y) { y = Conv (x, w) }", w=(2, 3, 1, 1))
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0] = 0
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    return model


def sweep() -> onnx_asr.SweepResult:
    grid = onnx_asr.SweepGrid((0.0,), methods=("none", "bn"))
    return onnx_asr.sweep(constant_channel(), DATA, grid, onnx_asr.SweepSettings(repair=FEW))


def demo() -> DemoResult:
    row = DemoRow("dense", onnx_asr.Fidelity(8, top1=1.0, kl=math.nan, snr_db=math.inf), None)
    return DemoResult("net.onnx", 0.9, Path("images"), 8, (row,), "refit", Path("a.onnx"), Path("b.onnx"), ())


RESULTS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "prune": (
        lambda: onnx_asr.prune(MODEL, options=onnx_asr.PruneOptions(0.5)),
        {"sparsity", "options", "before", "after", "helps", "modified", "layers", "skipped", "notes"},
    ),
    "prune_channels": (
        lambda: onnx_asr.prune_channels(MODEL, onnx_asr.ChannelPruneOptions(target_size=0.9)),
        {"options", "before", "after", "latency", "helps", "modified", "groups", "skipped"},
    ),
    "shrink": (
        lambda: onnx_asr.shrink(MODEL),
        {"before", "after", "helps", "modified", "error", "layers", "notes"},
    ),
    "repair": (lambda: onnx_asr.repair(MODEL, DATA, FEW, dense=MODEL), REPAIR),
    "compress": (
        lambda: onnx_asr.compress(MODEL, DATA, onnx_asr.CompressOptions(0.5, rounds=1, repair=FEW)),
        REPAIR | {"compress", "before", "after", "helps", "layers", "round_seconds"},
    ),
    "sensitivity": (
        lambda: onnx_asr.sensitivity(MODEL, DATA, onnx_asr.SensitivityOptions((0.5,), include=("stem",), repair=FEW)),
        {
            *("sparsities", "score", "measure", "samples", "calibration_samples", "seconds"),
            "layers",
            "skipped",
            "notes",
        },
    ),
    "evaluate": (lambda: onnx_asr.evaluate(MODEL, DATA, dense=MODEL), FIDELITY),
    "inspect": (
        lambda: onnx_asr.inspect(constant_channel(), DATA, dense=constant_channel()),
        {
            *("opset", "nodes", "inputs", "bytes", "compressed_bytes", "sparsity", "batchnorm", "layers", "skipped"),
            *("repair", "metadata", "samples"),
        },
    ),
    "sweep": (sweep, {"version", "conditions", "measure", "dense", "cells", "notes"}),
    "measure_latency": (
        lambda: onnx_asr.measure_latency(MODEL, MODEL, input_shapes={"x": (1, 3, 8, 8)}, seconds=0),
        {"seconds_before", "seconds_after", "ratio", "low", "high", "pairs", "shapes"},
    ),
    "demo": (
        demo,
        {"model", "sparsity", "calibration", "rows", "best", "pruned", "repaired", "notes"},
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_is_json(name: str) -> None:
    make, keys = RESULTS[name]
    values = json.loads(json.dumps(plain(make()), allow_nan=False))
    assert values.keys() >= keys
    if "after" in keys:
        assert values["after"].keys() == COST
    for skip in values.get("skipped", ()):
        assert skip.keys() == {"node", "name", "op_type", "reason", "code"}


def test_numbers_that_are_not_finite_are_none() -> None:
    assert plain(RESULTS["evaluate"][0]())["snr_db"] is None  # infinite
    (layer,) = plain(RESULTS["inspect"][0]())["layers"]
    assert layer["damage"]["ratios"][0] is None  # NaN
    assert plain(sweep())["dense"]["snr_db"] is None
    assert plain([math.nan, -math.inf, np.float32(np.inf), np.array([[np.nan, 1.0]])]) == [
        None,
        None,
        None,
        [[None, 1.0]],
    ]


def test_parts_of_results_keep_their_keys() -> None:
    found = plain(RESULTS["sensitivity"][0]())["layers"][0]
    assert found.keys() == {"name", "op_type", "shape", "size", "tried"}
    assert found["tried"][0].keys() == FIDELITY | {"sparsity", "distance"}
    cells = plain(sweep())["cells"]
    assert {cell["method"]: cell["error"] is None for cell in cells} == {"none": True, "bn": False}
    assert cells[0].keys() == {
        *("pattern", "sparsity", "method", "weights_gone", "fidelity", "seconds", "chosen", "error")
    }
    auto = onnx_asr.RepairOptions(samples=32, verify_samples=16)
    repaired = plain(onnx_asr.repair(pruned(MODEL, 0.5), DATA, auto, dense=MODEL))
    assert repaired["calibration"].keys() == {"samples", "sha256"}
    assert repaired["verification"].keys() == {"before", "after", "held_out", "verdict", "improved", "fitted"}
    assert all(candidate.keys() == FIDELITY | {"method", "seconds"} for candidate in repaired["candidates"])
    channels = RESULTS["prune_channels"][0]()
    options = plain(channels)["options"]
    assert options["sparsity"] == channels.sparsity > 0
    assert (options["pattern"], options["budget"]) == ("channel", {"measure": "size", "limit": 0.9})
    demonstrated = plain(demo())
    assert demonstrated["calibration"] == {"path": "images", "samples": 8}
    assert demonstrated["rows"][0].keys() == FIDELITY | {"name", "seconds", "chosen"}


def test_results_say_whether_the_model_was_modified() -> None:
    assert onnx_asr.prune(MODEL, options=onnx_asr.PruneOptions(0.5)).modified
    assert not onnx_asr.prune(MODEL, options=onnx_asr.PruneOptions(0.0)).modified
    assert onnx_asr.prune_channels(MODEL, onnx_asr.ChannelPruneOptions(0.5)).modified
    assert not onnx_asr.prune_channels(MODEL, onnx_asr.ChannelPruneOptions(0.0)).modified
    assert not onnx_asr.shrink(MODEL).modified


@dataclass(frozen=True)
class Inner:
    a: int
    b: tuple[float, ...]


@dataclass(frozen=True)
class Outer:
    derived: ClassVar = ("double",)

    first: Inner = field(metadata=MERGED)
    second: Inner = field(metadata=key("other"))
    third: int = field(metadata=key("other.c"))
    hidden: object = field(repr=False)

    @property
    def double(self) -> int:
        return 2 * self.third


def test_fields_are_merged_renamed_nested_and_left_out() -> None:
    outer = Outer(Inner(1, (2.0, math.nan)), Inner(3, ()), 4, object())
    assert plain(outer) == {"a": 1, "b": [2.0, None], "other": {"a": 3, "b": [], "c": 4}, "double": 8}
    assert plain({Inner(1, ()): {"c": Path("x")}}) == [{"a": 1, "b": [], "c": "x"}]
    assert plain({1: np.bool_(True), "n": np.int64(2)}) == {"1": True, "n": 2}
