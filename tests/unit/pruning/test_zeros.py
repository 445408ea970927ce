"""Pruning: exact counts, the smallest weights, nothing else changed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_asr.errors import ModelError, OptionError
from onnx_asr.json_values import plain
from onnx_asr.numerics.patterns import Pattern
from onnx_asr.pruning.options import CompressOptions, PruneOptions
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import RepairOptions
from onnx_asr.repairing.pipeline import repair
from tests.graphs import (
    constant,
    dense_net,
    digit_images,
    digits,
    first_output,
    images,
    net,
    parameter,
    positions,
    residual_net,
    set_parameter,
)

NETS = {"residual": residual_net, "dense": dense_net, "digits_vgg": lambda: digits("vgg")}


def prunable(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Every weight by the tensor its layer computes."""
    return {
        model.graph.node[p].output[0]: parameter(model, p, 1)
        for p in positions(model, "Conv", "ConvTranspose", "Gemm", "MatMul")
    }


def zeros(weights: dict[str, np.ndarray]) -> int:
    return sum(int((value == 0).sum()) for value in weights.values())


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", NETS)
def test_global_sparsity_is_exact_and_takes_the_smallest(name: str, sparsity: float) -> None:
    model = NETS[name]()
    result = prune(model, options=PruneOptions(sparsity))
    before, after = prunable(model), prunable(result.model)
    total = sum(value.size for value in before.values())
    assert zeros(after) == round(sparsity * total)
    assert result.sparsity == pytest.approx(zeros(after) / total)
    kept = np.concatenate([np.abs(before[n][after[n] != 0]) for n in before])
    gone = np.concatenate([np.abs(before[n][after[n] == 0]) for n in before])
    assert gone.max(initial=0) <= kept.min()
    for tensor, value in before.items():
        np.testing.assert_array_equal(after[tensor][after[tensor] != 0], value[after[tensor] != 0])
    onnx.checker.check_model(result.model, full_check=True)


def test_layer_sparsity_is_exact_in_every_layer() -> None:
    model = residual_net()
    result = prune(model, options=PruneOptions(0.37, scope="layer"))
    for tensor, value in prunable(result.model).items():
        assert (value == 0).sum() == round(0.37 * value.size), tensor
    assert [layer.zeros for layer in result.layers] == [round(0.37 * layer.size) for layer in result.layers]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("name", NETS)
def test_patterns_hold_along_the_input_channels(name: str, n: int, m: int) -> None:
    model = NETS[name]()
    result = prune(model, options=PruneOptions(pattern=f"{n}:{m}"))
    for position in positions(model, "Conv", "Gemm", "ConvTranspose", "MatMul"):
        node = model.graph.node[position]
        before, after = parameter(model, position, 1), parameter(result.model, position, 1)
        options = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        groups = options.get("group", 1)
        if node.op_type == "Conv" or (node.op_type == "Gemm" and options.get("transB")):
            views = [(before, after)]
        elif node.op_type == "ConvTranspose":
            parts = zip(np.split(before, groups), np.split(after, groups), strict=True)
            views = [(a.swapaxes(0, 1), b.swapaxes(0, 1)) for a, b in parts]
        else:
            views = [(before.T, after.T)]
        for was, now in views:
            inputs = was.shape[1]
            if inputs < m:
                np.testing.assert_array_equal(now, was)
                continue
            for start in range(0, inputs - inputs % m, m):
                left = (now[:, start : start + m] != 0).sum(axis=1)
                assert (left == n).all()
                part, kept = np.abs(was[:, start : start + m]), now[:, start : start + m] != 0
                smallest = np.where(kept, part, np.inf).min(axis=1)
                largest = np.where(kept, 0, part).max(axis=1)
                assert (largest <= smallest).all()


def grouped_net() -> onnx.ModelProto:
    """Six outputs in two groups, a transposed convolution, both kinds of Gemm: blocks of 2 and, last, of 1."""
    return net(
        """
        g (float[N,4,4,4] x) => (float[N,5] z) {
          a = Conv <group=2, pads=[1,1,1,1]> (x, a_w)
          t = ConvTranspose <group=2> (a, t_w)
          p = GlobalAveragePool (t)
          f = Flatten (p)
          h = Gemm <transB=1> (f, h_w)
          z = MatMul (h, z_w)
        }
        """,
        a_w=(6, 2, 3, 3),
        t_w=(6, 3, 2, 2),
        h_w=(7, 6),
        z_w=(7, 5),
    )


