"""The choice among overlapping boxes, against pairs counted pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_asr.detectors.boxes import FLOOR, MOST_CANDIDATES, MOST_DETECTIONS, Boxes


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of boxes of whole numbers, pixel by pixel."""
    y, x = np.mgrid[:64, :64]
    inside = [(x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3]) for box in (one, other)]
    return float((inside[0] & inside[1]).sum() / max(1, (inside[0] | inside[1]).sum()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("iou", [0.2987, 0.6543])
def test_suppression_is_greedy_and_by_class(seed: int, iou: float) -> None:
    random = np.random.default_rng(seed)
    low, size = random.integers(0, 16, (80, 2)), random.integers(14, 40, (80, 2))
    corners = np.concatenate([low, low + size], axis=1).astype(float)
    scores, classes = random.random(80).round(2), random.integers(0, 3, 80)  # with ties
    found = Boxes.of(corners, scores, classes).selected(iou)

    kept: list[int] = []
    for index in sorted(range(80), key=lambda index: (-scores[index], index)):
        rivals = [other for other in kept if classes[other] == classes[index]]
        if scores[index] > FLOOR and all(overlap(corners[index], corners[other]) <= iou for other in rivals):
            kept.append(index)
    assert np.array_equal(found.corners, corners[kept])
    assert np.array_equal(found.scores, scores[kept])
    assert np.array_equal(found.classes, classes[kept])
    assert 3 < len(kept) < 70


def test_every_class_above_the_floor_is_a_box_of_its_own() -> None:
    corners = np.array([[0, 0, 4, 4], [1, 1, 2, 2], [np.nan, 0, 1, 1]])
    scores = np.array([[0.5, FLOOR / 2, 0.2], [0.0, np.nan, 0.9], [0.9, 0.9, 0.9]], np.float32)
    found = Boxes.of(corners, scores)
    assert found.classes.tolist() == [0, 2, 2]
    assert found.corners.tolist() == [[0, 0, 4, 4], [0, 0, 4, 4], [1, 1, 2, 2]]
    assert found.scores.tolist() == scores[[0, 0, 1], [0, 2, 2]].tolist()


def test_a_class_that_is_not_finite_is_no_detection() -> None:
    found = Boxes.of(np.zeros((3, 4)), np.full(3, 0.5), np.array([2.0, np.nan, np.inf]))
    assert found.classes.tolist() == [2]


def test_only_the_best_are_looked_at_and_kept() -> None:
    count = MOST_CANDIDATES + 1000
    corners = np.arange(count)[:, None] + np.array([0, 0, 1, 1])  # none overlaps another
    scores = np.linspace(0.01, 0.99, count)
    for iou in (0.5, None):
        found = Boxes.of(corners, scores, np.zeros(count)).selected(iou)
        assert np.array_equal(found.scores, scores[::-1][:MOST_DETECTIONS])
    again = Boxes.of(np.tile([0.0, 0.0, 1.0, 1.0], (count, 1)), scores, np.zeros(count))
    assert len(again.selected(0.5)) == 1
    assert len(again.selected(None)) == MOST_DETECTIONS
    assert len(again[np.array([], int)].selected(0.5)) == 0
