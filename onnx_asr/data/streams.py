"""Data of other libraries: what can only be read in order, and what can be read by position.

Of a stream (a generator, a loader, a reader) only as many samples are read as are needed. A dataset with a length and
positions is read when a sample is needed, so that nothing but that sample is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from onnx_asr.arrays import Array, Integers
from onnx_asr.data.datasets import Dataset, ImageDataset, Indices, Sample, TensorDataset, converted, is_unscaled
from onnx_asr.data.items import LABELS, Item, Reader
from onnx_asr.data.preprocessing import InputSpec, Preprocessing
from onnx_asr.errors import DataError, OptionError


@runtime_checkable
class FeedReader(Protocol):
    """The interface of onnxruntime's `CalibrationDataReader`: feeds one by one, then None."""

    def get_next(self) -> Mapping[str, ArrayLike] | None:
        """Return the next feed."""


@runtime_checkable
class Indexed(Protocol):
    """Samples by position, as datasets of Hugging Face and torch give them."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Any:
        """The sample at a position."""


def open_items(
    source: object, inputs: Sequence[InputSpec], preprocessing: Preprocessing | None, most: int | None
) -> Dataset:
    """Open what another library, or a program, gives item by item; see :mod:`onnx_asr.data.items`.

    Args:
        source: A reader with ``get_next``, samples by position, or an iterable.
        inputs: The model's inputs.
        preprocessing: Of images.
        most: Samples that are needed of a stream; None reads it to its end.

    Raises:
        DataError: No such source, an item that cannot be read, or no items.
        OptionError: Preprocessing for tensors that need none.
    """
    reader = Reader(inputs, preprocessing)
    if isinstance(source, FeedReader):
        _rewind(source)
        dataset = _read(_counted(iter(source.get_next, None)), reader, most)
        _rewind(source)
        return dataset
    if isinstance(source, Indexed) and not isinstance(source, (Sequence, Mapping)):
        by_position = _by_position(source, reader)
        if by_position is not None:
            return by_position
        if not isinstance(source, Iterable):
            source = map(source.__getitem__, range(len(source)))
    if not isinstance(source, Iterable):
        raise DataError(
            f"the data are of type {type(source).__name__}: give a path, an array, a dict of arrays, a data set or "
            "loader of images or tensors, an iterable of such dicts or a CalibrationDataReader"
        )
    return _read(_counted(iter(source)), reader, None if isinstance(source, Sequence) else most)


def ready_tensors(
    feeds: Sequence[Mapping[str, Array]], where: str, reader: Reader, classes: Integers | None
) -> TensorDataset:
    """Ready tensors, after making sure that a preprocessing is given only where it applies.

    Raises:
        DataError: They do not fit the inputs, or are none.
        OptionError: Preprocessing for tensors that need none.
    """
    unscaled = any(is_unscaled(feed, spec) for feed in feeds for spec in reader.inputs)
    if reader.preprocessing is not None and not unscaled:
        raise OptionError(
            f"{where} holds ready tensors, to which the given preprocessing does not apply: drop it, or give images "
            "(uint8, named 'images')"
        )
    dataset = TensorDataset(feeds, where, reader.inputs, classes, reader.preprocessing)
    if len(dataset) == 0:
        raise DataError(f"{where} holds no samples: give at least one (and rewind a reader that was used before)")
    return dataset


def _rewind(reader: object) -> None:
    """Have a reader begin again, if it can."""
    rewind = getattr(reader, "rewind", None)
    if callable(rewind):
        rewind()


def _counted(items: Iterator[object]) -> Iterator[tuple[str, object]]:
    """Items and what messages call them; whatever a source raises is an error of the data."""
    number = 0
    while True:
        where = f"feed {number} of the data"
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception as error:  # of any library
            raise _unreadable(where, error) from error
        yield where, item
        number += 1


def _unreadable(where: str, error: Exception) -> DataError:
    return DataError(f"{where} cannot be read ({type(error).__name__}: {error}): check the source of the data")


def _read(items: Iterator[tuple[str, object]], reader: Reader, most: int | None) -> Dataset:
    """Read a stream as far as samples are needed, and copy them, since a source may use its buffers again."""
    feeds: list[dict[str, Array]] = []
    images: list[Image.Image] = []
    classes: list[Integers | None] = []
    count, is_cut = 0, False
    for where, one in items:
        item = reader.read(one, where)
        if (feeds and item.images) or (images and item.feed):
            kind, other = ("images", "tensors") if item.images else ("tensors", "images")
            raise DataError(f"{where} holds {kind}, and those before it hold {other}: give one kind")
        images += [image.copy() for image in item.images]
        feeds += [{name: value.copy() for name, value in item.feed.items()}] if item.feed else []
        classes.append(item.labels)
        count += item.count
        if most is not None and count >= most:
            is_cut = True
            break
    known = [part for part in classes if part is not None]
    labels = np.concatenate(known) if known and len(known) == len(classes) else None
    dataset: Dataset
    if images:
        dataset = _Images(images.__getitem__, len(images), labels, reader)
    else:
        dataset = ready_tensors(feeds, "the data", reader, labels)
    dataset.is_cut = is_cut
    return dataset


def _by_position(source: Indexed, reader: Reader) -> Dataset | None:
    """A dataset that reads by position; None where positions hold batches, or are not offered after all."""
    if len(source) == 0:
        raise DataError("the data hold no samples: give at least one")
    try:
        first = source[0]
    except NotImplementedError:  # torch's IterableDataset
        return None
    except Exception as error:
        raise _unreadable("sample #0 of the data", error) from error
    item = reader.read(first, "sample #0 of the data")
    if item.is_batch:
        return None
    rows = _Rows(source, reader)
    labels = _labels_of(source)
    if item.images:
        return _Images(rows.image, len(source), labels, reader)
    return _Tensors(rows, len(source), labels)


def _labels_of(source: Any) -> Integers | None:
    """Classes of all samples, where they are known without reading these: a column, or torchvision's ``targets``."""
    columns = getattr(source, "column_names", None) or ()
    named = next((name for name in LABELS if name in columns), None)
    values = source[named][:] if named is not None else getattr(source, "targets", None)
    try:
        labels = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels.astype(np.int64) if labels.dtype.kind in "iu" and labels.shape == (len(source),) else None


