"""One item of a loader, a dataset or a reader of another library, told by what it can do: nothing is imported for it.

An item is a feed (a dict of arrays by input name), a row with a column of images, a pair of samples and labels, or the
samples alone: a tensor or array of one sample or a batch, or one or more Pillow images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from onnx_asr.arrays import Array, Integers
from onnx_asr.data.preprocessing import InputSpec, Preprocessing
from onnx_asr.errors import DataError

_SAMPLES = ("image", "images", "img", "pixel_values")
"""Columns that hold the samples of a model with one input, as Hugging Face, torchvision and Ultralytics name them."""
LABELS = ("label", "labels")
"""Columns that hold classes."""


@dataclass(frozen=True)
class Item:
    """What one item holds: ready tensors or images.

    Attributes:
        feed: Arrays by input name, with a batch axis; empty where there are images.
        images: Images, one a sample.
        labels: Class index of each sample, if the item has it.
        is_batch: Whether the item came as a batch, and not as one sample.
    """

    feed: Mapping[str, Array]
    images: Sequence[Image.Image]
    labels: Integers | None
    is_batch: bool

    @property
    def count(self) -> int:
        """Number of samples; 0 for arrays without a batch axis, which the model's inputs are checked against later."""
        if self.images:
            return len(self.images)
        return max((len(value) for value in self.feed.values() if value.ndim), default=0)


@dataclass(frozen=True)
class Reader:
    """Reads items for a model.

    Attributes:
        inputs: The model's inputs.
        preprocessing: How images are prepared, if it was given.
    """

    inputs: Sequence[InputSpec]
    preprocessing: Preprocessing | None

    def read(self, item: object, where: str) -> Item:
        """What an item holds; ``where`` names it in messages.

        Raises:
            DataError: When it is none of the known kinds, or has none of the model's inputs.
        """
        samples, labels = _pair(item)
        if isinstance(samples, Mapping):
            values = dict(samples)
            wanted = {spec.name for spec in self.inputs}
            for name in (name for name in LABELS if name in values and name not in wanted):
                labels = values.pop(name)
            if not wanted & values.keys() and len(self.inputs) == 1:
                return self._samples(values[_column(values, where, self.inputs[0])], labels, where)
            return self._feed(values, labels, where)
        if len(self.inputs) > 1 or not (_is_samples(samples) or _is_images(samples)):
            also = ", an array or tensor, an image, or a pair of one of these and labels"
            raise DataError(
                f"{where} is of type {type(item).__name__}: give a dict from input name to array"
                + ("" if len(self.inputs) > 1 else also)
            )
        return self._samples(samples, labels, where)

    def _feed(self, values: Mapping[str, Any], labels: object, where: str) -> Item:
        feed = {name: as_array(value, where, name) for name, value in values.items()}
        specs = {spec.name: spec for spec in self.inputs}
        single = all(name in specs and _is_one(value, specs[name]) for name, value in feed.items())
        if single:
            feed = {name: value[None] for name, value in feed.items()}
        count = max((len(value) for value in feed.values() if value.ndim), default=0)
        return Item(feed, (), _classes(labels, count), not single)

    def _samples(self, samples: Any, labels: object, where: str) -> Item:
        """One sample, or a batch of them, for a model with one input."""
        if isinstance(samples, Image.Image):
            return Item({}, (samples,), _classes(labels, 1), False)
        if _is_images(samples):
            return Item({}, tuple(samples), _classes(labels, len(samples)), True)
        (spec,) = self.inputs
        value = as_array(samples, where, spec.name)
        is_tensor = _is_one(value, spec) and value.shape[-1] not in (1, 3)
        if are_images(value, spec, self.preprocessing) and not is_tensor:
            single = value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (1, 3))
            pixels = value[None] if single else value
            pixels = pixels[..., 0] if pixels.ndim == 4 and pixels.shape[3] == 1 else pixels
            images = tuple(Image.fromarray(image) for image in np.ascontiguousarray(pixels))
            return Item({}, images, _classes(labels, len(images)), not single)
        return self._feed({spec.name: value}, labels, where)


def as_array(value: Any, where: str, name: str) -> Array:
    """The values of an array, or of a tensor of torch (also on another device) or TensorFlow.

    Raises:
        DataError: When it is none.
    """
    try:
        for step in ("detach", "cpu"):  # of torch, where the tensor has a gradient or is on another device
            value = getattr(value, step)() if callable(getattr(value, step, None)) else value
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: {name!r} is not an array ({error}): give numbers in equal rows") from error


def are_images(array: Array, spec: InputSpec, preprocessing: Preprocessing | None) -> bool:
    """Whether an array that could be a ready tensor holds pixels; one that only fits as a tensor does not."""
    if array.dtype != np.uint8 or len(spec.shape) != 4 or (preprocessing is None and spec.dtype == np.uint8):
        return False
    return array.ndim != 4 or array.shape[3] in (1, 3) or not spec.fits(array.shape[1:])


def _is_samples(value: object) -> bool:
    """Whether a value can be samples: an image, or what numpy makes an array of without copying lists."""
    return isinstance(value, Image.Image) or hasattr(value, "__array__")


def _is_images(value: object) -> bool:
    """Whether a value is a list of images."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, Image.Image) for item in value)


def _pair(item: Any) -> tuple[Any, Any]:
    """Samples and labels of a pair such as torch's loaders give, which may have more behind them; else the item."""
    if not isinstance(item, (tuple, list)) or not item or _is_images(item):
        return item, None
    if not (isinstance(item[0], Mapping) or _is_samples(item[0]) or _is_images(item[0])):
        return item, None
    return item[0], item[1] if len(item) > 1 else None


def _is_one(value: Array, spec: InputSpec) -> bool:
    """Whether an array is one sample of an input, without a batch axis; one that can be read as pixels is not."""
    return value.ndim == len(spec.shape) - 1 and spec.fits(value.shape)


def _column(row: Mapping[str, Any], where: str, spec: InputSpec) -> str:
    """The column of the samples."""
    for name in (*_SAMPLES, *(name for name, value in row.items() if isinstance(value, Image.Image))):
        if name in row:
            return name
    raise DataError(
        f"{where} holds {', '.join(map(repr, row)) or 'nothing'}: give images as {_SAMPLES[0]!r}, or ready tensors "
        f"under the name of the model's input, {spec.name!r}"
    )


def _classes(labels: object, count: int) -> Integers | None:
    """Class indices, one a sample; None where what stands in their place is something else, such as boxes."""
    if labels is None:
        return None
    try:
        values = as_array(labels, "", "")
    except DataError:
        return None
    if values.dtype.kind not in "iu" or values.size != count or values.ndim > 2:
        return None
    return values.reshape(count).astype(np.int64)
