"""The values of a sweep's report, and the curves of its figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx_asr.json_values import plain
from onnx_asr.repairing.options import flattened
from onnx_asr.report.data import ReportValues, Run
from onnx_asr.sweeping.grid import Cell, PruneGoal
from onnx_asr.sweeping.result import SweepResult

MEASURES = {
    "metric": "metric, lower is better",
    "top1": "top-1",
    "detection_error": "detection error",
    "agreement": "agreement with the dense model",
    "snr_db": "output SNR, dB",
}
PATTERNS = "N:M patterns"


def sweep_data(run: Run, result: SweepResult) -> ReportValues:
    """The report of a sweep."""
    values = {method: _values(result, method, result.goals) for method in result.methods}
    first = min if result.lower_is_better else max
    best = [first((v for v in column if v is not None), default=None) for column in zip(*values.values(), strict=True)]
    rows = []
    for method in result.methods:
        cells: list[ReportValues | None] = []  # None where the grid has no such cell
        for goal, value, winner in zip(result.goals, values[method], best, strict=True):
            outcome = result.cells.get(Cell(goal, method))
            is_best = outcome is not None and outcome.fidelity is not None and value == winner
            cells.append(None if outcome is None else plain(outcome) | {"best": is_best})
        rows.append({"method": method, "cells": cells})
    return {
        **plain(run),
        "measure": {"name": result.measure, "label": MEASURES[result.measure]},
        "dense": plain(result.dense),
        "goals": [str(goal) for goal in result.goals],
        "weights_gone": [_gone(result, goal) for goal in result.goals],
        "rows": rows,
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


def _gone(result: SweepResult, goal: PruneGoal) -> float | None:
    """The share of weights gone: the same for all methods, up to the rounding of mask rounds."""
    shares = (outcome.sparsity for cell, outcome in result.cells.items() if cell.goal == goal)
    return next((share for share in shares if share is not None), None)


def panels(result: SweepResult) -> list[ReportValues]:
    """A panel per pattern with a sparsity, and one for all N:M patterns together.

    ``x`` is ``-log2(1 - s)``, the number of times that the weights were halved; for N:M patterns, their position.
    """
    by_title: dict[str, list[PruneGoal]] = {}
    for goal in result.goals:  # N:M patterns are last
        by_title.setdefault(PATTERNS if goal.sparsity is None else goal.pattern, []).append(goal)
    found = []
    for title, goals in by_title.items():
        fixed = title == PATTERNS
        curves = {method: _values(result, method, goals) for method in result.methods}
        found.append(
            {
                "title": title,
                "x": [float(place) if fixed else -math.log2(1 - goal.share) for place, goal in enumerate(goals)],
                "labels": [goal.pattern if fixed else f"{100 * goal.share:g}%" for goal in goals],
                "curves": {name: values for name, values in curves.items() if any(v is not None for v in values)},
            }
        )
    return found


def _values(result: SweepResult, method: str, goals: Sequence[PruneGoal]) -> list[float | None]:
    """The scores of a method; None where there is none, or an infinite one."""
    outcomes = (result.cells.get(Cell(goal, method)) for goal in goals)
    scores = (getattr(outcome.fidelity, result.measure, None) if outcome else None for outcome in outcomes)
    return [None if score is None or not math.isfinite(score) else float(score) for score in scores]
