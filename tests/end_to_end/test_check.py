"""`check` as a gate: exit codes, the table, JSON and JUnit; the workflow that docs/howto.md shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.end_to_end.conftest import DENSE, PRESET, VALIDATION, cli, environment, run_blocks
from tests.end_to_end.howto import block, section

SCORED = ("--dense", DENSE, "--data", VALIDATION, *PRESET)


def test_all_bars_are_cleared(tmp_path: Path) -> None:
    junit = tmp_path / "check.xml"
    bars = ("--min-top1", 0.98, "--min-agreement", 1, "--max-kl", 0, "--max-size", "1MB", "--min-sparsity", 0)
    done = cli("check", DENSE, *SCORED, *bars, "--junit", junit)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("passed") == 5
    suite = ElementTree.parse(junit).getroot()
    assert suite.attrib == {"tests": "5", "failures": "0", "errors": "0"}
    assert [case.get("name") for case in suite.iter("testcase")][-1] == "max-size 1000000"
    assert list(suite.iter("failure")) == []


def test_a_bar_is_missed(pruned: str, tmp_path: Path) -> None:
    junit = tmp_path / "check.xml"
    done = cli("check", pruned, *SCORED, "--min-agreement", 0.97, "--max-size", "1MB", "--junit", junit, "--json")
    assert done.code == 1
    values = done.json
    agreement, size = values["criteria"]
    assert values["passed"] is False
    assert (agreement["name"], agreement["bar"], agreement["passed"]) == ("min_agreement", 0.97, False)
    assert agreement["measured"] == values["fidelity"]["agreement"]
    assert (size["measured"], size["passed"]) == (Path(pruned).stat().st_size, True)
    assert done.err.startswith("warning: 1 of 2 bars missed: agreement 0.")
    (failure,) = ElementTree.parse(junit).getroot().iter("failure")
    assert failure.attrib["message"].endswith("is below min-agreement 0.97")


def test_a_file_alone_needs_no_data(pruned: str) -> None:
    assert cli("check", pruned, "--max-size", "1MB", "--min-sparsity", 0.89, "-q").code == 0
    done = cli("check", pruned, "--max-size", "1kB", "-q")
    assert (done.code, done.out) == (1, "")
    assert done.err.endswith("is above max-size 1000\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "there is no bar to check"),
        (("--min-agreement", 0.9), "give them with --data"),
        (("--min-agreement", 0.9, "--data", VALIDATION, *PRESET), "give it with --dense"),
        ((*SCORED, "--max-size", "5MB"), "no bar needs the data"),
        ((*SCORED, "--min-agreement", 97), "give a share from 0 to 1"),
        (("--max-size", "5 apples"), "is not a size"),
        (("--max-size", "5MB", "--junit", DENSE), "which is read (MODEL)"),
    ],
)
def test_bad_input_writes_nothing(arguments: tuple[Any, ...], words: str, tmp_path: Path) -> None:
    junit = tmp_path / "check.xml"
    junit.write_text("mine")
    output = () if "--junit" in arguments else ("--junit", junit)
    before = Path(DENSE).read_bytes()
    assert words in cli("check", DENSE, *arguments, *output).error
    assert junit.read_text() == "mine"
    assert Path(DENSE).read_bytes() == before


def test_a_name_that_xml_cannot_hold(tmp_path: Path) -> None:
    model, junit = tmp_path / "a\x01<b>.onnx", tmp_path / "check.xml"
    model.symlink_to(DENSE)
    assert cli("check", model, "--max-size", "1MB", "--junit", junit, "-q").code == 0
    (case,) = ElementTree.parse(junit).getroot().iter("testcase")
    assert case.attrib["classname"].endswith("a\\x01<b>.onnx")


def test_the_workflow_is_valid_and_its_commands_run(folder: Path) -> None:
    """Against the schema of GitHub's workflows; its steps run as on GitHub, where the package is installed."""
    pytest.importorskip("check_jsonschema")
    yaml = pytest.importorskip("ruamel.yaml")
    page = section("Gate a model in continuous integration")
    assert "cleared: True missed:" in run_blocks(page, folder)
    text = block(page, "yaml")
    workflow = folder / "check.yml"
    workflow.write_text(text)
    linter = ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow)]
    lint = subprocess.run(linter, env=on_the_path(folder), capture_output=True, text=True, check=False)
    assert lint.returncode == 0, lint.stdout
    (job,) = yaml.YAML(typ="safe").load(text)["jobs"].values()
    install, *commands = [step["run"] for step in job["steps"] if "run" in step]
    assert install.startswith("pip install ")
    for command in commands:
        line = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command]
        done = subprocess.run(line, cwd=folder, env=on_the_path(folder), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (upload,) = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert ElementTree.parse(folder / upload["with"]["path"]).getroot().attrib["failures"] == "0"


def on_the_path(folder: Path) -> dict[str, str]:
    """The environment with the command under test, and with the tools of this environment."""
    values = environment()
    paths = (str(folder / "bin"), str(Path(sys.executable).parent), values["PATH"])
    return values | {"PATH": os.pathsep.join(paths)}
