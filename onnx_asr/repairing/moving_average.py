"""BatchNormalization re-estimated by a moving average over batches, as frameworks in training mode do it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from onnx_asr.arrays import Array
from onnx_asr.errors import DataError
from onnx_asr.graph.points import Point
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import by_level, overflow
from onnx_asr.networks.samples import Calibration, load_calibration
from onnx_asr.networks.walk import Walk
from onnx_asr.numerics.gains import BatchNormParameters, is_live, recalibrate
from onnx_asr.numerics.moments import Accumulator, Moments
from onnx_asr.repairing.job import RepairJob
from onnx_asr.repairing.result import PointReport, Reports


def recalibrate_ema(job: RepairJob, draft: Draft, chunk_size: int, execution: Execution) -> Reports:
    """Re-estimate every BatchNormalization as a framework in training mode does (the ASR paper's protocol).

    The running statistics are reset to mean 0 and variance 1; then, batch by batch,
    ``running <- (1 - momentum) running + momentum batch`` with the batch's mean and unbiased variance, while the
    network itself normalises with the batch's mean and biased variance. The new parameters are added to the draft.
    ``chunk_size`` samples are run at once, a divisor of the samples per batch.

    Raises:
        ModelError: When activations are not finite.
        DataError: When the samples do not fill a batch.
    """
    points = [point for point in job.pruned.survey.points if point.batchnorm is not None]
    momentum, per_batch = job.options.momentum, job.options.ema_batch_size // chunk_size
    reports: Reports = {}
    done = 0
    with Walk(_batches(job, chunk_size), execution) as walk:
        lane = walk.lane(draft, [point.tensor for point in points])
        for group in by_level(points):
            found: Accumulator[tuple[Point, int], Moments] = Accumulator()
            for number, (chunk,) in enumerate(walk.step({lane: [point.tensor for point in group]})):
                for point in group:
                    found.add((point, number // per_batch), Moments.of(chunk[point.tensor], point.channel_axis))
            for point in group:
                assert point.batchnorm is not None
                batches = [moments for (measured, _), moments in found.items() if measured == point]
                old = draft.batchnorm(point.batchnorm)
                mean, var = np.zeros(point.channels), np.ones(point.channels)
                for batch in batches:
                    if not batch.is_finite:
                        raise overflow(point)
                    unbiased = batch.m2 / max(batch.count - 1, 1)
                    mean = (1 - momentum) * mean + momentum * batch.mean
                    var = (1 - momentum) * var + momentum * unbiased
                lane.replace(point.batchnorm, partial(_normalised, old, batches, per_batch))
                draft.set_batchnorm(point.batchnorm, recalibrate(old, mean, var))
                dead = ~np.any([is_live(None, batch) for batch in batches], axis=0)
                reports[point.node] = PointReport.of(point, "batchnorm", int(dead.sum()))
            done += len(group)
            execution.progress("re-estimating batch by batch", done / len(points))
    return reports


def _batches(job: RepairJob, chunk_size: int) -> Calibration:
    """``ema_batches`` batches drawn in a seeded order, round after round where the samples do not suffice."""
    chosen, options, size = job.samples.chosen, job.options, job.options.ema_batch_size
    if len(chosen) < size:
        raise DataError(
            f"--bn ema needs {size} samples per batch, and there are only {len(chosen)}: give more images, or a "
            "smaller --ema-batch-size"
        )
    generator = np.random.default_rng(options.seed)
    rounds = []
    for _ in range(-(-options.ema_batches // (len(chosen) // size))):
        order = generator.permutation(chosen)
        rounds.append(order[: len(order) - len(order) % size])
    return load_calibration(job.samples.dataset, np.concatenate(rounds)[: options.ema_batches * size], chunk_size)


def _normalised(
    parameters: BatchNormParameters, batches: Sequence[Moments], per_batch: int, chunk: int, tensor: Array
) -> Array:
    """The output of a BatchNormalization in training mode for the input in a chunk."""
    batch = batches[chunk // per_batch]
    factor = parameters.scale / np.sqrt(batch.var + parameters.epsilon)
    offset = parameters.bias - factor * batch.mean
    shape = [1, -1] + [1] * (tensor.ndim - 2)
    kind = np.promote_types(tensor.dtype, np.float32)  # float16 would round factors of large activations to zero
    result = tensor * factor.reshape(shape).astype(kind) + offset.reshape(shape).astype(kind)
    return np.asarray(result.astype(tensor.dtype, copy=False))
