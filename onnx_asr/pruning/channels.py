"""Pruning of whole channels: the model gets smaller and faster, in any runtime.

Channels that can only go together (see ``channels.units``) are one unit, and units that occur in the same tensors are
a group. A unit's score is the norm of all weights that make it, times the norm of all weights that read it, with the
scale ``a = gamma / sqrt(var + eps)`` of a BatchNormalization behind the reader,

    score = |W_rows| |a W'_columns|.

It does not change when a channel is scaled and its readers are scaled back. Scores that look at how much of the signal
a channel carries (gamma, or the standard deviation behind the ReLU that gamma and beta imply, in place of the rows)
leave a better net before a repair and a worse one after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx

from onnx_asr.arrays import Floats, Mask
from onnx_asr.channels.rules import trace
from onnx_asr.channels.units import Channels, Ids, record_shapes, remove, unread
from onnx_asr.engine.loading import load
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import ModelError
from onnx_asr.graph.edit import set_metadata
from onnx_asr.graph.fixed import FIXED
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource, check_finite
from onnx_asr.graph.points import LayerPoint, skip, survey
from onnx_asr.graph.shapes import InputShapes
from onnx_asr.graph.skips import Reason, Skip
from onnx_asr.json_values import key
from onnx_asr.networks.cost import Cost, byte_size, cost
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution, Progress
from onnx_asr.networks.latency import Latency, Stopwatch
from onnx_asr.networks.operations import Operations, Probe
from onnx_asr.numerics.masks import keep_count, keep_largest
from onnx_asr.pruning.budget import smallest_share, unreachable
from onnx_asr.pruning.comparison import Reference
from onnx_asr.pruning.masks import prunable_weights
from onnx_asr.pruning.options import Budget, ChannelPruneOptions
from onnx_asr.repairing.options import chosen
from onnx_asr.version import __version__

_TRIAL_SECONDS = 0.7  # that a model is timed during the search
_STEP = 0.01  # of the sparsity

CHANNELS_TIED = Reason(
    "channels-tied-to-skipped-layer", "its channels can only be removed together with those of a layer that is skipped"
)
CHANNELS_UNKNOWN = Reason("channels-unknown", "its output channels cannot be traced")
CHANNELS_FROZEN = Reason("channels-cannot-be-removed", "its channels cannot be removed: {why}")


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that were ranked against each other, and how many of them were kept.

    Attributes:
        layers: Nodes that make them; more than one where they are coupled.
    """

    layers: tuple[str, ...]
    channels: int
    kept: int


@dataclass(frozen=True)
class ChannelPruneResult:
    """A smaller copy of a model, its cost before and after, and what was removed.

    Attributes:
        sparsity: Share of channels removed; with a target, what the search found.
        latency: Of the smaller model against the given one; None without ``target_latency``.
        groups: Groups of channels that took part.
        skips: Nodes whose output channels took no part, and why.
        error: Largest relative difference of an output, on random input, from the given model with zeros in all weights
            that read a removed channel (see :mod:`onnx_asr.pruning.comparison`); None where that could not be run.
        notes: What should be known about the comparison.
    """

    helps: ClassVar = "fewer channels take less time and memory in every runtime, on any hardware"
    derived: ClassVar = ("helps", "modified")

    model: onnx.ModelProto = field(repr=False)
    options: ChannelPruneOptions
    sparsity: float = field(metadata=key("options.sparsity"))
    before: Cost
    after: Cost
    latency: Latency | None
    groups: tuple[ChannelGroup, ...]
    skips: tuple[Skip, ...] = field(metadata=key("skipped"))
    error: float | None
    notes: tuple[str, ...]

    @property
    def modified(self) -> bool:
        """Whether any channel was removed."""
        return any(group.kept < group.channels for group in self.groups)


