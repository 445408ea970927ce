"""A command stopped at any moment leaves the old files or complete new ones; KILLS sets the number of attempts."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import onnx
import pytest

from tests.end_to_end.conftest import CALIBRATION, DENSE, PRESET, command, environment

KILLS = int(os.environ.get("KILLS", "8"))
OLD = b"the file that was there before"
MODEL, REPORT = "out.onnx", "report.html"
DATA = ("--data", CALIBRATION, *PRESET, "--verify-samples", "32", "--threads", "1", "--memory-limit", "1MB")
REPAIR = ("repair", "PRUNED", "--dense", DENSE, *DATA, "--samples", "128", "--method", "paired")
COMMANDS = {
    "repair": REPAIR,
    "repair --report": (*REPAIR, "--report", REPORT),
    "prune": ("prune", DENSE, "--sparsity", "0.9"),
    "compress": ("compress", DENSE, *DATA, "--sparsity", "0.9", "--samples", "64", "--rounds", "2"),
}
STOPS = (signal.SIGKILL, signal.SIGINT)


def start(name: str, pruned: str, folder: Path, scratch: Path) -> subprocess.Popen[str]:
    """A command that writes into ``folder``; its activations go to files in ``scratch``."""
    arguments = [pruned if argument == "PRUNED" else argument for argument in COMMANDS[name]]
    return subprocess.Popen(
        [*command(), *arguments, "-o", MODEL],
        cwd=folder,
        env=environment() | {"TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def seconds(pruned: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Duration of every command, in seconds, when it is not stopped."""
    found = {}
    for name in COMMANDS:
        folder = tmp_path_factory.mktemp("undisturbed")
        begun = time.perf_counter()
        assert start(name, pruned, folder, folder).wait() == 0
        found[name] = time.perf_counter() - begun
        assert names(folder) == outputs(name)
    return found


def outputs(name: str) -> list[str]:
    return [MODEL, REPORT] if "--report" in name else [MODEL]


def names(folder: Path) -> list[str]:
    """Everything in a folder, except a mark that importing onnxruntime leaves among temporary files."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != ".ses")


def check_whole(path: Path) -> bool:
    """Check that a new file, if there is one, is complete; return whether there is one."""
    found = path.read_bytes()
    if found == OLD:
        return False
    if path.name == MODEL:
        onnx.checker.check_model(onnx.load_from_string(found))
    else:
        assert found.rstrip().endswith(b"</html>")
    return True


def test_stopped_commands_leave_whole_files(pruned: str, tmp_path: Path, seconds: dict[str, float]) -> None:
    rng = random.Random(0)
    stopped: Counter[signal.Signals] = Counter()
    for number, (how, name) in zip(range(KILLS), itertools.cycle(itertools.product(STOPS, COMMANDS)), strict=False):
        folder, scratch = tmp_path / f"{number}", tmp_path / f"{number}-scratch"
        folder.mkdir()
        scratch.mkdir()
        for output in outputs(name):
            (folder / output).write_bytes(OLD)
        process = start(name, pruned, folder, scratch)
        time.sleep(rng.uniform(0.1, 1.1) * seconds[name])
        process.send_signal(how)
        _, error = process.communicate(timeout=60)
        stopped[how] += process.returncode != 0
        new = [output for output in outputs(name) if check_whole(folder / output)]
        if how == signal.SIGINT:
            assert new == outputs(name) or process.returncode in (130, -signal.SIGINT), error
            assert names(folder) == outputs(name)
            assert names(scratch) == []
        else:
            # Where a file cannot be made without a name, it may be caught between that and its removal: still empty.
            assert all((scratch / name).stat().st_size == 0 for name in names(scratch))
    counts = ", ".join(f"{stopped[how]} by {how.name}" for how in STOPS)
    print(f"{KILLS} stops of {', '.join(COMMANDS)}; before the command's end: {counts}; broken files: 0")
    assert all(stopped[how] for how in STOPS)
