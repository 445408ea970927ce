"""Refit: walk in lockstep, and at each point solve for the surviving weights that reproduce the dense output.

BatchNormalization is folded for the fit, ``V = a W`` with ``a = gamma / S``, and unfolded when written: ``W = V / a``,
``beta' = b - a (b_conv - mu)``. The target is the dense network's output behind the BatchNormalization; before a
residual Add it is ``(y_dense + shortcut_dense) - shortcut_repaired``, so that the block's output is what is matched.
A BatchNormalization that follows no convolution is left alone: what it reads is matched already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from onnx_asr.arrays import Floats, Mask
from onnx_asr.engine.lane import Lane
from onnx_asr.graph.context import Context, contexts, steps
from onnx_asr.graph.edit import EditPlan, stored
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.points import LayerPoint
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import Networks, overflow
from onnx_asr.networks.parameters import (
    plan_batchnorm,
    plan_bias,
    plan_rows,
    read_batchnorm,
    read_bias,
    read_rows,
)
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.walk import Walk
from onnx_asr.numerics.gains import BatchNormParameters
from onnx_asr.numerics.refit import NotFiniteError
from onnx_asr.repairing.options import RefitRecipe
from onnx_asr.repairing.point_report import PointReport, Reports
from onnx_asr.repairing.rows import DenseRows, RowSampler

Choice: TypeAlias = Callable[[Floats], Mask]
"""From a weight as refitted so far, in its stored shape, to the entries that stay."""

_MAX_GROWTH = 10.0


def repair_refit(
    networks: Networks,
    calibration: Calibration,
    execution: Execution,
    plan: EditPlan,
    recipe: RefitRecipe,
    *,
    precise: bool = False,
    kept: dict[int, list[DenseRows]] | None = None,
    narrow: Mapping[int, Sequence[Choice]] = MappingProxyType({}),
) -> Reports:
    """Refit every point's surviving weights, upstream first; zeros stay zeros.

    Args:
        networks: The pair.
        calibration: The samples.
        execution: Execution providers, memory limit, progress.
        plan: Where the new values are put.
        recipe: How to fit.
        precise: Put the new weights there as they were computed, in float64, for scores; else in the type of the file,
            which is all that is written and takes half the memory.
        kept: What the dense network put out at each point's sampled positions, by node; filled where it is empty, else
            used, so that the dense network is not run: for further refits with the same recipe and samples.
        narrow: By node, choices that take more weights out, applied in order.
    """
    index = networks.pruned
    items = contexts(index, networks.survey.points)
    if not recipe.classifier:
        items = [item for item in items if item.point.layer.is_convolution]
    numbers = {item.point.node: number for number, item in enumerate(items)}
    reports: Reports = {}
    known = bool(kept)
    with Walk(calibration, execution) as walk:

        def sampler(item: Context) -> RowSampler:
            node = item.point.node
            rows = None if kept is None else kept.setdefault(node, [])
            return RowSampler(networks, item, recipe, calibration, numbers[node], walk.store, rows)

        schedule = [[sampler(item) for item in group] for group in steps(index, items)]
        pruned_names = [name for group in schedule for job in group for name in job.pruned_targets]
        dense_names = [name for group in schedule for job in group for name in job.dense_targets]
        lanes = [walk.lane(index, pruned_names, plan)]
        if not known:
            assert networks.whole is not None
            lanes.append(walk.lane(networks.whole, dense_names))
        for number in range(len(schedule)):
            execution.progress("refitting", number / len(schedule))
            group = schedule[number]
            _sample(walk, lanes, group)
            while group:  # nothing but the call holds a point's rows while it is fitted
                node = group[0].point.node
                report = write_refit(networks, plan, group.pop(0), narrow.get(node, ()))
                reports[report.node] = report
                if not precise:
                    _round(index, plan, report.node)
    return reports


def _sample(walk: Walk, lanes: list[Lane], group: Sequence[RowSampler]) -> None:
    wanted = [
        [name for job in group for name in job.pruned_targets],
        [name for job in group for name in job.dense_targets],
    ]
    for pruned, *dense in walk.step(dict(zip(lanes, wanted, strict=False))):
        for job in group:
            job.add(dense[0] if dense else None, pruned)


def write_refit(networks: Networks, plan: EditPlan, job: RowSampler, narrow: Sequence[Choice] = ()) -> PointReport:
    """Fit the weights of one point that are not zero in the plan, and put the result there.

    Args:
        networks: The pair.
        plan: What is planned so far.
        job: The point's rows, which are used up.
        narrow: As for :func:`repair_refit`.
    """
    index, point = networks.pruned, job.point
    layout = point.layer.layout

    def rows_of(patches: Floats) -> Floats:
        return layout.to_rows(layout.from_patches(patches)) / point.layer.alpha

    try:
        fit = job.refit(plan)
        for choose in narrow:
            weight, *_ = _unfolded(index, plan, point, rows_of(fit.draft()))
            fit.narrow(layout.to_patches(choose(layout.from_rows(weight))))
        solution = fit.solve()
    except NotFiniteError as error:
        raise overflow(point) from error
    job.release()
    del job, fit  # and the rows, where the caller has let go of them
    rows = rows_of(solution.weight)
    if point.batchnorm is None:
        plan_rows(index, plan, point, rows)
        plan_bias(index, plan, point, solution.bias)
        written = "weights"
    else:
        _unfold(index, plan, point, rows, solution.bias)
        written = "weights+batchnorm"
    empty = int((~rows.any(axis=1)).sum())
    residual = (solution.residual_before, solution.residual_after)
    return PointReport.of(index, point, written, empty, solution.gain, residual)


def _round(index: GraphIndex, plan: EditPlan, node: int) -> None:
    """Bring what is planned for a node into the type of the file."""
    for key, value in plan.values_of(node):
        plan.values[key] = stored(index, *key, value)


def _unfolded(index: GraphIndex, plan: EditPlan, point: LayerPoint, folded: Floats) -> tuple[Floats, Floats, Mask]:
    """``V`` as rows ``W`` [C_out, K] of a convolution, the slopes ``a`` [C_out] for it, and which are as they were.

    ``W = V / a`` where that stays within ten times the row's largest weight; else the BatchNormalization's scale takes
    the difference (channels whose scale is all but zero).
    """
    if point.batchnorm is None:
        return folded, np.ones(len(folded)), np.ones(len(folded), np.bool_)
    slope = read_batchnorm(index, plan, point.batchnorm).slope
    largest = np.abs(read_rows(index, plan, point)).max(axis=1)
    peak = np.abs(folded).max(axis=1)
    fits = (np.abs(slope) * (_MAX_GROWTH * largest) >= peak) & (slope != 0)
    wider = np.divide(peak, largest, out=np.ones_like(peak), where=largest > 0)
    slope = np.where(fits, slope, wider)
    return folded / np.where(slope == 0, 1.0, slope)[:, None], slope, fits


def _unfold(index: GraphIndex, plan: EditPlan, point: LayerPoint, folded: Floats, bias: Floats) -> None:
    """Write ``y = V x + b`` as a convolution and its BatchNormalization."""
    assert point.batchnorm is not None
    old = read_batchnorm(index, plan, point.batchnorm)
    rows, slope, fits = _unfolded(index, plan, point, folded)
    scale = slope * old.deviation
    plan_rows(index, plan, point, rows)
    offset = read_bias(index, plan, point) - old.mean
    new = BatchNormParameters(np.where(fits, old.scale, scale), bias - slope * offset, old.mean, old.var, old.epsilon)
    plan_batchnorm(index, plan, point.batchnorm, new)
