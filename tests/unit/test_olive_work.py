"""A configuration of the pass does what the function of its mode does."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr.errors import DataError, OptionError
from onnx_asr.olive.work import WorseError, library_options, made
from tests.graphs import digit_images, digits, pruned
from tools.paths import MODELS

FEW = {"samples": 96, "verify_samples": 32}
DENSE = MODELS / "digits_resnet.onnx"


def batches() -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """As a loader of Olive gives them: inputs and labels."""
    images = digit_images()[0][:128]
    return [({"input": part}, np.zeros(len(part), np.int64)) for part in np.split(images, 4)]


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    path = tmp_path / "sparse.onnx"
    onnx.save(pruned(digits("resnet"), 0.8), path)
    return path


def same(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    return one.SerializeToString() == other.SerializeToString()


def test_repair(sparse: Path) -> None:
    config = {"mode": "repair", "dense": DENSE, "method": "paired", "seed": 3, "refit": {"ridge": 0.1}, "prior": None}
    options = onnx_asr.RepairOptions("paired", seed=3, refit=onnx_asr.RefitRecipe(ridge=0.1, seed=3), **FEW)
    expected = onnx_asr.repair(sparse, digit_images()[0][:128], options, dense=DENSE)
    assert same(made(sparse, {**config, **FEW}, batches()), expected.model)


def test_repair_from_a_path(sparse: Path) -> None:
    folder = str(MODELS / "data" / "digits_calibration")
    given = {"preset": "digits", "preprocessing": {"exif": False}, "method": "bn", **FEW}
    steps = onnx_asr.Preprocessing.from_options(preset="digits", exif=False)
    expected = onnx_asr.repair(sparse, folder, onnx_asr.RepairOptions("bn", **FEW), preprocessing=steps)
    assert same(made(sparse, given, folder), expected.model)


def test_compress() -> None:
    config = {"mode": "compress", "sparsity": 0.7, "rounds": 2, "exclude": ("/Gemm",), "force": False, **FEW}
    repair = onnx_asr.RepairOptions(**FEW)
    options = onnx_asr.CompressOptions(0.7, rounds=2, exclude=("/Gemm",), repair=repair)
    expected = onnx_asr.compress(DENSE, digit_images()[0][:128], options)
    assert same(made(DENSE, config, batches()), expected.repair.model)


def test_prune() -> None:
    zeros = made(DENSE, {"mode": "prune", "sparsity": 0.5, "scope": "erk"}, None)
    assert same(zeros, onnx_asr.prune(DENSE, options=onnx_asr.PruneOptions(0.5, scope="erk")).model)
    fewer = made(DENSE, {"mode": "prune", "pattern": "channel", "sparsity": 0.5, "multiple": 4}, None)
    assert same(fewer, onnx_asr.prune_channels(DENSE, onnx_asr.ChannelPruneOptions(0.5, multiple=4)).model)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        ({"mode": "heal"}, True, "mode 'heal' is unknown: give one of repair, compress, prune"),
        ({"mode": "repair"}, False, "mode 'repair' needs calibration samples: give data_config, or a path"),
        ({"mode": "compress", "sparsity": 0.5, "dense": "d.onnx"}, True, "dense does not apply to mode 'compress'"),
        ({"mode": "compress", "sparsity": 0.5, "method": "bn"}, True, "method does not apply to mode 'compress'"),
        ({"mode": "compress"}, True, "sparsity is missing"),
        ({"mode": "repair", "rounds": 3}, True, "'rounds' does not apply to repair: drop it, or give one of method"),
        ({"mode": "prune", "sparsity": 0.5, "rounds": 3}, False, "'rounds' does not apply to mode 'prune'"),
        ({"mode": "prune", "sparsity": 0.5, "refit": {}}, False, "refit does not apply to mode 'prune'"),
        ({"mode": "prune", "pattern": "channel", "score": "lamp"}, False, "'score' does not apply to channels"),
        ({"mode": "repair", "refit": {"rigde": 1}}, True, "'rigde' does not apply to refit"),
        ({"mode": "repair", "preprocessing": {"size": 1}}, True, "'size' does not apply to preprocessing"),
        ({"mode": "repair", "preset": "imagenet1k"}, True, "there is no preset 'imagenet1k'"),
    ],
)
def test_what_is_refused(config: dict[str, Any], data: bool, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        made(DENSE, config, batches() if data else None)


def test_a_result_that_is_worse_is_an_error(tmp_path: Path) -> None:
    slight = tmp_path / "slight.onnx"
    onnx.save(pruned(digits("resnet"), 0.2), slight)
    data = digit_images()[0][:40]
    config = {"dense": DENSE, "method": "asr", "bn": "ema", "ema_batches": 1, "ema_batch_size": 8, "samples": 8}
    with pytest.raises(WorseError, match="the result is further from the dense model than the input: prune less"):
        made(slight, config, data)
    assert not same(made(slight, {**config, "force": True}, data), onnx.load(slight))


def test_data_that_do_not_fit(sparse: Path) -> None:
    with pytest.raises(DataError, match="which expects"):
        made(sparse, {"dense": DENSE}, [({"input": np.zeros((2, 1, 9, 9), np.float32)}, 0)])


def test_every_option_is_offered_with_its_type() -> None:
    offered = library_options()
    for owner in (
        onnx_asr.RepairOptions,
        onnx_asr.CompressOptions,
        onnx_asr.PruneOptions,
        onnx_asr.ChannelPruneOptions,
    ):
        assert {item.name for item in fields(owner)} - {"repair", "refit"} <= offered.keys()
    assert offered["sparsity"] == float | None
