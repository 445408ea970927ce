"""The two streams: results on stdout, errors, warnings and progress on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console, RenderableType

from onnx_asr.cli.parameters import panel
from onnx_asr.files.outputs import printable
from onnx_asr.json_values import plain

_SETTLED = 2.0  # seconds of a stage from which its speed is told
_PLAIN_WIDTH = 120  # of tables where stdout is not a terminal

Progress = Callable[[str, float], None]


@panel("Display", negative="")
@dataclass(frozen=True)
class Terminal:
    """The two streams of a command, as its display options want them used.

    Attributes:
        json: Print one JSON object on stdout and nothing else.
        verbose: Show every layer, and the warnings of onnxruntime.
        quiet: Print errors and warnings only.
        debug: Show the traceback of an error.
        aside: Print results on stderr, as an output takes stdout.
        command: Name of the command.
        line: The whole command line.
    """

    json: bool = False
    verbose: Annotated[bool, Parameter(alias="-v")] = False
    quiet: Annotated[bool, Parameter(alias="-q")] = False
    debug: bool = False
    aside: Annotated[bool, Parameter(parse=False)] = False
    command: Annotated[str, Parameter(parse=False)] = ""
    line: Annotated[str, Parameter(parse=False)] = ""

    def result(self, values: dict[str, Any], *shown: RenderableType, **files: Path | None) -> None:
        """Print a result, and which further files were written: as JSON, or as text and tables, or not at all.

        A closed stdout is not an error: the work is done.
        """
        try:
            if self.json:
                print(dumps(plain({"command": self.command, **values, **files}), indent=2, allow_nan=False))
            elif not self.quiet:
                width = None if (sys.stderr if self.aside else sys.stdout).isatty() else _PLAIN_WIDTH
                console = Console(stderr=self.aside, highlight=False, emoji=False, width=width)
                lines = (f"{what}: {path}" for what, path in files.items() if path is not None)
                for item in (*shown, *lines):
                    console.print(item, soft_wrap=isinstance(item, str), markup=False)
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit):  # SystemExit is rich's word for it
            drop_stdout()

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A progress bar with the time that the stage will still take, shown on a terminal only."""
        console = Console(stderr=True, highlight=False, emoji=False)
        if self.quiet or not console.is_terminal:
            yield lambda stage, fraction: None
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        left = TextColumn("{task.fields[left]}")
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), left
        bar = Progress(*columns, console=console, transient=True)
        with ExitStack() as stack:  # not `with bar`: interrupted while it starts, it would not stop, or fail to
            stack.callback(Console(stderr=True).show_cursor)
            stack.callback(bar.stop)
            bar.start()
            task = bar.add_task("starting", total=1.0, left="")
            time_left = TimeLeft()

            def report(stage: str, fraction: float) -> None:
                left = time_left.of(stage, fraction, time.monotonic())
                bar.update(task, description=stage, completed=fraction, left=left)

            yield report


class TimeLeft:
    """The time that a stage will still take, if it goes on as since its beginning."""

    def __init__(self) -> None:
        self._stage, self._begun, self._first = "", 0.0, 0.0

    def of(self, stage: str, fraction: float, now: float) -> str:
        """In words, at a fraction of the stage and a time in seconds; empty while it cannot be told."""
        if stage != self._stage:
            self._stage, self._begun, self._first = stage, now, fraction
        done, elapsed = fraction - self._first, now - self._begun
        if done <= 0 or elapsed < _SETTLED:
            return ""
        minutes, seconds = divmod(round(elapsed * (1 - fraction) / done), 60)
        return f"{minutes}:{seconds:02} left"


def leave_progress() -> None:
    """On a terminal, start a new line and show the cursor, which a progress bar that was cut short left hidden."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.print()
        console.show_cursor()


def replace_closed_streams() -> None:
    """Give the process the standard streams that it was started without, before other files get their numbers.

    What is printed is lost; an output that names such a stream is refused, as it cannot be written to.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for _ in closed:
        os.open(os.devnull, os.O_RDONLY)  # has the lowest number that is free
    for name in closed:
        setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))


def drop_stdout() -> None:
    """Discard what is still written to a stdout that nobody reads."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(kind: str, message: str) -> None:
    """One line on stderr, "error: ..." or "warning: ...", with control characters escaped."""
    print(f"{kind}: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