def prune_channels(
    model: ModelSource,
    options: ChannelPruneOptions | None = None,
    *,
    input_shapes: InputShapes | None = None,
    execution: Execution | None = None,
) -> ChannelPruneResult:
    """Remove the channels of smallest score.

    ``round(sparsity n)`` of the ``n`` channels of every group go (scope "layer"), or of all groups together, scores
    divided by their group's mean ("global"). What is left of a group is rounded to a multiple, at least one multiple
    and at most all; one channel of every group always stays. With a target, it is the smallest sparsity that keeps
    within it; latency is measured (see :func:`onnx_asr.measure_latency`), so that the sparsity found may differ a
    little from run to run.

    Args:
        model: The dense model: a path, or an object of onnx, onnx-graphsurgeon or onnx-ir, which is not changed.
        options: Channels to remove, and how many; at least a sparsity or a target. A group takes part when all layers
            that make it do.
        input_shapes: Shapes of inputs with open sizes, for FLOPs and latency; by default their batch is 1 and their
            other open sizes are 224.
        execution: How latency is measured; progress.

    Raises:
        OptionError: Neither sparsity nor target, a target that cannot be reached, or no layer chosen.
        ModelError: Not an ONNX model, quantized, weights not finite, or no channel that can be removed; or the smaller
            model computes something else than the given one without these channels.
    """
    options, execution = chosen(options, ChannelPruneOptions), execution or Execution()
    index = GraphIndex.of(load(model))
    check_finite(index, "dense")
    probe = Probe(input_shapes or {}, execution.runtime)
    before = cost(index, probe)
    cutter = _Cutter(index, options, input_shapes)
    budget, share, latency = options.budget, options.sparsity, None
    if budget is not None and budget.measure == "latency":
        stopwatch = Stopwatch(index, execution.runtime, input_shapes)
        share, latency = _within_latency(budget, cutter, stopwatch, execution.progress)
    elif budget is not None and budget.measure == "size":
        share = smallest_share(budget, before.size, lambda tried: byte_size(cutter.cut(tried)), execution.progress)
    elif budget is not None:
        share = smallest_share(
            budget,
            Operations.of(index, probe).total,
            lambda tried: Operations.of(GraphIndex.of(cutter.cut(tried)), probe).total,
            execution.progress,
        )
    assert share is not None
    pruned = cutter.cut(share)
    execution.progress("comparing", 0.9)
    error, notes = _checked(cutter.unread(share), pruned, input_shapes, execution.runtime)
    execution.progress("done", 1.0)
    after = cost(GraphIndex.of(pruned), probe)
    groups, skips = cutter.report(share), tuple(cutter.skips)
    return ChannelPruneResult(pruned, options, share, before, after, latency, groups, skips, error, notes)


def _checked(
    zeroed: onnx.ModelProto, pruned: onnx.ModelProto, input_shapes: InputShapes | None, runtime: Runtime
) -> tuple[float | None, tuple[str, ...]]:
    """The error of a smaller model against one with zeros in place of what it lost, and notes on the comparison."""
    try:
        reference = Reference(GraphIndex.of(zeroed), runtime, input_shapes)
    except ModelError as error:
        return None, (f"the smaller model was not checked on random input: {error}",)
    return reference.error(pruned), reference.notes


class _Cutter:
    """Cuts a graph at any sparsity.

    Attributes:
        skips: Layers that it leaves alone.

    Raises:
        OptionError: When no layer is chosen.
        ModelError: When no channel of the chosen layers can be removed.
    """

    def __init__(self, index: GraphIndex, options: ChannelPruneOptions, input_shapes: InputShapes | None) -> None:
        found = survey(index)
        weights, self.skips = prunable_weights(index, found, options.include, options.exclude)
        channels, chosen = (
            trace(index, input_shapes=input_shapes),
            {point.node for weight in weights for point in weight.points},
        )
        self._index, self._options, self._channels, self._shapes = index, options, channels, input_shapes
        firsts = {skip.node for skip in self.skips if skip.code == FIXED.code}
        tensors = {index.nodes[point.node].input[point.weight[1]] for point in found.layers if point.node in firsts}
        fixed = {point.node for point in found.layers if index.nodes[point.node].input[point.weight[1]] in tensors}
        self._groups, self._makers = _prunable_groups(channels, found.layers, chosen, fixed)
        self.skips += _uncut(channels, [point for point in found.layers if point.node in chosen], self._groups)
        if not self._groups:
            reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in self.skips[:3])
            raise ModelError(
                f"no channel of the model can be removed ({reasons}): choose other layers (--include, --exclude), or "
                "prune single weights (--pattern unstructured)"
            )
        units = channel_scores(index, channels, found.layers)
        self._scores = [units[group] / (units[group].mean() or 1.0) for group in self._groups]
        for score in self._scores:
            score[score.argmax()] = np.inf

    def drop(self, sparsity: float) -> Mask:
        """[units] True where a unit goes; the best of every group stays."""
        if self._options.scope == "layer":
            counts = [keep_count(score.size, sparsity) for score in self._scores]
        else:
            total = keep_count(sum(score.size for score in self._scores), sparsity)
            counts = [int(mask.sum()) for mask in keep_largest(self._scores, max(len(self._scores), total), seed=0)]
        drop, multiple = np.zeros(self._channels.units, bool), self._options.multiple
        for group, score, count in zip(self._groups, self._scores, counts, strict=True):
            (keep,) = keep_largest([score], min(score.size, max(1, round(count / multiple)) * multiple))
            drop[group[~keep]] = True
        return drop

    def cut(self, sparsity: float) -> onnx.ModelProto:
        """The smaller model."""
        model = remove(self._index, self._channels, self.drop(sparsity))
        set_metadata(model, "onnx_asr.version", __version__)
        record_shapes(model, self._shapes)
        return model

    def unread(self, sparsity: float) -> onnx.ModelProto:
        """The model with zeros in all weights that read what :meth:`cut` removes."""
        return unread(self._index, self._channels, self.drop(sparsity))

    def report(self, sparsity: float) -> tuple[ChannelGroup, ...]:
        """How many channels each group keeps."""
        drop = self.drop(sparsity)
        return tuple(
            ChannelGroup(tuple(point.name for point in made), len(group), int((~drop[group]).sum()))
            for group, made in zip(self._groups, self._makers, strict=True)
        )


