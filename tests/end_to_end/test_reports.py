"""inspect, and the HTML report of the commands that write one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import CALIBRATION, DENSE, FEW, FOLDER, PRESET, cli, environment
from tools.paths import ROOT

DATA = ("--dense", DENSE, "--data", FOLDER, *PRESET)
QUICK = ("--refit-rows", 1000, "--rounds", 1, "--sparsity", 0.9)


def test_inspect_for_a_reader(pruned):
    done = cli("inspect", pruned)
    assert (done.code, done.err) == (0, "")
    for words in (
        "BatchNormalization: behind 10 of 10 convolutions; weights 90.0% sparse",
        "unstructured",
        "weights+batchnorm",
        "/5/5.2/Gemm",
    ):
        assert words in done.out
    assert "repair without --dense: auto, paired, asr, layerwise, raw, bn" in done.out
    done = cli("inspect", pruned, *DATA)
    assert (done.code, done.err) == (0, "")
    assert "3 of 11 layers lost most of their channels, the first is /4/body/body.0/body.0.0/Conv" in done.out
    assert "per channel" in done.out


def test_inspect_as_json(pruned):
    report = cli("inspect", pruned, *DATA, "--samples", 64, "--channels", "/5/5.2/Gemm", "--json").json
    assert (report["command"], report["samples"], report["report"]) == ("inspect", 64, None)
    assert len(report["layers"]) == 11
    assert report["layers"][-1]["damage"]["log_errors"]["none"] > 0.5
    assert [row["channel"] for row in report["channels"]] == list(range(10))
    assert {"ratio", "correlation", "collapsed", "zeros"} <= set(report["channels"][0])
    assert "channels" not in cli("inspect", pruned, "--json").json


def test_inspect_one_layer(pruned):
    done = cli("inspect", pruned, "--channels", "/5/5.2/Gemm")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 2 + 10
    error = cli("inspect", pruned, "--channels", "/4/body/body.0/Conv").error
    assert "no layer '/4/body/body.0/Conv'" in error
    assert "'/4/body/body.0/body.0.0/Conv'" in error


@pytest.mark.parametrize("command", ["prune", "repair", "compress", "inspect"])
def test_reports(command, pruned, tmp_path):
    page, target = tmp_path / "report.html", tmp_path / "out.onnx"
    arguments = {
        "prune": ("prune", DENSE, "--pattern", "2:4", "-o", target),
        "repair": ("repair", pruned, *DATA, *FEW, "--method", "paired", "-o", target),
        "compress": ("compress", DENSE, "--data", CALIBRATION, *PRESET, *FEW, *QUICK, "-o", target),
        "inspect": ("inspect", pruned, *DATA),
    }[command]
    done = cli(*arguments, "--report", page, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["report"] == str(page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert f"onnx-resuscitate {command} " in text
    assert f"--report {page}" in text
    assert text.count("<img") == {"prune": 0, "repair": 10, "compress": 10, "inspect": 2}[command]


def test_a_result_that_is_worse_gets_its_report(tmp_path):
    page, target, sparse = tmp_path / "report.html", tmp_path / "out.onnx", tmp_path / "sparse.onnx"
    cli("prune", DENSE, "-o", sparse, "--sparsity", 0.02)
    done = cli("repair", sparse, *DATA, *FEW, "--method", "bn", "-o", target, "--report", page)
    assert done.code == 1
    assert not target.exists()
    assert "further from the dense model than its input; it was not written" in page.read_text(encoding="utf-8")


def test_refusals_leave_no_file(pruned, tmp_path):
    target, page, nowhere = tmp_path / "out.onnx", tmp_path / "report.html", tmp_path / "missing" / "report.html"
    for arguments, words in (
        (("prune", DENSE, "--sparsity", 0.5, "-o", target, "--report", target), "its own file"),
        (("prune", DENSE, "--sparsity", 0.5, "-o", target, "--report", nowhere), "does not exist"),
        (("inspect", pruned, "--dense", DENSE, "--report", page), "--data"),
        (("inspect", pruned, "--channels", "nothing", "--report", page), "no layer 'nothing'"),
    ):
        assert words in cli(*arguments).error
        assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_reported_before_any_work(tmp_path):
    script = (
        "import sys; sys.modules['matplotlib'] = None; from onnx_asr.cli.app import run; "
        f"sys.exit(run(['prune', {DENSE!r}, '--sparsity', '0.5', '-o', 'out.onnx', '--report', 'report.html']))"
    )
    values = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=values, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --report needs matplotlib, ")
    assert done.stderr.endswith("pip install onnx-resuscitate[report]\n")
    assert list(tmp_path.iterdir()) == []


def test_names_of_files_that_are_not_text(pruned, tmp_path, monkeypatch):
    folder, page = tmp_path / "images", tmp_path / "report.html"
    shutil.copytree(Path(FOLDER) / "0", folder)
    try:
        (folder / os.fsdecode(b"b\xff\x1b[2J\xe4d.png")).write_text("no image")
    except OSError:
        pytest.skip("this file system has no such names")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    arguments = ("repair", pruned, "-o", tmp_path / "out.onnx", "--dense", DENSE, "--data", folder, *PRESET, *FEW)
    assert r"/b\udcff\x1b[2J\udce4d.png cannot be read" in cli(*arguments).error
    done = cli(*arguments, "--method", "paired", "--force", "--skip-bad-images", "--report", page)
    assert done.code in (0, 1), done.err
    for text in (done.out, page.read_text(encoding="utf-8")):
        assert r"were skipped: b\udcff" in text
