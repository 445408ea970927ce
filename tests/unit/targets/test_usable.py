"""Whose zeros a runtime makes use of: every rule, on a layer that keeps it and on one that just does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, quantize_static

import onnx_asr
from onnx_asr.errors import ModelError
from onnx_asr.networks.operations import Probe
from onnx_asr.targets.rules import RUNTIMES, TARGETS, LayerForm, RuntimeName
from onnx_asr.targets.usable import LayerUse, TargetUse, zeros_in_use
from tests.graphs import index, net

GOOD: dict[RuntimeName, LayerForm] = {
    "tensorrt": LayerForm("Conv", 1, 256, 256, 1, 0.5, 2, False, False, False),
    "openvino": LayerForm("Gemm", 1, 64, 128, 1, 0.8, 4, False, True, True),
}
BREAKERS: list[tuple[RuntimeName, str, dict[str, Any]]] = [
    ("tensorrt", "operator-without-sparse-kernel", {"kind": "ConvTranspose"}),
    ("tensorrt", "grouped-convolution", {"groups": 2}),
    ("tensorrt", "inputs-not-divisible", {"inputs": 258}),
    ("tensorrt", "few-inputs", {"inputs": 252}),
    ("tensorrt", "few-outputs", {"outputs": 255}),
    ("tensorrt", "zeros-not-2-of-4", {"most_of_four": 3}),
    ("tensorrt", "matmul", {"kind": "MatMul"}),
    ("tensorrt", "beside-quantizer", {"beside_quantizer": True}),
    ("openvino", "operator-not-packed", {"kind": "Conv"}),
    ("openvino", "weight-is-left-operand", {"weight_first": True}),
    ("openvino", "channels-not-divisible", {"outputs": 100}),
    ("openvino", "channels-not-divisible", {"inputs": 100}),
    ("openvino", "not-quantized", {"quantized": False}),
    ("openvino", "below-threshold", {"sparsity": 0.79}),
]


@pytest.mark.parametrize(("runtime", "code", "change"), BREAKERS)
def test_each_rule_alone_is_broken(runtime: RuntimeName, code: str, change: dict[str, Any]) -> None:
    rules = TARGETS[runtime].rules
    assert not any(rule.broken_by(GOOD[runtime]) for rule in rules)
    assert [rule.code for rule in rules if rule.broken_by(replace(GOOD[runtime], **change))] == [code]


def test_a_kernel_multiplies_the_inputs() -> None:
    few = next(rule for rule in TARGETS["tensorrt"].rules if rule.code == "few-inputs")
    form = replace(GOOD["tensorrt"], inputs=32)
    assert few.broken_by(form)
    assert not few.broken_by(replace(form, taps=9))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_rule_has_a_source_and_a_sentence(runtime: RuntimeName) -> None:
    target = TARGETS[runtime]
    assert {code for name, code, _ in BREAKERS if name == runtime} | {"no-zeros"} >= {
        rule.code for rule in target.rules
    }
    for rule in target.rules:
        assert rule.sources
        assert "{" not in rule.sentence
    for source in (source for rule in target.rules for source in rule.sources):
        assert source.url.startswith("https://")


def two_of_four(weight: np.ndarray, axis: int = 1) -> np.ndarray:
    """Zeros at the first two of every four places along an axis."""
    keep = np.arange(weight.shape[axis]) % 4 >= 2
    return np.asarray(weight * keep.reshape([-1 if place == axis else 1 for place in range(weight.ndim)]), np.float32)


def several_layers() -> onnx.ModelProto:
    """Two convolutions, a grouped one and a narrow one, a MatMul and a Gemm; the second and the last two with zeros."""
    draw = np.random.default_rng(0).standard_normal
    return net(
        """
        g (float[N,256,4,4] x) => (float[N,256] y) {
          a = Conv (x, dense)  b = Conv (a, sparse)  c = Conv <group=2> (b, grouped)  d = Conv (c, narrow)
          e = GlobalAveragePool (d)  f = Flatten (e)  h = MatMul (f, product)  y = Gemm (h, last)
        }
        """,
        dense=(256, 256, 1, 1),
        sparse=two_of_four(draw((256, 256, 1, 1))),
        grouped=two_of_four(draw((256, 128, 1, 1))),
        narrow=two_of_four(draw((64, 256, 1, 1))),
        product=two_of_four(draw((64, 256)), axis=0),
        last=two_of_four(draw((256, 256)), axis=0),
    )


def found(use: TargetUse) -> list[tuple[str, list[str]]]:
    return [(layer.use, [obstacle.code for obstacle in layer.obstacles]) for layer in use.layers]


def flops(layers: Sequence[LayerUse]) -> int:
    return sum(layer.flops or 0 for layer in layers)


def test_layers_for_tensorrt() -> None:
    use = zeros_in_use(index(several_layers()), "tensorrt", Probe({"x": (1, 256, 4, 4)}))
    assert found(use) == [
        ("no", ["zeros-not-2-of-4"]),
        ("yes", []),
        ("no", ["grouped-convolution", "few-inputs"]),
        ("no", ["few-outputs"]),
        ("no", ["few-inputs", "matmul"]),
        ("yes", []),
    ]
    assert [layer.could_be for layer in use.layers] == [True, True, False, False, False, True]
    dense, sparse, *_, last = use.layers
    assert (dense.flops, last.flops) == (2 * 16 * 256 * 256, 2 * 256 * 256)
    assert use.flops == flops(use.layers)
    assert use.shares["yes"] == pytest.approx(flops([sparse, last]) / use.flops)
    assert use.possible_share == pytest.approx(flops([dense, sparse, last]) / use.flops)
    assert sum(share or 0 for share in use.shares.values()) == pytest.approx(1)


def test_zeros_along_the_wrong_axis_are_none() -> None:
    model = net(
        "g (float[N,256] x) => (float[N,256] y) { y = Gemm (x, w) }",
        w=two_of_four(np.ones((256, 256)), axis=1),
    )
    assert found(zeros_in_use(index(model), "tensorrt", Probe())) == [("no", ["zeros-not-2-of-4"])]


def test_zero_points_of_blocks_are_zeros() -> None:
    points = np.repeat(np.arange(1, 6, dtype=np.int8)[:, None], 64, axis=1)  # of 5 blocks, the last of 8 rows
    stored = np.repeat(points, 16, axis=0)[:72]
    stored[::2] += 3
    model = net(
        """
        g (float[N,72] x) => (float[N,64] y) {
          w = DequantizeLinear <axis=0, block_size=16> (stored, scales, points)  y = MatMul (x, w)
        }
        """,
        opset=21,
        stored=stored,
        scales=np.ones(points.shape, np.float32),
        points=points,
    )
    (layer,) = zeros_in_use(index(model), "openvino", Probe()).layers
    assert layer.sparsity == 0.5


class Reader(CalibrationDataReader):
    """One random sample."""

    def __init__(self) -> None:
        self.left = [{"x": np.random.default_rng(1).standard_normal((1, 256, 4, 4)).astype(np.float32)}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def test_quantized_weights_are_judged_by_their_integers(tmp_path: Path) -> None:
    onnx.save(several_layers(), tmp_path / "float.onnx")
    quantize_static(tmp_path / "float.onnx", tmp_path / "int8.onnx", Reader(), per_channel=True)
    path = str(tmp_path / "int8.onnx")
    with pytest.raises(ModelError, match="already quantized"):
        onnx_asr.inspect(path)
    inspection = onnx_asr.inspect(path, target="tensorrt")
    assert inspection.layers == ()
    assert isinstance(inspection.target, TargetUse)
    assert [use for use, _ in found(inspection.target)] == ["no", "perhaps", "no", "no", "no", "perhaps"]
    assert [layer.sparsity for layer in inspection.target.layers[1:]] == pytest.approx([0.5] * 5, abs=0.02)
    packed = onnx_asr.inspect(path, target="openvino").target
    assert isinstance(packed, TargetUse)
    assert found(packed)[-2:] == [("perhaps", ["below-threshold"])] * 2
    assert found(packed)[0] == ("no", ["operator-not-packed", "below-threshold"])
