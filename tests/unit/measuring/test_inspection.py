"""`inspect` reports what is in the model; the damage equals that of plain runs of both networks."""

from __future__ import annotations

import json

import numpy as np
import pytest

import onnx_asr
from onnx_asr.data.datasets import TensorDataset
from onnx_asr.errors import ModelError, OptionError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.json_values import plain
from onnx_asr.measuring.damage import COLLAPSED_RATIO, PointDamage, draw_samples, measure_damage
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import Pair
from onnx_asr.numerics.moments import PairMoments
from onnx_asr.repairing.options import RepairOptions
from tests.graphs import (
    copy,
    dense_net,
    digits,
    folded,
    images,
    masked,
    net,
    parameter,
    per_channel,
    positions,
    pruned,
    residual_net,
    run,
    weights,
)


def test_layers_and_their_zeros() -> None:
    model = pruned(residual_net(), 0.6)
    found = onnx_asr.inspect(model)
    stored = weights(model)
    assert [layer.node for layer in found.layers] == list(stored)
    for layer in found.layers:
        value = stored[layer.node]
        rows = value.reshape(len(value), -1)
        assert (layer.shape, layer.weights, layer.zeros) == (value.shape, value.size, int((value == 0).sum()))
        np.testing.assert_array_equal(layer.channel_zeros, (rows == 0).sum(axis=1))
        np.testing.assert_allclose(layer.channel_norm, np.linalg.norm(rows.astype(np.float64), axis=1))
        assert layer.writable == ("weights" if layer.op_type == "Gemm" else "weights+batchnorm")
    total = sum(value.size for value in stored.values())
    assert found.sparsity == pytest.approx(sum(int((value == 0).sum()) for value in stored.values()) / total)
    assert found.batchnorm == "behind 5 of 5 convolutions"
    assert found.file_bytes == model.ByteSize()
    assert 0 < found.compressed_bytes < found.file_bytes
    assert found.samples == 0
    assert found.inputs == ("x: float32[?,3,8,8]",)


def test_channels_without_weights_are_counted() -> None:
    model = residual_net()
    position = positions(model, "Conv")[1]
    mask = np.ones(parameter(model, position, 1).shape)
    mask[[2, 5]] = 0
    found = onnx_asr.inspect(masked(model, {position: mask}))
    assert {layer.node: layer.empty_channels for layer in found.layers if layer.empty_channels} == {position: 2}


def test_batchnorm_folded_or_alone() -> None:
    assert onnx_asr.inspect(folded(residual_net())).batchnorm.startswith("none: folded")
    found = onnx_asr.inspect(dense_net())
    alone = [layer for layer in found.layers if layer.shape is None]
    assert {layer.op_type for layer in alone} == {"BatchNormalization"}
    assert all(
        (layer.weights, layer.sparsity, layer.pattern, layer.empty_channels) == (0, None, None, 0) for layer in alone
    )
    assert found.batchnorm == "behind 1 of 4 convolutions, 3 elsewhere"


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:2"])
def test_patterns_are_found(pattern: str) -> None:
    found = onnx_asr.inspect(onnx_asr.prune(residual_net(), options=onnx_asr.PruneOptions(pattern=pattern)).model)
    narrow = int(pattern[2:])
    for layer in found.layers:
        assert layer.shape is not None
        assert layer.pattern == ("dense" if layer.shape[1] < narrow else pattern), layer.name


def test_no_pattern_is_found_where_there_is_none() -> None:
    for sparsity in (0.3, 0.5, 0.9, 0.97):
        found = onnx_asr.inspect(onnx_asr.prune(digits("vgg"), options=onnx_asr.PruneOptions(sparsity)).model)
        assert {layer.pattern for layer in found.layers} <= {"unstructured", "dense"}


def test_what_repair_could_do() -> None:
    methods = onnx_asr.inspect(folded(residual_net())).methods
    possible = {key: {name for name, why in item.items() if why is None} for key, item in methods.items()}
    assert possible["with_dense"] == {"auto", "refit", "paired", "asr", "layerwise", "raw"}
    assert possible["without_dense"] == set()
    assert "--dense" in str(methods["without_dense"]["refit"])


