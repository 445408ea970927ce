"""Fidelity with one weight pruned and refitted, and everything else dense."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_asr.arrays import Floats, Mask
from onnx_asr.graph.points import weight_of
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.networks.pair import Network
from onnx_asr.networks.samples import Calibration
from onnx_asr.numerics.patterns import Pattern
from onnx_asr.pruning.masks import PrunableWeight, make_masks
from onnx_asr.repairing.refit import write_refit
from onnx_asr.repairing.rows import RowSampler, dense_rows
from onnx_asr.repairing.verification import Verifier


def layer_masks(
    weights: Sequence[PrunableWeight],
    scores: Sequence[Floats],
    pattern: Pattern,
    sparsities: Sequence[float],
) -> list[list[Mask]]:
    """Masks of every weight by itself, one for each of the sparsities."""
    return [
        [make_masks([weight], [values], pattern, share, "layer")[0] for share in sparsities]
        for weight, values in zip(weights, scores, strict=True)
    ]


def fidelity_under_masks(
    dense: Network,
    weights: Sequence[PrunableWeight],
    masks: Sequence[Sequence[Mask]],
    verifier: Verifier,
    calibration: Calibration,
    execution: Execution,
) -> list[list[Fidelity]]:
    """Fidelity on the held-out samples with one weight under one mask, refitted, and everything else dense.

    One walk of the dense network over the calibration samples gives every weight its rows, from which it is refitted
    for each mask; each of these networks then runs over the held-out samples. So the cost is one pass over the
    calibration samples, and per mask one fit and one pass over the held-out samples.

    Args:
        dense: The network.
        weights: The weights.
        masks: The masks to try on each weight, in its stored shape.
        verifier: Measures the results; its samples' options say how to fit.
        calibration: The samples to fit on.
        execution: Execution providers, memory limit, progress.

    Returns:
        One fidelity for each mask of each weight.
    """
    results: list[list[Fidelity]] = [[] for _ in weights]
    weight_number = {point.node: number for number, weight in enumerate(weights) for point in weight.points}
    waiting: dict[int, list[RowSampler]] = {}
    execution.progress("trying layers", 0.0)
    points = [point for weight in weights for point in weight.points]
    for sampler in dense_rows(dense, points, verifier.samples.options.refit, calibration, execution):
        number = weight_number[sampler.point.node]
        samplers = waiting.setdefault(number, [])
        samplers.append(sampler)
        if len(samplers) < len(weights[number].points):
            continue
        for mask in masks[number]:
            draft = _refitted(dense, samplers, mask)
            results[number].append(verifier.fidelity(draft.model()))
        del waiting[number]
        samplers.clear()
        execution.progress("trying layers", sum(bool(found) for found in results) / len(weights))
    return results


def _refitted(dense: Network, samplers: Sequence[RowSampler], mask: Mask) -> Draft:
    """The dense network with the samplers' points under a mask, refitted."""
    draft = Draft(dense.index)
    for sampler in samplers:
        value = weight_of(dense.index, sampler.point)
        draft.set_weight(sampler.point, np.where(mask, value, np.zeros((), value.dtype)))
        write_refit(draft, sampler.again())
    return draft
