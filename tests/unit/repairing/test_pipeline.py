"""Invariants of the repair methods, judged by full runs of the repaired files in plain onnxruntime."""

from __future__ import annotations

import importlib
import itertools
import tracemalloc
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from onnx_asr.data.datasets import TensorDataset
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import OptionError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.json_values import plain
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.samples import input_specs
from onnx_asr.repairing.options import RefitRecipe, RepairOptions
from onnx_asr.repairing.pipeline import repair
from onnx_asr.repairing.verification import split_samples
from tests.graphs import (
    bn,
    copy,
    dense_net,
    digit_images,
    digits,
    folded,
    images,
    kl,
    masked,
    net,
    parameter,
    per_channel,
    positions,
    pruned,
    recalibrated,
    residual_net,
    run,
    set_parameter,
    vision_transformer,
    weights,
)

samples_module = importlib.import_module("onnx_asr.repairing.verification")

METHODS = ("paired", "refit", "asr", "raw", "layerwise", "bn")
NETS = ("residual", "dense", "digits_resnet", "digits_vgg", "digits_mobilenet", "digits_densenet")
WITH_BN_BEHIND_EVERY_CONV = ("residual", "digits_resnet", "digits_vgg", "digits_mobilenet")
COUNT = 48


@cache
def model_of(name: str) -> onnx.ModelProto:
    if name.startswith("digits_"):
        return digits(name.removeprefix("digits_"))
    return {"residual": residual_net, "dense": dense_net}[name](1)


@cache
def pruned_of(name: str, sparsity: float) -> onnx.ModelProto:
    return pruned(model_of(name), sparsity)


@cache
def data_of(name: str, start: int = 0) -> np.ndarray:
    if name.startswith("digits_"):
        return digit_images()[0][start : start + COUNT]
    return images(start + COUNT, seed=7)[start:]


