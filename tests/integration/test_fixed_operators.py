"""Layers that were never trained, through every command."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr import ChannelPruneOptions, CompressOptions, PruneOptions, RepairOptions, SensitivityOptions
from tests.graphs import bn, constant, images, net, set_parameter

FIXED = {"scale": "Conv:s", "blur": "Conv:b", "mean": "Conv:y"}
"""Weights to the names of their layers."""
SETTINGS = RepairOptions(samples=32, verify_samples=8, batch_size=8)


def samples() -> np.ndarray:
    return images(48, seed=1, shape=(3, 16, 16))


def detector() -> onnx.ModelProto:
    """Normalisation, a blur between two convolutions, and the mean of a distribution over 8 bins."""
    text = """g (float[N,3,16,16] x) => (float[N,1,4,64] y) {
        s = Conv <group=3> (x, scale)  c = Conv <pads=[1,1,1,1]> (s, v)  r = Relu (c)
        b = Conv <group=8, strides=[2,2], pads=[1,1,1,1]> (r, blur)
        n = BatchNormalization (b, n_gamma, n_beta, n_mean, n_var)
        h = Conv (n, w)  p = Reshape (h, bins)  t = Transpose <perm=[0,2,1,3]> (p)  q = Softmax <axis=1> (t)
        y = Conv (q, mean) }"""
    return net(
        text,
        scale=np.array([2.1, 2.2, 2.3], np.float32).reshape(3, 1, 1, 1),
        blur=np.tile(np.float32(np.outer([1, 2, 1], [1, 2, 1]) / 16), (8, 1, 1, 1)),
        mean=np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1),
        bins=np.array([0, 4, 8, 64]),
        v=(8, 3, 3, 3),
        w=(32, 8, 1, 1),
        **bn("n", channels=8),
    )


def fixed_skips(skips: Any) -> list[str]:
    return sorted(skip.name for skip in skips if skip.code == "fixed-operator")


def assert_fixed(model: onnx.ModelProto, dense: onnx.ModelProto) -> None:
    for weight in FIXED:
        np.testing.assert_array_equal(constant(model, weight), constant(dense, weight))


@pytest.mark.parametrize(
    "options",
    [
        PruneOptions(0.5),
        PruneOptions(0.5, scope="layer"),
        PruneOptions(0.5, scope="erk"),
        PruneOptions(0.5, score="lamp"),
        PruneOptions(pattern="2:4"),
        PruneOptions(0.5, pattern="4x1"),
    ],
    ids=lambda options: f"{options.pattern}-{options.scope}-{options.score}",
)
def test_prune_leaves_them_alone(options: PruneOptions) -> None:
    dense = detector()
    result = onnx_asr.prune(dense, options=options)
    assert_fixed(result.model, dense)
    assert fixed_skips(result.skips) == sorted(FIXED.values())
    assert {layer.name for layer in result.layers} <= {"Conv:c", "Conv:h"}


def test_include_forces_them_in() -> None:
    result = onnx_asr.prune(detector(), options=PruneOptions(0.5, scope="layer", include=("^mean$", "^w$")))
    assert fixed_skips(result.skips) == []
    assert (constant(result.model, "mean") == 0).sum() == 4
    assert {layer.name for layer in result.layers} == {"Conv:h", "Conv:y"}


def test_removed_channels_pass_through_a_blur() -> None:
    dense = detector()
    result = onnx_asr.prune_channels(dense, ChannelPruneOptions(0.5))
    np.testing.assert_array_equal(constant(result.model, "blur"), constant(dense, "blur")[:4])
    np.testing.assert_array_equal(constant(result.model, "mean"), constant(dense, "mean"))
    np.testing.assert_array_equal(constant(result.model, "scale"), constant(dense, "scale"))
    assert fixed_skips(result.skips) == sorted(FIXED.values())
    repaired = onnx_asr.repair(result.model, samples(), replace(SETTINGS, method="refit"), dense=dense)
    np.testing.assert_array_equal(constant(repaired.model, "blur"), constant(dense, "blur")[:4])


def test_channels_that_a_permutation_reads_stay() -> None:
    text = """g (float[N,3,8,8] x) => (float[N,4,8,8] y) {
        a = Conv (x, v)  r = Relu (a)  p = Conv (r, mix)  b = Conv (p, u)  q = Relu (b)  y = Conv (q, w) }"""
    mix = np.eye(8, dtype=np.float32)[[1, 0, 3, 2, 5, 4, 7, 6]].reshape(8, 8, 1, 1)
    dense = net(text, mix=mix, v=(8, 3, 1, 1), u=(8, 8, 1, 1), w=(4, 8, 1, 1))
    result = onnx_asr.prune_channels(dense, ChannelPruneOptions(0.5))
    np.testing.assert_array_equal(constant(result.model, "mix"), mix)
    assert [(group.layers, group.kept) for group in result.groups] == [(("Conv:b",), 4)]


@pytest.mark.parametrize("method", ["auto", "refit", "paired", "bn", "asr", "raw", "layerwise"])
def test_repair_leaves_them_alone(method: Any) -> None:
    dense = detector()
    pruned = onnx_asr.prune(dense, options=PruneOptions(0.6)).model
    result = onnx_asr.repair(pruned, samples(), replace(SETTINGS, method=method), dense=dense)
    assert_fixed(result.model, dense)
    assert set(FIXED.values()) <= set(fixed_skips(result.skips))
    assert not {point.name for point in result.points} & set(FIXED.values())
    if method in ("bn", "paired"):
        assert "BatchNormalization:n" in {point.name for point in result.points}


def test_compress_and_sensitivity_leave_them_alone() -> None:
    dense = detector()
    result = onnx_asr.compress(dense, samples(), CompressOptions(0.6, rounds=2, repair=SETTINGS))
    assert_fixed(result.model, dense)
    assert fixed_skips(result.repair.skips) == sorted(FIXED.values())
    tried = onnx_asr.sensitivity(dense, samples(), SensitivityOptions((0.5,), repair=SETTINGS))
    assert {layer.name for layer in tried.layers} == {"Conv:c", "Conv:h"}
    assert fixed_skips(tried.skips) == sorted(FIXED.values())


def test_inspect_lists_them() -> None:
    assert fixed_skips(onnx_asr.inspect(detector()).skips) == sorted(FIXED.values())


def test_a_fixed_operator_that_was_pruned_is_repaired_as_any_layer() -> None:
    dense = detector()
    pruned = onnx_asr.prune(dense, options=PruneOptions(0.5, scope="layer", include=("^mean$", "^w$"))).model
    result = onnx_asr.repair(pruned, samples(), replace(SETTINGS, method="refit"), dense=dense)
    assert fixed_skips(result.skips) == ["Conv:b", "Conv:s"]
    assert [note for note in result.notes if note.startswith("Conv:y: never trained")]
    assert "Conv:y" in {point.name for point in result.points}
    zeros = constant(pruned, "mean") == 0
    np.testing.assert_array_equal(constant(result.model, "mean") == 0, zeros)
    assert result.verification is not None
    assert result.verification.after.distance < result.verification.before.distance


def test_a_layer_that_pruning_made_look_fixed_is_repaired() -> None:
    """The dense model tells."""
    dense = detector()
    only = np.zeros((32, 8, 1, 1), np.float32)
    only[range(32), np.arange(32) % 8] = 1
    set_parameter(dense, 5, 1, only + 0.01 * np.random.default_rng(0).standard_normal(only.shape) * (only == 0))
    pruned = onnx.ModelProto()
    pruned.CopyFrom(dense)
    set_parameter(pruned, 5, 1, only)
    result = onnx_asr.repair(pruned, samples(), replace(SETTINGS, method="refit"), dense=dense)
    assert "Conv:h" in {point.name for point in result.points}


def test_a_network_of_fixed_operators_alone_is_refused() -> None:
    text = "g (float[N,8,H,W] x) => (float[N,8,H,W] y) { y = Conv <group=8> (x, w) }"
    model = net(text, w=np.full((8, 1, 3, 3), 1 / 9, np.float32))
    with pytest.raises(onnx_asr.OptionError, match=r"fixed operators.*--include"):
        onnx_asr.prune(model, options=PruneOptions(0.5))
