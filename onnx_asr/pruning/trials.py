"""Trials: one weight pruned at a time, refitted, and its effect on the network's outputs measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_asr.arrays import Mask
from onnx_asr.graph.edit import EditPlan, apply
from onnx_asr.graph.points import LayerPoint, weight_of
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.networks.samples import Calibration
from onnx_asr.repairing.pipeline import RepairJob
from onnx_asr.repairing.refit import write_refit
from onnx_asr.repairing.rows import RowSampler, dense_rows


def try_masks(
    job: RepairJob,
    readers: Sequence[Sequence[LayerPoint]],
    masks: Sequence[Sequence[Mask]],
    calibration: Calibration,
    execution: Execution,
) -> list[list[Fidelity]]:
    """Fidelity on the held-out samples with one weight under one mask, refitted, and everything else dense.

    One walk of the dense network over the calibration samples gives every weight its rows, from which it is refitted
    for each mask; each of these networks then runs over the held-out samples. So the cost is one pass over the
    calibration samples, one fit a mask and one pass over the held-out samples a mask.

    Args:
        job: The dense model, paired with itself.
        readers: The points that read each weight.
        masks: The masks to try on each weight, in its stored shape.
        calibration: The samples to fit on.
        execution: Execution providers, memory limit, progress.

    Returns:
        One fidelity for each mask of each weight.
    """
    results: list[list[Fidelity]] = [[] for _ in readers]
    weight_of = {point.node: number for number, points in enumerate(readers) for point in points}
    waiting: dict[int, list[RowSampler]] = {}
    execution.progress("trying layers", 0.0)
    points = [point for points in readers for point in points]
    for sampler in dense_rows(job.networks, points, job.options.refit, calibration, execution):
        number = weight_of[sampler.point.node]
        samplers = waiting.setdefault(number, [])
        samplers.append(sampler)
        if len(samplers) < len(readers[number]):
            continue
        for mask in masks[number]:
            results[number].append(_trial(job, samplers, mask, execution))
        del waiting[number]
        samplers.clear()
        execution.progress("trying layers", sum(bool(found) for found in results) / len(readers))
    return results


def _trial(job: RepairJob, samplers: Sequence[RowSampler], mask: Mask, execution: Execution) -> Fidelity:
    index, plan = job.networks.pruned, EditPlan()
    for sampler in samplers:
        point = sampler.point
        dense = weight_of(index, point)
        plan.values[point.weight] = np.where(mask, dense, np.zeros((), dense.dtype))
        write_refit(job.networks, plan, sampler.again())
    return job.measure(apply(index, plan), execution)
