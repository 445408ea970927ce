"""`refit` against numpy.linalg.lstsq on patch matrices built with plain loops."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
import onnx_asr.numerics.refit as refit_numerics
import onnx_asr.repairing.rows as refit_samples
from onnx_asr.data import sample_indices
from onnx_asr.networks import walk
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.fidelity import compare
from onnx_asr.numerics.patches import sample_positions
from onnx_asr.numerics.refit import LayerRefit
from onnx_asr.numerics.rows import Resources, SolverLimits
from onnx_asr.pruning.options import PruneOptions
from onnx_asr.repairing.options import RefitRecipe, RepairOptions
from onnx_asr.repairing.pipeline import repair
from onnx_asr.repairing.rows import RowSampler
from tests.graphs import bn, copy, images, net, parameter, positions, residual_net, run, set_parameter

PLAIN = RefitRecipe(rows=10**9, ridge=0.0, relu_steps=0, gain_power=0.0, block_targets=False, class_steps=0)


@pytest.fixture
def _no_ridge_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit_samples, "FEW_ROWS", 0)


def refitted(
    damaged: onnx.ModelProto, dense: onnx.ModelProto, x: np.ndarray, recipe: RefitRecipe = PLAIN
) -> onnx.ModelProto:
    options = RepairOptions(method="refit", samples=len(x), verify_samples=0, refit=recipe)
    result = repair(damaged, x, options, dense=dense).model
    onnx.checker.check_model(result)
    return result


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def columns_by_probing(model: onnx.ModelProto, position: int, x: np.ndarray) -> np.ndarray:
    """[rows, C_out, weights]: derivative of the layer's output in every weight, by running the layer.

    A layer is linear in its weight, so a weight with a single 1 gives one column of the design matrix, without any
    formula for strides, pads or groups.
    """
    weight = parameter(model, position, 1)
    node = model.graph.node[position]
    probe = copy(model)
    if len(node.input) > 2:
        set_parameter(probe, position, 2, np.zeros_like(parameter(model, position, 2)))
    columns = []
    for place in np.ndindex(weight.shape):
        single = np.zeros_like(weight)
        single[place] = 1.0
        set_parameter(probe, position, 1, single)
        output = run(probe, {"x": x}, [node.output[0]])[node.output[0]]
        columns.append(rows_of(output))
    return np.stack(columns, axis=-1)


def test_a_point_is_let_go_of_before_the_next_one_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    start, seen, alive = RowSampler.refit, list[weakref.ref[RowSampler]](), list[int]()

    def counted(self: RowSampler, draft: Draft) -> LayerRefit:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(self))
        return start(self, draft)

    monkeypatch.setattr(RowSampler, "refit", counted)
    dense = residual_net()
    refitted(dense, dense, images(16, seed=1), RefitRecipe())
    assert len(alive) > 3
    assert max(alive) == 0


def test_a_solver_that_stops_at_its_limit_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "Resources", partial(Resources, limits=SolverLimits(cg_steps=1)))
    monkeypatch.setattr(refit_numerics, "factors_are_cheaper", lambda *_: False)
    dense, x = residual_net(), images(16, seed=1)
    damaged = onnx_asr.prune(dense, options=PruneOptions(0.5)).model
    result = repair(damaged, x, RepairOptions(method="refit", samples=16, verify_samples=0), dense=dense)
    stopped = [point.name for point in result.points if not point.converged]
    assert stopped
    (note,) = [note for note in result.notes if "limit of steps" in note]
    assert f"in {len(stopped)} of {len(result.points)} layers: {stopped[0]}" in note


def rows_of(output: np.ndarray, axis: int = 1) -> np.ndarray:
    return np.moveaxis(output, axis, -1).reshape(-1, output.shape[axis])


def least_squares(design: np.ndarray, target: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights on the support, and bias; the system must be well posed."""
    matrix = np.column_stack([design[:, kept], np.ones(len(design))]).astype(np.float64)
    solution, _, rank, singular = np.linalg.lstsq(matrix, target.astype(np.float64), rcond=None)
    assert rank == matrix.shape[1]
    assert singular[0] / singular[-1] < 300
    return solution[:-1], float(solution[-1])


