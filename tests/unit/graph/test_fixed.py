"""Fixed operators told from trained layers; what the commands do with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_asr.graph.fixed import FIXED, fixed_by_own_weights, without_fixed
from onnx_asr.graph.points import NormPoint, Survey, survey
from tests.graphs import bn, index, net

CONV = "g (float[N,C,H,W] x) => (float[N,D,H,W] y) { y = Conv <group={groups}> (x, w) }"
TRANSPOSED = "g (float[N,C,H,W] x) => (float[N,D,H,W] y) { y = ConvTranspose <group={groups}> (x, w) }"
INSIDE = "g (float[N,C,H,W] x) => (float[N,D,H,W] y) { t = Tanh (x)  y = Conv <group={groups}> (t, w) }"
MATRIX = "g (float[N,C] x) => (float[N,D] y) { y = MatMul (x, w) }"
MEAN = """g (float[N,4,C,A] x) => (float[N,1,4,A] y) {
    t = Transpose <perm=[0,2,1,3]> (x)  s = Softmax <axis=1> (t)  i = Identity (s)  y = Conv (i, w) }"""
MEAN_MATRIX = "g (float[N,C] x) => (float[N,D] y) { s = Softmax <axis=1> (x)  y = Gemm (s, w) }"

YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])
SOBEL = np.array([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
HAAR = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).reshape(4, 1, 2, 2) / 2
COSINES = np.array([[np.cos(np.pi * u * (2 * x + 1) / 16) for x in range(8)] for u in range(8)])
GRID = np.stack(np.meshgrid(np.linspace(-1, 1, 12), np.linspace(0, 1, 8)), axis=-1).reshape(96, 2)


def bilinear(size: int) -> np.ndarray:
    """The kernel of FCN's upsampling, by its definition in the Caffe filler."""
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    line = 1 - np.abs(np.arange(size) - centre) / factor
    return np.outer(line, line)


