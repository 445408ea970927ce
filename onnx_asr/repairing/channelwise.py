"""Channel-wise repair: walk, measure each point with everything upstream repaired, let a rule set its channels.

Methods: ``paired`` (one walk); ``asr``, ``raw``, ``layerwise`` (gains in one walk, then BatchNormalization re-estimated
in a second one, as in the ASR paper's Algorithm 1); ``bn`` (the second walk alone). Several methods can share a walk:
each is a track with a plan and a pruned lane of its own, and the dense network runs once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from onnx_asr.arrays import Floats
from onnx_asr.engine.lane import Chunk, Lane
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.points import LayerPoint, Point
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import Networks, by_level, overflow, unequal
from onnx_asr.networks.parameters import plan_affine, plan_batchnorm, read_batchnorm, read_bias
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.walk import Walk
from onnx_asr.numerics.gains import (
    BatchNormParameters,
    ChannelAffine,
    absorb,
    asr_gain,
    asr_reliability,
    is_live,
    layerwise_gain,
    paired,
    paired_shrinkage,
    raw_gain,
    recalibrate,
)
from onnx_asr.numerics.moments import Accumulator, Moments, PairMoments
from onnx_asr.repairing.options import Prior
from onnx_asr.repairing.point_report import PointReport, Reports

_LEVELS_AT_ONCE = 4
GainMethod = Literal["asr", "raw", "layerwise"]


@dataclass(frozen=True)
class Measured:
    """Moments of a point's channels.

    Attributes:
        pruned: In the pruned network, with everything upstream repaired.
        dense: In the dense network, or the stored running statistics that stand in for it; None where not asked for.
        correlation: Of the two; None where not asked for.
    """

    pruned: Moments
    dense: Moments | None = None
    correlation: Floats | None = None


Rule = Callable[[Lane, Point, Measured], PointReport]
"""Plans a point's new parameters, applies them to what the lane holds, and says what it did."""


@dataclass(frozen=True)
class Track:
    """One method's way through the pruned network.

    Attributes:
        points: The points it corrects.
        plan: Where its edits go.
        rule: What it does at a point.
        paired: Whether the rule looks at the dense network.
        correlated: Whether it looks at the correlation with it.
        reports: What it did, filled by the walk.
    """

    points: Sequence[Point]
    plan: EditPlan
    rule: Rule
    paired: bool = True
    correlated: bool = False
    reports: Reports = field(default_factory=dict)


def paired_track(networks: Networks, plan: EditPlan, power: float = 0.0) -> Track:
    """Match every channel's mean and standard deviation to the dense network's on the same samples.

    At a BatchNormalization the map goes into its parameters, elsewhere into weights and bias. Without a dense network
    the stored running statistics stand in for it, at the points that have them.
    """
    correlated = power > 0 and networks.dense is not None

    def rule(lane: Lane, point: Point, measured: Measured) -> PointReport:
        assert measured.dense is not None
        affine = paired(measured.dense, measured.pruned, measured.correlation, power)
        shrinkage = None
        if correlated:
            assert measured.correlation is not None
            shrinkage = paired_shrinkage(measured.correlation, power)
        if isinstance(point, LayerPoint) and point.batchnorm is None:
            return _into_weights(networks, plan, lane, point, affine, measured, shrinkage)
        return _into_batchnorm(networks, plan, point, affine, measured, shrinkage)

    return Track(_referenced(networks, networks.survey.points), plan, rule, correlated=correlated)


def gain_track(networks: Networks, plan: EditPlan, method: GainMethod, prior: Prior, bias_correction: bool) -> Track:
    """Scale the filters of every convolution but the first (ASR paper, Algorithm 1, before its last step)."""
    first = networks.first_layers()
    points = [p for p in networks.survey.layers if p.layer.is_convolution and p.node not in first]

    def rule(lane: Lane, point: Point, measured: Measured) -> PointReport:
        dense, pruned = measured.dense, measured.pruned
        assert dense is not None
        assert isinstance(point, LayerPoint)
        shrinkage = None
        if method == "asr":
            gain, shrinkage = asr_gain(dense, pruned, prior), asr_reliability(pruned, prior)
        else:
            gain = raw_gain(dense, pruned) if method == "raw" else layerwise_gain(dense, pruned)
        if bias_correction:
            shift = dense.mean - gain * pruned.mean
        else:  # W x + b -> gain W x + b
            shift = (1.0 - gain) * read_bias(networks.pruned, plan, point)
        return _into_weights(networks, plan, lane, point, ChannelAffine(gain, shift), measured, shrinkage)

    return Track(_referenced(networks, points), plan, rule)


