"""Fidelity against sums over samples and classes written out in plain Python."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import onnx_asr
from onnx_asr.data.datasets import TensorDataset
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import DataError, ModelError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.json_values import plain
from onnx_asr.networks.fidelity import Fidelity, Noise, accuracy, collect_outputs, compare
from onnx_asr.networks.samples import input_specs
from tests.graphs import images, net, pruned, residual_net, run


def scores(seed: int, shape: tuple[int, ...] = (23, 10)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)


def softmax(row) -> list[float]:
    total = math.fsum(math.exp(float(v)) for v in row)
    return [math.exp(float(v)) / total for v in row]


def divergence(dense: np.ndarray, other: np.ndarray) -> float:
    total = 0.0
    for p_row, q_row in zip(dense, other, strict=True):
        total += math.fsum(p * math.log(p / q) for p, q in zip(softmax(p_row), softmax(q_row), strict=True))
    return total / len(dense)


def test_logits():
    dense, other = scores(0), scores(0) + scores(1)
    found = compare([dense], [other])
    same = sum(
        max(range(10), key=a.__getitem__) == max(range(10), key=b.__getitem__)
        for a, b in zip(dense, other, strict=True)
    )
    signal = math.fsum(float(v) ** 2 for v in dense.flat)
    noise = math.fsum((float(a) - float(b)) ** 2 for a, b in zip(dense.flat, other.flat, strict=True))
    assert found.samples == 23
    assert 0 < same < 23
    assert found.agreement == pytest.approx(same / 23)
    assert found.kl == pytest.approx(divergence(dense, other), rel=1e-6)
    assert found.snr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-6)
    assert found.distance == found.kl
    assert found.kl != pytest.approx(divergence(other, dense), rel=1e-2)  # the direction matters


def test_kl_ignores_a_shift_of_the_logits_and_large_logits_do_not_overflow():
    dense = scores(0)
    assert compare([dense], [dense + 7]).kl == pytest.approx(0, abs=1e-6)
    huge = np.array([[5000.0, 0.0]], np.float32)
    assert compare([huge], [np.array([[0.0, 0.0]], np.float32)]).kl == pytest.approx(math.log(2))


def test_softmax_outputs_are_taken_as_probabilities():
    dense, other = scores(0), scores(1)
    p, q = (np.array([softmax(row) for row in logits], np.float32) for logits in (dense, other))
    assert compare([p], [q]).kl == pytest.approx(divergence(dense, other), rel=1e-4)


def test_equal_outputs():
    found = compare([scores(0)], [scores(0)])
    assert (found.agreement, found.snr_db) == (1.0, math.inf)
    assert found.distance == pytest.approx(0, abs=1e-12)
    assert json.loads(json.dumps(plain(found), allow_nan=False))["snr_db"] is None


def test_outputs_that_are_not_classes_have_a_relative_error():
    dense = [scores(0, (4, 3, 5, 5)), scores(1, (4, 2))]
    other = [dense[0] + 0.1, dense[1] * 1.5]
    found = compare(dense, other)
    noise = sum(float(((a.astype(float) - b) ** 2).sum()) for a, b in zip(dense, other, strict=True))
    signal = sum(float((a.astype(float) ** 2).sum()) for a in dense)
    assert (found.kl, found.agreement) == (None, None)
    assert found.distance == pytest.approx(math.sqrt(noise / signal))
    assert compare(dense, dense).distance == 0


def test_argmax_outputs_are_judged_by_the_share_of_equal_values():
    found = compare([np.array([1, 2, 3, 4])], [np.array([1, 2, 0, 4])])
    assert (found.kl, found.snr_db, found.agreement) == (None, None, 0.75)
    assert found.distance == 0.25


@pytest.mark.parametrize("shape", [(4, 10), (4, 3, 2, 2)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_value_that_is_not_finite_is_infinitely_far(shape, bad):
    other = scores(0, shape)
    other.flat[3] = bad
    with np.errstate(all="ignore"):
        found = compare([scores(0, shape)], [other])
    assert found.distance == math.inf
    assert found.snr_db == -math.inf


def ending_in(kind):
    """residual_net with class probabilities, a feature map or class numbers as its output, or in float16."""
    model = residual_net()
    if kind == "float16":
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    elif kind == "map":
        model.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="sum1_r"))
    elif kind != "logits":
        model.graph.node.add(op_type=kind, input=["logits"], output=["y"])
        model.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="y"))
    return model


@pytest.mark.parametrize("kind", ["logits", "Softmax", "map", "ArgMax", "float16"])
def test_what_optimisations_change_is_noise(kind):
    """Outputs at two levels of onnxruntime, for the dense model and for pruned ones: no pair of them is told apart."""
    model = ending_in(kind)
    x = images(64, seed=3).astype(np.float16 if kind == "float16" else np.float32)

    def at(level, version):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        return onnxruntime.InferenceSession(version.SerializeToString(), options).run(None, {"x": x})

    levels = onnxruntime.GraphOptimizationLevel
    dense, plainly = at(levels.ORT_ENABLE_ALL, model), at(levels.ORT_DISABLE_ALL, model)
    for noise in (Noise.between(dense, plainly), Noise.between(dense, None)):
        if noise.relative or np.array_equal(dense[0], plainly[0]):
            assert noise.covers(compare(dense, dense))
            assert noise.covers(compare(dense, plainly))
    noise = Noise.between(dense, plainly)
    found = []
    for sparsity in (0.05, 0.3, 0.9):
        version = pruned(model, sparsity)
        first, second = (
            compare(dense, at(level, version)) for level in (levels.ORT_ENABLE_ALL, levels.ORT_DISABLE_ALL)
        )
        assert noise.verdict(first, second) == "equal"
        found.append(first)
    assert noise.verdict(found[2], found[1]) == "closer"
    assert noise.verdict(found[1], found[2]) == "further"
    if kind != "ArgMax":
        assert not noise.covers(found[0])
        assert noise.verdict(found[1], found[0]) == "closer"


def test_infinitely_far_models_are_equal_and_any_other_is_closer():
    noise = Noise.between([scores(0)], None)
    broken, whole = Fidelity(4, kl=math.inf), Fidelity(4, kl=3.0)
    assert noise.verdict(broken, broken) == "equal"
    assert noise.verdict(broken, whole) == "closer"
    assert noise.verdict(whole, broken) == "further"


def test_small_gains_are_more_than_noise():
    """A twentieth of a divergence, or 3% of an output error."""
    noise = Noise.between([scores(0)], None)
    for kl in (1e-7, 1e-4, 1.0):
        assert noise.verdict(Fidelity(4, kl=kl), Fidelity(4, kl=0.95 * kl)) == "closer"
    maps = Noise.between([scores(0, (2, 3, 4, 4))], None)
    for snr in (80.0, 20.0, 0.0):
        assert maps.verdict(Fidelity(4, snr_db=snr), Fidelity(4, snr_db=snr + 0.3)) == "closer"


def test_a_large_gain_counts_though_coarse_steps_flip_between_levels():
    """As where activations are quantized: an error of 20% becomes 8%, and another level moves outputs by 3%."""
    rng = np.random.default_rng(0)
    dense = scores(0, (64, 3, 4, 4))

    def moved(error):
        noise = rng.standard_normal(dense.shape)
        return dense + error * noise * np.linalg.norm(dense) / np.linalg.norm(noise)

    noise = Noise.between([dense], [moved(0.03)])
    pruned_outputs = moved(0.2)
    before, after = compare([dense], [pruned_outputs]), compare([dense], [moved(0.08)])
    assert noise.verdict(before, after) == "closer"
    assert noise.verdict(after, before) == "further"
    assert noise.covers(compare([dense], [moved(0.1)]))
    assert noise.verdict(before, compare([dense], [pruned_outputs + moved(0.03) - dense])) == "equal"


def test_different_shapes_are_refused():
    with pytest.raises(ModelError, match="differ in shape"):
        compare([scores(0)], [scores(0)[:, :9]])


@pytest.mark.parametrize("offset", [0, 1])
def test_top1_and_top5(offset):
    values = scores(0, (200, 11))
    labels = np.random.default_rng(5).integers(0, 10, 200)
    hits = {1: 0, 5: 0}
    for row, label in zip(values, labels, strict=True):
        order = sorted(range(11), key=lambda c: -row[c])
        for k in hits:
            hits[k] += label in [c - offset for c in order[:k]]
    assert accuracy([values], labels, offset) == (pytest.approx(hits[1] / 200), pytest.approx(hits[5] / 200))


def test_top5_needs_more_than_five_classes_and_top1_needs_scores():
    assert accuracy([np.eye(5, dtype=np.float32)], np.array([0, 1, 2, 3, 0])) == (0.8, None)
    for output in (scores(0, (4, 3, 2, 2)), np.array([1, 2, 3]), scores(0, (4, 1))):
        with pytest.raises(ModelError, match="samples, classes"):
            accuracy([output], np.zeros(4, np.int64))


@pytest.mark.parametrize("batch_size", [None, 1, 4, 50])
def test_outputs_are_collected_in_the_order_of_the_indices(batch_size):
    model, x = residual_net(), images(11, seed=3)
    data = TensorDataset([{"x": x}], "the test", input_specs(GraphIndex.of(model)))
    indices = np.array([7, 0, 10, 3, 5, 9, 1])
    (found,) = collect_outputs(model, data, indices, Runtime(threads=1), batch_size)
    np.testing.assert_allclose(found, run(model, {"x": x[indices]})["logits"], rtol=1e-4, atol=1e-5)


def test_a_fixed_batch_drops_an_incomplete_last_batch():
    model = net("g (float[4,3] x) => (float[4,3] y) { y = Relu (x) }")
    x = scores(0, (11, 3))
    data = TensorDataset([{"x": x}], "the test", input_specs(GraphIndex.of(model)))
    (found,) = collect_outputs(model, data, np.arange(11), Runtime(threads=1))
    np.testing.assert_array_equal(found, np.maximum(x[:8], 0))
    with pytest.raises(DataError, match="do not fill"):
        collect_outputs(model, data, np.arange(3), Runtime(threads=1))


def test_a_sample_with_nan_among_its_scores_has_no_class():
    scores = np.tile(np.arange(6, dtype=np.float32), (4, 1))
    scores[:2, 0] = np.nan
    labels = np.array([0, 5, 5, 0])
    assert accuracy([scores], labels) == (0.25, 0.25)


@pytest.mark.parametrize("end", ["y = Log (g)", "y = Sqrt (g)", "l = Log (g) y = Unsqueeze (l, axes)"])
def test_a_dense_model_that_puts_out_nan_is_named_as_such(end):
    axes = {"axes": np.array([2])} if "axes" in end else {}
    model = net(f"g (float[N,6] x) => (y) {{ g = Gemm (x, w) {end} }}", w=(6, 7), **axes)
    x = np.random.default_rng(0).standard_normal((48, 6)).astype(np.float32)
    words = r"\d\d\.\d% of what the dense model itself puts out on these samples is NaN or infinite"
    with pytest.raises(ModelError, match=words):
        onnx_asr.evaluate(pruned(model, 0.5), x, dense=model)
    with pytest.raises(ModelError, match=words):
        onnx_asr.sensitivity(model, x)


def test_an_infinite_mask_beside_class_scores_leaves_them_comparable():
    model = net("g (float[N,6] x) => (y, z) { y = Gemm (x, w) p = Relu (x) z = Log (p) }", w=(6, 7))
    x = np.random.default_rng(0).standard_normal((48, 6)).astype(np.float32)
    found = onnx_asr.evaluate(pruned(model, 0.5), x, dense=model)
    assert found.kl > 0
    assert found.snr_db == -math.inf


def test_distance_needs_a_dense_model():
    with pytest.raises(AssertionError, match="needs a dense model"):
        _ = Fidelity(3, top1=0.5).distance
