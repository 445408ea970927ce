"""A model is what onnxruntime runs, also where onnx's checker does not know an operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnx_asr.engine.loading import load
from onnx_asr.errors import ModelError
from onnx_asr.pruning.options import PruneOptions
from onnx_asr.pruning.shrinking import shrink
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import RepairOptions
from onnx_asr.repairing.pipeline import repair
from tests.graphs import first_output, images, net

# operator: a set in which onnx does not have it, or calls it deprecated, but onnxruntime runs it; and its parameters
OLD = {
    "GroupNormalization <num_groups=2> (a, gamma, beta)": (18, {"gamma": (2,), "beta": (2,)}),
    "LayerNormalization (a, gamma, beta)": (11, {"gamma": (8,), "beta": (8,)}),
    "ThresholdedRelu <alpha=0.1> (a)": (9, {}),
    "MeanVarianceNormalization (a)": (8, {}),
}


def model_with(call: str, opset: int, **weights: tuple[int, ...]) -> onnx.ModelProto:
    body = f"a = Conv (x, wa, ba) n = {call} r = Relu (n) y = Conv (r, wy, by)"
    return net(
        f"g (float[N,4,8,8] x) => (y) {{ {body} }}",
        opset=opset,
        ir=4,
        wa=(6, 4, 1, 1),
        ba=(6,),
        wy=(5, 6, 3, 3),
        by=(5,),
        **weights,
    )


@pytest.mark.parametrize("call", OLD)
def test_operators_that_only_onnxruntime_knows_are_accepted(call: str) -> None:
    opset, weights = OLD[call]
    model = model_with(call, opset, **weights)
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model)
    assert load(model) is model
    x = images(24, seed=0, shape=(4, 8, 8))
    np.testing.assert_allclose(first_output(shrink(model).model, x), first_output(model, x), rtol=1e-6)
    pruned = prune(model, options=PruneOptions(sparsity=0.5)).model
    result = repair(pruned, x, RepairOptions(method="refit"), dense=model)
    before, after, expected = (first_output(item, x) for item in (pruned, result.model, model))
    assert np.square(after - expected).sum() < np.square(before - expected).sum()


def test_what_neither_knows_is_refused(tmp_path: Path) -> None:
    model = model_with("Frobnicate (a)", 17)
    onnx.save(model, tmp_path / "m.onnx")
    reason = (
        r"m.onnx' is not a valid ONNX model: No Op registered for Frobnicate .*; onnxruntime cannot load it: .*export"
    )
    with pytest.raises(ModelError, match=reason):
        load(tmp_path / "m.onnx")
    model.graph.node[1].CopyFrom(helper.make_node("Upsample", ["a", "scales"], ["n"]))  # deprecated since 10
    model.graph.initializer.append(helper.make_tensor("scales", onnx.TensorProto.FLOAT, [4], [1, 1, 1, 1]))
    with pytest.raises(ModelError, match=r"Upsample is deprecated .*; onnxruntime cannot load it"):
        load(model)


def test_a_known_operator_has_to_be_right_even_if_another_is_unknown() -> None:
    model = model_with("ThresholdedRelu <alpha=0.1> (a)", 9)
    model.graph.node[2].ClearField("input")
    with pytest.raises(ModelError, match=r"not a valid ONNX model: .*Relu"):
        load(model)
