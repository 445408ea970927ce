"""Datasets: samples ready for a model, addressed by index.

Each kind of dataset implements `_samples`, which prepares the samples of given indices in order; all else rests on it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageMode

from onnx_asr.arrays import Array
from onnx_asr.data.framing import Frame
from onnx_asr.data.preprocessing import InputSpec, Preprocessing
from onnx_asr.errors import DataError, OptionError

T = TypeVar("T")
R = TypeVar("R")
Sample = dict[str, Array]
Indices = Sequence[int] | NDArray[np.integer[Any]]

_DIGEST_CHUNK = 64  # samples held at once while hashing
_MAX_DECODERS = 8
# Whatever the suffix: other decoders may start programs (EPS).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ACROSS = frozenset(_TURNS[orientation] for orientation in (5, 6, 7, 8))  # turns that exchange width and height
_EIGHT_BITS = ("|b1", "|u1")  # types of pixels; those of mode "1" become 0 and 255


def sample_indices(count: int, n: int, seed: int) -> NDArray[np.int64]:
    """Draw `n` of `count` indices without replacement, or all if there are fewer, in random order.

    Any first few of them are then as mixed as all, although data are often sorted by class.

    Raises:
        OptionError: `n` is below 1.
    """
    if n < 1:
        raise OptionError(f"the number of samples is {n}: give at least 1")
    return np.random.default_rng(seed).permutation(count)[:n].astype(np.int64)


class Dataset(ABC):
    """Random access to samples that fit a model's inputs.

    Attributes:
        names: Name of each sample in messages: "cat/1.jpg" or "#17".
        labels: Class index of each sample, if known.
        preprocessing: How images are prepared, with the layout resolved; for ready tensors None, unless they are whole
            numbers that it scales.
        unreadable: Files that were skipped because they cannot be read as images.
        is_cut: Whether the samples are the first ones of a stream that was not read to its end.
        classes: Names of the classes that are numbered by their order in sub-folders.
    """

    unreadable: tuple[str, ...] = ()
    is_cut: bool = False
    classes: tuple[str, ...] = ()

    def __init__(
        self, names: Sequence[str], labels: NDArray[np.int64] | None, preprocessing: Preprocessing | None
    ) -> None:
        if labels is not None and len(labels) != len(names):
            raise DataError(f"there are {len(labels)} labels for {len(names)} samples: give one label per sample")
        self.names = tuple(names)
        self.labels = labels
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def _samples(self, indices: Indices) -> list[Sample]:
        """Prepare the samples of these indices, in their order."""

    def load(self, index: int) -> Sample:
        """Prepare one sample: an array per model input, without the batch axis."""
        return self._samples([index])[0]

    def batch(self, indices: Indices) -> Sample:
        """Prepare several samples, stacked along a new first axis.

        Raises:
            DataError: A sample is broken, or their sizes differ.
        """
        samples = self._samples(indices)
        for position, sample in enumerate(samples):
            for name, value in sample.items():
                if value.shape != samples[0][name].shape:
                    raise DataError(
                        f"samples of different sizes cannot form a batch: {self.names[indices[0]]} is "
                        f"{samples[0][name].shape}, {self.names[indices[position]]} is {value.shape}: "
                        "give data of one size (for images: pass --crop), or use batches of one (--batch-size 1)"
                    )
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

    def digest(self, indices: Indices) -> str:
        """Hash the prepared samples' bytes, in order, with SHA-256."""
        result = hashlib.sha256()
        for start in range(0, len(indices), _DIGEST_CHUNK):
            for sample in self._samples(indices[start : start + _DIGEST_CHUNK]):
                for value in sample.values():
                    result.update(np.ascontiguousarray(value).tobytes())
        return result.hexdigest()

    def thumbnail(self, index: int) -> Image.Image | None:
        """The image of a sample as the model sees it; None if samples are not images."""
        return None

    def frame(self, index: int) -> Frame | None:
        """Where the image of a sample lies in the model's input; None if samples are not images."""
        return None


