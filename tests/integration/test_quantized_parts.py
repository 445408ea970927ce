"""Float networks with quantized parts, as onnxruntime's quantizer and users make them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

import onnx_asr
from onnx_asr import CompressOptions, PruneOptions, RepairOptions
from onnx_asr.errors import ModelError
from tests.graphs import constant, copy, images, net

SETTINGS = RepairOptions(samples=48, verify_samples=16, batch_size=16)
FLOAT_LAYERS = ["conv2", "head"]


def samples() -> np.ndarray:
    return images(64, seed=1, shape=(3, 8, 8))


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The samples, for onnxruntime's quantizer."""

    def __init__(self) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter([{"x": samples()}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def float_net() -> onnx.ModelProto:
    text = """g (float[N,3,8,8] x) => (float[N,5] y) {
        c = Conv <pads=[1,1,1,1]> (x, w1, b1)  r = Relu (c)  d = Conv <pads=[1,1,1,1]> (r, w2, b2)  s = Relu (d)
        p = GlobalAveragePool (s)  f = Flatten (p)  y = Gemm (f, wf, bf) }"""
    model = net(text, w1=(8, 3, 3, 3), b1=(8,), w2=(8, 8, 3, 3), b2=(8,), wf=(8, 5), bf=(5,))
    for node, name in zip(model.graph.node, ["conv1", "", "conv2", "", "", "", "head"], strict=True):
        node.name = name
    return model


def quantized(model: onnx.ModelProto, folder: Path, kind: str) -> onnx.ModelProto:
    source, target = folder / "float.onnx", folder / "quantized.onnx"
    onnx.save(model, source)
    name, _, rest = kind.partition(" ")
    excluded = FLOAT_LAYERS if rest else []
    if name == "dynamic":
        quantize_dynamic(source, target, nodes_to_exclude=excluded)
    else:
        quantize_static(source, target, Reader(), quant_format=QuantFormat[name], nodes_to_exclude=excluded)
    return onnx.load(target)


def with_ends(model: onnx.ModelProto, *, begin: bool, end: bool, between: bool) -> onnx.ModelProto:
    """The network with an input of bytes, an output of bytes, or activations rounded in front of each layer."""
    model = copy(model)
    graph = model.graph
    graph.initializer.extend([numpy_helper.from_array(np.float32(0.02), "scale")])
    graph.initializer.extend([numpy_helper.from_array(np.uint8(128), "zero")])
    nodes = [helper.make_node("DequantizeLinear", ["bytes", "scale", "zero"], ["x"])] if begin else []
    for node in graph.node:
        if between and node.op_type in ("Conv", "Gemm"):
            rounded, back = f"{node.name}_q", f"{node.name}_d"
            nodes.append(helper.make_node("QuantizeLinear", [node.input[0], "scale", "zero"], [rounded]))
            nodes.append(helper.make_node("DequantizeLinear", [rounded, "scale", "zero"], [back]))
            node.input[0] = back
        nodes.append(node)
    if begin:
        graph.input[0].CopyFrom(helper.make_tensor_value_info("bytes", TensorProto.UINT8, ["N", 3, 8, 8]))
    if end:
        nodes.append(helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["result"]))
        graph.output[0].CopyFrom(helper.make_tensor_value_info("result", TensorProto.UINT8, ["N", 5]))
    del graph.node[:]
    graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("kind", ["QDQ", "QOperator", "dynamic"])
def test_a_network_of_quantized_layers_is_refused(kind: str, tmp_path: Path) -> None:
    model = quantized(float_net(), tmp_path, kind)
    with pytest.raises(ModelError, match="already quantized"):
        onnx_asr.prune(model, options=PruneOptions(0.5))
    with pytest.raises(ModelError, match="already quantized"):
        onnx_asr.repair(model, samples(), SETTINGS, dense=model)


@pytest.mark.parametrize("method", ["refit", "paired", "auto"])
@pytest.mark.parametrize("kind", ["QDQ mixed", "QOperator mixed", "dynamic mixed"])
def test_float_layers_beside_quantized_ones_are_repaired(kind: str, method: Any, tmp_path: Path) -> None:
    dense = quantized(float_net(), tmp_path, kind)
    pruned = onnx_asr.prune(dense, options=PruneOptions(0.6)).model
    result = onnx_asr.repair(
        pruned, samples(), RepairOptions(method=method, samples=48, verify_samples=16, batch_size=16), dense=dense
    )
    assert {skip.code for skip in result.skips} == {"weight-quantized"}
    assert "conv2" in {point.name for point in result.points}
    assert result.verification is not None
    assert result.verification.after.distance < 0.7 * result.verification.before.distance
    before = {tensor.name: tensor for tensor in pruned.graph.initializer}
    for tensor in result.model.graph.initializer:
        if tensor.data_type in (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32):
            assert tensor == before[tensor.name]
    assert [node.op_type for node in result.model.graph.node] == [node.op_type for node in pruned.graph.node]


ENDS = {
    "begin": {"begin": True, "end": False, "between": False},
    "end": {"begin": False, "end": True, "between": False},
    "between": {"begin": False, "end": False, "between": True},
    "everywhere": {"begin": True, "end": True, "between": True},
}


@pytest.mark.parametrize("ends", ENDS)
def test_quantizers_of_activations_stay_and_float_weights_are_repaired(ends: str) -> None:
    dense = with_ends(float_net(), **ENDS[ends])
    data = samples()
    if ENDS[ends]["begin"]:
        data = np.clip(data / 0.02 + 128, 0, 255).astype(np.uint8)
    pruned = onnx_asr.prune(dense, options=PruneOptions(0.6)).model
    for method in ("refit", "paired"):
        options = RepairOptions(method=method, samples=48, verify_samples=16, batch_size=16)  # type: ignore[arg-type]
        result = onnx_asr.repair(pruned, {dense.graph.input[0].name: data}, options, dense=dense)
        assert len(result.points) == 3
        assert result.skips == ()
        assert [node.op_type for node in result.model.graph.node] == [node.op_type for node in dense.graph.node]
        assert constant(result.model, "scale") == np.float32(0.02)
        assert result.verification is not None
        assert result.verification.after.snr_db is not None
        assert result.verification.after.distance < 0.7 * result.verification.before.distance
    compressed = onnx_asr.compress(
        dense, {dense.graph.input[0].name: data}, CompressOptions(0.6, rounds=2, repair=SETTINGS)
    )
    assert (constant(compressed.model, "w2") == 0).any()
