"""`sweep` in one process, on a Dask cluster with a killed worker, interrupted, and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_asr
from onnx_asr import SweepGrid, sweep
from onnx_asr.data import PRESETS
from onnx_asr.errors import OnnxAsrError, OptionError
from tests.end_to_end.conftest import CALIBRATION, DENSE, FOLDER, PRESET, VALIDATION, cli, command, environment

GRID = ("--sparsities", "0.8,0.9", "--methods", "none,bn,paired,refit,compress", "--rounds", 2)
FEW = ("--samples", 64, "--refit-rows", 1000, "--relu-steps", 1, "--threads", 1)
SWEEP = ("sweep", DENSE, "--data", FOLDER, *PRESET, "--test", VALIDATION, *GRID, *FEW)
CELLS = 10
DIGITS = PRESETS["digits"]
PATIENCE = 120  # seconds


def cells(path: Path) -> dict[tuple[Any, ...], Any]:
    """The scores of the cells in a results file."""
    found = json.loads(path.read_text())["cells"] if path.exists() else []
    return {(cell["pattern"], cell["sparsity"], cell["method"]): cell["fidelity"] for cell in found}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], Any]:
    """The cells of a sweep in one process."""
    path = tmp_path_factory.mktemp("alone") / "results.json"
    done = cli(*SWEEP, "-o", path, "--workers", 1)
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^top-1 \(KL\) +80% +90%$", done.out, re.MULTILINE)
    assert "dense model: 99.2%; scored on 600 samples, calibrated on 64 others" in done.out
    found = cells(path)
    assert len(found) == CELLS
    top1 = {method: fidelity["top1"] for (_, share, method), fidelity in found.items() if share == 0.9}
    assert top1["none"] < 0.2 < 0.9 < min(top1["paired"], top1["refit"], top1["compress"])
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds, while a process runs."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def start(*arguments: object) -> subprocess.Popen[str]:
    line = [*command(), *map(str, arguments)]
    return subprocess.Popen(
        line,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A Dask scheduler and two workers on loopback: the address, and the three processes."""
    distributed = pytest.importorskip("distributed")
    processes: list[subprocess.Popen[bytes]] = []

    def run(module: str, *arguments: object) -> None:
        line = [sys.executable, "-m", f"distributed.cli.{module}", *map(str, arguments)]
        processes.append(
            subprocess.Popen(
                line, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )

    scheduler = tmp_path / "scheduler.json"
    try:
        run("dask_scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", scheduler)
        end = time.monotonic() + PATIENCE
        while not scheduler.exists() or not scheduler.read_text().endswith("}"):
            assert time.monotonic() < end
            time.sleep(0.02)
        address = json.loads(scheduler.read_text())["address"]
        for _ in range(2):
            run("dask_worker", address, "--nthreads", 1, "--no-nanny", "--no-dashboard", "--local-directory", tmp_path)
        with distributed.Client(address) as client:
            client.wait_for_workers(2, timeout=PATIENCE)
        yield address, processes
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def test_a_killed_worker_changes_nothing(
    alone: dict[Any, Any], cluster: tuple[str, list[subprocess.Popen[bytes]]], tmp_path: Path
) -> None:
    address, (_, *workers) = cluster
    path = tmp_path / "results.json"
    process = start(*SWEEP, "-o", path, "--cluster", address)
    wait_for(lambda: len(cells(path)) >= 2, process)
    workers[0].kill()
    assert len(cells(path)) < CELLS - 2
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert "none" in out
    assert workers[0].wait() == -signal.SIGKILL
    assert workers[1].poll() is None
    assert cells(path) == alone


def test_a_lost_scheduler_is_reported(
    cluster: tuple[str, list[subprocess.Popen[bytes]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, (scheduler, *_) = cluster
    monkeypatch.setattr("onnx_asr.sweeping.workers._PATIENCE", 2)

    def progress(stage: str, fraction: float) -> None:
        if "cells done" in stage:
            scheduler.kill()

    path, grid = tmp_path / "results.json", SweepGrid((0.5, 0.7, 0.9))
    execution = onnx_asr.Execution(progress=progress)
    with pytest.raises(OnnxAsrError, match="the workers are lost"):
        sweep(DENSE, CALIBRATION, grid, preprocessing=DIGITS, results=path, cluster=address, execution=execution)
    assert 1 <= len(cells(path)) < len(grid.cells)


def test_workers_that_find_other_files_refuse(
    cluster: tuple[str, list[subprocess.Popen[bytes]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data change before the workers read them; with all workers gone, the sweep ends."""
    address, (_, *workers) = cluster
    data = tmp_path / "data.npz"
    arrays = dict(np.load(CALIBRATION))
    np.savez(data, **arrays)

    def progress(stage: str, fraction: float) -> None:
        if "starting the workers" in stage:
            np.savez(data, images=arrays["images"][::-1], labels=arrays["labels"])

    grid = SweepGrid((0.5,), methods=("none",))
    execution = onnx_asr.Execution(progress=progress)
    result = sweep(DENSE, str(data), grid, preprocessing=DIGITS, cluster=address, execution=execution)
    (reason,) = result.failures
    assert "finds another calibration than the sweep was started with" in reason
    for worker in workers:
        worker.kill()
    monkeypatch.setattr("onnx_asr.sweeping.workers._PATIENCE", 2)
    with pytest.raises(OptionError, match="has no workers: start some"):
        sweep(DENSE, CALIBRATION, grid, preprocessing=DIGITS, cluster=address)


def test_an_interrupt_keeps_what_is_finished_and_ends_the_workers(alone: dict[Any, Any], tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    path = tmp_path / "results.json"
    process = start(*SWEEP, "-o", path, "--workers", 2)
    wait_for(lambda: len(cells(path)) >= 1, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does it: the workers get it, too
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    finished = cells(path)
    assert 1 <= len(finished) < CELLS
    assert all(alone[cell] == fidelity for cell, fidelity in finished.items())
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]
    done = cli(*SWEEP, "-o", path, "--workers", 1, "--json")
    assert (done.code, done.err) == (0, "")
    assert cells(path) == alone
    assert done.json["cells"] == json.loads(path.read_text())["cells"]


def test_failed_cells_are_listed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    bare = ("--sparsities", 0.5, "--patterns", "channel", "--workers", 1)
    done = cli("sweep", DENSE, "--data", CALIBRATION, *PRESET, *FEW, *bare, "-o", path, "--methods", "none,compress")
    assert done.code == 0
    assert done.err.startswith("warning: 1 of 2 cells failed, for: 'compress' zeros weights")
    assert "failed: compress at channel 50%: 'compress' zeros weights" in done.out
    path.unlink()
    done = cli("sweep", DENSE, "--data", CALIBRATION, *PRESET, *FEW, *bare, "-o", path, "--methods", "compress", "-q")
    assert (done.code, done.out) == (2, "")


def test_workers_find_a_metric_in_the_current_directory(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    module = tmp_path / "wrong.py"
    module.write_text(
        "def share(samples, dense, outputs):\n    (found,) = outputs.values()\n"
        "    return (found.argmax(axis=1) != samples.labels).mean()\n"
    )
    data = ("--data", CALIBRATION, *PRESET, *FEW, "--test", VALIDATION)
    given = ("sweep", DENSE, *data, "--sparsities", 0.9, "--methods", "none,bn,auto", "-o", "results.json")
    done = cli(*given, "--metric", "wrong:share", "--workers", 2, "--json", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    found = [cell["fidelity"] for cell in done.json["cells"]]
    assert [fidelity["metric"] for fidelity in found] == pytest.approx([1 - fidelity["top1"] for fidelity in found])
    assert found[0]["metric"] > found[2]["metric"]
    module.write_text(module.read_text() + "\n# changed\n")
    again = cli(*given, "--metric", "wrong:share", "--workers", 1, cwd=tmp_path)
    assert "holds the cells of another sweep (metric_sha256 is" in again.error


def test_plot_and_report(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("results.json", "plot.svg", "report.html")}
    small = ("--sparsities", "0.5,0.9", "--patterns", "unstructured,2:4", "--methods", "none,paired", "--workers", 1)
    data = ("--data", FOLDER, *PRESET, *FEW, "--verify-samples", 64)
    written = ("-o", files["results.json"], "--plot", files["plot.svg"], "--report", files["report.html"])
    done = cli("sweep", DENSE, *data, *small, *written, "--json")
    assert (done.code, done.err) == (0, "")
    assert (done.json["plot"], done.json["report"]) == (str(files["plot.svg"]), str(files["report.html"]))
    assert done.json["conditions"]["scored"]["samples"] == 64
    assert files["plot.svg"].read_text().startswith("<?xml")
    page = files["report.html"].read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<img") == 2
    assert "onnx-resuscitate sweep " in page
    again = cli("sweep", DENSE, *data, *small, *written)
    assert f"plot: {files['plot.svg']}" in again.out


def test_refusals_leave_no_file(tmp_path: Path) -> None:
    target, other = tmp_path / "results.json", tmp_path / "other.svg"
    base = ("sweep", DENSE, "--data", FOLDER, *PRESET, "-o", target)
    for arguments, words in (
        (("--methods", "magic"), "method 'magic' is unknown: give one of none, bn, "),
        (("--plot", tmp_path / "plot.pdf"), "ends in .svg or .png"),
        (("--plot", other, "--report", other), "--plot and --report both name"),
        (("--report", target), "--report and --output both name"),
        (("--workers", 2, "--cluster", "tcp://localhost:1"), "give one of them"),
        (("--test", tmp_path / "nothing"), "does not exist"),
        (("--methods", "auto,auto", "--cluster", "nonsense://x"), "no Dask scheduler answers at nonsense://x"),
    ):
        assert words in cli(*base, *arguments).error
        assert list(tmp_path.iterdir()) == []
    target.write_text("something else")
    assert "is not the results file of a sweep" in cli(*base).error
    assert target.read_text() == "something else"
