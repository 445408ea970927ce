"""Model files in Netron, one server a file, each in a process of its own.

Netron keeps what it serves in a class variable: two servers in one process would both show the file opened last. A
server ends when the pipe to it closes, however this process ends.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from typing import NoReturn

from onnx_asr.errors import OnnxAsrError, OptionError
from onnx_asr.graph.model_io import load
from onnx_asr.ownership import DISTRIBUTION

_LAST_PORT = 65535


@contextmanager
def serving(models: Sequence[str], *, port: int | None = None, browse: bool = True) -> Iterator[list[str]]:
    """Serve model files on this machine while the context is open; yields their addresses.

    Args:
        models: Paths of .onnx files.
        port: The port of the first file; the others have those after it. None lets Netron choose free ones.
        browse: Open the addresses in the browser.

    Raises:
        OptionError: When Netron is not installed, or a port cannot be used.
        ModelError: When a file is missing or is not an ONNX model.
    """
    if find_spec("netron") is None:
        raise OptionError(f"this needs Netron, which is not installed: pip install '{DISTRIBUTION}[view]'")
    if port is not None and not 1 <= port <= _LAST_PORT + 1 - len(models):
        raise OptionError(f"port {port} is out of range: give 1 to {_LAST_PORT + 1 - len(models)}")
    for model in models:
        load(model)
    with ExitStack() as stack:
        yield [
            _start(stack, model, None if port is None else port + number, browse) for number, model in enumerate(models)
        ]


def wait_for_the_end() -> NoReturn:
    """Wait until a server ends, which it does not do by itself, or the user interrupts.

    Raises:
        OnnxAsrError: When a server has ended.
    """
    wait([process.sentinel for process in multiprocessing.active_children()])
    raise OnnxAsrError("Netron has ended unexpectedly; start it again")


def _start(stack: ExitStack, model: str, port: int | None, browse: bool) -> str:
    """Start a server that ends with the stack; its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, model, port, browse))
    process.start()
    theirs.close()
    stack.callback(process.join)
    stack.callback(ours.close)  # first, being the last: it makes the process end
    try:
        reply = ours.recv()
    except EOFError:
        raise OnnxAsrError(f"Netron could not be started for '{model}'") from None
    if isinstance(reply, OSError):
        raise OptionError(f"no server can be started on port {port} ({reply}): give another one, or none")
    return str(reply)


def _serve(connection: Connection, model: str, port: int | None, browse: bool) -> None:
    """Serve one file until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too
    import netron

    logging.getLogger().addHandler(logging.NullHandler())  # or Netron logs to stderr
    try:
        host, given = netron.start(model, address=port, browse=browse)
    except OSError as error:
        connection.send(OSError(str(error)))
        return
    connection.send(f"http://{host}:{given}")
    with suppress(EOFError):
        connection.recv()
