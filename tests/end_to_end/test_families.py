"""The structures of well-known families: all of them through the library, two of them through every command."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr import PruneOptions, RepairOptions
from tests.end_to_end.conftest import cli
from tests.graphs import run
from tools.check.families import COLUMNS, MORE, Trial, table
from tools.check.twins import FAMILIES, Twin, twin


def compared(net: Twin) -> list[str]:
    """Outputs, or what a NonMaxSuppression reads."""
    for node in net.model.graph.node:
        if node.op_type == "NonMaxSuppression":
            return list(node.input[:2])
    return [value.name for value in net.model.graph.output]


def distance(net: Twin, model: onnx.ModelProto, samples: dict[str, np.ndarray]) -> float:
    """Mean relative error of the outputs, or the share of integers that differ."""
    names = compared(net)
    dense, other = run(net.model, samples, names), run(model, samples, names)
    errors = []
    for name in names:
        exact = dense[name].astype(np.float64)
        if dense[name].dtype != np.int64:
            errors.append(np.linalg.norm(exact - other[name]) / np.linalg.norm(exact))
        else:
            errors.append(np.mean(exact != other[name]))
    return float(np.mean(errors))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_pruned_and_repaired(name: str) -> None:
    net = twin(name)
    pruned = onnx_asr.prune(net.model, options=PruneOptions(0.5)).model
    options = RepairOptions("refit", samples=32, verify_samples=16)
    result = onnx_asr.repair(pruned, net.samples(48, seed=0), options, dense=net.model)
    assert result.points
    samples = net.samples(1 if "SSD" in name or "batch 1" in name else 16, seed=1)
    before, after = (distance(net, model, samples) for model in (pruned, result.model))
    assert np.isfinite(after)
    assert after <= 1.05 * before


def test_every_command_on_one_of_them(tmp_path: Path) -> None:
    trial = Trial(twin("YOLOv8"), tmp_path)
    trial.run(methods=("auto",))
    assert not [outcome for outcome in trial.outcomes.values() if outcome.is_fault or outcome.cell == "refused"]
    assert float(trial.outcomes["auto"].cell) > float(trial.outcomes["50%"].cell) + 3
    assert set(trial.outcomes) == {*COLUMNS, *MORE} - {"refit", "paired", "bn"}
    assert any("YOLOv8" in line and "| - |" in line for line in table([trial]))


def test_auto_shows_what_it_tried_where_outputs_are_integers(tmp_path: Path) -> None:
    net = twin("DeepLab")
    (tmp_path / "dense.onnx").write_bytes(net.model.SerializeToString())
    pruned = onnx_asr.prune(net.model, options=PruneOptions(0.7)).model
    (tmp_path / "pruned.onnx").write_bytes(pruned.SerializeToString())
    np.savez(tmp_path / "data.npz", **net.samples(48, seed=0))  # type: ignore[arg-type]
    done = cli(
        *["repair", "pruned.onnx", "--dense", "dense.onnx", "--data", "data.npz", "-o", "repaired.onnx"], cwd=tmp_path
    )
    assert done.code == 0
    assert re.search(r"auto tried +agreement +seconds", done.out)


def test_a_fault_is_one(tmp_path: Path) -> None:
    """A repair that is worse than its input, and a file that onnxruntime does not take."""
    net = twin("Keras")
    trial = Trial(net, tmp_path)
    (tmp_path / "dense.onnx").write_bytes(net.model.SerializeToString())
    (tmp_path / "given.onnx").write_bytes(net.model.SerializeToString())
    worse = onnx_asr.prune(net.model, options=PruneOptions(0.7)).model
    (tmp_path / "worse.onnx").write_bytes(worse.SerializeToString())
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    assert trial._judged("worse.onnx", "given.onnx").is_fault
    assert trial._judged("broken.onnx", "").is_fault
    assert trial._judged("given.onnx", "worse.onnx").cell == "same"
