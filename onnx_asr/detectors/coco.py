"""Annotations in COCO's format, and the average precision of detections by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from onnx_asr.detectors.boxes import Boxes
from onnx_asr.detectors.options import AnnotationSource
from onnx_asr.errors import DataError, OptionError

_WANTED = "give a JSON file in COCO's format, with 'images', 'annotations' (each with 'bbox') and 'categories'"


@dataclass(frozen=True)
class Precision:
    """Average precision of detections, from 0 to 1.

    Attributes:
        mean_ap: Mean over classes and the overlaps 0.5, 0.55, ... 0.95: mAP@[.5:.95].
        mean_ap50: Mean over classes at an overlap of 0.5: mAP@.5.
    """

    mean_ap: float
    mean_ap50: float


@dataclass(frozen=True)
class AnnotatedImage:
    """An image of the annotations: its number there, and its width and height where they are known."""

    number: int
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Annotations:
    """Boxes on images, with their classes.

    Attributes:
        where: The file, for messages.
        images: The images, by file name.
        categories: Numbers of the categories, in ascending order; the k-th one is class k of a model.
        boxes: The boxes as pycocotools takes them.
    """

    where: str
    images: Mapping[str, AnnotatedImage]
    categories: tuple[int, ...]
    boxes: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, source: AnnotationSource) -> Annotations:
        """Read annotations and check them.

        Raises:
            OptionError: pycocotools is not installed.
            DataError: The file cannot be read, or is not in COCO's format.
        """
        if find_spec("pycocotools") is None:
            raise OptionError(
                "annotations need pycocotools, which is not installed: pip install onnx-resuscitate[coco]"
            )
        where = f"the annotations file {source}" if isinstance(source, (str, os.PathLike)) else "the set of annotations"
        content = source
        if isinstance(source, (str, os.PathLike)):
            try:
                content = json.loads(Path(source).read_bytes())
            except (OSError, ValueError, RecursionError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise DataError(f"cannot read {where}: {reason}; {_WANTED}") from error
        try:
            return cls(where, *_checked(content))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{where} is not in COCO's format ({what}): {_WANTED}") from error

    def matched(self, names: Sequence[str]) -> dict[int, AnnotatedImage]:
        """The annotated ones of images, by their positions; a name may be a path that ends in that of the annotations.

        Raises:
            DataError: None of them is annotated, or two have the name of one.
        """
        found: dict[int, AnnotatedImage] = {}
        owners: dict[int, int] = {}
        for position, name in enumerate(names):
            image = self._image(name)
            if image is None:
                continue
            if image.number in owners:
                other = names[owners[image.number]]
                raise DataError(
                    f"{self.where} has one image for {other} and {name}: give the images of one folder, or file names "
                    "with their folders in the annotations"
                )
            owners[image.number] = position
            found[position] = image
        if not found:
            raise DataError(
                f"none of the {len(names)} images (the first is {names[0]}) is among the {len(self.images)} of "
                f"{self.where} (the first is {next(iter(self.images))}): give images and annotations of one data set"
            )
        return found

    def _image(self, name: str) -> AnnotatedImage | None:
        parts = name.split("/")
        return next((found for start in range(len(parts)) if (found := self.images.get("/".join(parts[start:])))), None)

    def precision(self, detections: Mapping[int, Boxes]) -> Precision:
        """The precision of boxes in pixels of each image, by the images' numbers; classes are numbers of categories.

        Raises:
            DataError: None of these images has a box.
        """
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if not any(box["image_id"] in detections and not box["iscrowd"] for box in self.boxes):
            raise DataError(f"{self.where} has no box on the {len(detections)} images that are scored: give others")
        with contextlib.redirect_stdout(io.StringIO()):
            truth, found = COCO(), COCO()
            truth.dataset = self._dataset(list(self.boxes))
            found.dataset = self._dataset([box for number, one in detections.items() for box in _results(number, one)])
            for one, box in enumerate(found.dataset["annotations"], 1):
                box["id"] = one
            truth.createIndex()
            found.createIndex()
            scoring = COCOeval(truth, found, "bbox")
            scoring.params.imgIds = sorted(detections)
            scoring.evaluate()
            scoring.accumulate()
            scoring.summarize()
        return Precision(float(scoring.stats[0]), float(scoring.stats[1]))

    def _dataset(self, boxes: list[Any]) -> dict[str, Any]:
        images = [{"id": image.number} for image in self.images.values()]
        return {"images": images, "annotations": boxes, "categories": [{"id": number} for number in self.categories]}

    def named(self, boxes: Boxes, *, offset: int, are_categories: bool) -> Boxes:
        """The boxes with the numbers of their categories for classes, without those of the background.

        Args:
            boxes: Boxes with the classes of a model.
            offset: Added to the position of a category to give the class; those below it are the background.
            are_categories: Whether the classes are the numbers of the categories; those of no category are dropped.

        Raises:
            DataError: A class has no category.
        """
        known = np.array(self.categories, np.int64)
        if are_categories:
            return boxes[np.flatnonzero(np.isin(boxes.classes, known))]
        boxes = boxes[np.flatnonzero(boxes.classes >= offset)]
        places = boxes.classes - offset
        if (places >= len(known)).any():
            raise DataError(
                f"the model finds class {boxes.classes.max()} (0 is the first), but {self.where} has {len(known)} "
                "categories: give annotations for the classes of the model; pass --label-offset 1 if its class 0 is "
                "the background, --category-ids if its classes are the ids of categories, or another --decode if there "
                "is no such class"
            )
        return Boxes(boxes.corners, boxes.scores, known[places])


def _checked(content: Any) -> tuple[dict[str, AnnotatedImage], tuple[int, ...], list[dict[str, Any]]]:
    """Images, categories and boxes; errors of Python where something else is given."""
    if not isinstance(content, Mapping):
        raise TypeError(f"it is a {type(content).__name__}")
    images: dict[str, AnnotatedImage] = {}
    for image in _objects(content, "images"):
        sides: tuple[Any, Any] = (image.get("width"), image.get("height"))
        size = None if None in sides else (int(sides[0]), int(sides[1]))
        name, found = _text(image["file_name"]), AnnotatedImage(int(image["id"]), size)
        if images.setdefault(name, found).number != found.number:
            raise ValueError(f"it has two images {name}, with ids {images[name].number} and {found.number}")
    categories = tuple(sorted({int(category["id"]) for category in _objects(content, "categories")}))
    if not images or not categories:
        raise ValueError("it has no images, or no categories")
    numbers = {image.number for image in images.values()}
    boxes: list[dict[str, Any]] = []
    for one in _objects(content, "annotations"):
        left, top, width, height = (float(value) for value in one["bbox"])
        if not np.isfinite([left, top, width, height]).all():
            raise ValueError("a box is not finite")
        if int(one["image_id"]) not in numbers or int(one["category_id"]) not in categories:
            raise ValueError("a box has an image or a category that is not listed")
        boxes.append(
            {
                "id": len(boxes) + 1,  # as pycocotools takes 0 for none
                "image_id": int(one["image_id"]),
                "category_id": int(one["category_id"]),
                "bbox": [left, top, width, height],
                "area": float(one.get("area", width * height)),
                "iscrowd": int(one.get("iscrowd", 0)),
            }
        )
    return images, categories, boxes


def _objects(content: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """The entries of a list of objects."""
    if not isinstance(content[name], Sequence):
        raise TypeError(f"its {name!r} are no list")
    for number, one in enumerate(content[name]):
        if not isinstance(one, Mapping):
            raise TypeError(f"entry {number} of its {name!r} is no object")
        yield one


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a file name is {value!r}")
    return value.replace("\\", "/").removeprefix("./")


def _results(number: int, boxes: Boxes) -> list[dict[str, Any]]:
    sizes = boxes.corners[:, 2:] - boxes.corners[:, :2]
    return [
        {
            "image_id": number,
            "category_id": category,
            "bbox": [*corner, *size],
            "area": size[0] * size[1],
            "iscrowd": 0,
            "score": score,
        }
        for corner, size, category, score in zip(
            boxes.corners[:, :2].tolist(), sizes.tolist(), boxes.classes.tolist(), boxes.scores.tolist(), strict=True
        )
    ]
