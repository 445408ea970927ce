"""Average precision of a detector: its outputs as boxes, in the pixels of every image, against annotated ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_asr.arrays import Array, Integers
from onnx_asr.data import Dataset
from onnx_asr.data.framing import Frame
from onnx_asr.detectors.boxes import Boxes
from onnx_asr.detectors.coco import AnnotatedImage, Annotations, Precision
from onnx_asr.detectors.decoding import Decoding, decoding
from onnx_asr.detectors.options import DetectorOptions
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import DataError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.networks.fidelity import Outputs, joined, run_batches

_SHARE = 2.0
"""Corners of boxes in shares of the input rarely reach this, those in pixels nearly always."""


@dataclass(frozen=True)
class Examination:
    """Annotated images, and how the outputs on them are read.

    Attributes:
        dataset: The samples.
        annotations: Their boxes.
        images: The annotated samples, by position.
        decoding: Of the outputs.
        label_offset: Class of the first category; those below are the background.
        category_ids: Whether classes are numbers of categories.
    """

    dataset: Dataset
    annotations: Annotations
    images: Mapping[int, AnnotatedImage]
    decoding: Decoding
    label_offset: int
    category_ids: bool

    @classmethod
    def of(cls, options: DetectorOptions, dataset: Dataset, label_offset: int) -> Examination | None:
        """Prepare an examination, if there are annotations.

        Raises:
            OptionError: pycocotools is missing.
            DataError: The annotations are broken, or of other images.
        """
        if options.annotations is None or options.decode is None:
            return None
        how = decoding(options.decode)
        if options.nms_iou is not None:
            how = replace(how, iou=options.nms_iou)
        annotations = Annotations.of(options.annotations)
        images = annotations.matched(dataset.names)
        return cls(dataset, annotations, images, how, label_offset, options.category_ids)

    def positions(self) -> Integers:
        """The annotated samples."""
        return np.array(sorted(self.images), np.int64)

    def examined(
        self, model: onnx.ModelProto, kept: Sequence[str], indices: Integers, runtime: Runtime, batch_size: int
    ) -> tuple[Precision, Outputs]:
        """The average precision of a model, and on the way these of its tensors on all samples.

        Raises:
            ModelError: onnxruntime cannot run it, or its outputs cannot be decoded so.
            DataError: A class has no category, an image is not the one that was annotated, or none has a box.
        """
        outputs = GraphIndex.of(model).outputs
        names = list(dict.fromkeys((*outputs, *kept)))
        detections, parts = FoundBoxes(self), []
        for positions, values in run_batches(model, names, self.dataset, indices, runtime, batch_size):
            detections.add({name: values[name] for name in outputs}, positions)
            parts.append([values[name] for name in kept])
        return detections.precision(), [joined(part) for part in zip(*parts, strict=True)]

    def frame(self, position: int) -> Frame:
        """Where an annotated image lies in the input.

        Raises:
            DataError: It is not the image that was annotated.
        """
        frame, image = self.dataset.frame(position), self.images[position]
        if frame is None:
            raise DataError("boxes are compared on images, but the data are ready tensors: give a folder of images")
        if image.size is not None and frame.image != image.size:
            raise DataError(
                f"{self.dataset.names[position]} is {frame.image[0]} x {frame.image[1]} pixels, but "
                f"{self.annotations.where} has boxes for {image.size[0]} x {image.size[1]}: give the images that were "
                "annotated (--no-exif leaves them as they are stored)"
            )
        return frame


class FoundBoxes:
    """What one model finds on the samples of an examination."""

    def __init__(self, examination: Examination) -> None:
        self._examination = examination
        self._found: dict[int, tuple[Frame, Boxes]] = {}

    def add(self, outputs: Mapping[str, Array], positions: Integers) -> None:
        """Decode the outputs on a batch of samples.

        Raises:
            ModelError: They cannot be decoded so.
            DataError: A class has no category, or an image is not the one that was annotated.
        """
        how = self._examination
        frames = [how.frame(int(position)) for position in positions]
        for position, frame, boxes in zip(
            positions.tolist(), frames, how.decoding(outputs, frames[0].size, len(frames)), strict=True
        ):
            named = how.annotations.named(boxes, offset=how.label_offset, are_categories=how.category_ids)
            self._found[position] = frame, named.selected(how.decoding.iou)

    def precision(self) -> Precision:
        """The average precision over all samples that were added.

        Raises:
            DataError: None of them has an annotated box.
        """
        how = self._examination
        reach = [boxes.corners.max(axis=1) for _, boxes in self._found.values() if len(boxes)]
        in_shares = how.decoding.may_be_shares and bool(reach) and np.median(np.concatenate(reach)) <= _SHARE
        found = {}
        for position, (frame, boxes) in self._found.items():
            corners = boxes.corners * np.tile(frame.size, 2) if in_shares else boxes.corners
            points = frame.points_of_image(corners.reshape(-1, 2)).clip(0, frame.image)
            found[how.images[position].number] = Boxes(points.reshape(-1, 4), boxes.scores, boxes.classes)
        return how.annotations.precision(found)
