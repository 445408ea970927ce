"""The result of a sweep, and its cells read back from JSON values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from onnx_asr.errors import OnnxAsrError, is_interrupt
from onnx_asr.json_values import key
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.sweeping.grid import Cell, PruneGoal
from onnx_asr.version import __version__


@dataclass(frozen=True)
class Outcome:
    """The result of one cell.

    Attributes:
        fidelity: How good the model is; None where the cell failed.
        sparsity: Share of the dense model's weights that are zero or gone.
        seconds: Time of the repair, without reading data and scoring; 0 for "none".
        chosen: The method that "auto" chose.
        error: Why the cell failed; None where it did not.
    """

    fidelity: Fidelity | None = None
    sparsity: float | None = field(default=None, metadata=key("weights_gone"))
    seconds: float | None = None
    chosen: str | None = None
    error: str | None = None


def outcome_of(call: Callable[[], Outcome]) -> Outcome:
    """The outcome of a call, or the error that it raised."""
    try:
        return call()
    except OnnxAsrError as error:
        return Outcome(error=str(error))
    except Exception as error:
        if is_interrupt(error):
            raise
        return Outcome(error=f"unexpected {type(error).__name__}: {error}")


@dataclass(frozen=True)
class SweepResult:
    """The cells of a sweep, those that were finished by an earlier run included.

    Attributes:
        conditions: Digests of the dense model and the samples, settings: all that scores depend on but the cell.
        dense: The dense model's own score.
        cells: Outcome of every cell, in the order of a table.
        notes: Further remarks for the user.
    """

    derived: ClassVar = ("version", "measure")
    version: ClassVar = __version__

    conditions: dict[str, Any]
    dense: Fidelity
    cells: dict[Cell, Outcome]
    notes: tuple[str, ...]

    @property
    def measure(self) -> str:
        """The measure that models are compared by.

        The user's own "metric" if there is one, "top1" where there are labels, else "agreement", "detection_error" for
        detectors, else "snr_db".
        """
        if self.dense.metric is not None:
            return "metric"
        if self.dense.top1 is not None:
            return "top1"
        if self.dense.detection_error is not None:
            return "detection_error"
        return "snr_db" if self.dense.agreement is None else "agreement"

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value of that measure is better."""
        return self.measure in ("metric", "detection_error")

    @property
    def goals(self) -> list[PruneGoal]:
        """The goals of pruning."""
        return list(dict.fromkeys(cell.goal for cell in self.cells))

    @property
    def methods(self) -> list[str]:
        """The methods, in the order in which each comes first in the cells."""
        return list(dict.fromkeys(cell.method for cell in self.cells))

    @property
    def failures(self) -> dict[str, list[Cell]]:
        """The cells that failed, by error."""
        found: dict[str, list[Cell]] = {}
        for cell, outcome in self.cells.items():
            if outcome.error is not None:
                found.setdefault(outcome.error, []).append(cell)
        return found


def cell_from(values: Mapping[str, Any]) -> tuple[Cell, Outcome]:
    """A cell from the JSON values of a result.

    Raises:
        KeyError: When something is missing.
        TypeError: When something is not what it should be.
    """
    fidelity = values["fidelity"]
    others = (values[name] for name in ("weights_gone", "seconds", "chosen", "error"))
    outcome = Outcome(None if fidelity is None else Fidelity(**fidelity), *others)
    return Cell(PruneGoal(values["pattern"], values["sparsity"]), values["method"]), outcome