def group_blocks(model: onnx.ModelProto, height: int) -> list[list[np.ndarray]]:
    """The blocks of every weight, each [rows, entries]."""
    conv, transposed, gemm, matmul = (parameter(model, position, 1) for position in (0, 1, 4, 5))
    matrices = [
        [conv[:3].reshape(3, -1), conv[3:].reshape(3, -1)],
        [part.swapaxes(0, 1).reshape(3, -1) for part in np.split(transposed, 2)],
        [gemm],
        [matmul.T],
    ]
    return [
        [rows[start : start + height] for rows in groups for start in range(0, len(rows), height)]
        for groups in matrices
    ]


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("height", [2, 4])
def test_blocks_share_their_zeros_and_the_weakest_go(height: int, scope: Any) -> None:
    model = grouped_net()
    result = prune(model, options=PruneOptions(0.6, pattern=f"{height}x1", scope=scope))
    before, after = group_blocks(model, height), group_blocks(result.model, height)
    kept: list[np.ndarray] = []
    for was, now in zip(before, after, strict=True):
        means = np.concatenate([np.abs(block).mean(axis=0) for block in was])
        alive = np.concatenate([(block != 0).all(axis=0) for block in now])
        np.testing.assert_array_equal(alive, np.concatenate([(block != 0).any(axis=0) for block in now]))
        assert means[~alive].max(initial=0) <= means[alive].min(initial=np.inf)
        if scope == "layer":
            assert (~alive).sum() == round(0.6 * alive.size)
        kept.append(alive)
    everything = np.concatenate(kept)
    if scope == "global":
        means = np.concatenate([np.abs(block).mean(axis=0) for was in before for block in was])
        assert means[~everything].max() <= means[everything].min()
    if scope != "layer":
        assert (~everything).sum() == round(0.6 * everything.size)
    assert result.options.pattern == f"{height}x1"
    onnx.checker.check_model(result.model, full_check=True)


def test_nothing_but_weights_changes() -> None:
    model = residual_net()
    before = model.SerializeToString(deterministic=True)
    result = prune(model, options=PruneOptions(0.5)).model
    assert model.SerializeToString(deterministic=True) == before
    weights = {model.graph.node[p].input[1] for p in positions(model, "Conv", "Gemm")}
    for old, new in zip(model.graph.initializer, result.graph.initializer, strict=True):
        assert old.name == new.name
        assert (old.SerializeToString() != new.SerializeToString()) == (old.name in weights)
    assert [node.SerializeToString() for node in model.graph.node] == [
        node.SerializeToString() for node in result.graph.node
    ]


@pytest.mark.parametrize("options", [{"sparsity": 0.9}, {"pattern": "2:4"}, {"sparsity": 0.8, "pattern": "4x1"}])
def test_sizes_before_and_after_are_reported(options: dict[str, Any]) -> None:
    model = digits("vgg")
    result = prune(model, options=PruneOptions(**options))
    zeros_made = zeros(prunable(result.model)) - zeros(prunable(model))
    assert result.before.parameters == result.after.parameters
    assert result.before.nonzeros - result.after.nonzeros == zeros_made > 0
    assert result.before.flops == result.after.flops > 0
    assert result.before.size == model.ByteSize()
    assert result.after.size == result.model.ByteSize()
    assert result.after.compressed < (1 - 0.5 * result.sparsity) * result.before.compressed
    values = plain(result)
    assert values["after"]["nonzeros"] == result.after.nonzeros
    assert values["helps"] == Pattern.parse(result.options.pattern).helps


def test_every_pattern_says_what_it_helps_with() -> None:
    texts = [Pattern.parse(name).helps for name in ("unstructured", "2:4", "1:4", "4x1")]
    assert len(set(texts)) == 4
    assert "TensorRT" in texts[1]


