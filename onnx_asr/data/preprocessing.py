"""How an image becomes a model input.

    pixels (H, W, C) in 0..255, upright
      -> short side to `resize`, or stretched to it  -> centre crop to `crop` x `crop`
         or, as large as it fits, into `letterbox`, padded with `pad_value`
      -> y = (x * scale - mean) / std                -> RGB or BGR, channels first or last

`data.framing` and `data.datasets` carry out the steps. Nothing heavy is imported here, since the command line reads
its options here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from onnx_asr.errors import DataError, OptionError

if TYPE_CHECKING:
    import numpy as np

Layout = Literal["NCHW", "NHWC"]
ChannelOrder = Literal["RGB", "BGR"]
Padding = Literal["centre", "corner"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest", "opencv-linear"]
Size = int | tuple[int, int] | Literal["model"]
"""A side, a width and height, or the width and height of the model's input."""


@dataclass(frozen=True)
class InputSpec:
    """Name, element type and shape of one model input; axis 0 is the batch, an axis of None is open."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a sample of this shape, without the batch axis, fits the input."""
        return len(shape) == len(self.shape) - 1 and all(
            want in (None, size) for size, want in zip(shape, self.shape[1:], strict=True)
        )

    def sample_shape(self) -> str:
        """The shape of one sample, without the batch axis, for messages: `(3, ?, ?)`."""
        return "(" + ", ".join("?" if size is None else str(size) for size in self.shape[1:]) + ")"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input.

    Attributes:
        resize: Length of the short side after resizing, such as 256; or the width and height to stretch to, such as
            640x480; or "model", the width and height of the model's input. By default the size is kept.
        crop: Side of the square cut from the centre; by default nothing is cut.
        scale: Factor on pixel values 0..255, such as 0.00392157 (1/255), and on ready tensors of whole numbers for a
            floating-point input; only an integer input needs none.
        mean: Subtracted after scaling: one value, or one per channel as red,green,blue, whatever the channel order.
        std: Divided by after that, in the same form.
        layout: Where the channels go; by default read from the model, and NCHW where the model leaves it open.
        channel_order: Order in which the model expects the channels.
        exif: Turn and mirror image files as the orientation in their EXIF data says, as cameras mean it. (Pillow always
            turns TIFF.)
        letterbox: Size to fit the whole image into, its proportions kept, and to pad the rest: a side, such as 416, a
            width and height, or "model", the width and height of the model's input.
        pad: Where the image lies in its letterbox: in the centre, or in the upper left corner.
        pad_value: Value of the padding: a pixel value 0..255 for all channels.
        pad_normalized: The padding's value is one of the normalized input, not of a pixel: 0 for detectors that were
            trained on images padded after normalization.
        interpolation: How images are resized: "bilinear", "bicubic" and "lanczos", antialiased, and "nearest" as in
            Pillow and torchvision; "opencv-linear", not antialiased, bit for bit as OpenCV's INTER_LINEAR.
    """

    resize: Size | None = None
    crop: int | None = None
    scale: float | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Layout | None = None
    channel_order: ChannelOrder = "RGB"
    exif: bool = True
    letterbox: Size | None = None
    pad: Padding = "centre"
    pad_value: float = 114.0
    pad_normalized: bool = False
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        self._check_geometry()
        if self.scale is not None and (not _is_number(self.scale) or self.scale == 0):
            raise OptionError(f"scale is {self.scale!r}: give a factor other than 0 (1/255 is {1 / 255})")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if not isinstance(values, tuple) or len(values) not in (1, 3) or not all(map(_is_number, values)):
                raise OptionError(f"{key} is {values!r}: give one number, or three (red, green, blue)")
        if any(value <= 0 for value in self.std):
            raise OptionError(f"std is {self.std!r}: give values above 0")
        if self.layout not in (None, "NCHW", "NHWC"):
            raise OptionError(f"layout is {self.layout!r}: give NCHW or NHWC")
        if self.channel_order not in ("RGB", "BGR"):
            raise OptionError(f"channel order is {self.channel_order!r}: give RGB or BGR")
        for key in ("exif", "pad_normalized"):
            if not isinstance(getattr(self, key), bool):
                raise OptionError(f"{key.replace('_', '-')} is {getattr(self, key)!r}: give true or false")

    def _check_geometry(self) -> None:
        for key in ("resize", "letterbox"):
            size = getattr(self, key)
            if not (size in (None, "model") or _is_side(size) or _is_pair(size)):
                raise OptionError(
                    f"{key} is {size!r}: give a whole number of pixels from 1 up, a width and a height such as "
                    "[640, 480], or 'model'"
                )
        if self.crop is not None and not _is_side(self.crop):
            raise OptionError(f"crop is {self.crop!r}: give a whole number of pixels from 1 up")
        if self.letterbox is not None and (self.resize is not None or self.crop is not None):
            raise OptionError(
                f"letterbox {self.letterbox!r} came with {'crop' if self.resize is None else 'resize'}: give only one, "
                "as a letterbox holds the whole image"
            )
        short = min(self.resize) if isinstance(self.resize, tuple) else self.resize
        if self.crop is not None and isinstance(short, int) and self.crop > short:
            raise OptionError(
                f"crop {self.crop} is larger than the short side after resize {self.resize}: give a smaller crop"
            )
        if not _is_number(self.pad_value):
            raise OptionError(f"pad-value is {self.pad_value!r}: give a number")
        if not self.pad_normalized and not 0 <= self.pad_value <= 255:
            raise OptionError(
                f"pad-value {self.pad_value} is no pixel value from 0 to 255: give one, or --pad-normalized for a "
                "value of the normalized input"
            )
        for key, kinds in (("pad", get_args(Padding)), ("interpolation", get_args(Interpolation))):
            if getattr(self, key) not in kinds:
                raise OptionError(f"{key} is {getattr(self, key)!r}: give one of {', '.join(kinds)}")
        if self.letterbox is None:
            changed = [name for name, default in _PADDING.items() if getattr(self, name) != default]
            if changed:
                name = changed[0].replace("_", "-")
                raise OptionError(f"{name} was given without a letterbox to pad: give --letterbox, too")

    @classmethod
    def from_options(
        cls, *, preset: str | None = None, file: str | os.PathLike[str] | None = None, **changes: Any
    ) -> Preprocessing | None:
        """Build a preprocessing from a preset or a TOML file, with single attributes replaced; None if none are given.

        Args:
            preset: A name from `PRESETS` to start from.
            file: A TOML file to start from instead; its keys are the attributes of this class.
            **changes: Attributes to replace, unless None; for `mean` and `std`, a number stands for all channels.
                A letterbox replaces a resize and a crop, and the other way round.

        Raises:
            OptionError: A name, a value or a file is invalid.
        """
        if preset is not None and file is not None:
            raise OptionError(f"both a preset ({preset}) and a preprocessing file ({file}) were given: give only one")
        given = {key: value for key, value in changes.items() if value is not None}
        base = cls()
        if preset is not None:
            if preset not in PRESETS:
                raise OptionError(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}")
            base = PRESETS[preset]
        elif file is not None:
            base = cls(**_with_tuples(_read_toml(Path(file))))
        elif not given:
            return None
        if "letterbox" in given:
            base = dataclasses.replace(base, resize=None, crop=None)
        elif "resize" in given or "crop" in given:
            base = dataclasses.replace(base, letterbox=None, **_PADDING)
        return dataclasses.replace(base, **_with_tuples(given))

    def resolve(self, spec: InputSpec) -> tuple[Preprocessing, int]:
        """This preprocessing with its layout and sizes set (without scaling, for an integer input); the channels.

        Raises:
            DataError: The input does not take images, or not with this preprocessing.
        """
        what = f"model input {spec.name!r} ({spec.dtype}, {spec.sample_shape()} per sample)"
        if len(spec.shape) != 4:
            raise DataError(f"the data are images, but {what} has no height, width and channels: pass ready tensors")
        axes: dict[Layout, int] = {"NCHW": 1, "NHWC": 3}
        fixed = [layout for layout, axis in axes.items() if spec.shape[axis] in (1, 3)]
        if self.layout is not None and len(fixed) == 1 and fixed[0] != self.layout:
            raise DataError(f"layout {self.layout} was given, but {what} is {fixed[0]}: pass --layout {fixed[0]}")
        layout = self.layout or (fixed[0] if len(fixed) == 1 else "NCHW")
        channels = spec.shape[axes[layout]]
        if channels is None:
            channels = 3
        if channels not in (1, 3):
            raise DataError(f"an image has 1 or 3 channels, but {what} has {channels}: pass ready tensors")

        steps = dataclasses.replace(self, layout=layout, **self._sizes(spec, layout, what))
        if spec.dtype.kind in "iu":
            if spec.dtype.kind == "i" and spec.dtype.itemsize == 1:
                raise DataError(f"{what} cannot hold pixel values 0..255: pass ready tensors")
            if self.letterbox is not None and not (float(self.pad_value).is_integer() and 0 <= self.pad_value <= 255):
                raise DataError(f"pad-value {self.pad_value} does not fit {what}: give a whole number from 0 to 255")
            return dataclasses.replace(steps, scale=None, mean=(0.0,), std=(1.0,), pad_normalized=False), channels
        if spec.dtype.kind not in "fV":  # V: bfloat16 of ml_dtypes
            raise DataError(f"the data are images, but {what} does not take numbers: pass ready tensors")
        if self.scale is None:
            raise DataError(
                f"the data are images, but nothing says how to normalise their pixels for {what}: "
                f"pass --preset ({', '.join(PRESETS)}), or --scale with --mean and --std"
            )
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) > channels:
                raise DataError(
                    f"{key} has {len(values)} values, but {what} has 1 channel: pass --{key} with one value"
                )
        return steps, channels

    def _sizes(self, spec: InputSpec, layout: Layout, what: str) -> dict[str, Any]:
        """Resize and letterbox with the model's width and height in place of "model", and with both sides."""
        found: dict[str, Any] = {}
        height, width = spec.shape[2:] if layout == "NCHW" else spec.shape[1:3]
        for key in ("resize", "letterbox"):
            size = getattr(self, key)
            if size == "model":
                if height is None or width is None:
                    raise DataError(
                        f"the images are to get the size of {what}, which leaves it open: pass a size, such as "
                        f"--{key} 640x640"
                    )
                found[key] = (width, height)
            elif key == "letterbox" and isinstance(size, int):
                found[key] = (size, size)
        return found

    def channel_axis(self, spec: InputSpec, shape: tuple[int, ...]) -> int | None:
        """The channel axis of one sample of whole numbers, to which ``scale``, ``mean`` and ``std`` are applied.

        None where mean and std are the same for all channels.

        Raises:
            OptionError: This asks for what applies to images alone, or has means of channels that are not there.
        """
        what = f"ready tensors of shape {shape} for model input {spec.name!r}"
        sides = shape[:2] if self.layout == "NHWC" or (len(shape) == 3 and shape[0] not in (1, 3)) else shape[1:]
        if not self._leaves(tuple(sides)):
            raise OptionError(
                f"{what} are not resized, cropped or padded: give --scale, --mean and --std alone, or images"
            )
        if self.channel_order != "RGB":
            raise OptionError(f"{what} keep the order of their channels: drop --channel-order, or give images")
        if len(self.mean) == len(self.std) == 1:
            return None
        axis = 0 if sides == shape[1:] else 2
        if len(shape) != 3 or shape[axis] != 3:
            raise OptionError(f"{what} have no 3 channels: give --mean and --std with one value each")
        return axis

    def _leaves(self, sides: tuple[int, ...]) -> bool:
        """Whether a sample of these sides (height, width) would be neither resized, cropped nor padded."""
        if self.crop is not None:
            return sides == (self.crop, self.crop)
        if isinstance(self.resize, int):
            return min(sides, default=0) == self.resize
        for size in (self.resize, (self.letterbox,) * 2 if isinstance(self.letterbox, int) else self.letterbox):
            if isinstance(size, tuple) and sides != size[::-1]:
                return False
        return True


