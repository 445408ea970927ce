"""Open data of any supported form.

There are image files, decoded on demand; images in one uint8 array (N, H, W, C); ready tensors, which are used
unchanged (only whole numbers for a floating-point input are scaled as the preprocessing says, or refused); and what
readers, loaders and data sets of other libraries give. Several paths are opened one by one and joined.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnx_asr.arrays import Array, Integers
from onnx_asr.data.datasets import Dataset, FolderDataset, JoinedDataset, PixelDataset, unreadable_images
from onnx_asr.data.folders import ImageFiles, is_list
from onnx_asr.data.items import Reader, are_images, as_array
from onnx_asr.data.labels import read_labels
from onnx_asr.data.preprocessing import InputSpec, Preprocessing
from onnx_asr.data.streams import FeedReader, Indexed, open_items, ready_tensors
from onnx_asr.errors import DataError, OptionError

_WANTED = "give a folder of images, a .txt that lists images, an .npz or an .npy file"
_LARGE, _MOST_EXPANSION = 1 << 30, 100  # bytes; factor on the size of the file


DataSource: TypeAlias = (
    Dataset | str | os.PathLike[str] | Array | Mapping[str, ArrayLike] | Iterable[Any] | Indexed | FeedReader
)
"""Whatever an entry point takes as data; see :func:`open_data`."""


def open_data(
    source: DataSource,
    inputs: Sequence[InputSpec],
    *,
    preprocessing: Preprocessing | None = None,
    labels: str | os.PathLike[str] | None = None,
    skip_bad_images: bool = False,
    most: int | None = None,
) -> Dataset:
    """Open calibration or evaluation data for a model.

    Args:
        source: A folder of images, also of a COCO or VOC data set; a .txt with the path of an image per line, relative
            to its folder; an .npz with `images` (uint8, (N, H, W, C) or (N, H, W)) and optionally `labels`; an .npz
            with an array per model input and optionally `labels`; an .npy for a model with one input; a list of such
            paths, whose samples are joined; the same as a dict, an array or a tensor; a data set of another library
            with a length and positions, from which samples are read when they are needed; a loader, generator,
            iterable of feeds (dicts of arrays with a leading batch axis) or `CalibrationDataReader`, of which the first
            ``most`` samples are read at once (:mod:`onnx_asr.data.items` says what they may give). A lone uint8 array
            counts as images if the input is of another type or a preprocessing is given. A Dataset is returned as it
            is.
        inputs: The model's inputs.
        preprocessing: How to prepare images; not needed for an input of integers. Its scale, mean and std also apply to
            ready tensors of integers for an input of floats, which are refused without.
        labels: For images in files, a table of file name and class index. Without it, each sub-folder is a class: its
            name if all names are whole numbers, else its position in sorted order. COCO and VOC data sets, and lists of
            paths, have no classes, nor have several folders whose sub-folders differ.
        skip_bad_images: Read all files of a folder once and skip those that cannot be read as images; the dataset
            lists them.
        most: Samples that are needed of data that can only be read in order; None reads them to their end.

    Returns:
        The samples.

    Raises:
        DataError: The data are missing, broken or do not fit the model.
        OptionError: `preprocessing` or `labels` do not apply to this kind of data.
    """
    if isinstance(source, Dataset):
        return source
    for spec in inputs:
        if not spec.shape:
            raise DataError(
                f"model input {spec.name!r} is a scalar, and data need a batch axis: fix its value in the model"
            )
    if not inputs:
        raise DataError("the model has no inputs: give a model that data can be fed to")

    paths = _paths(source)
    if paths is not None:
        how = {"preprocessing": preprocessing, "labels": labels, "skip_bad_images": skip_bad_images}
        return _joined(paths, lambda path: open_data(path, inputs, **how))  # type: ignore[arg-type]
    value: object = source
    where = "the data"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        where = str(path)
        if path.is_dir() or is_list(path):
            return _open_images(path, inputs, preprocessing, labels, skip_bad_images)
        value = _load_numpy(path)
    if labels is not None:
        raise OptionError(f"a labels file ({labels}) needs images in files: put 'labels' beside the arrays instead")

    if hasattr(value, "__array__"):  # also tensors of torch and TensorFlow
        value = as_array(value, where, inputs[0].name)
    if isinstance(value, np.ndarray):
        spec = _only_input(inputs, f"{where} is one array")
        value = {"images" if are_images(value, spec, preprocessing) else spec.name: value}
    if isinstance(value, Mapping):
        classes = None
        arrays = _arrays(value, where)
        by_name = {spec.name: spec for spec in inputs}
        if "labels" in arrays and "labels" not in by_name:
            classes = _class_indices(arrays.pop("labels"), where)
        images = arrays.get("images")
        if images is not None and ("images" not in by_name or are_images(images, by_name["images"], preprocessing)):
            spec = _only_input(inputs, f"{where} holds images")
            return PixelDataset(_pixels(images, spec, where), classes, spec, preprocessing or Preprocessing())
        return ready_tensors([arrays], where, Reader(inputs, preprocessing), classes)
    return open_items(value, inputs, preprocessing, most)


def _open_images(
    source: Path,
    inputs: Sequence[InputSpec],
    preprocessing: Preprocessing | None,
    labels: str | os.PathLike[str] | None,
    skip_bad_images: bool,
) -> Dataset:
    files = ImageFiles.of(source)
    bad = unreadable_images(files.root, files.names) if skip_bad_images else {}
    if len(bad) == len(files.names):
        first = bad[files.names[0]]
        raise DataError(f"none of the {len(files.names)} images in {source} can be read; the first: {first}")
    files = files.without(list(bad))
    found = files.classes() if labels is None else (read_labels(Path(labels), files.names), ())
    classes, names = (None, ()) if found is None else found
    spec = _only_input(inputs, f"{source} holds images")
    return FolderDataset(files.root, files.names, classes, spec, preprocessing or Preprocessing(), list(bad), names)


def _paths(source: object) -> list[str | os.PathLike[str]] | None:
    """Several paths; None where the source is something else."""
    if not isinstance(source, (list, tuple)) or not source:
        return None
    return list(source) if all(isinstance(item, (str, os.PathLike)) for item in source) else None


def _joined(paths: Sequence[str | os.PathLike[str]], open_one: Callable[[Path], Dataset]) -> Dataset:
    places = [Path(path) for path in paths]
    for one, other in permutations(places, 2):
        inner, outer = (Path(os.path.realpath(place)) for place in (one, other))
        if inner == outer:
            raise DataError(f"{one} is given twice: give every folder or file of samples once")
        if inner.is_dir() and inner.is_relative_to(outer):
            raise DataError(f"{one} lies in {other}, whose images are read with it: give only one of them")
    if len(places) == 1:
        return open_one(places[0])
    return JoinedDataset([(place, open_one(place)) for place in places])


def _load_numpy(path: Path) -> Array | dict[str, Array]:
    if not path.exists():
        raise DataError(f"{path} does not exist: {_WANTED}")
    if path.suffix.lower() not in (".npz", ".npy") or not path.is_file():
        raise DataError(f"{path} is not a supported data source: {_WANTED}")
    try:
        if path.suffix.lower() == ".npy":
            return np.lib.format.open_memmap(path, mode="r")  # never unpickles
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            size, stored = sum(member.file_size for member in archive.zip.infolist()), path.stat().st_size
            if size > _LARGE and size > _MOST_EXPANSION * stored:  # nothing of it is read
                raise DataError(
                    f"{path} would expand from {stored} to {size} bytes and is refused as a decompression bomb: if it "
                    "is not one, write it with numpy.savez instead of numpy.savez_compressed"
                )
            return dict(archive)
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many kinds on broken files
        with path.open("rb") as stream:
            start = stream.read(24)
        known = start.startswith((b"PK", b"\x93NUMPY"))
        why = error if known else f"it is another kind of file, or empty, and begins with {start!r}"
        raise DataError(
            f"cannot read arrays from {path}: {why}. Give plain arrays written by numpy.save or numpy.savez; "
            "pickled Python objects are refused, since loading them can run code"
        ) from error


def _pixels(images: Array, spec: InputSpec, where: str) -> NDArray[np.uint8]:
    """Check an array of images; return it as (N, H, W, C)."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(
            f"{where} has images of {images.dtype} in shape {images.shape}: give uint8 in (N, H, W), (N, H, W, 1) "
            f"or (N, H, W, 3), or ready tensors under the name of the model's input, {spec.name!r}"
        )
    if 0 in images.shape:
        raise DataError(f"{where} has images in shape {images.shape}, which is empty: give at least one image")
    return images[..., None] if images.ndim == 3 else images


def _arrays(values: Mapping[str, Any], where: str) -> dict[str, Array]:
    if splits := [name for name, value in values.items() if hasattr(value, "column_names")]:
        raise DataError(f"{where} are the splits {', '.join(map(repr, splits))} of a data set: give one of them")
    return {name: as_array(value, where, name) for name, value in values.items()}


def _class_indices(labels: Array, where: str) -> Integers:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]  # (N, 1) -> (N,)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        raise DataError(
            f"{where} has labels of {labels.dtype} in shape {labels.shape}: give class indices, whole numbers from 0 "
            "up, in shape (N,)"
        )
    return labels.astype(np.int64)


def _only_input(inputs: Sequence[InputSpec], what: str) -> InputSpec:
    if len(inputs) > 1:
        names = ", ".join(repr(spec.name) for spec in inputs)
        raise DataError(f"{what}, but the model has the inputs {names}: give a dict with a ready tensor per input")
    return inputs[0]