def gaussian(size: int) -> np.ndarray:
    line = np.exp(-np.square(np.arange(size) - size // 2) / 2)
    return np.outer(line, line) / line.sum() ** 2


def each(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A depthwise weight with one kernel."""
    return np.tile(kernel, (channels, 1, 1, 1))


def diagonal(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The same as a full weight."""
    weight = np.zeros((channels, channels, *kernel.shape))
    weight[range(channels), range(channels)] = kernel
    return weight


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def signs(*shape: int) -> np.ndarray:
    return np.sign(noise(*shape)) / 4


FIXED_WEIGHTS: dict[str, tuple[str, np.ndarray, int]] = {
    "distribution's mean": (MEAN, np.arange(16).reshape(1, 16, 1, 1), 1),
    "age": (MEAN_MATRIX, np.arange(101).reshape(101, 1), 1),
    "coordinates": (MEAN_MATRIX, GRID, 1),
    "identity": (INSIDE, np.eye(8).reshape(8, 8, 1, 1), 1),
    "permutation": (MATRIX, np.eye(8)[[3, 1, 0, 2, 7, 6, 5, 4]], 1),
    "grey to colour": (CONV, np.ones((3, 1, 1, 1)), 1),
    "unfolding": (INSIDE, np.eye(9).reshape(9, 1, 3, 3), 1),
    "folding": (TRANSPOSED, np.eye(9).reshape(9, 1, 3, 3), 1),
    "scale, depthwise": (CONV, np.array([1 / 58, 1 / 57, 1 / 56]).reshape(3, 1, 1, 1), 3),
    "scale, full": (CONV, np.diag([1 / 58, 1 / 57, 1 / 56]).reshape(3, 3, 1, 1), 1),
    "YUV": (CONV, YUV.reshape(3, 3, 1, 1), 1),
    "YUV of BGR, 0 to 255": (CONV, 255 * YUV[:, ::-1].reshape(3, 3, 1, 1), 1),
    "RGB of YUV": (INSIDE, np.linalg.inv(YUV).reshape(3, 3, 1, 1), 1),
    "studio range": (MATRIX, np.array([[0.257, 0.504, 0.098], [-0.148, -0.291, 0.439], [0.439, -0.368, -0.071]]).T, 1),
    "luma": (CONV, YUV[:1].reshape(1, 3, 1, 1), 1),
    "average": (INSIDE, each(np.full((2, 2), 0.25), 8), 8),
    "blur": (INSIDE, each(np.outer([1, 2, 1], [1, 2, 1]) / 16, 8), 8),
    "blur, full": (INSIDE, diagonal(gaussian(5), 4), 1),
    "blur of one channel": (CONV, gaussian(5).reshape(1, 1, 5, 5), 1),
    "Sobel": (CONV, np.stack([SOBEL, SOBEL.T])[:, None], 1),
    "Sobel of colours": (CONV, np.tile(np.stack([SOBEL, SOBEL.T])[:, None], (3, 1, 1, 1)), 3),
    "Laplace": (CONV, np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).reshape(1, 1, 3, 3), 1),
    "bilinear": (TRANSPOSED, diagonal(bilinear(16), 5), 1),
    "bilinear, depthwise": (TRANSPOSED, each(bilinear(4), 6), 6),
    "Haar": (CONV, np.tile(HAAR, (3, 1, 1, 1)), 3),
    "inverse Haar": (TRANSPOSED, np.tile(HAAR, (3, 1, 1, 1)), 3),
    "cosine transform": (CONV, np.kron(COSINES, COSINES).reshape(64, 1, 8, 8), 1),
    "its inverse": (TRANSPOSED, np.kron(COSINES, COSINES).reshape(64, 1, 8, 8), 1),
    "cosine matrix": (MATRIX, COSINES, 1),
}

TRAINED_WEIGHTS: dict[str, tuple[str, np.ndarray, int]] = {
    "numbers in order": (CONV, np.arange(16).reshape(1, 16, 1, 1), 1),
    "numbers in order, matrix": (MATRIX, np.arange(16).reshape(4, 4), 1),
    "behind a Softmax": (MEAN, noise(1, 16, 1, 1), 1),
    "steps with an exception": (MEAN, np.r_[np.arange(15), 15.01].reshape(1, 16, 1, 1), 1),
    "constants": (CONV, np.full((16, 3, 3, 3), 0.25), 1),
    "constants, grey": (CONV, np.full((16, 1, 3, 3), 0.25), 1),
    "constants, one output": (INSIDE, np.full((1, 16, 3, 3), 0.25), 1),
    "ones, matrix": (MATRIX, np.ones((16, 10)), 1),
    "ones, one output": (MATRIX, np.ones((16, 1)), 1),
    "zeros": (CONV, np.zeros((8, 1, 3, 3)), 8),
    "zeros on colours": (CONV, np.zeros((3, 3, 1, 1)), 1),
    "no numbers": (CONV, np.full((3, 3, 1, 1), np.nan), 1),
    "infinite": (CONV, np.full((4, 1, 3, 3), np.inf), 4),
    "binary": (CONV, signs(16, 8, 3, 3), 1),
    "binary, grey": (CONV, signs(16, 1, 3, 3), 1),
    "binary, depthwise": (INSIDE, signs(16, 1, 3, 3), 16),
    "depthwise": (INSIDE, noise(8, 1, 3, 3), 8),
    "one filter, learned for all channels": (INSIDE, each(noise(3, 3), 8), 8),
    "scales within the network": (INSIDE, noise(3, 1, 1, 1), 3),
    "scales of many inputs": (CONV, noise(8, 1, 1, 1), 8),
    "1 x 1 on colours": (CONV, noise(3, 3, 1, 1), 1),
    "one of colours": (CONV, noise(1, 3, 1, 1), 1),
    "one number": (INSIDE, np.full((1, 1, 1, 1), 0.37), 1),
    "orthogonal": (MATRIX, np.linalg.qr(noise(8, 8))[0], 1),
    "all but one weight pruned": (INSIDE, np.diag(noise(8)).reshape(8, 8, 1, 1), 1),
}


def found(text: str, weight: np.ndarray, groups: int, **others: Any) -> Survey:
    graph = index(net(text.replace("{groups}", str(groups)), w=weight, **others))
    return without_fixed(graph, survey(graph), fixed_by_own_weights(graph))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", FIXED_WEIGHTS)
def test_an_operator_that_was_written_down_is_skipped(name: str, dtype: Any) -> None:
    text, weight, groups = FIXED_WEIGHTS[name]
    if dtype == np.float16:
        text = text.replace("float[", "float16[")
    result = found(text, weight.astype(dtype), groups)
    assert result.points == ()
    assert [skip.code for skip in result.skips] == [FIXED.code]


@pytest.mark.parametrize("name", TRAINED_WEIGHTS)
def test_a_layer_that_may_have_been_trained_stays(name: str) -> None:
    text, weight, groups = TRAINED_WEIGHTS[name]
    result = found(text, weight.astype(np.float32), groups)
    assert len(result.layers) == 1
    assert result.skips == ()


@pytest.mark.parametrize("name", [name for name in FIXED_WEIGHTS if "scale" not in name])
def test_a_change_of_one_weight_makes_a_trained_layer(name: str) -> None:
    text, weight, groups = FIXED_WEIGHTS[name]
    changed = weight.astype(np.float32)
    changed.flat[np.flatnonzero(np.abs(changed) > 1e-3)[-1]] *= 1.5
    assert len(found(text, changed, groups).layers) == 1


SHAPES = {(1, 3, 1, 1): 1, (3, 3, 1, 1): 1, (1, 1, 3, 3): 1, (2, 1, 3, 3): 2, (4, 1, 1, 1): 4, (4, 4, 1, 1): 1}


@given(seed=st.integers(0, 10**6), shape=st.sampled_from(list(SHAPES)))
def test_random_weights_of_few_digits_are_no_fixed_operator(seed: int, shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float16).astype(np.float32)
    assert len(found(INSIDE, weight, SHAPES[shape]).layers) == 1


def test_a_batchnorm_behind_a_fixed_operator_is_a_point() -> None:
    text = """g (float[N,8,H,W] x) => (float[N,8,H,W] y) {
        c = Conv <group=8> (x, w)  y = BatchNormalization (c, b_gamma, b_beta, b_mean, b_var) }"""
    result = found(text, each(np.full((3, 3), 1 / 9), 8).astype(np.float32), 8, **bn("b", channels=8))
    (point,) = result.points
    assert isinstance(point, NormPoint)
    assert (point.node, point.tensor, point.channels, point.level) == (1, "c", 8, 1)