def test_a_model_without_points_is_no_error() -> None:
    found = onnx_asr.inspect(net("g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }"))
    assert (found.layers, found.sparsity) == ((), 0.0)
    assert set(found.methods["with_dense"].values()) == {"nothing in the model can be corrected"}


def test_skips_come_with_reasons() -> None:
    text = "g (float[N,4] x, float[4,4] w) => (float[N,4] y) { a = MatMul (x, v)  y = MatMul (a, w) }"
    found = onnx_asr.inspect(net(text, v=(4, 4)))
    (skip,) = found.skips
    assert (skip.op_type, skip.reason) == ("MatMul", "MatMul of two activations has no weight")
    assert plain(found)["skipped"][0]["code"] == "no-constant-weight"


def test_damage_is_that_of_plain_runs() -> None:
    dense = residual_net()
    model = pruned(dense, 0.7)
    x = images(60, seed=5)
    found = onnx_asr.inspect(model, dense=dense, data={"x": x}, samples=60, batch_size=13)
    assert found.samples == 60
    tensors = {"stem": "stem_n", "a": "a_n", "b": "b_n", "c": "c_n", "short": "short_n", "logits": "logits"}
    truth = [run(version, {"x": x}, tensors.values()) for version in (dense, model)]
    for layer in found.layers:
        name = tensors[model.graph.node[layer.node].output[0]]
        first, second = (per_channel(values[name]) for values in truth)
        assert layer.damage is not None
        np.testing.assert_allclose(layer.damage.ratios, second.var(axis=1) / first.var(axis=1), rtol=1e-4)
        np.testing.assert_allclose(layer.damage.std, second.std(axis=1), rtol=1e-4)
        shift = (second.mean(axis=1) - first.mean(axis=1)) / first.std(axis=1)
        np.testing.assert_allclose(layer.damage.shift, shift, rtol=1e-3, atol=1e-4)
        correlation = [np.corrcoef(p, q)[0, 1] for p, q in zip(first, second, strict=True)]
        np.testing.assert_allclose(layer.damage.correlations, correlation, rtol=1e-4, atol=1e-4)
        errors = layer.damage.errors
        assert errors is not None
        assert errors.none > 0


def test_several_versions_in_one_walk_and_a_bias_that_a_repair_added() -> None:
    dense = net(
        "g (float[N,6] x) => (float[N,4] y) { a = MatMul (x, w)  b = Relu (a)  y = MatMul (b, v) }", w=(6, 5), v=(5, 4)
    )
    rows = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    model = onnx_asr.prune(dense, options=onnx_asr.PruneOptions(0.5)).model
    options = RepairOptions(method="paired", samples=64, verify_samples=0)
    repaired = onnx_asr.repair(model, {"x": rows}, options, dense=dense).model
    assert len(repaired.graph.node) > len(model.graph.node)
    pair = Pair.of(model, dense)
    pruned = pair.pruned.index
    data = TensorDataset([{"x": rows}], "rows", pair.pruned.inputs)
    calibration = draw_samples(data, np.arange(64), pair.pruned.inputs, 64, 0, None)
    before, after = measure_damage(pair, [pruned, GraphIndex.of(repaired)], calibration, Execution())
    alone = onnx_asr.inspect(model, dense=dense, data={"x": rows}, samples=64)
    for layer, first, second in zip(alone.layers, before.values(), after.values(), strict=True):
        assert layer.damage is not None
        np.testing.assert_allclose(first.ratios, layer.damage.ratios, rtol=1e-6)
        np.testing.assert_allclose(second.ratios, 1.0, rtol=1e-3)


def moments(scale: np.ndarray, *, seed: int, noise: float = 0.0) -> PairMoments:
    generator = np.random.default_rng(seed)
    dense = generator.normal(size=(400, len(scale)))
    return PairMoments.of(dense, dense * scale + noise * generator.normal(size=dense.shape))


