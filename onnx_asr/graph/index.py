"""Producers and consumers of each tensor of an ONNX graph, and the values of its constants.

The index never changes the model. Positions in ``GraphIndex.nodes`` are positions in ``model.graph.node``; every other
module identifies a node by its position, since ONNX node names may be empty or repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_asr.arrays import Array
from onnx_asr.errors import ModelError
from onnx_asr.graph.tensors import sparse_value, value_of

FLOAT_TYPES = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
# how exporters wrap weights, and build pads and shapes
_FOLDABLE = frozenset({
    "Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Gather", "Slice", "Concat",
    "ConstantOfShape", "Add", "Sub", "Mul",
})  # fmt: skip
_AXES_AT_ONCE: dict[str, Callable[[Array, tuple[int, ...]], Array]] = {  # the reference: one after the other
    "Squeeze": np.squeeze,
    "Unsqueeze": np.expand_dims,
}
STANDARD_DOMAINS = {"", "ai.onnx"}

Slot = tuple[int, int]
"""Position of a node, and one of its inputs."""


@dataclass(frozen=True)
class GraphIndex:
    """Producers, consumers and constants of one model's main graph.

    Attributes:
        model: The model, which must not change while the index is in use.
        producer: Tensor name to the position of the node that makes it.
        consumers: Tensor name to the positions of the nodes that read it, subgraphs included.
        initializers: Initializer name to its TensorProto (constant even when also listed as a graph input).
        inputs: Graph inputs that are not initializers, in file order.
        outputs: Graph output names, in file order.
    """

    model: onnx.ModelProto
    nodes: list[onnx.NodeProto]
    producer: dict[str, int]
    consumers: dict[str, list[int]]
    initializers: dict[str, onnx.TensorProto]
    sparse: dict[str, onnx.SparseTensorProto]
    inputs: list[onnx.ValueInfoProto]
    outputs: list[str]
    _values: dict[str, Array] = field(default_factory=dict, repr=False)
    _constant: dict[str, bool] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: onnx.ModelProto) -> GraphIndex:
        """Index a model.

        Raises:
            ModelError: When a tensor is produced twice, or a node reads a tensor that nothing produces before it.
        """
        graph = model.graph
        nodes = list(graph.node)
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        sparse = {tensor.values.name: tensor for tensor in graph.sparse_initializer}
        inputs = [value for value in graph.input if value.name not in initializers and value.name not in sparse]
        known = {value.name for value in graph.input} | set(initializers) | set(sparse)
        producer: dict[str, int] = {}
        consumers: dict[str, list[int]] = {}
        for position, node in enumerate(nodes):
            for name in node_reads(node):
                if name not in known:
                    raise ModelError(
                        f"node {node_label(node, position)} reads tensor '{name}', which no earlier node produces: "
                        "the graph is broken or not sorted; export the model again, or check it with onnx.checker"
                    )
                readers = consumers.setdefault(name, [])
                if not readers or readers[-1] != position:
                    readers.append(position)
            for name in filter(None, node.output):
                if name in known:
                    raise ModelError(
                        f"node {node_label(node, position)} produces tensor '{name}', which already exists: "
                        "the graph is not valid ONNX; export the model again"
                    )
                producer[name] = position
                known.add(name)
        outputs = [value.name for value in graph.output]
        missing = [name for name in outputs if name not in known]
        if missing:
            raise ModelError(f"no node produces graph output '{missing[0]}': export the model again")
        return cls(model, nodes, producer, consumers, initializers, sparse, inputs, outputs)

    def is_constant(self, name: str) -> bool:
        """Whether a tensor has the same value for every input of the graph, and can be evaluated here."""
        if name not in self._constant:
            self._constant[name] = self._find_constant(name)
        return self._constant[name]

    def _find_constant(self, name: str) -> bool:
        if name in self.initializers or name in self.sparse:
            return True
        position = self.producer.get(name)
        if position is None:
            return False
        node = self.nodes[position]
        if is_standard(node, "Constant"):
            return True
        return is_standard(node, *_FOLDABLE) and all(map(self.is_constant, filter(None, node.input)))

    def value(self, name: str) -> Array:
        """The value of a constant: an initializer, sparse or not, a ``Constant`` node, or simple operations on them.

        Raises:
            KeyError: When the tensor is not a constant.
            ModelError: When its value cannot be decoded or evaluated.
        """
        if not self.is_constant(name):
            raise KeyError(name)
        try:
            if name in self.initializers:  # not cached: that would double the model's memory
                return value_of(self.initializers[name])
            if name not in self._values:
                self._values[name] = self._evaluate(name)
        except ModelError:
            raise
        except Exception as error:  # the evaluator raises whatever its operators raise
            raise ModelError(
                f"constant '{name}' cannot be read: {error}; the file is damaged, export the model again"
            ) from error
        return self._values[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a constant."""
        return tuple(self.initializers[name].dims) if name in self.initializers else self.value(name).shape

    def _evaluate(self, name: str) -> Array:
        if name in self.sparse:
            return sparse_value(self.sparse[name])
        position = self.producer[name]
        node = self.nodes[position]
        kind = node.attribute[0].name if node.op_type == "Constant" else ""
        if kind == "value":
            return numpy_helper.to_array(node.attribute[0].t)
        if kind == "sparse_value":
            return sparse_value(node.attribute[0].sparse_tensor)
        return self.evaluate(position, name, {})

    def evaluate(self, position: int, output: str, feeds: Mapping[str, Array]) -> Array:
        """One output of a node that moves values, or adds and multiplies, from ``feeds`` and constants.

        Computed by onnx's reference implementation. Of other operators that does not do what onnxruntime does in old
        operator sets.
        """
        node = self.nodes[position]
        reads = list(dict.fromkeys(read for read in node.input if read))
        values = {read: feeds[read] if read in feeds else self.value(read) for read in reads}
        axes = attribute(node, "axes", None)
        if node.op_type in _AXES_AT_ONCE and axes is not None:
            return _AXES_AT_ONCE[node.op_type](values[reads[0]], tuple(axes))
        inputs, outputs = ([onnx.ValueInfoProto(name=name) for name in names] for names in (reads, [output]))
        scope = onnx.helper.make_graph([node], "constant", inputs, outputs)
        model = onnx.helper.make_model(scope, opset_imports=self.model.opset_import)
        with np.errstate(all="ignore"):
            (result,) = ReferenceEvaluator(model).run([output], values)
        return np.asarray(result)

    def element_type(self, name: str) -> int:
        """ONNX element type of a constant tensor."""
        if name in self.initializers:
            return int(self.initializers[name].data_type)
        return int(onnx.helper.np_dtype_to_tensor_dtype(self.value(name).dtype))

    def made_by(self, name: str, *op_types: str) -> int | None:
        """Position of the node that produces a tensor, if it is one of these standard operators."""
        position = self.producer.get(name)
        return position if position is not None and is_standard(self.nodes[position], *op_types) else None

    def sole_consumer(self, name: str, *op_types: str) -> int | None:
        """Position of the node that alone reads a tensor that is not a graph output, if it is one of these operators.

        Without ``op_types`` it may be any operator.
        """
        readers = self.consumers.get(name, [])
        if len(readers) != 1 or name in self.outputs:
            return None
        return readers[0] if not op_types or is_standard(self.nodes[readers[0]], *op_types) else None

    def label(self, position: int) -> str:
        """A name for a node that a user recognizes: its own, or its operator and first output."""
        return node_label(self.nodes[position], position)


