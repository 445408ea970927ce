"""What docs/ shows runs as it stands there, and docs/options.md is that of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.end_to_end.conftest import PRESET, ROOT, VALIDATION, cli, command, environment

DOCS = ROOT / "docs"
SECTIONS = re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", (DOCS / "howto.md").read_text(), re.MULTILINE)
QUANTIZE, OPENVINO, TENSORRT = (title for title, _ in SECTIONS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the models in it and, first on the path, the command and the interpreter under test."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "onnx-resuscitate"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command())} "$@"\n')
    script.chmod(0o755)
    return tmp_path


def run(title: str, folder: Path) -> str:
    """Run the blocks of a section in order; what they print."""
    printed = ""
    for language, code in re.findall(r"```(\w+)\n(.*?)```", dict(SECTIONS)[title], re.DOTALL):
        if language == "text":
            continue
        line = {"sh": ["sh", "-e", "-c", code], "python": [sys.executable, "-c", code]}[language]
        values = environment()
        values["PATH"] = f"{folder / 'bin'}{os.pathsep}{values['PATH']}"
        done = subprocess.run(line, cwd=folder, env=values, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    return printed


def agreement(path: Path, dense: str) -> float:
    report = cli("evaluate", path, "--dense", ROOT / "models" / dense, "--data", VALIDATION, *PRESET, "--json").json
    return float(report["agreement"])


def test_quantization(folder: Path) -> None:
    assert "agreement" in run(QUANTIZE, folder)
    assert agreement(folder / "int8.onnx", "digits_resnet.onnx") > 0.95
    weights = [numpy_helper.to_array(item) for item in onnx.load(folder / "int8.onnx").graph.initializer]
    weights = [value for value in weights if value.dtype == np.int8 and value.ndim >= 2]
    assert sum(np.sum(value == 0) for value in weights) / sum(value.size for value in weights) > 0.89


def test_openvino(folder: Path) -> None:
    pytest.importorskip("openvino")
    printed = run(OPENVINO, folder)
    assert float(printed.split("same class:")[1]) > 0.99
    assert agreement(folder / "repaired.onnx", "digits_mobilenet.onnx") > 0.95


def test_the_pattern_for_tensorrt(folder: Path) -> None:
    run(TENSORRT, folder)
    first, *others = cli("inspect", folder / "repaired.onnx", "--json").json["layers"]
    assert first["pattern"] == "dense"
    assert {layer["pattern"] for layer in others} == {"2:4"}
    assert agreement(folder / "repaired.onnx", "digits_resnet.onnx") > 0.97


def test_the_options_are_those_of_the_code() -> None:
    script = "from tools.options_reference import reference; print(reference(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == (DOCS / "options.md").read_text(encoding="utf-8"), "run python tools/options_reference.py"


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []
