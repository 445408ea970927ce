"""Planned corrections, judged by what the edited file computes in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_asr.graph.points import survey
from onnx_asr.networks.draft import Draft
from onnx_asr.numerics.gains import BatchNormParameters, ChannelAffine
from tests.graphs import LAYERS, bn, constant, first_output, images, index, layer, net, run, set_parameter


def channels_first(tensor: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(tensor.astype(np.float64), axis, 0).reshape(tensor.shape[axis], -1)


@pytest.mark.parametrize("name", LAYERS)
def test_gain_and_shift_are_what_the_layer_does_afterwards(name: str) -> None:
    model, x, point = layer(name)
    generator = np.random.default_rng(5)
    gain, shift = generator.uniform(0.2, 3.0, point.channels), generator.normal(size=point.channels)
    draft = Draft(index(model))
    draft.apply_affine(point, ChannelAffine(gain, shift))
    edited = draft.model()
    onnx.checker.check_model(edited, full_check=True)
    before = channels_first(first_output(model, x), point.channel_axis)
    after = channels_first(first_output(edited, x), point.channel_axis)
    np.testing.assert_allclose(after, gain[:, None] * before + shift[:, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_zeros_in_the_weight_stay(name: str) -> None:
    model, _, point = layer(name)
    weight = constant(model, "w").copy()
    weight[np.random.default_rng(0).random(weight.shape) < 0.7] = 0.0
    set_parameter(model, *point.weight, weight)
    draft = Draft(index(model))
    draft.apply_affine(point, ChannelAffine(np.linspace(0.1, 1e6, point.channels), np.ones(point.channels)))
    edited = draft.model()
    after = constant(edited, edited.graph.node[point.node].input[point.layer.weight_slot])
    np.testing.assert_array_equal(after == 0, weight == 0)


@pytest.mark.parametrize("name", LAYERS)
def test_the_bias_read_is_what_the_layer_adds(name: str) -> None:
    """For an input of zeros only the bias is left; planning it again changes nothing."""
    model, x, point = layer(name)
    draft = Draft(index(model))
    bias = draft.bias(point)
    silent = channels_first(first_output(model, np.zeros_like(x)), point.channel_axis)
    np.testing.assert_allclose(np.broadcast_to(bias[:, None], silent.shape), silent, rtol=1e-6)
    new = bias + np.arange(point.channels) + 1
    draft.set_bias(point, new)
    np.testing.assert_allclose(draft.bias(point), new, rtol=1e-12)
    silent = channels_first(first_output(draft.model(), np.zeros_like(x)), point.channel_axis)
    np.testing.assert_allclose(np.broadcast_to(new[:, None], silent.shape), silent, rtol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_read_are_those_planned(name: str) -> None:
    model, _, point = layer(name)
    draft = Draft(index(model))
    rows = draft.rows(point)
    assert rows.dtype == np.float64
    draft.set_rows(point, rows * 2)
    np.testing.assert_array_equal(draft.rows(point), rows * 2)


CONV_BN = """
g (float[N,3,8,8] x) => (float[N,4,8,8] y) {
  z = Conv (x, w%s)
  y = BatchNormalization <epsilon=0.25> (z, n_gamma, n_beta, n_mean, n_var)
}
"""


@pytest.mark.parametrize("bias", ["", ", b"])
def test_before_a_batchnorm_the_shift_goes_into_its_mean(bias: str) -> None:
    """``BN(gain z + shift)``: the tensor itself takes only the gain, and so does ``Lane.transform``."""
    model = net(CONV_BN % bias, w=(4, 3, 1, 1), b=(4,), **bn("n", channels=4))
    draft = Draft(index(model))
    (point,) = survey(draft.index).points
    gain, shift = np.array([0.5, 1.0, 2.0, 3.0]), np.array([1.0, -1.0, 0.0, 5.0])
    draft.apply_affine(point, ChannelAffine(gain, shift))
    edited = draft.model()
    x = images(4, seed=1)
    before, after = (run(item, {"x": x}, ["z"]) for item in (model, edited))
    np.testing.assert_allclose(after["z"], before["z"] * gain.reshape(-1, 1, 1), rtol=1e-5, atol=1e-6)
    gamma, beta, mean, var = (constant(model, f"n_{part}").astype(float) for part in ("gamma", "beta", "mean", "var"))
    z = gain[:, None] * channels_first(before["z"], 1) + shift[:, None]
    expected = gamma[:, None] * (z - mean[:, None]) / np.sqrt(var + 0.25)[:, None] + beta[:, None]
    np.testing.assert_allclose(channels_first(after["y"], 1), expected, rtol=1e-4, atol=1e-5)


def test_batchnorm_parameters_are_read_and_written_by_name() -> None:
    model = net(CONV_BN % "", w=(4, 3, 1, 1), **bn("n", channels=4))
    draft = Draft(index(model))
    old = draft.batchnorm(1)
    for value, part in ((old.scale, "gamma"), (old.bias, "beta"), (old.mean, "mean"), (old.var, "var")):
        np.testing.assert_array_equal(value, constant(model, f"n_{part}").astype(np.float64))
    assert old.epsilon == 0.25
    draft.set_batchnorm(1, BatchNormParameters(old.scale, old.bias + 1, old.mean, old.var * 2, old.epsilon))
    assert set(draft.plan.values) == {(1, 2), (1, 4)}  # the other two are left as they are
    x = images(2, seed=1)
    y = run(draft.model(), {"x": x}, ["z"])
    z = channels_first(y["z"], 1)
    expected = old.scale[:, None] * (z - old.mean[:, None]) / np.sqrt(old.var * 2 + 0.25)[:, None]
    np.testing.assert_allclose(channels_first(y["y"], 1), expected + old.bias[:, None] + 1, rtol=1e-4, atol=1e-5)
    assert draft.batchnorm(1).var.tolist() == (old.var * 2).tolist()


def test_default_epsilon_is_the_operators() -> None:
    model = net(CONV_BN.replace("<epsilon=0.25>", "") % "", w=(4, 3, 1, 1), **bn("n", channels=4))
    assert Draft(index(model)).batchnorm(1).epsilon == pytest.approx(1e-5)
