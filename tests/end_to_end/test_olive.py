"""`olive-config`, and the workflow of docs/howto.md with the real Olive where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

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


@WITH_OLIVE
@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"mode": "repair", "dense": str(DENSE), "data": "images.npz", "preset": "digits", "method": "paired"}, 0),
        ({"mode": "repair", "dense": str(DENSE)}, 1),
        ({"mode": "prune", "sparsity": 0.5, "rounds": 3}, 1),
    ],
)
def test_a_workflow_of_one_pass(options: dict[str, object], code: int, folder: Path) -> None:
    from olive.workflows import run

    (folder / "images.npz").symlink_to(MODELS / "data" / "digits_calibration.npz")
    sparse, package = folder / "sparse.onnx", folder / "package.json"
    assert cli("prune", DENSE, "-o", sparse, "--sparsity", 0.8, "-q").code == 0
    assert cli("olive-config", "-o", package, "-q").code == 0
    options = {**options, **({"data": str(folder / "images.npz")} if "data" in options else {})}
    result = run(
        {
            "input_model": {"type": "ONNXModel", "model_path": str(sparse)},
            "passes": {"only": {"type": NAME, **options}},
            "output_dir": str(folder / "out"),
            "cache_dir": str(folder / "cache"),
        },
        package_config=str(package),
    )
    assert result.has_output_model() is (code == 0)
    if code == 0:
        metadata = {entry.key for entry in onnx.load(folder / "out" / "model.onnx").metadata_props}
        assert "onnx_asr.version" in metadata
