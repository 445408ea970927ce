"""A repair between the tools that people use: simplifiers before it; quantization, float16 and OpenVINO after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import onnx_asr
from onnx_asr.errors import ModelError, StructureError
from tests.end_to_end.conftest import ASSETS, cli
from tests.graphs import copy, digit_images, digits, first_output, folded, positions, pruned

NETS = ("resnet", "vgg", "mobilenet", "densenet")
OPTIONS = onnx_asr.RepairOptions(method="paired", samples=128, verify_samples=64)


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    tool = pytest.importorskip("onnxslim")
    return tool.slim(copy(model))


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    tool = pytest.importorskip("onnxsim")
    simplified, same = tool.simplify(copy(model))
    assert same
    return simplified


SIMPLIFIERS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {"onnxslim": slim, "onnxsim": simplify}


def scores(model: onnx.ModelProto | Path, x: np.ndarray) -> np.ndarray:
    """The first output of a plain session."""
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    return session.run(None, {wanted.name: x})[0]


def kl(reference: np.ndarray, other: np.ndarray) -> float:
    def logs(values: np.ndarray) -> np.ndarray:
        shifted = values.astype(np.float64) - values.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = logs(reference), logs(other)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def zeros(model: onnx.ModelProto) -> int:
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return sum(int((value == 0).sum()) for value in tensors if value.ndim > 1)


@pytest.mark.parametrize("tool", SIMPLIFIERS)
@pytest.mark.parametrize("name", NETS)
def test_simplified_pairs_are_repaired(name: str, tool: str) -> None:
    simplified = SIMPLIFIERS[tool]
    original = digits(name)
    dense, sparse = simplified(original), simplified(pruned(original, 0.8))
    x, _ = digit_images("validation")
    result = onnx_asr.repair(sparse, digit_images()[0], dense=dense, options=OPTIONS)
    onnx.checker.check_model(result.model, full_check=True)
    assert zeros(result.model) >= zeros(sparse)
    reference = scores(original, x)
    assert kl(reference, scores(result.model, x)) < 0.5 * kl(reference, scores(sparse, x))


@pytest.mark.parametrize("tool", SIMPLIFIERS)
@pytest.mark.parametrize("name", NETS)
def test_one_of_a_folded_pair_may_be_simplified(name: str, tool: str) -> None:
    original = folded(digits(name))
    sparse = pruned(original, 0.7)
    for dense, other in ((original, SIMPLIFIERS[tool](sparse)), (SIMPLIFIERS[tool](original), sparse)):
        result = onnx_asr.repair(other, digit_images()[0], dense=dense, options=OPTIONS)
        assert result.improved
