"""Shapes of all tensors for one typical input, and what a network costs: parameters, operations, bytes."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_asr.errors import ModelError
from onnx_asr.graph.index import FLOAT_TYPES, GraphIndex, attribute, is_standard
from onnx_asr.graph.segments import MIN_IR_VERSION

Shape = tuple[int, ...]

BATCH, SIDE = 1, 224
"""Taken for a first dimension, and for any other one, that the model leaves open."""
_FAST = 1  # zlib level: enough to see what zeros are worth
_SMALL = 1024  # elements; larger constants are no shapes, and inference does not need their values


@dataclass(frozen=True)
class Cost:
    """Size of a network.

    Attributes:
        parameters: Elements of all floating-point constants that the network reads.
        nonzeros: Those that are not zero.
        flops: Two a multiplication with a weight (Conv, ConvTranspose, Gemm, MatMul), for one input; 0 where the
            shapes are not known. Multiplications by zero count.
        size: Bytes of the model file.
        compressed: Bytes of it after deflate, as in gzip.
    """

    parameters: int
    nonzeros: int
    flops: int
    size: int
    compressed: int


def typical_shape(value: onnx.ValueInfoProto) -> Shape:
    """The shape of a graph input, ``BATCH`` and ``SIDE`` where it is open."""
    dims = value.type.tensor_type.shape.dim
    open_sizes = (BATCH if axis == 0 else SIDE for axis in range(len(dims)))
    return tuple(item.dim_value if item.dim_value > 0 else size for item, size in zip(dims, open_sizes, strict=True))


def typical_shapes(index: GraphIndex) -> dict[str, Shape]:
    """Shapes of all tensors that shape inference finds for a typical input; constants are left out.

    Raises:
        ModelError: When it fails.
    """
    graph = onnx.GraphProto(name="shapes")
    graph.node.extend(node for node in index.nodes if not all(index.is_constant(name) for name in node.output if name))
    for name in dict.fromkeys(name for node in graph.node for name in node.input if name and index.is_constant(name)):
        value = index.value(name)
        element_type = index.element_type(name)
        if value.size > _SMALL:
            graph.input.append(onnx.helper.make_tensor_value_info(name, element_type, value.shape))
        else:
            graph.initializer.append(numpy_helper.from_array(value, name))
    for item in index.inputs:
        shape = typical_shape(item)
        graph.input.append(onnx.helper.make_tensor_value_info(item.name, item.type.tensor_type.elem_type, shape))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in index.outputs)
    model = onnx.ModelProto(ir_version=max(index.model.ir_version, MIN_IR_VERSION), graph=graph)
    model.opset_import.extend(index.model.opset_import)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(
            f"onnx cannot infer the model's shapes: {error}; the file is damaged, export it again"
        ) from error
    shapes = {item.name: typical_shape(item) for item in index.inputs}
    for item in [*inferred.value_info, *inferred.output]:
        tensor = item.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[item.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return shapes


def cost(index: GraphIndex) -> Cost:
    """Parameters, operations and bytes of a network."""
    shapes = typical_shapes(index)
    names = {name for node in index.nodes for name in node.input if name and index.is_constant(name)}
    parameters = nonzeros = 0
    for name in names:
        if index.element_type(name) in FLOAT_TYPES:
            value = index.value(name)
            parameters += value.size
            nonzeros += int(np.count_nonzero(value))
    flops = sum(2 * _multiplications(index, node, shapes) for node in index.nodes)
    return Cost(parameters, nonzeros, flops, index.model.ByteSize(), compressed_size(index.model))


def compressed_size(model: onnx.ModelProto) -> int:
    """Size after deflate, part by part, as a model over 2 GB cannot be serialized as one."""
    packer = zlib.compressobj(_FAST)
    parts = (part.SerializeToString() for items in (model.graph.node, model.graph.initializer) for part in items)
    return sum(len(packer.compress(part)) for part in parts) + len(packer.flush())


def _multiplications(index: GraphIndex, node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    if not is_standard(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    constant = [name for name in node.input[:2] if index.is_constant(name)]
    output = shapes.get(node.output[0])
    if len(constant) != 1 or output is None:
        return 0
    weight = index.value(constant[0]).shape
    if node.op_type == "Conv":
        return math.prod(output) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        source = shapes.get(node.input[0])
        return 0 if source is None else math.prod(source) * math.prod(weight[1:])
    if node.op_type == "Gemm":
        inner = weight[1] if attribute(node, "transB", 0) else weight[0]
    else:
        inner = weight[-2] if node.input[1] == constant[0] else weight[-1]
    return math.prod(output) * int(inner)
