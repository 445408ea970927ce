"""Shrinking: dead and unread channels are removed, the function stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

import onnx_asr.pruning.shrinking
from onnx_asr.errors import ModelError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.pruning.options import PruneOptions
from onnx_asr.pruning.shrinking import shrink
from onnx_asr.pruning.zeros import prune
from tests.graphs import (
    bn,
    copy,
    digit_images,
    digits,
    first_output,
    images,
    net,
    parameter,
    positions,
    random_net,
    set_parameter,
)

# name: (body of the graph from x [N,4,8,8] to y, weights, node and rows that are dead, channels left in it)
GRAPHS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "bias through BatchNormalization and activation": (
        """a = Conv <pads=[1,1,1,1]> (x, wa, ba) n = BatchNormalization (a, n_gamma, n_beta, n_mean, n_var)
        r = Sigmoid (n) y = Conv (r, wy, by)""",
        {"wa": (6, 4, 3, 3), "ba": (6,), "wy": (5, 6, 3, 3), "by": (5,), **bn("n", channels=6)},
        0,
        4,
    ),
    "into a convolution without bias": (
        "a = Conv (x, wa, ba) r = Tanh (a) b = Conv (r, wb) y = Conv (b, wy)",
        {"wa": (6, 4, 3, 3), "ba": (6,), "wb": (5, 6, 1, 1), "wy": (3, 5, 1, 1)},
        0,
        4,
    ),
    "into a BatchNormalization behind the reader": (
        """a = Conv (x, wa, ba) b = Conv (a, wb) n = BatchNormalization (b, n_gamma, n_beta, n_mean, n_var)
        y = Conv (n, wy)""",
        {"wa": (6, 4, 3, 3), "ba": (6,), "wb": (5, 6, 1, 1), "wy": (3, 5, 1, 1), **bn("n", channels=5)},
        0,
        4,
    ),
    "padding: a constant of 0 goes": (
        "a = Conv (x, wa) r = Relu (a) y = Conv <pads=[1,1,1,1]> (r, wy)",
        {"wa": (6, 4, 3, 3), "wy": (5, 6, 3, 3)},
        0,
        4,
    ),
    "padding: any other constant stays": (
        "a = Conv (x, wa, ba) y = Conv <pads=[1,1,1,1]> (a, wy)",
        {"wa": (6, 4, 3, 3), "ba": (6,), "wy": (5, 6, 3, 3)},
        0,
        6,
    ),
    "through a depthwise convolution": (
        "a = Conv (x, wa, ba) d = Conv <group=6> (a, wd, bd) r = Elu (d) y = Conv (r, wy)",
        {"wa": (6, 4, 3, 3), "ba": (6,), "wd": (6, 1, 2, 2), "bd": (6,), "wy": (5, 6, 1, 1)},
        0,
        4,
    ),
    "residual: one dead branch keeps the channel": (
        "a = Conv (x, wa, ba) b = Conv (x, wb) s = Add (a, b) y = Conv (s, wy)",
        {"wa": (6, 4, 1, 1), "ba": (6,), "wb": (6, 4, 1, 1), "wy": (5, 6, 1, 1)},
        0,
        6,
    ),
    "concat and classifier": (
        """a = Conv <strides=[4,4]> (x, wa, ba) b = Conv <strides=[4,4]> (x, wb) c = Concat <axis=1> (a, b)
        m = MaxPool <kernel_shape=[2,2], pads=[1,1,1,1]> (c) f = Flatten (m)
        y = Gemm <alpha=0.5, beta=2.0> (f, wy, by)""",
        {"wa": (6, 4, 1, 1), "ba": (6,), "wb": (3, 4, 1, 1), "wy": (81, 5), "by": (5,)},
        0,
        4,
    ),
    "matrix product without bias": (
        "a = Conv (x, wa, ba) g = GlobalMaxPool (a) f = Flatten (g) y = MatMul (f, wy)",
        {"wa": (6, 4, 1, 1), "ba": (6,), "wy": (6, 5)},
        0,
        4,
    ),
    "grouped: position by position": (
        "a = Conv (x, wa, ba) g = Conv <group=2> (a, wg) y = Conv (g, wy)",
        {"wa": (6, 4, 1, 1), "ba": (6,), "wg": (4, 3, 1, 1), "wy": (5, 4, 1, 1)},
        0,
        4,
    ),
}


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Add the shapes of all tensors."""
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def dead_net(name: str) -> onnx.ModelProto:
    body, weights, node, _ = GRAPHS[name]
    model = typed(net(f"g (float[N,4,8,8] x) => (y) {{ {body} }}", **weights))
    weight = parameter(model, node, 1).copy()
    weight[[1, 4]] = 0
    set_parameter(model, node, 1, weight)
    return model


