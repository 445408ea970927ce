"""Sessions: ragged outputs, another provider, weights beside the model."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import ModelError
from onnx_asr.graph import tensors
from tests.graphs import images, net, residual_net, run


def test_outputs_whose_shape_depends_on_the_data() -> None:
    """Later runs have the same input shape and another output shape (NonZero, NonMaxSuppression)."""
    model = net("g (float[N,3] x) => (int64[2,M] y, float[N,3] z) { y = NonZero (x)  z = Neg (x) }")
    session = Session(model, Runtime(threads=1))
    for seed, share in ((0, 0.5), (1, 0.1), (2, 0.9), (3, 0.0)):
        x = (np.random.default_rng(seed).random((8, 3)) < share).astype(np.float32)
        out = session.run({"x": x})
        np.testing.assert_array_equal(out["y"], np.array(np.nonzero(x)))
        np.testing.assert_array_equal(out["z"], -x)


def test_results_belong_to_the_caller_and_inputs_may_be_views() -> None:
    session = Session(residual_net(), Runtime(threads=1))
    x = images(6, seed=1)
    first = session.run({"x": x[::2]})["logits"]
    kept = first.copy()
    for _ in range(3):
        session.run({"x": x[1::2] * 3})
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(session.run({"x": x[::2]})["logits"], kept)


OTHERS = [name for name in onnxruntime.get_available_providers() if name != "CPUExecutionProvider"]


@pytest.mark.skipif(not OTHERS, reason="this onnxruntime has the CPU only")
@pytest.mark.parametrize("batches", [[4], [4, 4, 4], [4, 3, 4]])
def test_arrays_go_in_and_out_of_another_provider(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run of a shape binds arrays, which lie in the memory of the CPU, whatever the provider."""
    model, feeds = residual_net(), [{"x": images(count, seed=number)} for number, count in enumerate(batches)]
    expected = [run(model, feed)["logits"] for feed in feeds]
    asked: list[Any] = []
    make = onnxruntime.InferenceSession

    def spy(*arguments: Any, providers: Any) -> Any:
        asked.append(providers)
        return make(*arguments, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    session = Session(model, Runtime((OTHERS[0], "CPUExecutionProvider"), threads=1))
    for feed, value in zip(feeds, expected, strict=True):
        np.testing.assert_allclose(session.run(feed)["logits"], value, atol=1e-5)
    assert asked == [[OTHERS[0], "CPUExecutionProvider"]]


def test_errors_of_the_runtime_are_one_line() -> None:
    with pytest.raises(ModelError, match="cannot load") as caught:
        Session(net("g (float[N,3] x) => (float[N,3] y) { y = NoSuchOperator (x) }"), Runtime())
    assert "\n" not in str(caught.value)
    session = Session(residual_net(), Runtime())
    with pytest.raises(ModelError, match="cannot run") as caught:
        session.run({"x": np.zeros((1, 3, 4), np.float32)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lean", [False, True])
def test_weights_handed_over_beside_the_model_live_until_the_session_is_made(
    lean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near a memory limit, or over 2 GB, onnxruntime copies weights while it loads and keeps no reference to them."""
    model = net("g (float[N,600] x) => (float[N,600] y) { y = MatMul (x, w) }", w=(600, 600))
    x = np.random.default_rng(0).normal(size=(4, 600)).astype(np.float32)
    expected = Session(model, Runtime(threads=1)).run({"x": x})["y"]
    if not lean:
        monkeypatch.setattr(tensors, "WEIGHT_LIMIT", 1 << 20)
    values: list[weakref.ref[np.ndarray]] = []
    original, load = onnxruntime.OrtValue.ortvalue_from_numpy, onnxruntime.InferenceSession

    def hand_over(array: np.ndarray) -> onnxruntime.OrtValue:
        values.append(weakref.ref(array))
        return original(array)

    def checked(*args: Any, **kwargs: Any) -> onnxruntime.InferenceSession:
        assert [value() is not None for value in values] == [True]
        return load(*args, **kwargs)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", hand_over)
    monkeypatch.setattr(onnxruntime, "InferenceSession", checked)
    session = Session(model, Runtime(threads=1, lean=lean))
    assert [value() for value in values] == [None]
    others = [np.full((600, 600), np.nan, np.float32) for _ in range(4)]
    np.testing.assert_array_equal(session.run({"x": x})["y"], expected)
    assert len(others) == 4


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT16", "INT8", "FLOAT8E4M3FN", "INT4"])
def test_weights_of_any_type_are_handed_over_or_stay(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime takes numpy's own types beside the model, others only within it."""
    data_type = onnx.TensorProto.DataType.Value(kind)
    convert = "Cast <to=1> (w)" if "FLOAT16" in kind or kind == "INT8" else "DequantizeLinear (w, s)"
    text = f"g (float[N,1600] x) => (float[N,1600] y) {{ c = {convert}\n y = MatMul (x, c) }}"
    model = net(text, ir=10, opset=21, w=(1, 1), s=np.float32(0.5))
    values = np.random.default_rng(0).integers(-8, 8, 1600**2)
    model.graph.initializer[0].CopyFrom(helper.make_tensor("w", data_type, (1600, 1600), values))
    assert tensors.size_of(model.graph.initializer[0]) >= tensors.LARGE
    x = np.random.default_rng(1).normal(size=(4, 1600)).astype(np.float32)
    expected = Session(model, Runtime(threads=1)).run({"x": x})["y"]
    handed_over: list[np.ndarray] = []
    original = onnxruntime.OrtValue.ortvalue_from_numpy

    def spy(array: np.ndarray) -> onnxruntime.OrtValue:
        handed_over.append(array)
        return original(array)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", spy)
    lean = Session(model, Runtime(threads=1, lean=True))
    assert len(handed_over) == (kind in ("FLOAT16", "INT8"))
    np.testing.assert_array_equal(lean.run({"x": x})["y"], expected)
