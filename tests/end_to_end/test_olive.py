"""`olive-config`, and the workflow of docs/howto.md with the real Olive where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnx_asr.olive.package import NAME
from onnx_asr.olive.work import library_options
from tests.end_to_end.conftest import PRESET, VALIDATION, cli, run_blocks
from tests.end_to_end.howto import block, section
from tools.paths import MODELS

PAGE = section("A pass of Olive")
WITH_OLIVE = pytest.mark.skipif(importlib.util.find_spec("olive") is None, reason="olive-ai is not installed")
DENSE = MODELS / "digits_resnet.onnx"


def test_the_configuration_is_merged(tmp_path: Path) -> None:
    base, output = tmp_path / "base.json", tmp_path / "package.json"
    base.write_text(json.dumps({"passes": {"Mine": {"module_path": "mine.Mine"}}, "extra_dependencies": {}}))
    done = cli("olive-config", "-o", output, "--base", base)
    assert (done.code, done.err) == (0, "")
    assert f"2 passes, {NAME} among them" in done.out
    assert json.loads(output.read_text())["passes"].keys() == {"Mine", NAME}
    printed = cli("olive-config", "-o", "-", "--base", base, "-q")
    assert printed.out == output.read_text()


def test_mistakes_leave_the_output_alone(tmp_path: Path) -> None:
    base, output = tmp_path / "base.json", tmp_path / "package.json"
    base.write_text("[]")
    output.write_text("mine")
    assert "is no package configuration of Olive" in cli("olive-config", "-o", output, "--base", base).error
    assert "No such file" in cli("olive-config", "-o", output, "--base", tmp_path / "none").error
    assert "would replace" in cli("olive-config", "-o", base, "--base", base).error
    assert (base.read_text(), output.read_text()) == ("[]", "mine")
    if importlib.util.find_spec("olive") is None:
        assert "Olive is not installed here" in cli("olive-config", "-o", output).error


def test_the_shown_workflow_has_options_that_exist() -> None:
    configured = json.loads(block(PAGE, "json"))["passes"]["compress"]
    assert configured.pop("type") == NAME
    assert configured.keys() <= {*library_options(), "mode", "data_config"}


@WITH_OLIVE
def test_the_shown_workflow_runs(folder: Path) -> None:
    (folder / "bin" / "olive").symlink_to(Path(sys.executable).with_name("olive"))
    shown = block(PAGE, "json")
    (folder / "workflow.json").write_text(shown)
    printed = run_blocks(PAGE.replace(f"```json\n{shown}```", ""), folder)
    assert "agreement" in printed
    measured = cli(
        "evaluate", folder / "quantized/model.onnx", "--dense", DENSE, "--data", VALIDATION, *PRESET, "--json"
    )
    assert measured.json["agreement"] > 0.98
    assert {"QuantizeLinear", "DequantizeLinear"} <= {
        node.op_type for node in onnx.load(folder / "quantized/model.onnx").graph.node
    }


def run_pass(folder: Path, given: float = 0.8, **options: object) -> Any:
    """What Olive makes of a model of a given sparsity with our pass alone."""
    from olive.workflows import run

    sparse, package = folder / "sparse.onnx", folder / "package.json"
    assert cli("prune", DENSE, "-o", sparse, "--sparsity", given, "-q").code == 0
    assert cli("olive-config", "-o", package, "-q").code == 0
    workflow = {
        "input_model": {"type": "ONNXModel", "model_path": str(sparse)},
        "passes": {"only": {"type": NAME, **options}},
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
    }
    return run(workflow, package_config=str(package))


@WITH_OLIVE
def test_a_repair_from_a_path(tmp_path: Path) -> None:
    data = str(MODELS / "data" / "digits_calibration.npz")
    found = run_pass(tmp_path, mode="repair", dense=str(DENSE), data=data, preset="digits", method="paired")
    assert found.has_output_model()
    metadata = {entry.key for entry in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert "onnx_asr.version" in metadata


@WITH_OLIVE
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "repair", "dense": str(DENSE)}, "mode 'repair' needs calibration samples"),
        ({"mode": "prune", "sparsity": 0.5, "rounds": 3}, "'rounds' does not apply to mode 'prune'"),
    ],
)
def test_olive_ends_with_bad_input(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_pass(tmp_path, **options)
    assert not (tmp_path / "out" / "model.onnx").exists()


@WITH_OLIVE
def test_a_worse_result_is_no_output_model(tmp_path: Path) -> None:
    data = str(MODELS / "data" / "digits_calibration.npz")
    bad = {"method": "asr", "bn": "ema", "ema_batches": 1, "ema_batch_size": 8, "samples": 8, "momentum": 1.0}
    found = run_pass(tmp_path, 0.02, dense=str(DENSE), data=data, preset="digits", **bad)
    assert not found.has_output_model()
    assert not (tmp_path / "out" / "model.onnx").exists()


CONVERTED = """
import numpy as np
import torch
from olive.data.registry import Registry
from torch import nn


def load(path=None, **kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )
    net(torch.randn(16, 3, 12, 12))
    return net.eval()


def dummy(model=None):
    return (torch.randn(1, 3, 12, 12),)


@Registry.register_dataset()
def noise(**kwargs):
    images = np.random.default_rng(0).standard_normal((64, 3, 12, 12)).astype(np.float32)
    return [({"x": image}, 0) for image in images]
"""


@WITH_OLIVE
def test_between_conversion_and_quantization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a net in torch; the converted model has its weights in a file of their own."""
    from olive.workflows import run

    monkeypatch.chdir(tmp_path)
    script, package = tmp_path / "script.py", tmp_path / "package.json"
    script.write_text(CONVERTED)
    assert cli("olive-config", "-o", package, "-q").code == 0
    few = {"samples": 48, "verify_samples": 16, "rounds": 1}
    sizes = {"input_names": ["x"], "output_names": ["y"], "input_shapes": [[1, 3, 12, 12]]}
    net = {"model_loader": "load", "model_script": str(script), "dummy_inputs_func": "dummy"}
    workflow = {
        "input_model": {
            "type": "PyTorchModel",
            **net,
            "io_config": {**sizes, "dynamic_axes": {"x": {"0": "n"}, "y": {"0": "n"}}},
        },
        "data_configs": [
            {"name": "noise", "user_script": str(script), "load_dataset_config": {"type": "noise"}},
        ],
        "passes": {
            "convert": {"type": "OnnxConversion", "save_as_external_data": True},
            "compress": {"type": NAME, "mode": "compress", "sparsity": 0.7, "data_config": "noise", **few},
            "quantize": {"type": "OnnxStaticQuantization", "data_config": "noise"},
        },
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
    }
    assert run(workflow, package_config=str(package)).has_output_model()
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert "QuantizeLinear" in {node.op_type for node in model.graph.node}
    assert "onnx_asr.sparsity" in {entry.key for entry in model.metadata_props}