def feed(model: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    (name,) = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    return {name: x}


def outputs(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return run(model, feed(model, x))[model.graph.output[0].name]


def repaired(
    method: str, model: onnx.ModelProto, dense: onnx.ModelProto | None, x: np.ndarray, **options: Any
) -> onnx.ModelProto:
    """Repaired on all of ``x``."""
    settings = RepairOptions(method=method, samples=len(x), verify_samples=0, **options)
    result = repair(model, x, settings, dense=dense)
    assert result.calibration_samples == len(x)
    onnx.checker.check_model(result.model)
    return result.model


# --- paired ---


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("name", NETS)
def test_paired_with_itself_changes_nothing_whatever_the_images(name: str, power: float) -> None:
    model, x = model_of(name), data_of(name)
    result = repaired("paired", model, model, 0.4 * x + 0.3, reliability_power=power)
    np.testing.assert_allclose(outputs(result, x), outputs(model, x), atol=1e-4)


def corrected_tensors(model: onnx.ModelProto) -> dict[str, int]:
    """Every BatchNormalization output, and outputs of the other layers that no BatchNormalization alone follows."""
    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name for tensor in graph.initializer}
    tensors = {}
    for node in graph.node:
        following = readers.get(node.output[0], [])
        if node.op_type == "BatchNormalization" or (
            node.op_type in ("Conv", "ConvTranspose", "Gemm")
            and [item.op_type for item in following] != ["BatchNormalization"]
        ):
            tensors[node.output[0]] = 1
        if node.op_type == "MatMul":
            (bias,) = following
            assert set(bias.input) & constants
            tensors[bias.output[0]] = -1
    return tensors


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize("name", NETS)
def test_paired_gives_every_repaired_tensor_the_dense_moments(name: str, sparsity: float) -> None:
    model, x = model_of(name), data_of(name)
    damaged = pruned_of(name, sparsity)
    result = repaired("paired", damaged, model, x)
    tensors = corrected_tensors(model)
    wanted, got, was = (run(item, feed(item, x), tensors) for item in (model, result, damaged))
    moved = 0
    for tensor, axis in tensors.items():
        target, actual = per_channel(wanted[tensor], axis), per_channel(got[tensor], axis)
        scale = target.std(axis=1)
        assert (np.abs(actual.mean(axis=1) - target.mean(axis=1)) <= 1e-4 * scale + 1e-5).all(), tensor
        # a filter that is all zeros gives a constant, which no gain can spread
        live = actual.std(axis=1) > 1e-4 * scale
        assert (np.abs(actual.std(axis=1) / scale - 1) <= 2e-4)[live].all(), tensor
        assert live.mean() > 0.2, tensor
        moved += np.abs(per_channel(was[tensor], axis).std(axis=1) / scale - 1).max() > 0.05
    assert moved > len(tensors) // 2


def chain(seed: int = 0, *, with_dead: bool = False) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Three convolutions with biases and no BatchNormalization, dense and pruned."""
    model = net(
        """
        chain (float[N,3,8,8] x) => (float[N,8,8,8] c) {
          a = Conv <pads=[1,1,1,1]> (x, a_w, a_b)
          ar = Relu (a)
          b = Conv <pads=[1,1,1,1]> (ar, b_w, b_b)
          br = Relu (b)
          c = Conv <pads=[1,1,1,1]> (br, c_w, c_b)
        }
        """,
        seed=seed,
        a_w=(8, 3, 3, 3),
        a_b=(8,),
        b_w=(8, 8, 3, 3),
        b_b=(8,),
        c_w=(8, 8, 3, 3),
        c_b=(8,),
    )
    damaged = pruned(model, 0.6)
    if with_dead:
        weight = parameter(damaged, 2, 1).copy()
        weight[:6] = 0.0
        set_parameter(damaged, 2, 1, weight)
    return model, damaged


def gains_by_hand(method: str, dense: np.ndarray, found: np.ndarray, prior: Any) -> np.ndarray:
    v_d, v_p = dense.var(axis=1), found.var(axis=1)
    raw = np.array([np.sqrt(d / p) if p > 1e-12 else 1.0 for d, p in zip(v_d, v_p, strict=True)])
    if method in ("raw", "paired"):
        return raw
    if method == "layerwise":
        return np.full_like(raw, np.sqrt(v_d.mean() / v_p.mean()))
    lam = {"median": np.median(v_p), "mean": v_p.mean()}.get(prior, prior)
    share = v_p / (v_p + lam) if lam > 1e-12 else (v_p > 1e-12).astype(float)
    return share * raw + 1 - share


@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize(
    ("method", "prior"), [("asr", "median"), ("asr", "mean"), ("asr", 0.3), ("raw", "median"), ("layerwise", "median")]
)
def test_gains_are_the_papers(method: str, prior: Any, bias_correction: bool, with_dead: bool) -> None:
    """Algorithm 1 by hand, layer by layer on full runs; with six of eight channels dead, the median is zero."""
    model, damaged = chain(with_dead=with_dead)
    x = images(32, seed=3)
    expected = copy(damaged)
    reference = run(model, {"x": x}, ["a", "b", "c"])
    for position, name in ((2, "b"), (4, "c")):
        dense, found = per_channel(reference[name]), per_channel(run(expected, {"x": x}, [name])[name])
        gain = gains_by_hand(method, dense, found, prior)
        bias = parameter(expected, position, 2).astype(float)
        if bias_correction:
            bias = dense.mean(axis=1) - gain * (found.mean(axis=1) - bias)
        set_parameter(expected, position, 1, parameter(expected, position, 1) * gain[:, None, None, None])
        set_parameter(expected, position, 2, bias)
    result = repaired(method, damaged, model, x, prior=prior, bias_correction=bias_correction)
    for position, slot in itertools.product((0, 2, 4), (1, 2)):
        actual = parameter(result, position, slot)
        np.testing.assert_allclose(actual, parameter(expected, position, slot), rtol=1e-4, atol=1e-5)
    for slot in (1, 2):  # the first layer sees the raw data: the paper leaves it alone
        np.testing.assert_array_equal(parameter(result, 0, slot), parameter(damaged, 0, slot))


@pytest.mark.parametrize("power", [0.0, 0.25, 1.0])
def test_paired_weights_are_matched_moments_times_reliability(power: float) -> None:
    model, damaged = chain(1)
    x = images(32, seed=3)
    expected = copy(damaged)
    reference = run(model, {"x": x}, ["a", "b", "c"])
    for position, name in ((0, "a"), (2, "b"), (4, "c")):
        dense, found = per_channel(reference[name]), per_channel(run(expected, {"x": x}, [name])[name])
        rho = np.array([np.corrcoef(d, p)[0, 1] for d, p in zip(dense, found, strict=True)])
        gain = dense.std(axis=1) / found.std(axis=1) * np.maximum(rho, 0) ** power
        bias = dense.mean(axis=1) - gain * (found.mean(axis=1) - parameter(expected, position, 2))
        set_parameter(expected, position, 1, parameter(expected, position, 1) * gain[:, None, None, None])
        set_parameter(expected, position, 2, bias)
    result = repaired("paired", damaged, model, x, reliability_power=power)
    for position, slot in itertools.product((0, 2, 4), (1, 2)):
        actual = parameter(result, position, slot)
        np.testing.assert_allclose(actual, parameter(expected, position, slot), rtol=1e-4, atol=1e-5)


# --- BatchNormalization re-estimated ---


@pytest.mark.parametrize("name", NETS)
def test_bn_is_a_naive_sequential_recalibration(name: str) -> None:
    damaged, x = pruned_of(name, 0.7), data_of(name)
    expected = outputs(recalibrated(damaged, feed(damaged, x)), x)
    result = repaired("bn", damaged, None, x)
    np.testing.assert_allclose(outputs(result, x), expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected - outputs(damaged, x)).max() > 0.1  # it is not a no-op


@pytest.mark.parametrize("method", ["asr", "raw", "layerwise"])
@pytest.mark.parametrize("name", WITH_BN_BEHIND_EVERY_CONV)
def test_gains_before_an_exact_batchnorm_have_no_effect(name: str, method: str) -> None:
    damaged, x = pruned_of(name, 0.6), data_of(name)
    expected = outputs(repaired("bn", damaged, None, x), x)
    model = repaired(method, damaged, model_of(name), x)
    np.testing.assert_allclose(outputs(model, x), expected, atol=2e-3 * np.abs(expected).max())
    convolutions = positions(damaged, "Conv")
    changed = [not np.array_equal(parameter(model, p, 1), parameter(damaged, p, 1)) for p in convolutions]
    assert changed[0] is False
    assert all(changed[1:])


def small_net() -> onnx.ModelProto:
    return net(
        """
        small (float[N,2,5,5] x) => (float[N,3,1,1] y) {
          a = Conv (x, a_w)
          n = BatchNormalization (a, n_gamma, n_beta, n_mean, n_var)
          r = Relu (n)
          b = Conv (r, b_w)
          m = BatchNormalization (b, m_gamma, m_beta, m_mean, m_var)
          y = GlobalAveragePool (m)
        }
        """,
        a_w=(4, 2, 2, 2),
        b_w=(3, 4, 2, 2),
        **bn("n", channels=4),
        **bn("m", channels=3),
    )


def train_mode_statistics(model: onnx.ModelProto, batches: list[np.ndarray], momentum: float) -> list[np.ndarray]:
    """Running mean and variance of every BatchNormalization after training-mode passes over the batches.

    Within a pass each BatchNormalization normalises with the batch's own statistics, which is what a recalibration on
    that batch alone does.
    """
    spots = positions(model, "BatchNormalization")
    running = [(np.zeros(1), np.ones(1)) for _ in spots]
    for batch in batches:
        passing = recalibrated(model, {"x": batch})
        values = run(passing, {"x": batch}, [model.graph.node[spot].input[0] for spot in spots])
        for number, spot in enumerate(spots):
            tensor = per_channel(values[model.graph.node[spot].input[0]])
            mean, var = running[number]
            running[number] = (
                (1 - momentum) * mean + momentum * tensor.mean(axis=1),
                (1 - momentum) * var + momentum * tensor.var(axis=1, ddof=1),
            )
    return [value for pair in running for value in pair]


def test_ema_is_training_mode() -> None:
    """The seed chooses one of the six ways to divide four samples into two batches."""
    model, x = small_net(), images(4, seed=5, shape=(2, 5, 5))
    result = repaired("bn", model, None, x, bn="ema", ema_batches=2, ema_batch_size=2)
    found = [parameter(result, spot, slot) for spot in positions(model, "BatchNormalization") for slot in (3, 4)]
    errors = []
    for first in itertools.combinations(range(4), 2):
        rest = [number for number in range(4) if number not in first]
        expected = train_mode_statistics(model, [x[list(first)], x[rest]], 0.1)
        errors.append(max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)))
    assert sorted(errors)[0] < 1e-5
    assert sorted(errors)[1] > 1e-3


def test_ema_goes_round_the_samples_and_knows_its_momentum() -> None:
    model, x = small_net(), images(6, seed=5, shape=(2, 5, 5))
    result = repaired("bn", model, None, x, bn="ema", ema_batches=3, ema_batch_size=6, momentum=0.3)
    found = [parameter(result, spot, slot) for spot in positions(model, "BatchNormalization") for slot in (3, 4)]
    for actual, expected in zip(found, train_mode_statistics(model, [x] * 3, 0.3), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_ema_keeps_no_activations_of_layers_that_are_done() -> None:
    """In a DenseNet every layer's activations have a different size, so no buffer would be reused."""
    x = digit_images("calibration")[0][:256]

    def peak(**settings: Any) -> int:
        tracemalloc.start()
        repaired("bn", digits("densenet"), None, x, **settings)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(bn="ema", ema_batches=2, ema_batch_size=128) < 1.5 * peak()


# --- a graph with and without folding ---


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("method", ["paired", "refit"])
@pytest.mark.parametrize("name", WITH_BN_BEHIND_EVERY_CONV)
def test_folded_and_unfolded_repairs_give_the_same_function(name: str, method: str, sparsity: float) -> None:
    model, damaged, x = model_of(name), pruned_of(name, sparsity), data_of(name)
    dense_folded, damaged_folded = folded(model), folded(damaged)
    assert not positions(dense_folded, "BatchNormalization")
    np.testing.assert_allclose(outputs(damaged_folded, x), outputs(damaged, x), atol=1e-4)
    expected = outputs(repaired(method, damaged, model, x), x)
    actual = outputs(repaired(method, damaged_folded, dense_folded, x), x)
    np.testing.assert_allclose(actual, expected, atol=1e-3)


# --- what every method keeps ---


def all_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Weights by the tensor that the layer computes; positions would change when an edit removes Identity nodes."""
    found = weights(model) | {p: parameter(model, p, 1) for p in positions(model, "MatMul")}
    return {model.graph.node[position].output[0]: value for position, value in found.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["residual", "dense", "digits_resnet", "digits_mobilenet"])
def test_zeros_stay_zeros(name: str, method: str) -> None:
    model, x = model_of(name), data_of(name)
    damaged = copy(pruned_of(name, 0.8))
    for position in positions(damaged, "MatMul"):
        value = parameter(damaged, position, 1)
        set_parameter(damaged, position, 1, value * (np.abs(value) > np.median(np.abs(value))))
    for bn_mode in ("exact", "ema") if method == "asr" else ("exact",):
        result = repaired(method, damaged, model, x, bn=bn_mode, ema_batches=2, ema_batch_size=16)
        kept = 0
        results = all_weights(result)
        for tensor, before in all_weights(damaged).items():
            after = results[tensor]
            assert after.shape == before.shape
            assert after.dtype == before.dtype
            assert not after[before == 0].any()
            kept += np.count_nonzero(after)
        assert kept > 0.95 * sum(np.count_nonzero(value) for value in all_weights(damaged).values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["residual", "dense"])
def test_results_do_not_depend_on_the_batch_size(name: str, method: str) -> None:
    model, damaged, x = model_of(name), pruned_of(name, 0.6), data_of(name)
    results = [outputs(repaired(method, damaged, model, x, batch_size=size), x) for size in (48, 16, 5, 1)]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-5 * np.abs(results[0]).max())


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_changed_and_results_repeat(method: str) -> None:
    model, damaged, x = copy(model_of("residual")), copy(pruned_of("residual", 0.7)), data_of("residual").copy()
    before = (model.SerializeToString(), damaged.SerializeToString(), x.tobytes())
    first, second = (repaired(method, damaged, model, x) for _ in range(2))
    assert (model.SerializeToString(), damaged.SerializeToString(), x.tobytes()) == before
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


@pytest.mark.parametrize("method", ["paired", "refit"])
@pytest.mark.parametrize("name", NETS)
def test_repairs_bring_images_never_seen_closer_to_the_dense_net(name: str, method: str) -> None:
    model, damaged = model_of(name), pruned_of(name, 0.6)
    x = data_of(name)
    fresh = images(64, seed=99) if not name.startswith("digits_") else digit_images("validation")[0][:64]
    reference = outputs(model, fresh)
    errors = [
        np.square(outputs(item, fresh) - reference).mean() for item in (damaged, repaired(method, damaged, model, x))
    ]
    assert errors[1] < 0.6 * errors[0]


# --- without a dense model ---


@pytest.mark.parametrize("name", NETS)
def test_without_a_dense_model_paired_is_bn(name: str) -> None:
    damaged, x = pruned_of(name, 0.6), data_of(name)
    expected = outputs(repaired("bn", damaged, None, x), x)
    actual = outputs(repaired("paired", damaged, None, x), x)
    np.testing.assert_allclose(actual, expected, atol=2e-3 * np.abs(expected).max())


def test_without_a_dense_model_nothing_is_verified_and_auto_is_bn() -> None:
    damaged, x = pruned_of("residual", 0.6), data_of("residual")
    result = repair(damaged, x, RepairOptions(samples=len(x)))
    assert result.options.method == "bn"
    assert result.verification is None
    assert result.improved
    assert any("not verified" in note for note in result.notes)
    expected = outputs(repaired("bn", damaged, None, x), x)
    np.testing.assert_array_equal(outputs(result.model, x), expected)


def test_gains_without_a_dense_model_come_from_the_stored_statistics() -> None:
    """``raw`` with bias correction and no stale running statistics: the tensor gets the stored moments."""
    damaged, x = pruned_of("residual", 0.5), data_of("residual")
    result = repaired("raw", damaged, None, x, bn="exact")
    for position in positions(damaged, "BatchNormalization")[1:]:
        node = damaged.graph.node[position]
        values = per_channel(run(result, {"x": x}, [node.input[0]])[node.input[0]])
        stored = parameter(damaged, position, 4)
        assert np.median(np.abs(values.var(axis=1) / stored - 1)) < 0.6


@pytest.mark.parametrize(
    ("method", "with_dense", "fold", "words"),
    [
        ("bn", True, True, "folded"),
        ("paired", False, True, "give the dense model"),
        ("asr", False, True, "give the dense model"),
        ("refit", False, False, "dense"),
    ],
)
def test_methods_that_can_do_nothing_are_refused(method: str, with_dense: bool, fold: bool, words: str) -> None:
    model, damaged = model_of("residual"), pruned_of("residual", 0.5)
    if fold:
        model, damaged = folded(model), folded(damaged)
    with pytest.raises(OptionError, match=words):
        repaired(method, damaged, model if with_dense else None, data_of("residual"))


# --- verification and auto ---


class Spy:
    """Records which samples were used for what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calibrated: set[int] = set()
        self.measured: list[list[int]] = []
        load, collect = samples_module.load_calibration, samples_module.collect_outputs

        def spy_load(data: Any, indices: Any, *args: Any, **kwargs: Any) -> Any:
            self.calibrated |= {int(i) for i in indices}
            return load(data, indices, *args, **kwargs)

        def spy_collect(model: Any, data: Any, indices: Any, *args: Any, **kwargs: Any) -> Any:
            self.measured.append([int(i) for i in indices])
            return collect(model, data, indices, *args, **kwargs)

        monkeypatch.setattr(samples_module, "load_calibration", spy_load)
        monkeypatch.setattr(samples_module, "collect_outputs", spy_collect)


def one_step_up(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which one weight is the next larger float32."""
    changed = copy(model)
    tensor = next(tensor for tensor in changed.graph.initializer if len(tensor.dims) == 4)
    value = numpy_helper.to_array(tensor).copy()
    value.flat[3] = np.nextafter(value.flat[3], np.float32(np.inf))
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return changed


@pytest.mark.parametrize("method", ["auto", "bn", "paired"])
@pytest.mark.parametrize("change", [copy, one_step_up])
@pytest.mark.parametrize("name", NETS)
def test_a_model_that_is_the_dense_one_but_for_rounding_comes_back(name: str, change: Any, method: Any) -> None:
    model = change(model_of(name))
    result = repair(model, data_of(name), RepairOptions(method, samples=32, verify_samples=16), dense=model_of(name))
    check = result.verification
    assert check is not None
    assert (result.improved, result.modified, check.verdict, result.chosen) == (True, False, "equal", None)
    assert check.before == check.after
    assert result.model == model
    assert result.points == ()
    assert "nothing to repair" in result.notes[-1]


def test_auto_gives_back_what_it_cannot_improve() -> None:
    """A net that lost little, and too few samples to correct it from."""
    model = vision_transformer(depth=1)
    damaged, options = pruned(model, 0.01), RepairOptions(samples=2, verify_samples=32)
    x = np.random.default_rng(0).standard_normal((34, 3, 32, 32)).astype(np.float32)
    result = repair(damaged, x, options, dense=model)
    check = result.verification
    assert check is not None
    assert min(item.fidelity.distance for item in result.candidates) > check.before.distance
    assert (result.improved, result.modified, check.verdict, result.chosen) == (False, False, "further", None)
    assert check.before == check.after
    assert result.model == damaged
    assert result.points == ()
    assert "nothing tried came closer" in result.notes[-1]


def test_outputs_that_are_not_finite_cannot_be_compared() -> None:
    model = net("g (float[N,4] x) => (float[N,3] y) { a = Gemm (x, w)  y = Log (a) }", w=(4, 3))  # of negative numbers
    x = np.random.default_rng(0).standard_normal((48, 4)).astype(np.float32)
    damaged = pruned(model, 0.3)
    result = repair(damaged, x, RepairOptions("paired", samples=32, verify_samples=16), dense=model)
    assert result.verification is not None
    assert (result.verification.verdict, result.modified) == ("equal", False)
    assert "the dense model puts out NaN or infinities" in result.notes[-1]


def test_the_gap_to_the_samples_that_a_refit_has_seen_is_told() -> None:
    dense, x = digits("resnet"), digit_images()[0]
    damaged = pruned(dense, 0.95)
    notes = {}
    for count in (16, 384):
        options = RepairOptions("refit", samples=count, verify_samples=128)
        result = repair(damaged, x, options, dense=dense)
        check = result.verification
        assert check is not None
        assert check.fitted is not None
        seen, _ = split_samples(len(x), options, verify=True)
        reference = outputs(dense, x[seen[:64]])
        assert check.fitted.kl == pytest.approx(kl(reference, outputs(result.model, x[seen[:64]])), rel=1e-3)
        notes[count] = [note for note in result.notes if note.startswith("more calibration samples would help")]
    assert notes[16]
    assert not notes[384]
    paired = repair(damaged, x, RepairOptions("paired", samples=64), dense=dense).verification
    assert paired is not None
    assert paired.fitted is None


def test_small_improvements_count() -> None:
    """At sparsity 1% there is little to repair, but it is more than rounding."""
    model, damaged = model_of("digits_resnet"), pruned_of("digits_resnet", 0.01)
    result = repair(damaged, data_of("digits_resnet"), RepairOptions(samples=32, verify_samples=16), dense=model)
    assert result.verification is not None
    assert result.verification.verdict == "closer"
    assert result.verification.before.distance < 1e-7
    assert result.verification.after.distance < result.verification.before.distance / 2


def test_exchanged_models_are_refused() -> None:
    model, damaged, x = model_of("residual"), pruned_of("residual", 0.5), data_of("residual")
    options = RepairOptions("paired", samples=32, verify_samples=16)
    with pytest.raises(OptionError, match=r"5\d\.\d% of the dense model's weights are zero, .* exchanged\?"):
        repair(model, x, options, dense=damaged)
    assert repair(model, x, options, dense=damaged, force=True).modified
    few = copy(model)
    value = parameter(few, 0, 1).copy()
    value.flat[:5] = 0  # of 1,500
    set_parameter(few, 0, 1, value)
    assert repair(model, x, options, dense=few).verification is not None


@pytest.mark.parametrize(("name", "sparsity"), [("residual", 0.4), ("digits_resnet", 0.8), ("digits_vgg", 0.5)])
def test_auto_takes_the_smallest_divergence_on_samples_it_did_not_calibrate_on(
    name: str, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    model, damaged = model_of(name), pruned_of(name, sparsity)
    x = images(160, seed=8) if name == "residual" else digit_images()[0][:160]
    common = {"samples": 32, "verify_samples": 64}
    result = repair(damaged, x, RepairOptions(**common), dense=model)
    held_out = spy.measured[0]
    others = [indices for indices in spy.measured if indices != held_out]
    assert all(spy.calibrated.issuperset(indices) for indices in others)  # of the refit, once it is chosen
    assert (len(spy.calibrated), len(set(held_out))) == (32, 64)
    assert spy.calibrated.isdisjoint(held_out)
    assert {item.options.method for item in result.candidates} == {"paired", "bn", "refit"}
    reference = outputs(model, x[held_out])
    divergences = []
    for item in result.candidates:
        alone = repair(damaged, x, item.options, dense=model).model
        divergences.append(kl(reference, outputs(alone, x[held_out])))
        np.testing.assert_allclose(item.fidelity.kl, divergences[-1], rtol=1e-4, atol=1e-7)
    assert result.options == result.candidates[int(np.argmin(divergences))].options
    assert result.verification is not None
    assert result.verification.held_out
    np.testing.assert_allclose(result.verification.after.kl, min(divergences), rtol=1e-4, atol=1e-7)
    before = kl(reference, outputs(damaged, x[held_out]))
    np.testing.assert_allclose(result.verification.before.kl, before, rtol=1e-4)
    assert result.improved


def test_a_time_budget_skips_candidates() -> None:
    model, damaged = model_of("residual"), pruned_of("residual", 0.5)
    options = RepairOptions(samples=64, verify_samples=32, time_budget=0.0)
    result = repair(damaged, images(96, seed=8), options, dense=model)
    assert [item.method for item in result.candidates] == ["paired", "paired (rho^0.25)", "bn"]
    assert any("time budget" in note for note in result.notes)


@pytest.mark.parametrize("method", ["bn", "asr"])
def test_a_result_that_is_not_better_says_so(method: str) -> None:
    """A network that hardly needs a repair gets worse when its statistics are replaced."""
    model = model_of("digits_resnet")
    x = digit_images()[0][:96]
    options = RepairOptions(method=method, samples=32, verify_samples=64)
    result = repair(pruned(model, 0.02), x, options, dense=model)
    assert result.verification is not None
    assert result.verification.before.kl == pytest.approx(0.0, abs=1e-7)
    assert result.verification.after.kl > 1e-6
    assert not result.improved
    assert plain(result)["improved"] is False


@given(count=st.integers(1, 60), samples=st.integers(1, 40), verify=st.integers(0, 40), seed=st.integers(0, 5))
def test_samples_are_divided_without_overlap(count: int, samples: int, verify: int, seed: int) -> None:
    options = RepairOptions(samples=samples, verify_samples=verify, seed=seed)
    chosen, held_out = split_samples(count, options, verify=True)
    assert len(set(chosen)) == len(chosen) <= samples
    assert len(set(held_out)) == len(held_out) <= max(verify, samples)
    assert {*chosen, *held_out} <= set(range(count))
    assert len(chosen) > 0
    if count >= samples + verify:
        assert (len(chosen), len(held_out)) == (samples, verify)
    overlap = set(chosen) & set(held_out)
    assert not overlap or count < 5
    assert split_samples(count, options, verify=False)[1].size == 0


@pytest.mark.parametrize(
    ("count", "batch", "sizes"),
    [(60, 1, (48, 12)), (60, 20, (40, 20)), (80, 40, (40, 40)), (79, 40, (79, 79)), (600, 64, (480, 120))],
)
def test_a_fixed_batch_is_held_out_where_there_are_two(count: int, batch: int, sizes: tuple[int, int]) -> None:
    chosen, held_out = split_samples(count, RepairOptions(samples=512), verify=True, batch=batch)
    assert (len(chosen), len(held_out)) == sizes


def test_samples_of_a_dataset_and_of_an_array_are_the_same() -> None:
    model, damaged, x = model_of("residual"), pruned_of("residual", 0.5), data_of("residual")
    dataset = TensorDataset([{"x": x}], "the data", input_specs(GraphIndex.of(damaged)), None)
    options = RepairOptions(method="paired", samples=32, verify_samples=16)
    models = [repair(damaged, data, options, dense=model).model for data in (x, dataset)]
    assert models[0].SerializeToString(deterministic=True) == models[1].SerializeToString(deterministic=True)


# --- refit ---


def error_of(result: onnx.ModelProto, model: onnx.ModelProto, x: np.ndarray, tensor: str) -> float:
    wanted, got = (run(item, {"x": x}, [tensor])[tensor] for item in (model, result))
    return float(np.square(got - wanted).mean())


@pytest.mark.parametrize("off", [{"block_targets": False}, {"relu_steps": 0}], ids=lambda off: next(iter(off)))
def test_parts_of_the_recipe_lower_the_error_of_the_block(off: dict[str, Any]) -> None:
    """Behind the ReLU after the residual Add, on the calibration samples."""
    totals = np.zeros(2)
    for seed in range(3):
        model, x = residual_net(seed), images(96, seed=11)
        damaged = pruned(model, 0.6)
        recipes = (RefitRecipe(gain_power=0.0, **off), RefitRecipe(gain_power=0.0))
        errors = [
            error_of(repaired("refit", damaged, model, x, refit=recipe), model, x, "sum1_r") for recipe in recipes
        ]
        assert errors[1] < errors[0]
        totals += errors
    assert totals[1] < 0.98 * totals[0]


def test_the_classifier_can_be_left_alone() -> None:
    model, damaged, x = model_of("residual"), pruned_of("residual", 0.6), data_of("residual")
    (classifier,) = positions(model, "Gemm")
    result = repair(
        damaged,
        x,
        RepairOptions(method="refit", samples=len(x), verify_samples=0, refit=RefitRecipe(classifier=False)),
        dense=model,
    )
    np.testing.assert_array_equal(parameter(result.model, classifier, 1), parameter(damaged, classifier, 1))
    assert any(skip.node == classifier for skip in result.skips)


@pytest.mark.parametrize("method", METHODS)
def test_a_filter_pruned_away_harms_nothing(method: str) -> None:
    """A dead channel, a layer with more than half of its channels dead, an empty classifier row."""
    model, x = model_of("residual"), data_of("residual")
    masks = {p: np.ones(value.shape, bool) for p, value in weights(model).items()}
    spots = positions(model, "Conv")
    masks[spots[1]][:6] = False
    masks[spots[3]][:, 2] = False
    masks[positions(model, "Gemm")[0]][3] = False
    damaged = masked(model, masks)
    values = outputs(repaired(method, damaged, model, x), x)
    assert np.isfinite(values).all()
    if method == "refit":  # the steps on the classes' probabilities give up the means of the logits
        values = outputs(repaired(method, damaged, model, x, refit=RefitRecipe(class_steps=0)), x)
    if method in ("paired", "refit"):
        np.testing.assert_allclose(values.mean(axis=0), outputs(model, x).mean(axis=0), atol=1e-3)
        np.testing.assert_allclose(values[:, 3], outputs(model, x)[:, 3].mean(), atol=1e-3)


def test_half_precision_models_stay_half_precision() -> None:
    model = copy(model_of("residual"))
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del model.graph.value_info[:]
    damaged = pruned(model, 0.5)
    x = data_of("residual").astype(np.float16)
    for method in ("paired", "refit"):
        result = repaired(method, damaged, model, x)
        for position in positions(result, "Conv"):
            assert parameter(result, position, 1).dtype == np.float16
        reference = outputs(model, x).astype(float)
        errors = [np.square(outputs(item, x).astype(float) - reference).mean() for item in (damaged, result)]
        assert errors[1] < 0.5 * errors[0]


OTHERS = [name for name in onnxruntime.get_available_providers() if name != "CPUExecutionProvider"]


@pytest.mark.skipif(not OTHERS, reason="this onnxruntime has the CPU only")
@pytest.mark.parametrize("method", METHODS)
def test_another_provider_gives_the_same_repair(method: str) -> None:
    model, x = model_of("residual"), data_of("residual")
    damaged, options = pruned_of("residual", 0.5), RepairOptions(method, samples=COUNT, verify_samples=0)
    values = []
    for providers in (("CPUExecutionProvider",), (OTHERS[0], "CPUExecutionProvider")):
        execution = Execution(Runtime(providers, threads=1))
        values.append(outputs(repair(damaged, x, options, dense=model, execution=execution).model, x))
    np.testing.assert_allclose(values[1], values[0], atol=1e-3 * np.abs(values[0]).max())
    assert np.abs(values[0] - outputs(damaged, x)).max() > 1e-2
