"""Filters without weights: their output is a constant, but its float32 mean is not exactly that constant."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_asr import RepairOptions, RepairResult, repair
from tests.graphs import (
    digit_images,
    digits,
    first_output,
    folded,
    images,
    magnitude_masks,
    masked,
    net,
    parameter,
    per_channel,
    positions,
    residual_net,
    run,
    set_parameter,
)

COUNT = 64


def repaired(model: onnx.ModelProto, dense: onnx.ModelProto, x: np.ndarray, method: str = "paired") -> RepairResult:
    return repair(model, x, RepairOptions(method=method, samples=len(x), verify_samples=0), dense=dense)


def emptied(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """Set the first filters of every Conv but the first to zero; only a constant, the bias, is left of each."""
    masks = {}
    for position in positions(model, "Conv")[1:]:
        mask = np.ones(parameter(model, position, 1).shape, bool)
        mask[:count] = False
        masks[position] = mask
    return masked(model, masks)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", ["residual", "resnet", "vgg", "mobilenet", "densenet"])
def test_paired_applied_twice_changes_nothing_more(name: str, fold: bool) -> None:
    model = residual_net(1) if name == "residual" else digits(name)
    x = images(COUNT, seed=5) if name == "residual" else digit_images()[0][:COUNT]
    masks = magnitude_masks(model, 0.9)
    damaged = masked(model, masks)
    if fold:
        # folding keeps the Conv nodes and their order, and multiplies rows: the zeros are where they were
        model, damaged = folded(model), folded(model)
        for position, mask in zip(positions(damaged, "Conv", "ConvTranspose", "Gemm"), masks.values(), strict=True):
            set_parameter(damaged, position, 1, parameter(damaged, position, 1) * mask)
    once = repaired(damaged, model, x).model
    twice = repaired(once, model, x).model
    first, second = first_output(once, x), first_output(twice, x)
    assert np.abs(first - first_output(damaged, x)).max() > 0.1
    np.testing.assert_allclose(second, first, atol=1e-4 * max(1.0, float(np.abs(first).max())))


def plateau(bias: float, spread: float) -> onnx.ModelProto:
    """A second convolution whose channels vary little around a large bias."""
    model = net(
        """
        plateau (float[N,3,8,8] x) => (float[N,6,8,8] b) {
          a = Conv <pads=[1,1,1,1]> (x, a_w, a_b)
          ar = Relu (a)
          b = Conv <pads=[1,1,1,1]> (ar, b_w, b_b)
        }
        """,
        a_w=(6, 3, 3, 3),
        a_b=(6,),
        b_w=(6, 6, 3, 3),
        b_b=np.full(6, bias, np.float32) * np.linspace(0.9, 1.1, 6, dtype=np.float32),
    )
    set_parameter(model, 2, 1, parameter(model, 2, 1) * spread)
    return model


@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-2, 1e-3])
def test_an_emptied_filter_becomes_the_dense_mean(spread: float) -> None:
    """Its deviation is one unit in the last place of the bias; taken for signal, the gain would be a million."""
    model = plateau(0.3, spread)
    damaged = emptied(model, 3)
    x = images(COUNT, seed=2)
    for method in ("paired", "raw", "asr"):
        result = repaired(damaged, model, x, method)
        wanted, got = (per_channel(run(item, {"x": x}, ["b"])["b"]) for item in (model, result.model))
        np.testing.assert_allclose(got[:3], np.broadcast_to(wanted[:3].mean(axis=1)[:, None], got[:3].shape), atol=1e-6)
        gain = result.points[-1].gain
        assert gain is not None
        assert gain[2] < 100, method


def test_a_layer_that_is_dead_altogether_keeps_its_gain() -> None:
    model = plateau(0.3, 1e-2)
    damaged = emptied(model, 6)
    x = images(COUNT, seed=2)
    result = repaired(damaged, model, x, "layerwise")
    assert result.points[-1].gain == (1.0, 1.0, 1.0)


def test_emptied_filters_are_counted() -> None:
    model = plateau(0.3, 1.0)
    x = images(COUNT, seed=2)
    assert [point.dead for point in repaired(emptied(model, 4), model, x).points] == [0, 4]
    assert [point.dead for point in repaired(model, model, x).points] == [0, 0]
