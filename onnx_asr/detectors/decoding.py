"""What the outputs of detectors mean: boxes in the pixels of the input, with scores per class.

N images, A places or anchors, C classes, s the logistic function, (x, y) the cell of a grid:

    yolox          [N, A, 5+C], grids of stride 8, 16, 32 (64): centre (t + (x, y)) stride, size exp(t) stride,
                   score objectness * class
    yolov5         [N, A, 5+C], decoded: centre, size, objectness * class
    yolov8         [N, 4+C, A], decoded, also of YOLO11: centre, size, class
    ssd            [N, A, 4] corners and [N, A, C] scores
    nms            behind a non-maximum suppression: [N, K, 6] of corners, score, class; [n, 7] of image, corners,
                   class, score; or boxes, scores and classes apart, told by their names or types
    nanodet        per stride [N, A, C] scores and [N, A, 4 * 8] logits of the distances, in strides, of left, top,
                   right and bottom from the centre of the cell, (x, y) stride + (stride - 1) / 2
    fastestdet     [N, 5+C, H, W]: centre (tanh(t) + (x, y)) / (W, H) and size s(t), in shares of the input;
                   score objectness^0.6 * class^0.4
    yolofastestv2  for two strides 12, 3 and C maps: centre (2 s(t) - 1/2 + (x, y)) stride, size (2 s(t))^2 anchor,
                   score s(objectness) * softmax(class)

Corners are left, top, right, bottom, but in TensorFlow's ``detection_boxes`` top, left, bottom, right. Those of ssd and
nms may be in pixels of the input or in shares of it. Sources: the exports of YOLOX, Ultralytics, YOLOv7, NanoDet,
FastestDet, Yolo-FastestV2, the TensorFlow Object Detection API and torchvision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from onnx_asr.arrays import Array, Floats
from onnx_asr.detectors import DecodingName
from onnx_asr.detectors.boxes import Boxes
from onnx_asr.errors import ModelError

Size = tuple[int, int]
"""Width and height of the model's input."""
Outputs = Mapping[str, Array]
"""The outputs on one batch, by name."""

_STRIDES = (8, 16, 32, 64)
_DFL_BINS = 8  # of NanoDet: distances of 0 to 7 strides
_FASTEST_ANCHORS = np.array(
    [[[12.64, 19.39], [37.88, 51.48], [55.71, 138.31]], [[126.91, 78.23], [131.57, 214.55], [279.92, 258.87]]]
)
"""Width and height in pixels of Yolo-FastestV2's anchors for COCO: (stride 16 and 32, anchor, 2)."""


@dataclass(frozen=True)
class Decoding:
    """How outputs become boxes.

    Attributes:
        expected: The outputs that it reads, for messages.
        read: Outputs on a batch, size of the input and number of images to the boxes of every image; ValueError where
            the outputs are others.
        iou: Overlap above which the weaker one of two boxes of a class is dropped; None where the network does that.
        may_be_shares: Whether boxes may be in shares of the input.
    """

    expected: str
    read: Callable[[Outputs, Size, int], list[Boxes]]
    iou: float | None
    may_be_shares: bool = False

    def __call__(self, outputs: Outputs, size: Size, count: int) -> list[Boxes]:
        """The boxes of every image of a batch, before any is dropped.

        Raises:
            ModelError: The outputs are not of this kind.
        """
        try:
            return self.read(outputs, size, count)
        except ValueError as error:
            found = ", ".join(f"{name!r} {list(value.shape)}" for name, value in outputs.items())
            raise ModelError(
                f"the outputs {found} cannot be decoded so ({error}): {self.expected} are expected for an input of "
                f"{size[0]} x {size[1]} pixels; give another --decode"
            ) from error


def _yolox(outputs: Outputs, size: Size, count: int) -> list[Boxes]:
    values = _single(outputs, count, axes=3)
    grid, strides = _cells(size, values.shape[1])
    centres, sides = (values[..., :2] + grid) * strides, np.exp(np.minimum(values[..., 2:4], 20)) * strides
    return _by_class(_corners(centres, sides), values[..., 4:5] * values[..., 5:])


def _yolov5(outputs: Outputs, size: Size, count: int) -> list[Boxes]:
    values = _single(outputs, count, axes=3)
    return _by_class(_corners(values[..., :2], values[..., 2:4]), values[..., 4:5] * values[..., 5:])


def _yolov8(outputs: Outputs, size: Size, count: int) -> list[Boxes]:
    values = _single(outputs, count, axes=3, channels=1, least=5).swapaxes(1, 2)
    return _by_class(_corners(values[..., :2], values[..., 2:4]), values[..., 4:])