class _Rows:
    """The items of a dataset with positions, read one at a time."""

    def __init__(self, source: Indexed, reader: Reader) -> None:
        self._source, self.reader = source, reader

    def item(self, index: int) -> Item:
        """The item at a position.

        Raises:
            DataError: When the dataset fails to give it.
        """
        where = f"sample #{index} of the data"
        try:
            one = self._source[index]
        except Exception as error:  # of any library
            raise _unreadable(where, error) from error
        return self.reader.read(one, where)

    def image(self, index: int) -> Image.Image:
        """The image at a position.

        Raises:
            DataError: When there is something else.
        """
        images = self.item(index).images
        if len(images) != 1:
            raise DataError(f"sample #{index} of the data is not one image, as the first is: give images of one kind")
        return images[0]


class _Images(ImageDataset):
    """Images that a function gives by position, one at a time, as few libraries can be read in several threads."""

    def __init__(self, read: Callable[[int], Image.Image], count: int, labels: Integers | None, reader: Reader) -> None:
        names = [f"#{index}" for index in range(count)]
        super().__init__(names, labels, _only(reader.inputs), reader.preprocessing or Preprocessing())
        self._read = read
        self._samples([0])

    def _image(self, index: int) -> Image.Image:
        return converted(
            self._read(index), self._mode, f"sample {self.names[index]} of the data", upright=self._steps.exif
        )

    def _samples(self, indices: Indices) -> list[Sample]:
        return [sample for index in indices for sample in super(_Images, self)._samples([int(index)])]


class _Tensors(Dataset):
    """Ready tensors that a dataset gives by position."""

    def __init__(self, rows: _Rows, count: int, labels: Integers | None) -> None:
        self._rows = rows
        first = self._one(0)
        super().__init__([f"#{index}" for index in range(count)], labels, first.preprocessing)

    def _one(self, index: int) -> TensorDataset:
        return ready_tensors([self._rows.item(index).feed], f"sample #{index} of the data", self._rows.reader, None)

    def _samples(self, indices: Indices) -> list[Sample]:
        return [self._one(int(index)).load(0) for index in indices]


def _only(inputs: Sequence[InputSpec]) -> InputSpec:
    (spec,) = inputs
    return spec