def batchnorm_track(networks: Networks, plan: EditPlan) -> Track:
    """Re-estimate every BatchNormalization on the whole calibration set, each with all upstream ones re-estimated."""
    index = networks.pruned

    def rule(lane: Lane, point: Point, measured: Measured) -> PointReport:
        assert point.batchnorm is not None
        pruned = measured.pruned
        new = recalibrate(read_batchnorm(index, plan, point.batchnorm), pruned.mean, pruned.var)
        plan_batchnorm(index, plan, point.batchnorm, new)
        return PointReport.of(index, point, "batchnorm", _dead(measured))

    points = [point for point in networks.survey.points if point.batchnorm is not None]
    return Track(points, plan, rule, paired=False)


def walk(networks: Networks, tracks: Sequence[Track], calibration: Calibration, execution: Execution) -> None:
    """Take every track through the pruned network, level by level; plans and reports are filled.

    Moments of the dense network do not depend on the tracks: all are measured in one pass beforehand, unless a rule
    needs correlations, for which the dense network walks along.
    """
    every = sorted({point for track in tracks for point in track.points}, key=lambda point: point.node)
    paired_points = [p for p in every if any(track.paired and p in track.points for track in tracks)]
    twins = {} if networks.dense is None else {point: networks.dense_tensor(point.tensor) for point in paired_points}
    along = bool(twins) and any(track.correlated for track in tracks)
    with Walk(calibration, execution) as steps:
        references: dict[Point, Moments] = {}
        dense_lanes = []
        if twins:
            assert networks.whole is not None
            dense_lanes.append(steps.lane(networks.whole, twins.values()))
        if twins and not along:
            execution.progress("measuring the dense network", 0.0)
            references = _dense_moments(networks, dense_lanes.pop(), twins, steps)
        lanes = [steps.lane(networks.pruned, [point.tensor for point in track.points], track.plan) for track in tracks]
        done = 0
        for group in by_level(every):
            execution.progress("measuring and correcting", done / len(every))
            level = _Level(
                networks, tracks, group, {point: twins[point] for point in group if point in twins} if along else {}
            )
            for chunks in steps.step(dict(zip([*lanes, *dense_lanes], level.targets, strict=True))):
                level.add(chunks)
            for lane, track, moments in zip(lanes, tracks, level.moments, strict=True):
                for point, found in moments.items():
                    measured = _with_reference(networks, track, point, found, references)
                    if not (measured.pruned.is_finite and (measured.dense is None or measured.dense.is_finite)):
                        raise overflow(point)
                    track.reports[point.node] = track.rule(lane, point, measured)
            done += len(group)


class _Level:
    """Moments of one level's points, in every track; pairs where the dense network walks along."""

    def __init__(
        self, networks: Networks, tracks: Sequence[Track], group: Sequence[Point], twins: Mapping[Point, str]
    ) -> None:
        self._networks = networks
        self._points = [[point for point in group if point in track.points] for track in tracks]
        self._tracks = tracks
        self._twins = twins
        self.targets = [[point.tensor for point in points] for points in self._points]
        if twins or any(track.correlated for track in tracks):
            self.targets.append(list(twins.values()))
        self.moments: list[dict[Point, Moments | PairMoments]] = [{} for _ in tracks]

    def add(self, chunks: list[Chunk]) -> None:
        """Take in a chunk."""
        for track, points, chunk, moments in zip(self._tracks, self._points, chunks, self.moments, strict=False):
            for point in points:
                axis = point.channel_axis
                found: Moments | PairMoments
                if track.paired and point in self._twins:
                    dense = self._networks.dense_value(chunks[-1], self._twins[point])
                    pruned = chunk[point.tensor]
                    if dense.shape != pruned.shape:
                        raise unequal(point)
                    found = PairMoments.of(dense, pruned, axis)
                else:
                    found = Moments.of(chunk[point.tensor], axis)
                moments[point] = _merged(moments.get(point), found)


