"""Removal of idle channels, without changing what the model computes.

Two kinds are idle: channels whose columns are zero in every weight that reads them, and channels whose producing
weights are all zero. The latter carry a constant ``c`` (the bias, through BatchNormalization and activations), which
goes into the bias of each reader,

    b' = b + sum over taps of W[:, channel] * c.

That is exact where the reader sees nothing but the channel: at a padded convolution ``c`` has to be 0, and at a
transposed one as well. Rows can become zero when what they read is removed, so this is repeated until nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import onnx

from onnx_asr.arrays import Mask
from onnx_asr.channels.computing import pads
from onnx_asr.channels.rules import trace
from onnx_asr.channels.units import Channels, record_shapes, remove
from onnx_asr.engine.evaluation import evaluate
from onnx_asr.engine.loading import load
from onnx_asr.engine.session import Runtime
from onnx_asr.graph.edit import set_metadata
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource, check_finite
from onnx_asr.graph.points import LayerPoint, survey
from onnx_asr.graph.shapes import InputShapes
from onnx_asr.networks.cost import Cost, cost
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.operations import Probe
from onnx_asr.numerics.gains import ChannelAffine
from onnx_asr.pruning.channels import ChannelGroup, ChannelPruneResult
from onnx_asr.pruning.comparison import Reference
from onnx_asr.version import __version__


@dataclass(frozen=True)
class ShrinkResult:
    """A smaller copy of a model that computes the same function, and its cost before and after.

    Attributes:
        layers: Layers that lost output channels.
        error: Largest relative difference of an output on random input, ``|y - y'| / |y|``; in front of a Sigmoid or
            Softmax that ends the graph.
    """

    helps: ClassVar = ChannelPruneResult.helps
    derived: ClassVar = ("helps", "modified")

    model: onnx.ModelProto = field(repr=False)
    layers: tuple[ChannelGroup, ...]
    notes: tuple[str, ...]
    error: float
    before: Cost
    after: Cost

    @property
    def modified(self) -> bool:
        """Whether any channel was removed."""
        return bool(self.layers)


def shrink(
    model: ModelSource, *, input_shapes: InputShapes | None = None, execution: Execution | None = None
) -> ShrinkResult:
    """Remove channels that are constant or unused.

    Args:
        model: A path, or an object of onnx, onnx-graphsurgeon or onnx-ir, which is not changed.
        input_shapes: Shapes of inputs with open sizes, for FLOPs and the comparison; by default their batch is 1 and
            their other open sizes are 224.
        execution: How to run both models for the comparison; progress.

    Raises:
        ModelError: Not an ONNX model, quantized, weights not finite; or the smaller model computes something different,
            or cannot be compared because the given one puts out NaN alone.
        OptionError: When a shape does not fit the model.
    """
    execution = execution or Execution()
    given = GraphIndex.of(load(model))
    check_finite(given, "given")
    probe = Probe(input_shapes or {}, execution.runtime)
    before = cost(given, probe)
    execution.progress("removing channels", 0.0)
    index, channels, held = _without_idle(given, execution.runtime, input_shapes)
    layers = []
    for point in survey(given).layers:
        kept = len(channels.tensors[point.tensor].ids) if point.tensor in channels.tensors else point.channels
        if kept < point.channels:
            layers.append(ChannelGroup((point.name,), point.channels, kept))
    error = 0.0
    notes: list[str] = []
    if index is not given:
        execution.progress("comparing", 0.5)
        reference = Reference(given, execution.runtime, input_shapes)
        error = reference.error(index.model)
        notes.extend(reference.notes)
    if held:
        notes.append(
            f"{held} channels carry a constant other than 0 into a padded or transposed convolution, where it is not "
            "constant at the borders: they stay"
        )
    if layers:
        set_metadata(index.model, "onnx_asr.version", __version__)
        record_shapes(index.model, input_shapes)
    execution.progress("done", 1.0)
    return ShrinkResult(index.model, tuple(layers), tuple(notes), error, before, cost(index, probe))


def _without_idle(
    index: GraphIndex, runtime: Runtime, input_shapes: InputShapes | None
) -> tuple[GraphIndex, Channels, int]:
    """The graph without its idle channels, the channels left, and the second result of :func:`_idle`."""
    while True:
        channels, draft = trace(index, partial(evaluate, index, runtime), input_shapes), Draft(index)
        points = {point.node: point for point in survey(index).layers}
        drop, held = _idle(draft, points, channels)
        if not drop.any():
            return index, channels, held
        _fold_constants(draft, points, channels, drop)
        index = GraphIndex.of(remove(index, channels, drop, draft.plan))


def _idle(draft: Draft, points: Mapping[int, LayerPoint], channels: Channels) -> tuple[Mask, int]:
    """[units] that can be removed, and the number of those that only a padded or transposed reader holds."""
    free, dead = channels.removable, channels.removable
    for read in channels.reads:
        point, ids, constant = points.get(read.node), read.labels.ids, read.labels.constant
        used = np.ones(len(ids), bool)
        if point is not None:
            used = (draft.blocks(point) != 0).any(axis=(1, 3)).reshape(-1)
        known = ~used | ~np.isnan(constant)
        exact = ~used | (constant == 0) | (known & _folds(draft, point))
        dead[ids[~known]] = False
        free[ids[~exact]] = False
    for group in channels.groups():
        if free[group].all():
            free[group[0]] = False
            dead[group[0]] = False
    return free, int((dead & ~free).sum())


def _folds(draft: Draft, point: LayerPoint | None) -> bool:
    """Whether a constant channel that the point reads is the same as a bias."""
    if point is None or point.layer.is_transposed:
        return False
    if point.layer.is_convolution and pads(draft.index.nodes[point.node]):
        return False
    bias = None if point.bias is None else draft.plan.current(draft.index, *point.bias)
    return bias is None or bias.size == point.channels


def _fold_constants(draft: Draft, points: Mapping[int, LayerPoint], channels: Channels, drop: Mask) -> None:
    """Add the constants of the dropped channels to the biases of their readers."""
    for read in channels.reads:
        gone = drop[read.labels.ids] & ~np.isnan(read.labels.constant)
        carried = np.where(gone, read.labels.constant, 0.0)
        point = points.get(read.node)
        if point is None or not carried.any():
            continue
        blocks = draft.blocks(point).sum(axis=3)  # [G, O, I]
        shift = point.layer.alpha * np.einsum("goi,gi->go", blocks, carried.reshape(len(blocks), -1))
        if shift.any():
            draft.apply_affine(point, ChannelAffine(np.ones(point.channels), shift.reshape(-1)))
