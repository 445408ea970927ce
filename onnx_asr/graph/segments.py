"""A part of a graph as a model of its own, with a plan's edits applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
from onnx import numpy_helper

from onnx_asr.graph.edit import EditPlan, stored
from onnx_asr.graph.index import GraphIndex, node_reads

MIN_IR_VERSION = 4  # below it initializers count as overridable inputs, which switches fusions off


@dataclass(frozen=True)
class Boundary:
    """A tensor handed from one segment to the next.

    A dimension of ``shape`` is None where it may vary from run to run; all of it is None where the rank may vary.
    """

    element_type: int
    shape: tuple[int | None, ...] | None


def extract(
    index: GraphIndex, positions: Iterable[int], inputs: Mapping[str, Boundary], outputs: Iterable[str], plan: EditPlan
) -> onnx.ModelProto:
    """A model of the nodes at ``positions`` that computes ``outputs`` from ``inputs``.

    It carries only the constants that these nodes read, with planned values in place of the stored ones.
    """
    nodes: list[onnx.NodeProto] = []
    tensors: dict[str, onnx.TensorProto] = {}
    for position in sorted(positions):
        node = onnx.NodeProto()
        node.CopyFrom(index.nodes[position])
        for (_, slot), value in plan.values_of(position):
            private = f"asr::{position}:{slot}"
            tensors[private] = numpy_helper.from_array(stored(index, position, slot, value), private)
            node.input.extend([""] * (slot + 1 - len(node.input)))
            node.input[slot] = private
        nodes.append(node)
        if position in plan.added_bias:
            bias = f"asr::{position}:bias"
            tensors[bias] = numpy_helper.from_array(stored(index, position, None, plan.added_bias[position]), bias)
            total, node.output[0] = node.output[0], f"{node.output[0]}::unbiased"
            nodes.append(onnx.helper.make_node("Add", [node.output[0], bias], [total]))
    sparse: dict[str, onnx.SparseTensorProto] = {}
    for node in nodes:
        for name in node_reads(node):
            if name in index.initializers:
                tensors.setdefault(name, index.initializers[name])
            elif name in index.sparse:
                sparse[name] = index.sparse[name]
    graph = onnx.GraphProto(
        name="segment", node=nodes, initializer=tensors.values(), sparse_initializer=sparse.values()
    )
    for name, boundary in inputs.items():
        shape = None
        if boundary.shape is not None:
            shape = ["N" if axis == 0 and size is None else size for axis, size in enumerate(boundary.shape)]
        graph.input.append(onnx.helper.make_tensor_value_info(name, boundary.element_type, shape))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return as_model(index, graph)


def as_model(index: GraphIndex, graph: onnx.GraphProto) -> onnx.ModelProto:
    """A graph as a model with the operator sets of an indexed one."""
    version = max(index.model.ir_version, MIN_IR_VERSION)
    return onnx.ModelProto(ir_version=version, graph=graph, opset_import=index.model.opset_import)