def _ssd(outputs: Outputs, size: Size, count: int) -> list[Boxes]:
    arrays = [_batched(value, count) for value in outputs.values()]
    if len(arrays) != 2:
        raise ValueError("there are not two outputs")
    found = [array for array in arrays if array.shape[-1] == 4]
    if not found:
        raise ValueError("none ends with an axis of 4")
    corners = found[0]
    scores = next(array for array in arrays if array is not corners)
    corners, scores = corners.reshape(count, -1, 4), scores.reshape(count, -1, scores.shape[-1])
    if corners.shape[1] != scores.shape[1]:
        raise ValueError(f"there are {corners.shape[1]} boxes and scores for {scores.shape[1]}")
    return _by_class(corners, scores)


def _nms(outputs: Outputs, size: Size, count: int) -> list[Boxes]:
    if len(outputs) > 1:
        return _separate(outputs, count)
    (rows,) = outputs.values()
    if rows.ndim == 2 and rows.shape[1] == 7:  # image, corners, class, score
        parts = [rows[rows[:, 0] == number] for number in range(count)]
        return [Boxes.of(part[:, 1:5], part[:, 6], part[:, 5]) for part in parts]
    values = _batched(rows, count)
    if values.ndim != 3 or values.shape[2] != 6:
        raise ValueError("the rows have neither 6 nor 7 columns")
    return [Boxes.of(part[:, :4], part[:, 4], part[:, 5]) for part in values]


def _separate(outputs: Outputs, count: int) -> list[Boxes]:
    fours = [name for name, value in outputs.items() if value.ndim > 1 and value.shape[-1] == 4]
    boxes = [name for name in fours if "box" in name.lower()] or fours
    boxes = [max(boxes, key=lambda name: outputs[name].ndim)] if boxes else []
    classes = [name for name in outputs if "class" in name.lower() or "label" in name.lower()]
    classes = classes or [name for name, value in outputs.items() if value.dtype.kind in "iu" and value.size > count]
    scores = [name for name, value in outputs.items() if "score" in name.lower() and name not in boxes]
    scores = scores or [
        name for name, value in outputs.items() if value.dtype.kind == "f" and name not in (*boxes, *classes)
    ]
    if not (boxes and classes and scores):
        raise ValueError("boxes, scores and classes cannot be told apart")
    corners, values, numbers = (_batched(outputs[names[0]], count) for names in (boxes, scores, classes))
    corners = corners.reshape(count, -1, 4)
    if boxes[0].partition(":")[0].endswith("detection_boxes"):
        corners = corners[..., [1, 0, 3, 2]]
    values, numbers = values.reshape(count, -1), numbers.reshape(count, -1)
    if not corners.shape[1] == values.shape[1] == numbers.shape[1]:
        raise ValueError("boxes, scores and classes differ in number")
    return [Boxes.of(*parts) for parts in zip(corners, values, numbers, strict=True)]


def _nanodet(outputs: Outputs, size: Size, count: int) -> list[Boxes]:
    arrays = [value.reshape(count, -1, value.shape[-1]) for value in outputs.values() if value.ndim > 1]
    scores = {value.shape[1]: value for value in arrays if value.shape[2] != 4 * _DFL_BINS}
    distances = {value.shape[1]: value for value in arrays if value.shape[2] == 4 * _DFL_BINS}
    corners, classes = [], []
    for stride in _STRIDES:
        grid = _grid(size, stride)
        if len(grid) not in scores or len(grid) not in distances:
            continue
        logits = distances.pop(len(grid)).reshape(count, -1, 4, _DFL_BINS).astype(np.float64)
        sides = _softmax(logits) @ np.arange(_DFL_BINS) * stride  # left, top, right, bottom of the centre
        centres = grid * stride + (stride - 1) / 2
        corners.append(np.concatenate([centres - sides[..., :2], centres + sides[..., 2:]], axis=-1))
        classes.append(scores.pop(len(grid)))
    if not corners or scores or distances:
        raise ValueError("they do not come in pairs of grids of stride 8, 16, 32")
    return _by_class(np.concatenate(corners, axis=1), np.concatenate(classes, axis=1))


def _fastestdet(outputs: Outputs, size: Size, count: int) -> list[Boxes]:
    maps = _single(outputs, count, axes=4, channels=1)
    height, width = maps.shape[2:]
    values = maps.reshape(*maps.shape[:2], -1).swapaxes(1, 2)  # (N, places, 5+C)
    cells, whole = np.array([width, height]), np.array(size)
    y, x = np.divmod(np.arange(height * width), width)
    centres = (np.tanh(values[..., 1:3]) + np.stack([x, y], axis=1)) / cells * whole
    scores = values[..., :1].clip(0, 1) ** 0.6 * values[..., 5:].clip(0, 1) ** 0.4
    return _by_class(_corners(centres, _logistic(values[..., 3:5]) * whole), scores)


