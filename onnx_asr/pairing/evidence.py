"""What tells the channels of a dense graph in a smaller one: constants with channel axes, side by side, and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from onnx_asr.arrays import Array
from onnx_asr.channels.stretches import Equation, Groups, Stretches
from onnx_asr.channels.units import Channels
from onnx_asr.errors import StructureError
from onnx_asr.graph.index import GraphIndex, ancestors, attribute, input_name, is_standard
from onnx_asr.graph.layers import BN_MEAN, BN_VAR, LAYERS, NORMALIZATION, Layer

STATISTIC, OTHER, WEIGHT = range(3)
"""Trust in a constant."""


@dataclass(frozen=True)
class Axis:
    """A channel axis of a constant; ``stretches`` is None where it cannot be divided into them."""

    axis: int
    stretches: Stretches | None

    def starts(self, sizes: list[int]) -> list[int]:
        """Where its stretches begin, in a graph whose groups have ``sizes`` units."""
        lengths = [stretch.times * sizes[stretch.group] for stretch in self.stretches or ()]
        return [0, *accumulate(lengths)][:-1]


@dataclass(frozen=True)
class Constant:
    """A constant of the dense graph with one or two channel axes, and its counterpart.

    Attributes:
        where: The node of the smaller graph that reads it, for messages.
        trust: How far tools leave it as it was: ``WEIGHT``; ``OTHER`` for scales and biases, which take over what
            removed channels contributed; ``STATISTIC`` for a running mean or variance, which is measured again.
        rows: The axis of a weight along which lie the channels that it makes.
    """

    where: str
    pruned: Array
    dense: Array
    axes: tuple[Axis, ...]
    trust: int
    rows: int | None

    @property
    def equations(self) -> Iterator[Equation]:
        """The sizes of its axes."""
        for item in self.axes:
            if item.stretches is not None:
                yield Equation(item.stretches, self.pruned.shape[item.axis], self.where)


def read_evidence(
    pruned: GraphIndex, dense: GraphIndex, channels: Channels, groups: Groups, nodes: Mapping[int, int]
) -> tuple[list[Constant], list[Equation]]:
    """The evidence, and the sizes that are written in attributes and constant inputs.

    Raises:
        StructureError: When a constant has lost entries that are no channels.
    """
    back = {counterpart: position for position, counterpart in nodes.items()}
    axes: dict[tuple[int, int], dict[int, Stretches | None]] = {}
    for item in channels.slices:
        axes.setdefault((item.node, item.slot), {})[item.axis] = groups.stretches(item.ids)
    constants = []
    for (node, slot), found in axes.items():
        name = input_name(dense.nodes[node], slot)
        if node not in back or not name:
            continue
        value = dense.value(name)
        other = _counterpart(pruned, back[node], dense, node, slot)
        if other is None or other.ndim != value.ndim:
            continue
        is_weight = is_standard(dense.nodes[node], *LAYERS) and value.ndim > 1
        if not is_weight and any(other.shape[axis] == 1 < value.shape[axis] for axis in found):
            continue  # one value for all channels
        where = f"node {pruned.label(back[node])}"
        for axis, (size, full) in enumerate(zip(other.shape, value.shape, strict=True)):
            if axis not in found and size != full:
                raise StructureError(
                    f"{where} has a parameter of shape {other.shape}, {dense.label(node)} in the dense model one of "
                    f"shape {value.shape}, but along axis {axis} no channels can be missing"
                    f"{_reason(dense, channels, node)}"
                )
        is_statistic = is_standard(dense.nodes[node], NORMALIZATION) and slot in (BN_MEAN, BN_VAR)
        trust = WEIGHT if is_weight else STATISTIC if is_statistic else OTHER
        layer = Layer.of(dense, node) if is_weight else None
        rows = None
        if isinstance(layer, Layer):
            rows = layer.layout.output_axis if layer.layout.output_axis in found else 0  # 0: a depthwise ConvTranspose
        constants.append(Constant(where, other, value, tuple(Axis(*pair) for pair in found.items()), trust, rows))
    counts = []
    for count in channels.counts:
        stretches = groups.stretches(count.ids)
        if count.node in back and stretches is not None:
            size = _written(pruned, back[count.node], dense, count.node, count.where, count.entry)
            if size is not None and 0 <= size <= len(count.ids):
                counts.append(Equation(stretches, size, f"node {pruned.label(back[count.node])}"))
    return constants, counts


def _reason(dense: GraphIndex, channels: Channels, node: int) -> str:
    """Why the channels that a node reads cannot be removed, if something before it is the reason."""
    for position in sorted(ancestors(dense, dense.nodes[node].input), reverse=True):
        for name in dense.nodes[position].output:
            units = channels.tensors[name].ids.tolist() if name in channels.tensors else []
            reason = next((channels.frozen[unit] for unit in units if unit in channels.frozen), None)
            if reason is not None:
                return f": {reason}"
    return ""


def _counterpart(pruned: GraphIndex, position: int, dense: GraphIndex, node: int, slot: int) -> Array | None:
    """The value of the smaller graph that a constant input of the dense one corresponds to, laid out alike."""
    mine, its = pruned.nodes[position], dense.nodes[node]
    if is_standard(its, *LAYERS):
        layer, other = Layer.of(dense, node), Layer.of(pruned, position) if is_standard(mine, *LAYERS) else None
        if not isinstance(layer, Layer) or not isinstance(other, Layer):
            return None
        if slot == layer.weight_slot:
            value = pruned.value(mine.input[other.weight_slot])
            return value if layer.layout.inputs_first == other.layout.inputs_first else value.T
        name = other.bias_name(mine)
        return pruned.value(name) if name and pruned.is_constant(name) else None
    if mine.op_type != its.op_type:
        return None
    slots = [slot] if len(its.input) != 2 else [slot, 1 - slot]  # the operands of a sum or product may be exchanged
    found = [input_name(mine, number) for number in slots if pruned.is_constant(input_name(mine, number))]
    if not found:
        return None
    value, rank = pruned.value(found[0]), dense.value(its.input[slot]).ndim
    return value.reshape((1,) * (rank - value.ndim) + value.shape) if value.ndim < rank else value


def _written(
    pruned: GraphIndex, position: int, dense: GraphIndex, node: int, where: int | str, entry: int
) -> int | None:
    """A number of channels that the smaller graph states where the dense one does."""
    mine = pruned.nodes[position]
    if mine.op_type != dense.nodes[node].op_type or is_standard(mine, "Reshape", "Resize"):
        return None  # these may copy or infer it
    if isinstance(where, str):
        value = np.atleast_1d(attribute(mine, where, ()))
    else:
        name = input_name(mine, where)
        if not name or not pruned.is_constant(name):
            return None
        value = pruned.value(name).reshape(-1)
    return int(value[entry]) if entry < len(value) else None
