"""Channels: groups, channels that cannot be removed and why; a smaller model computes what the masked one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnx_asr.arrays import Mask
from onnx_asr.channels.rules import trace
from onnx_asr.channels.units import (
    INPUT_SHAPES,
    KEPT_CHANNELS,
    Channels,
    missing_units,
    read_kept,
    read_shapes,
    remove,
)
from onnx_asr.errors import ModelError, StructureError
from onnx_asr.networks.cost import cost
from onnx_asr.networks.latency import random_feeds
from onnx_asr.networks.operations import Probe
from tests.graphs import (
    bn,
    copy,
    dense_net,
    digit_images,
    digits,
    images,
    index,
    net,
    parameter,
    random_net,
    residual_net,
    run,
)
from tools.paths import ASSETS

# name: (body of the graph from x [N,4,8,8] to y, weights, units that can be removed)
GRAPHS: dict[str, tuple[str, dict[str, Any], int]] = {
    "chain": (
        "a = Conv <pads=[1,1,1,1]> (x, wa, ba) b = Relu (a) y = Conv (b, wy)",
        {"wa": (6, 4, 3, 3), "ba": (6,), "wy": (5, 6, 3, 3)},
        6,
    ),
    "residual": (
        """a = Conv (x, wa) n = BatchNormalization (a, n_gamma, n_beta, n_mean, n_var) r = Relu (n)
        b = Conv <pads=[1,1,1,1]> (r, wb) c = Conv (b, wc) s = Add (c, r) t = Relu (s) y = Conv (t, wy)""",
        {"wa": (6, 4, 1, 1), "wb": (8, 6, 3, 3), "wc": (6, 8, 1, 1), "wy": (5, 6, 1, 1), **bn("n", channels=6)},
        14,
    ),
    "dense": (
        """a = Conv (x, wa) b = Conv <pads=[1,1,1,1]> (a, wb) c = Concat <axis=1> (a, b)
        n = BatchNormalization (c, n_gamma, n_beta, n_mean, n_var) d = Relu (n) e = Conv (d, we)
        f = Concat <axis=-3> (c, e) y = Conv (f, wy)""",
        {
            "wa": (6, 4, 1, 1),
            "wb": (5, 6, 3, 3),
            "we": (3, 11, 1, 1),
            "wy": (5, 14, 1, 1),
            **bn("n", channels=11),
        },
        14,
    ),
    "depthwise": (
        """a = Conv (x, wa) d = Conv <group=6, pads=[1,1,1,1]> (a, wd, bd) r = Clip (d, low, high)
        y = Conv (r, wy)""",
        {
            "wa": (6, 4, 1, 1),
            "wd": (12, 1, 3, 3),
            "bd": (12,),
            "wy": (5, 12, 1, 1),
            "low": np.float32(0),
            "high": np.float32(6),
        },
        6,
    ),
    "grouped": (
        "a = Conv (x, wa) g = Conv <group=2> (a, wg, bg) r = Sigmoid (g) y = Conv (r, wy)",
        {"wa": (6, 4, 1, 1), "wg": (8, 3, 3, 3), "bg": (8,), "wy": (5, 8, 1, 1)},
        7,
    ),
    "squeeze and excitation": (
        """a = Conv (x, wa) p = GlobalAveragePool (a) s = Conv (p, ws) t = Relu (s) u = Conv (t, wu)
        v = HardSigmoid (u) m = Mul (a, v) y = Conv (m, wy)""",
        {"wa": (6, 4, 1, 1), "ws": (3, 6, 1, 1), "wu": (6, 3, 1, 1), "wy": (5, 6, 1, 1)},
        9,
    ),
    "split": (
        """a = Conv (x, wa) b, c = Split <axis=1> (a, sizes) d = Tanh (b) e = Conv (c, we) f = Conv (d, wf)
        y = Add (e, f)""",
        {"wa": (7, 4, 1, 1), "sizes": np.array([3, 4]), "we": (5, 4, 1, 1), "wf": (5, 3, 1, 1)},
        7,
    ),
    "equal split": (
        "a = Conv (x, wa) b, c = Split <axis=1> (a) d = Mul (b, c) y = Conv (d, wy)",
        {"wa": (8, 4, 1, 1), "wy": (5, 4, 1, 1)},
        4,
    ),
    "slice": (
        "a = Conv (x, wa) b = Slice (a, starts, ends, axes) c = Conv (b, wc) d = Conv (a, wd) y = Add (c, d)",
        {
            "wa": (9, 4, 1, 1),
            "starts": np.array([2, 0]),
            "ends": np.array([-1, 2**63 - 1]),
            "axes": np.array([1, 2]),
            "wc": (5, 6, 1, 1),
            "wd": (5, 9, 1, 1),
        },
        9,
    ),
    "option A": (
        """a = Conv (x, wa) b = Conv <strides=[2,2]> (a, wb) s = Slice (a, starts, ends, axes, steps)
        p = Pad (s, pads) c = Add (b, p) d = Relu (c) y = Conv (d, wy)""",
        {
            "wa": (4, 4, 1, 1),
            "wb": (8, 4, 1, 1),
            "starts": np.array([0, 0]),
            "ends": np.array([2**63 - 1, 2**63 - 1]),
            "axes": np.array([2, 3]),
            "steps": np.array([2, 2]),
            "pads": np.array([0, 1, 0, 0, 0, 3, 0, 0]),
            "wy": (5, 8, 1, 1),
        },
        8,
    ),
    "flatten": (
        """a = Conv <strides=[4,4]> (x, wa) f = Flatten (a) h = Gemm <transB=1> (f, wh, bh) r = Relu (h)
        y = Gemm (r, wy)""",
        {"wa": (6, 4, 1, 1), "wh": (7, 24), "bh": (7,), "wy": (7, 5)},
        13,
    ),
    "reshape": (
        "a = Conv <strides=[4,4]> (x, wa) f = Reshape (a, shape) h = MatMul (f, wh) b = Add (h, bh) y = MatMul (b, wy)",
        {"wa": (6, 4, 1, 1), "shape": np.array([-1, 24]), "wh": (24, 7), "bh": (7,), "wy": (7, 5)},
        13,
    ),
    "reshape at run time": (
        """a = Conv <strides=[4,4]> (x, wa) s = Shape (a) n = Gather (s, zero) u = Unsqueeze (n, zeros)
        t = Concat <axis=0> (u, rest) f = Reshape (a, t) y = Gemm (f, wy)""",
        {
            "wa": (6, 4, 1, 1),
            "zero": np.int64(0),
            "zeros": np.array([0]),
            "rest": np.array([-1]),
            "wy": (24, 5),
        },
        6,
    ),
    "reshape that counts channels at run time": (
        """a = Conv (x, wa) s = Shape (a) h = Slice (s, zeros, two) t = Concat <axis=0> (h, rest) f = Reshape (a, t)
        m = ReduceMean <axes=[2], keepdims=0> (f) y = Gemm (m, wy)""",
        {
            "wa": (6, 4, 1, 1),
            "zeros": np.array([0]),
            "two": np.array([2]),
            "rest": np.array([-1]),
            "wy": (6, 5),
        },
        6,
    ),
    "channels last": (
        """a = Conv <strides=[4,4]> (x, wa) t = Transpose <perm=[0,2,3,1]> (a) m = MatMul (t, wm) b = Add (m, bm)
        f = Reshape (b, shape) y = Gemm (f, wy)""",
        {
            "wa": (6, 4, 1, 1),
            "wm": (6, 7),
            "bm": (7,),
            "shape": np.array([0, 28]),
            "wy": (28, 5),
        },
        13,
    ),
    "prelu and constants": (
        """a = Conv (x, wa) p = PRelu (a, slope) q = Mul (p, gain) r = Sub (shift, q) s = Div (r, two)
        y = Conv (s, wy)""",
        {
            "wa": (6, 4, 1, 1),
            "slope": (6, 1, 1),
            "gain": (1, 6, 1, 1),
            "shift": (6, 1, 1),
            "two": np.array([2.0], np.float32),
            "wy": (5, 6, 1, 1),
        },
        6,
    ),
    "transposed": (
        """a = Conv (x, wa) t = ConvTranspose <strides=[2,2]> (a, wt, bt)
        g = ConvTranspose <group=3> (t, wg, bg) d = ConvTranspose <group=6> (g, wd) y = Conv (d, wy)""",
        {
            "wa": (5, 4, 1, 1),
            "wt": (5, 6, 2, 2),
            "bt": (6,),
            "wg": (6, 2, 2, 2),
            "bg": (6,),
            "wd": (6, 1, 2, 2),
            "wy": (5, 6, 1, 1),
        },
        9,
    ),
    "pool and resize": (
        """a = Conv (x, wa) b = MaxPool <kernel_shape=[2,2], strides=[2,2]> (a) c = Resize (b, none, none, sizes)
        d = AveragePool <kernel_shape=[2,2]> (c) i = InstanceNormalization (d, ig, ib) m = ReduceMax <axes=[2,3]> (i)
        s = Squeeze (m, axes) y = Gemm (s, wy)""",
        {
            "wa": (6, 4, 1, 1),
            "none": np.empty(0, np.float32),
            "sizes": np.array([1, 6, 9, 9]),
            "ig": (6,),
            "ib": (6,),
            "axes": np.array([2, 3]),
            "wy": (6, 5),
        },
        6,
    ),
    "shared constants": (
        """a = Conv (x, wa) b = Conv (x, wb) n = BatchNormalization (a, n_gamma, n_beta, n_mean, n_var)
        m = BatchNormalization (b, n_gamma, n_beta, n_mean, n_var) c = Conv (n, wc) d = Conv (m, wc) y = Add (c, d)""",
        {"wa": (6, 4, 1, 1), "wb": (6, 4, 1, 1), "wc": (5, 6, 1, 1), **bn("n", channels=6)},
        12,
    ),
}


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Add the shapes of all tensors."""
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def graph(name: str, seed: int = 0) -> onnx.ModelProto:
    body, weights, _ = GRAPHS[name]
    model = net(f"g (float[1,4,8,8] x) => (y) {{ {body} }}", seed=seed, **weights)
    return typed(model)