def test_existing_zeros_are_kept_and_count() -> None:
    model = residual_net()
    once = prune(model, options=PruneOptions(0.8)).model
    again = prune(once, options=PruneOptions(0.5))
    assert zeros(prunable(again.model)) == zeros(prunable(once))
    more = prune(once, options=PruneOptions(0.9))
    for tensor, value in prunable(once).items():
        assert not prunable(more.model)[tensor][value == 0].any()
    total = sum(value.size for value in prunable(model).values())
    assert zeros(prunable(more.model)) == round(0.9 * total)
    assert sum(layer.zeros_before for layer in more.layers) == round(0.8 * total)


def test_a_weight_that_two_layers_share_stays_shared_and_counts_once() -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { a = MatMul (x, w)  y = MatMul (a, w) }", w=(4, 4))
    result = prune(model, options=PruneOptions(0.5))
    assert len(result.model.graph.initializer) == 1
    assert len(result.layers) == 1
    weight = parameter(result.model, 0, 1)
    assert (weight == 0).sum() == 8
    x = np.ones((1, 4), np.float32)
    np.testing.assert_allclose(first_output(result.model, x), x @ weight @ weight, rtol=1e-5)


@pytest.mark.parametrize("excluded", ["Conv:a", "Conv:y", "^w$"])
def test_a_weight_that_an_excluded_layer_shares_is_not_pruned(excluded: str) -> None:
    text = (
        "g (float[N,4,8,8] x) => (float[N,4,H,W] y) { a = Conv (x, w)  r = Relu (a)  b = Conv (r, v)  y = Conv (b, w) }"
    )
    dense = net(text, w=(4, 4, 1, 1), v=(4, 4, 1, 1))
    result = prune(dense, options=PruneOptions(0.5, exclude=(excluded,)))
    np.testing.assert_array_equal(constant(result.model, "w"), constant(dense, "w"))
    assert [(layer.name, layer.zeros) for layer in result.layers] == [("Conv:b", 8)]
    assert [(skip.name, skip.reason) for skip in result.skips] == [("Conv:a", "excluded by a pattern")]

    x = images(24, seed=1, shape=(4, 8, 8))
    options = RepairOptions("refit", samples=16, verify_samples=8)
    repaired = repair(result.model, x, options, dense=dense)
    onnx.checker.check_model(repaired.model, full_check=True)
    assert repaired.improved
    assert [point.name for point in repaired.points] == ["Conv:a", "Conv:b", "Conv:y"]
    zeros_left = constant(repaired.model, "v") == 0
    np.testing.assert_array_equal(zeros_left, constant(result.model, "v") == 0)


def test_names_choose_who_takes_part() -> None:
    model = residual_net()
    result = prune(model, options=PruneOptions(0.5, exclude=("stem", "fc")))
    changed = {
        tensor for tensor, value in prunable(result.model).items() if not np.array_equal(value, prunable(model)[tensor])
    }
    assert changed == {"a", "b", "c", "short"}
    assert {skip.name for skip in result.skips} == {"Conv:stem", "Gemm:logits"}
    only = prune(model, options=PruneOptions(0.5, include=("^a_w$",)))
    assert [layer.zeros for layer in only.layers] == [288]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": 1.0}, "out of range"),
        ({"sparsity": -0.1}, "out of range"),
        ({"sparsity": float("nan")}, "out of range"),
        ({}, "missing"),
        ({"pattern": "2:4", "sparsity": 0.5}, "sets the sparsity itself"),
        ({"pattern": "4:2"}, "unknown"),
        ({"pattern": "0:4"}, "unknown"),
        ({"pattern": "blocks", "sparsity": 0.5}, "unknown"),
        ({"pattern": "1x1", "sparsity": 0.5}, "unknown"),
        ({"pattern": "4x2", "sparsity": 0.5}, "unknown"),
        ({"pattern": "4x1"}, "missing"),
        ({"pattern": "channel", "sparsity": 0.5}, "prune_channels"),
        ({"sparsity": 0.5, "scope": "world"}, "unknown"),
        ({"sparsity": 0.5, "include": ("nobody",)}, "leave no weight"),
        ({"sparsity": 0.5, "include": ("(",)}, "not a regular expression"),
        ({"pattern": "1:500"}, "no weight has"),
    ],
)
def test_bad_options_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        prune(residual_net(), options=PruneOptions(**arguments))


