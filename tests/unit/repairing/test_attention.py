"""Where a dense detector is confident: maps told from rows of places, and the shares of the places of a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_asr import RefitRecipe, RepairOptions
from onnx_asr.engine.session import Runtime
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.samples import Calibration
from onnx_asr.repairing.attention import Attention, attention_of
from onnx_asr.repairing.pipeline import repair
from tests.graphs import detector, images, net, pruned, residual_net, run

SAMPLES, SIDE = 20, 128
ANCHORS, CLASSES = 3, 4


def blobs(side: int) -> np.ndarray:
    """Confidence [N, side, side]: one round object an image, in the same place at every size."""
    middles = np.random.default_rng(0).uniform(0.2, 0.8, (SAMPLES, 2, 1, 1))
    grid = (np.stack(np.mgrid[:side, :side]) + 0.5) / side
    return np.asarray(0.9 * np.exp(-np.square(grid - middles).sum(axis=1) / 0.01))


def copying(value: np.ndarray) -> onnx.ModelProto:
    """A model whose output is its input, beside an image of zeros."""
    shape = ",".join(map(str, value.shape[1:]))
    return net(
        f"g (float[N,3,{SIDE},{SIDE}] image, float[N,{shape}] given) => (float[N,{shape}] found) "
        "{ found = Identity (given) }"
    )


def seen(value: np.ndarray, batch: int = 8) -> Attention | None:
    image = np.zeros((len(value), 3, SIDE, SIDE), np.float32)
    parts = [slice(begin, begin + batch) for begin in range(0, len(value), batch)]
    chunks = tuple({"image": image[part], "given": value[part].astype(np.float32)} for part in parts)
    return attention_of(copying(value), Calibration(chunks, len(value), batch, ""), Runtime())


def channels(confidence: np.ndarray) -> np.ndarray:
    """Boxes, objectness and classes along a new last axis."""
    generator = np.random.default_rng(1)
    boxes = generator.uniform(0, 64, (*confidence.shape, 4))
    classes = 0.05 * generator.uniform(0, 1, (*confidence.shape, CLASSES))
    classes[..., 1] += 0.9
    return np.concatenate([boxes, confidence[..., None], classes], axis=-1)


def rows(order: tuple[int, ...], anchors_first: bool) -> np.ndarray:
    """Places of maps of three sizes in one row, the second of three anchors being the one that sees the objects."""
    parts = []
    for side in order:
        maps = np.zeros((SAMPLES, ANCHORS, side, side))
        maps[:, 1] = blobs(side)
        parts.append((maps if anchors_first else np.moveaxis(maps, 1, -1)).reshape(SAMPLES, -1))
    return channels(np.concatenate(parts, axis=1))


LAYOUTS: dict[str, Any] = {
    "strides ascend, anchors first": lambda: rows((16, 8, 4), True),
    "strides ascend, places first": lambda: rows((16, 8, 4), False),
    "strides descend": lambda: rows((4, 8, 16), True),
    "map": lambda: np.moveaxis(channels(blobs(16)), -1, 1),
    "map of anchors": lambda: channels(np.stack([0 * blobs(16), blobs(16)], axis=1)),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_objects_are_found_where_they_are(make: Any) -> None:
    attention = seen(make())
    assert attention is not None
    assert attention.maps.shape == (SAMPLES, 16, 16)
    highest = (np.unravel_index(maps.argmax(), maps.shape) for maps in attention.maps)
    wanted = (np.unravel_index(maps.argmax(), maps.shape) for maps in blobs(16))
    assert max(np.abs(np.subtract(one, two)).max() for one, two in zip(highest, wanted, strict=True)) <= 1


def test_shares_add_up_and_are_alike_where_nothing_is() -> None:
    maps = np.zeros((2, 4, 4))
    maps[0, 1, 2] = 0.6
    maps[0, 3, 3] = 0.2
    attention = Attention(maps)
    same = attention.shares(2, (4, 4), 0.5)
    assert same[0, 6] == pytest.approx(0.5 / 16 + 0.5 * 0.75)
    assert same[0, 15] == pytest.approx(0.5 / 16 + 0.5 * 0.25)
    assert same[0, 0] == pytest.approx(0.5 / 16)
    np.testing.assert_allclose(same[1], 1 / 16)
    coarse, fine = attention.shares(1, (2, 2), 1.0)[0], attention.shares(1, (8, 8), 1.0)[0].reshape(8, 8)
    np.testing.assert_allclose(coarse, [0, 0.75, 0, 0.25])
    np.testing.assert_allclose(fine[2:4, 4:6], 0.75 / 4)
    np.testing.assert_allclose(fine.sum(), 1)


def test_other_networks_have_none_and_classifiers_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(np.random.default_rng(0).uniform(0, 1, (SAMPLES, 3, 8, 8))) is None
    uneven = rows((16, 8, 4), True)[:, :-1]  # one place less than any maps have
    assert seen(uneven) is None
    monkeypatch.setattr("onnx_asr.repairing.attention.Session", None)
    assert attention_of(residual_net(), Calibration(({"x": images(8, seed=0)},), 8, 8, ""), Runtime()) is None


def test_of_inputs_that_are_no_images_and_samples_of_several_sizes_there_is_none() -> None:
    value = channels(np.where(np.arange(8) == 3, blobs(16).max(axis=(1, 2))[:, None], 0.0)).astype(np.float32)
    flat = net("g (float[N,8,9] given) => (float[N,8,9] found) { found = Identity (given) }")
    chunks = tuple({"given": value[part]} for part in (slice(0, 16), slice(16, 20)))
    assert attention_of(flat, Calibration(chunks, SAMPLES, 16, ""), Runtime()) is None

    value = rows((16, 8, 4), True).astype(np.float32)
    image = np.zeros((SAMPLES, 3, SIDE, SIDE), np.float32)
    model = net(
        f"g (float[N,3,{SIDE},{SIDE}] image, float[N,A,9] given) => (float[N,A,9] found) {{ found = Identity (given) }}"
    )
    chunks = ({"image": image[:16], "given": value[:16]}, {"image": image[16:], "given": value[16:, :700]})
    assert attention_of(model, Calibration(chunks, SAMPLES, 16, ""), Runtime()) is None


def test_the_samples_remember_it(monkeypatch: pytest.MonkeyPatch) -> None:
    value = rows((16, 8, 4), True).astype(np.float32)
    model, image = copying(value), np.zeros((SAMPLES, 3, SIDE, SIDE), np.float32)
    chunks = tuple({"image": image[part], "given": value[part]} for part in (slice(0, 16), slice(16, 20)))
    calibration = Calibration(chunks, SAMPLES, 16, "")
    few = attention_of(model, calibration.head(16), Runtime())
    first = attention_of(model, calibration, Runtime())
    assert few is not None
    assert first is not None
    assert (len(few.maps), len(first.maps)) == (16, SAMPLES)
    monkeypatch.setattr("onnx_asr.repairing.attention.Session", None)
    assert attention_of(model, calibration, Runtime()) is first
    assert attention_of(model, calibration.head(16), Runtime()) is first


def test_a_refit_of_a_detector_is_closer_where_something_is() -> None:
    model, x = detector(), images(96, seed=4, shape=(3, 64, 64))
    damaged = pruned(model, 0.7)
    dense = run(model, {"image": x})["boxes"]
    confidence = dense[..., 6:7]  # its one score that is nearly always low
    errors = {}
    for share in (0.0, 0.7):
        options = RepairOptions("refit", samples=96, verify_samples=0, refit=RefitRecipe(600, detection_rows=share))
        found = run(repair(damaged, x, options, dense=model).model, {"image": x})["boxes"]
        errors[share] = float((confidence * np.square(dense - found)).sum())
    assert errors[0.7] < 0.99 * errors[0.0]


def test_any_number_of_threads_gives_the_same_bits() -> None:
    model, x = detector(), images(40, seed=4, shape=(3, 64, 64))
    damaged = pruned(model, 0.7)
    options = RepairOptions("refit", samples=40, verify_samples=0, refit=RefitRecipe(600, detection_rows=0.7))
    one, *others = (
        repair(damaged, x, options, dense=model, execution=Execution(Runtime(threads=threads), limit)).model
        for threads, limit in ((1, None), (2, None), (5, None), (5, 0))
    )
    assert [other.SerializeToString() for other in others] == 3 * [one.SerializeToString()]
