"""Channels that can only be removed together, channels that cannot be removed, and the removal.

Every position along a tensor's channel axis belongs to a *unit*. A node that makes channels (Conv, ConvTranspose, Gemm,
MatMul, a Pad of the channel axis) starts new units; a node that keeps channels apart passes them on; a node that
combines positions of several tensors (a residual Add, the gate of squeeze-and-excitation) joins their units into one.
So a unit can only be removed as a whole: the rows of all weights that make it, the entries of all per-channel constants
and the columns of all weights that read it. Graph outputs, and nodes that are not known to keep channels apart, freeze
the units that reach them.

A grouped convolution joins position ``j`` of all its groups, so that the groups stay equal. A depthwise one joins each
input channel with the outputs made from it, and its ``group`` attribute counts the channels that are left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnx_asr.arrays import Array, Floats, Integers, Mask
from onnx_asr.errors import ModelError, StructureError
from onnx_asr.graph.edit import EditPlan, apply, set_metadata, stored
from onnx_asr.graph.index import GraphIndex, Slot, attribute, input_name
from onnx_asr.graph.shapes import InputShapes

KEPT_CHANNELS = "onnx_asr.kept_channels"
"""Key of the metadata entry in which a model with removed channels records those that it kept."""
INPUT_SHAPES = "onnx_asr.input_shapes"
"""Key of the entry for the shapes of inputs that its channels were traced for."""

Ids: TypeAlias = Integers
Kept: TypeAlias = dict[str, list[int]]
"""Tensor to the positions along its channel axis that were kept."""


@dataclass(frozen=True)
class ChannelLabels:
    """The channels of one tensor.

    Attributes:
        axis: The channel axis.
        ids: [C] unit of every position.
        constant: [C] the value of a channel that is the same everywhere and for every input, since the weights that
            make it are zero; NaN for the others.
    """

    axis: int
    ids: Ids
    constant: Floats

    def along(self, function: Callable[[Array], Array], axis: int | None = None) -> ChannelLabels:
        """Rearrange units and constants alike."""
        return ChannelLabels(self.axis if axis is None else axis, function(self.ids), function(self.constant))

    def constant_where(self, holds: Mask | bool) -> ChannelLabels:
        """The same units; those for which ``holds`` is False are no longer constant."""
        return replace(self, constant=np.where(holds, self.constant, np.nan))


def varying(count: int) -> Floats:
    """``ChannelLabels.constant`` of channels that all depend on the input."""
    return np.full(count, np.nan)


@dataclass(frozen=True)
class Sliced:
    """A constant input with one entry per channel along an axis; a bias may be absent."""

    node: int
    slot: int
    axis: int
    ids: Ids


@dataclass(frozen=True)
class Counted:
    """An integer that counts channels: an entry of an attribute, or of a constant input (``where`` is its slot)."""

    node: int
    where: int | str
    entry: int
    ids: Ids


@dataclass(frozen=True)
class Read:
    """A node whose weights sum over channels, the channels it reads, and its columns for them.

    ``columns`` of a grouped convolution has the units of one group: those of the others go with them.
    """

    labels: ChannelLabels
    columns: Sliced

    @property
    def node(self) -> int:
        """Position of the node."""
        return self.columns.node


@dataclass(frozen=True)
class Channels:
    """The channels of a graph.

    Attributes:
        units: Number of units.
        tensors: Channels by tensor, where they can be followed.
        made: Tensors in which units start, in file order.
        frozen: Reasons by unit, for units that cannot be removed.
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
        """[units] whether a unit can be removed."""
        return ~np.isin(np.arange(self.units), list(self.frozen))

    def groups(self) -> list[Ids]:
        """Units by the tensors they occur in: a tensor keeps a channel if every group keeps a unit."""
        homes: list[list[int]] = [[] for _ in range(self.units)]
        for number, labels in enumerate(self.tensors.values()):
            for unit in np.unique(labels.ids):
                homes[unit].append(number)
        groups: dict[tuple[int, ...], list[int]] = {}
        for unit, home in enumerate(homes):
            groups.setdefault(tuple(home), []).append(unit)
        return [np.array(units) for units in groups.values()]

    def kept(self, drop: Mask) -> dict[str, tuple[int, Ids]]:
        """Channel axis and remaining positions of every tensor that loses channels."""
        return {
            name: (labels.axis, np.flatnonzero(~drop[labels.ids]))
            for name, labels in self.tensors.items()
            if drop[labels.ids].any()
        }


def remove(index: GraphIndex, channels: Channels, drop: Mask, plan: EditPlan | None = None) -> onnx.ModelProto:
    """A copy without the units in ``drop`` [units]; everything that does not carry them stays as it was.

    The copy's metadata record which channels of the original model are left, see :func:`read_kept`. ``plan`` holds
    other edits to apply, with values of the original size.

    Raises:
        ModelError: When a unit is frozen, or a tensor would be left without channels.
    """
    obstacle = _obstacle(channels, drop)
    if obstacle is not None:
        raise ModelError(obstacle)
    edits = EditPlan() if plan is None else replace(plan, values=dict(plan.values), added_bias=dict(plan.added_bias))
    _slice_constants(index, channels, drop, edits)
    _recount(index, channels, drop, edits)
    for node, bias in edits.added_bias.items():
        made = channels.tensors[index.nodes[node].output[0]]
        edits.added_bias[node] = stored(index, node, None, bias).compress(~drop[made.ids], 0)
    model = apply(index, edits)
    for value in [*model.graph.value_info, *model.graph.output]:
        labels = channels.tensors.get(value.name)
        if labels is not None and value.type.tensor_type.HasField("shape"):
            dim = value.type.tensor_type.shape.dim[labels.axis]
            if dim.HasField("dim_value"):
                dim.dim_value = int((~drop[labels.ids]).sum())
    _record_kept(model, channels, drop)
    return model