def test_models_without_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="nothing to prune"):
        prune(net("g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }"), options=PruneOptions(0.5))


def test_patterns_are_read_and_written() -> None:
    assert str(Pattern.parse("2:4")) == "2:4"
    assert str(Pattern.parse("unstructured")) == "unstructured"
    assert str(Pattern.parse("4x1")) == "4x1"


def binary_net() -> onnx.ModelProto:
    model = residual_net()
    for position in positions(model, "Conv", "Gemm"):
        set_parameter(model, position, 1, np.sign(parameter(model, position, 1)) * 0.3)
    return model


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scope": "layer"},
        {"scope": "erk"},
        {"score": "lamp"},
        {"score": "row"},
        {"pattern": "2x1"},
        {"pattern": "2:4", "sparsity": None},
    ],
)
def test_ties_empty_no_layer_and_no_channel(arguments: dict[str, Any]) -> None:
    """In a binary network all weights of a layer are worth the same."""
    model = binary_net()
    result = prune(model, options=PruneOptions(**{"sparsity": 0.5, **arguments}))
    for tensor, weight in prunable(result.model).items():
        rows = weight.reshape(len(weight), -1)
        assert (rows != 0).any(axis=1).all(), tensor
        if weight.ndim == 4:
            assert (weight != 0).any(axis=(0, 2, 3)).all(), tensor
    if not arguments:
        assert {round(layer.sparsity, 1) for layer in result.layers} == {0.5}


def test_the_seed_orders_ties_and_nothing_else() -> None:
    def pruned(model: onnx.ModelProto, seed: int) -> bytes:
        result = prune(model, options=PruneOptions(0.5, seed=seed)).model
        return bytes(result.SerializeToString())

    assert pruned(binary_net(), 1) == pruned(binary_net(), 1) != pruned(binary_net(), 2)
    assert pruned(residual_net(), 1) == pruned(residual_net(), 2)


def test_a_small_layer_is_not_emptied_by_ties() -> None:
    text = "g (float[N,64] x) => (float[N,1] y) { h = MatMul (x, v)  r = Relu (h)  y = MatMul (r, w) }"
    model = net(text, v=np.full((64, 2), 0.5, np.float32), w=np.full((2, 1), 0.5, np.float32))
    result = prune(model, options=PruneOptions(0.95))
    assert [layer.size - layer.zeros for layer in result.layers] == [5, 1]
    assert result.sparsity == pytest.approx(124 / 130)


def uneven_net() -> onnx.ModelProto:
    """Conv -> Relu -> Conv; all of the first one's weights are smaller than any of the second one's."""
    first, second = (np.arange(1, n + 1, dtype=np.float32) for n in (32 * 9, 32 * 32))
    return net(
        """
        c (float[N,1,8,8] x) => (float[N,32,6,6] y) {
            a = Conv (x, w)
            b = Relu (a)
            y = Conv (b, v)
        }
        """,
        w=first.reshape(32, 1, 3, 3) / 10_000,
        v=second.reshape(32, 32, 1, 1),
    )


def starving(notes: tuple[str, ...]) -> list[str]:
    return [note for note in notes if note.startswith("layer collapse")]


def test_a_layer_with_hardly_any_weights_left_is_noted() -> None:
    model = uneven_net()
    emptied = prune(model, options=PruneOptions(0.5))
    assert [layer.zeros for layer in emptied.layers] == [288, 368]
    (note,) = starving(emptied.notes)
    assert "in 1 of 2 layers: Conv:a (0 of 288);" in note
    assert starving(prune(model, options=PruneOptions(0.5, scope="layer")).notes) == []
    x = images(40, seed=0, shape=(1, 8, 8))
    assert starving(repair(emptied.model, x, dense=model).notes) == [note]


