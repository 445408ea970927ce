"""Shapes of all tensors for one typical input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import onnx
from onnx import numpy_helper

from onnx_asr.arrays import Array
from onnx_asr.errors import ModelError, OptionError
from onnx_asr.graph.index import GraphIndex, attribute, is_standard
from onnx_asr.graph.segments import as_model

Shape = tuple[int, ...]
InputShapes = Mapping[str, Sequence[int]]
"""Shape of each graph input."""

BATCH, SIDE = 1, 224
"""Assumed for a first dimension, and for any other one, that the model leaves open."""
_MOST_WRITTEN = 8
_SMALL = 1024  # elements; larger constants are not shapes, so inference does not need their values


def shapes_text(tensors: Mapping[str, Array | Shape]) -> str:
    """Shapes of named tensors, as ``--input-shapes`` takes them."""
    shapes = {name: value if isinstance(value, tuple) else value.shape for name, value in tensors.items()}
    return " ".join(f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items())


def fed_shapes(index: GraphIndex, given: InputShapes | None = None) -> dict[str, Shape]:
    """Shapes of the graph inputs: as given, else as declared, with ``BATCH`` and ``SIDE`` for open dimensions.

    Where the graph contradicts this batch and fits one that is written into it, that is taken.

    Raises:
        OptionError: When a shape is given for a name that is not an input, or contradicts the declared one.
    """
    fed = _with_batch(index, given, BATCH)
    written = written_batches(index)
    if written and contradicts(index, _inferred(index, fed)):
        for batch in written:
            other = _with_batch(index, given, batch)
            if other != fed and not contradicts(index, _inferred(index, other)):
                return other
    return fed


def contradicts(index: GraphIndex, shapes: Mapping[str, Shape]) -> bool:
    """Whether sizes for another input are written into the graph.

    Then a Reshape changes the number of elements, or the lengths of a matrix product differ.
    """
    return any(_clashes(index, node, shapes) for node in index.nodes)


def _clashes(index: GraphIndex, node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> bool:
    def size(name: str) -> Shape | None:
        return index.shape(name) if index.is_constant(name) else shapes.get(name)

    if is_standard(node, "Reshape"):
        old, new = size(node.input[0]), size(node.output[0])
        return old is not None and new is not None and math.prod(old) != math.prod(new)
    if not is_standard(node, "Gemm", "MatMul") or len(node.input) < 2:
        return False
    first, second = size(node.input[0]), size(node.input[1])
    if first is None or second is None or len(first) < 2 or len(second) < 2:
        return False
    return first[-2 if attribute(node, "transA", 0) else -1] != second[-1 if attribute(node, "transB", 0) else -2]


def written_batches(index: GraphIndex) -> list[int]:
    """Sizes above 1 that may be a batch: a first one of a target shape, or of a constant with three axes."""
    return sorted(set(_written(index)))[:_MOST_WRITTEN]


def _written(index: GraphIndex) -> Iterator[int]:
    for node in index.nodes:
        constants = [(slot, name) for slot, name in enumerate(node.input) if name and index.is_constant(name)]
        for slot, name in constants:
            if node.op_type in ("Reshape", "Expand") and slot == 1:
                target = index.value(name).ravel()[:1]
                yield from (int(size) for size in target if target.dtype.kind == "i" and size > 1)
            elif node.op_type in ("RNN", "GRU", "LSTM") and slot > 4:
                yield from (size for size in index.shape(name)[1:2] if size > 1)
            elif node.op_type in ("Concat", "Add", "Mul", "MatMul") and len(index.shape(name)) > 2:
                yield from (size for size in index.shape(name)[:1] if size > 1)


def _with_batch(index: GraphIndex, given: InputShapes | None, batch: int) -> dict[str, Shape]:
    declared, shapes = {}, {}
    for value in index.inputs:
        sizes = [max(0, item.dim_value) for item in value.type.tensor_type.shape.dim]
        declared[value.name] = sizes
        shapes[value.name] = tuple(size or (batch if axis == 0 else SIDE) for axis, size in enumerate(sizes))
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
    return _inferred(index, fed_shapes(index, given))


def _inferred(index: GraphIndex, fed: Mapping[str, Shape]) -> dict[str, Shape]:
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
