"""A repair that is stopped at any moment leaves the old file or a whole new one; KILLS sets how often that is tried."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import onnx
import pytest

from tests.end_to_end.conftest import CALIBRATION, DENSE, PRESET, command, environment

KILLS = int(os.environ.get("KILLS", "10"))
OLD = b"the file that was there before"


def start(pruned: str, output: Path, scratch: Path, *options: str) -> subprocess.Popen[str]:
    """A repair whose activations go to files in ``scratch``."""
    arguments = ("repair", pruned, "-o", output, "--dense", DENSE, "--data", CALIBRATION, *PRESET)
    few = (
        "--method",
        "paired",
        "--samples",
        "128",
        "--verify-samples",
        "32",
        "--threads",
        "1",
        "--memory-limit",
        "1MB",
    )
    return subprocess.Popen(
        [*command(), *map(str, arguments), *few, *options],
        env=environment() | {"TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def seconds(pruned: str, tmp_path_factory: pytest.TempPathFactory) -> float:
    """What an undisturbed repair takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    begun = time.perf_counter()
    assert start(pruned, folder / "out.onnx", folder).wait() == 0
    assert names(folder) == ["out.onnx"]
    return time.perf_counter() - begun


def names(folder: Path) -> list[str]:
    """All that is there, but for a mark that importing onnxruntime leaves in the folder for temporary files."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != ".ses")


def test_killed_repairs_leave_whole_files(pruned: str, tmp_path: Path, seconds: float) -> None:
    rng = random.Random(0)
    outcomes = {signal.SIGKILL: 0, signal.SIGINT: 0}
    for number, how in zip(range(KILLS), itertools.cycle(outcomes), strict=False):
        folder, scratch = tmp_path / f"{number}", tmp_path / f"{number}-scratch"
        folder.mkdir()
        scratch.mkdir()
        output = folder / "out.onnx"
        output.write_bytes(OLD)
        process = start(pruned, output, scratch)
        time.sleep(rng.uniform(0.1, 1.1) * seconds)
        process.send_signal(how)
        _, error = process.communicate(timeout=60)
        outcomes[how] += process.returncode != 0
        found = output.read_bytes()
        if found != OLD:
            onnx.checker.check_model(onnx.load_from_string(found))
        elif how == signal.SIGINT:
            assert process.returncode in (130, -signal.SIGINT), error
        if how == signal.SIGINT:
            assert names(folder) == ["out.onnx"]
            assert names(scratch) == []
        else:
            # Where a file cannot be made without a name, it may be caught between that and its removal: still empty.
            assert all((scratch / name).stat().st_size == 0 for name in names(scratch))
    print(f"{KILLS} repairs stopped, before their end: {outcomes}; broken files: 0")
    assert all(outcomes.values())