class ImageDataset(Dataset):
    """Images for a model with one input."""

    def __init__(
        self, names: Sequence[str], labels: NDArray[np.int64] | None, spec: InputSpec, preprocessing: Preprocessing
    ) -> None:
        self._steps, self._channels = preprocessing.resolve(spec)
        super().__init__(names, labels, self._steps)
        self._spec = spec
        self._mode = "L" if self._channels == 1 else "RGB"
        # Pixels are whole numbers from 0 to 255, so values are looked up: computed in float64 and rounded once.
        self._table: Array = _values(np.arange(256.0), self._steps, self._channels).astype(spec.dtype)
        self._padding: Array = _padding_values(self._steps, self._channels).astype(spec.dtype)

    @abstractmethod
    def _image(self, index: int) -> Image.Image:
        """Read an image in the mode that the model takes."""

    def _size(self, index: int) -> tuple[int, int]:
        """Width and height of an image, turned upright."""
        return self._image(index).size

    def thumbnail(self, index: int) -> Image.Image:
        """The resized, cropped and padded image of a sample, as the model sees it."""
        ((content, frame),) = _decoded(self._framed, [index])
        shown = Image.new(self._mode, frame.size, _padding_colour(self._steps, self._channels))
        shown.paste(content, (frame.region[1].start, frame.region[0].start))
        return shown

    def frame(self, index: int) -> Frame:
        """Where the image of a sample lies in the model's input."""
        return Frame.of(self._size(index), self._steps, self.names[index])

    def _framed(self, index: int) -> tuple[Image.Image, Frame]:
        """What an image contributes to the input, and where that lies."""
        image = self._image(index)
        frame = Frame.of(image.size, self._steps, self.names[index])
        return frame.content(image, self._steps), frame

    def _samples(self, indices: Indices) -> list[Sample]:
        def prepare(index: int) -> Sample:
            image, frame = self._framed(index)
            pixels = np.asarray(image)
            # (H, W) or (H, W, C) -> (1, H, W, C)
            return self._normalised(pixels.reshape(1, *pixels.shape[:2], self._channels), [index], frame)[0]

        return _decoded(prepare, [int(index) for index in indices])

    def _normalised(self, pixels: NDArray[np.uint8], indices: Indices, frame: Frame) -> list[Sample]:
        """Turn what lies in a frame, (N, H, W, C), into values in the model's layout, channel order and type."""
        count, channels, (width, height) = len(pixels), self._channels, frame.size
        first = self._steps.layout == "NCHW"
        shape = (channels, height, width) if first else (height, width, channels)
        if not self._spec.fits(shape):
            raise DataError(
                f"{self.names[indices[0]]} has shape {shape} after preprocessing, but model input "
                f"{self._spec.name!r} expects {self._spec.sample_shape()}: {self._size_advice()}"
            )
        values = np.empty((count, *shape), self._spec.dtype)
        planes = values if first else np.moveaxis(values, -1, 1)
        is_padded = pixels.shape[1:3] != (height, width)
        rows, columns = frame.region
        for channel, (table, padding) in enumerate(zip(self._table, self._padding, strict=True)):
            position = channels - 1 - channel if self._steps.channel_order == "BGR" else channel
            if is_padded:
                planes[:, position] = padding
            planes[:, position, rows, columns] = table[pixels[..., channel]]
        return [{self._spec.name: value} for value in values]

    def _size_advice(self) -> str:
        height, width = self._spec.shape[2:] if self._steps.layout == "NCHW" else self._spec.shape[1:3]
        size = f"{width or height}x{height or width}"
        if self._steps.letterbox is not None:
            return f"pass --letterbox {size}"
        if isinstance(self._steps.resize, tuple) or (height or width) != (width or height):
            return f"pass --resize {size} to stretch images, --letterbox {size} to pad them, or give ready tensors"
        return f"pass --resize {height or width} --crop {height or width}, or a --preset that gives this size"


