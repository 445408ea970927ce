"""The values of a sweep's report, and the curves of its figures."""

from __future__ import annotations

import math
from typing import Any

from onnx_asr.json_values import plain
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.repairing.options import flattened
from onnx_asr.report.data import ReportValues, Run
from onnx_asr.sweeping.grid import Cell, PruneGoal
from onnx_asr.sweeping.result import Outcome, SweepResult

MEASURES = {"top1": "top-1", "agreement": "agreement with the dense model", "snr_db": "output SNR, dB"}
PATTERNS = "N:M patterns"


def sweep_data(run: Run, result: SweepResult) -> ReportValues:
    """The report of a sweep."""
    return {
        **plain(run),
        "measure": {"name": result.measure, "label": MEASURES[result.measure]},
        "dense": plain(result.dense),
        "goals": [str(goal) for goal in result.goals],
        "weights_gone": [_gone(result, goal) for goal in result.goals],
        "rows": [{"method": method, "cells": _row(result, method)} for method in result.methods],
        "panels": panels(result),
        "failures": [
            {"reason": reason, "cells": [str(cell) for cell in cells]} for reason, cells in result.failures.items()
        ],
        "calibration": result.conditions["calibration"],
        "scored": result.conditions["scored"],
        "options": {
            "dense SHA-256": result.conditions["dense_sha256"],
            "providers": result.conditions["providers"],
            **flattened(result.conditions["settings"]),
        },
        "seconds": {},
        "notes": list(result.notes),
    }


def _row(result: SweepResult, method: str) -> list[ReportValues | None]:
    """A method's cells, one per goal; None where the grid has none."""
    found = {goal: result.cells.get(Cell(goal, method)) for goal in result.goals}
    return [
        None if outcome is None else plain(outcome) | {"best": _is_best(result, goal, outcome)}
        for goal, outcome in found.items()
    ]


def _is_best(result: SweepResult, goal: PruneGoal, outcome: Outcome) -> bool:
    return outcome.fidelity is not None and _value(result, outcome.fidelity) == _best(result, goal)


def _gone(result: SweepResult, goal: PruneGoal) -> float | None:
    """The share of weights gone: the same for all methods, up to the rounding of mask rounds."""
    shares = [outcome.sparsity for cell, outcome in result.cells.items() if cell.goal == goal]
    return next((share for share in shares if share is not None), None)


def _best(result: SweepResult, goal: PruneGoal) -> float | None:
    outcomes = [outcome for cell, outcome in result.cells.items() if cell.goal == goal]
    values = [_value(result, outcome.fidelity) for outcome in outcomes if outcome.fidelity is not None]
    return max((value for value in values if value is not None), default=None)


def panels(result: SweepResult) -> list[ReportValues]:
    """A panel per pattern with a sparsity, and one for all N:M patterns together.

    ``x`` is ``-log2(1 - s)``, the number of times that the weights were halved; for N:M patterns, their position.
    """
    found = []
    for pattern in dict.fromkeys(goal.pattern for goal in result.goals if goal.sparsity is not None):
        goals = [goal for goal in result.goals if goal.pattern == pattern and goal.sparsity is not None]
        places = [-math.log2(1 - goal.share) for goal in goals]
        found.append(_panel(result, pattern, goals, places, [f"{100 * goal.share:g}%" for goal in goals]))
    fixed = [goal for goal in result.goals if goal.sparsity is None]
    if fixed:
        places = [float(number) for number in range(len(fixed))]
        found.append(_panel(result, PATTERNS, fixed, places, [goal.pattern for goal in fixed]))
    return found


def _panel(result: SweepResult, title: str, goals: list[PruneGoal], x: list[float], labels: list[str]) -> ReportValues:
    curves: dict[str, list[float | None]] = {}
    for method in result.methods:
        outcomes = [result.cells.get(Cell(goal, method)) for goal in goals]
        values = [_value(result, item.fidelity) if item is not None else None for item in outcomes]
        if any(value is not None for value in values):
            curves[method] = values
    return {"title": title, "x": x, "labels": labels, "curves": curves}


def _value(result: SweepResult, fidelity: Fidelity | None) -> float | None:
    value: Any = None if fidelity is None else getattr(fidelity, result.measure)
    return None if value is None or not math.isfinite(value) else float(value)
