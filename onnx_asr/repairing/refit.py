"""Refit: walk level by level, and at each point solve for the surviving weights that reproduce the dense output.

BatchNormalization is folded for the fit, ``V = a W`` with ``a = gamma / S``, and unfolded when written: ``W = V / a``,
``beta' = b - a (b_conv - mu)``. The target is the dense network's output behind the BatchNormalization; before a
residual Add it is ``(y_dense + shortcut_dense) - shortcut_repaired``, so that the block's output is what is matched.
A BatchNormalization that follows no convolution is not changed: its input is matched already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from onnx_asr.arrays import Floats, Mask
from onnx_asr.graph.points import LayerPoint, Point
from onnx_asr.graph.skips import Reason, Skip
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import Pair, overflow
from onnx_asr.networks.samples import Calibration
from onnx_asr.numerics.refit import NotFiniteError
from onnx_asr.numerics.workers import one_thread_per_product
from onnx_asr.repairing.options import RefitRecipe
from onnx_asr.repairing.result import PointReport, Reports
from onnx_asr.repairing.rows import DenseCache, RowSampler, sampled

MATCHED_BEFORE = Reason("matched-upstream", "its input is already matched by the refit of the layers before it")
CLASSIFIER_OFF = Reason("classifier-off", "the refit of Gemm and MatMul nodes is switched off")

Narrowing: TypeAlias = Callable[[Floats], Mask]
"""From a weight as refitted so far, in its stored shape and as it would be written, to the entries that stay."""

_MAX_GROWTH = 10.0


def repair_refit(
    pair: Pair,
    draft: Draft,
    calibration: Calibration,
    execution: Execution,
    recipe: RefitRecipe,
    *,
    precise: bool = False,
    kept: DenseCache | None = None,
    narrow: Mapping[int, Sequence[Narrowing]] | None = None,
) -> tuple[Reports, list[Skip]]:
    """Refit every point's surviving weights, upstream first; zeros stay zeros.

    Args:
        pair: The networks.
        draft: The pruned network's parameters; the new ones are added.
        calibration: The samples.
        execution: How to run.
        recipe: How to fit.
        precise: Keep the new weights as they were computed, in float64, for scores; else in the type of the file,
            which is all that is written and takes half the memory.
        kept: The dense network's sampled outputs, for refits with the same recipe and samples: see :func:`sampled`.
        narrow: By node, callbacks that remove more weights, applied in order.

    Returns:
        Reports by node, and the points that a refit does not change.

    Raises:
        ModelError: When activations are not finite, or the two networks cannot be compared place by place.
    """

    def obstacle(point: Point) -> Reason | None:
        if not isinstance(point, LayerPoint):
            return MATCHED_BEFORE
        return None if recipe.classifier or point.layer.is_convolution else CLASSIFIER_OFF

    points, skips = pair.pruned.split(obstacle)
    reports: Reports = {}
    for group in sampled(pair, points, draft, recipe, calibration, execution, kept):
        while group:  # nothing but the call holds a point's rows while it is fitted
            report = write_refit(draft, group.pop(0), narrow)
            reports[report.node] = report
            if not precise:
                draft.round(report.node)
    return reports, skips


def write_refit(
    draft: Draft, sampler: RowSampler, narrow: Mapping[int, Sequence[Narrowing]] | None = None
) -> PointReport:
    """Fit the weights of one point that are not zero in the draft, and set them there; its rows are used up.

    For ``narrow`` see :func:`repair_refit`.
    """
    point, layout = sampler.point, sampler.point.layer.layout

    def rows_of(patches: Floats) -> Floats:
        return layout.to_rows(layout.from_patches(patches)) / point.layer.alpha

    try:
        with one_thread_per_product():
            fit = sampler.refit(draft)
            for choose in (narrow or {}).get(point.node, ()):
                weight, *_ = _unfolded(draft, point, rows_of(fit.draft()))
                fit.narrow(layout.to_patches(choose(layout.from_rows(weight))))
            solution = fit.solve()
    except NotFiniteError as error:
        raise overflow(point) from error
    sampler.release()
    del sampler, fit  # and the rows, where the caller has let go of them
    folded = rows_of(solution.weight)
    rows, slope, unchanged = _unfolded(draft, point, folded)
    draft.set_rows(point, rows)
    if point.batchnorm is None:
        draft.set_bias(point, solution.bias)
    else:
        old = draft.batchnorm(point.batchnorm)
        scale = np.where(unchanged, old.scale, slope * old.deviation)
        bias = solution.bias - slope * (draft.bias(point) - old.mean)
        draft.set_batchnorm(point.batchnorm, replace(old, scale=scale, bias=bias))
    written = "weights" if point.batchnorm is None else "weights+batchnorm"
    report = PointReport.of(point, written, int((~folded.any(axis=1)).sum()), solution.gain)
    residual = solution.residual_before, solution.residual_after
    return replace(report, residual=residual, converged=solution.converged)


def _unfolded(draft: Draft, point: LayerPoint, folded: Floats) -> tuple[Floats, Floats, Mask]:
    """``V`` as rows ``W`` [C_out, K] of a layer, the slopes ``a`` [C_out] for it, and which slopes are unchanged.

    ``W = V / a`` where that stays within ten times the row's largest weight; else the BatchNormalization's scale takes
    the difference (channels whose scale is all but zero).
    """
    if point.batchnorm is None:
        return folded, np.ones(len(folded)), np.ones(len(folded), np.bool_)
    slope = draft.batchnorm(point.batchnorm).slope
    largest = np.abs(draft.rows(point)).max(axis=1)
    peak = np.abs(folded).max(axis=1)
    fits = (np.abs(slope) * (_MAX_GROWTH * largest) >= peak) & (slope != 0)
    wider = np.divide(peak, largest, out=np.ones_like(peak), where=largest > 0)
    slope = np.where(fits, slope, wider)
    return folded / np.where(slope == 0, 1.0, slope)[:, None], slope, fits
