"""Stored tensors: within the model or, in models over protobuf's 2 GB, left in their external file.

A tensor left in its file keeps its ``external_data`` entries, and gets the model's folder as ``basepath``; its value is
a memory map, which takes no memory before it is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from onnx_asr.arrays import Array, Integers
from onnx_asr.errors import ModelError

WEIGHT_LIMIT = 2**31 - 2**26
"""Bytes of weights that fit one protobuf message of 2 GB, with room for the graph."""

LARGE = 1 << 20
_MAPPABLE = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}


def stored_path(path: str | Path) -> str:
    """A path as models store it: in UTF-8, whatever the encoding of file names in this process.

    Raises:
        ModelError: When its bytes are not UTF-8.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise ModelError(
            f"the path '{path}' is not in UTF-8, so no model can refer to it: rename the file or folder"
        ) from None


def real_path(stored: str) -> Path:
    """The path of this process that a stored one means."""
    return Path(os.fsdecode(stored.encode()))


def dtype_of(element_type: int, what: str) -> np.dtype[Any]:
    """The NumPy type of an ONNX element type.

    Raises:
        ModelError: When ONNX does not define it.
    """
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(element_type)
    except KeyError:
        raise ModelError(
            f"{what} has element type {element_type}, which ONNX does not define; export the model again"
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
    """Whether a model fits one message and leaves no weight in a file."""
    return weights_fit(model) and not any(is_left(tensor) for tensor in model.graph.initializer)


def is_left(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor was left in its file."""
    return bool(uses_external_data(tensor))


def can_be_left(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor can be, and is large enough to be, left in its file."""
    return is_left(tensor) and size_of(tensor) >= LARGE and tensor.data_type in _MAPPABLE


def leave(tensor: onnx.TensorProto, folder: Path) -> None:
    """Leave a tensor in its file.

    Raises:
        ModelError: When the file does not hold it.
    """
    info = ExternalDataInfo(tensor)
    path = (folder / real_path(info.location)).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ModelError(
            f"the data of tensor '{tensor.name}' should be in '{info.location}' in the folder of the model, but that "
            "file does not exist: keep the model and its external data together"
        )
    if path.stat().st_size < (info.offset or 0) + size_of(tensor):
        raise ModelError(
            f"'{path}' is too short for tensor '{tensor.name}': the external data is incomplete, copy it again"
        )
    tensor.external_data.add(key="basepath", value=stored_path(folder.resolve()))


def location_of(tensor: onnx.TensorProto) -> tuple[str, dict[str, Any]]:
    """Where a tensor was left: the model's folder, and its place relative to that folder."""
    info = ExternalDataInfo(tensor)
    return info.basepath, {"location": info.location, "offset": info.offset or 0, "length": size_of(tensor)}


def value_of(tensor: onnx.TensorProto) -> Array:
    """A tensor's value, wherever it is."""
    if not is_left(tensor):
        return numpy_helper.to_array(tensor)
    folder, place = location_of(tensor)
    dtype = dtype_of(tensor.data_type, f"tensor '{tensor.name}'")
    return np.memmap(real_path(folder) / real_path(place["location"]), dtype, "r", place["offset"], tuple(tensor.dims))


def sparse_value(tensor: onnx.SparseTensorProto) -> Array:
    """A sparse tensor's value as a dense array."""
    values = numpy_helper.to_array(tensor.values)
    result = np.zeros(math.prod(tensor.dims), values.dtype)
    result[_places(tensor)] = values
    return result.reshape(tuple(tensor.dims))


def set_sparse_value(tensor: onnx.SparseTensorProto, value: Array) -> bool:
    """Write a value of another shape, or that is zero wherever the sparse tensor is; return whether it is written."""
    flat, places = value.ravel(), _places(tensor)
    if tuple(tensor.dims) != value.shape:
        places = np.flatnonzero(flat)
        tensor.indices.CopyFrom(numpy_helper.from_array(places.astype(np.int64), tensor.indices.name))
        tensor.dims[:] = value.shape
    elif np.count_nonzero(flat[places]) != np.count_nonzero(flat):
        return False
    tensor.values.CopyFrom(numpy_helper.from_array(flat[places], tensor.values.name))
    return True


def _places(tensor: onnx.SparseTensorProto) -> Integers:
    """Positions of the stored values in the flattened tensor; ONNX stores these, or one coordinate per axis."""
    indices = numpy_helper.to_array(tensor.indices)
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), tuple(tensor.dims))
    return indices.astype(np.int64)


def content_of(tensor: onnx.TensorProto) -> bytes | memoryview:
    """A tensor's bytes, in the format of ``raw_data``."""
    if is_left(tensor):
        return value_of(tensor).data
    if not tensor.HasField("raw_data"):
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor))
    return bytes(tensor.raw_data)


def point_to(tensor: onnx.TensorProto, entries: Mapping[str, object]) -> None:
    """Record where a detached tensor's value is."""
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


def detached(model: onnx.ModelProto, least: int = LARGE) -> tuple[onnx.ModelProto, dict[int, onnx.TensorProto]]:
    """Copy the model with initializers of at least ``least`` bytes as external placeholders.

    Returns:
        The copy, and the original initializers by position; their values are not copied.
    """
    large = {
        position: tensor
        for position, tensor in enumerate(model.graph.initializer)
        if is_left(tensor) or size_of(tensor) >= least
    }
    light = _copied(model, large)
    for position, tensor in large.items():
        bare = light.graph.initializer[position]
        bare.data_type, bare.data_location = tensor.data_type, onnx.TensorProto.EXTERNAL
        bare.dims.extend(tensor.dims)
    return light, large


def copied(model: onnx.ModelProto, without: Collection[str]) -> onnx.ModelProto:
    """A copy in which the named initializers have no value.

    For values that are replaced afterwards: a message keeps the memory of what it once held.
    """
    bare = [position for position, tensor in enumerate(model.graph.initializer) if tensor.name in without]
    return _copied(model, frozenset(bare))


def _copied(model: onnx.ModelProto, bare: Container[int]) -> onnx.ModelProto:
    """A copy whose initializers at some positions have no more than a name and a doc string."""
    result = onnx.ModelProto(**_fields(model, "graph"))
    result.graph.MergeFrom(onnx.GraphProto(**_fields(model.graph, "initializer")))
    for position, tensor in enumerate(model.graph.initializer):
        if position in bare:
            doc = {"doc_string": tensor.doc_string} if tensor.HasField("doc_string") else {}
            result.graph.initializer.add(name=tensor.name, **doc)
        else:
            result.graph.initializer.append(tensor)
    return result


def _fields(message: Any, without: str) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields() if field.name != without}
