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
    """

    unreadable: tuple[str, ...] = ()
    is_cut: bool = False

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
        """The resized and cropped image of a sample, as the model sees it; None if samples are not images."""
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
        self._table = _table(self._steps, self._channels, spec.dtype)

    @abstractmethod
    def _image(self, index: int) -> Image.Image:
        """Read an image in the mode that the model takes."""

    def thumbnail(self, index: int) -> Image.Image:
        """The resized and cropped image of a sample, as the model sees it."""
        return _decoded(self._frame, [index])[0]

    def _frame(self, index: int) -> Image.Image:
        return _framed(self._image(index), self._steps, self.names[index])

    def _samples(self, indices: Indices) -> list[Sample]:
        def prepare(index: int) -> Sample:
            pixels = np.asarray(self._frame(index))
            # (H, W) or (H, W, C) -> (1, H, W, C)
            return self._normalised(pixels.reshape(1, *pixels.shape[:2], self._channels), [index])[0]

        return _decoded(prepare, [int(index) for index in indices])

    def _normalised(self, pixels: NDArray[np.uint8], indices: Indices) -> list[Sample]:
        """Turn framed pixels (N, H, W, C) into values in the model's layout, channel order and type."""
        count, height, width, channels = pixels.shape
        first = self._steps.layout == "NCHW"
        shape = (channels, height, width) if first else (height, width, channels)
        if not self._spec.fits(shape):
            raise DataError(
                f"{self.names[indices[0]]} has shape {shape} after preprocessing, but model input "
                f"{self._spec.name!r} expects {self._spec.sample_shape()}: {self._size_advice()}"
            )
        values = np.empty((count, *shape), self._spec.dtype)
        planes = values if first else np.moveaxis(values, -1, 1)
        for channel, table in enumerate(self._table):
            position = channels - 1 - channel if self._steps.channel_order == "BGR" else channel
            planes[:, position] = table[pixels[..., channel]]
        return [{self._spec.name: value} for value in values]

    def _size_advice(self) -> str:
        height, width = self._spec.shape[2:] if self._steps.layout == "NCHW" else self._spec.shape[1:3]
        if height is not None and width is not None and height != width:
            return f"crops are square, so give images of {width} x {height} pixels or ready tensors"
        size = height or width
        return f"pass --resize {size} --crop {size}, or a --preset that gives this size"


def _table(steps: Preprocessing, channels: int, dtype: np.dtype[Any]) -> Array:
    """The value of each pixel level: (channels, 256), channels in red, green, blue order.

    Pixels are whole numbers from 0 to 255, so values are looked up: computed in float64 and rounded once to the type.
    """
    mean, std = (np.broadcast_to(np.array(values), channels)[:, None] for values in (steps.mean, steps.std))
    levels = np.arange(256.0) * (1.0 if steps.scale is None else steps.scale)
    values: Array = ((levels - mean) / std).astype(dtype)
    return values


def _framed(image: Image.Image, steps: Preprocessing, name: str) -> Image.Image:
    """Resize and crop an image; sizes and offsets are rounded as torchvision's `Resize` and `CenterCrop` round them.

    Raises:
        DataError: The image is smaller than the crop, or would become too large.
    """
    width, height = image.size
    short = min(width, height)
    if steps.resize is not None and short != steps.resize:
        width, height = (int(steps.resize * side / short) for side in (width, height))
        if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
            raise DataError(
                f"{name} is {image.width} x {image.height} pixels and would become {width} x {height}: remove it"
            )
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if steps.crop is not None and (width, height) != (steps.crop, steps.crop):
        if min(width, height) < steps.crop:
            raise DataError(
                f"{name} is {width} x {height} pixels, too small for a crop of {steps.crop} x {steps.crop}: "
                f"pass --resize {steps.crop} or more, or a smaller --crop"
            )
        left, top = round((width - steps.crop) / 2), round((height - steps.crop) / 2)
        image = image.crop((left, top, left + steps.crop, top + steps.crop))
    return image


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
    ) -> None:
        super().__init__(names, labels, spec, preprocessing)
        self.unreadable = tuple(unreadable)
        self._root = root
        self._samples([0])

    def _image(self, index: int) -> Image.Image:
        return _read_image(self._root / self.names[index], self._mode, upright=self._steps.exif)


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
        first = self._image(0)
        self._as_is = pixels.shape[3] == self._channels and _framed(first, self._steps, self.names[0]) is first
        self._samples([0])

    def _image(self, index: int) -> Image.Image:
        pixels = self._pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert(self._mode)

    def _samples(self, indices: Indices) -> list[Sample]:
        if self._as_is:  # neither resized, cropped nor converted
            return self._normalised(self._pixels[np.asarray(indices)], indices)
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
