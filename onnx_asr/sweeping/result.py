"""What a sweep gives back, and the same as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onnx_asr.errors import OnnxAsrError, is_interrupt
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.sweeping.grid import Cell, PruneGoal
from onnx_asr.version import __version__


@dataclass(frozen=True)
class Outcome:
    """What became of one cell.

    Attributes:
        fidelity: How good the model is; None where there is none.
        sparsity: Share of the dense model's weights that are zero or gone.
        seconds: What the repair took, without reading data and scoring; 0 for "none".
        chosen: What "auto" chose.
        error: Why there is no model; None where there is one.
    """

    fidelity: Fidelity | None = None
    sparsity: float | None = None
    seconds: float | None = None
    chosen: str | None = None
    error: str | None = None


def outcome_of(call: Callable[[], Outcome]) -> Outcome:
    """What a call gives, or why it gives nothing."""
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
        conditions: What the scores depend on beside the cells: digests of the dense model and the samples, settings.
        dense: The dense model's own score.
        cells: Outcome of every cell, in the order of a table.
        notes: What else a user should know.
    """

    conditions: dict[str, Any]
    dense: Fidelity
    cells: dict[Cell, Outcome]
    notes: tuple[str, ...]

    @property
    def measure(self) -> str:
        """What the models are told apart by: "top1" where there are labels, else "agreement", else "snr_db"."""
        if self.dense.top1 is not None:
            return "top1"
        return "snr_db" if self.dense.agreement is None else "agreement"

    @property
    def goals(self) -> list[PruneGoal]:
        """What was pruned."""
        return list(dict.fromkeys(cell.goal for cell in self.cells))

    @property
    def methods(self) -> list[str]:
        """What was repaired with; in the order in which each comes first in the cells."""
        return list(dict.fromkeys(cell.method for cell in self.cells))

    @property
    def failures(self) -> dict[str, list[Cell]]:
        """Why cells failed, and which."""
        found: dict[str, list[Cell]] = {}
        for cell, outcome in self.cells.items():
            if outcome.error is not None:
                found.setdefault(outcome.error, []).append(cell)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; also what a results file holds."""
        return {
            "version": __version__,
            "conditions": self.conditions,
            "measure": self.measure,
            "dense": self.dense.to_dict(),
            "cells": [cell_to_dict(cell, outcome) for cell, outcome in self.cells.items()],
            "notes": list(self.notes),
        }


def cell_to_dict(cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """One cell as plain values."""
    return {
        "pattern": cell.goal.pattern,
        "sparsity": cell.goal.sparsity,
        "method": cell.method,
        "weights_gone": outcome.sparsity,
        "fidelity": None if outcome.fidelity is None else outcome.fidelity.to_dict(),
        "seconds": outcome.seconds,
        "chosen": outcome.chosen,
        "error": outcome.error,
    }


def cell_from_dict(values: Mapping[str, Any]) -> tuple[Cell, Outcome]:
    """A cell from what :func:`cell_to_dict` made of it.

    Raises:
        KeyError: When something is missing.
        TypeError: When something is not what it should be.
    """
    fidelity = values["fidelity"]
    outcome = Outcome(
        fidelity=None if fidelity is None else Fidelity(**fidelity),
        sparsity=values["weights_gone"],
        seconds=values["seconds"],
        chosen=values["chosen"],
        error=values["error"],
    )
    return Cell(PruneGoal(values["pattern"], values["sparsity"]), values["method"]), outcome
