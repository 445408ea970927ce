"""Numbers at their limits: every method either writes finite weights or refuses, and it is pinned which."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_asr.errors import ModelError
from onnx_asr.graph.index import FLOAT_TYPES
from onnx_asr.measuring.inspection import inspect
from onnx_asr.pruning.channels import prune_channels
from onnx_asr.pruning.compression import CompressOptions, compress
from onnx_asr.pruning.options import DATA_AWARE, ChannelPruneOptions, PruneOptions, Score
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import METHODS, Method, RepairOptions
from onnx_asr.repairing.pipeline import repair
from tests.graphs import (
    bn,
    copy,
    dense_net,
    folded,
    images,
    net,
    parameter,
    positions,
    pruned,
    residual_net,
    set_parameter,
)

Case = Callable[[onnx.ModelProto], np.ndarray]
Make = Callable[[], onnx.ModelProto]
Change = Callable[[onnx.ModelProto], onnx.ModelProto]
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


ACTIVATIONS = r"activations at \w+:\w+ are infinite, NaN or beyond"
VALUES = r"the new value of input \d of node \w+:\w+ is not finite as float"
BY_MOMENTS = [method for method in METHODS if method != "refit"]
"""Methods that need the variance of every channel; `refit` needs products of inputs."""
OVERFLOWING = ("activations_overflow", "variances_overflow", "huge_inputs")

REFUSED: dict[tuple[str, str], str] = {
    **dict.fromkeys(itertools.product(OVERFLOWING, BY_MOMENTS), ACTIVATIONS),
    ("huge_inputs", "refit"): ACTIVATIONS,
}
"""(Case, method) of the float32 repairs that are refused, and the words; all others succeed."""
REFUSED_HALF = {
    **REFUSED,
    **dict.fromkeys(itertools.product(["loud_channels"], BY_MOMENTS), ACTIVATIONS),
    ("faint_channels", "auto"): VALUES,
    ("faint_channels", "refit"): VALUES,
}
"""The same for float16."""


def refused_from_data(case: Case, change: Change) -> str | None:
    """The words with which `compress`, and `prune` by a score from data, refuse a case; None where they succeed."""
    loud = change is half and case is loud_channels
    return ACTIVATIONS if loud or case.__name__ in OVERFLOWING else None


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


def changed(model: onnx.ModelProto, case: Case, change: Change) -> tuple[onnx.ModelProto, np.ndarray]:
    """A case in another form of the network, and its samples in the type that this takes."""
    x = case(model)
    model = change(model)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    with np.errstate(over="ignore"):
        return model, np.clip(x, -65504, 65504).astype(dtype) if dtype == np.float16 else x


def judge(work: Callable[[], onnx.ModelProto], refusal: str | None) -> None:
    """A finite model, or a ModelError with these words."""
    if refusal is None:
        check(work())
    else:
        with pytest.raises(ModelError, match=refusal):
            work()


def attempt(
    method: Method, damaged: onnx.ModelProto, dense: onnx.ModelProto | None, x: np.ndarray, refusal: str | None
) -> None:
    options = RepairOptions(method, samples=max(1, len(x) - 4), verify_samples=4)
    judge(lambda: repair(damaged, x, options, dense=dense).model, refusal)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("net", [residual_net, dense_net])
def test_repairs_write_finite_weights_or_refuse(net: Callable[[], onnx.ModelProto], case: Case, method: Method) -> None:
    dense = net()
    damaged = pruned(dense, 0.5)
    x, refusal = case(damaged), REFUSED.get((case.__name__, method))
    attempt(method, damaged, dense, x, refusal)
    if method in ("auto", "paired", "bn"):
        attempt(method, damaged, None, x, refusal)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_float16_repairs_write_finite_weights_or_refuse(case: Case, method: Method) -> None:
    dense = residual_net()
    damaged = pruned(dense, 0.5)
    with np.errstate(over="ignore"):
        x = np.clip(case(damaged), -65504, 65504).astype(np.float16)
    attempt(method, half(damaged), half(dense), x, REFUSED_HALF.get((case.__name__, method)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("change", [copy, folded, half])
@pytest.mark.parametrize("net", [residual_net, dense_net])
def test_compress_writes_finite_weights_or_refuses(net: Make, change: Change, case: Case) -> None:
    model, x = changed(net(), case, change)
    options = RepairOptions(samples=max(1, len(x) - 4), verify_samples=4)
    judge(
        lambda: compress(model, x, CompressOptions(0.5, rounds=2, repair=options)).model,
        refused_from_data(case, change),
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("score", DATA_AWARE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("change", [copy, half])
def test_scores_from_data_give_finite_weights_or_refuse(change: Change, case: Case, score: Score) -> None:
    model, x = changed(residual_net(), case, change)
    judge(
        lambda: prune(model, x, PruneOptions(0.5, score=score, samples=len(x))).model, refused_from_data(case, change)
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_repairs_after_channel_pruning_write_finite_weights_or_refuse(case: Case, method: Method) -> None:
    dense = residual_net()
    damaged = prune_channels(dense, ChannelPruneOptions(0.5)).model
    attempt(method, damaged, dense, case(damaged), REFUSED.get((case.__name__, method)))


# --- what is not finite to begin with ---


def poisoned(value: float, slot: int = 1, operator: str = "Conv") -> onnx.ModelProto:
    """A net with one value of one parameter replaced."""
    model = residual_net()
    node = positions(model, operator)[1]
    values = parameter(model, node, slot).copy()
    values.flat[1] = value
    set_parameter(model, node, slot, values)
    return model


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("operator", "slot"), [("Conv", 1), *(("BatchNormalization", slot) for slot in (1, 2, 3, 4))])
def test_parameters_that_are_not_finite_are_refused(operator: str, slot: int, value: float) -> None:
    sound, model, x = residual_net(), poisoned(value, slot, operator), images(COUNT, seed=3)
    few = RepairOptions("paired", samples=8, verify_samples=4)
    attempts: tuple[Callable[[], object], ...] = (
        lambda: repair(model, x, few, dense=sound),
        lambda: repair(sound, x, few, dense=model),
        lambda: repair(model, x, few),
        lambda: compress(model, x, CompressOptions(0.5, rounds=2, repair=few)),
        lambda: prune(model, x, PruneOptions(0.5, score="variance", samples=8)),
    )
    for refused in attempts:
        with pytest.raises(ModelError, match="NaN or infinite"):
            refused()


NEGATIVE_VARIANCE: dict[Method, tuple[str | None, ...]] = {
    "auto": (VALUES, VALUES, VALUES, None),
    "refit": (ACTIVATIONS, VALUES, ACTIVATIONS),
    "paired": (VALUES, None, VALUES, VALUES),
    "asr": (ACTIVATIONS,) * 3,
    "layerwise": (ACTIVATIONS,) * 3,
    "raw": (ACTIVATIONS,) * 3,
    "bn": (None,) * 4,
}
"""By method, how it takes a negative variance in the dense model, in the pruned one, in both, in the only one."""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [-1.0, 0.0, 1e-38, 3e38])
def test_impossible_variances_give_finite_weights_or_are_refused(value: float, method: Method) -> None:
    sound, model, x = residual_net(), poisoned(value, 4, "BatchNormalization"), images(COUNT, seed=3)
    pairs: list[tuple[onnx.ModelProto | None, onnx.ModelProto]] = [(model, sound), (sound, model), (model, model)]
    if method in ("auto", "paired", "bn"):
        pairs.append((None, model))
    refusals = NEGATIVE_VARIANCE[method] if value < 0 else (None,) * len(pairs)
    for (dense, damaged), refusal in zip(pairs, refusals, strict=True):
        attempt(method, pruned(damaged, 0.5), dense, x, refusal)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("broken", ["dense", "pruned", "both"])
def test_overflowing_activations_are_refused_and_not_measured_as_damage(broken: str) -> None:
    sound, overflowing = residual_net(), residual_net()
    variances_overflow(overflowing)
    dense = sound if broken == "pruned" else overflowing
    damaged = pruned(sound if broken == "dense" else overflowing, 0.5)
    with pytest.raises(ModelError, match="infinite, NaN or beyond"):
        inspect(damaged, dense=dense, data=images(COUNT, seed=3), samples=COUNT)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("operator", ["Sqrt", "Log", "Reciprocal"])
def test_activations_that_are_nan_or_infinite_are_refused(operator: str) -> None:
    text = f"""g (float[N,3,8,8] x) => (float[N,K] y) {{
        a = Conv (x, w)  n = BatchNormalization (a, b_gamma, b_beta, b_mean, b_var)  r = Relu (n)  z = Neg (r)
        q = {operator} (z)  c = Conv (q, v)  p = GlobalAveragePool (c)  y = Flatten (p) }}"""
    dense = net(text, w=(4, 3, 3, 3), v=(4, 4, 3, 3), **bn("b", channels=4))
    damaged, x = pruned(dense, 0.5), images(COUNT, seed=3)
    for method in METHODS:
        attempt(method, damaged, dense, x, None if method == "bn" else ACTIVATIONS)
    for score in DATA_AWARE:
        with pytest.raises(ModelError, match="infinite, NaN"):
            prune(dense, x, PruneOptions(0.5, score=score, samples=8))
    with pytest.raises(ModelError, match="infinite, NaN"):
        repair(damaged, x, RepairOptions("paired", samples=8, verify_samples=4), dense=dense)