def _within_latency(budget: Budget, cutter: _Cutter, stopwatch: Stopwatch, progress: Progress) -> tuple[float, Latency]:
    """About the smallest sparsity that keeps within a budget of latency, and the latency measured at it.

    Each step of the search measures briefly. Its result is measured again for longer, and a little more is removed as
    long as that measurement exceeds the budget.
    """
    share = smallest_share(budget, 1.0, lambda share: stopwatch.time(cutter.cut(share), _TRIAL_SECONDS).ratio, progress)
    while True:
        progress("measuring again", 0.9)
        latency = stopwatch.time(cutter.cut(share))
        if latency.ratio <= budget.limit:
            return share, latency
        here = cutter.drop(share)
        further = np.arange(share + _STEP, 1, _STEP).tolist()
        share = next((higher for higher in further if not np.array_equal(cutter.drop(higher), here)), 1.0)
        if share >= 1:
            raise unreachable(budget, latency.ratio)


def channel_scores(index: GraphIndex, channels: Channels, points: Sequence[LayerPoint]) -> Floats:
    """[units] the norm of all rows that make a unit times the norm of all columns that read it."""
    draft = Draft(index)
    rows, columns = np.zeros(channels.units), np.zeros(channels.units)
    by_node = {point.node: point for point in points}
    for point in points:
        if point.tensor in channels.tensors:
            squares = np.square(draft.blocks(point)).sum(axis=(2, 3))  # [G, O]
            np.add.at(rows, channels.tensors[point.tensor].ids, squares.reshape(-1))
    for read in channels.reads:
        if read.node in by_node:
            reader = by_node[read.node]
            blocks = draft.blocks(reader)
            if reader.batchnorm is not None:
                slope = draft.batchnorm(reader.batchnorm).slope
                blocks = blocks * slope.reshape(*blocks.shape[:2], 1, 1)
            squares = np.square(blocks).sum(axis=(1, 3))  # [G, I]
            np.add.at(columns, read.labels.ids, squares.reshape(-1))
    return np.sqrt(rows * columns)


def _prunable_groups(
    channels: Channels, points: Sequence[LayerPoint], chosen: set[int], fixed: set[int]
) -> tuple[list[Ids], list[list[LayerPoint]]]:
    """Groups whose channels can be removed and whose layers were all chosen; and those layers, by group.

    A fixed operator that treats channels one by one is no layer in this sense; one that combines them needs them all.
    """
    removable = channels.removable
    combining = {point.node for point in points if point.node in fixed and point.layer.layout.inputs > 1}
    for read in channels.reads:
        if read.node in combining:
            removable[read.labels.ids] = False
    points = [point for point in points if point.node not in fixed - combining]
    made = [(point, channels.tensors[point.tensor].ids) for point in points if point.tensor in channels.tensors]
    groups, makers = [], []
    for group in channels.groups():
        if removable[group].all():
            layers = [point for point, units in made if group[0] in units]
            if layers and chosen.issuperset(point.node for point in layers):
                groups.append(group)
                makers.append(layers)
    return groups, makers


def _uncut(channels: Channels, points: Sequence[LayerPoint], groups: Sequence[Ids]) -> list[Skip]:
    """Chosen layers of which no channel takes part."""
    part = np.zeros(channels.units, bool)
    for group in groups:
        part[group] = True
    skips = []
    for point in points:
        labels = channels.tensors.get(point.tensor)
        if labels is None:
            skips.append(skip(point, CHANNELS_UNKNOWN))
        elif not part[labels.ids].any():
            frozen = next((channels.frozen[unit] for unit in labels.ids.tolist() if unit in channels.frozen), None)
            skips.append(skip(point, CHANNELS_TIED if frozen is None else CHANNELS_FROZEN.format(why=frozen)))
    return skips
