"""Olive's package configuration keeps all that is in it, and gets our pass."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onnx_asr.errors import DataError, OptionError
from onnx_asr.olive.package import ENTRY, NAME, own_configuration, with_pass

BASE: dict[str, Any] = {
    "passes": {
        "OnnxConversion": {"module_path": "olive.passes.onnx.conversion.OnnxConversion", "run_on_target": True},
        "Mine": {"module_path": "mine.Mine"},
    },
    "extra_dependencies": {"auto-opt": ["optimum"]},
}


def written(folder: Path, content: object) -> Path:
    path = folder / "base.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_pass_is_added_to_all_there_is(tmp_path: Path) -> None:
    merged = with_pass(written(tmp_path, BASE))
    assert merged == {**BASE, "passes": {**BASE["passes"], NAME: dict(ENTRY)}}
    assert with_pass(written(tmp_path, merged)) == merged


def test_an_older_entry_is_replaced_in_whatever_case(tmp_path: Path) -> None:
    base = {"passes": {"resuscitatepass": {"module_path": "old.ResuscitatePass"}, **BASE["passes"]}}
    passes = with_pass(written(tmp_path, base))["passes"]
    assert [name for name in passes if name.lower() == NAME.lower()] == [NAME]
    assert passes[NAME]["module_path"] == "onnx_asr.olive.ResuscitatePass"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("\xff\xfe", "is not JSON"),
        ([], "has no object named 'passes'"),
        ({"passes": ["OnnxConversion"]}, "has no object named 'passes'"),
        ({"input_model": {}}, "is no package configuration of Olive"),
    ],
)
def test_what_is_no_package_configuration(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        with_pass(written(tmp_path, content))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read '.*none\.json': No such file"):
        with_pass(tmp_path / "none.json")


def test_the_configuration_of_the_installed_olive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "olive"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    (package / "olive_config.json").write_text(json.dumps(BASE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "olive", raising=False)
    importlib.invalidate_caches()
    assert own_configuration() == package / "olive_config.json"
    (package / "olive_config.json").unlink()
    with pytest.raises(OptionError, match=r"Olive is not installed here.*name a configuration with --base"):
        own_configuration()


def test_olive_is_imported_for_the_pass_alone() -> None:
    code = (
        "import sys, onnx_asr, onnx_asr.olive, onnx_asr.olive.package, onnx_asr.olive.work; "
        "print(sorted({'olive', 'torch', 'pydantic'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="has no attribute 'Pass'"):
        importlib.import_module("onnx_asr.olive").Pass  # noqa: B018
