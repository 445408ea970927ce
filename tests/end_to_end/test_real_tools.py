"""Repair together with common tools: simplifiers before it; quantization, float16 and OpenVINO after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

import onnx_asr
from onnx_asr.cli.app import run as command
from tests.end_to_end.conftest import CALIBRATION, PRESET
from tests.graphs import copy, digit_images, digits, folded, kl, pruned
from tools.paths import ASSETS

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


def zeros(model: onnx.ModelProto) -> int:
    tensors = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return sum(int((value == 0).sum()) for value in tensors if value.ndim > 1)


@pytest.mark.parametrize("tool", SIMPLIFIERS)
@pytest.mark.parametrize("name", NETS)
def test_simplified_pairs_are_repaired(name: str, tool: str) -> None:
    simplified = SIMPLIFIERS[tool]
    original = digits(name)
    dense, sparse = simplified(original), simplified(pruned(original, 0.8))
    x, _ = digit_images("validation")
    result = onnx_asr.repair(sparse, digit_images()[0], OPTIONS, dense=dense)
    onnx.checker.check_model(result.model, full_check=True)
    assert zeros(result.model) >= zeros(sparse)
    reference = scores(original, x)
    assert kl(reference, scores(result.model, x)) < 0.5 * kl(reference, scores(sparse, x))


@pytest.mark.parametrize("tool", SIMPLIFIERS)
@pytest.mark.parametrize("name", ["mobilenet", "densenet"])
def test_one_of_a_folded_pair_may_be_simplified(name: str, tool: str) -> None:
    original = folded(digits(name))
    sparse = pruned(original, 0.7)
    for dense, other in ((original, SIMPLIFIERS[tool](sparse)), (SIMPLIFIERS[tool](original), sparse)):
        result = onnx_asr.repair(other, digit_images()[0], OPTIONS, dense=dense)
        assert result.improved


@pytest.mark.parametrize("tool", SIMPLIFIERS)
def test_a_simplifier_may_fold_batchnorm_in_one_of_a_pair(tool: str) -> None:
    original = digits("resnet")
    sparse = pruned(original, 0.8)
    for dense, other in ((original, SIMPLIFIERS[tool](sparse)), (SIMPLIFIERS[tool](original), sparse)):
        result = onnx_asr.repair(other, digit_images()[0], OPTIONS, dense=dense)
        assert result.improved
        assert [node.op_type for node in result.model.graph.node] == [node.op_type for node in other.graph.node]


@pytest.fixture(scope="module")
def repaired_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The digits nets at 80%, repaired."""
    folder = tmp_path_factory.mktemp("repaired")
    files = {}
    for name in NETS:
        result = onnx_asr.repair(pruned(digits(name), 0.8), digit_images()[0], OPTIONS, dense=digits(name))
        files[name] = onnx_asr.save(result.model, folder / f"{name}.onnx")
    return files


def agreement(reference: np.ndarray, other: np.ndarray) -> float:
    return float((reference.argmax(axis=1) == other.argmax(axis=1)).mean())