def naive_conv_patches(x: np.ndarray, node: onnx.NodeProto, weight: np.ndarray, out: tuple[int, ...]) -> np.ndarray:
    """[N, *out, C_in / group * taps] of group 0 by plain loops, for explicit pads."""
    options = attributes(node)
    axes = x.ndim - 2
    strides, dilations = options.get("strides", [1] * axes), options.get("dilations", [1] * axes)
    pads = options.get("pads", [0] * (2 * axes))[:axes]
    channels = weight.shape[1]
    taps = list(np.ndindex(weight.shape[2:]))
    result = np.zeros((len(x), *out, channels, len(taps)))
    for place in np.ndindex(out):
        for number, tap in enumerate(taps):
            source = tuple(strides[a] * place[a] + dilations[a] * tap[a] - pads[a] for a in range(axes))
            if all(0 <= source[a] < x.shape[2 + a] for a in range(axes)):
                result[(slice(None), *place, slice(None), number)] = x[(slice(None), slice(0, channels), *source)]
    return result.reshape(-1, channels * len(taps))


CONV = "g (float[N,{c}{dims}] x) => (float y) {{ y = {op} <{attributes}> (x, w{bias}) }}"

# operator and attributes, channels, spatial input shape, weight shape, bias
LAYERS: dict[str, tuple[str, str, int, tuple[int, ...], tuple[int, ...], bool]] = {
    "1d": ("Conv", "strides=[2], pads=[1,1]", 3, (9,), (4, 3, 3), False),
    "2d": ("Conv", "pads=[1,1,1,1]", 3, (6, 5), (4, 3, 3, 3), True),
    "2d strides, uneven pads": ("Conv", "strides=[2,1], pads=[0,1,2,0]", 2, (7, 6), (3, 2, 3, 2), True),
    "2d dilated": ("Conv", "dilations=[2,1], pads=[2,1,2,1]", 2, (7, 6), (3, 2, 3, 3), False),
    "3d": ("Conv", "strides=[1,2,1], pads=[1,0,1,1,0,1]", 2, (3, 4, 3), (3, 2, 2, 2, 2), True),
    "groups": ("Conv", "group=2, pads=[1,1,1,1]", 4, (6, 6), (6, 2, 3, 3), True),
    "depthwise": ("Conv", "group=4, pads=[1,1,1,1], strides=[2,2]", 4, (8, 8), (4, 1, 3, 3), False),
    "depth multiplier": ("Conv", "group=3", 3, (6, 6), (6, 1, 3, 3), True),
    "same upper": ("Conv", 'auto_pad="SAME_UPPER", strides=[2,2]', 2, (6, 7), (3, 2, 3, 2), True),
    "same lower": ("Conv", 'auto_pad="SAME_LOWER", strides=[2,2]', 2, (6, 7), (3, 2, 3, 2), True),
    "same, no stride": ("Conv", 'auto_pad="SAME_UPPER"', 2, (6, 7), (3, 2, 2, 4), False),
    "valid": ("Conv", 'auto_pad="VALID", strides=[2,1]', 2, (6, 7), (3, 2, 3, 2), False),
    "transposed": ("ConvTranspose", "strides=[2,2]", 3, (4, 5), (3, 4, 2, 2), True),
    "transposed overlapping": ("ConvTranspose", "strides=[2,1], pads=[1,0,0,1]", 3, (4, 5), (3, 2, 3, 3), False),
    "transposed groups": ("ConvTranspose", "group=2, strides=[2,2]", 4, (4, 4), (4, 3, 3, 3), True),
    "transposed output padding": (
        "ConvTranspose",
        "strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]",
        3,
        (4, 5),
        (3, 2, 3, 3),
        True,
    ),
    "transposed dilated 1d": ("ConvTranspose", "strides=[3], dilations=[2]", 2, (6,), (2, 3, 3), True),
    "transposed same upper": ("ConvTranspose", 'auto_pad="SAME_UPPER", strides=[2,2]', 2, (4, 5), (2, 3, 3, 3), True),
    "transposed same lower": ("ConvTranspose", 'auto_pad="SAME_LOWER", strides=[2,2]', 2, (4, 5), (2, 3, 3, 3), True),
    "transposed odd output shape": (
        "ConvTranspose",
        "output_shape=[8,10], strides=[2,2]",
        2,
        (4, 5),
        (2, 3, 3, 3),
        True,
    ),
    "transposed output shape": ("ConvTranspose", "output_shape=[7,9], strides=[2,2]", 2, (4, 5), (2, 3, 3, 3), True),
}


