"""What the outputs of detectors mean, and how far another model's are, against sums written out in plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from onnx_asr import RepairOptions
from onnx_asr.networks.detection import Detections
from onnx_asr.networks.fidelity import Noise, compare, detections_in
from onnx_asr.repairing.options import RefitRecipe
from onnx_asr.repairing.pipeline import repair
from tests.graphs import detector, images, pruned

SAMPLES, SIDE, CLASSES = 6, 12, 5
PLACES = SIDE * SIDE


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [N, A, 4], objectness [N, A, 1] and class scores [N, A, C]; classes are arbitrary where nothing is."""
    generator = np.random.default_rng(seed)
    boxes = generator.uniform(0, 100, (SAMPLES, PLACES, 4))
    objectness = generator.uniform(0, 0.02, (SAMPLES, PLACES, 1))
    classes = generator.uniform(0, 0.5, (SAMPLES, PLACES, CLASSES)) ** 2
    classes[:, :, 0] *= 2
    for sample in range(SAMPLES):
        for place in generator.choice(PLACES, 8, replace=False):
            objectness[sample, place] = generator.uniform(0.5, 1)
            classes[sample, place] *= 0.1
            classes[sample, place, generator.integers(CLASSES)] = generator.uniform(0.6, 1)
    return boxes, objectness, classes


def worse(values: np.ndarray, seed: int = 9, size: float = 0.1) -> np.ndarray:
    """Multiplied by random factors, which leaves probabilities between 0 and 1."""
    return values * np.random.default_rng(seed).uniform(1 - size, 1, values.shape)


def by_hand(dense: Any, other: Any) -> float:
    """The distance from values [N, A, V], confidences [N, A] and scores [N, A, K] of both networks."""
    boxes, confidence, scores = dense
    its_boxes, _, its_scores = other
    both = first = second = 0.0
    for one, two in zip(scores.flat, its_scores.flat, strict=True):
        both, first, second = both + one * two, first + one * one, second + two * two
    total = confidence.sum()
    missed = 0.0
    for value in range(boxes.shape[2]):
        mean = (confidence * boxes[..., value]).sum() / total
        variance = (confidence * (boxes[..., value] - mean) ** 2).sum() / total
        for sample, place in np.ndindex(confidence.shape):
            gap = boxes[sample, place, value] - its_boxes[sample, place, value]
            missed += confidence[sample, place] * min(1.0, gap**2 / variance)
    return math.sqrt(1 - both / math.sqrt(first * second) + missed / (boxes.shape[2] * total))


def gated(boxes: np.ndarray, objectness: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, ...]:
    scores = objectness * classes
    return boxes, scores.max(axis=2), scores


def found(dense: list[np.ndarray]) -> Detections:
    detections = Detections.of(dense)
    assert detections is not None
    return detections


