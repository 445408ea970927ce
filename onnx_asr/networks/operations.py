"""Operations of a network, for one typical input: two per multiplication of a convolution or a matrix product.

    Conv           outputs x weights of an output channel
    ConvTranspose  inputs x weights of an input channel
    Gemm, MatMul   outputs x length of the contracted axis, of weights and of activations
    Einsum         product of all axis lengths, for two operands
    RNN, GRU, LSTM steps x samples x weights

(ONNX operator specifications.) Zeros in a weight save their share of a node's operations; every entry of a weight is
used in equally many of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import ModelError
from onnx_asr.graph.index import GraphIndex, attribute, is_standard, node_label, subgraphs
from onnx_asr.graph.layers import MULTIPLIES
from onnx_asr.graph.shapes import InputShapes, Shape, contradicts, typical_shapes
from onnx_asr.networks.latency import fed_with, random_feeds

Sizes = Callable[[str], Shape]
_Count = Callable[[onnx.NodeProto, Sizes], int]


@dataclass(frozen=True)
class Probe:
    """What a network is fed with to count its operations, and how it runs where shape inference stops.

    Attributes:
        shapes: Shapes of inputs with open sizes; by default their batch is 1 and their other open sizes are 224.
        runtime: How to run.
    """

    shapes: InputShapes = field(default_factory=dict)
    runtime: Runtime = field(default_factory=Runtime)

    def sizes(self, index: GraphIndex, names: Iterable[str]) -> dict[str, Shape]:
        """Shapes of tensors, from one run on random input.

        Raises:
            ModelError: When onnxruntime cannot run the network on inputs of these shapes.
        """
        model = onnx.ModelProto()
        model.CopyFrom(index.model)
        outputs = {f"asr::shape:{number}": name for number, name in enumerate(names)}
        for output, name in outputs.items():
            model.graph.node.add(op_type="Shape", input=[name], output=[output])
            model.graph.output.add(name=output)
        feeds = random_feeds(index, self.shapes)
        with fed_with(feeds):
            found = Session(model, self.runtime).run(feeds, list(outputs))
        return {name: tuple(found[output].tolist()) for output, name in outputs.items()}


@dataclass(frozen=True)
class Operations:
    """Operations of a network, node by node.

    Attributes:
        by_node: All operations of every node that multiplies; not all of them where there is a gap.
        nonzero_by_node: Those without the multiplications by a zero of a weight.
        gap: Why not all could be counted; None where all were.
    """

    by_node: dict[int, int]
    nonzero_by_node: dict[int, int]
    gap: str | None

    @classmethod
    def of(cls, index: GraphIndex, probe: Probe) -> Operations:
        """Count the operations of a network.

        Raises:
            OptionError: When a shape of the probe does not fit the network.
            ModelError: When shape inference fails.
        """
        shapes = typical_shapes(index, probe.shapes)
        if contradicts(index, shapes):
            shapes = {}
        counted, gap = _counted(index)
        unknown = _unknown(index, counted, shapes)
        if unknown and gap is None:
            try:
                shapes |= probe.sizes(index, unknown)
            except ModelError as error:
                place = next(iter(unknown.values()))
                gap = f"the sizes at node {index.label(place)} are not known before a run, and {error}"
        by_node, nonzero = {}, {}
        for position, count in counted.items() if gap is None else ():
            try:
                by_node[position] = 2 * count(index.nodes[position], _sizes_of(index, shapes))
                nonzero[position] = round(by_node[position] * _density(index, position))
            except (IndexError, ValueError):  # an operator that no runtime would run
                gap = (
                    gap or f"the inputs of node {index.label(position)} do not fit its operator; export the model again"
                )
        return cls(by_node, nonzero, gap)

    @property
    def total(self) -> int:
        """All operations.

        Raises:
            ModelError: When not all could be counted.
        """
        return self._sum(self.by_node)

    @property
    def nonzero(self) -> int:
        """Operations without those that multiply by a zero of a weight.

        Raises:
            ModelError: When not all could be counted.
        """
        return self._sum(self.nonzero_by_node)

    def _sum(self, counts: dict[int, int]) -> int:
        if self.gap is not None:
            raise ModelError(
                f"the model's FLOPs are unknown: {self.gap}; choose another target where that cannot be helped"
            )
        return sum(counts.values())


def _counted(index: GraphIndex) -> tuple[dict[int, _Count], str | None]:
    """How to count the nodes that multiply, and why this is not all."""
    counted: dict[int, _Count] = {}
    gap = None
    for position, node in enumerate(index.nodes):
        if all(index.is_constant(name) for name in node.output if name):
            continue
        rule = _RULES.get(node.op_type) if is_standard(node, node.op_type) else _FUSED.get(node.op_type)
        if rule is not None and not (rule is _einsum and len(node.input) > 2):
            counted[position] = rule
        elif other := next(_multiplying(node), None):
            label, name = index.label(position), node_label(other, position)
            inside = "" if other is node else f" in a subgraph of node {label}"
            gap = gap or f"the operations of node {name} ({other.op_type}){inside} are not counted"
    return counted, gap


def _multiplying(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """The node and those of its subgraphs that multiply matrices."""
    if MULTIPLIES.search(node.op_type):
        yield node
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from _multiplying(inner)


def _reads(index: GraphIndex, position: int) -> list[str]:
    """Tensors whose sizes a node's operations follow from."""
    node = index.nodes[position]
    names = [*node.input[:3]] if node.op_type in _RECURRENT else [*node.input[:2], *node.output[:1]]
    return [name for name in names if name and not index.is_constant(name)]


