"""Model files in Netron, one server per file, each in a process of its own.

Netron keeps what it serves in a class variable: two servers in one process would both show the file opened last.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from onnx_asr.cli.supervision import end_with
from onnx_asr.errors import OnnxAsrError, OptionError
from onnx_asr.graph.model_io import opened
from onnx_asr.ownership import DISTRIBUTION

_LAST_PORT = 65535
Server = subprocess.Popen[str]


@contextmanager
def serving(models: Sequence[str], *, port: int | None = None, browse: bool = True) -> Iterator[dict[str, Server]]:
    """Serve model files on this machine while the context is open; yields the servers by address, in order.

    The first file gets the port, the others the ones after it; None lets Netron choose free ones. ``browse`` opens the
    addresses in the browser.

    Raises:
        OptionError: When Netron is not installed, or a port cannot be used.
        ModelError: When a file is missing or is not an ONNX model.
    """
    if find_spec("netron") is None:
        raise OptionError(f"view needs Netron, which is not installed: pip install '{DISTRIBUTION}[view]'")
    if port is not None and not 1 <= port <= _LAST_PORT + 1 - len(models):
        raise OptionError(f"port {port} is out of range: give 1 to {_LAST_PORT + 1 - len(models)}")
    for model in models:
        if Path(model).is_fifo():
            raise OptionError(f"'{model}' is a pipe, which Netron cannot open: write the model into a file first")
        opened(model, external_links=True)
    with ExitStack() as stack:
        ports = [""] * len(models) if port is None else map(str, range(port, port + len(models)))
        yield dict(_start(stack, model, place, browse) for model, place in zip(models, ports, strict=True))


def wait_for_the_end(servers: dict[str, Server]) -> NoReturn:
    """Wait until a server ends, which it does not do by itself, or the user interrupts.

    Raises:
        OnnxAsrError: When a server has ended.
    """
    while all(server.poll() is None for server in servers.values()):
        time.sleep(0.1)
    raise OnnxAsrError("Netron has ended unexpectedly; start it again")


def _start(stack: ExitStack, model: str, port: str, browse: bool) -> tuple[str, Server]:
    """Start a server that ends with the stack; its address, and the server."""
    command = [sys.executable, "-m", __name__, model, port, "browse" if browse else ""]
    server = stack.enter_context(Server(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    assert server.stdout is not None
    reply = server.stdout.readline().strip()
    if not reply:
        raise OnnxAsrError(f"Netron could not be started for '{model}'")
    if not reply.startswith("http"):
        raise OptionError(f"no server can be started on port {port} ({reply}): give another --port, or none")
    return reply, server


def _serve(model: str, port: str, browse: str) -> None:
    """Serve one file until the process at the other end of stdin ends, or closes it; print the address or an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too
    end_with(sys.stdin.fileno())
    import netron

    logging.getLogger().addHandler(logging.NullHandler())  # or Netron logs to stderr
    try:
        host, given = netron.start(model, address=int(port) if port else None, browse=bool(browse))
    except OSError as error:
        print(error, flush=True)
        return
    print(f"http://{host}:{given}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
