"""Channel-wise repair: walk, measure each point with everything upstream repaired, let a rule set its channels.

Methods: ``paired`` (one lockstep walk); ``asr``, ``raw``, ``layerwise`` (gains in a lockstep walk, then
BatchNormalization re-estimated in a second one, as in the ASR paper's Algorithm 1); ``bn`` (the second walk alone).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnx_asr.calibration import Calibration
from onnx_asr.engine.lockstep import BufferPool, Chunk, Lane, lockstep
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.points import Point
from onnx_asr.networks import Execution, Networks, by_level
from onnx_asr.numerics.gains import (
    BatchNormParameters,
    ChannelAffine,
    Prior,
    absorb,
    asr_gain,
    layerwise_gain,
    paired,
    raw_gain,
    recalibrate,
)
from onnx_asr.numerics.moments import Floats, Moments, PairMoments
from onnx_asr.rewrite import plan_affine, plan_batchnorm, read_batchnorm, read_bias

GainMethod = Literal["asr", "raw", "layerwise"]

Rule = Callable[[Point, Moments, Moments, Floats | None], ChannelAffine]
"""Point, dense moments, pruned moments and (where it was asked for) correlation to the affine map of the channels."""


@dataclass(frozen=True)
class PointReport:
    """What was done at one correction point.

    Attributes:
        name: The point's node.
        op_type: Its operator.
        written: Where the correction went: "weights", "batchnorm", "weights+batchnorm".
        channels: Number of channels.
        dead: Channels without variance in the pruned network.
        gain: Smallest, median and largest gain; None where statistics were replaced instead.
        residual: Relative error of the point's output before and after a refit; None for channel rules.
    """

    name: str
    op_type: str
    written: str
    channels: int
    dead: int
    gain: tuple[float, float, float] | None
    residual: tuple[float, float] | None = None

    def note(self, method: str) -> str:
        """One sentence for the node's doc string."""
        parts = [f"onnx-resuscitate {method}: {self.written} of {self.channels} channels rewritten"]
        if self.gain is not None:
            parts.append(f"gain {self.gain[0]:.4g} to {self.gain[2]:.4g} (median {self.gain[1]:.4g})")
        if self.residual is not None:
            parts.append(f"relative output error {self.residual[0]:.4g} -> {self.residual[1]:.4g}")
        if self.dead:
            parts.append(f"{self.dead} dead channels")
        return ", ".join(parts)


Reports = dict[int, PointReport]


def repair_paired(
    networks: Networks, calibration: Calibration, execution: Execution, plan: EditPlan, power: float = 0.0
) -> Reports:
    """Match every channel's mean and standard deviation to the dense network's on the same samples.

    At a BatchNormalization the map goes into its parameters, elsewhere into weights and bias. Without a dense network
    the stored running statistics stand in for it, at the points that have them.
    """
    correlated = power > 0 and networks.dense is not None

    def rule(point: Point, dense: Moments, pruned: Moments, correlation: Floats | None) -> ChannelAffine:
        return paired(dense, pruned, correlation, power)

    points = networks.survey.points
    return _gain_walk(networks, points, calibration, execution, plan, rule, into_batchnorm=True, correlated=correlated)


def repair_gains(
    networks: Networks,
    calibration: Calibration,
    execution: Execution,
    plan: EditPlan,
    method: GainMethod,
    prior: Prior,
    bias_correction: bool,
) -> Reports:
    """Scale the filters of every convolution but the first (ASR paper, Algorithm 1, before its last step)."""
    first = networks.first_layers()
    points = [p for p in networks.survey.points if p.kind in ("Conv", "ConvTranspose") and p.node not in first]

    def rule(point: Point, dense: Moments, pruned: Moments, correlation: Floats | None) -> ChannelAffine:
        if method == "asr":
            gain = asr_gain(dense, pruned, prior)
        else:
            gain = raw_gain(dense, pruned) if method == "raw" else layerwise_gain(dense, pruned)
        if bias_correction:
            return ChannelAffine(gain, dense.mean - gain * pruned.mean)
        return ChannelAffine(gain, (1.0 - gain) * read_bias(networks.pruned, plan, point))

    return _gain_walk(networks, points, calibration, execution, plan, rule, into_batchnorm=False)


