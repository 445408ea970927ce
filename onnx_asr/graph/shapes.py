"""Shapes of all tensors for one typical input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import numpy_helper

from onnx_asr.arrays import Array
from onnx_asr.errors import ModelError, OptionError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.segments import as_model

Shape = tuple[int, ...]
InputShapes = Mapping[str, Sequence[int]]
"""Shape of each graph input."""

BATCH, SIDE = 1, 224
"""Assumed for a first dimension, and for any other one, that the model leaves open."""
_SMALL = 1024  # elements; larger constants are not shapes, so inference does not need their values


def shapes_text(tensors: Mapping[str, Array | Shape]) -> str:
    """Shapes of named tensors, as ``--input-shapes`` takes them."""
    shapes = {name: value if isinstance(value, tuple) else value.shape for name, value in tensors.items()}
    return " ".join(f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items())


def fed_shapes(index: GraphIndex, given: InputShapes | None = None) -> dict[str, Shape]:
    """Shapes of the graph inputs: as given, else as declared, with ``BATCH`` and ``SIDE`` for open dimensions.

    Raises:
        OptionError: When a shape is given for a name that is not an input, or contradicts the declared one.
    """
    declared, shapes = {}, {}
    for value in index.inputs:
        sizes = [max(0, item.dim_value) for item in value.type.tensor_type.shape.dim]
        declared[value.name] = sizes
        shapes[value.name] = tuple(size or (BATCH if axis == 0 else SIDE) for axis, size in enumerate(sizes))
    for name, shape in (given or {}).items():
        if name not in declared:
            raise OptionError(f"the model has no input '{name}': give shapes of {', '.join(declared)}")
        fits = len(shape) == len(declared[name]) and min(shape, default=1) > 0
        if not (fits and all(size in (0, new) for size, new in zip(declared[name], shape, strict=True))):
            wanted = ",".join(str(size or "?") for size in declared[name])
            given_shape = ",".join(map(str, shape))
            raise OptionError(f"input '{name}' cannot have shape {given_shape}: the model declares {wanted}")
        shapes[name] = tuple(shape)
    return shapes


def typical_shapes(index: GraphIndex, given: InputShapes | None = None) -> dict[str, Shape]:
    """Shapes that inference finds for :func:`fed_shapes`, without those of constants.

    Raises:
        OptionError: As :func:`fed_shapes`.
        ModelError: When shape inference fails.
    """
    fed = fed_shapes(index, given)
    graph = onnx.GraphProto(name="shapes")
    graph.node.extend(node for node in index.nodes if not all(index.is_constant(name) for name in node.output if name))
    for name in dict.fromkeys(name for node in graph.node for name in node.input if name and index.is_constant(name)):
        value = index.value(name)
        if value.size > _SMALL:
            graph.input.append(onnx.helper.make_tensor_value_info(name, index.element_type(name), value.shape))
        else:
            graph.initializer.append(numpy_helper.from_array(value, name))
    for item in index.inputs:
        element_type = item.type.tensor_type.elem_type
        graph.input.append(onnx.helper.make_tensor_value_info(item.name, element_type, fed[item.name]))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in index.outputs)
    try:
        inferred = onnx.shape_inference.infer_shapes(as_model(index, graph), data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(
            f"onnx cannot infer the model's shapes: {error}; the file is damaged, export the model again"
        ) from error
    shapes = dict(fed)
    for item in [*inferred.value_info, *inferred.output]:
        tensor = item.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[item.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return shapes
