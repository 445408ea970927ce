"""What commands are made of: how they register and run, what a report of one is, how they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_asr.cli.options import Group, Option
from onnx_asr.cli.parameters import DECLARATIONS, Display
from onnx_asr.cli.parser import Parser
from onnx_asr.cli.supervision import announce
from onnx_asr.cli.terminal import Terminal, say
from onnx_asr.ownership import DISTRIBUTION

if TYPE_CHECKING:
    import onnx

    from onnx_asr.data import Preprocessing
    from onnx_asr.report.data import ReportValues, Run

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Command:
    """A command: a function whose parameters, but for the terminal, are its options.

    Attributes:
        name: As it is typed.
        function: Does the work; its docstring is the first line of the help, its result the exit code.
        without: Headings and names of options that it does not offer.
    """

    name: str
    function: Callable[..., int]
    without: tuple[str, ...]

    @cached_property
    def _group(self) -> Group:
        return replace(DECLARATIONS, without=self.without).group_of(self.function, ["terminal"])

    @cached_property
    def _display(self) -> Group:
        return DECLARATIONS.group_of(Display)

    @property
    def options(self) -> list[Option]:
        """Its options and arguments."""
        return [*self._group.options(), *self._display.options()]

    @property
    def summary(self) -> str:
        """What it does."""
        return (self.function.__doc__ or "").strip()

    def parser(self) -> Parser:
        """What reads its arguments, and has the help."""
        return Parser(f"{DISTRIBUTION} {self.name}", self.summary, self.options)

    def run(self, arguments: Sequence[str], line: str) -> int:
        """Run it, as part of a command line; the exit code."""
        given = self.parser().values(arguments)
        limit = [given.get(item.key, item.default) for item in self.options if "--session-timeout" in item.names]
        models = [item.key for item in self.options if item.is_argument and item.kind == "value"]
        announce(sum(limit), (given[name] for name in (*models, "--dense") if name in given))
        terminal = Terminal(self.name, line, self._display.made(given, {}))
        return int(self._group.made(given, {"terminal": terminal}))


COMMANDS: dict[str, Command] = {}


def command(name: str, *, without: tuple[str, ...] = ()) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        COMMANDS[name] = Command(name, function, without)
        return function

    return register


@dataclass(frozen=True)
class Page:
    """The report of a command, if one is wanted."""

    terminal: Terminal
    path: Path | None

    @classmethod
    def of(cls, terminal: Terminal, report: str | None, output: Path | None) -> Page:
        """From ``--report``; what is in its way shows before any work is done."""
        from onnx_asr.report import check_report

        return cls(terminal, None if report is None else check_report(report, output))

    def write(
        self,
        gather: Callable[[Run], ReportValues],
        files: dict[str, str | None],
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """Gather what the report says about this call, and write it; nothing happens where none is wanted."""
        if self.path is None:
            return
        from onnx_asr.report.data import Run
        from onnx_asr.report.html import write_report

        write_report(gather(Run(self.terminal.command, self.terminal.line, files, preprocessing)), self.path)


def written(result: onnx.ModelProto, target: Path, source: str, *, wanted: bool = True) -> str | None:
    """Write a model if it is wanted, with its weights beside it where the given model has them so; its path."""
    from onnx_asr.graph.model_io import is_external, save

    return str(save(result, target, external_data=is_external(source))) if wanted else None


def verdict(improved: bool, what: str, before: str, target: Path, force: bool) -> int:
    """The exit code of a command that writes only what is closer to the dense model than before."""
    if improved:
        return DONE
    kept = f"'{target}' was written because of --force" if force else f"'{target}' was not written (--force writes it)"
    say("warning", f"the {what} is further from the dense model than {before}; {kept}")
    return CHECK_FAILED