def _gain_walk(
    networks: Networks,
    points: Sequence[Point],
    calibration: Calibration,
    execution: Execution,
    plan: EditPlan,
    rule: Rule,
    *,
    into_batchnorm: bool,
    correlated: bool = False,
) -> Reports:
    """Walk the pruned network level by level and write what ``rule`` makes of each point.

    Moments of the dense network do not depend on the walk: all are measured in one pass before it, unless the rule
    needs correlations, for which both networks walk in lockstep.
    """
    index = networks.pruned
    if networks.dense is None:
        points = [point for point in points if point.batchnorm is not None]
    twins = {} if networks.dense is None else {point: networks.dense_tensor(point.tensor) for point in points}
    reports: Reports = {}
    with BufferPool(execution.memory_limit) as pool:
        dense_lane = networks.dense_lane(twins.values(), calibration, pool, execution) if twins else None
        references: dict[Point, Moments] = {}
        if dense_lane is not None and not correlated:
            execution.progress("measuring the dense network", 0.0)
            references = _measure(dense_lane, twins)
            pool.trim()
        lane = networks.pruned_lane([point.tensor for point in points], calibration, pool, execution, plan)
        done = 0
        for _, group in by_level(points):
            execution.progress("measuring and correcting", done / len(points))
            names = {point: point.tensor for point in group}
            measured: dict[Point, tuple[Moments, Moments, Floats | None]] = {}
            if dense_lane is not None and correlated:
                pairs = _measure_pairs(lane, names, dense_lane, {point: twins[point] for point in group})
                measured = {point: (pair.dense, pair.pruned, pair.correlation) for point, pair in pairs.items()}
            else:
                for point, moments in _measure(lane, names).items():
                    measured[point] = (references.get(point) or _stored(networks, plan, point), moments, None)
            for point, (dense, pruned, correlation) in measured.items():
                affine = rule(point, dense, pruned, correlation)
                written = _write(networks, plan, point, affine, lane, into_batchnorm)
                reports[point.node] = _report(index.nodes[point.node].op_type, point, written, pruned, affine.gain)
            done += len(group)
            pool.trim()
    return reports


def _write(
    networks: Networks, plan: EditPlan, point: Point, affine: ChannelAffine, lane: Lane, into_batchnorm: bool
) -> str:
    """Plan an affine map of a point's channels and apply it to what the lane holds; says where it went."""
    index = networks.pruned
    if point.batchnorm is not None and (into_batchnorm or point.weight_slot is None):
        plan_batchnorm(index, plan, point.batchnorm, absorb(read_batchnorm(index, plan, point.batchnorm), affine))
        return "batchnorm"
    plan_affine(index, plan, point, affine)
    # a shift before a BatchNormalization went into its mean, not into the tensor
    shift = affine.shift if point.batchnorm is None else np.zeros_like(affine.gain)
    lane.transform(point.tensor, affine.gain, shift, point.channel_axis)
    return "weights"


def _measure(lane: Lane, names: Mapping[Point, str]) -> dict[Point, Moments]:
    """Moments of some points' tensors, in one network."""
    result: dict[Point, Moments] = {}

    def visit(number: int, chunks: list[Chunk]) -> None:
        for point, name in names.items():
            moments = Moments.of(chunks[0][name], point.channel_axis)
            result[point] = result[point].merge(moments) if point in result else moments

    lockstep([lane], [list(names.values())], visit)
    return result


def _measure_pairs(
    lane: Lane, names: Mapping[Point, str], dense_lane: Lane, twins: Mapping[Point, str]
) -> dict[Point, PairMoments]:
    """Moments and cross moments of some points' tensors, in both networks."""
    result: dict[Point, PairMoments] = {}

    def visit(number: int, chunks: list[Chunk]) -> None:
        for point, name in names.items():
            moments = PairMoments.of(chunks[1][twins[point]], chunks[0][name], point.channel_axis)
            result[point] = result[point].merge(moments) if point in result else moments

    lockstep([lane, dense_lane], [list(names.values()), list(twins.values())], visit)
    return result


def _stored(networks: Networks, plan: EditPlan, point: Point) -> Moments:
    """The stored running statistics, standing in for a dense network."""
    assert point.batchnorm is not None
    return read_batchnorm(networks.pruned, plan, point.batchnorm).moments


def _report(op_type: str, point: Point, written: str, pruned: Moments, gain: Floats | None) -> PointReport:
    summary = None
    if gain is not None:
        summary = (float(gain.min()), float(np.median(gain)), float(gain.max()))
    return PointReport(point.name, op_type, written, point.channels, int((pruned.m2 == 0).sum()), summary)