@pytest.mark.parametrize("name", GRAPHS)
def test_dead_channels_go_and_the_function_stays(name: str) -> None:
    model = dead_net(name)
    before = model.SerializeToString(deterministic=True)
    result = shrink(model)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(result.model, full_check=True)
    x = images(3, seed=0, shape=(4, 8, 8))
    expected = first_output(model, x)
    np.testing.assert_allclose(first_output(result.model, x), expected, atol=1e-5 * np.abs(expected).max())
    _, _, node, left = GRAPHS[name]
    assert len(parameter(result.model, node, 1)) == left
    assert result.error < 1e-6
    assert bool(result.notes) == (name == "padding: any other constant stays")


def test_channels_that_nobody_reads_go_and_so_does_what_only_they_read() -> None:
    model = net(
        "g (float[N,4,8,8] x) => (y) { a = Conv (x, wa) b = Relu (a) c = Conv (b, wc) d = Relu (c) y = Conv (d, wy) }",
        wa=(6, 4, 1, 1),
        wc=(5, 6, 1, 1),
        wy=(3, 5, 1, 1),
    )
    middle, last = parameter(model, 2, 1).copy(), parameter(model, 4, 1).copy()
    last[:, 2] = 0
    middle[[0, 1, 3, 4], 3] = 0  # only the channel that goes reads this one
    set_parameter(model, 2, 1, middle)
    set_parameter(model, 4, 1, last)
    result = shrink(model)
    assert parameter(result.model, 2, 1).shape[:2] == (4, 5)
    assert [(layer.layers, layer.channels, layer.kept) for layer in result.layers] == [
        (("Conv:a",), 6, 5),
        (("Conv:c",), 5, 4),
    ]
    x = images(2, seed=0, shape=(4, 8, 8))
    np.testing.assert_allclose(first_output(result.model, x), first_output(model, x), atol=1e-5)


def test_a_layer_that_is_all_dead_keeps_a_channel() -> None:
    model = dead_net("padding: a constant of 0 goes")
    set_parameter(model, 0, 1, np.zeros((6, 4, 3, 3)))
    result = shrink(model)
    assert len(parameter(result.model, 0, 1)) == 1
    x = images(2, seed=0, shape=(4, 8, 8))
    np.testing.assert_array_equal(first_output(result.model, x), first_output(model, x))


@given(st.integers(0, 10**6))
def test_random_graphs_with_dead_rows_and_columns_keep_their_function(seed: int) -> None:
    model = random_net(seed)
    draw = np.random.default_rng(seed)
    for position in positions(model, "Conv", "ConvTranspose", "MatMul"):
        weight = parameter(model, position, 1).copy()
        for axis in (0, 1):
            weight[(slice(None),) * axis + (draw.random(weight.shape[axis]) < 0.5,)] = 0
        set_parameter(model, position, 1, weight)
    result = shrink(model)
    onnx.checker.check_model(result.model, full_check=True)
    x = images(1, seed=seed, shape=(4, 5, 5))
    expected = first_output(model, x)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(first_output(result.model, x), expected, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "vgg"])
def test_sparse_trained_nets_get_smaller(name: str) -> None:
    pruned = prune(digits(name), options=PruneOptions(0.97)).model
    result = shrink(pruned)
    data = digit_images()[0][:16]
    expected = first_output(pruned, data)
    np.testing.assert_allclose(first_output(result.model, data), expected, atol=1e-5 * np.abs(expected).max())
    assert result.after.parameters < 0.5 * result.before.parameters
    assert result.after.flops < result.before.flops
    assert result.after.size < result.before.size
    again = shrink(result.model)
    assert again.layers == ()
    assert again.after.parameters == result.after.parameters


def test_float16_weights_allow_for_their_rounding() -> None:
    model = dead_net("matrix product without bias")
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    result = shrink(model)
    onnx.checker.check_model(result.model, full_check=True)
    assert parameter(result.model, 0, 1).shape[0] == 4
    assert parameter(result.model, 0, 1).dtype == np.float16


def test_a_dense_net_stays_as_it_is() -> None:
    model = digits("resnet")
    result = shrink(model)
    assert result.layers == ()
    assert result.model.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_a_result_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = onnx_asr.pruning.shrinking.remove

    def broken(index: GraphIndex, *arguments: Any) -> onnx.ModelProto:
        model = copy(original(index, *arguments))
        set_parameter(model, 0, 1, 2 * parameter(model, 0, 1))
        return model

    monkeypatch.setattr(onnx_asr.pruning.shrinking, "remove", broken)
    with pytest.raises(ModelError, match="differ"):
        shrink(dead_net("matrix product without bias"))