def _unknown(index: GraphIndex, positions: Iterable[int], shapes: dict[str, Shape]) -> dict[str, int]:
    """Tensors of unknown size, and the first node whose operations follow from it."""
    found: dict[str, int] = {}
    for position in positions:
        for name in _reads(index, position):
            if name not in shapes:
                found.setdefault(name, position)
    return found


def _sizes_of(index: GraphIndex, shapes: dict[str, Shape]) -> Sizes:
    return lambda name: index.shape(name) if index.is_constant(name) else shapes[name]


def _density(index: GraphIndex, position: int) -> float:
    """Share of a node's weights that are not zero; 1 where it has none."""
    node = index.nodes[position]
    slots = node.input[1:3] if node.op_type in _RECURRENT else node.input[:2]
    weights = [index.value(name) for name in slots if index.is_constant(name)]
    size = sum(weight.size for weight in weights)
    return float(sum(map(np.count_nonzero, weights)) / size) if size else 1.0


def _conv(node: onnx.NodeProto, sizes: Sizes) -> int:
    return math.prod(sizes(node.output[0])) * math.prod(sizes(node.input[1])[1:])


def _conv_transpose(node: onnx.NodeProto, sizes: Sizes) -> int:
    return math.prod(sizes(node.input[0])) * math.prod(sizes(node.input[1])[1:])


def _product(node: onnx.NodeProto, sizes: Sizes) -> int:
    first = sizes(node.input[0])
    return math.prod(sizes(node.output[0])) * first[-2 if attribute(node, "transA", 0) else -1]


def _recurrent(node: onnx.NodeProto, sizes: Sizes) -> int:
    return math.prod(sizes(node.input[0])[:2]) * sum(math.prod(sizes(name)) for name in node.input[1:3])


def _einsum(node: onnx.NodeProto, sizes: Sizes) -> int:
    if len(node.input) < 2:
        return 0
    terms = attribute(node, "equation", b"").decode().replace(" ", "").split("->")[0].split(",")
    lengths: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        shape, (before, dots, after) = sizes(name), term.partition("...")
        spread = len(shape) - len(before) - len(after) if dots else 0
        labels = [*before, *(f"...{place}" for place in range(-spread, 0)), *after]
        for label, length in zip(labels, shape, strict=True):
            lengths[label] = max(length, lengths.get(label, 1))
    return math.prod(lengths.values())


_RECURRENT = ("RNN", "GRU", "LSTM")
_FUSED: dict[str, _Count] = {"FusedConv": _conv, "FusedGemm": _product, "FusedMatMul": _product}
"""Of onnxruntime's own operators those that add an activation or a transpose to a standard one."""
_RULES: dict[str, _Count] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _product,
    "MatMul": _product,
    "Einsum": _einsum,
    **dict.fromkeys(_RECURRENT, _recurrent),
}
