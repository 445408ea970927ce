"""How a detector is scored. Nothing heavy is imported here, since the command line reads its options here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx_asr.detectors import DECODINGS, DecodingName
from onnx_asr.errors import OptionError

AnnotationSource = str | os.PathLike[str] | Mapping[str, Any]
"""A JSON file in COCO's format, or what is in it."""


@dataclass(frozen=True)
class DetectorOptions:
    """How the outputs of a detector are read, and what they are compared with.

    Attributes:
        annotations: Boxes of the images, a JSON file in COCO's format; scored are the images of the data that it names.
        decode: What the outputs of the detector are: the raw grids of "yolox"; decoded boxes as exported from "yolov5"
            or "yolov8" (also YOLO11); boxes and scores before ("ssd") or after ("nms") a non-maximum suppression; those
            of "nanodet", "fastestdet" or "yolofastestv2".
        nms_iou: Overlap above which the weaker one of two boxes of a class is dropped; by default 0.65 for YOLO, 0.6
            for NanoDet, 0.5 for ssd, 0.45 for the other two.
        category_ids: Classes of the detector are the ids of the categories, as in TensorFlow and torchvision; by
            default class k is the k-th category.

    Raises:
        OptionError: A value is out of range, or annotations and decode do not come together.
    """

    annotations: AnnotationSource | None = None
    decode: DecodingName | None = None
    nms_iou: float | None = None
    category_ids: bool = False

    def __post_init__(self) -> None:
        if self.decode is not None and self.decode not in DECODINGS:
            raise OptionError(f"decode is {self.decode!r}: give one of {', '.join(DECODINGS)}")
        if self.nms_iou is not None and not 0 <= self.nms_iou <= 1:
            raise OptionError(f"nms-iou {self.nms_iou} is out of range: give an overlap from 0 to 1")
        if self.annotations is not None and self.decode is None:
            raise OptionError(
                f"nothing says what the outputs of the detector are: give --decode, one of {', '.join(DECODINGS)}"
            )
        if self.annotations is None:
            given = {"decode": self.decode, "nms-iou": self.nms_iou, "category-ids": self.category_ids or None}
            for name in (name for name, value in given.items() if value is not None):
                raise OptionError(f"{name} came without boxes to compare with: give --annotations FILE.json, too")
