"""Shapes of all tensors for one typical input, and what a network costs: parameters, operations, bytes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_asr.errors import ModelError, OptionError
from onnx_asr.graph.index import FLOAT_TYPES, GraphIndex, is_standard
from onnx_asr.graph.layers import LAYERS, Layer
from onnx_asr.graph.segments import MIN_IR_VERSION

Shape = tuple[int, ...]
InputShapes = Mapping[str, Sequence[int]]
"""Graph input to the shape it is fed with."""

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
        nonzero_flops: Those with a weight other than zero: what a sparse kernel would do.
        size: Bytes of the model with its weights.
        compressed: Bytes of it after deflate, as in gzip.
    """

    parameters: int
    nonzeros: int
    flops: int
    nonzero_flops: int
    size: int
    compressed: int


def fed_shapes(index: GraphIndex, given: InputShapes | None = None) -> dict[str, Shape]:
    """Shapes of the graph inputs: what was given, else what is declared, ``BATCH`` and ``SIDE`` where that is open.

    Raises:
        OptionError: When a shape is given for what is no input, or does not fit what is declared.
    """
    declared = {
        value.name: [max(0, item.dim_value) for item in value.type.tensor_type.shape.dim] for value in index.inputs
    }
    shapes = {
        name: tuple(size or (BATCH if axis == 0 else SIDE) for axis, size in enumerate(sizes))
        for name, sizes in declared.items()
    }
    for name, shape in (given or {}).items():
        if name not in declared:
            raise OptionError(f"'{name}' is no input of the model: its inputs are {', '.join(declared)}")
        fits = len(shape) == len(declared[name]) and min(shape, default=1) > 0
        if not (fits and all(size in (0, new) for size, new in zip(declared[name], shape, strict=True))):
            wanted = ",".join(str(size or "?") for size in declared[name])
            raise OptionError(f"input '{name}' cannot have the shape {','.join(map(str, shape))}: it declares {wanted}")
        shapes[name] = tuple(shape)
    return shapes


def typical_shapes(index: GraphIndex, given: InputShapes | None = None) -> dict[str, Shape]:
    """Shapes of all tensors that shape inference finds for :func:`fed_shapes`; constants are left out.

    Raises:
        OptionError: As :func:`fed_shapes`.
        ModelError: When shape inference fails.
    """
    fed = fed_shapes(index, given)
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
        element_type = item.type.tensor_type.elem_type
        graph.input.append(onnx.helper.make_tensor_value_info(item.name, element_type, fed[item.name]))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in index.outputs)
    model = onnx.ModelProto(ir_version=max(index.model.ir_version, MIN_IR_VERSION), graph=graph)
    model.opset_import.extend(index.model.opset_import)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(
            f"onnx cannot infer the model's shapes: {error}; the file is damaged, export it again"
        ) from error
    shapes = dict(fed)
    for item in [*inferred.value_info, *inferred.output]:
        tensor = item.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[item.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return shapes


def cost(index: GraphIndex, given: InputShapes | None = None) -> Cost:
    """Parameters, operations and bytes of a network; operations for :func:`fed_shapes`."""
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
    """Operations of every node that multiplies with a constant weight, for :func:`fed_shapes`."""
    shapes = typical_shapes(index, given)
    found = {position: 2 * _multiplications(index, position, shapes) for position in range(len(index.nodes))}
    return {position: count for position, count in found.items() if count}


def flops(index: GraphIndex, given: InputShapes | None = None) -> tuple[int, int]:
    """All operations of a network, and those with a weight other than zero."""
    counts = flops_by_node(index, given)
    return sum(counts.values()), sum(round(count * _nonzero_share(index, node)) for node, count in counts.items())


def _nonzero_share(index: GraphIndex, position: int) -> float:
    """Of a node's weight; each entry takes part in as many multiplications as any other."""
    weight = index.value(next(name for name in index.nodes[position].input[:2] if index.is_constant(name)))
    return float(np.count_nonzero(weight) / weight.size)


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
