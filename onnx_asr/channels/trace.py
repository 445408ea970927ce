"""Bookkeeping of units on their way from node to node; :mod:`onnx_asr.channels.rules` has the operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

import numpy as np
import onnx

from onnx_asr.arrays import Array
from onnx_asr.channels.units import ChannelLabels, Channels, Counted, Ids, Read, Sliced
from onnx_asr.graph.index import GraphIndex, attribute, input_name, is_standard, node_label, node_reads, subgraphs
from onnx_asr.graph.shapes import InputShapes, Shape, typical_shapes

_Numbered = TypeVar("_Numbered", ChannelLabels, Sliced, Counted)


class Obstacle(Exception):
    """Why a node's channels cannot be followed."""


Evaluate: TypeAlias = Callable[[int, str, Mapping[str, Array]], Array | None]
"""Computes an output of the node at a position from those inputs that are not constants; None if it cannot."""


def unknown(position: int, output: str, feeds: Mapping[str, Array]) -> None:
    """Compute nothing, where nobody asks for the values of constant channels."""


OperatorRule: TypeAlias = Callable[["Tracer", int, onnx.NodeProto], None]
"""Labels the outputs of a node at a position, or raises an Obstacle."""


def passing(
    rule: Callable[[Tracer, int, onnx.NodeProto, ChannelLabels], ChannelLabels], axis: int | None = None
) -> OperatorRule:
    """A rule for operators that pass the channels of their first input on to their first output."""

    def follow(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
        labels = tracer.source(node, axis)
        if labels is not None:
            tracer.labels[node.output[0]] = rule(tracer, position, node, labels)

    return follow


def from_the_front(axes: Sequence[int] | None, rank: int) -> list[int]:
    """Axes counted from 0; all axes where none are given."""
    return list(range(rank)) if axes is None else [axis % rank for axis in axes]


class Tracer:
    """Passes units from node to node, in file order."""

    def __init__(
        self,
        index: GraphIndex,
        rules: Mapping[str, OperatorRule],
        evaluate: Evaluate,
        input_shapes: InputShapes | None,
    ) -> None:
        self.index, self._rules, self.evaluate = index, rules, evaluate
        self.shapes = typical_shapes(index, input_shapes)
        self.labels: dict[str, ChannelLabels] = {}
        self.made: list[str] = []
        self.sizes: dict[str, list[int | Ids | None]] = {}  # integer vectors with an entry that counts channels
        self.slices: list[Sliced] = []
        self.counts: list[Counted] = []
        self.reads: list[Read] = []
        self._parent: list[int] = []
        self._frozen: dict[int, str] = {}
        self.opset = next((item.version for item in index.model.opset_import if item.domain in ("", "ai.onnx")), 1)

    def follow(self, position: int) -> None:
        """Label the outputs of a node, or freeze the units it reads."""
        node = self.index.nodes[position]
        if all(self.index.is_constant(name) for name in node.output if name):
            return
        handler = self._rules.get(node.op_type) if is_standard(node, node.op_type) else None
        reads = list(dict.fromkeys(node_reads(node)))
        if any(name in self.sizes for name in reads) and self._sizes_pass(position):
            return
        try:
            if handler is None or any(True for _ in subgraphs(node)):
                raise Obstacle("it is not known to keep channels apart")
            handler(self, position, node)
        except Obstacle as obstacle:
            for name in reads:
                self._freeze_tensor(name, f"{self.name(position)}: {obstacle}")

    def result(self) -> Channels:
        """The channels, with consecutive unit numbers."""
        for name in self.index.outputs:
            self._freeze_tensor(name, f"'{name}' is an output of the model")
        roots = np.array([self._find(unit) for unit in range(len(self._parent))], np.int64)
        kept, number = np.unique(roots, return_inverse=True)

        def renumbered(item: _Numbered) -> _Numbered:
            return replace(item, ids=number[item.ids])

        return Channels(
            len(kept),
            {name: renumbered(item) for name, item in self.labels.items()},
            tuple(self.made),
            tuple(map(renumbered, self.slices)),
            tuple(map(renumbered, self.counts)),
            tuple(Read(renumbered(item.labels), renumbered(item.columns)) for item in self.reads),
            {int(number[unit]): reason for unit, reason in reversed(self._frozen.items())},  # the first reason stays
        )

    # Units

    def new(self, count: int) -> Ids:
        """Start new units."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def _find(self, unit: int) -> int:
        while self._parent[unit] != unit:
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit

    def join(self, first: Ids, second: Ids) -> None:
        """Make one unit of each pair."""
        if len(first) != len(second):
            raise Obstacle(f"it combines {len(first)} channels with {len(second)}")
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self._find(a), self._find(b)))
            self._parent[high] = low

    def join_groups(self, ids: Ids, groups: int) -> None:
        """Join position ``j`` of all groups."""
        if len(ids) % groups:
            raise Obstacle(f"it divides {len(ids)} channels into {groups} groups")
        grouped = ids.reshape(groups, -1)
        for other in grouped[1:]:
            self.join(grouped[0], other)

    def freeze(self, ids: Ids, reason: str) -> None:
        """Keep units from being removed."""
        for unit in ids.tolist():
            self._frozen.setdefault(unit, reason)

    def _freeze_tensor(self, name: str, reason: str) -> None:
        if name in self.labels:
            self.freeze(self.labels[name].ids, reason)
        for entry in self.sizes.get(name, ()):
            if isinstance(entry, np.ndarray):
                self.freeze(entry, reason)

    # For rules

    def name(self, position: int) -> str:
        """Operator and name of a node, for reasons."""
        node = self.index.nodes[position]
        return f"{node.op_type} {node.name}" if node.name else node_label(node, position)

    def source(self, node: onnx.NodeProto, axis: int | None = None) -> ChannelLabels | None:
        """Channels of the first input; where they are along another axis than ``axis``, they are frozen: None."""
        labels = self.labels.get(node.input[0])
        if labels is None or axis is None or labels.axis == axis:
            return labels
        self.freeze(labels.ids, f"{node.op_type} '{node.output[0]}' reads another axis than that of the channels")
        return None

    def shape(self, name: str) -> Shape:
        """Shape of a tensor for a typical input."""
        if self.index.is_constant(name):
            return self.index.shape(name)
        if name not in self.shapes:
            raise Obstacle(f"the shape of '{name}' is not known")
        return self.shapes[name]

    def constant(self, name: str, what: str) -> Array:
        """Value of a tensor that has to be a constant; ``what`` it is to the node."""
        if not self.index.is_constant(name):
            raise Obstacle(f"its {what} is computed at run time")
        return self.index.value(name)

    def integers(self, position: int, slot: int, name: str) -> tuple[list[int] | None, int | str]:
        """Integers that newer operator sets keep in an input and older ones in an attribute, and where they are."""
        node = self.index.nodes[position]
        source = input_name(node, slot)
        if source:
            return [int(item) for item in self.constant(source, name).reshape(-1)], slot
        found = attribute(node, name, None)
        return (None if found is None else [int(item) for item in found]), name

    # Vectors of sizes

    def _sizes_pass(self, position: int) -> bool:
        """Follow a vector of sizes; False where the node uses it as a shape."""
        node = self.index.nodes[position]
        if node.op_type in ("Reshape", "Resize") and node.input[0] not in self.sizes:
            return False
        entries: list[int | Ids | None] | None = None
        if is_standard(node, "Unsqueeze", "Squeeze", "Cast", "Identity"):
            entries = self.sizes[node.input[0]]
        elif is_standard(node, "Concat"):
            entries = self._joined_entries(node)
        elif is_standard(node, "Gather", "Slice") and all(self.index.is_constant(name) for name in node.input[1:]):
            before = self.sizes[node.input[0]]
            feeds = {node.input[0]: np.arange(len(before))}
            chosen = self.index.evaluate(position, node.output[0], feeds).reshape(-1)
            entries = [before[number] for number in chosen]
        if entries is None:
            for name in node_reads(node):
                self._freeze_tensor(name, f"{self.name(position)} computes with their number")
            return True
        if any(isinstance(entry, np.ndarray) for entry in entries):
            self.sizes[node.output[0]] = entries
        return True

    def entries(self, name: str) -> list[int | Ids | None] | None:
        """Entries of an integer vector: numbers, the units that an entry counts, or None for other sizes."""
        if self.index.is_constant(name):
            return [int(item) for item in self.index.value(name).reshape(-1)]
        if name in self.sizes:
            return self.sizes[name]
        maker = self.index.made_by(name, "Concat")
        if maker is not None:
            return self._joined_entries(self.index.nodes[maker])
        shape = self.shapes.get(name)
        return None if shape is None else [None] * math.prod(shape)

    def _joined_entries(self, node: onnx.NodeProto) -> list[int | Ids | None] | None:
        joined: list[int | Ids | None] = []
        for name in node.input:
            part = self.entries(name)
            if part is None:
                return None
            joined += part
        return joined

    def count_entry(self, position: int, slot: int, entry: int, ids: Ids, inferred: tuple[int, ...] = ()) -> None:
        """Make an entry of a shape follow the number of channels; ``inferred`` values follow it already."""
        name = self.index.nodes[position].input[slot]
        entries = self.entries(name)
        if entries is None or entry >= len(entries):
            raise Obstacle("its shape is computed at run time")
        for number, found in enumerate(entries):
            if isinstance(found, np.ndarray) and not (number == entry and np.array_equal(found, ids)):
                raise Obstacle("its shape counts other channels")
        value = entries[entry]
        if isinstance(value, np.ndarray) or value in inferred:
            return
        if value is None or not self.index.is_constant(name):
            raise Obstacle("its shape is computed at run time")
        self.counts.append(Counted(position, slot, entry, ids))
