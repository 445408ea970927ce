"""Plan, then apply: new values for node inputs, written to a copy that otherwise equals the file.

A plan addresses a value by the node that reads it (position, input slot), never by the initializer's name, because
exporters share initializers between nodes. A value is replaced in place where all its readers get the same new one;
elsewhere the readers that get a new one get a private copy. An original that nobody reads any more is removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_asr.arrays import Array
from onnx_asr.errors import ModelError
from onnx_asr.graph.index import GraphIndex, Slot, input_name, node_reads, subgraphs
from onnx_asr.graph.tensors import copied, set_sparse_value


@dataclass
class EditPlan:
    """Changes to a model, addressed by node position.

    Attributes:
        values: (node position, input slot) to the new value of that input.
        added_bias: Position of a MatMul without bias to the per-channel values of an Add to put behind it.
        notes: Node position to a sentence for the node's doc string.
        attributes: (node position, attribute name) to the attribute's new value.
    """

    values: dict[Slot, Array] = field(default_factory=dict)
    added_bias: dict[int, Array] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    attributes: dict[tuple[int, str], int | list[int]] = field(default_factory=dict)

    def current(self, index: GraphIndex, node: int, slot: int) -> Array | None:
        """The planned value of an input, else the model's constant, else None where the input is absent."""
        if (node, slot) in self.values:
            return self.values[node, slot]
        name = input_name(index.nodes[node], slot)
        return index.value(name) if name else None

    def values_of(self, node: int) -> list[tuple[Slot, Array]]:
        """The planned values of one node's inputs, by slot."""
        return [(key, self.values[key]) for key in sorted(self.values) if key[0] == node]


def stored(index: GraphIndex, node: int, slot: int | None, value: Array) -> Array:
    """A new value in the type (and, where the size allows, the shape) in which the model stores that input.

    An absent bias, and that of a MatMul (``slot`` None), gets the type of the weight.

    Raises:
        ModelError: When a value is not finite in the stored type (NaN, or too large for float16).
    """
    name = "" if slot is None else input_name(index.nodes[node], slot)
    reference = name or next(other for other in index.nodes[node].input if index.is_constant(other))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(index.element_type(reference))
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.asarray(value).astype(dtype, copy=False)
    if not np.isfinite(result.astype(np.float64)).all():
        what = "the bias" if slot is None else f"input {slot}"
        raise ModelError(
            f"the new value of {what} of node {index.label(node)} is not finite as {np.dtype(dtype).name}: "
            "check the calibration data, or repair a float32 version of the model"
        )
    shape = index.shape(name) if name else result.shape
    return result.reshape(shape) if math.prod(shape) == result.size else result