def test_the_emptiest_layers_are_named_without_a_dense_network_too() -> None:
    result = prune(digits("vgg"), options=PruneOptions(0.999))
    kept = sorted((layer.size - layer.zeros, layer.name) for layer in result.layers if layer.is_collapsed)
    assert len(kept) > 3
    (note,) = starving(result.notes)
    named = re.findall(r"(\S+) \(([\d,]+) of", note)
    assert [int(count.replace(",", "")) for _, count in named] == [count for count, _ in kept[:3]]
    assert ", ...;" in note
    x, _ = digit_images()
    assert starving(repair(result.model, x[:64], RepairOptions(method="bn")).notes) == [note]


@pytest.mark.parametrize(("kept", "noted"), [(3, True), (4, False)])
def test_fewer_weights_than_a_tenth_of_the_channels_are_few(kept: int, noted: bool) -> None:
    notes = prune(uneven_net(), options=PruneOptions(1 - kept / 288, scope="layer", include=("w",))).notes
    assert bool(starving(notes)) == noted


def test_what_the_dense_network_lacks_was_not_pruned() -> None:
    dense = uneven_net()
    set_parameter(dense, 0, 1, np.zeros((32, 1, 3, 3), np.float32))
    result = prune(dense, options=PruneOptions(0.5))
    assert result.layers[0].zeros == 288
    assert starving(result.notes) == []
    assert starving(repair(result.model, images(40, seed=0, shape=(1, 8, 8)), dense=dense).notes) == []


def wide_and_narrow() -> onnx.ModelProto:
    """A convolution that TensorRT may have sparse kernels for, and two for which it has none."""
    return net(
        """
        g (float[N,64,4,4] x) => (float[N,10] y) {
          a = Conv <pads=[1,1,1,1]> (x, wide)  b = Relu (a)  c = Conv <group=256> (b, depthwise)
          d = GlobalAveragePool (c)  e = Flatten (d)  y = Gemm <transB=1> (e, last)
        }
        """,
        wide=(256, 64, 3, 3),
        depthwise=(256, 1, 3, 3),
        last=(10, 256),
    )


def test_layers_that_would_not_gain_stay_dense() -> None:
    model = wide_and_narrow()
    result = prune(model, options=PruneOptions(pattern="2:4", target="tensorrt"))
    before, after = prunable(model), prunable(result.model)
    assert [layer.name for layer in result.layers] == ["Conv:a"]
    assert {tensor: np.array_equal(after[tensor], before[tensor]) for tensor in after} == {
        "a": False,
        "c": True,
        "y": True,
    }
    assert (after["a"].reshape(256, 16, 4, 9) != 0).sum(axis=2).max() == 2
    assert [(skip.name, skip.code) for skip in result.skips] == [
        ("Conv:c", "fewer-inputs-than-pattern"),
        ("Gemm:y", "no-gain-on-target"),
    ]
    assert (
        result.skips[1].reason == "stays dense for TensorRT: fewer than 256 output channels: the dense kernel is faster"
    )


def test_a_weight_stays_if_any_of_its_readers_gains() -> None:
    model = net(
        "g (float[N,64] x) => (float[N,64] y) "
        "{ a = Transpose (x)  b = MatMul (w, a)  c = Transpose (b)  y = MatMul (c, w) }",
        w=(64, 64),
    )
    result = prune(model, options=PruneOptions(0.9, target="openvino"))
    assert [layer.size for layer in result.layers] == [64 * 64]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"pattern": "2:4", "target": "tensorrt"},
            "would gain from zeros in TensorRT: input channels times places",
        ),
        ({"sparsity": 0.5, "target": "openvino"}, "packed for matrix products only; .*inspect --target openvino"),
    ],
)
def test_a_target_that_no_layer_suits_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        prune(residual_net(), options=PruneOptions(**given))


@pytest.mark.parametrize("given", [{"sparsity": 0.5}, {"pattern": "1:4"}, {"sparsity": 0.5, "pattern": "4x1"}])
def test_a_target_wants_its_pattern(given: dict[str, Any]) -> None:
    for options in (PruneOptions, CompressOptions):
        with pytest.raises(OptionError, match=r"2:4 zeros alone, .*give --pattern 2:4"):
            options(**given, target="tensorrt")
    with pytest.raises(OptionError, match="target 'dsp' is unknown"):
        PruneOptions(0.5, target="dsp")  # type: ignore[arg-type]
