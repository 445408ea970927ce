"""How an image is resized, cropped and padded, and where each of its points comes to lie in the model's input.

Along each axis ``x_input = x * scale + offset``, x being in pixels of the upright image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onnx_asr.arrays import Integers
from onnx_asr.data.preprocessing import Preprocessing
from onnx_asr.errors import DataError

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Frame:
    """Where an image lies in a model's input; every pair is width, height or x, y, in pixels.

    Attributes:
        image: Size of the upright image.
        resized: Size after resizing.
        size: Size of the input.
        offset: Where the upper left corner of the resized image lies; below 0 where the image is cropped.
    """

    image: tuple[int, int]
    resized: tuple[int, int]
    size: tuple[int, int]
    offset: tuple[int, int]

    @classmethod
    def of(cls, image: tuple[int, int], steps: Preprocessing, name: str) -> Frame:
        """The frame of an image; sizes and offsets are rounded as torchvision and the YOLO families round them.

        Args:
            image: Width and height.
            steps: The preprocessing, resolved for the model.
            name: Of the image, for messages.

        Raises:
            DataError: The image is smaller than the crop, or would become too large.
        """
        width, height = image
        if isinstance(steps.letterbox, tuple):
            factor = min(steps.letterbox[0] / width, steps.letterbox[1] / height)
            width, height = (max(1, round(side * factor)) for side in image)
            free = (steps.letterbox[0] - width, steps.letterbox[1] - height)
            offset = (free[0] // 2, free[1] // 2) if steps.pad == "centre" else (0, 0)
            return cls._checked(image, (width, height), steps.letterbox, offset, name)
        if isinstance(steps.resize, tuple):
            width, height = steps.resize
        elif isinstance(steps.resize, int):
            width, height = (int(steps.resize * side / min(image)) for side in image)
        if steps.crop is None:
            return cls._checked(image, (width, height), (width, height), (0, 0), name)
        if min(width, height) < steps.crop:
            raise DataError(
                f"{name} is {width} x {height} pixels, too small for a crop of {steps.crop} x {steps.crop}: "
                f"pass --resize {steps.crop} or more, or a smaller --crop"
            )
        offset = (-round((width - steps.crop) / 2), -round((height - steps.crop) / 2))
        return cls._checked(image, (width, height), (steps.crop, steps.crop), offset, name)

    @classmethod
    def _checked(
        cls,
        image: tuple[int, int],
        resized: tuple[int, int],
        size: tuple[int, int],
        offset: tuple[int, int],
        name: str,
    ) -> Frame:
        most = Image.MAX_IMAGE_PIXELS
        for width, height in (resized, size):
            if (width, height) != image and most is not None and width * height > most:
                raise DataError(
                    f"{name} is {image[0]} x {image[1]} pixels and would become {width} x {height}: remove it, or "
                    "give a smaller size"
                )
        return cls(image, resized, size, offset)

    @property
    def is_identity(self) -> bool:
        """Whether the image stays as it is."""
        return self.image == self.size and self.image == self.resized

    @property
    def region(self) -> tuple[slice, slice]:
        """Rows and columns of the input that the image covers."""
        (left, top), (width, height) = self.offset, self.resized
        rows = slice(max(top, 0), min(top + height, self.size[1]))
        return rows, slice(max(left, 0), min(left + width, self.size[0]))

    def content(self, image: Image.Image, steps: Preprocessing) -> Image.Image:
        """The image resized and cropped: what lies in :attr:`region`."""
        if image.size != self.resized:
            image = _resized(image, self.resized, steps.interpolation)
        rows, columns = self.region
        left, top = columns.start - self.offset[0], rows.start - self.offset[1]
        box = (left, top, left + columns.stop - columns.start, top + rows.stop - rows.start)
        return image if box == (0, 0, *image.size) else image.crop(box)

    def points_of_image(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points (..., 2) of the input, x and y, in pixels of the upright image."""
        scale = np.array(self.resized) / np.array(self.image)
        return np.asarray((points - np.array(self.offset)) / scale)


def _resized(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    if interpolation == "opencv-linear":
        return Image.fromarray(opencv_linear(np.asarray(image), size))
    return image.resize(size, _FILTERS[interpolation])


def opencv_linear(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize as OpenCV's INTER_LINEAR does for 8 bits: two pixels along each axis, in fixed-point arithmetic.

    With ``s = (i + 1/2) n_in / n_out - 1/2``, pixel i lies between floor(s) and floor(s) + 1. Weights are multiples of
    1/2048. The products of the rows lose 4 bits before, and 16 after they are weighted.

    Args:
        pixels: (H, W) or (H, W, C).
        size: Width and height of the result.

    Source: ``HResizeLinear`` and ``VResizeLinear`` in OpenCV's ``resize.cpp``.
    """
    width, height = size
    values = pixels.reshape(*pixels.shape[:2], -1).astype(np.int32)
    (left, right), (a, b) = _neighbours(values.shape[1], width, still=True)
    (above, below), (c, d) = _neighbours(values.shape[0], height, still=False)
    rows = (values[:, left] * a[:, None] + values[:, right] * b[:, None]) >> 4  # (H, width, C)
    upper, lower = c[:, None, None] * rows[above] >> 16, d[:, None, None] * rows[below] >> 16
    result: NDArray[np.uint8] = ((upper + lower + 2) >> 2).astype(np.uint8)
    return result.reshape(height, width, *pixels.shape[2:])


def _neighbours(have: int, want: int, *, still: bool) -> tuple[Integers, NDArray[np.int32]]:
    """Indices (2, want) and weights (2, want) of the pixels on both sides; ``still``: one alone counts at an edge."""
    place = ((np.arange(want) + 0.5) * (1 / (want / have)) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = (place - first).astype(np.float32)
    if still:
        share[(first < 0) | (first >= have - 1)] = 0
    weights = np.rint(np.stack([1 - share, share]) * np.float32(2048)).astype(np.int32)
    return np.stack([first, first + 1]).clip(0, have - 1), weights
