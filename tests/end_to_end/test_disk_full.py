"""A full disk, simulated by a limit on file sizes: one clear error, and no incomplete file."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import CALIBRATION, DENSE, FEW, PRESET, Done, command, environment

OLD = b"the file that was there before"
LARGEST = 50_000  # bytes: neither the activations' buffers nor the model fit


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--memory-limit", "1kB"), "bytes of activations into"),
        ((), "cannot write"),
    ],
    ids=["activations", "output"],
)
def test_a_full_disk_is_one_error(options: tuple[str, ...], words: str, pruned: str, tmp_path: Path) -> None:
    output, scratch = tmp_path / "out.onnx", tmp_path / "scratch"
    scratch.mkdir()
    output.write_bytes(OLD)
    line = [*command(), "repair", pruned, "-o", str(output), "--dense", DENSE, "--data", CALIBRATION, *PRESET, *FEW]
    done = subprocess.run(
        [*line, "--method", "paired", *options],
        env=environment() | {"TMPDIR": str(scratch)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert words in Done(done.returncode, done.stdout, done.stderr).error
    assert [path.name for path in tmp_path.iterdir() if path != scratch] == ["out.onnx"]
    assert output.read_bytes() == OLD
    assert all(path.name == ".ses" for path in scratch.iterdir())
