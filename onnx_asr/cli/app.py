"""The program: its global options, and the way out of it."""

from __future__ import annotations

import faulthandler
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import NoReturn

from onnx_asr.blas import BLAS_THREADS
from onnx_asr.cli import making, measuring, sweeping
from onnx_asr.cli.command import BAD_INPUT, COMMANDS, DONE, INTERRUPTED
from onnx_asr.cli.options import Option
from onnx_asr.cli.parameters import DECLARATIONS, Display
from onnx_asr.cli.parser import Parser, asks_for_help
from onnx_asr.cli.supervision import supervised
from onnx_asr.cli.terminal import drop_stdout, leave_progress, say, say_traceback
from onnx_asr.errors import OnnxAsrError, is_interrupt
from onnx_asr.ownership import DISTRIBUTION, check_owner
from onnx_asr.version import __version__

REGISTERED = (making, measuring, sweeping)  # importing them registers their commands

PURPOSE = "Give a pruned ONNX vision network its accuracy back: no retraining, no labels, no PyTorch."
EXIT_CODES = (
    "Exit codes: 0 done; 1 done, but the result is further from the dense model than its input; 2 bad usage or bad "
    "input; 130 interrupted."
)


def program() -> Parser:
    """What reads the arguments before the command, and has the program's help."""
    version = Option("", "Print the version and exit.", ("--version",), kind="flag", default=False)
    display = replace(DECLARATIONS, without=("json",)).group_of(Display).options()
    commands = {name: command.summary for name, command in COMMANDS.items()}
    return Parser(DISTRIBUTION, PURPOSE, [version, *display], commands, EXIT_CODES)


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
        return _dispatch(list(arguments))

    return _code_of(work, "--debug" in arguments)


def _dispatch(arguments: list[str]) -> int:
    """Run the command among the arguments, or show what is asked for instead of it."""
    before = list(takewhile(lambda argument: argument.startswith("-"), arguments))
    name, *rest = arguments[len(before) :] or [""]
    known = program()
    given = known.values(before)
    if "--version" in given:
        print(f"{DISTRIBUTION} {__version__}")
    elif not arguments or asks_for_help(before):
        print(known.format_help(), end="")
    elif name not in COMMANDS:
        known.error(f"'{name}' is not a command: give one of {', '.join(COMMANDS)}")
    elif asks_for_help(rest):
        print(COMMANDS[name].parser().format_help(), end="")
    else:
        return COMMANDS[name].run([*given, *rest], shlex.join([DISTRIBUTION, *arguments]))
    return DONE


def _code_of(work: Callable[[], int], debug: bool) -> int:
    """The exit code of some work; if it fails, that of the error, which is printed."""
    try:
        return work()
    except BrokenPipeError:  # the reader of a help text has left
        drop_stdout()
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        if is_interrupt(error):
            say("error", "interrupted")
            return INTERRUPTED
        if debug:
            say_traceback(error)
        say("error", _message(error))
        return BAD_INPUT


def _message(error: BaseException) -> str:
    """The cause, and what to do about it."""
    if isinstance(error, OnnxAsrError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
        return f"onnxruntime is missing: pip install '{DISTRIBUTION}[cpu]', or '{DISTRIBUTION}[gpu]' for CUDA"
    if isinstance(error, MemoryError):
        return "out of memory: lower --memory-limit, --samples or --batch-size"
    text = str(error).strip()
    first = f": {text.splitlines()[0]}" if text else ""
    return f"unexpected {type(error).__name__}{first}; run again with --debug for the traceback"
