"""Constant channels behind every operator that passes channels on, in every operator set: onnxruntime is the reference.

Of each operator all versions from operator set 7 on are tried, and the newest set that onnxruntime runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from onnx_asr.channels.rules import RULES
from onnx_asr.graph.layers import LAYERS
from onnx_asr.pruning.channels import prune_channels
from onnx_asr.pruning.options import ChannelPruneOptions
from onnx_asr.pruning.shrinking import shrink
from tests.graphs import run

OLDEST = 7
CHANNELS, DEAD = 6, [1, 4]
SPATIAL_PADS = [0, 0, 1, 1, 0, 0, 1, 1]
Inputs = list[Any]
Case = tuple[Inputs, dict[str, Any]]
"""Further inputs of an operator ('x' for the first again, '' for none), and its attributes."""


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def scalar(value: Any) -> np.ndarray:
    return np.array(value, np.float32 if isinstance(value, float) else None)


def plain(_: int) -> list[Case]:
    return [([], {})]


def attributes(*choices: dict[str, Any]) -> Callable[[int], list[Case]]:
    return lambda _: [([], choice) for choice in choices]


def clip(opset: int) -> list[Case]:
    if opset < 11:
        return [([], {"min": -0.2, "max": 0.3}), ([], {"max": 0.1}), ([], {})]
    return [([scalar(-0.2), scalar(0.3)], {}), (["", scalar(0.1)], {}), ([], {})]


def dropout(opset: int) -> list[Case]:
    if opset < 12:
        return [([], {}), ([], {"ratio": 0.5})]
    return [([], {}), ([scalar(0.5)], {}), ([scalar(0.5), scalar(False)], {})]


def binary(_: int) -> list[Case]:
    return [([operand], {}) for operand in (np.linspace(0.2, 1.5, 6, dtype="f4").reshape(6, 1, 1), floats(0.7))]


def batchnorm(opset: int) -> list[Case]:
    values = [np.linspace(low, 1.5, 6, dtype="f4") for low in (0.5, -0.7, -1.0, 0.3)]
    return [(values, {}), (values, {"epsilon": 0.1, "momentum": 0.5})]


def pool(opset: int) -> list[Case]:
    frames: list[dict[str, Any]] = [{}, {"pads": [1] * 4}, {"strides": [2, 2], "auto_pad": "SAME_LOWER"}]
    return [([], {"kernel_shape": [3, 3], **frame}) for frame in frames]


def average(opset: int) -> list[Case]:
    cases = pool(opset) + [([], {**settings, "count_include_pad": 1}) for _, settings in pool(opset)]
    if opset >= 10:
        cases += [([], {**settings, "strides": [2, 2], "ceil_mode": 1}) for _, settings in cases]
    return cases


def reduction(opset: int) -> list[Case]:
    return [([np.array([2, 3])], {})] if opset >= 18 else [([], {"axes": [2, 3]})]


def pad(opset: int) -> list[Case]:
    settings = [(mode, value) for mode in ("constant", "reflect", "edge") for value in (0.0, 0.55)]
    if opset < 11:
        return [([], {"pads": SPATIAL_PADS, "mode": mode, "value": value}) for mode, value in settings]
    return [([np.array(SPATIAL_PADS), scalar(value)], {"mode": mode}) for mode, value in settings]


def upsample(opset: int) -> list[Case]:
    sizes, modes = floats(1, 1, 2, 1.5), ("nearest", "linear")
    if opset < 9:
        return [([], {"scales": sizes.tolist(), "mode": mode}) for mode in modes]
    return [([sizes], {"mode": mode}) for mode in modes]


def resize(opset: int) -> list[Case]:
    sizes = floats(1, 1, 2, 0.7)
    if opset < 11:
        return [([sizes], {"mode": mode}) for mode in ("nearest", "linear")]
    regions = floats(0, 0, 0.1, 0.1, 1, 1, 1.2, 1.2)
    cases: list[Case] = [([regions, sizes], {"mode": mode}) for mode in ("nearest", "linear", "cubic")]
    outside = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 3.0}
    return [*cases, ([regions, sizes], {"mode": "linear", **outside})]


def slices(opset: int) -> list[Case]:
    if opset < 10:
        return [([], {"starts": [1, 0], "ends": [5, 4], "axes": [1, 2]})]
    return [([np.array([1, 0]), np.array([5, 4]), np.array([1, 2])], {})]


_PLAIN = (
    "Abs Ceil Cos Erf Exp Floor Gelu HardSwish Identity Mish Neg Reciprocal Relu Round Sigmoid Sign Sin Softplus "
    "Softsign Tanh GlobalAveragePool GlobalMaxPool GlobalLpPool Log Sqrt"
)
_BINARY = "Add Sub Mul Div Max Min Pow Sum Mean PRelu"
_REDUCTIONS = "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSumSquare"
CASES: dict[str, Callable[[int], list[Case]]] = {
    **dict.fromkeys(_PLAIN.split(), plain),
    **dict.fromkeys(_BINARY.split(), binary),
    **dict.fromkeys(("Celu", "Elu", "LeakyRelu", "ThresholdedRelu"), attributes({}, {"alpha": 0.25})),
    "HardSigmoid": attributes({}, {"alpha": 0.4, "beta": 0.3}),
    "Selu": attributes({}, {"alpha": 2.0, "gamma": 0.5}),
    "Cast": attributes({"to": onnx.TensorProto.FLOAT}),
    "InstanceNormalization": lambda opset: [([floats(*range(6)), floats(*range(6))], {})],
    "Clip": clip,
    "Dropout": dropout,
    "BatchNormalization": batchnorm,
    "MaxPool": pool,
    "LpPool": pool,
    "AveragePool": average,
    **dict.fromkeys(_REDUCTIONS.split(), reduction),
    "ReduceSum": lambda opset: reduction(18 if opset >= 13 else opset),
    **dict.fromkeys(("Softmax", "LogSoftmax"), attributes({}, {"axis": 1}, {"axis": 3})),
    "Pad": pad,
    "Upsample": upsample,
    "Resize": resize,
    "Slice": slices,
    "Transpose": attributes({"perm": [0, 1, 3, 2]}),
    "Concat": lambda opset: [(["x"], {"axis": 1}), (["x"], {"axis": 2})],
}
TESTED_ELSEWHERE = {"Flatten", "Reshape", "Shape", "Split", "Squeeze", "Unsqueeze", *LAYERS}


def frame(nodes: list[onnx.NodeProto], constants: dict[str, Any], opset: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 10, 10])],
        [onnx.ValueInfoProto(name=nodes[-1].output[0])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@cache
def newest() -> int:
    """The newest operator set that both onnx and onnxruntime know."""
    for opset in range(onnx.defs.onnx_opset_version(), OLDEST, -1):
        try:
            run(frame([helper.make_node("Relu", ["x"], ["y"])], {}, opset), {"x": np.zeros((1, 3, 10, 10), "f4")})
        except Exception:
            continue
        return opset
    raise AssertionError


@cache
def versions() -> dict[str, set[int]]:
    found = defaultdict(set)
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and not schema.deprecated:
            found[schema.name].add(max(OLDEST, schema.since_version))
    return found


def opsets(operator: str) -> list[int]:
    last = {9} if operator == "Upsample" else {newest()}  # later sets do not have it
    return sorted(opset for opset in versions()[operator] | last if opset <= newest())


def dead_net(operator: str, case: Case, opset: int, biases: list[float]) -> onnx.ModelProto | None:
    """Convolution with two dead channels, the operator, 1x1 convolution; None where onnxruntime lacks the operator."""
    generator = np.random.default_rng(0)
    weight = generator.normal(0, 0.3, (CHANNELS, 3, 3, 3)).astype(np.float32)
    weight[DEAD] = 0
    bias = floats(0.1, biases[0], 0.2, 0.3, biases[1], 0.4)
    if operator in ("Log", "Sqrt", "Reciprocal", "Pow"):  # of positive values
        weight, bias = 0.02 * weight, 1 + np.abs(bias)
    constants: dict[str, Any] = {"w1": weight, "b1": bias}
    reads = ["c"]
    for number, value in enumerate(case[0]):
        reads.append("c" if isinstance(value, str) and value else value if isinstance(value, str) else f"k{number}")
        if not isinstance(value, str):
            constants[f"k{number}"] = value
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], "conv1"),
        helper.make_node(operator, reads, ["o"], "op", **case[1]),
    ]
    try:
        outputs = run(frame(nodes, constants, opset), {"x": np.zeros((1, 3, 10, 10), "f4")})
    except Exception:
        return None
    constants["w2"] = generator.normal(0, 0.3, (5, outputs["o"].shape[1], 1, 1)).astype(np.float32)
    nodes.append(helper.make_node("Conv", ["o", "w2"], ["y"], "conv2"))
    return frame(nodes, constants, opset)


def nets(operator: str) -> Iterator[tuple[str, onnx.ModelProto]]:
    for opset in opsets(operator):
        for case in CASES[operator](opset):
            for biases in ([0.55, -0.7], [0.0, 0.0]):
                model = dead_net(operator, case, opset, biases)
                if model is not None:
                    yield f"opset {opset}, {case}, biases {biases}", model


def test_every_operator_with_a_rule_is_here() -> None:
    assert set(RULES) - set(CASES) == TESTED_ELSEWHERE


@pytest.mark.parametrize("operator", CASES)
def test_outputs_stay_as_onnxruntime_computes_them(operator: str) -> None:
    x = np.random.default_rng(5).standard_normal((1, 3, 10, 10)).astype(np.float32)
    known = 0
    for what, model in nets(operator):
        known += 1
        result = shrink(model)
        expected = run(model, {"x": x})["y"]
        np.testing.assert_allclose(
            run(result.model, {"x": x})["y"], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=what
        )
        if operator == "BatchNormalization":
            assert [group.kept for group in result.layers] == [CHANNELS - len(DEAD)], what
    assert known >= 2


@pytest.mark.parametrize("opset", range(OLDEST, newest() + 1))
def test_channels_are_pruned_in_every_operator_set(opset: int) -> None:
    model = dead_net("BatchNormalization", batchnorm(opset)[0], opset, [0.55, -0.7])
    assert model is not None
    result = prune_channels(model, ChannelPruneOptions(sparsity=1 / 3))
    assert [group.kept for group in result.groups] == [4]
    onnxruntime.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
