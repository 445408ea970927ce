"""Every block of README.md runs as printed, in a folder that contains nothing but the models.

Only the installation is checked otherwise: `pip install` is taken out of its block, and its extras are compared with
those of pyproject.toml.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import onnx

from tests.end_to_end.conftest import run_blocks
from tools.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALLATION = re.compile(r"^pip install .*\n", re.MULTILINE)
ROW = re.compile(r"^(\w+)(?: \(chose \w+\))? +([\d.]+)% +([\d.]+)%", re.MULTILINE)


def test_every_block_runs(folder: Path) -> None:
    printed = run_blocks(INSTALLATION.sub("", README), folder)
    shown, found = ({name: values for name, *values in ROW.findall(text)} for text in (README, printed))
    assert {"dense", "pruned", "auto", "refit", "bn"} <= set(shown)
    for name, values in shown.items():
        assert all(abs(float(old) - float(new)) < 2 for old, new in zip(values, found[name], strict=True)), name
    assert all(word in printed for word in ("top-1", "seconds", "Netron"))

    *_, last = printed.splitlines()
    method, before, _, after = last.split()
    assert method == "refit"
    assert float(after) < 0.2 * float(before)
    onnx.checker.check_model(onnx.load(folder / "repaired.onnx"), full_check=True)


def test_the_installation_is_that_of_the_project() -> None:
    extras = set(PROJECT["optional-dependencies"])
    assert set(re.findall(r"\.\[(\w+)\]", README)) == {"cpu", "gpu"} <= extras
    assert all(f"`{extra}`" in README for extra in extras - {"cpu", "gpu", "dev"})
    (listed,) = re.findall(r"^This installs (.*), plus", README, re.MULTILINE)
    named = set(re.findall(r"[\w-]+", listed.lower().replace("on python 3.10", ""))) - {"and"}
    assert named == {re.split(r"[<>=; ]", requirement)[0] for requirement in PROJECT["dependencies"]}


def test_every_command_is_named() -> None:
    commands = re.findall(r"^## (\w+)$", (ROOT / "docs" / "options.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) > 5
    assert [name for name in commands if not re.search(rf"(`|onnx-resuscitate ){name}\b", README)] == []
