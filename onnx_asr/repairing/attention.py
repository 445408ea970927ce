"""Where a dense detector is confident in an image, so that a refit draws more of its rows from there.

Places of an output are a map, or stand in one row: the maps of several strides one after another, each with all places
of one anchor after those of another, or with all anchors of one place together. Of the ways that fit the number of
places, the one is taken in which neighbours are most alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx

from onnx_asr.arrays import Array, Floats
from onnx_asr.engine.lane import Chunk
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.graph.index import GraphIndex
from onnx_asr.networks.detection import Detections
from onnx_asr.networks.fidelity import Outputs, compared_outputs, detections_in, joined, with_outputs
from onnx_asr.networks.samples import Calibration, feeds, input_specs

_FIRST = 16  # samples by which outputs are understood
_STRIDES = (4, 8, 16, 32, 64, 128)
_ANCHORS = 12
_NOTHING = 1e-3  # sum of the confidences of an image where nothing is found

Side = tuple[int, int]


@dataclass(frozen=True)
class Attention:
    """Where the dense detector is confident.

    Attributes:
        maps: Confidence [samples, H, W].
    """

    maps: Floats

    def shares(self, samples: int, shape: Side, weight: float) -> Floats:
        """Shares [samples, h w] of the places of a map: ``weight`` by confidence, the rest for all alike.

        Images without objects have equal shares.
        """
        size = math.prod(shape)
        rows, columns = (_resampling(old, new) for old, new in zip(self.maps.shape[1:], shape, strict=True))
        seen = (rows @ self.maps[:samples] @ columns.T).reshape(samples, size)
        total = seen.sum(axis=1, keepdims=True)
        sure = np.where(total > _NOTHING, seen / np.maximum(total, _NOTHING), 1 / size)
        return np.asarray((1 - weight) / size + weight * sure)


def attention_of(model: onnx.ModelProto, calibration: Calibration, runtime: Runtime) -> Attention | None:
    """Where a dense model is confident in the calibration samples; None where it is no detector.

    The samples remember it, so that it runs once for all refits.

    Raises:
        ModelError: When onnxruntime cannot run the model.
    """
    known = calibration.seen.get(id(model))
    if known is None or (known[1] is not None and len(known[1].maps) < calibration.count):
        known = model, _attention(model, calibration, runtime)
        calibration.seen[id(model)] = known
    return known[1]


def _attention(model: onnx.ModelProto, calibration: Calibration, runtime: Runtime) -> Attention | None:
    index = GraphIndex.of(model)
    names = compared_outputs(index)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.output}
    if ranks.get(names[0], 3) < 3 and len(names) == 1:
        return None
    specs = input_specs(index)
    session = Session(with_outputs(model, names), runtime)

    def outputs(chunk: Chunk) -> list[Array]:
        return list(session.run(feeds(specs, chunk)).values())

    number = min(len(calibration.chunks), -(-_FIRST // calibration.batch_size))
    parts = [outputs(chunk) for chunk in calibration.chunks[:number]]
    first = [joined(values) for values in zip(*parts, strict=True)]
    del parts
    detections = detections_in(first)
    if detections is None:
        return None
    layouts = _layouts(detections, first, _image_side(calibration.chunks[0]))
    if not any(layouts):
        return None
    maps = [_map(found, layouts) for found in _confidences(detections, first)]
    for chunk in calibration.chunks[number:]:
        values = outputs(chunk)
        if [value.shape[1:] for value in values] != [value.shape[1:] for value in first]:
            return None  # of samples that differ in size
        maps.extend(_map(found, layouts) for found in _confidences(detections, values))
    return Attention(np.stack(maps)) if len(maps) == calibration.count else None


def _image_side(chunk: Chunk) -> Side:
    """Height and width of the first input."""
    shape = next(iter(chunk.values())).shape[1:]
    if len(shape) != 3:
        return 0, 0
    return (shape[1], shape[2]) if shape[0] < shape[2] else (shape[0], shape[1])


def _confidences(detections: Detections, outputs: Outputs) -> Iterator[list[Floats]]:
    """For each sample, the confidence at all places of every group of outputs."""
    for sample in range(len(outputs[0])):
        yield detections.confidences(outputs, sample)


@dataclass(frozen=True)
class _Layout:
    """How the places of an output lie on maps.

    Attributes:
        sides: Of the maps, in order.
        anchors: Places at one spot.
        anchors_first: Whether all places of one anchor come before those of the next.
    """

    sides: tuple[Side, ...]
    anchors: int
    anchors_first: bool

    def maps(self, confidence: Floats) -> list[Floats]:
        """The maps [anchors, h, w] of one sample."""
        found, begin = [], 0
        row = confidence.ravel()
        for height, width in self.sides:
            part = row[begin : begin + self.anchors * height * width]
            begin += part.size
            if self.anchors_first:
                found.append(part.reshape(self.anchors, height, width))
            else:
                found.append(np.moveaxis(part.reshape(height, width, self.anchors), -1, 0))
        return found

    def roughness(self, confidence: Floats) -> float:
        """How much neighbours differ."""
        return float(
            sum(np.square(np.diff(found, axis=axis)).sum() for found in self.maps(confidence) for axis in (1, 2))
        )


def _layouts(detections: Detections, outputs: Outputs, image: Side) -> list[_Layout | None]:
    """The layout of every group of outputs; None where its places are on no maps that fit the image."""
    found = list(_confidences(detections, outputs))
    layouts: list[_Layout | None] = []
    for number, confidence in enumerate(found[0]):
        ways = _ways(confidence.shape, image)
        rough = [sum(way.roughness(sample[number]) for sample in found) for way in ways]
        layouts.append(ways[int(np.argmin(rough))] if ways else None)
    return layouts


def _ways(places: tuple[int, ...], image: Side) -> list[_Layout]:
    """Layouts of so many places, with the most maps, and of these the finest."""
    if len(places) == 2:
        return [_Layout((places,), 1, True)]
    sides = [(-(-image[0] // stride), -(-image[1] // stride)) for stride in _STRIDES]
    if len(places) == 3:
        ways = [_Layout((places[1:],), places[0], True), _Layout((places[:2],), places[2], False)]
        return [way for way in ways if way.sides[0] in sides] or ways[:1]
    if len(places) > 1 or 0 in image:
        return []
    for count in range(len(sides), 0, -1):
        for begin in range(len(sides) - count + 1):
            run = tuple(sides[begin : begin + count])
            anchors, rest = divmod(places[0], sum(map(math.prod, run)))
            if rest == 0 and 1 <= anchors <= _ANCHORS:
                orders = (run, run[::-1]) if count > 1 else (run,)
                kinds = (True, False) if anchors > 1 else (True,)
                return [_Layout(order, anchors, kind) for order, kind in product(orders, kinds)]
    return []


def _map(confidences: Sequence[Floats], layouts: Sequence[_Layout | None]) -> Floats:
    """The highest confidence of all that speak of a spot, on the finest of the maps."""
    maps = [
        part.max(axis=0)
        for confidence, layout in zip(confidences, layouts, strict=True)
        if layout is not None
        for part in layout.maps(confidence)
    ]
    finest = max((part.shape for part in maps), key=math.prod)
    result = np.zeros(finest)
    for part in maps:
        rows, columns = (_resampling(old, new) for old, new in zip(part.shape, finest, strict=True))
        np.maximum(result, rows @ part @ columns.T, out=result)
    return result


def _resampling(old: int, new: int) -> Floats:
    """A matrix [new, old] that takes the nearest value, or the sum of those that become one."""
    matrix = np.zeros((new, old))
    if new >= old:
        matrix[np.arange(new), ((np.arange(new) + 0.5) * old / new).astype(int)] = 1.0
    else:
        matrix[((np.arange(old) + 0.5) * new / old).astype(int), np.arange(old)] = 1.0
    return matrix
