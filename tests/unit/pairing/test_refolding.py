"""BatchNormalization that is folded in one file and kept in the other."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr.errors import StructureError
from onnx_asr.networks.pair import Pair
from tests.graphs import (
    bn,
    copy,
    dense_net,
    first_output,
    folded,
    images,
    net,
    parameter,
    positions,
    random_net,
    residual_net,
    run,
    set_parameter,
)
from tools.check.rewritings import padding_apart


def paired_values(pair: Pair, x: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The values of every tensor of the pruned network, and of its counterpart."""
    pruned, dense = pair.pruned.index, pair.dense
    pairs = {mine: its for mine, its in pair.pairing.tensors.items() if mine in pruned.producer}
    pairs = {mine: its for mine, its in pairs.items() if not pruned.is_constant(mine)}
    mine = run(pruned.model, {pruned.inputs[0].name: x}, pairs)
    its = run(dense.model, {dense.inputs[0].name: x}, pairs.values())
    return {name: (mine[name], its[other]) for name, other in pairs.items()}


NETS = {"residual": residual_net, "dense": dense_net} | {
    f"random {seed}": (lambda seed=seed: random_net(seed)) for seed in range(8)
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("which", ["pruned", "dense", "both"])
def test_the_pairing_is_right_tensor_by_tensor(name: str, every: int, which: str) -> None:
    model = NETS[name]()
    pruned = folded(model, every) if which != "dense" else model
    dense = folded(model, 3 if which == "both" else every) if which != "pruned" else model
    pair = Pair.of(pruned, dense)
    assert set(positions(pruned, "Conv", "ConvTranspose", "Gemm", "BatchNormalization")) <= set(pair.pairing.nodes)
    shape = [dim.dim_value or 2 for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = images(shape[0], seed=1, shape=tuple(shape[1:]))
    np.testing.assert_allclose(first_output(pair.dense.model, x), first_output(model, x), rtol=1e-3, atol=1e-4)
    values = paired_values(pair, x)
    assert len(values) > 3
    for tensor, (mine, its) in values.items():
        np.testing.assert_allclose(mine, its, rtol=1e-3, atol=1e-3 * np.abs(mine).max(), err_msg=tensor)


NORM = "BatchNormalization <epsilon=0.01> ({}, n_gamma, n_beta, n_mean, n_var)"
LAYERS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "Conv": ("Conv <pads=[1,1,1,1]> (x, w, b)", {"w": (6, 4, 3, 3), "b": (6,)}),
    "Conv without bias": ("Conv <pads=[1,1,1,1]> (x, w)", {"w": (6, 4, 3, 3)}),
    "grouped": ("Conv <group=2> (x, w, b)", {"w": (6, 2, 1, 1), "b": (6,)}),
    "depthwise": ("Conv <group=4> (x, w)", {"w": (8, 1, 1, 1)}),
    "ConvTranspose": ("ConvTranspose (x, w, b)", {"w": (4, 6, 1, 1), "b": (6,)}),
    "grouped ConvTranspose": ("ConvTranspose <group=2> (x, w)", {"w": (4, 3, 1, 1)}),
}


def with_layer(layer: str, tail: str, **parameters: object) -> onnx.ModelProto:
    call, weights = LAYERS[layer]
    channels = 8 if layer == "depthwise" else 6
    text = f"g (float[N,4,5,5] x) => (float[N,M,5,5] y) {{ z = {call}  {tail} r = Relu (t)  y = Add (r, t) }}"
    return net(text, **weights, **bn("n", channels=channels), **parameters)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_folded_and_unfolded(layer: str) -> None:
    kept = with_layer(layer, f"t = {NORM.format('z')}")
    x = images(3, seed=2, shape=(4, 5, 5))
    for pruned, dense in ((kept, folded(kept)), (folded(kept), kept)):
        pair = Pair.of(pruned, dense)
        for name, (mine, its) in paired_values(pair, x).items():
            np.testing.assert_allclose(mine, its, atol=1e-4, err_msg=name)
        assert set(pair.pairing.nodes) == set(range(len(pruned.graph.node)))


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_is_unfolded_with_its_factors(transposed: int) -> None:
    shape = (6, 4) if transposed else (4, 6)
    layer = f"z = Gemm <alpha=0.5, beta=2.0, transB={transposed}> (x, w, b)"
    text = f"g (float[N,4] x) => (float[N,6] y) {{ {layer}  y = {NORM.format('z')} }}"
    kept = net(text, w=shape, b=(6,), **bn("n", channels=6))
    x = images(3, seed=2, shape=(4,))
    for pruned, dense in ((kept, folded(kept)), (folded(kept), kept)):
        for name, (mine, its) in paired_values(Pair.of(pruned, dense), x).items():
            np.testing.assert_allclose(mine, its, atol=1e-4, err_msg=name)


SCALE = {"s": (6, 1, 1), "h": (1, 6, 1, 1), "k": (1,)}
SPELLINGS = {
    "scale and shift": "u = Mul (s, z)  t = Add (u, h)",
    "shift and division": "u = Sub (z, h)  t = Div (u, s)",
    "from the shift": "u = Sub (h, z)  t = Mul (u, k)",
    "normalization and scale": f"v = Identity (z)  u = {NORM.format('v')}  t = Mul (u, s)",
    "normalization and scalar": f"u = {NORM.format('z')}  t = Mul (u, k)",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_scales_and_shifts_behind_a_layer_are_moved_too(name: str) -> None:
    spelled = with_layer("Conv", SPELLINGS[name], **SCALE)
    plain = with_layer("Conv", "t = Identity (z)", **SCALE)
    normalized = with_layer("Conv", f"t = {NORM.format('z')}", **SCALE)
    x = images(3, seed=2, shape=(4, 5, 5))
    for pruned, dense in ((spelled, plain), (plain, spelled), (normalized, spelled), (spelled, normalized)):
        pair = Pair.of(pruned, dense)
        np.testing.assert_allclose(first_output(pair.dense.model, x), first_output(dense, x), atol=1e-4)
        assert [node.op_type for node in pair.dense.nodes if node.op_type in ("Mul", "Sub", "Div")] == [
            node.op_type for node in pruned.graph.node if node.op_type in ("Mul", "Sub", "Div")
        ]


def test_a_fully_connected_layer_of_two_nodes_is_unfolded() -> None:
    text = "g (float[N,7,4] x) => (float[N,7,6] y) {{ p = MatMul (x, w) {} }}"
    weights = {"w": (4, 6), "b": (6,), "s": (6,), "h": (1, 6)}
    plain = net(text.format("y = Add (p, b)"), **weights)
    bare = net(text.format("y = Identity (p)"), **weights)
    spelled = net(text.format("z = Add (b, p)  u = Mul (z, s)  y = Add (u, h)"), **weights)
    x = images(3, seed=2, shape=(7, 4))
    for pruned, dense in ((spelled, plain), (plain, spelled), (spelled, bare), (bare, spelled)):
        pair = Pair.of(pruned, dense)
        np.testing.assert_allclose(first_output(pair.dense.model, x), first_output(dense, x), atol=1e-4)


def test_what_is_not_one_value_per_channel_stays() -> None:
    place = with_layer("Conv", "t = Add (z, map)", map=(1, 6, 5, 5))
    plain = with_layer("Conv", "t = Identity (z)")
    for pair in ((place, plain), (plain, place)):
        with pytest.raises(StructureError, match="has node"):
            Pair.of(*pair)


@pytest.mark.parametrize("gamma", [0.0, 1e-30, -1e-20])
@pytest.mark.parametrize("tail", [f"t = {NORM.format('z')}", SPELLINGS["normalization and scalar"]])
def test_channels_that_the_normalization_hides_are_exact(gamma: float, tail: str) -> None:
    kept = with_layer("Conv", tail, **SCALE)
    (place,) = positions(kept, "BatchNormalization")
    scale = parameter(kept, place, 1).copy()
    scale[:2] = gamma
    set_parameter(kept, place, 1, scale)
    dense = folded(kept)
    x = images(3, seed=2, shape=(4, 5, 5))
    pair = Pair.of(kept, dense)
    np.testing.assert_allclose(first_output(pair.dense.model, x), first_output(dense, x), atol=1e-5)
    (conv,) = positions(pair.dense.model, "Conv")
    (weight, other) = (parameter(model, place, 1) for model, place in ((pair.dense.model, conv), (kept, 0)))
    np.testing.assert_allclose(weight[2:], other[2:], rtol=1e-5)
    np.testing.assert_allclose(weight[:2], parameter(dense, 0, 1)[:2], atol=1e-7)  # not divided by almost nothing


def test_normalization_before_a_layer_is_not_folded() -> None:
    text = "g (float[N,4,5,5] x) => (float[N,6,3,3] y) {{ {} y = Conv (t, w) }}"
    weights = {"w": (6, 4, 3, 3)} | bn("n", channels=4)
    first = net(text.format(f"t = {NORM.format('x')}"), **weights)
    without = net(text.format("t = Identity (x)"), **weights)
    for pair in ((first, without), (without, first)):
        with pytest.raises(StructureError, match="not the same network"):
            Pair.of(*pair)


@pytest.mark.parametrize("make", [residual_net, dense_net])
def test_removed_channels_are_unfolded_with_those_that_are_left(make: type) -> None:
    """The record names tensors of the file that kept BatchNormalization."""
    dense = make()
    cut = onnx_asr.prune_channels(dense, onnx_asr.ChannelPruneOptions(0.5)).model
    pair, plain = Pair.of(folded(cut), dense), Pair.of(cut, dense)
    x = images(2, seed=3)
    np.testing.assert_allclose(first_output(pair.dense.model, x), first_output(dense, x), atol=1e-4)
    for point in pair.pruned.survey.layers:
        np.testing.assert_allclose(pair.dense_weight(point), parameter(folded(cut), *point.weight), atol=1e-5)
    assert len(pair.kept) > 3
    assert len(plain.kept) > 3


def padded_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    result = copy(model)
    assert all(padding_apart(random.Random(seed), result) for seed in range(3))
    return result


@pytest.mark.parametrize("spelling", [folded, padded_apart])
def test_a_repair_is_that_of_two_files_that_agree(spelling: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
    dense = residual_net()
    pruned = onnx_asr.prune(dense, options=onnx_asr.PruneOptions(0.6)).model
    data = {"x": images(48, seed=4)}
    for method in ("paired", "refit", "bn"):
        options = onnx_asr.RepairOptions(method, samples=32, verify_samples=16)
        alike, other = (onnx_asr.repair(pruned, data, options, dense=file) for file in (dense, spelling(dense)))
        x = images(8, seed=5)
        np.testing.assert_allclose(first_output(other.model, x), first_output(alike.model, x), atol=2e-3)
        assert [node.op_type for node in other.model.graph.node] == [node.op_type for node in pruned.graph.node]