def _values(levels: Array, steps: Preprocessing, channels: int) -> NDArray[np.float64]:
    """The values that pixel levels become: (channels, levels), channels in red, green, blue order."""
    mean, std = (np.broadcast_to(np.array(values), channels)[:, None] for values in (steps.mean, steps.std))
    return np.asarray((levels * (1.0 if steps.scale is None else steps.scale) - mean) / std)


def _padding_values(steps: Preprocessing, channels: int) -> NDArray[np.float64]:
    """The value of the padding in each channel, in red, green, blue order."""
    if steps.pad_normalized:
        return np.full(channels, float(steps.pad_value))
    return _values(np.array([float(steps.pad_value)]), steps, channels)[:, 0]


def _padding_colour(steps: Preprocessing, channels: int) -> tuple[int, ...]:
    """The padding as a colour to look at: the pixel that would become its value."""
    mean, std = (np.broadcast_to(np.array(values), channels) for values in (steps.mean, steps.std))
    levels = (_padding_values(steps, channels) * std + mean) / (steps.scale or 1.0)
    return tuple(int(level) for level in np.rint(levels).clip(0, 255))


class FolderDataset(ImageDataset):
    """Image files of a folder, named by their paths in it and read on demand.

    As in training pipelines, only the first frame is used, and transparency is dropped.

    Raises:
        DataError: The first image does not fit the model.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: NDArray[np.int64] | None,
        spec: InputSpec,
        preprocessing: Preprocessing,
        unreadable: Sequence[str] = (),
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__(names, labels, spec, preprocessing)
        self.unreadable, self.classes = tuple(unreadable), tuple(classes)
        self._root = root
        self._samples([0])

    def _image(self, index: int) -> Image.Image:
        return _read_image(self._root / self.names[index], self._mode, upright=self._steps.exif)

    def _size(self, index: int) -> tuple[int, int]:
        return _image_size(self._root / self.names[index], upright=self._steps.exif)


def unreadable_images(root: Path, names: Sequence[str]) -> dict[str, DataError]:
    """Decode every image; return the reason for each one that fails."""

    def attempt(name: str) -> DataError | None:
        try:
            _read_image(root / name, "RGB", upright=False)
        except DataError as error:
            return error
        return None

    return {name: error for name, error in zip(names, _decoded(attempt, names), strict=True) if error is not None}


def _read_image(path: Path, wanted: str, *, upright: bool) -> Image.Image:
    if not path.is_file():  # reading from a pipe might never end
        raise DataError(f"{path} cannot be read as an image: it is missing or not a plain file. Replace or remove it")
    with _decoding(str(path)), Image.open(path, formats=_FORMATS) as image:
        return converted(image, wanted, str(path), upright=upright)


def converted(image: Image.Image, wanted: str, name: str, *, upright: bool) -> Image.Image:
    """An image in the mode that a model takes, and upright if that is wanted.

    Raises:
        DataError: When its pixels cannot be decoded, or have more than 8 bits per channel.
    """
    with _decoding(name):
        mode = image.mode
        result = image.convert(wanted)
        turn = _turn(image) if upright else None
    if ImageMode.getmode(mode).typestr not in _EIGHT_BITS:  # Pillow clips 16-bit values to 255
        raise DataError(f"{name} has pixels of mode {mode}: convert it to 8 bits per channel")
    return result if turn is None else result.transpose(turn)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on an image into an error of the data."""
    try:
        yield
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large to open safely: {error} Scale it down or remove it") from error
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        raise DataError(f"{name} cannot be read as an image: {error}. Replace or remove it") from error


def _image_size(path: Path, *, upright: bool) -> tuple[int, int]:
    """Width and height of an image that can be read, from its header."""
    with Image.open(path, formats=_FORMATS) as image:
        width, height = image.size
        across = upright and _turn(image) in _ACROSS
    return (height, width) if across else (width, height)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn a decoded image upright, by its EXIF orientation; broken EXIF data counts as none."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises many kinds
        return None


