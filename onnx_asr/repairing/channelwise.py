"""Channel-wise repair: walk, measure each point with everything upstream repaired, correct its channels by a rule.

Methods: ``paired`` (one walk); ``asr``, ``raw``, ``layerwise`` (gains in one walk, then BatchNormalization re-estimated
in a second one, as in the ASR paper's Algorithm 1); ``bn`` (the second walk alone). Several methods can share a walk:
each is a track with a draft and a lane of its own, and the dense network runs once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_asr.arrays import Floats
from onnx_asr.engine.lane import Lane
from onnx_asr.graph.points import LayerPoint, Point
from onnx_asr.graph.skips import Reason, Skip
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import Network, Pair, by_level, overflow, unequal
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.walk import Walk
from onnx_asr.numerics import gains
from onnx_asr.numerics.moments import Accumulator, Moments, PairMoments
from onnx_asr.repairing.options import RepairOptions
from onnx_asr.repairing.result import PointReport, Reports

_LEVELS_AT_ONCE = 4

ONLY_BATCHNORM = Reason("no-batchnorm", "it has no BatchNormalization; method 'bn' changes only BatchNormalizations")
NO_DENSE = Reason("no-batchnorm-no-dense", "it has no BatchNormalization, and there is no dense model to compare with")
FIRST_LAYER = Reason("first-layer", "first layer: method '{method}' does not change it")
CONVOLUTIONS_ONLY = Reason("convolutions-only", "method '{method}' scales only convolutions")


@dataclass(frozen=True)
class Correction:
    """The correction of a point's channels.

    Attributes:
        new: A map for the point's weights and bias, or new parameters for its BatchNormalization.
        gain: Gains [C] to report; None where statistics are replaced instead.
        shrinkage: Factors [C] on the raw gains to report; None where they are trusted fully.
    """

    new: gains.ChannelAffine | gains.BatchNormParameters
    gain: Floats | None = None
    shrinkage: Floats | None = None


Measured = tuple[Moments, Moments, Floats | None]
"""Moments of a point's channels in the pruned network, with everything upstream repaired, and in the dense one (or the
stored running statistics in its place; the first again where the rule needs none); the correlation [C] of the two."""

Rule = Callable[[Point, Moments, Moments, Floats | None], Correction]


@dataclass(frozen=True)
class Track:
    """One method on its walk through the pruned network.

    Attributes:
        points: The points that it corrects.
        skips: The points that it does not, and why.
        draft: Where its corrections go.
        rule: Its correction at a point, from what is :data:`Measured` there.
        paired: Whether the rule needs the dense network's moments.
        correlated: Whether it needs the correlation with the dense network.
    """

    points: Sequence[Point]
    skips: Sequence[Skip]
    draft: Draft
    rule: Rule
    paired: bool = True
    correlated: bool = False

    def correct(self, lane: Lane, point: Point, measured: Measured) -> PointReport:
        """Apply the rule at a point: to the draft, and to what the lane holds of the point's tensor.

        Raises:
            ModelError: When the point's activations are not finite.
        """
        pruned, dense, _ = measured
        if not (pruned.is_finite and dense.is_finite):
            raise overflow(point)
        correction = self.rule(point, *measured)
        if isinstance(correction.new, gains.ChannelAffine):
            assert isinstance(point, LayerPoint)
            self.draft.apply_affine(point, correction.new)
            gain, shift = correction.new.gain, correction.new.shift
            if point.batchnorm is not None:  # the shift went into its mean, not into the tensor
                shift = np.zeros_like(shift)
            lane.transform(point.tensor, gain, shift, point.channel_axis)
            written = "weights"
        else:
            assert point.batchnorm is not None
            self.draft.set_batchnorm(point.batchnorm, correction.new)
            written = "batchnorm"
        dead = int((~gains.is_live(dense, pruned)).sum())
        return PointReport.of(point, written, dead, correction.gain, correction.shrinkage)


def paired_track(pruned: Network, pair: Pair | None, draft: Draft, power: float) -> Track:
    """Match every channel's mean and standard deviation to the dense network's on the same samples.

    At a BatchNormalization the map goes into its parameters, elsewhere into weights and bias. Without a dense network
    the stored running statistics take its place, at the points that have them.
    """

    def rule(point: Point, own: Moments, dense: Moments, correlation: Floats | None) -> Correction:
        affine = gains.paired(dense, own, correlation, power)
        shrinkage = None if correlation is None else gains.paired_shrinkage(correlation, power)
        if point.batchnorm is None:
            return Correction(affine, affine.gain, shrinkage)
        target = draft.batchnorm(point.batchnorm)
        if pair is not None:  # the pruned file's own may be adapted to the pruned tensor, by a repair or fine-tuning
            given = pair.dense_batchnorm(point.batchnorm)
            target = replace(given, var=given.var + given.epsilon - target.epsilon, epsilon=target.epsilon)
        return Correction(gains.absorb(target, affine), affine.gain, shrinkage)

    split = pruned.split(lambda point: NO_DENSE if pair is None and point.batchnorm is None else None)
    return Track(*split, draft, rule, correlated=power > 0 and pair is not None)


def gain_track(pruned: Network, pair: Pair | None, draft: Draft, options: RepairOptions) -> Track:
    """Scale the filters of every convolution but the first (ASR paper, Algorithm 1, before its last step)."""
    method = options.method

    def rule(point: Point, own: Moments, dense: Moments, _: Floats | None) -> Correction:
        assert isinstance(point, LayerPoint)
        shrinkage = None
        if method == "asr":
            gain = gains.asr_gain(dense, own, options.prior)
            shrinkage = gains.asr_reliability(own, options.prior)
        else:
            gain = gains.raw_gain(dense, own) if method == "raw" else gains.layerwise_gain(dense, own)
        # without bias correction W x + b -> gain W x + b
        shift = dense.mean - gain * own.mean if options.bias_correction else (1.0 - gain) * draft.bias(point)
        return Correction(gains.ChannelAffine(gain, shift), gain, shrinkage)

    def obstacle(point: Point) -> Reason | None:
        if pair is None and point.batchnorm is None:
            return NO_DENSE
        if point.node in pruned.first_layers:
            return FIRST_LAYER.format(method=method)
        if not (isinstance(point, LayerPoint) and point.layer.is_convolution):
            return CONVOLUTIONS_ONLY.format(method=method)
        return None

    return Track(*pruned.split(obstacle), draft, rule)


def batchnorm_track(pruned: Network, draft: Draft) -> Track:
    """Re-estimate every BatchNormalization on the whole calibration set, each with all upstream ones re-estimated."""

    def rule(point: Point, own: Moments, *_: Moments | Floats | None) -> Correction:
        assert point.batchnorm is not None
        return Correction(gains.recalibrate(draft.batchnorm(point.batchnorm), own.mean, own.var))

    split = pruned.split(lambda point: ONLY_BATCHNORM if point.batchnorm is None else None)
    return Track(*split, draft, rule, paired=False)


def run_tracks(
    pruned: Network, pair: Pair | None, tracks: Sequence[Track], calibration: Calibration, execution: Execution
) -> list[Reports]:
    """Take every track through the pruned network, level by level, and fill its draft: reports of each track.

    Without a pair, stored running statistics take the dense network's place.

    Raises:
        ModelError: When activations are not finite, or the two networks cannot be compared place by place.
    """
    every = sorted({point for track in tracks for point in track.points}, key=lambda point: point.node)
    compared = [p for p in every if any(track.paired and p in track.points for track in tracks)]
    reports: list[Reports] = [{} for _ in tracks]
    done = 0
    with Walk(calibration, execution) as walk:
        known: Mapping[Point, Moments] = {}
        beside = None
        if pair is None:
            stored = Draft(pruned.index)
            known = {p: stored.batchnorm(p.batchnorm).moments for p in compared if p.batchnorm is not None}
        elif any(track.correlated for track in tracks):
            beside = pair, walk.lane(Draft(pair.dense), pair.dense_tensors(compared))
        elif compared:
            execution.progress("measuring the dense network", 0.0)
            known = _dense_moments(pair, compared, walk)
        lanes = {walk.lane(track.draft, [point.tensor for point in track.points]): track for track in tracks}
        for group in by_level(every):
            execution.progress("measuring and correcting", done / len(every))
            found = _measure(walk, lanes, group, known, beside)
            for (lane, track), corrected in zip(lanes.items(), reports, strict=True):
                for point in group:
                    if point in track.points:
                        corrected[point.node] = track.correct(lane, point, found[lane, point])
            done += len(group)
    return reports


def _measure(
    walk: Walk,
    tracks: Mapping[Lane, Track],
    group: Sequence[Point],
    known: Mapping[Point, Moments],
    beside: tuple[Pair, Lane] | None,
) -> dict[tuple[Lane, Point], Measured]:
    """Run every lane through one level, and measure the points that its track corrects.

    The dense network's moments are known beforehand, or its lane walks beside, because a track needs correlations.
    """
    own = {lane: [point for point in group if point in track.points] for lane, track in tracks.items()}
    targets = {lane: [point.tensor for point in points] for lane, points in own.items()}
    if beside is not None:
        compared = [p for p in group if any(tracks[lane].paired and p in points for lane, points in own.items())]
        targets[beside[1]] = beside[0].dense_tensors(compared)
    alone: Accumulator[tuple[Lane, Point], Moments] = Accumulator()
    pairs: Accumulator[tuple[Lane, Point], PairMoments] = Accumulator()
    for chunks in walk.step(targets):
        for (lane, points), chunk in zip(own.items(), chunks, strict=False):  # the dense network's chunk is the last
            for point in points:
                value = chunk[point.tensor]
                if beside is None or not tracks[lane].paired:
                    alone.add((lane, point), Moments.of(value, point.channel_axis))
                    continue
                reference = beside[0].dense_value(chunks[-1], point.tensor)
                if reference.shape != value.shape:
                    raise unequal(point)
                pairs.add((lane, point), PairMoments.of(reference, value, point.channel_axis))
    measured: dict[tuple[Lane, Point], Measured] = {
        (lane, point): (found, known[point] if tracks[lane].paired else found, None)
        for (lane, point), found in alone.items()
    }
    for (lane, point), both in pairs.items():
        correlation = both.correlation if tracks[lane].correlated else None
        measured[lane, point] = both.pruned, both.dense, correlation
    return measured


def _dense_moments(pair: Pair, points: Sequence[Point], walk: Walk) -> dict[Point, Moments]:
    """Moments of the dense network: a few levels at a time, as all outputs of a session are in memory together."""
    result: Accumulator[Point, Moments] = Accumulator()
    lane = walk.lane(Draft(pair.dense), pair.dense_tensors(points))
    levels = by_level(points)
    for start in range(0, len(levels), _LEVELS_AT_ONCE):
        group = [point for level in levels[start : start + _LEVELS_AT_ONCE] for point in level]
        for (chunk,) in walk.step({lane: pair.dense_tensors(group)}):
            for point in group:
                result.add(point, Moments.of(pair.dense_value(chunk, point.tensor), point.channel_axis))
    return result