def test_collapsed_dead_and_constant_channels() -> None:
    damage = PointDamage.of([moments(np.array([1.0, 0.5, 0.05, 0.0, 0.2]), seed=0)])
    np.testing.assert_allclose(damage.ratios, [1, 0.25, 0.0025, 0, 0.04], rtol=1e-6)
    assert damage.is_collapsed.tolist() == [ratio < COLLAPSED_RATIO for ratio in (1, 0.25, 0.0025, 0, 0.04)]
    assert (damage.collapsed_share, damage.dead, damage.errors) == (0.4, 1, None)
    assert damage.median_ratio == pytest.approx(0.04)
    rows = np.random.default_rng(1).normal(size=(50, 2))
    constant = PointDamage.of([PairMoments.of(rows * [1, 0], rows)])
    assert np.isnan(constant.ratios).tolist() == [False, True]
    assert plain(constant)["ratios"][1] is None
    assert (constant.dead, constant.collapsed_share) == (0, 0.0)
    nothing = plain(PointDamage.of([PairMoments.of(rows * 0, rows)] * 2))
    assert (nothing["median_ratio"], nothing["spread"], nothing["log_errors"]) == (None, None, None)


def test_log_errors_predict_the_effect_of_a_correction() -> None:
    even = np.full(40, 0.1)
    uneven = 10.0 ** np.linspace(-2, 0, 40)
    for scale, layer_helps in ((even, True), (uneven, False)):
        errors = PointDamage.of([moments(scale, seed=2), moments(scale, seed=3)]).errors
        assert errors is not None
        assert errors.none == pytest.approx(np.sqrt(np.mean(np.square(2 * np.log10(scale)))), rel=0.02)
        assert errors.channel < 0.1
        assert (errors.layer < 0.1) == layer_helps


def test_samples_come_in_two_halves_at_least() -> None:
    model = residual_net()
    for count in (4, 5, 64):
        found = onnx_asr.inspect(pruned(model, 0.5), dense=model, data={"x": images(count, seed=1)})
        assert found.samples == count
        assert all(layer.damage is not None and layer.damage.errors is not None for layer in found.layers)
    found = onnx_asr.inspect(pruned(model, 0.5), dense=model, data={"x": images(1, seed=1)})
    assert all(layer.damage is not None and layer.damage.errors is None for layer in found.layers)


def test_channel_table_and_json() -> None:
    model = residual_net()
    found = onnx_asr.inspect(pruned(model, 0.9), dense=model, data={"x": images(40, seed=2)})
    for layer in found.layers:
        table = layer.channel_table()
        assert len(table) == layer.channels
        assert sum(row["zeros"] for row in table) == layer.zeros
        assert layer.damage is not None
        assert [row["collapsed"] for row in table] == layer.damage.is_collapsed.tolist()
    text = json.dumps([plain(found), *(layer.channel_table() for layer in found.layers)], allow_nan=False)
    assert json.loads(text)[0]["samples"] == 40
    assert "ratio" not in onnx_asr.inspect(model).layers[0].channel_table()[0]


def test_inputs_stay_as_they_were() -> None:
    dense = residual_net()
    model = pruned(dense, 0.5)
    kept = copy(dense), copy(model)
    onnx_asr.inspect(model, dense=dense, data={"x": images(20, seed=2)})
    assert (dense, model) == kept


def test_refusals() -> None:
    model = residual_net()
    with pytest.raises(OptionError, match="--data"):
        onnx_asr.inspect(model, dense=model)
    with pytest.raises(OptionError, match="--dense"):
        onnx_asr.inspect(model, data={"x": images(4, seed=0)})
    with pytest.raises(OptionError, match="samples 0"):
        onnx_asr.inspect(model, dense=model, data={"x": images(4, seed=0)}, samples=0)
    with pytest.raises(ModelError, match="not the same network"):
        onnx_asr.inspect(model, dense=dense_net(), data={"x": images(4, seed=0)})
    with pytest.raises(
        OptionError, match=r"no layer 'Conv:stam': give the name of one of the \d+ layers, such as 'Conv:stem'"
    ):
        onnx_asr.inspect(model).layer("Conv:stam")
