"""Damage by pruning: every channel's variance against the dense network's on the same samples, point by point.

A point is measured behind the BatchNormalization that belongs to it, where a correction shows wherever a repair wrote
it. In a network that was pruned and not repaired, the ratio is the same before that BatchNormalization.

The effect of a correction is estimated on samples that it was not fitted on. With ``l = log10(v / v_dense)`` of a
channel in one half of the samples (1) and the other (2), the root mean square over the live channels is that of

    ``l_2`` without correction, ``l_2 - mean(l_1)`` with one gain per layer, ``l_2 - l_1`` with one per channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import ClassVar

import numpy as np

from onnx_asr.arrays import Floats, Integers, Mask
from onnx_asr.data import Dataset, InputSpec
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.points import Point
from onnx_asr.json_values import key
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import Pair
from onnx_asr.networks.samples import (
    Calibration,
    batch_size_for,
    fixed_batch,
    load_calibration,
    whole_batches,
)
from onnx_asr.networks.walk import Walk
from onnx_asr.numerics.gains import is_live
from onnx_asr.numerics.moments import Accumulator, PairMoments

COLLAPSED_RATIO = 0.01
"""Variance ratio below which a channel counts as collapsed: its standard deviation is under a tenth of the dense."""

DAMAGE_SAMPLES = 128
"""Number of samples to measure it on by default."""


@dataclass(frozen=True)
class LogErrors:
    """Root mean square of a layer's log10 variance ratios: without correction, with one gain, with one per channel.

    Gains are fitted on one half of the samples, and errors measured on the other.
    """

    none: float
    layer: float
    channel: float


@dataclass(frozen=True)
class PointDamage:
    """The channels of one point in the dense network and in another version of it, on the same samples.

    Attributes:
        dense_std: Standard deviations in the dense network, [C].
        std: In the other, [C].
        shift: Difference of the means in dense standard deviations, [C]; NaN where the dense channel is constant.
        ratios: Variance over the dense variance, [C]; 0 for a dead channel, NaN where the dense channel is constant.
        correlations: Of the two, [C].
        errors: Errors that corrections would leave; None with a single chunk of samples, or without a live channel.
    """

    derived: ClassVar = ("collapsed", "dead", "median_ratio", "spread", "correlation")

    dense_std: Floats = field(repr=False)
    std: Floats = field(repr=False)
    shift: Floats = field(repr=False)
    ratios: Floats
    correlations: Floats = field(repr=False)
    errors: LogErrors | None = field(metadata=key("log_errors"))

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")
    def of(cls, halves: Sequence[PairMoments]) -> PointDamage:
        """From the moments of one or two halves of the samples."""
        both = reduce(PairMoments.merge, halves)
        varies = is_live(None, both.dense)
        nothing = np.full(len(varies), np.nan)
        ratio = np.divide(both.pruned.var, both.dense.var, out=nothing.copy(), where=varies)
        return cls(
            dense_std=both.dense.std,
            std=both.pruned.std,
            shift=np.divide(both.pruned.mean - both.dense.mean, both.dense.std, out=nothing, where=varies),
            ratios=np.where(varies & ~is_live(both.dense, both.pruned), 0.0, ratio),
            correlations=both.correlation,
            errors=_log_errors(*halves) if len(halves) == 2 else None,
        )

    @property
    def is_collapsed(self) -> Mask:
        """Which channels lost nearly all of their variance, dead ones included, [C]."""
        return self.ratios < COLLAPSED_RATIO

    @property
    def collapsed(self) -> int:
        """Number of collapsed channels."""
        return int(self.is_collapsed.sum())

    @property
    def collapsed_share(self) -> float:
        """Share of collapsed channels."""
        return float(self.is_collapsed.mean())

    @property
    def correlation(self) -> float:
        """Mean correlation of the channels."""
        return float(self.correlations.mean())

    @property
    def dead(self) -> int:
        """Channels without variance that have some in the dense network."""
        return int((self.ratios == 0).sum())

    @property
    def median_ratio(self) -> float | None:
        """Median variance ratio; None where no dense channel varies."""
        known = self.ratios[~np.isnan(self.ratios)]
        return float(np.median(known)) if known.size else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of log10 of the live channels' variance ratios: how heterogeneous the damage is."""
        live = self.ratios[self.ratios > 0]
        return float(np.log10(live).std()) if live.size else None


def draw_samples(
    dataset: Dataset, indices: Integers, specs: Sequence[InputSpec], samples: int, seed: int, batch_size: int | None
) -> Calibration:
    """A seeded sample in random order, so that both halves of its chunks stand for the whole, in two chunks at least.

    Raises:
        DataError: When the samples do not fit, or do not fill a batch that the model fixes.
    """
    size = batch_size_for(specs, batch_size)
    fixed = fixed_batch(specs) is not None
    order = np.random.default_rng(seed).permutation(indices)[: max(samples, size) if fixed else samples]
    if not fixed:
        size = min(size, max(1, len(order) // 2))
    return load_calibration(dataset, whole_batches(order, specs), size)


def measure_damage(
    pair: Pair, versions: Sequence[GraphIndex], calibration: Calibration, execution: Execution
) -> list[dict[int, PointDamage]]:
    """The damage in each of several versions of the pruned network: by node position, at every point; in one walk.

    The versions are the pruned network itself, or repaired copies: graphs in which its tensors keep their names.
    """
    points, index = pair.pruned.survey.points, pair.pruned.index
    tensors = [
        point.tensor if point.batchnorm is None else str(index.nodes[point.batchnorm].output[0]) for point in points
    ]
    dense_tensors = [pair.dense_tensor(name) for name in tensors]
    halves = min(2, len(calibration.chunks))
    found: list[Accumulator[tuple[Point, int], PairMoments]] = [Accumulator() for _ in versions]
    with Walk(calibration, execution) as walk:
        lanes = {walk.lane(Draft(pair.dense), dense_tensors): dense_tensors}
        lanes |= {walk.lane(Draft(version), tensors): tensors for version in versions}
        for number, (reference, *others) in enumerate(walk.step(lanes)):
            execution.progress("measuring the damage", number / len(calibration.chunks))
            for chunk, moments in zip(others, found, strict=True):
                for point, name in zip(points, tensors, strict=True):
                    both = PairMoments.of(pair.dense_value(reference, name), chunk[name], point.channel_axis)
                    moments.add((point, number % 2), both)
    return [
        {point.node: PointDamage.of([moments[point, half] for half in range(halves)]) for point in points}
        for moments in found
    ]


def _log_errors(first: PairMoments, second: PairMoments) -> LogErrors | None:
    live = [is_live(None, half.dense) & is_live(half.dense, half.pruned) for half in (first, second)]
    usable = live[0] & live[1]
    if not usable.any():
        return None
    fitted, held_out = (np.log10(half.pruned.var[usable] / half.dense.var[usable]) for half in (first, second))
    left = held_out, held_out - fitted.mean(), held_out - fitted
    return LogErrors(*(float(np.sqrt(np.square(errors).mean())) for errors in left))
