"""What commands are made of: how they register, what a report of one is, how they end."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from onnx_asr.cli.binding import Command, spread
from onnx_asr.cli.terminal import say
from onnx_asr.ownership import DISTRIBUTION

if TYPE_CHECKING:
    from onnx_asr.data import Preprocessing
    from onnx_asr.networks.latency import Latency
    from onnx_asr.report.data import Run, Values

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name=DISTRIBUTION,
    help="Give a pruned ONNX vision network its accuracy back: no retraining, no labels, no PyTorch.",
    epilog="Exit codes: 0 done; 1 done, but the result is further from the dense model than its input; 2 bad usage or "
    "bad input; 130 interrupted.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command whose parameters may be groups of options."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        app.command(name, cls=Command, no_args_is_help=False)(spread(function))
        return function

    return register


@dataclass(frozen=True)
class Page:
    """The report of a command, if one was asked for."""

    context: typer.Context
    path: Path | None

    @classmethod
    def of(cls, context: typer.Context, report: str | None, output: Path | None) -> Page:
        """What ``--report`` gave; what is in the way shows before any work is done."""
        from onnx_asr.report import check_report

        return cls(context, None if report is None else check_report(report, output))

    @property
    def name(self) -> str | None:
        """Where it goes, as text."""
        return None if self.path is None else str(self.path)

    def write(
        self,
        gather: Callable[[Run], Values],
        files: dict[str, str | None],
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """Gather what the report says about this call, and write it; nothing happens where none was asked for."""
        if self.path is None:
            return
        from onnx_asr.report.data import Run
        from onnx_asr.report.html import write_report

        line = shlex.join([DISTRIBUTION, *self.context.find_root().obj])
        write_report(gather(Run(str(self.context.info_name), line, files, preprocessing)), self.path)


def verdict(improved: bool, what: str, before: str, target: Path, force: bool) -> int:
    """The exit code of a command that writes only what is closer to the dense model than before."""
    if improved:
        return DONE
    kept = f"'{target}' was written because of --force" if force else f"'{target}' was not written (--force does)"
    say("warning", f"the {what} is further from the dense model than {before}; {kept}")
    return CHECK_FAILED


def timed(latency: Latency | None) -> dict[str, Any]:
    """Latency as JSON has it: null where it was not measured."""
    return {"latency": None if latency is None else asdict(latency)}


def plain(preprocessing: Preprocessing | None) -> dict[str, Any] | None:
    """Preprocessing as JSON has it."""
    return None if preprocessing is None else preprocessing.to_dict()
