"""External data: weights in files beside a model, which a model finds by their location relative to its folder."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor, uses_external_data

from onnx_asr.errors import ModelError
from onnx_asr.graph.index import bodies
from onnx_asr.graph.tensors import can_be_left, leave, real_path, stored_path, weights_fit

_LFS_POINTER = b"version https://git-lfs.github.com/"


def refuse_pointer(path: Path) -> None:
    """Refuse a file that Git LFS left in place of the real one.

    Raises:
        ModelError: Naming it.
    """
    if path.is_file():
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ModelError(f"'{path}' is a pointer of Git LFS, not the file itself: fetch it with 'git lfs pull'")


def read_external(model: onnx.ModelProto, path: Path, external_links: bool) -> None:
    """Read the external data of the model at a path; of one over 2 GB, large weights are left in their file.

    Raises:
        ModelError: The model is a pipe, or its data are pointers of Git LFS, or behind links that are not to be
            followed.
        OSError, RuntimeError, ValueError, onnx.checker.ValidationError: When onnx does not read them.
    """
    left = [] if weights_fit(model) else [tensor for tensor in model.graph.initializer if can_be_left(tensor)]
    for tensor in left:
        leave(tensor, _folder_of(tensor, path, external_links))
        tensor.data_location = onnx.TensorProto.DEFAULT
    for tensor in external_tensors(model):
        load_external_data_for_tensor(tensor, stored_path(_folder_of(tensor, path, external_links)))
    for tensor in left:
        tensor.data_location = onnx.TensorProto.EXTERNAL


def _folder_of(tensor: onnx.TensorProto, path: Path, external_links: bool) -> Path:
    """The folder that the location of an external tensor is relative to: that of the model.

    Where the data are behind links that may be followed, it is the folder of the file behind the model's link, and the
    location becomes that of the file behind the data's link.

    Raises:
        ModelError: The model is a pipe, or a link that its data are not beside; or its data are pointers of Git LFS, or
            behind links that lead elsewhere or are not to be followed.
    """
    if path.is_fifo():
        raise ModelError(
            f"the model in the pipe '{path}' keeps its weights in other files, which cannot be found from there: give "
            "the path of the model file"
        )
    location = real_path(ExternalDataInfo(tensor).location)
    file, folder = (path.parent / location).resolve(), path.resolve().parent
    if path.is_symlink() and not file.exists() and (folder / location).is_file():
        raise ModelError(
            f"'{path}' is a symbolic link, and its weights are not beside the link but beside the model that it leads "
            f"to: give '{path.resolve()}'"
        )
    refuse_pointer(file)
    if file == Path(os.path.normpath(path.parent.resolve() / location)) or not (
        file.is_file() and file.is_relative_to(folder)
    ):
        return path.parent  # there is no link, or one that onnx refuses to follow
    if not external_links:
        raise ModelError(
            f"the weights of '{path}' are behind symbolic links that stay beside the model itself, in '{folder}': "
            "allow them with --external-links (in Python load(path, external_links=True))"
        )
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = stored_path(file.relative_to(folder))
    return folder


def external_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """All tensors of a model that are in other files."""
    nodes = [node for function in model.functions for node in function.node]
    graphs = [model.graph, *bodies(model.graph.node), *bodies(nodes)]
    found = list(_attributes(nodes))
    for graph in graphs:
        found += [*graph.initializer, *_parts(graph.sparse_initializer), *_attributes(graph.node)]
    return [tensor for tensor in found if uses_external_data(tensor)]


def _attributes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Tensors that are attributes of nodes."""
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            yield from _parts((attribute.sparse_tensor, *attribute.sparse_tensors))


def _parts(tensors: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for tensor in tensors:
        yield from (tensor.values, tensor.indices)


def data_files(path: Path, *, read_whole: bool = False) -> frozenset[Path]:
    """The files in which a model file keeps weights; none where there is no such model.

    With ``read_whole`` also none where the model is over 2 GB, as models that were loaded from it read them later.
    """
    found = set()
    if path.is_file():
        with contextlib.suppress(DecodeError, OSError, ValueError):
            model = onnx.load(path, format="protobuf", load_external_data=False)
            if read_whole and not weights_fit(model):
                return frozenset()
            found = {path.parent / real_path(ExternalDataInfo(tensor).location) for tensor in external_tensors(model)}
    return frozenset(file for file in found if file.is_file())


def fits_one_file(path: Path) -> bool:
    """Whether the weights of a model file are under 2 GB; of what cannot be read, and of a pipe, it is supposed."""
    if path.is_file():
        with contextlib.suppress(DecodeError, OSError, ValueError):
            return weights_fit(onnx.load(path, format="protobuf", load_external_data=False))
    return True


def remove_obsolete(files: Iterable[Path], model: Path) -> None:
    """Remove data files that this package wrote for a model file, unless something may still refer to them."""
    for file in files:
        if _is_ours(file, model) and not _is_mentioned(file):
            with contextlib.suppress(OSError):
                file.unlink()


def _is_ours(file: Path, model: Path) -> bool:
    """Whether a data file is one that was written for a model file, and has no other name."""
    if not re.fullmatch(re.escape(model.name) + r"\.[0-9a-f]{12}\.data", file.name) or file.parent != model.parent:
        return False
    return file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1


def _is_mentioned(file: Path) -> bool:
    """Whether something that may be a model, in the folder of a data file, holds the name of the data file.

    Models begin with the field of their IR version, whatever their suffix.
    """
    for other in file.parent.iterdir():
        if other == file or not other.is_file():
            continue
        try:
            with other.open("rb") as stream:
                if stream.read(1) != b"\x08":
                    continue
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    if content.find(os.fsencode(file.name)) >= 0:
                        return True
        except OSError:  # unreadable: it may be anything
            return True
    return False