def apply(index: GraphIndex, plan: EditPlan, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """Write a plan into a copy of the model; everything else stays as it was.

    Raises:
        ModelError: When a new value does not fit the stored type.
    """
    values = {key: stored(index, *key, value) for key, value in plan.values.items()}
    biases = {node: stored(index, node, None, value) for node, value in plan.added_bias.items()}
    tied = _tied(index, plan)
    model = copied(index.model, without=tied)
    writer = _Writer(model, index, tied)
    for node, slot in sorted(values):
        writer.write(node, slot, values[node, slot], id(plan.values[node, slot]))
    for (node, name), setting in plan.attributes.items():
        old = next(item for item in writer.nodes[node].attribute if item.name == name)
        old.CopyFrom(onnx.helper.make_attribute(name, setting))
    writer.remove_orphans()
    for node, note in plan.notes.items():
        target = writer.nodes[node]
        target.doc_string = f"{target.doc_string}\n{note}" if target.doc_string else note
    for node, value in sorted(biases.items(), reverse=True):
        writer.add_bias(node, value)
    for key, text in (metadata or {}).items():
        set_metadata(model, key, text)
    return model


def set_metadata(model: onnx.ModelProto, key: str, text: str) -> None:
    """Set one entry of ``metadata_props``."""
    entry = next((entry for entry in model.metadata_props if entry.key == key), None)
    (entry or model.metadata_props.add(key=key)).value = text


def _tied(index: GraphIndex, plan: EditPlan) -> set[str]:
    """Constants whose readers, often just one, all get the same new array: they are replaced in place."""
    planned: dict[str, list[Array]] = {}
    for (node, slot), value in plan.values.items():
        planned.setdefault(input_name(index.nodes[node], slot), []).append(value)
    planned.pop("", None)
    tied = set()
    for name, values in planned.items():
        sites = sum(read == name for node in index.consumers[name] for read in node_reads(index.nodes[node]))
        if len(values) == sites and all(value is values[0] for value in values) and name not in index.outputs:
            tied.add(name)
    return tied


def unique_name(taken: set[str], wish: str) -> str:
    """A name that is not in ``taken``, to which it is added."""
    name, number = wish, 1
    while name in taken:
        name, number = f"{wish}_{number}", number + 1
    taken.add(name)
    return name


class _Writer:
    """Writes values into a copy of an indexed model."""

    def __init__(self, model: onnx.ModelProto, index: GraphIndex, tied: set[str]) -> None:
        self.model, self.index, self.tied = model, index, tied
        self.nodes = list(model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.sparse = {tensor.values.name: tensor for tensor in model.graph.sparse_initializer}
        self.taken = {*index.producer, *index.initializers, *index.sparse, *(item.name for item in model.graph.input)}
        self.taken.update(name for node in self.nodes for name in names_within(node))
        self.replaced: set[str] = set()
        self.written: dict[tuple[str, int], str] = {}

    def write(self, node: int, slot: int, value: Array, origin: int) -> None:
        """Write one value; readers of one constant that get values of the same origin share a copy."""
        target = self.nodes[node]
        name = input_name(target, slot)
        if name in self.tied:
            if name in self.sparse and set_sparse_value(self.sparse[name], value):
                return
            holder = self.initializers.get(name)
            if holder is None and name not in self.sparse:
                producer = self.nodes[self.index.producer[name]]
                if producer.op_type == "Constant" and producer.attribute[0].name == "value":
                    holder = producer.attribute[0].t
            if holder is not None:
                fresh = numpy_helper.from_array(value, holder.name)
                fresh.doc_string = holder.doc_string
                holder.CopyFrom(fresh)
                self._declare(name, value.shape)
                return
        private = self.written.get((name, origin)) if name else None
        if private is None:
            private = unique_name(self.taken, f"{name}_repaired" if name else f"{target.output[0]}_input{slot}")
            self._add_initializer(private, value)
            self.written[name, origin] = private
        target.input.extend([""] * (slot + 1 - len(target.input)))
        target.input[slot] = private
        if name:
            self.replaced.add(name)

    def _add_initializer(self, name: str, value: Array) -> None:
        tensor = numpy_helper.from_array(value, name)
        self.model.graph.initializer.append(tensor)
        if self.model.ir_version < 4:  # where every initializer has to be a graph input, too
            self.model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, value.shape))

    def _declare(self, name: str, shape: tuple[int, ...]) -> None:
        """Correct the shape of a constant where the graph declares it."""
        for value in (*self.model.graph.input, *self.model.graph.value_info):
            if value.name == name:
                value.type.CopyFrom(onnx.helper.make_tensor_type_proto(value.type.tensor_type.elem_type, shape))

    def remove_orphans(self) -> None:
        """Remove constants whose last reader got a private copy, and nodes that only fed them."""
        pending = list(self.replaced)
        dead_nodes: set[int] = set()
        while pending:
            name = pending.pop()
            readers = self.index.consumers.get(name, [])
            still_read = any(p not in dead_nodes and name in set(node_reads(self.nodes[p])) for p in readers)
            if still_read or name in self.index.outputs:
                continue
            if name in self.initializers:
                _remove_named(self.model.graph.initializer, name)
                _remove_named(self.model.graph.input, name)
            elif name in self.sparse:
                self.model.graph.sparse_initializer.remove(self.sparse[name])
            else:
                producer = self.index.producer[name]
                dead_nodes.add(producer)
                pending.extend(node_reads(self.nodes[producer]))
            _remove_named(self.model.graph.value_info, name)
        for position in sorted(dead_nodes, reverse=True):
            del self.model.graph.node[position]

    def add_bias(self, node: int, value: Array) -> None:
        """Put ``Add(bias)`` behind a MatMul; the sum takes over the MatMul's output name."""
        target = self.nodes[node]
        output = target.output[0]
        target.output[0] = unique_name(self.taken, f"{output}_unbiased")
        bias = unique_name(self.taken, f"{output}_bias")
        self._add_initializer(bias, value)
        name = unique_name({item.name for item in self.nodes}, f"{target.name or output}_bias")
        add = onnx.helper.make_node("Add", [target.output[0], bias], [output], name=name)
        place = next(i for i, item in enumerate(self.model.graph.node) if item.output[:1] == target.output[:1])
        self.model.graph.node.insert(place + 1, add)


def names_within(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the tensors that a node's subgraphs make themselves: no outer tensor may have them."""
    for graph in subgraphs(node):
        yield from (item.name for item in (*graph.input, *graph.initializer))
        for inner in graph.node:
            yield from (*inner.output, *names_within(inner))


def _remove_named(items: Any, name: str) -> None:
    for position, item in enumerate(items):
        if item.name == name:
            del items[position]
            return