def node_label(node: onnx.NodeProto, position: int) -> str:
    """As :meth:`GraphIndex.label`, before there is an index."""
    if node.name:
        return str(node.name)
    return f"{node.op_type}:{node.output[0] if node.output else position}"


def input_name(node: onnx.NodeProto, slot: int) -> str:
    """The tensor that a node reads in an input slot; empty where the slot is empty or missing."""
    return str(node.input[slot]) if slot < len(node.input) else ""


def node_reads(node: onnx.NodeProto) -> Iterator[str]:
    """Tensors of the enclosing graph that a node reads: its inputs, and those that its subgraphs capture."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        yield from captured(graph)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Control-flow bodies of a node (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """Subgraphs of nodes, and those inside them."""
    for node in nodes:
        for body in subgraphs(node):
            yield body
            yield from bodies(body.node)


def captured(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that a subgraph reads from outside itself."""
    local = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        yield from (name for name in node_reads(node) if name not in local)
        local.update(node.output)
    yield from (value.name for value in graph.output if value.name not in local)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """A node's attribute value, or the operator's default."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def is_standard(node: onnx.NodeProto, *op_types: str) -> bool:
    """Whether a node is one of these operators of the ONNX standard domain."""
    return node.op_type in op_types and node.domain in STANDARD_DOMAINS


def ancestors(index: GraphIndex, targets: Iterable[str], stop: Iterable[str] = ()) -> set[int]:
    """Positions of the nodes needed to compute ``targets`` when the tensors in ``stop`` are given."""
    given = set(stop)
    needed: set[int] = set()
    stack = [name for name in targets if name not in given]
    while stack:
        position = index.producer.get(stack.pop())
        if position is None or position in needed:
            continue
        needed.add(position)
        stack.extend(name for name in node_reads(index.nodes[position]) if name not in given)
    return needed