_PADDING: dict[str, Any] = {
    item.name: item.default for item in dataclasses.fields(Preprocessing) if item.name.startswith("pad")
}
"""The fields that say how a letterbox is padded, with their defaults."""


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_side, value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn sequences, and numbers for `mean` and `std`, into tuples; anything else stays, to be refused later."""
    found = dict(values)
    for key, value in values.items():
        if key in ("mean", "std") and _is_number(value):
            found[key] = (value,)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            found[key] = tuple(value)
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]
    try:
        with path.open("rb") as stream:
            values: dict[str, Any] = tomllib.load(stream)
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise OptionError(f"cannot read the preprocessing file {path}: {error}; give a TOML file") from error
    keys = [field.name for field in dataclasses.fields(Preprocessing)]
    unknown = sorted(set(values) - set(keys))
    if unknown:
        raise OptionError(f"{path} sets {', '.join(unknown)}: the known keys are {', '.join(keys)}")
    return values


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

PRESETS: dict[str, Preprocessing] = {
    "imagenet": Preprocessing(resize=256, crop=224, scale=1 / 255, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "cifar10": Preprocessing(scale=1 / 255, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    "tf": Preprocessing(resize=256, crop=224, scale=1 / 127.5, mean=(1.0,)),
    "digits": Preprocessing(scale=1 / 255, mean=(0.5,), std=(0.5,)),
    "unit": Preprocessing(scale=1 / 255),
    "raw": Preprocessing(scale=1.0),
    "yolox": Preprocessing(
        letterbox="model", pad="corner", scale=1.0, channel_order="BGR", interpolation="opencv-linear"
    ),
    "yolov5": Preprocessing(letterbox="model", scale=1 / 255, interpolation="opencv-linear"),  # also of v8 and 11
    "ssd": Preprocessing(resize="model", scale=1 / 127.5, mean=(1.0,), interpolation="opencv-linear"),
    "nanodet": Preprocessing(
        letterbox="model",
        pad_value=0.0,
        scale=1.0,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        channel_order="BGR",
        interpolation="opencv-linear",
    ),
    "fastestdet": Preprocessing(resize="model", scale=1 / 255, channel_order="BGR", interpolation="opencv-linear"),
}
