"""Pruning of whole channels: the model gets smaller and faster, in any runtime.

Channels that can only go together (see ``graph.channels``) are one unit, and units that occur in the same tensors are
a group. A unit's score is the norm of all weights that make it, times the norm of all weights that read it, with the
scale ``a = gamma / sqrt(var + eps)`` of a BatchNormalization behind the reader,

    score = |W_rows| |a W'_columns|.

It does not change when a channel is scaled and its readers are scaled back. Scores that look at how much of the signal
a channel carries (gamma, or the standard deviation behind the ReLU that gamma and beta imply, in place of the rows)
leave a better net before a repair and a worse one after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.arrays import Floats, Mask
from onnx_asr.channels.rules import trace
from onnx_asr.channels.units import Channels, Ids, remove
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import ModelError
from onnx_asr.graph.edit import EditPlan, set_metadata
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource, check_finite, load
from onnx_asr.graph.points import LayerPoint, skip, survey
from onnx_asr.graph.shapes import InputShapes
from onnx_asr.graph.skips import Reason, Skip
from onnx_asr.networks.cost import Cost, cost, flops
from onnx_asr.networks.execution import Progress, silent
from onnx_asr.networks.latency import Latency, Stopwatch
from onnx_asr.networks.parameters import read_batchnorm, read_blocks
from onnx_asr.numerics.masks import keep_count, keep_largest
from onnx_asr.numerics.patterns import check_share
from onnx_asr.pruning.budget import Budget, smallest_share, unreachable
from onnx_asr.pruning.masks import prunable_weights
from onnx_asr.repairing.options import check_at_least, check_choice
from onnx_asr.version import __version__

Scope = Literal["layer", "global"]

_GLANCE = 0.7  # seconds a model is timed in a search
_STEP = 0.01  # of the sparsity

CHANNELS_TIED = Reason(
    "channels-tied-to-skipped-layer", "its channels can only be removed together with those of a layer that is skipped"
)
CHANNELS_UNKNOWN = Reason("channels-unknown", "its output channels cannot be told apart")
CHANNELS_FROZEN = Reason("channels-cannot-be-removed", "its channels cannot be removed: {why}")

CHANNELS_HELP = "fewer channels take less time and memory in every runtime, on any hardware"
"""What the removal of channels is good for."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that were ranked against each other.

    Attributes:
        layers: Nodes that make them; more than one where they are coupled.
        channels: Number of channels before.
        kept: Number of channels after.
    """

    layers: tuple[str, ...]
    channels: int
    kept: int


@dataclass(frozen=True)
class ChannelPruneResult:
    """A smaller model and what was removed from it.

    Attributes:
        model: The smaller copy.
        groups: Groups of channels that took part.
        skips: Nodes whose output channels took no part, and why.
        before: Size of the model that was given.
        after: Size of the smaller one.
        latency: Of the smaller one against the given one, where a budget of latency made it be measured.
        options: What was asked for; where it was a budget, with the sparsity found.
    """

    model: onnx.ModelProto
    groups: tuple[ChannelGroup, ...]
    skips: tuple[Skip, ...]
    before: Cost
    after: Cost
    latency: Latency | None
    options: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "options": self.options,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "latency": None if self.latency is None else asdict(self.latency),
            "helps": CHANNELS_HELP,
            "groups": [asdict(group) for group in self.groups],
            "skipped": [asdict(skip) for skip in self.skips],
        }


def prune_channels(
    model: ModelSource,
    sparsity: float | None = None,
    *,
    budget: Budget | None = None,
    scope: Scope = "layer",
    multiple: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    input_shapes: InputShapes | None = None,
    runtime: Runtime | None = None,
    progress: Progress = silent,
) -> ChannelPruneResult:
    """Remove the channels of smallest score.

    ``round(sparsity n)`` of the ``n`` channels of every group go (scope "layer"), or of all groups together, scores
    divided by their group's mean ("global"); what is left of a group is rounded to a multiple; one channel of every
    group stays in any case. With a budget, it is the smallest sparsity that keeps within it.

    Args:
        model: Path or ModelProto of the dense model; it is not changed.
        sparsity: Share of channels to remove, in [0, 1); not given where a budget is.
        budget: What the smaller model may cost. Latency is measured (see :func:`onnx_asr.measure_latency`), so that
            the sparsity found may differ a little from run to run.
        scope: Compare scores within each group or over the whole network.
        multiple: What the number of channels left in a group is rounded to, at least one multiple and at most all.
            Vectorised kernels work on blocks of 8 or 16 channels and are much slower on what does not fill them.
        include: Regular expressions on node or weight names; a group takes part when all layers that make it do.
            Empty for all.
        exclude: Regular expressions that take layers out again.
        input_shapes: Shapes of inputs that leave sizes open, for FLOPs and latency; else their batch is 1 and their
            other open sizes are 224.
        runtime: What latency is measured with.
        progress: Told what is being done.

    Raises:
        OptionError: Sparsity or multiple out of range, both sparsity and budget, a budget that cannot be reached, or no
            layer chosen.
        ModelError: Not an ONNX model, quantized, weights not finite, or no channel that can be removed.
    """
    if budget is None:
        check_share(sparsity, "channels to remove")
    else:
        budget.check_alone(sparsity)
    check_choice("scope", scope, get_args(Scope))
    check_at_least("multiple", multiple, 1)
    index = GraphIndex.of(load(model))
    check_finite(index, "dense")
    before = cost(index, input_shapes)
    weights, skips = prunable_weights(index, include, exclude)
    channels = trace(index)
    points = survey(index).layers
    chosen = {point.node for weight in weights for point in weight.points}
    groups, makers = _prunable_groups(channels, points, chosen)
    skipped = [*skips, *_uncut(channels, [point for point in points if point.node in chosen], groups)]
    if not groups:
        reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in skipped[:3])
        raise ModelError(f"no channel of the model can be removed ({reasons})")
    scores = channel_scores(index, channels, points)
    cutter = _Cutter(index, channels, groups, [scores[group] for group in groups], scope, multiple)
    latency = None
    if budget is not None and budget.measure == "latency":
        sparsity, latency = _within_latency(budget, cutter, Stopwatch(index, runtime, input_shapes), progress)
    elif budget is not None:
        sparsity = _within_cost(budget, cutter, before, input_shapes, progress)
    assert sparsity is not None
    drop, pruned = cutter.drop(sparsity), cutter.cut(sparsity)
    progress("done", 1.0)
    options = {
        "sparsity": sparsity,
        "budget": None if budget is None else asdict(budget),
        "pattern": "channel",
        "scope": scope,
        "multiple": multiple,
        "include": list(include),
        "exclude": list(exclude),
    }
    report = tuple(
        ChannelGroup(tuple(point.name for point in made), len(group), int((~drop[group]).sum()))
        for group, made in zip(groups, makers, strict=True)
    )
    after = cost(GraphIndex.of(pruned), input_shapes)
    return ChannelPruneResult(pruned, report, tuple(skipped), before, after, latency, options)


@dataclass(frozen=True)
class _Cutter:
    """Cuts a graph at any sparsity.

    Attributes:
        index: The graph.
        channels: Its channels.
        groups: Units that take part, by group.
        scores: Their scores.
        scope: Where scores are compared.
        multiple: What the number of units left in a group is rounded to.
    """

    index: GraphIndex
    channels: Channels
    groups: Sequence[Ids]
    scores: Sequence[Floats]
    scope: Scope
    multiple: int

    def drop(self, sparsity: float) -> Mask:
        """[units] True where a unit goes."""
        drop = np.zeros(self.channels.units, bool)
        for group, keep in zip(self.groups, _keep(self.scores, sparsity, self.scope, self.multiple), strict=True):
            drop[group[~keep]] = True
        return drop

    def cut(self, sparsity: float) -> onnx.ModelProto:
        """The smaller model."""
        model = remove(self.index, self.channels, self.drop(sparsity))
        set_metadata(model, "onnx_asr.version", __version__)
        return model


def _within_cost(
    budget: Budget, cutter: _Cutter, dense: Cost, input_shapes: InputShapes | None, progress: Progress
) -> float:
    """The smallest sparsity that keeps within a budget of bytes or of operations."""
    if budget.measure == "size":
        return smallest_share(budget, dense.size, lambda share: cutter.cut(share).ByteSize(), progress)

    def flops_at(share: float) -> int:
        return flops(GraphIndex.of(cutter.cut(share)), input_shapes)[0]

    return smallest_share(budget, dense.flops, flops_at, progress)


def _within_latency(budget: Budget, cutter: _Cutter, stopwatch: Stopwatch, progress: Progress) -> tuple[float, Latency]:
    """About the smallest sparsity that keeps within a budget of latency, and the latency measured at it.

    The search measures for a short time each; what it finds is measured again for longer, and a little more removed
    for as long as that says that the budget is exceeded.
    """
    share = smallest_share(budget, 1.0, lambda share: stopwatch.time(cutter.cut(share), _GLANCE).ratio, progress)
    while True:
        progress("measuring again", 0.9)
        latency = stopwatch.time(cutter.cut(share))
        if latency.ratio <= budget.limit:
            return share, latency
        share = _more(cutter, share)
        if share >= 1:
            raise unreachable(budget, latency.ratio)


def _more(cutter: _Cutter, share: float) -> float:
    """A sparsity a hundredth higher, or what it takes until something more goes; 1 where nothing more does."""
    here = cutter.drop(share)
    further = np.arange(share + _STEP, 1, _STEP).tolist()
    return next((higher for higher in further if not np.array_equal(cutter.drop(higher), here)), 1.0)


def channel_scores(index: GraphIndex, channels: Channels, points: Sequence[LayerPoint]) -> Floats:
    """[units] the norm of all rows that make a unit times the norm of all columns that read it."""
    nothing = EditPlan()
    rows, columns = np.zeros(channels.units), np.zeros(channels.units)
    by_node = {point.node: point for point in points}
    for point in points:
        if point.tensor in channels.tensors:
            squares = np.square(read_blocks(index, nothing, point)).sum(axis=(2, 3))  # [G, O]
            np.add.at(rows, channels.tensors[point.tensor].ids, squares.reshape(-1))
    for read in channels.reads:
        if read.node in by_node:
            reader = by_node[read.node]
            blocks = read_blocks(index, nothing, reader)
            if reader.batchnorm is not None:
                slope = read_batchnorm(index, nothing, reader.batchnorm).slope
                blocks = blocks * slope.reshape(*blocks.shape[:2], 1, 1)
            squares = np.square(blocks).sum(axis=(1, 3))  # [G, I]
            np.add.at(columns, read.labels.ids, squares.reshape(-1))
    return np.sqrt(rows * columns)


def _prunable_groups(
    channels: Channels, points: Sequence[LayerPoint], chosen: set[int]
) -> tuple[list[Ids], list[list[LayerPoint]]]:
    """Groups that can be cut, all whose layers were chosen; and those layers."""
    makers: dict[int, list[LayerPoint]] = {}
    for point in points:
        if point.tensor in channels.tensors:
            for unit in np.unique(channels.tensors[point.tensor].ids).tolist():
                makers.setdefault(unit, []).append(point)
    groups = []
    for group in channels.groups():
        made = makers.get(int(group[0]), [])
        if made and channels.removable[group].all() and all(point.node in chosen for point in made):
            groups.append(group)
    return groups, [makers[int(group[0])] for group in groups]


def _uncut(channels: Channels, points: Sequence[LayerPoint], groups: Sequence[Ids]) -> list[Skip]:
    """Chosen layers none of whose channels take part."""
    part = np.zeros(channels.units, bool)
    for group in groups:
        part[group] = True
    skips = []
    for point in points:
        labels = channels.tensors.get(point.tensor)
        if labels is not None and part[labels.ids].any():
            continue
        reason = CHANNELS_UNKNOWN
        if labels is not None:
            frozen = next((channels.frozen[unit] for unit in labels.ids.tolist() if unit in channels.frozen), None)
            reason = CHANNELS_TIED if frozen is None else CHANNELS_FROZEN.format(why=frozen)
        skips.append(skip(point, reason))
    return skips


def _keep(scores: Sequence[Floats], share: float, scope: Scope, multiple: int) -> list[NDArray[np.bool_]]:
    """Masks of the channels that stay, the best of every group among them."""
    relative = []
    for score in scores:
        value = score / (score.mean() or 1.0)
        value[score.argmax()] = np.inf
        relative.append(value)
    if scope == "layer":
        counts = [max(1, keep_count(value.size, share)) for value in relative]
    else:
        total = keep_count(sum(value.size for value in relative), share)
        counts = [int(mask.sum()) for mask in keep_largest(relative, max(len(relative), total))]
    rounded = [max(1, round(count / multiple)) * multiple for count in counts]
    return [keep_largest([value], min(value.size, count))[0] for value, count in zip(relative, rounded, strict=True)]
