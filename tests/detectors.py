"""A detector whose boxes are known, and images with annotations that they match."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from tests.graphs import net

SIDE = 64
CATEGORIES = (3, 5)
"""Numbers of the categories: class 0 and class 1 of the detector."""
BOXES = ((24.0, 30.0, 20.0, 12.0, 0, 0.9), (44.0, 40.0, 16.0, 16.0, 1, 0.8))
"""Centre, width and height in pixels of the input, class, score: the same on every image."""
SIZES = {"a.png": (128, 96), "b.png": (60, 90), "c.png": (64, 64)}
"""Width and height of the images."""


def detector(boxes: Any = BOXES, *, seed: int = 0) -> onnx.ModelProto:
    """A net with outputs as YOLOv5 exports them, which hardly depend on the image."""
    rows = np.zeros((1, len(boxes), 7), np.float32)
    for row, (*box, number, score) in zip(rows[0], boxes, strict=True):
        row[:5], row[5 + number] = (*box, score), 1.0
    return net(
        f"""
        detector (float[N,3,{SIDE},{SIDE}] images) => (float[N,{len(boxes)},7] boxes) {{
            features = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(images, w)
            mean = ReduceMean<axes=[1,2,3], keepdims=0>(features)
            small = Mul(mean, tiny)
            column = Reshape(small, shape)
            boxes = Add(column, rows)
        }}
        """,
        seed=seed,
        w=(4, 3, 3, 3),
        tiny=np.float32(1e-6),
        shape=np.array([-1, 1, 1]),
        rows=rows,
    )


def placed(size: tuple[int, int]) -> tuple[float, int, int]:
    """The scale of an image of this size in the letterbox, and its left and upper edge there."""
    factor = min(SIDE / size[0], SIDE / size[1])
    width, height = round(size[0] * factor), round(size[1] * factor)
    return factor, (SIDE - width) // 2, (SIDE - height) // 2


def annotations(sizes: Mapping[str, tuple[int, int]] = SIZES, boxes: Any = BOXES) -> dict[str, Any]:
    """The boxes of the detector in the pixels of every image, which is letterboxed."""
    found = []
    for number, size in enumerate(sizes.values()):
        factor, left, top = placed(size)
        for x, y, width, height, label, _ in boxes:
            low = np.array([x - width / 2 - left, y - height / 2 - top]) / factor
            high = np.array([x + width / 2 - left, y + height / 2 - top]) / factor
            low, high = low.clip(0, size), high.clip(0, size)
            box = [*low.tolist(), *(high - low).tolist()]
            found.append({"image_id": number, "category_id": CATEGORIES[label], "bbox": box})
    images = [
        {"id": number, "file_name": name, "width": width, "height": height}
        for number, (name, (width, height)) in enumerate(sizes.items())
    ]
    return {"images": images, "annotations": found, "categories": [{"id": number} for number in CATEGORIES]}


def write_images(folder: Path, sizes: Mapping[str, tuple[int, int]] = SIZES) -> Path:
    """A folder of images of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, (width, height)) in enumerate(sizes.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def write_annotations(path: Path, content: Mapping[str, Any]) -> Path:
    """Annotations in a file."""
    path.write_text(json.dumps(content))
    return path
