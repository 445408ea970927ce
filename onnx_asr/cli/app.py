"""The program: its global options, and the way out of it."""

from __future__ import annotations

import faulthandler
import io
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Annotated, Any, NoReturn

from cyclopts import App, ArgumentCollection, CoercionError, CycloptsError, Parameter

from onnx_asr.blas import BLAS_THREADS
from onnx_asr.cli import making, measuring, pipelines
from onnx_asr.cli.outcome import BAD_INPUT, DONE, INTERRUPTED
from onnx_asr.cli.parameters import OUTPUTS, PANELS
from onnx_asr.cli.supervision import announce, supervised
from onnx_asr.cli.terminal import Terminal, drop_stdout, leave_progress, replace_closed_streams, say
from onnx_asr.errors import OnnxAsrError, OptionError, is_interrupt
from onnx_asr.files.outputs import STDIN, STDOUT
from onnx_asr.ownership import DISTRIBUTION, check_owner
from onnx_asr.version import __version__

EXIT_CODES = (
    "Exit codes: 0 done; 1 done, but the repair came out further from the dense model than its input, or check found a "
    "bar missed; 2 bad usage or bad input; 130 interrupted."
)


def _shown(default: Any) -> str | None:
    """A default as the help has it; None where an option is off or has none."""
    if default is None or isinstance(default, bool):
        return "on" if default else None
    return ",".join(map(str, default)) or None if isinstance(default, tuple) else str(default)


def _refuse_fractions(program: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse fractions where whole numbers belong, which cyclopts would round."""
    for argument in arguments:
        for token in argument.tokens:
            if argument.hint in (int, int | None) and argument.parameter.converter is None and "." in token.value:
                raise CoercionError(token=token, argument=argument, target_type=int)


_FORM: dict[str, Any] = {
    "group_arguments": PANELS["Arguments"],
    "group_parameters": PANELS["Options"],
    "default_parameter": Parameter(negative_iterable="", show_default=_shown, allow_repeating=True),
}
PROGRAM = App(
    DISTRIBUTION,
    help_format="plaintext",  # which needs no parser of Markdown
    help="Give a pruned ONNX vision network its accuracy back: no retraining, no labels, no PyTorch.",
    help_epilogue=EXIT_CODES,
    version=f"{DISTRIBUTION} {__version__}",
    config=_refuse_fractions,
    print_error=False,
    exit_on_error=False,
    help_on_error=False,
    verbose=False,
    **_FORM,
)

_MAKING = (making.demo, making.prune, making.repair, making.compress, making.shrink)
_MEASURING = (
    measuring.sensitivity,
    measuring.evaluate,
    measuring.check,
    measuring.inspect,
    measuring.view,
    measuring.sweep,
)
COMMANDS: dict[str, Callable[..., int]] = {
    function.__name__.replace("_", "-"): function for function in (*_MAKING, *_MEASURING, pipelines.olive_config)
}
for _place, _function in enumerate(COMMANDS.values()):
    PROGRAM.command(_function, sort_key=_place, help_epilogue="", help_format="markdown", **_FORM)
for _flag in ("--help", "--version"):
    PROGRAM[_flag].group = PANELS["Options"]


@PROGRAM.default
def _overview(*, terminal: Annotated[Terminal, Parameter(parse="^(?!json$)")] = Terminal()) -> None:
    PROGRAM.help_print()


def main() -> NoReturn:
    """Run the command line, supervised, and leave the process."""
    replace_closed_streams()
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
        return _dispatch(_with_streams(arguments))

    return _code_of(work, "--debug" in arguments)


def _with_streams(arguments: Sequence[str]) -> list[str]:
    """The arguments with a path for "-": standard output after an option for an output, elsewhere standard input."""
    found: list[str] = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        if value == "-":
            name = option or (found[-1] if found else "")
            value = str(STDOUT if name in OUTPUTS else STDIN)
        found.append(f"{option}{equals}{value}")
    return found


def _dispatch(arguments: list[str]) -> int:
    """Run the command among the arguments, or show what is asked for instead of it."""
    before = list(takewhile(lambda argument: argument.startswith("-"), arguments))
    name, *rest = arguments[len(before) :] or [""]
    if name and name not in COMMANDS:
        raise OptionError(f"'{name}' is not a command: give one of {', '.join(COMMANDS)}")
    try:
        command, bound, _ = PROGRAM.parse_args([name, *before, *rest] if name else before)
    except CycloptsError as error:
        text = str(error)
        text += "" if text.endswith((".", "?")) else "."
        raise OptionError(f"{text} See {' '.join([DISTRIBUTION, name]).strip()} --help") from error
    bound.apply_defaults()
    given = bound.arguments
    if "terminal" in given:
        given["terminal"] = replace(given["terminal"], command=name, line=shlex.join([DISTRIBUTION, *arguments]))
        limit = given["machine"].session_timeout if "machine" in given else 0
        announce(limit, (given[model] for model in ("model", "dense") if given.get(model)))
    return command(*bound.args, **bound.kwargs) or DONE


def _code_of(work: Callable[[], int], debug: bool) -> int:
    """The exit code of some work; if it fails, that of the error, which is printed."""
    try:
        return work()
    except (BrokenPipeError, SystemExit):  # the reader of a help text has left; SystemExit is rich's word for it
        drop_stdout()
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        if is_interrupt(error):
            say("error", "interrupted")
            return INTERRUPTED
        if debug:
            traceback.print_exception(error)
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
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot use '{os.fsdecode(error.filename)}': {error.strerror}; check the path and its permissions"
    text = str(error).strip()
    first = f": {text.splitlines()[0]}" if text else ""
    return f"unexpected {type(error).__name__}{first}; run again with --debug for the traceback"
