"""Which channels of a graph can only be removed together, which cannot be removed, and the removal.

Every position of a tensor's channel axis belongs to a *unit*. A node that makes channels (Conv, ConvTranspose, Gemm,
MatMul, a Pad of the channel axis) makes new units; a node that lets channels pass hands them on; a node that
combines positions of several tensors (a residual Add, the gate of squeeze-and-excitation) joins their units into one.
So a unit is what has to go as a whole: rows of all weights that make it, entries of all per-channel constants, columns
of all weights that read it. A node that is not known to treat channels apart freezes the units that reach it, and so
does a graph output.

A grouped convolution joins position ``j`` of all its groups, so that the groups stay equal; a depthwise one joins each
input channel with the outputs made of it, and its ``group`` counts what is left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.arrays import Floats, Mask
from onnx_asr.errors import ModelError, StructureError
from onnx_asr.graph.edit import EditPlan, apply, set_metadata, stored, stored_bias
from onnx_asr.graph.index import GraphIndex, attribute
from onnx_asr.graph.match import KEPT_CHANNELS

Ids: TypeAlias = NDArray[np.int64]
Kept: TypeAlias = dict[str, list[int]]
"""Tensor to the positions along its channel axis that were kept."""


@dataclass(frozen=True)
class ChannelLabels:
    """The channels of one tensor.

    Attributes:
        axis: The channel axis.
        ids: [C] unit of every position.
        constant: [C] the value at every place of a channel that does not depend on the input (its producing weights
            are all zero); NaN for the others.
    """

    axis: int
    ids: Ids
    constant: Floats

    def along(self, function: Callable[[NDArray[Any]], NDArray[Any]], axis: int | None = None) -> ChannelLabels:
        """The same rearrangement of units and constants."""
        return ChannelLabels(self.axis if axis is None else axis, function(self.ids), function(self.constant))


def varying(count: int) -> Floats:
    """``ChannelLabels.constant`` of channels that all depend on the input."""
    return np.full(count, np.nan)


@dataclass(frozen=True)
class Sliced:
    """A constant input that has one entry a channel along an axis; a bias may be absent."""

    node: int
    slot: int
    axis: int
    ids: Ids


@dataclass(frozen=True)
class Counted:
    """An integer that counts channels: an entry of a constant input (``where`` is its slot) or of an attribute."""

    node: int
    where: int | str
    entry: int
    ids: Ids


@dataclass(frozen=True)
class Read:
    """A node whose weights sum over channels, and the channels it reads."""

    node: int
    labels: ChannelLabels


@dataclass(frozen=True)
class Channels:
    """The channels of a graph.

    Attributes:
        units: Number of units.
        tensors: Tensor to its channels; tensors without any that can be told apart are left out.
        made: Tensors in which a unit begins, in file order.
        slices: Constants with entries a channel.
        counts: Integers that count channels.
        reads: What sums over channels.
        frozen: Unit that cannot be removed to the reason.
    """

    units: int
    tensors: dict[str, ChannelLabels]
    made: tuple[str, ...]
    slices: tuple[Sliced, ...]
    counts: tuple[Counted, ...]
    reads: tuple[Read, ...]
    frozen: dict[int, str]

    @property
    def removable(self) -> Mask:
        """[units] whether a unit may be removed."""
        flags = np.ones(self.units, bool)
        flags[list(self.frozen)] = False
        return flags

    def groups(self) -> list[Ids]:
        """Units that occur in the same tensors, together; a tensor never loses all its channels if no group does."""
        homes: list[list[int]] = [[] for _ in range(self.units)]
        for number, labels in enumerate(self.tensors.values()):
            for unit in np.unique(labels.ids):
                homes[unit].append(number)
        groups: dict[tuple[int, ...], list[int]] = {}
        for unit, home in enumerate(homes):
            groups.setdefault(tuple(home), []).append(unit)
        return [np.array(units) for units in groups.values()]

    def kept(self, drop: Mask) -> dict[str, tuple[int, Ids]]:
        """Channel axis, and positions left along it, of every tensor that loses some."""
        return {
            name: (labels.axis, np.flatnonzero(~drop[labels.ids]))
            for name, labels in self.tensors.items()
            if drop[labels.ids].any()
        }


def remove(index: GraphIndex, channels: Channels, drop: Mask, plan: EditPlan | None = None) -> onnx.ModelProto:
    """A copy without some units; what does not carry them stays as it was.

    The copy's metadata say which channels of the uncut model are left, see :func:`read_kept`.

    Args:
        index: The graph.
        channels: Its channels.
        drop: [units] True where a unit goes.
        plan: Other edits that are written on the way, with values of the full size.

    Raises:
        ModelError: When a unit is frozen, or a tensor would be left without channels.
    """
    refused = next((unit for unit in np.flatnonzero(drop).tolist() if unit in channels.frozen), None)
    if refused is not None:
        raise ModelError(f"a channel cannot be removed: {channels.frozen[refused]}")
    emptied = next((name for name, labels in channels.tensors.items() if drop[labels.ids].all()), None)
    if emptied is not None:
        raise ModelError(f"tensor '{emptied}' would be left without channels: keep at least one")
    edits = EditPlan() if plan is None else replace(plan, values=dict(plan.values), added_bias=dict(plan.added_bias))
    _slice_constants(index, channels, drop, edits)
    _recount(index, channels, drop, edits)
    for node, bias in edits.added_bias.items():
        made = channels.tensors[index.nodes[node].output[0]]
        edits.added_bias[node] = stored_bias(index, node, bias).compress(~drop[made.ids], 0)
    model = apply(index, edits)
    for value in [*model.graph.value_info, *model.graph.output]:
        labels_of = channels.tensors.get(value.name)
        if labels_of is not None and value.type.tensor_type.HasField("shape"):
            dim = value.type.tensor_type.shape.dim[labels_of.axis]
            if dim.HasField("dim_value"):
                dim.dim_value = int((~drop[labels_of.ids]).sum())
    _record_kept(model, channels, drop)
    return model


def _slice_constants(index: GraphIndex, channels: Channels, drop: Mask, plan: EditPlan) -> None:
    """Take the rows, columns and entries of removed units out of constants; readers that agree keep sharing one."""
    sites: dict[tuple[int, int], list[Sliced]] = {}
    for item in channels.slices:
        if drop[item.ids].any():
            sites.setdefault((item.node, item.slot), []).append(item)
    shared: dict[tuple[Any, ...], NDArray[Any]] = {}
    for (node, slot), items in sites.items():
        planned = plan.values.get((node, slot))
        inputs = index.nodes[node].input
        name = inputs[slot] if slot < len(inputs) else ""
        if planned is None and not name:
            continue
        keeps = [(item.axis, ~drop[item.ids]) for item in items]
        key = (name, id(planned), *((axis, keep.tobytes()) for axis, keep in keeps))
        if key not in shared:
            value = index.value(name) if planned is None else stored(index, node, slot, planned)
            for axis, keep in keeps:
                value = value.compress(keep, axis)
            shared[key] = value
        plan.values[node, slot] = shared[key]


def _recount(index: GraphIndex, channels: Channels, drop: Mask, plan: EditPlan) -> None:
    for item in channels.counts:
        if not drop[item.ids].any():
            continue
        left = int((~drop[item.ids]).sum())
        if isinstance(item.where, str):
            old = plan.attributes.get((item.node, item.where), attribute(index.nodes[item.node], item.where, None))
            if isinstance(old, int):
                plan.attributes[item.node, item.where] = left
            else:
                plan.attributes[item.node, item.where] = [*old[: item.entry], left, *old[item.entry + 1 :]]
        else:
            value = plan.current(index, item.node, item.where)
            assert value is not None
            value = value.copy()
            value.reshape(-1)[item.entry] = left
            plan.values[item.node, item.where] = value


def read_kept(model: onnx.ModelProto) -> Kept:
    """Channels of the uncut model that a cut one kept, by the tensors in which units begin; empty if it is uncut.

    Raises:
        ModelError: When the entry in the metadata is broken.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == KEPT_CHANNELS), "{}")
    try:
        return {str(name): [int(position) for position in positions] for name, positions in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"metadata entry '{KEPT_CHANNELS}' is not what prune or shrink writes ({error}): prune the model anew"
        ) from error


def _record_kept(model: onnx.ModelProto, channels: Channels, drop: Mask) -> None:
    record = read_kept(model)
    left = channels.kept(drop)
    for name in channels.made:
        if name in left:
            positions = left[name][1].tolist()
            before = record.get(name)
            record[name] = positions if before is None else [before[position] for position in positions]
    if record:
        set_metadata(model, KEPT_CHANNELS, json.dumps(record))


def missing_units(index: GraphIndex, channels: Channels, kept: Kept) -> Mask:
    """[units] of a dense graph that a model cut from it does not have any more, by what that model kept.

    The dense graph may itself have been cut from a larger one, of which both say what they kept.

    Raises:
        StructureError: When the graph has no such channels.
    """
    drop = np.zeros(channels.units, bool)
    own = read_kept(index.model)
    for name, positions in kept.items():
        labels = channels.tensors.get(name)
        there = own.get(name) or ([] if labels is None else range(len(labels.ids)))
        if labels is None or not set(positions) <= set(there):
            raise StructureError(
                f"the pruned model keeps channels {positions[:3]}... of tensor '{name}', which the dense model does "
                "not have: give the dense file that the pruned one was cut from"
            )
        drop[labels.ids[~np.isin(np.array(there), positions)]] = True
    return drop
