"""The command line as a user runs it, and the embedded models to run it on."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tools.paths import MODELS, ROOT

DENSE = str(MODELS / "digits_resnet.onnx")
FOLDER = str(MODELS / "data" / "digits_calibration")
CALIBRATION = str(MODELS / "data" / "digits_calibration.npz")
VALIDATION = str(MODELS / "data" / "digits_validation.npz")
PRESET = ("--preset", "digits")
FEW = ("--samples", "64", "--verify-samples", "64", "--threads", "1")

_LIMIT = 120  # seconds a command
_SCRIPT = Path(sys.executable).with_name("onnx-resuscitate")


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The object that --json printed; anything else on stdout is an error."""
        values = json.loads(self.out)
        assert isinstance(values, dict)
        return values

    @property
    def error(self) -> str:
        """The one line on stderr of a command that refused, with nothing on stdout."""
        assert self.code == 2, self.err
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "unexpected" not in lines[0]
        return lines[0]


def command() -> list[str]:
    """The installed script, or the module if the package is not installed."""
    return [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-m", "onnx_asr"]


def environment() -> dict[str, str]:
    """The environment with one BLAS thread, and with the checkout on the path if the package is not installed."""
    values = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if not _SCRIPT.exists():
        values["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return values


def cli(*arguments: object, cwd: Path | None = None) -> Done:
    """Run a command to its end."""
    done = subprocess.run(
        [*command(), *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run_blocks(text: str, folder: Path) -> str:
    """Run the sh and Python blocks of a Markdown text in order, and return what they print; others stay out.

    A Python block that begins with the name of a file is written there instead.
    """
    printed = ""
    for language, code in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL):
        if language in ("text", "yaml"):
            continue
        if named := re.match(r"# (\w+\.py)\n", code):
            (folder / named[1]).write_text(code)
            continue
        line = {"sh": ["sh", "-e", "-c", code], "python": [sys.executable, "-c", code]}[language]
        values = environment()
        values["PATH"] = f"{folder / 'bin'}{os.pathsep}{values['PATH']}"
        done = subprocess.run(line, cwd=folder, env=values, capture_output=True, text=True, timeout=_LIMIT, check=False)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    return printed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that contains the models and, first on the path of run_blocks, the command under test."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "onnx-resuscitate"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command())} "$@"\n')
    script.chmod(0o755)
    return tmp_path


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """digits_resnet with 90% of its weights pruned."""
    path = tmp_path_factory.mktemp("pruned") / "pruned.onnx"
    done = cli("prune", DENSE, "-o", path, "--sparsity", 0.9, "-q")
    assert done == Done(0, "", "")
    return str(path)