def recalibrate_exact(networks: Networks, calibration: Calibration, execution: Execution, plan: EditPlan) -> Reports:
    """Re-estimate every BatchNormalization on the whole calibration set, each with all upstream ones re-estimated."""
    points = [point for point in networks.survey.points if point.batchnorm is not None]
    reports: Reports = {}
    with BufferPool(execution.memory_limit) as pool:
        lane = networks.pruned_lane([point.tensor for point in points], calibration, pool, execution, plan)
        done = 0
        for _, group in by_level(points):
            execution.progress("re-estimating BatchNormalization", done / len(points))
            for point, measured in _measure(lane, {point: point.tensor for point in group}).items():
                _set_statistics(networks, plan, point, measured.mean, measured.var, measured, reports)
            done += len(group)
    return reports


def recalibrate_ema(
    networks: Networks,
    calibration: Calibration,
    execution: Execution,
    plan: EditPlan,
    momentum: float,
    batch_samples: int,
) -> Reports:
    """Re-estimate every BatchNormalization as a framework in training mode does (the ASR paper's protocol).

    The running statistics are reset to mean 0 and variance 1; then, batch by batch,
    ``running <- (1 - momentum) running + momentum batch`` with the batch's mean and unbiased variance, while the
    network itself normalises with the batch's mean and biased variance.

    Args:
        networks: The pruned network (a dense one is not needed).
        calibration: Samples in the order of the batches; ``batch_samples`` is a multiple of its chunk size.
        execution: How to run.
        plan: The plan to add to.
        momentum: Weight of a new batch; frameworks' default is 0.1.
        batch_samples: Samples a batch.
    """
    points = [point for point in networks.survey.points if point.batchnorm is not None]
    index = networks.pruned
    per_batch = batch_samples // calibration.batch_size
    reports: Reports = {}
    with BufferPool(execution.memory_limit) as pool:
        lane = networks.pruned_lane([point.tensor for point in points], calibration, pool, execution, plan)
        done = 0
        for _, group in by_level(points):
            batches = _measure_batches(lane, group, per_batch)
            for point in group:
                assert point.batchnorm is not None
                old = read_batchnorm(index, plan, point.batchnorm)
                mean, var = np.zeros(point.channels), np.ones(point.channels)
                for batch in batches[point]:
                    unbiased = batch.m2 / max(batch.count - 1, 1)
                    mean = (1 - momentum) * mean + momentum * batch.mean
                    var = (1 - momentum) * var + momentum * unbiased
                lane.replace(point.batchnorm, _training_mode(old, batches[point], per_batch))
                whole = batches[point][0]
                for batch in batches[point][1:]:
                    whole = whole.merge(batch)
                _set_statistics(networks, plan, point, mean, var, whole, reports)
            done += len(group)
            execution.progress("re-estimating batch by batch", done / len(points))
    return reports


def _measure_batches(lane: Lane, group: list[Point], per_batch: int) -> dict[Point, list[Moments]]:
    result: dict[Point, list[Moments]] = {point: [] for point in group}

    def visit(number: int, chunks: list[Chunk]) -> None:
        for point, batches in result.items():
            moments = Moments.of(chunks[0][point.tensor], point.channel_axis)
            if number % per_batch == 0:
                batches.append(moments)
            else:
                batches[-1] = batches[-1].merge(moments)

    lockstep([lane], [[point.tensor for point in group]], visit)
    return result


def _training_mode(
    parameters: BatchNormParameters, batches: list[Moments], per_batch: int
) -> Callable[[int, NDArray[np.float32]], NDArray[np.float32]]:
    """A BatchNormalization in training mode, as a function of chunk number and input."""

    def normalise(number: int, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        batch = batches[number // per_batch]
        factor = parameters.scale / np.sqrt(batch.var + parameters.epsilon)
        offset = parameters.bias - factor * batch.mean
        shape = [1, -1] + [1] * (tensor.ndim - 2)
        return tensor * factor.reshape(shape).astype(tensor.dtype) + offset.reshape(shape).astype(tensor.dtype)

    return normalise


def _set_statistics(
    networks: Networks,
    plan: EditPlan,
    point: Point,
    mean: Floats,
    var: Floats,
    measured: Moments,
    reports: Reports,
) -> None:
    assert point.batchnorm is not None
    index = networks.pruned
    old = read_batchnorm(index, plan, point.batchnorm)
    plan_batchnorm(index, plan, point.batchnorm, recalibrate(old, mean, var))
    reports[point.node] = _report(index.nodes[point.node].op_type, point, "batchnorm", measured, None)
