"""Cost of a network: parameters, operations, bytes."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_asr.graph.index import FLOAT_TYPES, GraphIndex, is_standard
from onnx_asr.graph.layers import LAYERS, Layer
from onnx_asr.graph.shapes import InputShapes, Shape, typical_shapes

_FAST = 1  # zlib level: enough to see what zeros are worth


@dataclass(frozen=True)
class Cost:
    """Size of a network.

    Attributes:
        parameters: Elements of all floating-point constants that the network reads.
        nonzeros: Those that are not zero.
        flops: Two per multiplication with a weight (Conv, ConvTranspose, Gemm, MatMul), for one input; 0 where
            shapes are not known. Multiplications by zero count.
        nonzero_flops: Those with a weight other than zero: what a sparse kernel would do.
        size: Bytes of the model with its weights.
        compressed: Compressed bytes (deflate, as in gzip).
    """

    parameters: int
    nonzeros: int
    flops: int
    nonzero_flops: int
    size: int
    compressed: int


def cost(index: GraphIndex, given: InputShapes | None = None) -> Cost:
    """Parameters, operations and bytes of a network; operations for :func:`onnx_asr.graph.shapes.fed_shapes`."""
    names = {name for node in index.nodes for name in node.input if name and index.is_constant(name)}
    parameters = nonzeros = 0
    for name in names:
        if index.element_type(name) in FLOAT_TYPES:
            value = index.value(name)
            parameters += value.size
            nonzeros += int(np.count_nonzero(value))
    size, compressed = index.model.ByteSize(), compressed_size(index.model)
    return Cost(parameters, nonzeros, *flops(index, given), size, compressed)


def compressed_size(model: onnx.ModelProto) -> int:
    """Size after deflate, part by part, as a model over 2 GB cannot be serialized as one."""
    packer = zlib.compressobj(_FAST)
    shell = onnx.ModelProto(metadata_props=model.metadata_props, opset_import=model.opset_import)
    for name in ("input", "output", "value_info"):
        getattr(shell.graph, name).extend(getattr(model.graph, name))
    parts = (part.SerializeToString() for part in (shell, *model.graph.node, *model.graph.initializer))
    return sum(len(packer.compress(part)) for part in parts) + len(packer.flush())


def flops_by_node(index: GraphIndex, given: InputShapes | None = None) -> dict[int, int]:
    """Operations of every node that multiplies with a constant weight, for the shapes of :func:`cost`."""
    shapes = typical_shapes(index, given)
    found = {position: 2 * _multiplications(index, position, shapes) for position in range(len(index.nodes))}
    return {position: count for position, count in found.items() if count}


def flops(index: GraphIndex, given: InputShapes | None = None) -> tuple[int, int]:
    """All operations of a network, and those with a weight other than zero."""
    counts = flops_by_node(index, given)
    nonzero = 0
    for node, count in counts.items():  # every entry of a weight is used in equally many multiplications
        weight = index.value(next(name for name in index.nodes[node].input[:2] if index.is_constant(name)))
        nonzero += round(count * float(np.count_nonzero(weight) / weight.size))
    return sum(counts.values()), nonzero


def _multiplications(index: GraphIndex, position: int, shapes: dict[str, Shape]) -> int:
    node = index.nodes[position]
    if not is_standard(node, *LAYERS):
        return 0
    constant = [index.is_constant(name) for name in node.input[:2]]
    output = shapes.get(node.output[0])
    if sum(constant) != 1 or output is None:
        return 0
    layer = Layer.of(index, position)
    if isinstance(layer, Layer) and layer.is_transposed:
        source = shapes.get(node.input[layer.data_slot])
        return 0 if source is None else math.prod(source) * layer.layout.outputs * layer.layout.taps
    if isinstance(layer, Layer):
        return math.prod(output) * layer.layout.inputs * layer.layout.taps
    if node.op_type != "MatMul":
        return 0
    weight = index.value(node.input[constant.index(True)]).shape  # a stack of matrices
    return math.prod(output) * int(weight[-2:][0] if constant[1] else weight[-1])
