"""The outcome of a command: its report, the model it writes, its exit code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_asr.cli.terminal import Terminal, say

if TYPE_CHECKING:
    import onnx

    from onnx_asr.data import Preprocessing
    from onnx_asr.repairing.result import RepairResult
    from onnx_asr.report.data import ReportValues, Run

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


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


def verdict(result: RepairResult, what: str, before: str, target: Path, force: bool) -> int:
    """The exit code of a command that writes only what is no further from the dense model than before."""
    if result.improved:
        return DONE
    kept = f"'{target}' was written because of --force" if force else f"'{target}' was not written (--force writes it)"
    if result.modified:
        say("warning", f"the {what} is further from the dense model than {before}; {kept}")
    else:
        say("warning", f"no {what} is as close to the dense model as {before}, which is given back unchanged; {kept}")
    return CHECK_FAILED