def some_units(channels: Channels, seed: int, share: float = 0.4) -> Mask:
    """A random part of every removable group."""
    generator = np.random.default_rng(seed)
    drop = np.zeros(channels.units, bool)
    for group in channels.groups():
        if channels.removable[group].all():
            drop[generator.permutation(group)[: max(int(len(group) > 1), int(share * len(group)))]] = True
    return drop


def masked(model: onnx.ModelProto, channels: Channels, drop: Mask) -> onnx.ModelProto:
    """A model of the same size in which every reader sees zeros instead of the dropped channels."""
    result = copy(model)
    found = index(model)
    for read in sorted(channels.reads, key=lambda item: -item.node):
        node = result.graph.node[read.node]
        slot = next(number for number, name in enumerate(node.input) if not found.is_constant(name))
        trailing = {"Gemm": 0, "MatMul": 0}.get(node.op_type, 2)
        mask = (~drop[read.labels.ids]).astype(np.float32).reshape(-1, *[1] * trailing)
        result.graph.initializer.append(numpy_helper.from_array(mask, f"mask{read.node}"))
        product = helper.make_node("Mul", [node.input[slot], f"mask{read.node}"], [f"masked{read.node}"])
        node.input[slot] = product.output[0]
        result.graph.node.insert(read.node, product)
    return result


