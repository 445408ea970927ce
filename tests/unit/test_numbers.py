"""Numbers at their limits: every method gives finite weights or says clearly why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_asr.compression import CompressOptions, compress
from onnx_asr.errors import OnnxAsrError
from onnx_asr.graph.index import FLOAT_TYPES
from onnx_asr.options import METHODS, RepairOptions
from onnx_asr.repairing import repair
from tests.graphs import copy, dense_net, images, parameter, positions, pruned, residual_net, set_parameter

Case = Callable[[onnx.ModelProto], np.ndarray]
COUNT = 12


def scaled(model: onnx.ModelProto, nodes: Sequence[int], factor: float) -> np.ndarray:
    for node in nodes:
        set_parameter(model, node, 1, parameter(model, node, 1) * factor)
    return images(COUNT, seed=3)


def constant_inputs(model: onnx.ModelProto) -> np.ndarray:
    """Every image is the same grey."""
    return np.full((COUNT, 3, 8, 8), 0.5, np.float32)


def black_inputs(model: onnx.ModelProto) -> np.ndarray:
    return np.zeros((COUNT, 3, 8, 8), np.float32)


def one_image(model: onnx.ModelProto) -> np.ndarray:
    return images(1, seed=3)


def an_empty_layer(model: onnx.ModelProto) -> np.ndarray:
    """All weights of the second convolution are pruned away."""
    return scaled(model, positions(model, "Conv")[1:2], 0)


def every_layer_empty(model: onnx.ModelProto) -> np.ndarray:
    return scaled(model, positions(model, "Conv", "Gemm"), 0)


def faint_channels(model: onnx.ModelProto) -> np.ndarray:
    """A millionth of the dense standard deviation, or less: variance ratios of 1e12 and 1e30."""
    for node, factor in zip(positions(model, "Conv"), (1e-6, 1e-15, 1e-30), strict=False):
        weight = parameter(model, node, 1).copy()
        weight[0] *= factor
        set_parameter(model, node, 1, weight)
    return images(COUNT, seed=3)


def loud_channels(model: onnx.ModelProto) -> np.ndarray:
    """A million times the dense standard deviation."""
    return scaled(model, positions(model, "Conv")[1:2], 1e6)


def activations_overflow(model: onnx.ModelProto) -> np.ndarray:
    """Products beyond float32."""
    return scaled(model, positions(model, "Conv")[:2], 1e30)


def variances_overflow(model: onnx.ModelProto) -> np.ndarray:
    """Values within float32, their squares beyond."""
    return scaled(model, positions(model, "Conv")[:1], 1e25)


def huge_inputs(model: onnx.ModelProto) -> np.ndarray:
    return images(COUNT, seed=3) * np.float32(1e30)


CASES: tuple[Case, ...] = (
    constant_inputs,
    black_inputs,
    one_image,
    an_empty_layer,
    every_layer_empty,
    faint_channels,
    loud_channels,
    activations_overflow,
    variances_overflow,
    huge_inputs,
)


def check(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model)
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOAT_TYPES:
            assert np.isfinite(numpy_helper.to_array(tensor).astype(np.float64)).all(), tensor.name


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in float16."""
    result = copy(model)
    for tensor in result.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            with np.errstate(over="ignore"):
                value = np.clip(numpy_helper.to_array(tensor), -65504, 65504).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for value in (*result.graph.input, *result.graph.output, *result.graph.value_info):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return result


def attempt(method: str, damaged: onnx.ModelProto, dense: onnx.ModelProto | None, x: np.ndarray) -> None:
    options = RepairOptions(method, samples=max(1, len(x) - 4), verify_samples=4)
    try:
        result = repair(damaged, x, dense=dense, options=options)
    except OnnxAsrError as error:
        assert len(str(error)) > 40  # noqa: PT017
    else:
        check(result.model)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("net", [residual_net, dense_net])
def test_what_is_written_is_finite(net: Callable[[], onnx.ModelProto], case: Case, method: str) -> None:
    dense = net()
    damaged = pruned(dense, 0.5)
    x = case(damaged)
    attempt(method, damaged, dense, x)
    if method in ("auto", "paired", "bn"):
        attempt(method, damaged, None, x)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_half_precision_overflows_to_no_infinity(case: Case, method: str) -> None:
    dense = residual_net()
    damaged = pruned(dense, 0.5)
    with np.errstate(over="ignore"):
        x = np.clip(case(damaged), -65504, 65504).astype(np.float16)
    attempt(method, half(damaged), half(dense), x)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", [case for case in CASES if "channels" not in case.__name__], ids=lambda c: c.__name__)
def test_compress_too(case: Case) -> None:
    model = residual_net()
    x = case(model)
    try:
        result = compress(model, x, CompressOptions(0.5, rounds=2), repair_options=RepairOptions(samples=8))
    except OnnxAsrError as error:
        assert len(str(error)) > 40  # noqa: PT017
    else:
        check(result.model)
