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
