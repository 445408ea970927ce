"""Boxes of one image, and the choice among those that overlap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_asr.arrays import Array, Floats, Integers

FLOOR = 0.001
"""Boxes of a lower score are no detections."""
MOST_CANDIDATES, MOST_DETECTIONS = 3000, 300
"""Boxes of an image before and after those that overlap are dropped."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image, each with one class.

    Attributes:
        corners: (n, 4): left, top, right, bottom.
        scores: (n,), from 0 to 1.
        classes: (n,): class index.
    """

    corners: Floats
    scores: Floats
    classes: Integers

    @classmethod
    def of(cls, corners: Array, scores: Array, classes: Array | None = None) -> Boxes:
        """The boxes with a score above the floor, and with finite corners and classes.

        Args:
            corners: (n, 4).
            scores: (n, C), one column per class, or (n,) with the ``classes`` of the boxes.
            classes: (n,).
        """
        values = scores.astype(np.float64)
        usable = np.asarray(np.isfinite(corners).all(axis=1))
        if classes is None:
            rows, columns = np.nonzero((values > FLOOR) & usable[:, None])
            return cls(corners[rows].astype(np.float64), values[rows, columns], columns.astype(np.int64))
        rows = np.flatnonzero((values > FLOOR) & usable & np.isfinite(classes))
        return cls(corners[rows].astype(np.float64), values[rows], classes[rows].astype(np.int64))

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: Integers) -> Boxes:
        return Boxes(self.corners[rows], self.scores[rows], self.classes[rows])

    def selected(self, iou: float | None) -> Boxes:
        """The best boxes, best first: of two of one class that overlap by more than ``iou`` only the better one.

        ``iou`` None keeps all, as where the network has chosen already.
        """
        order = np.argsort(-self.scores, kind="stable")[:MOST_CANDIDATES]
        if iou is None:
            return self[order[:MOST_DETECTIONS]]
        kept = np.zeros(len(order), bool)
        for number in np.unique(self.classes[order]):
            mine = np.flatnonzero(self.classes[order] == number)
            kept[mine[_suppressed(self.corners[order[mine]], iou)]] = True
        return self[order[kept][:MOST_DETECTIONS]]


def _suppressed(corners: Floats, iou: float) -> Integers:
    """Positions that greedy non-maximum suppression keeps of boxes in descending order of score."""
    areas = np.prod((corners[:, 2:] - corners[:, :2]).clip(0), axis=1)
    rest = np.arange(len(corners))
    kept = []
    while len(rest):
        first, rest = rest[0], rest[1:]
        kept.append(first)
        low = np.maximum(corners[first, :2], corners[rest, :2])
        high = np.minimum(corners[first, 2:], corners[rest, 2:])
        shared = np.prod((high - low).clip(0), axis=1)
        rest = rest[shared <= iou * (areas[first] + areas[rest] - shared)]
    return np.array(kept, np.int64)
