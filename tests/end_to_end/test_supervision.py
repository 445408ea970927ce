"""A crash or hang of onnxruntime is one error of the command."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.end_to_end.conftest import CALIBRATION, DENSE, FEW, PRESET, Done, cli, command, environment
from tests.graphs import net

OLD = b"the file that was there before"
REPAIR = ("--dense", DENSE, "--data", CALIBRATION, *PRESET, *FEW, "--method", "paired")

ENDLESS = """g (float[N,3] x) => (float[N,4] y)
    <int64 m = {9223372036854775807}, bool c = {1}, float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}> {
    z = Loop (m, c, x) <body = b (int64 i, bool goes, float[N,3] a) => (bool on, float[N,3] b) {
        on = Identity (goes)  b = Neg (a) }>
    y = Gemm <transB = 1> (z, w) }"""


@pytest.fixture
def endless(tmp_path: Path) -> tuple[str, ...]:
    """A repair of a network on which onnxruntime never finishes."""
    model, data = tmp_path / "endless.onnx", tmp_path / "data.npz"
    onnx.save(net(ENDLESS), model)
    np.savez(data, x=np.ones((8, 3), np.float32))
    options = "--samples", "4", "--verify-samples", "0", "--method", "paired", "--threads", "1"
    return (
        "repair",
        str(model),
        "-o",
        str(tmp_path / "out.onnx"),
        "--dense",
        str(model),
        "--data",
        str(data),
        *options,
    )


@pytest.fixture
def output(tmp_path: Path) -> Path:
    path = tmp_path / "out.onnx"
    path.write_bytes(OLD)
    return path


def with_onnxruntime(behaviour: str, *arguments: object) -> Done:
    """A command in which loading a model is replaced."""
    program = (
        f"import os, sys, signal, onnxruntime; onnxruntime.InferenceSession = lambda *a, **k: {behaviour}; "
        "from onnx_asr.cli import main; main()"
    )
    line = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("os.abort()", "onnxruntime ended with SIGABRT when it loaded or ran"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "onnxruntime ended with SIGSEGV when it loaded or ran"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "most likely because memory ran out: lower --memory-limit"),
    ],
)
def test_a_crash_is_one_error_that_names_the_files(
    behaviour: str, words: str, pruned: str, tmp_path: Path, output: Path
) -> None:
    error = with_onnxruntime(behaviour, "repair", pruned, "-o", output, *REPAIR).error
    assert words in error
    assert pruned in error
    assert DENSE in error
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [OLD]


def test_a_model_that_crashes_shape_inference(tmp_path: Path) -> None:
    """A padding that removes more than there is, then a Slice of it: an assertion fails in onnx."""
    text = "g (float[N,3,H,W] x) => (float[N,K,A,B] y) { c = Conv (x, w) z = Pad (c, p) y = Slice (z, s, e, a, t) }"
    bounds = {name: np.array([value]) for name, value in (("s", 0), ("e", 5), ("a", 2), ("t", 2))}
    model = tmp_path / "model.onnx"
    onnx.save(net(text, w=(4, 3, 3, 3), p=np.array([0, 0, -5000, 0, 0, 0, 0, 0]), **bounds), model)
    done = cli("prune", model, "-o", tmp_path / "out.onnx", "--sparsity", "0.5")
    if done.code == 0:
        pytest.skip("this onnx survives it")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"error: a library ended with SIGABRT at work on '{model}'")
    assert list(tmp_path.iterdir()) == [model]


def test_debug_shows_where_a_crash_was(pruned: str, output: Path) -> None:
    done = with_onnxruntime("os.abort()", "repair", pruned, "-o", output, *REPAIR, "--debug")
    assert done.code == 2
    assert "Fatal Python error: Aborted" in done.err
    assert "engine/session.py" in done.err


def test_a_hang_is_one_error_that_names_the_limit(endless: tuple[str, ...], tmp_path: Path, output: Path) -> None:
    before = sorted(tmp_path.iterdir())
    error = cli(*endless, "--session-timeout", "0.5").error
    assert "did not return within 0.5 seconds" in error
    assert "endless.onnx" in error
    assert "raise --session-timeout" in error
    assert sorted(tmp_path.iterdir()) == before
    assert output.read_bytes() == OLD


def test_only_the_time_in_one_call_counts(pruned: str, output: Path) -> None:
    """The repair takes longer than the limit, but no single call does."""
    assert cli("repair", pruned, "-o", output, *REPAIR, "--session-timeout", "0.6", "-q") == Done(0, "", "")


@contextmanager
def working(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A command that hangs in onnxruntime, and the process that does its work."""
    line = [*command(), *arguments, "--session-timeout", "0"]
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = children.read_text().split()
            if found and _seconds_of_computing(int(found[0])) > 2.0:  # more than importing takes
                break
            time.sleep(0.05)
        yield process, int(found[0])
    finally:
        process.kill()
        process.communicate()


def _seconds_of_computing(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ends(pid: int) -> bool:
    for _ in range(100):
        with suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX":
                time.sleep(0.05)
                continue
        return True
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
def test_a_second_interrupt_ends_what_does_not_see_the_first(endless: tuple[str, ...]) -> None:
    with working(*endless) as (process, child):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10) == ("", "error: interrupted\n")
        assert process.returncode == 130
        assert ends(child)


@needs_proc
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_ends_the_command_ends_its_work(endless: tuple[str, ...], how: signal.Signals) -> None:
    with working(*endless) as (process, child):
        process.send_signal(how)
        assert process.wait(timeout=10) == -how
        assert ends(child)


def test_control_c_on_a_terminal(pruned: str, output: Path, tmp_path: Path) -> None:
    """Both processes get the signal; it is reported once, on a line of its own."""
    line = [*command(), "repair", pruned, "-o", str(output), *REPAIR, "--memory-limit", "1MB"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(line[0], line, environment() | {"TERM": "xterm"})
    shown = b""
    while b"\x1b[?25l" not in shown:  # the progress bar is there, and the cursor is not
        shown += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    with suppress(OSError):  # the other side is closed
        while True:
            shown += os.read(terminal, 4096)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert shown.count(b"error: interrupted\r\n") == 1
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")  # the cursor is there again
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    assert output.read_bytes() == OLD
