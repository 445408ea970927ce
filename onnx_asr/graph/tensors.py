"""Stored tensors: within the model or, where that is over protobuf's 2 GB, left in the file that they came in.

A tensor left in its file keeps its ``external_data`` entries, and the model's folder as ``basepath``; its value is a
memory map, so that it takes no memory before it is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from onnx_asr.errors import ModelError

WEIGHT_LIMIT = 2**31 - 2**26
"""Bytes of weights that fit one protobuf message of 2 GB, with room for the graph."""

LARGE = 1 << 20
_MAPPABLE = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}


def dtype_of(element_type: int, what: str) -> np.dtype[Any]:
    """The NumPy type of an ONNX element type.

    Raises:
        ModelError: When it is none.
    """
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(element_type)
    except KeyError:
        raise ModelError(
            f"{what} is of element type {element_type}, which ONNX does not know; export the model again"
        ) from None


def size_of(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's values; 0 for strings, which have no fixed size."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return 0
    return int(math.prod(tensor.dims) * dtype_of(tensor.data_type, f"tensor '{tensor.name}'").itemsize)


def weights_fit(model: onnx.ModelProto) -> bool:
    """Whether one protobuf message can hold a model with its weights."""
    return sum(size_of(tensor) for tensor in model.graph.initializer) <= WEIGHT_LIMIT


def is_self_contained(model: onnx.ModelProto) -> bool:
    """Whether a model is one message, with no weight left in a file."""
    return weights_fit(model) and not any(is_left(tensor) for tensor in model.graph.initializer)


def is_left(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor was left in its file."""
    return bool(uses_external_data(tensor))


def can_be_left(tensor: onnx.TensorProto) -> bool:
    """Whether leaving a tensor in its file is worth it, and possible."""
    return is_left(tensor) and size_of(tensor) >= LARGE and tensor.data_type in _MAPPABLE


def leave(tensor: onnx.TensorProto, folder: Path) -> None:
    """Leave a tensor in its file.

    Raises:
        ModelError: When the file does not hold it.
    """
    info = ExternalDataInfo(tensor)
    path = (folder / info.location).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ModelError(
            f"the data of tensor '{tensor.name}' should be in '{info.location}' in the folder of the model, where no "
            "such file is: keep the model and its external data together"
        )
    if path.stat().st_size < (info.offset or 0) + size_of(tensor):
        raise ModelError(
            f"'{path}' is too short for tensor '{tensor.name}': the external data is incomplete, copy it again"
        )
    tensor.external_data.add(key="basepath", value=str(folder.resolve()))


def location_of(tensor: onnx.TensorProto) -> tuple[str, dict[str, Any]]:
    """Where a tensor was left: its model's folder, and the entries that say where it is from there."""
    info = ExternalDataInfo(tensor)
    return info.basepath, {"location": info.location, "offset": info.offset or 0, "length": size_of(tensor)}


def value_of(tensor: onnx.TensorProto) -> NDArray[Any]:
    """A tensor's value, wherever it is."""
    if not is_left(tensor):
        return numpy_helper.to_array(tensor)
    folder, place = location_of(tensor)
    dtype = dtype_of(tensor.data_type, f"tensor '{tensor.name}'")
    return np.memmap(Path(folder, place["location"]), dtype, "r", place["offset"], tuple(tensor.dims))


def sparse_value(tensor: onnx.SparseTensorProto) -> NDArray[Any]:
    """A sparse tensor's value, with its zeros."""
    values = numpy_helper.to_array(tensor.values)
    result = np.zeros(math.prod(tensor.dims), values.dtype)
    result[_places(tensor)] = values
    return result.reshape(tuple(tensor.dims))


def set_sparse_value(tensor: onnx.SparseTensorProto, value: NDArray[Any]) -> bool:
    """Write a value that is zero wherever the sparse tensor is; False, and nothing is written, where it is not."""
    flat, places = value.ravel(), _places(tensor)
    if np.count_nonzero(flat[places]) != np.count_nonzero(flat):
        return False
    tensor.values.CopyFrom(numpy_helper.from_array(flat[places], tensor.values.name))
    return True


def _places(tensor: onnx.SparseTensorProto) -> NDArray[np.int64]:
    """Positions of the stored values in the flattened tensor; ONNX has them so, or as one coordinate an axis."""
    indices = numpy_helper.to_array(tensor.indices)
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), tuple(tensor.dims))
    return indices.astype(np.int64)


def content_of(tensor: onnx.TensorProto) -> bytes | memoryview:
    """A tensor's bytes, as ``raw_data`` has them."""
    if is_left(tensor):
        return value_of(tensor).data
    if not tensor.HasField("raw_data"):
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor))
    return bytes(tensor.raw_data)


def point_to(tensor: onnx.TensorProto, entries: Mapping[str, object]) -> None:
    """Say where a detached tensor's value is."""
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


def detached(model: onnx.ModelProto, least: int = LARGE) -> tuple[onnx.ModelProto, dict[int, onnx.TensorProto]]:
    """A copy whose initializers of at least so many bytes are external and nowhere yet, and by position what they were.

    Nothing of these is copied.
    """
    light = onnx.ModelProto()
    _copy_fields(model, light, "graph")
    _copy_fields(model.graph, light.graph, "initializer")
    large = {}
    for position, tensor in enumerate(model.graph.initializer):
        if is_left(tensor) or size_of(tensor) >= least:
            large[position] = tensor
            bare = light.graph.initializer.add()
            bare.name, bare.doc_string, bare.data_type = tensor.name, tensor.doc_string, tensor.data_type
            bare.dims.extend(tensor.dims)
            bare.data_location = onnx.TensorProto.EXTERNAL
        else:
            light.graph.initializer.append(tensor)
    return light, large


def copied(model: onnx.ModelProto, without: Collection[str]) -> onnx.ModelProto:
    """A copy in which some initializers have no more than name and doc string.

    For values that are to be replaced: a message keeps the memory of what it once held.
    """
    result = onnx.ModelProto()
    _copy_fields(model, result, "graph")
    _copy_fields(model.graph, result.graph, "initializer")
    for tensor in model.graph.initializer:
        if tensor.name in without:
            bare = result.graph.initializer.add(name=tensor.name)
            if tensor.HasField("doc_string"):
                bare.doc_string = tensor.doc_string
        else:
            result.graph.initializer.append(tensor)
    return result


def _copy_fields(source: Any, target: Any, without: str) -> None:
    for field, value in source.ListFields():
        if field.name == without:
            continue
        if hasattr(value, "CopyFrom"):
            getattr(target, field.name).CopyFrom(value)
        elif hasattr(value, "MergeFrom"):
            getattr(target, field.name).MergeFrom(value)
        else:
            setattr(target, field.name, value)