class Reader(CalibrationDataReader):
    """Batches for onnxruntime's quantizer."""

    def __init__(self, name: str, x: np.ndarray) -> None:
        self._feeds = iter([{name: x[start : start + 32]} for start in range(0, len(x), 32)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def quantize(source: Path, target: Path, x: np.ndarray) -> None:
    name = onnx.load(source).graph.input[0].name
    quantize_static(source, target, Reader(name, x), per_channel=True)


@pytest.mark.parametrize("name", NETS)
def test_a_repaired_model_is_quantized(
    name: str, repaired_files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The quantized model is refused as the input of another repair."""
    x, _ = digit_images("validation")
    quantize(repaired_files[name], tmp_path / "int8.onnx", digit_images()[0][:128])
    assert agreement(scores(repaired_files[name], x), scores(tmp_path / "int8.onnx", x)) > 0.95
    arguments = ["repair", tmp_path / "int8.onnx", "--data", CALIBRATION, *PRESET, "-o", tmp_path / "again.onnx"]
    capfd.readouterr()
    assert command([str(argument) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "repair the float model first, then quantize the result" in err
    assert not (tmp_path / "again.onnx").exists()


@pytest.mark.parametrize("name", ["mobilenet", "densenet"])
def test_a_repaired_model_is_converted_to_openvino(name: str, repaired_files: dict[str, Path]) -> None:
    openvino = pytest.importorskip("openvino")
    x, _ = digit_images("validation")
    converted = openvino.convert_model(repaired_files[name])
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    reference = scores(repaired_files[name], x)
    np.testing.assert_allclose(compiled(x)[0], reference, atol=1e-3 * np.abs(reference).max())


def by_onnxconverter(model: onnx.ModelProto) -> onnx.ModelProto:
    return pytest.importorskip("onnxconverter_common").float16.convert_float_to_float16(model, keep_io_types=True)


def by_onnxruntime(model: onnx.ModelProto) -> onnx.ModelProto:
    module = pytest.importorskip("onnxruntime.transformers.float16")
    return module.convert_float_to_float16(model, keep_io_types=True)


@pytest.mark.filterwarnings("ignore:the float32 number")
@pytest.mark.parametrize("convert", [by_onnxconverter, by_onnxruntime])
@pytest.mark.parametrize("name", NETS)
def test_a_repaired_model_is_converted_to_float16(
    name: str, convert: Callable[[onnx.ModelProto], onnx.ModelProto], repaired_files: dict[str, Path]
) -> None:
    x, _ = digit_images("validation")
    reference = scores(repaired_files[name], x)
    half = convert(onnx.load(repaired_files[name]))
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in half.graph.initializer}
    np.testing.assert_allclose(scores(half, x), reference, atol=1e-2 * np.abs(reference).max())


@pytest.mark.filterwarnings("ignore:the float32 number")
@pytest.mark.parametrize("convert", [by_onnxconverter, by_onnxruntime])
def test_a_float16_model_is_repaired(convert: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
    """Converted to float16 first; the dense model may be float16 or float32."""
    original = digits("resnet")
    sparse = convert(pruned(original, 0.8))
    x, _ = digit_images("validation")
    reference = scores(original, x)
    for dense in (convert(copy(original)), original):
        result = onnx_asr.repair(sparse, digit_images()[0], OPTIONS, dense=dense)
        onnx.checker.check_model(result.model, full_check=True)
        assert kl(reference, scores(result.model, x)) < 0.5 * kl(reference, scores(sparse, x))


@pytest.mark.skipif(not (ASSETS / "cifar10").is_dir(), reason="../shared/assets is not there")
@pytest.mark.parametrize("tool", SIMPLIFIERS)
def test_a_real_net_through_all_tools(tool: str, tmp_path: Path) -> None:
    """ResNet-20: pruned, simplified, repaired, quantized; the int8 net is as good as the repaired one."""
    original = onnx.load(ASSETS / "cifar10/resnet20_bn.onnx")
    dense, sparse = (
        SIMPLIFIERS[tool](model)
        for model in (original, onnx_asr.prune(original, options=onnx_asr.PruneOptions(0.8)).model)
    )
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = {}
    for split, count in (("train4k", 256), ("test1k", 500)):
        with np.load(ASSETS / f"data/cifar10_{split}_lossless.npz") as file:
            pixels, labels = file["images"][:count], file["labels"][:count]
        x[split] = ((pixels / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    result = onnx_asr.repair(sparse, x["train4k"], OPTIONS, dense=dense)
    path = onnx_asr.save(result.model, tmp_path / "r.onnx")
    onnx.checker.check_model(path, full_check=True)
    quantize(path, tmp_path / "int8.onnx", x["train4k"][:128])
    top1 = {
        name: float((scores(model, x["test1k"]).argmax(axis=1) == labels).mean())
        for name, model in (("pruned", sparse), ("repaired", path), ("int8", tmp_path / "int8.onnx"))
    }
    assert top1["repaired"] > max(0.75, top1["pruned"] + 0.2), top1
    assert top1["int8"] > top1["repaired"] - 0.03