def _merged(before: Moments | PairMoments | None, found: Moments | PairMoments) -> Moments | PairMoments:
    if isinstance(before, PairMoments) and isinstance(found, PairMoments):
        return before.merge(found)
    if isinstance(before, Moments) and isinstance(found, Moments):
        return before.merge(found)
    return found


def _dense_moments(networks: Networks, lane: Lane, twins: Mapping[Point, str], walk: Walk) -> dict[Point, Moments]:
    """Moments of the dense network: a few levels at once, as what one session gives out takes memory all at once."""
    result: Accumulator[Point, Moments] = Accumulator()
    levels = by_level(list(twins))
    for start in range(0, len(levels), _LEVELS_AT_ONCE):
        points = [point for group in levels[start : start + _LEVELS_AT_ONCE] for point in group]
        for (chunk,) in walk.step({lane: [twins[point] for point in points]}):
            for point in points:
                result.add(point, Moments.of(networks.dense_value(chunk, twins[point]), point.channel_axis))
    return result


def _with_reference(
    networks: Networks,
    track: Track,
    point: Point,
    found: Moments | PairMoments,
    references: Mapping[Point, Moments],
) -> Measured:
    if isinstance(found, PairMoments):
        return Measured(found.pruned, found.dense, found.correlation)
    if not track.paired:
        return Measured(found)
    if point in references:
        return Measured(found, references[point])
    assert point.batchnorm is not None  # without a dense network, only such points are walked
    return Measured(found, read_batchnorm(networks.pruned, track.plan, point.batchnorm).moments)


def _referenced(networks: Networks, points: Sequence[Point]) -> list[Point]:
    """The points that have something to be compared with."""
    return [point for point in points if networks.dense is not None or point.batchnorm is not None]


def _into_batchnorm(
    networks: Networks,
    plan: EditPlan,
    point: Point,
    affine: ChannelAffine,
    measured: Measured,
    shrinkage: Floats | None,
) -> PointReport:
    assert point.batchnorm is not None
    target = _target_batchnorm(networks, plan, point.batchnorm)
    plan_batchnorm(networks.pruned, plan, point.batchnorm, absorb(target, affine))
    return PointReport.of(networks.pruned, point, "batchnorm", _dead(measured), affine.gain, shrinkage=shrinkage)


def _target_batchnorm(networks: Networks, plan: EditPlan, position: int) -> BatchNormParameters:
    """What is to follow a matched tensor: the dense network's BatchNormalization, with the pruned node's epsilon.

    The pruned file's own may already have been adapted to the pruned tensor, by a repair or by fine-tuning.
    """
    own = read_batchnorm(networks.pruned, plan, position)
    if networks.dense is None or networks.pairing is None:
        return own
    dense = read_batchnorm(networks.dense, EditPlan(), networks.pairing.nodes[position])
    return replace(dense, var=dense.var + dense.epsilon - own.epsilon, epsilon=own.epsilon)


def _into_weights(
    networks: Networks,
    plan: EditPlan,
    lane: Lane,
    point: LayerPoint,
    affine: ChannelAffine,
    measured: Measured,
    shrinkage: Floats | None,
) -> PointReport:
    plan_affine(networks.pruned, plan, point, affine)
    # a shift before a BatchNormalization went into its mean, not into the tensor
    shift = affine.shift if point.batchnorm is None else np.zeros_like(affine.gain)
    lane.transform(point.tensor, affine.gain, shift, point.channel_axis)
    return PointReport.of(networks.pruned, point, "weights", _dead(measured), affine.gain, shrinkage=shrinkage)


def _dead(measured: Measured) -> int:
    return int((~is_live(measured.dense, measured.pruned)).sum())