class PixelDataset(ImageDataset):
    """Images from one array of pixels: uint8, (N, H, W, C) with C 1 or 3.

    Raises:
        DataError: The images do not fit the model.
    """

    def __init__(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.int64] | None, spec: InputSpec, preprocessing: Preprocessing
    ) -> None:
        super().__init__([f"#{index}" for index in range(len(pixels))], labels, spec, preprocessing)
        self._pixels = pixels
        self._frame = Frame.of((pixels.shape[2], pixels.shape[1]), self._steps, self.names[0])
        self._as_is = pixels.shape[3] == self._channels and self._frame.is_identity
        self._samples([0])

    def _image(self, index: int) -> Image.Image:
        pixels = self._pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert(self._mode)

    def _size(self, index: int) -> tuple[int, int]:
        return self._pixels.shape[2], self._pixels.shape[1]

    def _samples(self, indices: Indices) -> list[Sample]:
        if self._as_is:  # neither resized, cropped nor converted
            return self._normalised(self._pixels[np.asarray(indices)], indices, self._frame)
        return super()._samples(indices)


class TensorDataset(Dataset):
    """Ready tensors: feeds (arrays by input name, with a leading batch axis), addressed sample by sample.

    Whole numbers for a floating-point input become (value * scale - mean) / std. Messages call the data ``where``.

    Raises:
        DataError: A feed does not fit the inputs, its whole numbers come without a scale, or labels and samples differ
            in number.
        OptionError: The preprocessing asks for more than a scale, mean and standard deviation.
    """

    def __init__(
        self,
        feeds: Sequence[Mapping[str, Array]],
        where: str,
        specs: Sequence[InputSpec],
        labels: NDArray[np.int64] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self._rows: list[tuple[Mapping[str, Array], int]] = []
        for number, feed in enumerate(feeds):
            name = where if len(feeds) == 1 else f"feed {number} of {where}"
            length = _check_feed(feed, name, specs, preprocessing)
            self._rows += [(feed, row) for row in range(length)]
        super().__init__([f"#{index}" for index in range(len(self._rows))], labels, preprocessing)
        self._specs = specs

    def _samples(self, indices: Indices) -> list[Sample]:
        samples = []
        for index in indices:
            feed, row = self._rows[index]
            name = f"sample {self.names[index]}"
            samples.append({spec.name: self._value(feed, row, spec, name) for spec in self._specs})
        return samples

    def _value(self, feed: Mapping[str, Array], row: int, spec: InputSpec, name: str) -> Array:
        value = feed[spec.name][row]
        if self.preprocessing is None or not is_unscaled(feed, spec):
            return _cast(value, spec, name)
        scaled = value * np.float64(self.preprocessing.scale or 1.0)
        axis = self.preprocessing.channel_axis(spec, value.shape)
        shape = [3 if position == axis else 1 for position in range(value.ndim)]
        mean, std = (
            np.broadcast_to(np.array(values), 1 if axis is None else 3).reshape(shape)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        return _cast((scaled - mean) / std, spec, name)


class JoinedDataset(Dataset):
    """The samples of several datasets, one after the other, named by where they come from.

    They have labels where all of them have, and their classes are numbered alike.
    """

    def __init__(self, parts: Sequence[tuple[Path, Dataset]]) -> None:
        self._parts = [part for _, part in parts]
        self._ends = np.cumsum([len(part) for part in self._parts])
        labels = [part.labels for part in self._parts if part.labels is not None]
        is_labelled = len(labels) == len(parts) and len({part.classes for part in self._parts}) == 1
        prepared = (part.preprocessing for part in self._parts if part.preprocessing is not None)
        names = [f"{place}/{name}" for place, part in parts for name in part.names]
        super().__init__(names, np.concatenate(labels) if is_labelled else None, next(prepared, None))
        self.unreadable = tuple(f"{place}/{name}" for place, part in parts for name in part.unreadable)
        self.classes = self._parts[0].classes if is_labelled else ()

    def _place(self, index: int) -> tuple[Dataset, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part, int(index) - int(self._ends[number]) + len(part)

    def _samples(self, indices: Indices) -> list[Sample]:
        places = [self._place(int(index)) for index in indices]
        found: dict[int, Sample] = {}
        for part in self._parts:
            mine = [position for position, (owner, _) in enumerate(places) if owner is part]
            if mine:
                found.update(zip(mine, part._samples([places[position][1] for position in mine]), strict=True))
        return [found[position] for position in range(len(places))]

    def thumbnail(self, index: int) -> Image.Image | None:
        """The image of a sample as the model sees it; None where it is none."""
        part, inside = self._place(index)
        return part.thumbnail(inside)

    def frame(self, index: int) -> Frame | None:
        """Where the image of a sample lies in the model's input; None where it is none."""
        part, inside = self._place(index)
        return part.frame(inside)


def is_unscaled(feed: Mapping[str, Array], spec: InputSpec) -> bool:
    """Whether a feed has whole numbers, or truth values, for a floating-point input."""
    return spec.name in feed and feed[spec.name].dtype.kind in "biu" and spec.dtype.kind in "fV"


def _check_feed(
    feed: Mapping[str, Array], where: str, specs: Sequence[InputSpec], preprocessing: Preprocessing | None
) -> int:
    """Check names, shapes and types of one feed against the model's inputs; return its number of samples."""
    wanted, given = {spec.name for spec in specs}, set(feed)
    if wanted != given:
        raise DataError(
            f"{where} holds {_listed(given)}, the model's inputs are {_listed(wanted)}: "
            "give exactly one array per input, under its name"
        )
    for spec in specs:
        value = feed[spec.name]
        if value.ndim == 0 or not spec.fits(value.shape[1:]):
            raise DataError(
                f"{where} has an array of shape {value.shape} for model input {spec.name!r}, which expects "
                f"{spec.sample_shape()} per sample: give that shape behind a batch axis"
            )
        if is_unscaled(feed, spec):
            if preprocessing is None or preprocessing.scale is None:
                raise DataError(
                    f"{where} has an array of {value.dtype} for model input {spec.name!r}, which expects {spec.dtype}, "
                    "and nothing says how to scale whole numbers: pass --preset, or --scale with --mean and --std "
                    "(--scale 1 takes them as they are), or give the values that the model was trained on"
                )
            preprocessing.channel_axis(spec, value.shape[1:])
            continue
        kinds = value.dtype.kind + spec.dtype.kind
        if value.dtype != spec.dtype and kinds != "ff" and not (kinds[0] in "biu" and kinds[1] in "iu"):
            raise DataError(
                f"{where} has an array of {value.dtype} for model input {spec.name!r}, which expects {spec.dtype}: "
                "convert it with .astype"
            )
    lengths = {spec.name: len(feed[spec.name]) for spec in specs}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{length} for {name!r}" for name, length in lengths.items())
        raise DataError(f"{where} has different numbers of samples: {listed}: give every input the same number")
    return next(iter(lengths.values()))


def _cast(value: Array, spec: InputSpec, name: str) -> Array:
    """Convert one sample to the input's type; a value that the type cannot hold is an error."""
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise DataError(f"{name} has NaN or infinite values for model input {spec.name!r}: remove or correct it")
    if value.dtype == spec.dtype:
        return np.asarray(value)
    with np.errstate(over="ignore"):
        result = value.astype(spec.dtype)
    if not (np.isfinite(result).all() if value.dtype.kind == "f" else np.array_equal(result, value)):
        raise DataError(
            f"{name} has values from {value.min()} to {value.max()}, which {spec.dtype} of model input {spec.name!r} "
            "cannot hold: rescale them"
        )
    return result


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "nothing"


def _decoded(decode: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Apply a function in threads, as Pillow decodes outside the interpreter lock; a decompression bomb is an error."""
    workers = min(len(items), os.cpu_count() or 1, _MAX_DECODERS)
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # broken EXIF data
        return list(pool.map(decode, items))
