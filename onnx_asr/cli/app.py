"""The program: its global options, and the way out of it."""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn, Protocol, runtime_checkable

import typer

from onnx_asr.blas import BLAS_THREADS
from onnx_asr.cli import making, measuring, sweeping
from onnx_asr.cli.command import BAD_INPUT, DONE, INTERRUPTED, app
from onnx_asr.cli.supervision import supervised
from onnx_asr.cli.terminal import drop_stdout, leave_progress, say, say_traceback
from onnx_asr.errors import OnnxAsrError, is_interrupt
from onnx_asr.ownership import DISTRIBUTION, check_owner
from onnx_asr.version import __version__

COMMANDS = (making, measuring, sweeping)  # importing them registers what they offer


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{DISTRIBUTION} {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="As after the command.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="As after the command.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    given = {"verbose": verbose, "quiet": quiet, "debug": debug}
    if context.invoked_subcommand is not None:
        context.default_map = {context.invoked_subcommand: {name: True for name, value in given.items() if value}}


@runtime_checkable
class _UsageError(Protocol):
    """What click's exceptions look like; click itself may be vendored in Typer."""

    exit_code: int

    def format_message(self) -> str:
        """The message."""


def main() -> NoReturn:
    """Run the command line, supervised, and leave the process."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments

    def work() -> int:
        for variable in BLAS_THREADS:  # with more than one thread, products and solutions have other last bits
            os.environ.setdefault(variable, "1")
        if debug:
            faulthandler.enable()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
        code = run(arguments)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            drop_stdout()
        return code

    def wait() -> int:
        try:
            return supervised(work)
        except BaseException:
            leave_progress()
            raise

    sys.exit(_code_of(wait, debug))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; every error becomes one line on stderr and an exit code."""
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of overflow: results are checked to be finite

    def work() -> int:
        check_owner()
        code = app(list(arguments) or ["--help"], prog_name=DISTRIBUTION, standalone_mode=False, obj=list(arguments))
        if code == INTERRUPTED:  # what some versions of Typer make of an interrupt
            raise KeyboardInterrupt
        return int(code or DONE)

    return _code_of(work, "--debug" in arguments)


def _code_of(work: Callable[[], int], debug: bool) -> int:
    """The exit code of some work; where it fails, that of the error, which is told."""
    try:
        return work()
    except (SystemExit, BrokenPipeError):  # the reader of a help text has left; SystemExit is click's word for that
        drop_stdout()
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        if is_interrupt(error) or type(error).__name__ == "Abort":  # click's word for it
            say("error", "interrupted")
            return INTERRUPTED
        if debug:
            say_traceback(error)
        say("error", _message(error))
        return BAD_INPUT


def _message(error: BaseException) -> str:
    """What a user can do something with."""
    if isinstance(error, OnnxAsrError):
        return str(error)
    if isinstance(error, _UsageError):
        path = getattr(getattr(error, "ctx", None), "command_path", DISTRIBUTION)
        return f"{error.format_message().rstrip('.')}; see {path} --help"
    if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
        return f"onnxruntime is missing: pip install '{DISTRIBUTION}[cpu]', or '{DISTRIBUTION}[gpu]' for CUDA"
    if isinstance(error, MemoryError):
        return "out of memory: lower --memory-limit, --samples or --batch-size"
    text = str(error).strip()
    first = f": {text.splitlines()[0]}" if text else ""
    return f"unexpected {type(error).__name__}{first}; run again with --debug for the whole story"