LAYOUTS: dict[str, Any] = {
    "rows": lambda parts: [np.concatenate(parts, axis=2)],
    "columns": lambda parts: [np.concatenate(parts, axis=2).transpose(0, 2, 1)],
    "map": lambda parts: [np.concatenate(parts, axis=2).transpose(0, 2, 1).reshape(SAMPLES, -1, SIDE, SIDE)],
    "channels last": lambda parts: [np.concatenate(parts, axis=2).reshape(SAMPLES, SIDE, SIDE, -1)],
    "objectness first": lambda parts: [np.concatenate([parts[1], parts[0], parts[2]], axis=2)],
    "anchors": lambda parts: [np.concatenate(parts, axis=2).reshape(SAMPLES, 3, 6, 8, -1)],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_objectness_times_classes_in_any_layout(layout: Any, kind: Any) -> None:
    dense = tuple(part.astype(kind) for part in scene())
    other = tuple(worse(part, seed).astype(kind) for seed, part in enumerate(dense))
    detections = found(layout(dense))
    (head,) = detections.groups[0]
    assert head.gate is not None
    assert (len(head.scores), len(head.values)) == (CLASSES, 4)
    wide = [tuple(part.astype(np.float64) for part in parts) for parts in (dense, other)]
    wanted = by_hand(gated(*wide[0]), gated(*wide[1]))
    assert 0.05 < wanted < 0.5
    assert detections.error(layout(dense), layout(other)) == pytest.approx(wanted, rel=1e-3)
    assert detections.error(layout(dense), layout(dense)) < 1e-7


def test_classes_alone_and_boxes_in_another_output() -> None:
    boxes, objectness, classes = scene()
    scores = objectness * classes
    dense, other = [scores, boxes], [worse(scores, 1), worse(boxes, 2)]
    detections = found(dense)
    (first, second) = detections.groups[0]
    assert (len(first.scores), first.gate, len(first.values)) == (CLASSES, None, 0)
    assert (len(second.scores), len(second.values)) == (0, 4)
    wanted = by_hand((boxes, scores.max(axis=2), scores), (other[1], None, other[0]))
    assert detections.error(dense, other) == pytest.approx(wanted, rel=1e-6)
    turned = [scores.transpose(0, 2, 1), boxes]  # as NonMaxSuppression reads them
    assert found(turned).error(turned, [other[0].transpose(0, 2, 1), other[1]]) == pytest.approx(wanted, rel=1e-6)


def test_the_background_of_a_softmax_is_no_score() -> None:
    boxes, objectness, classes = scene()
    scores = objectness * classes / classes.sum(axis=2, keepdims=True)
    dense = [np.concatenate([1 - scores.sum(axis=2, keepdims=True), scores], axis=2), boxes]
    (first, _) = found(dense).groups[0]
    assert first.scores.tolist() == [1, 2, 3, 4, 5]
    assert first.gate is None


def test_maps_of_low_logits_are_scores_that_multiply_those_of_other_maps() -> None:
    boxes, objectness, classes = scene()
    logits = np.log(objectness / (1 - objectness))
    dense, other = (boxes, logits, classes), (worse(boxes, 3), logits + worse(logits, 5), worse(classes, 4))
    maps = [[part.transpose(0, 2, 1).reshape(SAMPLES, -1, SIDE, SIDE) for part in parts] for parts in (dense, other)]
    detections = found(maps[0])
    assert [head.logits for head in detections.groups[0]] == [False, True, False]
    assert [head.scores.tolist() for head in detections.groups[0]] == [[], [0], [1, 2, 3, 4]]  # class 0 is everywhere

    def expected(values: np.ndarray, raw: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, ...]:
        sure, rare = 1 / (1 + np.exp(-raw)), kinds[..., 1:]
        highest = sure * rare.max(axis=2, keepdims=True)
        scores = np.concatenate([highest, sure * rare], axis=2)
        return np.concatenate([values, kinds[..., :1]], axis=2), highest[..., 0], scores

    assert detections.error(*maps) == pytest.approx(by_hand(expected(*dense), expected(*other)), rel=1e-6)


def test_a_common_factor_of_the_scores_and_boxes_of_nothing_do_not_count() -> None:
    boxes, objectness, classes = scene()
    dense = [np.concatenate([boxes, objectness, classes], axis=2)]
    detections = found(dense)
    halved = [np.concatenate([boxes, objectness / 2, classes], axis=2)]
    assert detections.error(dense, halved) < 1e-7
    elsewhere = np.where(objectness < 0.1, boxes + 50, boxes)
    there = np.where(objectness > 0.1, boxes + 50, boxes)
    errors = [
        detections.error(dense, [np.concatenate([moved, objectness, classes], axis=2)]) for moved in (elsewhere, there)
    ]
    assert errors[0] < 0.3 * errors[1]
    nothing = [np.concatenate([boxes, np.zeros_like(objectness), classes], axis=2)]
    assert detections.error(dense, nothing) == pytest.approx(1)


def test_what_only_the_other_network_finds_counts() -> None:
    boxes, objectness, classes = scene()
    dense = boxes, np.where(objectness > 0.1, objectness, 0.0), classes
    other = boxes, np.where(objectness > 0.1, objectness, 0.5), classes
    wanted = by_hand(gated(*dense), gated(*other))
    outputs = [[np.concatenate(parts, axis=2)] for parts in (dense, other)]
    assert found(outputs[0]).error(*outputs) == pytest.approx(wanted, rel=1e-6)


def test_outputs_that_are_not_finite_are_infinitely_far() -> None:
    dense = [np.concatenate(scene(), axis=2)]
    broken = [dense[0].copy()]
    broken[0][3, 5, 7] = np.nan  # a class where nothing is
    assert compare(dense, broken, detections_in(dense)).divergence == math.inf
    assert detections_in(broken) is None


def smooth(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, shape)


def softmax(*shape: int) -> np.ndarray:
    values = np.exp(4 * smooth(*shape))
    return np.asarray(values / values.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    "outputs",
    [
        [smooth(SAMPLES, 10)],
        [smooth(SAMPLES, 10), *(np.concatenate(scene(), axis=2),)],
        [smooth(SAMPLES, 3, 16, 16)],
        [softmax(SAMPLES, 8, 16, 16)],
        [10 * smooth(SAMPLES, 8, 16, 16) - 5],
        [scene()[1].reshape(SAMPLES, 1, SIDE, SIDE)],
        [scene()[0]],
        [smooth(SAMPLES, 4, 8, 8), 100 * smooth(SAMPLES, 4, 8, 8)],
        [np.ones((SAMPLES, 3, 4), np.int64)],
        [smooth(SAMPLES * 7)],
        [np.zeros((SAMPLES, PLACES, 9))],
        [np.zeros((0, PLACES, 9))],
        [np.zeros((SAMPLES, 0, 9)), np.zeros((SAMPLES, 9, 0))],
        [np.arange(SAMPLES * 7), np.concatenate(scene(), axis=2)],
    ],
    ids=[
        *("classes", "classes and more", "picture", "classes by place", "logits by place", "heat map", "boxes"),
        *("scores everywhere", "integers", "numbers", "nothing", "no samples"),
        *("no places", "results of all samples first"),
    ],
)
def test_other_networks_are_no_detectors(outputs: list[np.ndarray]) -> None:
    assert detections_in(outputs) is None


def test_outputs_with_other_than_one_entry_a_sample_do_not_count() -> None:
    dense = [np.concatenate(scene(), axis=2)]
    more = [np.zeros(0, np.int64), np.zeros((0, 3, 4)), np.ones((SAMPLES + 1, PLACES, 9))]
    assert found([*dense, *more]).error([*dense, *more], [*dense, *more]) < 1e-7


def test_logits_far_below_zero_are_no_scores() -> None:
    boxes, objectness, _ = scene()
    maps = [part.transpose(0, 2, 1).reshape(SAMPLES, -1, SIDE, SIDE) for part in (boxes, np.log(objectness))]
    maps[1] = np.where(maps[1] > -1, 4.0, maps[1])
    nothing = [maps[0], np.full_like(maps[1], -1e4)]
    with np.errstate(over="raise"):
        assert found(maps).error(maps, nothing) == pytest.approx(1)


def test_rounding_moves_the_distance_by_what_two_levels_differ() -> None:
    dense = [np.concatenate(scene(), axis=2).astype(np.float32)]
    again = [dense[0] * np.random.default_rng(1).uniform(1 - 1e-3, 1 + 1e-3, dense[0].shape).astype(np.float32)]
    detections = found(dense)
    noise = Noise.between(dense, again, detections)
    assert noise.relative == pytest.approx(4 * detections.error(dense, again))
    assert noise.covers(compare(dense, again, detections))
    assert not noise.covers(compare(dense, [worse(dense[0])], detections))


def test_a_repair_of_a_detector_goes_by_what_it_finds() -> None:
    model = detector()
    options = RepairOptions(samples=48, verify_samples=24, refit=RefitRecipe(rows=1000))
    result = repair(pruned(model, 0.5), images(72, seed=2, shape=(3, 64, 64)), options, dense=model)
    assert result.verification is not None
    errors = [item.fidelity.detection_error for item in result.candidates]
    assert None not in errors
    (chosen,) = (item for item in result.candidates if item.options == result.options)
    assert chosen.fidelity.detection_error == min(error for error in errors if error is not None)
    assert result.verification.after.divergence == result.verification.after.detection_error
    assert result.verification.after.divergence < result.verification.before.divergence