def _obstacle(channels: Channels, drop: Mask) -> str | None:
    """Why the units in ``drop`` [units] cannot be removed; None where they can."""
    refused = next((unit for unit in np.flatnonzero(drop).tolist() if unit in channels.frozen), None)
    if refused is not None:
        return f"a channel cannot be removed: {channels.frozen[refused]}"
    emptied = next((name for name, labels in channels.tensors.items() if drop[labels.ids].all()), None)
    return None if emptied is None else f"tensor '{emptied}' would be left without channels"


def _slice_constants(index: GraphIndex, channels: Channels, drop: Mask, plan: EditPlan) -> None:
    """Remove rows, columns and entries from constants; readers that need the same result keep sharing it."""
    sites: dict[Slot, list[tuple[int, Mask]]] = {}
    for item in channels.slices:
        if drop[item.ids].any():
            sites.setdefault((item.node, item.slot), []).append((item.axis, ~drop[item.ids]))
    shared: dict[tuple[Any, ...], Array] = {}
    for (node, slot), keeps in sites.items():
        planned = plan.values.get((node, slot))
        name = input_name(index.nodes[node], slot)
        if planned is None and not name:
            continue
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
            new = left if isinstance(old, int) else [*old[: item.entry], left, *old[item.entry + 1 :]]
            plan.attributes[item.node, item.where] = new
        else:
            value = plan.current(index, item.node, item.where)
            assert value is not None
            value = value.copy()
            value.reshape(-1)[item.entry] = left
            plan.values[item.node, item.where] = value


def unread(index: GraphIndex, channels: Channels, drop: Mask) -> onnx.ModelProto:
    """A copy in which the units in ``drop`` [units] are there, but all weights that read them are zero.

    It computes what the graph without these units has to compute.
    """
    plan = EditPlan()
    for columns in (read.columns for read in channels.reads if drop[read.labels.ids].any()):
        value = np.array(plan.current(index, columns.node, columns.slot))
        np.moveaxis(value, columns.axis, 0)[drop[columns.ids]] = 0
        plan.values[columns.node, columns.slot] = value
    return apply(index, plan)


def record_shapes(model: onnx.ModelProto, shapes: InputShapes | None) -> None:
    """Record the shapes of inputs that channels were traced for, if any were given."""
    if shapes:
        set_metadata(model, INPUT_SHAPES, json.dumps({name: list(shape) for name, shape in shapes.items()}))


def read_shapes(model: onnx.ModelProto) -> InputShapes | None:
    """The shapes of inputs that the channels of a model were traced for.

    Raises:
        ModelError: When the metadata entry is damaged.
    """
    return {name: tuple(shape) for name, shape in _read_lists(model, INPUT_SHAPES).items()} or None


def read_kept(model: onnx.ModelProto) -> Kept:
    """The channels that are left of the original model, by the tensors in which units start; empty if all are.

    Raises:
        ModelError: When the metadata entry is damaged.
    """
    return _read_lists(model, KEPT_CHANNELS)


def _read_lists(model: onnx.ModelProto, key: str) -> dict[str, list[int]]:
    """Lists of whole numbers by name, from a metadata entry; empty without it."""
    text = next((entry.value for entry in model.metadata_props if entry.key == key), "{}")
    damaged = f"metadata entry '{key}' is damaged ({{}}): prune the dense model again, or remove the entry"
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(damaged.format(error)) from error
    if not isinstance(record, dict) or not all(map(_is_whole_numbers, record.values())):
        raise ModelError(damaged.format("expected lists of whole numbers by name"))
    return record


def _is_whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _record_kept(model: onnx.ModelProto, channels: Channels, drop: Mask) -> None:
    record = read_kept(model)
    left = channels.kept(drop)
    for name in [name for name in channels.made if name in left]:
        positions = left[name][1].tolist()
        before = record.get(name)
        record[name] = positions if before is None else [before[position] for position in positions]
    if record:
        set_metadata(model, KEPT_CHANNELS, json.dumps(record))


def missing_units(index: GraphIndex, channels: Channels, kept: Kept) -> Mask:
    """[units] of a dense graph that are missing in a model made from it, whose record is ``kept``.

    The dense graph may itself have lost channels of a larger one; both records then refer to that one.

    Raises:
        StructureError: When the graph does not have the channels of the record, or cannot lose the others.
    """
    drop = np.zeros(channels.units, bool)
    own = read_kept(index.model)
    for name, positions in kept.items():
        labels = channels.tensors.get(name)
        there = own.get(name) or ([] if labels is None else range(len(labels.ids)))
        if labels is None or not set(positions) <= set(there):
            raise StructureError(
                f"the pruned model keeps channels {positions[:3]}... of tensor '{name}', which the dense model does "
                "not have: give the dense file that the pruned one was made from"
            )
        drop[labels.ids[~np.isin(np.array(there), positions)]] = True
    obstacle = _obstacle(channels, drop)
    if obstacle is not None:
        raise StructureError(
            f"the pruned model's record of its channels does not fit the dense model: {obstacle}; give the dense file "
            "that the pruned one was made from"
        )
    return drop
