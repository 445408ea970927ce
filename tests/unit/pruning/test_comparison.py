"""Models with fewer channels are compared with what they should compute, whatever their outputs look like."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx.numpy_helper import from_array

import onnx_asr.pruning.channels
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import ModelError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.pruning.channels import prune_channels
from onnx_asr.pruning.comparison import Reference
from onnx_asr.pruning.options import ChannelPruneOptions
from onnx_asr.pruning.shrinking import shrink
from tests.graphs import copy, first_output, images, index, net, parameter, set_parameter

RUNTIME = Runtime(threads=1)
SHAPES = {"wa": (6, 4, 3, 3), "ba": (6,), "wb": (6, 6, 3, 3), "bb": (6,), "wy": (5, 6, 1, 1)}
BODY = "a = Conv <pads=[1,1,1,1]> (x, wa, ba) r = Relu (a) b = Conv <pads=[1,1,1,1]> (r, wb, bb) s = Relu (b) {end}"


def dead_net(end: str, bias: float = 0.0, **weights: Any) -> onnx.ModelProto:
    """Two convolutions, the first with two dead channels, and an end that makes y."""
    given = {**SHAPES, "by": np.full(5, bias, np.float32), **weights}
    model = net(f"g (float[1,4,16,16] x) => (y) {{ {BODY.format(end=end)} }}", **given)
    for slot in (1, 2):
        value = parameter(model, 0, slot).copy()
        value[[1, 4]] = 0
        set_parameter(model, 0, slot, value)
    return model


def moved(model: onnx.ModelProto, by: float) -> onnx.ModelProto:
    """The model with another bias in its second convolution."""
    result = copy(model)
    set_parameter(result, 2, 2, parameter(result, 2, 2) + np.float32(by))
    return result


ENDS = {
    "low": ("z = Conv (s, wy, by) y = Sigmoid (z)", -16.5),
    "high": ("z = Conv (s, wy, by) y = Sigmoid (z)", 40.0),
    "softmax": ("z = Conv (s, wy, by) y = Softmax <axis=1> (z)", 0.0),
    "reshaped": ("z = Conv (s, wy, by) p = HardSigmoid (z) f = Flatten (p) y = Identity (f)", 9.0),
    "joined": ("z = Conv (s, wy, by) p = Sigmoid (z) q = Tanh (s) y = Concat <axis=1> (p, q)", 40.0),
    "classes": ("z = Conv (s, wy, by) y = ArgMax <axis=1> (z)", 0.0),
}


@pytest.mark.parametrize("name", ENDS)
def test_saturated_ends_neither_exaggerate_nor_hide_a_difference(name: str) -> None:
    end, bias = ENDS[name]
    model = dead_net(end, bias)
    result = shrink(model)
    assert [group.kept for group in result.layers] == [4]
    assert result.error < 1e-5
    reference = Reference(index(model), RUNTIME)
    assert reference.error(moved(model, 0.0)) == 0
    assert not reference.notes
    with pytest.raises(ModelError, match=r"differ from what they should be by .* rounding explains"):
        reference.error(moved(model, 0.01))


def test_the_case_needs_more_than_the_outputs() -> None:
    """What two optimisation levels of one file differ by: far more than rounding of a logit."""
    model = dead_net(*ENDS["low"])
    x = images(1, seed=0, shape=(4, 16, 16))
    plain = first_output(model, x)
    full = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (optimised,) = full.run(None, {"x": x})
    assert plain.max() < 1e-4
    assert np.linalg.norm(plain - optimised) > 1e-4 * np.linalg.norm(plain)


def test_an_error_that_the_model_shows_between_optimisation_levels_is_rounding() -> None:
    """Saturated values within the graph, scaled up behind it."""
    end = "z = Conv (s, wy, by) p = Sigmoid (z) y = Mul (p, big)"
    model = dead_net(end, -16.5, big=np.float32(1e6))
    assert [group.kept for group in shrink(model).layers] == [4]
    with pytest.raises(ModelError, match="rounding explains"):
        Reference(index(model), RUNTIME).error(moved(model, 30.0))


def test_pruned_channels_are_compared_with_zeros_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dead_net(*ENDS["low"])
    result = prune_channels(model, ChannelPruneOptions(sparsity=0.5))
    assert result.error is not None
    assert result.error < 1e-5
    assert result.notes == ()

    def wrong(*arguments: Any) -> onnx.ModelProto:
        return moved(right(*arguments), 0.01)

    right = onnx_asr.pruning.channels.remove
    monkeypatch.setattr(onnx_asr.pruning.channels, "remove", wrong)
    with pytest.raises(ModelError, match="rounding explains"):
        prune_channels(model, ChannelPruneOptions(sparsity=0.5))


def test_values_that_are_not_finite_in_the_given_model_are_left_out() -> None:
    logarithm = dead_net("z = Conv (s, wy, by) l = Log (z) y = Concat <axis=1> (l, z)")
    result = shrink(logarithm)
    (note,) = result.notes
    assert "of what the given model puts out on random input is NaN" in note
    assert [group.kept for group in result.layers] == [4]
    with pytest.raises(ModelError, match="rounding explains"):
        Reference(index(logarithm), RUNTIME).error(moved(logarithm, 0.01))


def test_a_model_for_positive_input_is_run_on_that() -> None:
    reference = Reference(index(net("g (float[1,8] x) => (y) { y = Sqrt (x) }")), RUNTIME)
    assert reference.notes == ()


def test_a_model_that_puts_out_nothing_but_nan_is_named_as_the_given_one() -> None:
    model = dead_net("z = Conv (s, wy, by) n = Mul (z, zero) y = Div (n, zero)", zero=np.float32(0))
    with pytest.raises(ModelError, match="the given model puts out nothing but NaN"):
        shrink(model)
    result = prune_channels(model, ChannelPruneOptions(sparsity=0.5))
    assert result.error is None
    assert "not checked on random input: the given model puts out nothing but NaN" in result.notes[0]


def test_a_model_that_cannot_be_run_on_random_input() -> None:
    """It is returned if nothing had to be removed; pruned channels go unchecked; else the shapes are named."""
    end = "z = Conv (s, wy, by) f = Reshape (z, shape) y = Relu (f)"
    model = dead_net(end, shape=np.array([7, -1]))
    with pytest.raises(ModelError, match="it was fed with x:1,4,16,16: give shapes that it takes"):
        shrink(model)
    assert "it was fed with" in prune_channels(model, ChannelPruneOptions(sparsity=0.5)).notes[0]
    whole = net(
        f"g (float[1,4,16,16] x) => (y) {{ {BODY.format(end=end)} }}", by=(5,), shape=np.array([7, -1]), **SHAPES
    )
    assert not shrink(whole).modified
    assert shrink(whole).model is whole


def test_outputs_that_are_no_tensors_are_named() -> None:
    model = dead_net("z = Conv (s, wy, by) y = SplitToSequence (z)")
    with pytest.raises(ModelError, match=r"output 'y' of .* is a list, but only tensors can be compared"):
        Reference(GraphIndex.of(model), RUNTIME)


def test_float16_is_allowed_its_rounding_wherever_it_is_held() -> None:
    half = {name: np.random.default_rng(0).normal(0, 0.3, shape).astype(np.float16) for name, shape in SHAPES.items()}
    half["wa"][[1, 4]] = half["ba"][[1, 4]] = 0
    text = f"g (float16[1,4,16,16] x) => (y) {{ {BODY.format(end='y = Conv (s, wy)')} }}"
    model = net(text, **half)
    nodes = [helper.make_node("Constant", [], [name], value=from_array(value)) for name, value in half.items()]
    del model.graph.initializer[:]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    result = shrink(model)
    assert [group.kept for group in result.layers] == [4]
    reference = Reference(index(model), RUNTIME)
    changed = copy(model)
    changed.graph.node[4].attribute[0].t.CopyFrom(from_array(half["wy"] * np.float16(1.002)))
    assert 1e-5 < reference.error(changed) < 4e-3