def layer(name: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """One layer; the pruned one misses half of its weights."""
    op, options, channels, spatial, shape, has_bias = LAYERS[name]
    dims = "".join(f",{size}" for size in spatial)
    text = CONV.format(c=channels, dims=dims, op=op, attributes=options, bias=", b" if has_bias else "")
    outputs = shape[0]
    if op == "ConvTranspose":
        outputs = shape[1] * (2 if "group=2" in options else 1)
    extra = {"b": (outputs,)} if has_bias else {}
    model = net(text, seed=5, w=shape, **extra)
    damaged = copy(model)
    weight = parameter(model, 0, 1)
    set_parameter(damaged, 0, 1, weight * (np.random.default_rng(1).random(shape) < 0.55))
    return model, damaged


def signals(count: int, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.default_rng(count)
    noise = generator.normal(size=(count, *shape))  # neighbours are correlated
    return (noise + 0.6 * np.roll(noise, 1, -1) + np.linspace(-1, 1, shape[-1])).astype(np.float32)


@pytest.mark.usefixtures("_no_ridge_for_few_rows")
@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_gets_the_least_squares_weights(name: str) -> None:
    op, _, channels, spatial = LAYERS[name][:4]
    model, damaged = layer(name)
    x = signals(120, (channels, *spatial))
    result = refitted(damaged, model, x)
    target = run(model, {"x": x})["y"]
    rows = rows_of(target)
    design = columns_by_probing(model, 0, x)
    support = parameter(damaged, 0, 1).ravel() != 0
    weight, bias = parameter(result, 0, 1), parameter(result, 0, 2)
    if op == "Conv" and "auto_pad" not in LAYERS[name][1]:
        patches = naive_conv_patches(x, model.graph.node[0], weight, target.shape[2:])
        np.testing.assert_array_equal(design[:, 0, : patches.shape[1]], patches)
    assert bias.shape == (rows.shape[1],)
    checked = 0
    for channel in range(rows.shape[1]):
        kept = np.flatnonzero(support & (np.abs(design[:, channel]).max(axis=0) > 0))
        expected, offset = least_squares(design[:, channel], rows[:, channel], kept)
        np.testing.assert_allclose(weight.ravel()[kept], expected, atol=1e-5)
        np.testing.assert_allclose(bias[channel], offset, atol=1e-5)
        checked += len(kept)
    assert checked >= 0.8 * support.sum()
    assert not weight.ravel()[~support].any()
    # and the loss it leaves is the smallest: any other weights on the support do worse
    left = np.square(run(result, {"x": x})["y"] - target).mean()
    assert left < np.square(run(damaged, {"x": x})["y"] - target).mean()


MATRICES = {
    "gemm": ("y = Gemm (x, w, b)", (5, 4), (4,), (400, 5), -1),
    "gemm without bias": ("y = Gemm (x, w)", (5, 4), None, (400, 5), -1),
    "gemm transB, alpha, beta": ("y = Gemm <transB=1, alpha=0.5, beta=2.0> (x, w, b)", (4, 5), (4,), (400, 5), -1),
    "gemm scalar bias": ("y = Gemm (x, w, b)", (5, 4), (1,), (400, 5), -1),
    "matmul": ("y = MatMul (x, w)", (5, 4), None, (400, 5), -1),
    "matmul of tokens": ("y = MatMul (x, w)", (5, 4), None, (60, 7, 5), -1),
    "matmul and add": ("p = MatMul (x, w)  y = Add (b, p)", (5, 4), (4,), (60, 7, 5), -1),
    "matmul left": ("y = MatMul (w, x)", (4, 5), None, (60, 5, 7), -2),
    "matmul left and add": ("p = MatMul (w, x)  y = Add (p, b)", (4, 5), (4, 1), (60, 5, 7), -2),
}


@pytest.mark.usefixtures("_no_ridge_for_few_rows")
@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_gets_the_least_squares_weights(name: str) -> None:
    body, shape, bias, data, axis = MATRICES[name]
    dims = ",".join(str(size) for size in data[1:])
    text = f"g (float[N,{dims}] x) => (float y) {{ {body} }}"
    model = net(text, seed=2, w=shape, **({} if bias is None else {"b": bias}))
    slot = 0 if "MatMul (w" in body else 1
    dense_weight = parameter(model, 0, slot)
    mask = np.random.default_rng(3).random(shape) < 0.6
    damaged = copy(model)
    set_parameter(damaged, 0, slot, dense_weight * mask)
    x = np.random.default_rng(4).normal(size=data).astype(np.float32) + np.float32(0.3)
    x += 0.5 * np.roll(x, 1, axis)
    result = refitted(damaged, model, x)
    outputs_first = shape[0] == 4
    inputs = rows_of(x, axis)
    target = rows_of(run(model, {"x": x})["y"], axis)
    alpha = 0.5 if "alpha" in body else 1.0
    weight = parameter(result, 0, slot)
    by_output = weight if outputs_first else weight.T
    kept_by_output = mask if outputs_first else mask.T
    fitted = rows_of(run(result, {"x": x})["y"], axis)
    for channel in range(4):
        kept = np.flatnonzero(kept_by_output[channel])
        expected, offset = least_squares(inputs, target[:, channel], kept)
        np.testing.assert_allclose(alpha * by_output[channel, kept], expected, atol=1e-5)
        assert not by_output[channel, ~kept_by_output[channel]].any()
        np.testing.assert_allclose(fitted[:, channel], inputs[:, kept] @ expected + offset, atol=1e-4)


@pytest.mark.usefixtures("_no_ridge_for_few_rows")
def test_gemm_on_a_transposed_input() -> None:
    """``transA`` expects samples as columns, which a Transpose in front provides."""
    model = net(
        """
        g (float[N,5] x) => (float[N,4] y) {
          t = Transpose <perm=[1,0]> (x)
          y = Gemm <transA=1, transB=1> (t, w, b)
        }
        """,
        w=(4, 5),
        b=(4,),
    )
    mask = np.random.default_rng(3).random((4, 5)) < 0.6
    damaged = copy(model)
    set_parameter(damaged, 1, 1, parameter(model, 1, 1) * mask)
    x = np.random.default_rng(4).normal(size=(50, 5)).astype(np.float32)
    weight = parameter(refitted(damaged, model, x), 1, 1)
    target = run(model, {"x": x})["y"]
    for channel in range(4):
        expected, _ = least_squares(x, target[:, channel], np.flatnonzero(mask[channel]))
        np.testing.assert_allclose(weight[channel, mask[channel]], expected, atol=1e-5)


@pytest.mark.usefixtures("_no_ridge_for_few_rows")
def test_a_matrix_over_many_tokens_is_fitted_on_some_of_each_sample() -> None:
    model = net("g (float[N,40,5] x) => (float[N,40,4] y) { y = MatMul (x, w) }", w=(5, 4))
    mask = np.random.default_rng(3).random((5, 4)) < 0.6
    damaged = copy(model)
    set_parameter(damaged, 0, 1, parameter(model, 0, 1) * mask)
    x = np.random.default_rng(4).normal(size=(100, 40, 5)).astype(np.float32)
    x += 0.5 * np.roll(x, 1, -1)
    weight = parameter(refitted(damaged, model, x, replace(PLAIN, rows=700, seed=5)), 0, 1)
    places = sample_positions(100, 40, 700, (5, 0))
    assert places.shape == (100, 7)
    drawn = x[sample_indices(100, 100, seed=0)]
    inputs = np.take_along_axis(drawn, places[..., None], axis=1).reshape(-1, 5)
    target = inputs @ parameter(model, 0, 1)
    for channel in range(4):
        expected, _ = least_squares(inputs, target[:, channel], np.flatnonzero(mask[:, channel]))
        np.testing.assert_allclose(weight[mask[:, channel], channel], expected, atol=1e-5)


def test_windows_of_one_sample_are_images_of_their_own() -> None:
    model = net(
        """
        g (float[N,4,3,6,6] x) => (float[M,4,6,6] y) {
          flat = Reshape (x, shape)
          y = Conv <pads=[1,1,1,1]> (flat, w)
        }
        """,
        shape=np.array([-1, 3, 6, 6]),
        w=(4, 3, 3, 3),
    )
    weight = parameter(model, 1, 1)
    damaged = copy(model)
    set_parameter(damaged, 1, 1, weight * (np.random.default_rng(3).random(weight.shape) < 0.5))
    x = np.random.default_rng(4).normal(size=(70, 4, 3, 6, 6)).astype(np.float32) + np.float32(0.5)
    x += np.roll(x, 1, axis=2)
    reference, before, after = (run(m, {"x": x})["y"] for m in (model, damaged, refitted(damaged, model, x)))
    assert np.square(after - reference).mean() < 0.7 * np.square(before - reference).mean()


@pytest.mark.parametrize("mixing", ["ReduceMean <axes=[0]> (r)", "Transpose <perm=[1,0,2,3]> (r)"])
def test_maps_of_a_mixed_batch_are_images_of_their_own(mixing: str) -> None:
    """A layer that reads fewer or more maps than the batch has samples, which is 4 here."""
    layers = f"a = Conv (x, wa) r = Relu (a) m = {mixing} y = Conv (m, wb)"
    text = f"g (float[4,6,5,5] x) => (float[M,3,5,5] y) {{ {layers} }}"
    dense = net(text, wa=(6, 6, 1, 1), wb=(3, 6 if "Reduce" in mixing else 4, 1, 1))
    damaged = onnx_asr.prune(dense, options=PruneOptions(0.5)).model
    x = images(16, seed=0, shape=(6, 5, 5))
    result = refitted(damaged, dense, x)
    before, after, expected = (
        np.concatenate([run(model, {"x": x[i : i + 4]})["y"] for i in range(0, 16, 4)])
        for model in (damaged, result, dense)
    )
    assert np.square(after - expected).sum() < np.square(before - expected).sum()


def two_layers(with_bn: bool) -> onnx.ModelProto:
    text = """
    g (float[N,3,6,6] x) => (float[N,4,6,6] y) {{
      a = Conv <pads=[1,1,1,1]> (x, a_w, a_b)
      {}
      r = Relu (n)
      y = Conv <pads=[1,1,1,1]> (r, b_w, b_b)
    }}
    """
    norm = "n = BatchNormalization (a, n_gamma, n_beta, n_mean, n_var)" if with_bn else "n = Identity (a)"
    shapes: dict[str, Any] = {"a_w": (5, 3, 3, 3), "a_b": (5,), "b_w": (4, 5, 3, 3), "b_b": (4,)}
    return net(text.format(norm), seed=4, **shapes, **(bn("n", channels=5) if with_bn else {}))


@pytest.mark.usefixtures("_no_ridge_for_few_rows")
@pytest.mark.parametrize("with_bn", [False, True])
def test_the_walk_is_sequential_and_folds_batchnorm(with_bn: bool) -> None:
    """The second layer is fitted on the input that the first one, refitted, gives it."""
    model = two_layers(with_bn)
    damaged = copy(model)
    generator = np.random.default_rng(0)
    for position in positions(model, "Conv"):
        weight = parameter(model, position, 1)
        set_parameter(damaged, position, 1, weight * (generator.random(weight.shape) < 0.5))
    x = images(80, seed=6, shape=(3, 6, 6))
    result = refitted(damaged, model, x)
    reference = run(model, {"x": x}, ["n", "y"])
    got = run(result, {"x": x}, ["n", "r", "y"])
    for position, name, source in ((0, "n", x), (3, "y", got["r"])):
        support = parameter(damaged, position, 1) != 0
        patches = naive_conv_patches(source, model.graph.node[position], support, (6, 6))
        target, fitted = rows_of(reference[name]), rows_of(got[name])
        for channel in range(target.shape[1]):
            kept = np.flatnonzero(support[channel].ravel())
            expected, offset = least_squares(patches, target[:, channel], kept)
            np.testing.assert_allclose(fitted[:, channel], patches[:, kept] @ expected + offset, atol=2e-4)


def residual(behind: str = "") -> onnx.ModelProto:
    """A residual block: ``x - stem - (b) - Add - [BN] - Relu - pool``, the identity as its shortcut."""
    return net(
        f"""
        g (float[N,3,6,6] x) => (float[N,4,6,6] y) {{
          s = Conv <pads=[1,1,1,1]> (x, s_w, s_b)
          sr = Relu (s)
          b = Conv <pads=[1,1,1,1]> (sr, b_w, b_b)
          sum = Add (b, sr)
          {behind or "y = Relu (sum)"}
        }}
        """,
        seed=9,
        s_w=(4, 3, 3, 3),
        s_b=(4,),
        b_w=(4, 4, 3, 3),
        b_b=(4,),
        **(bn("n", channels=4) if behind else {}),
    )


def prune_at_random(model: onnx.ModelProto, share: float) -> onnx.ModelProto:
    damaged = copy(model)
    generator = np.random.default_rng(7)
    for position in positions(model, "Conv"):
        weight = parameter(model, position, 1)
        set_parameter(damaged, position, 1, weight * (generator.random(weight.shape) >= share))
    return damaged


@pytest.mark.usefixtures("_no_ridge_for_few_rows")
def test_block_targets_are_least_squares_on_what_the_sum_lacks() -> None:
    model = residual()
    damaged, x = prune_at_random(model, 0.6), images(100, seed=6, shape=(3, 6, 6))
    recipe = RefitRecipe(rows=10**9, ridge=0.0, relu_steps=0, gain_power=0.0, class_steps=0)
    got = run(refitted(damaged, model, x, recipe), {"x": x}, ["sr", "b", "sum"])
    reference = run(model, {"x": x}, ["sum"])["sum"]
    support = parameter(damaged, 2, 1) != 0
    patches = naive_conv_patches(got["sr"], model.graph.node[2], support, (6, 6))
    target, fitted = rows_of(reference - got["sr"]), rows_of(got["b"])
    for channel in range(4):
        kept = np.flatnonzero(support[channel].ravel())
        expected, offset = least_squares(patches, target[:, channel], kept)
        np.testing.assert_allclose(fitted[:, channel], patches[:, kept] @ expected + offset, atol=2e-4)
    without = run(refitted(damaged, model, x), {"x": x}, ["sum"])["sum"]
    errors = [float(np.square(value - reference).mean()) for value in (without, got["sum"])]
    assert errors[1] < 0.95 * errors[0]


BN_BETWEEN = "n = BatchNormalization (sum, n_gamma, n_beta, n_mean, n_var)  y = Relu (n)"


@pytest.mark.parametrize("behind", ["", BN_BETWEEN], ids=["relu", "batchnorm and relu"])
def test_relu_aware_steps_lower_the_error_that_is_seen(behind: str) -> None:
    """At the price of a larger error before the ReLU, which has no effect."""
    model = residual(behind)
    if behind:
        (spot,) = positions(model, "BatchNormalization")
        set_parameter(model, spot, 3, np.full(4, 0.5))
        set_parameter(model, spot, 1, np.array([0.7, 1.2, -0.6, 0.9]))  # a channel that the BN turns over
    damaged, x = prune_at_random(model, 0.6), images(100, seed=6, shape=(3, 6, 6))
    reference = run(model, {"x": x}, ["sum", "y"])
    # the stem's own ReLU must not take part in the comparison
    weight = parameter(model, 0, 1)
    set_parameter(damaged, 0, 1, weight)
    errors = {}
    for count in (0, 1, 3):
        recipe = RefitRecipe(rows=10**9, ridge=0.0, relu_steps=count, gain_power=0.0, class_steps=0)
        got = run(refitted(damaged, model, x, recipe), {"x": x}, ["sum", "y"])
        errors[count] = [float(np.square(got[name] - reference[name]).mean()) for name in ("sum", "y")]
    assert errors[0][1] > errors[1][1] > errors[3][1]
    assert errors[3][1] < 0.97 * errors[0][1]
    assert errors[3][0] > errors[0][0]


@pytest.mark.parametrize("spots", [1, 3])
def test_classes_are_matched_if_there_is_one_row_per_sample(spots: int) -> None:
    """Flattened, 3 x 1 x 3 positions are nine values per sample, not classes."""
    rng = np.random.default_rng(0)
    model = net(
        f"g (float[N,5,1,{spots}] x) => (float[N,{3 * spots}] y) {{ a = Conv (x, v)  y = Flatten (a) }}", v=(3, 5, 1, 1)
    )
    set_parameter(model, 0, 1, 2 * parameter(model, 0, 1))
    damaged = copy(model)
    set_parameter(damaged, 0, 1, parameter(model, 0, 1) * (rng.random((3, 5, 1, 1)) < 0.5))
    x = rng.normal(size=(200, 5, 1, spots)).astype(np.float32)
    distance = {}
    for count in (0, 20):
        values = run(refitted(damaged, model, x, replace(PLAIN, class_steps=count)), {"x": x})["y"]
        distance[count] = compare([run(model, {"x": x})["y"]], [values]).distance
    assert (distance[20] < 0.9 * distance[0]) if spots == 1 else (distance[20] == distance[0])
