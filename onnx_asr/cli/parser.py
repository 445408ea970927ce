"""Arguments in, values out; and the help. No command is known here."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from onnx_asr.cli.options import Option
from onnx_asr.errors import OptionError

_WIDTH = 100  # columns of the help, at most
_FIXED_SPACE = "\u00a0"  # lines do not break there


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether help is to be shown in place of the work."""
    return not {"-h", "--help"}.isdisjoint(takewhile(lambda argument: argument != "--", arguments))


class Parser(argparse.ArgumentParser):
    """Reads options; an error in them is an OptionError.

    Args:
        program: What is typed before the arguments.
        description: First lines of the help.
        options: Options and arguments.
        commands: Commands that follow the options, with what they do; the help lists them.
        epilog: Last lines of the help.
    """

    def __init__(
        self,
        program: str,
        description: str,
        options: Sequence[Option],
        commands: Mapping[str, str] | None = None,
        epilog: str = "",
    ) -> None:
        needed = [
            item.metavar if item.is_argument else f"{item.names[-1]} {item.metavar}"
            for item in options
            if item.required
        ]
        usage = " ".join([program, *needed, "[options]", *["COMMAND ..."] * bool(commands)])
        super().__init__(
            program, usage, description, epilog, formatter_class=_Formatter, add_help=False, allow_abbrev=False
        )
        self._negative_number_matcher = re.compile(r"-\.?\d")  # values such as -0.5,0.5 are not options
        self.options = options
        several = any(item.is_argument and item.kind == "list" for item in options)
        self._parse = self.parse_intermixed_args if several else self.parse_args
        titles = dict.fromkeys(["Commands", "Arguments", "Options", *(item.panel for item in options)])
        panels = {title: self.add_argument_group(title) for title in titles}
        for name, summary in (commands or {}).items():
            panels["Commands"].add_argument(name, help=summary, nargs="?", default=argparse.SUPPRESS)
        for item in options:
            _add(panels[item.panel], item)
        _add(
            panels[options[-1].panel],
            Option("", "Show this help and exit.", ("--help", "-h"), kind="flag", default=False),
        )

    def values(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Values of what was given, by the key of its option.

        Raises:
            OptionError: For what is unknown, missing or malformed.
        """
        return vars(self._parse(arguments))

    def format_help(self) -> str:
        """The help."""
        return super().format_help().replace(_FIXED_SPACE, " ")

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Raises:
            OptionError: In every case.
        """
        raise OptionError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


class _Formatter(argparse.HelpFormatter):
    """Names in one column, with the value once behind them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(_WIDTH, shutil.get_terminal_size().columns) - 1)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = "" if action.nargs == 0 else str(action.metavar or action.dest)
        return " ".join([", ".join(sorted(action.option_strings, key=len)), value]).strip()


def _add(panel: Any, item: Option) -> None:
    notes = ["required"] * (item.required and not item.is_argument) + ["repeatable"] * (item.kind == "list")
    notes += [f"default: {item.shown_default}"] * bool(item.shown_default)
    text = " ".join([item.help, *(f"[{note}]".replace(" ", _FIXED_SPACE) for note in notes)])
    settings: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if item.kind in ("flag", "pair"):
        settings["action"] = "store_true" if item.kind == "flag" else argparse.BooleanOptionalAction
    else:
        settings |= {"type": _reader(item), "metavar": item.metavar}
    if item.is_argument:
        panel.add_argument(item.key, nargs="+" if item.kind == "list" else None, **settings)
    else:
        settings |= {"action": "append"} if item.kind == "list" else {}
        panel.add_argument(*item.names, dest=item.key, required=item.required, **settings)


def _reader(item: Option) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return item.read(text)
        except OptionError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read