def _yolofastestv2(outputs: Outputs, size: Size, count: int) -> list[Boxes]:
    arrays = sorted((_batched(value, count) for value in outputs.values()), key=lambda value: -value.shape[-1])
    if len(arrays) != 6 or any(value.ndim != 4 for value in arrays):
        raise ValueError("there are not six maps")
    corners, classes = [], []
    for level, anchors in zip((arrays[:3], arrays[3:]), _FASTEST_ANCHORS, strict=True):
        found = {value.shape[1]: value.astype(np.float64) for value in level}
        if len({value.shape[2:] for value in level}) > 1 or not {12, 3} < set(found):
            raise ValueError("a level has not 12, 3 and C maps")
        (number,) = set(found) - {12, 3}
        height, width = found[3].shape[2:]
        stride, (y, x) = size[1] / height, np.mgrid[:height, :width]
        boxes = _logistic(found[12].reshape(count, 3, 4, height, width))
        centres = (boxes[:, :, :2] * 2 - 0.5 + np.stack([x, y])) * stride  # (N, anchor, 2, H, W)
        sides = (boxes[:, :, 2:] * 2) ** 2 * anchors[:, :, None, None]
        scores = _logistic(found[3])[:, :, None] * _softmax(found[number], axis=1)[:, None]  # (N, anchor, C, H, W)
        places = _corners(np.moveaxis(centres, 2, -1), np.moveaxis(sides, 2, -1))
        corners.append(places.reshape(count, -1, 4))
        classes.append(np.moveaxis(scores, 2, -1).reshape(count, -1, number))
    return _by_class(np.concatenate(corners, axis=1), np.concatenate(classes, axis=1))


def _by_class(corners: Array, scores: Array) -> list[Boxes]:
    """(N, A, 4) and (N, A, C) as the boxes of every image."""
    return [Boxes.of(*parts) for parts in zip(corners, scores, strict=True)]


def _single(outputs: Outputs, count: int, axes: int, *, channels: int = -1, least: int = 6) -> Floats:
    """The first output, if it has so many axes, and so many values of a place along one; others are not read."""
    first = _batched(next(iter(outputs.values())), count, axes)
    if first.ndim != axes:
        raise ValueError(f"the first one has {first.ndim} axes, not {axes}")
    if first.shape[channels] < least:
        raise ValueError(f"a place has {first.shape[channels]} values, fewer than {least}")
    return np.asarray(first.astype(np.float64))


def _batched(value: Array, count: int, axes: int | None = None) -> Array:
    """An output with its batch axis, which outputs for one image may lack."""
    if count == 1 and (value.shape[:1] != (1,) or (axes is not None and value.ndim < axes)):
        value = value[None]
    if value.ndim == 0 or len(value) != count:
        raise ValueError(f"an output has {len(value) if value.ndim else 'no'} entries for {count} images")
    return value


def _grid(size: Size, stride: int) -> Floats:
    """X and y of the cells of a grid over the input, row by row: (cells, 2)."""
    width, height = (-(-side // stride) for side in size)
    y, x = np.divmod(np.arange(height * width), width)
    return np.stack([x, y], axis=1).astype(np.float64)


def _cells(size: Size, count: int) -> tuple[Floats, Floats]:
    """X and y of the cells of all grids, (A, 2), and their strides, (A, 1)."""
    for levels in (3, 4):
        grids = [_grid(size, stride) for stride in _STRIDES[:levels]]
        if sum(map(len, grids)) == count:
            strides = [np.full((len(grid), 1), float(stride)) for grid, stride in zip(grids, _STRIDES, strict=False)]
            return np.concatenate(grids), np.concatenate(strides)
    raise ValueError(f"{count} places are not those of grids of stride 8, 16, 32")


def _corners(centres: Array, sides: Array) -> Floats:
    return np.concatenate([centres - sides / 2, centres + sides / 2], axis=-1)


def _logistic(values: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-values)))


def _softmax(values: Floats, axis: int = -1) -> Floats:
    powers = np.exp(values - values.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


_TABLE: Mapping[DecodingName, Decoding] = {
    "yolox": Decoding("places [N, A, 5+C] of grids of stride 8, 16 and 32", _yolox, 0.65),
    "yolov5": Decoding("decoded boxes [N, A, 5+C]", _yolov5, 0.65),
    "yolov8": Decoding("decoded boxes [N, 4+C, A]", _yolov8, 0.65),
    "ssd": Decoding("boxes [N, A, 4] and scores [N, A, C]", _ssd, 0.5, may_be_shares=True),
    "nms": Decoding("rows [N, K, 6] or [n, 7], or boxes, scores and classes", _nms, None, may_be_shares=True),
    "nanodet": Decoding("scores [N, A, C] and distances [N, A, 32] for every stride", _nanodet, 0.6),
    "fastestdet": Decoding("maps [N, 5+C, H, W]", _fastestdet, 0.45),
    "yolofastestv2": Decoding("12, 3 and C maps for every one of two strides", _yolofastestv2, 0.45),
}


def decoding(name: DecodingName) -> Decoding:
    """A decoding by its name."""
    return _TABLE[name]
