"""The scripts of tools/: each shows its help; documents name scripts and tests that exist."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tools.paths import ROOT

OPTIONAL = ("torch", "torchvision", "torch_pruning", "sklearn")
SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "tools").rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/*.md"), *(ROOT / "tools").rglob("*.py")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_help(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {script} ")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_scripts_and_tests_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    modules = [name.replace(".", "/") + ".py" for name in re.findall(r"\bpython -m (tools[\w.]+\w)", text)]
    paths = re.findall(r"\b(?:tools|tests)/[\w/]+\.(?:py|sh|txt)\b", text)
    assert [name for name in (*modules, *paths) if not (ROOT / name).is_file()] == []