def assert_cut_equals_mask(model: onnx.ModelProto, feeds: dict[str, np.ndarray], seed: int = 0) -> onnx.ModelProto:
    found = index(model)
    channels = trace(found)
    drop = some_units(channels, seed)
    assert drop.any()
    smaller = remove(found, channels, drop)
    onnx.checker.check_model(smaller, full_check=True)
    expected = run(masked(model, channels, drop), feeds)
    for name, value in run(smaller, feeds).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4 * np.abs(expected[name]).max())
    assert cost(index(smaller), Probe()).flops < cost(found, Probe()).flops
    return smaller


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GRAPHS)
def test_a_cut_model_computes_what_the_masked_one_does(name: str, seed: int) -> None:
    model = graph(name, seed)
    assert int(trace(index(model)).removable.sum()) == GRAPHS[name][2]
    assert_cut_equals_mask(model, {"x": images(1, seed=seed, shape=(4, 8, 8))}, seed)


@given(st.integers(0, 10**6))
def test_random_graphs_can_be_cut(seed: int) -> None:
    model = random_net(seed)
    if trace(index(model)).removable.any():
        assert_cut_equals_mask(model, {"x": images(1, seed=seed, shape=(4, 5, 5))}, seed)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "vgg"])
def test_trained_nets_can_be_cut(name: str) -> None:
    model = digits(name)
    smaller = assert_cut_equals_mask(model, {model.graph.input[0].name: digit_images()[0][:8]})
    if name == "resnet":  # two layers share parameters through an Identity, of which both now have their own
        assert len(smaller.graph.node) == len(model.graph.node) - 1
        return
    assert [node.op_type for node in smaller.graph.node] == [node.op_type for node in model.graph.node]
    assert [t.name for t in smaller.graph.initializer] == [t.name for t in model.graph.initializer]


