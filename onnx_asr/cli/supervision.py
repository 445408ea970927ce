"""Work in a process of its own: an error is reported even where onnxruntime ends that process or does not return.

The process that the user started forks before anything large is imported; the child does the work, the parent waits.
What the parent needs to know is in shared memory. Neither process outlives the other. Without ``os.fork`` (Windows),
the work is done unsupervised.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from onnx_asr.errors import OnnxAsrError

_TICK = 0.2  # seconds between two looks at the child


class _State(ctypes.Structure):
    """State of the child: an odd number of steps into onnxruntime and out of it means that it is inside."""

    _fields_: ClassVar = [("limit", ctypes.c_double), ("steps", ctypes.c_uint64), ("files", ctypes.c_char * 1000)]


_state = _State.from_buffer(mmap.mmap(-1, ctypes.sizeof(_State)))


def announce(limit: float, files: Iterable[str]) -> None:
    """Set the seconds that one call into onnxruntime may take (0 for no limit), and the models worked on."""
    _state.limit = limit
    _state.files = " and ".join(f"'{name}'" for name in files).encode(errors="replace")[: _State.files.size - 1]


@contextmanager
def native_call() -> Iterator[None]:
    """Mark the work as inside onnxruntime."""
    _state.steps += 1
    try:
        yield
    finally:
        _state.steps += 1


def supervised(work: Callable[[], int]) -> int:
    """Do the work in a child process; its exit code.

    Raises:
        OnnxAsrError: When the child was ended by a signal, or by this process because a call exceeded its limit.
        KeyboardInterrupt: When it was ended because it did not react to an interrupt.
    """
    if not hasattr(os, "fork"):
        return work()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until either process has a handler of its own
    ours, theirs = os.pipe(), os.pipe()  # never written to: reading ends when the other process does
    pid = os.fork()
    unused = (ours[0], theirs[1]) if pid == 0 else (ours[1], theirs[0])
    for descriptor in unused:
        os.close(descriptor)
    if pid == 0:
        os._exit(_as_child(work, theirs[0]))
    return _watched(pid, ours[0])


def end_with(pipe: int) -> None:
    """End this process when the one at the other end of a pipe ends, however it does, or closes its end."""

    def wait() -> None:
        os.read(pipe, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _as_child(work: Callable[[], int], parent: int) -> int:
    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it too, beside the parent
        raise KeyboardInterrupt

    end_with(parent)
    signal.signal(signal.SIGINT, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return work()


def _watched(child: int, alive: int) -> int:
    """Wait for the end of the child, and end it where a call exceeds its limit; its exit code."""
    interrupts = 0

    def interrupt(*_: object) -> None:
        """Pass the first interrupt on; end the child at the second."""
        nonlocal interrupts
        interrupts += 1
        os.kill(child, signal.SIGINT if interrupts == 1 else signal.SIGKILL)

    signal.signal(signal.SIGINT, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    hangs = _hangs(alive)
    if hangs:
        os.kill(child, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        return code
    if interrupts:
        raise KeyboardInterrupt
    raise OnnxAsrError(_cause(signal.Signals(-code), hangs))


def _hangs(alive: int) -> bool:
    """Whether a call exceeds its limit, counted in looks, as the clock goes on while both are suspended."""
    looks, seen = 0, 0
    while not select.select([alive], [], [], _TICK)[0]:
        steps = _state.steps
        looks, seen = (looks + 1 if steps == seen and steps % 2 else 0), steps
        if 0 < _state.limit <= looks * _TICK:
            return True
    return False


def _cause(ended_by: signal.Signals, hung: bool) -> str:
    """Why the child was ended by a signal, and what to do about it."""
    files = _state.files.decode(errors="replace") or "the model"
    if hung:
        return (
            f"onnxruntime did not return within {_state.limit:g} seconds from loading or running {files} once: raise "
            "--session-timeout (0 waits for ever), lower --batch-size, or export the model again"
        )
    if ended_by == signal.SIGKILL:
        return (
            f"the work on {files} was killed (SIGKILL), most likely because memory ran out: lower --memory-limit, "
            "--samples or --batch-size"
        )
    if _state.steps % 2:
        return (
            f"onnxruntime ended with {ended_by.name} when it loaded or ran {files}: export the model again, or "
            "install another version of onnxruntime"
        )
    return (
        f"a library ended with {ended_by.name} at work on {files}: export the model again, or install another "
        "version of onnx or onnxruntime; --debug shows where"
    )
