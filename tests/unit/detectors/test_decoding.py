"""Decodings: known boxes are written as a detector would put them out, and have to come back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnx_asr.detectors import DECODINGS, DecodingName
from onnx_asr.detectors.boxes import Boxes
from onnx_asr.detectors.decoding import decoding
from onnx_asr.errors import ModelError
from tests.scorer import scorer

SIZE = (96, 64)  # width, height
CLASSES = 5
Outputs = dict[str, np.ndarray]
# Of two images: x and y of a centre, width, height, class, score.
TRUTH = [[(40.0, 20.0, 30.0, 24.0, 3, 0.9), (70.0, 50.0, 20.0, 16.0, 0, 0.6)], [(20.0, 44.0, 36.0, 30.0, 4, 0.8)]]


def logit(value: float) -> float:
    return float(np.log(value / (1 - value)))


def yolox(count: int) -> Outputs:
    values = np.full((count, 96 + 24 + 6, 5 + CLASSES), 0.0)
    for image, boxes in zip(values, TRUTH, strict=False):
        for x, y, width, height, number, score in boxes:
            column, row = int(x // 16), int(y // 16)  # of the grid of stride 16, which has 6 x 4 cells
            place = image[96 + row * 6 + column]
            place[:5] = x / 16 - column, y / 16 - row, np.log(width / 16), np.log(height / 16), score / 0.95
            place[5 + number] = 0.95
    return {"out": values}


def yolov5(count: int) -> Outputs:
    values = np.zeros((count, 40, 5 + CLASSES))
    for image, boxes in zip(values, TRUTH, strict=False):
        for place, (*box, number, score) in zip(image[7:], boxes, strict=False):
            place[:5] = *box, score / 0.95
            place[5 + number] = 0.95
    return {"out": values, "grid": np.zeros((count, 3, 4, 4, 10))}


def yolov8(count: int) -> Outputs:
    values = np.zeros((count, 40, 4 + CLASSES))
    for image, boxes in zip(values, TRUTH, strict=False):
        for place, (*box, number, score) in zip(image[3:], boxes, strict=False):
            place[:4], place[4 + number] = box, score
    return {"out": values.swapaxes(1, 2)}


def corners_of(box: tuple[float, ...]) -> list[float]:
    x, y, width, height = box[:4]
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def ssd(count: int) -> Outputs:
    boxes, scores = np.zeros((count, 12, 4)), np.zeros((count, 12, CLASSES))
    for image in range(count):
        for place, box in enumerate(TRUTH[image]):
            boxes[image, place], scores[image, place, int(box[4])] = corners_of(box), box[5]
    return {"scores": scores, "boxes": boxes}


def padded(count: int) -> np.ndarray:
    rows = np.zeros((count, 4, 6))
    for image in range(count):
        for place, box in enumerate(TRUTH[image]):
            rows[image, place] = *corners_of(box), box[5], box[4]
    return rows


def nms_rows(count: int) -> Outputs:
    return {"out": padded(count)}


def nms_flat(count: int) -> Outputs:
    rows = [[image, *corners_of(box), box[4], box[5]] for image in range(count) for box in TRUTH[image]]
    return {"out": np.array(rows)}


def nms_tensorflow(count: int) -> Outputs:
    rows = padded(count)
    return {
        "num_detections:0": np.array([len(boxes) for boxes in TRUTH[:count]], np.float32),
        "detection_boxes:0": rows[..., [1, 0, 3, 2]] / [64, 96, 64, 96],
        "detection_scores:0": rows[..., 4],
        "detection_classes:0": rows[..., 5],
    }


def nms_torchvision(count: int) -> Outputs:
    rows = padded(1)[0]
    return {"1024": rows[:, :4], "1025": rows[:, 5].astype(np.int64), "1026": rows[:, 4].astype(np.float32)}


def nanodet(count: int) -> Outputs:
    cells = {8: (12, 8), 16: (6, 4), 32: (3, 2)}
    outputs = {}
    for stride, (width, height) in reversed(cells.items()):
        scores, logits = np.zeros((count, width * height, CLASSES)), np.zeros((count, width * height, 4, 8))
        if stride == 8:
            for image in range(count):
                for x, y, w, h, number, score in TRUTH[image]:
                    column, row = int(x // 8), int(y // 8)
                    place = row * width + column
                    centre = column * 8 + 3.5, row * 8 + 3.5
                    left, top = centre[0] - (x - w / 2), centre[1] - (y - h / 2)
                    for side, distance in enumerate((left, top, w - left, h - top)):
                        lower = int(distance / 8)  # expected distance: between two bins
                        share = distance / 8 - lower
                        logits[image, place, side] = -80
                        logits[image, place, side, lower] = np.log(1 - share)
                        logits[image, place, side, lower + 1] = np.log(share) if share else -80
                    scores[image, place, int(number)] = score
        outputs[f"dis_{stride}"] = logits.reshape(count, -1, 32)
        outputs[f"cls_{stride}"] = scores
    return outputs


def fastestdet(count: int) -> Outputs:
    maps = np.zeros((count, 5 + CLASSES, 4, 6))
    for image in range(count):
        for x, y, w, h, number, score in TRUTH[image]:
            column, row = int(x // 16), int(y // 16)
            place = maps[image, :, row, column]
            place[:5] = 0.95, np.arctanh(x / 16 - column), np.arctanh(y / 16 - row), logit(w / 96), logit(h / 64)
            place[5 + int(number)] = (score / 0.95**0.6) ** (1 / 0.4)
    return {"out": maps}


def yolofastestv2(count: int) -> Outputs:
    anchors = {16: (55.71, 138.31), 32: (126.91, 78.23)}  # the third of the first, the first of the second level
    outputs: Outputs = {}
    for stride, (width, height) in ((32, (3, 2)), (16, (6, 4))):
        outputs |= {
            f"{name}_{stride}": np.full((count, channels, height, width), -9.0)
            for name, channels in (("reg", 12), ("obj", 3), ("cls", CLASSES))
        }
        if stride == 16:
            for image in range(count):
                for x, y, w, h, number, score in TRUTH[image]:
                    column, row = int(x // 16), int(y // 16)
                    place = outputs["reg_16"][image, 8:, row, column]
                    place[:2] = logit((x / 16 - column + 0.5) / 2), logit((y / 16 - row + 0.5) / 2)
                    place[2:] = logit((w / anchors[16][0]) ** 0.5 / 2), logit((h / anchors[16][1]) ** 0.5 / 2)
                    outputs["obj_16"][image, 2, row, column] = logit(score / 0.95)
                    outputs["cls_16"][image, int(number), row, column] = np.log(0.95 / 0.05 * 4) - 9
    return outputs


CASES: list[tuple[DecodingName, Callable[[int], Outputs]]] = [
    ("yolox", yolox),
    ("yolov5", yolov5),
    ("yolov8", yolov8),
    ("ssd", ssd),
    ("nms", nms_rows),
    ("nms", nms_flat),
    ("nms", nms_tensorflow),
    ("nms", nms_torchvision),
    ("nanodet", nanodet),
    ("fastestdet", fastestdet),
    ("yolofastestv2", yolofastestv2),
]


def best(boxes: Boxes) -> list[tuple[float, ...]]:
    """Boxes of a score above a half, best first."""
    chosen = boxes.selected(0.5)
    return [
        (*corner, number, score)
        for corner, number, score in zip(chosen.corners.tolist(), chosen.classes, chosen.scores, strict=True)
        if score > 0.5
    ]


@pytest.mark.parametrize(("name", "write"), CASES)
@pytest.mark.parametrize("count", [1, 2])
def test_known_boxes_come_back(name: DecodingName, write: Callable[[int], Outputs], count: int) -> None:
    if write is nms_torchvision and count == 2:
        return  # it has no axis of images
    outputs = {
        key: value if value.dtype.kind == "i" else value.astype(np.float32) for key, value in write(count).items()
    }
    found = decoding(name)(outputs, SIZE, count)
    assert len(found) == count
    scale = np.array([96, 64, 96, 64, 1, 1]) if write is nms_tensorflow else 1.0
    for boxes, truth in zip(found, TRUTH, strict=False):
        expected = [(*corners_of(box), *box[4:]) for box in truth]
        np.testing.assert_allclose(np.array(best(boxes)) * scale, expected, rtol=2e-5, atol=2e-4)


def test_every_decoding_is_tested() -> None:
    assert {name for name, _ in CASES} == set(DECODINGS)


@pytest.mark.parametrize("name", ["yolox", "yolov5", "nanodet", "fastestdet"])
def test_an_axis_of_one_image_may_be_missing(name: DecodingName) -> None:
    write = dict(CASES)[name]
    outputs = {key: value[0] for key, value in write(1).items()}
    assert len(best(decoding(name)(outputs, SIZE, 1)[0])) == 2


def test_values_beyond_all_bounds_are_no_boxes() -> None:
    outputs = yolox(1)
    outputs["out"][0, :50] = np.nan
    outputs["out"][0, 50:90, 2:4] = 1e30
    found = decoding("yolox")(outputs, SIZE, 1)[0]
    assert len(best(found)) == 2
    assert np.isfinite(found.corners).all()


@pytest.mark.parametrize(
    ("name", "outputs", "count", "message"),
    [
        (
            "yolox",
            {"a": np.zeros((1, 99, 10))},
            1,
            r"'a' \[1, 99, 10\] cannot be decoded so \(99 places are not those of",
        ),
        ("yolox", {"a": np.zeros((1, 10, 4, 6))}, 1, r"the first one has 4 axes, not 3"),
        ("yolox", {"a": np.zeros((1, 126, 5))}, 1, r"a place has 5 values, fewer than 6"),
        ("yolov8", {"a": np.zeros((1, 2, 7))}, 1, r"a place has 2 values, fewer than 5"),
        ("fastestdet", {"a": np.zeros((1, 5, 4, 6))}, 1, r"a place has 5 values, fewer than 6"),
        ("yolov5", {"a": np.zeros((3, 10, 8))}, 2, r"an output has 3 entries for 2 images"),
        (
            "yolov8",
            {"a": np.zeros((2,))},
            2,
            r"decoded boxes \[N, 4\+C, A\] are expected for an input of 96 x 64 pixels",
        ),
        ("ssd", {"a": np.zeros((1, 10, 4))}, 1, r"there are not two outputs"),
        ("ssd", {"a": np.zeros((1, 10, 5)), "b": np.zeros((1, 10, 3))}, 1, r"none ends with an axis of 4"),
        ("ssd", {"a": np.zeros((1, 10, 4)), "b": np.zeros((1, 9, 3))}, 1, r"there are 10 boxes and scores for 9"),
        ("nms", {"a": np.zeros((1, 10, 5))}, 1, r"the rows have neither 6 nor 7 columns"),
        ("nms", {"a": np.zeros((1, 10, 4)), "b": np.zeros((1, 10))}, 1, r"cannot be told apart"),
        (
            "nms",
            {"boxes": np.zeros((1, 9, 4)), "scores": np.zeros((1, 8)), "labels": np.zeros((1, 9))},
            1,
            r"in number",
        ),
        ("nanodet", {"a": np.zeros((1, 96, 5)), "b": np.zeros((1, 24, 32))}, 1, r"they do not come in pairs"),
        ("fastestdet", {"a": np.zeros((1, 22, 22))}, 1, r"an output has 22|one has 3 axes|cannot be decoded"),
        ("yolofastestv2", {"a": np.zeros((1, 12, 4, 6))}, 1, r"there are not six maps"),
        ("yolofastestv2", {str(n): np.zeros((1, 12, 4, 6)) for n in range(6)}, 1, r"has not 12, 3 and C maps"),
    ],
)
def test_other_outputs_are_refused(name: DecodingName, outputs: Outputs, count: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decoding(name)(outputs, SIZE, count)


def drawn(name: DecodingName) -> Outputs:
    """Random outputs for an input of 96 x 64 pixels and 80 classes."""
    random = np.random.default_rng(0)
    if name == "nanodet":
        shapes = {f"{kind}{cells}": (1, cells, size) for cells in (96, 24, 6) for kind, size in (("c", 80), ("d", 32))}
        values = {key: random.normal(0, 2, shape) for key, shape in shapes.items()}
        return {key: 1 / (1 + np.exp(-value)) if key[0] == "c" else value for key, value in values.items()}
    if name == "yolofastestv2":
        maps = [(size, *sides) for sides in ((4, 6), (2, 3)) for size in (12, 3, 80)]
        return {str(number): random.normal(0, 2, (1, *shape)) for number, shape in enumerate(maps)}
    shape = {"yolox": (1, 126, 85), "yolov5": (1, 99, 85), "yolov8": (1, 84, 99), "fastestdet": (1, 85, 4, 6)}[name]
    values = random.normal(0, 1, shape)
    channels = np.moveaxis(values, 1 if name in ("yolov8", "fastestdet") else -1, -1)  # a view
    scores = [0, *range(5, 85)] if name == "fastestdet" else list(range(4, channels.shape[-1]))
    channels[..., scores] = 1 / (1 + np.exp(-channels[..., scores]))
    return {"out": values}


@pytest.mark.parametrize("name", ["yolox", "yolov5", "yolov8", "nanodet", "fastestdet", "yolofastestv2"])
def test_as_another_tool_decodes(name: DecodingName) -> None:
    other, outputs = scorer(), {key: value.astype(np.float32) for key, value in drawn(name).items()}
    _, decode, floor, iou = other.KINDS["yolov5" if name == "yolov8" else name]
    corners, scores = decode(list(outputs.values()), SIZE[1], SIZE[0])
    corners, scores, classes = other.select(corners, scores, floor, iou)
    how = decoding(name)
    assert how.iou == iou
    found = how(outputs, SIZE, 1)[0].selected(how.iou)
    assert len(found) == len(scores) > 50
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    order, mine = np.lexsort((classes, corners[:, 0])), np.lexsort((found.classes, found.corners[:, 0]))
    assert np.mean(found.classes[mine] == classes[order]) > 0.98  # scores that are equal may change places
    np.testing.assert_allclose(np.sort(found.corners, axis=0), np.sort(corners, axis=0), rtol=1e-4, atol=1e-3)