REAL = (
    "cifar10/resnet20_bn",
    "cifar10/resnet20_folded",
    "cifar10/resnet56_bn3_l1sparse_bn",
    "cifar10/resnet8_mlperftiny_tf2onnx_bn",
    "imagenet/resnet18_ktb_bn",
    "imagenet/mobilenetv2_1.0_224_tfqat_folded",
    "graphs/ultraface_rfb320",
    "graphs/yolox_nano_coco",
    "graphs/ppocr_mobile_v2_det_paddle2onnx",
    "graphs/deeplabv3_mnv2_dm05_tf2onnx",
)


@pytest.mark.skipif(not ASSETS.exists(), reason="needs ../shared/assets")
@pytest.mark.parametrize("name", REAL)
def test_real_nets_can_be_cut(name: str) -> None:
    model = onnx.load(ASSETS / f"{name}.onnx")
    assert_cut_equals_mask(model, random_feeds(index(model)))


@pytest.mark.parametrize("make", [residual_net, dense_net])
def test_seeded_nets_can_be_cut(make: Any) -> None:
    assert_cut_equals_mask(make(), {"x": images(4, seed=1)})


def test_a_cut_in_an_old_file_where_constants_are_inputs() -> None:
    model = net(
        "g (float[1,4,8,8] x, float[6,4,1,1] wa, float[5,6,1,1] wy) => (y) { a = Conv (x, wa) y = Conv (a, wy) }",
        ir=3,
        opset=8,
        wa=(6, 4, 1, 1),
        wy=(5, 6, 1, 1),
    )
    smaller = assert_cut_equals_mask(typed(model), {"x": images(1, seed=0, shape=(4, 8, 8))})
    assert [d.dim_value for d in smaller.graph.input[1].type.tensor_type.shape.dim] == [4, 4, 1, 1]


def test_a_slice_without_axes_cuts_the_first_ones() -> None:
    text = "g (float[2,4,8,8] x) => (float[1,5,8,8] y) { a = Conv (x, wa)  b = Slice (a, s, e)  y = Conv (b, wy) }"
    model = net(text, wa=(6, 4, 1, 1), wy=(5, 6, 1, 1), s=np.array([0]), e=np.array([1]))
    for seed in range(3):
        assert_cut_equals_mask(typed(model), {"x": images(2, seed=0, shape=(4, 8, 8))}, seed)


def test_sizes_in_attributes_follow() -> None:
    model = net(
        """
        g (float[1,4,8,8] x) => (y) {
          a = Conv (x, wa)
          b, c = Split <axis=1, split=[2,4]> (a)
          d = Slice <axes=[1], starts=[1], ends=[4]> (c)
          e = Pad <pads=[0,2,0,0,0,1,0,0]> (d)
          f = Concat <axis=1> (b, e)
          y = Conv (f, wy)
        }
        """,
        opset=9,
        wa=(6, 4, 1, 1),
        wy=(5, 8, 1, 1),
    )
    for seed in range(3):
        assert_cut_equals_mask(typed(model), {"x": images(1, seed=0, shape=(4, 8, 8))}, seed)


FROZEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "output": ("y = Conv (x, wa)", {}, "'y' is an output of the model"),
    "unknown": ("a = Conv (x, wa) y = LRN <size=3> (a)", {}, "LRN:y: it is not known to keep channels apart"),
    "shuffle": ("a = Conv (x, wa) y = Reshape (a, shape)", {"shape": np.array([1, 2, 3, 8, 8])}, "splits the channel"),
    "reduction": ("a = Conv (x, wa) y = ReduceMean <axes=[1]> (a)", {}, "it sums over channels"),
    "softmax": ("a = Conv (x, wa) y = Softmax <axis=1> (a)", {}, "it mixes channels"),
    "input": ("a = Conv (x, wb) y = Add (a, x)", {}, "another operand has channels that cannot be removed"),
    "depthwise input": ("a = Conv <group=4> (x, wd) y = Conv (a, wb)", {}, "depthwise Conv:a reads channels"),
    "run-time weight": ("a = Conv (x, wa) w = Relu (wa) y = Conv (a, w)", {}, "weight is computed at run time"),
    "every other": (
        "a = Conv (x, wa) y = Slice (a, s, e, c, p)",
        {"s": np.array([0]), "e": np.array([6]), "c": np.array([1]), "p": np.array([2])},
        "its step is not 1",
    ),
    "mirrored": (
        'a = Conv (x, wa) y = Pad <mode="reflect"> (a, p)',
        {"p": np.array([0, 1, 0, 0, 0, 1, 0, 0])},
        "it adds channels that are not constant",
    ),
    "computed with": (
        "a = Conv (x, wa) s = Shape (a) c = Cast <to=1> (s) m = ReduceProd (c) b = Conv (a, wy) y = Div (b, m)",
        {"wy": (6, 6, 1, 1)},
        "computes with their number",
    ),
    "expanded": (
        "a = Conv (x, wa) g = GlobalAveragePool (a) b = Conv (x, wc) s = Shape (b) e = Expand (g, s) y = Conv (e, wy)",
        {"wc": (6, 4, 1, 1), "wy": (5, 6, 1, 1)},
        "computes with their number",
    ),
    "captured": (
        """a = Conv (x, wa) s = Shape (a) y = If (c) <
            then_branch = t () => (float[1,6,8,8] u) { u = Expand (a, s) },
            else_branch = e () => (float[1,6,8,8] v) { v = Relu (a) }
        >""",
        {"c": np.array(True)},
        "computes with their number",
    ),
    "mask": ("a = Conv (x, wa) d, m = Dropout (a) y = Not (m)", {}, "Not:y: it is not known to keep channels apart"),
    "unfit bias": (
        "a = Conv (x, wa) y = Conv (a, wy, bias)",
        {"wy": (5, 6, 1, 1), "bias": (3,)},
        "it has 5 channels, but a bias for 3",
    ),
    "unfit weight": (
        "a = Conv (x, wa) y = Conv (a, wy)",
        {"wy": (5, 4, 1, 1)},
        "it reads 6 channels, but has weights for 4",
    ),
    "unfit matrix": (
        "a = Conv (x, wa) f = Flatten (a) y = Gemm <transB=1> (f, wy)",
        {"wy": (10, 64)},
        "it reads 384 channels, but has weights for 64",
    ),
    "unfit sizes": (
        "a = Conv (x, wa) b, c = Split <axis=1> (a, sizes) y = Conv (b, wy)",
        {"wy": (5, 2, 1, 1), "sizes": np.array([2, 3])},
        "its sizes do not divide 6 channels",
    ),
    "unfit groups": (
        "a = Conv (x, wa) y = Conv <group=4> (a, wy)",
        {"wy": (4, 2, 1, 1)},
        "it reads 6 channels, but has weights for 8",
    ),
    "unfit ends": (
        "a = Conv (x, wa) y = Slice (a, s, e, c)",
        {"s": np.array([0, 1]), "e": np.array([6]), "c": np.array([0, 1])},
        "it has not as many ends as starts",
    ),
    "unfit parts": ("a = Conv (x, wa) b = Conv (x, wb) y = Concat <axis=2> (a, b)", {}, "combines 6 channels with 4"),
    "spread": ("a = Conv (x, w1) b = Conv (x, wa) y = Mul (a, b)", {"w1": (1, 4, 1, 1)}, "broadcasts one channel"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_channels_that_stay_say_why(name: str) -> None:
    body, weights, reason = FROZEN[name]
    shapes = {"wa": (6, 4, 1, 1), "wb": (4, 4, 1, 1), "wd": (4, 1, 1, 1)}
    used = {key: value for key, value in shapes.items() if key in body}
    model = net(f"g (float[1,4,8,8] x) => (y) {{ {body} }}", **used, **weights)
    found = index(model)
    channels = trace(found)
    assert not channels.removable[channels.tensors[found.nodes[0].output[0]].ids].any()
    assert any(reason in text for text in channels.frozen.values()), channels.frozen
    drop = np.zeros(channels.units, bool)
    drop[0] = True
    with pytest.raises(ModelError, match="cannot be removed"):
        remove(found, channels, drop)


def test_a_tensor_never_loses_all_its_channels() -> None:
    found = index(graph("chain"))
    channels = trace(found)
    with pytest.raises(ModelError, match="left without channels"):
        remove(found, channels, channels.removable)


def test_the_record_refers_to_the_channels_of_the_first_model() -> None:
    model = residual_net()
    first = index(model)
    channels = trace(first)
    once = remove(first, channels, some_units(channels, 1))
    again = index(once)
    channels = trace(again)
    twice = remove(again, channels, some_units(channels, 2))
    kept = read_kept(twice)
    stem = parameter(model, 0, 1)
    np.testing.assert_array_equal(parameter(twice, 0, 1), stem[kept["stem"]])
    # the rest of the dense model is found from the first model and from the one cut once alike
    for dense in (model, once):
        found = index(dense)
        channels = trace(found)
        rest = remove(found, channels, missing_units(found, channels, kept))
        np.testing.assert_array_equal(parameter(rest, 0, 1), stem[kept["stem"]])
        assert read_kept(rest) == kept
    with pytest.raises(StructureError, match="does not have"):
        missing_units(index(dense_net()), trace(index(dense_net())), kept)


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[1, 2",
        "null",
        "3",
        "[]",
        '{"a": 1}',
        '{"a": [0.5]}',
        '{"a": [null]}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
@pytest.mark.parametrize("read", [read_kept, read_shapes])
def test_broken_metadata_are_an_error(read: Callable[[onnx.ModelProto], object], record: str) -> None:
    model = residual_net()
    for key in (KEPT_CHANNELS, INPUT_SHAPES):
        model.metadata_props.add(key=key, value=record)
    with pytest.raises(ModelError, match=r"is damaged .*prune the dense model again, or remove the entry"):
        read(model)


def test_a_record_without_any_channel_does_not_fit() -> None:
    found = index(residual_net())
    with pytest.raises(StructureError, match="does not fit the dense model: tensor 'stem' would be left without"):
        missing_units(found, trace(found), {"stem": []})
