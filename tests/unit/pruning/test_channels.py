"""Channel pruning: scopes, scores and options, and repairs of the smaller nets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

import onnx_asr
from onnx_asr.channels.rules import trace
from onnx_asr.channels.units import read_kept
from onnx_asr.errors import ModelError, OptionError
from onnx_asr.graph.points import survey
from onnx_asr.networks.cost import cost
from onnx_asr.networks.operations import Probe
from onnx_asr.pruning.channels import channel_scores, prune_channels
from onnx_asr.pruning.options import ChannelPruneOptions
from onnx_asr.repairing.options import RepairOptions
from tests.graphs import (
    digit_images,
    digits,
    first_output,
    index,
    net,
    parameter,
    positions,
    residual_net,
)


def test_layer_scope_removes_the_same_fraction_of_every_group() -> None:
    result = prune_channels(digits("mobilenet"), ChannelPruneOptions(0.3))
    for group in result.groups:
        assert group.kept == group.channels - round(0.3 * group.channels)
    assert result.after.parameters < 0.6 * result.before.parameters
    assert [skip.op_type for skip in result.skips] == ["Gemm"]
    assert "output of the model" in result.skips[0].reason


def test_global_scope_counts_all_channels_together() -> None:
    result = prune_channels(digits("vgg"), ChannelPruneOptions(0.4, scope="global"))
    total = sum(group.channels for group in result.groups)
    assert sum(group.kept for group in result.groups) == total - round(0.4 * total)
    assert len({group.kept / group.channels for group in result.groups}) > 1
    extreme = prune_channels(digits("vgg"), ChannelPruneOptions(0.999, scope="global"))
    assert [group.kept for group in extreme.groups] == [1] * len(extreme.groups)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_number_of_channels_kept_is_a_multiple(scope: Any) -> None:
    result = prune_channels(digits("mobilenet"), ChannelPruneOptions(0.35, scope=scope, multiple=16))
    for group in result.groups:
        assert group.kept % 16 == 0 or group.kept == group.channels
        assert group.kept >= 16
        if scope == "layer":
            assert abs(group.kept - 0.65 * group.channels) <= 8.5


def test_the_channels_of_smallest_score_go() -> None:
    text = (
        "g (float[1,4,8,8] x) => (float[1,5,6,6] y) { a = Conv <pads=[1,1,1,1]> (x, wa) b = Relu (a) y = Conv (b, wy) }"
    )
    model = net(text, wa=(6, 4, 3, 3), wy=(5, 6, 3, 3))
    found = index(model)
    channels = trace(found)
    scores = channel_scores(found, channels, survey(found).points)[channels.tensors["a"].ids]
    rows, columns = parameter(model, 0, 1), parameter(model, 2, 1)
    norms = np.linalg.norm(rows.reshape(6, -1), axis=1) * np.linalg.norm(columns.swapaxes(0, 1).reshape(6, -1), axis=1)
    np.testing.assert_allclose(scores, norms, rtol=1e-6)
    kept = np.sort(np.argsort(norms)[2:])
    np.testing.assert_array_equal(parameter(prune_channels(model, ChannelPruneOptions(1 / 3)).model, 0, 1), rows[kept])


def test_a_group_is_cut_only_if_all_its_layers_are_chosen() -> None:
    result = prune_channels(residual_net(), ChannelPruneOptions(0.5, exclude=("^b_w$",)))
    assert all("Conv:stem" not in group.layers for group in result.groups)
    assert {skip.name: skip.code for skip in result.skips}["Conv:stem"] == "channels-tied-to-skipped-layer"
    inner = prune_channels(digits("resnet"), ChannelPruneOptions(0.5, include=(r"body\.0",)))
    assert all(len(group.layers) == 1 for group in inner.groups)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"sparsity": 1.0}, OptionError, "out of range: give the share of channels"),
        ({}, OptionError, "missing"),
        ({"sparsity": 0.5, "scope": "world"}, OptionError, "scope 'world' is unknown"),
        ({"sparsity": 0.5, "multiple": 0}, OptionError, "multiple 0 is out of range"),
        ({"sparsity": 0.5, "include": ("nobody",)}, OptionError, "leave no weight"),
        ({"sparsity": 0.5, "include": ("fc",)}, ModelError, "no channel of the model can be removed"),
    ],
)
def test_bad_options_are_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        prune_channels(residual_net(), ChannelPruneOptions(**arguments))


@pytest.mark.parametrize("method", ["refit", "paired", "bn"])
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet"])
def test_a_cut_net_is_repaired_against_the_dense_one(name: str, method: str) -> None:
    dense = digits(name)
    smaller = prune_channels(dense, ChannelPruneOptions(0.4)).model
    options = RepairOptions(method=method, samples=256, verify_samples=128)  # type: ignore[arg-type]
    result = onnx_asr.repair(smaller, digit_images()[0], options, dense=dense)
    assert result.verification is not None
    before, after = result.verification.before.distance, result.verification.after.distance
    assert after < {"refit": 0.1, "paired": 0.8, "bn": 0.9}[method] * before
    assert cost(index(result.model), Probe()).flops == cost(index(smaller), Probe()).flops
    assert read_kept(result.model) == read_kept(smaller)


def test_a_net_that_lost_only_unread_channels_keeps_its_function() -> None:
    """Removing channels without readers loses nothing, so there is nothing to repair."""
    dense = digits("vgg")
    conv = positions(dense, "Conv")[1]
    weight = parameter(dense, conv, 1).copy()
    weight[:, 3] = 0
    next(t for t in dense.graph.initializer if t.name == dense.graph.node[conv].input[1]).CopyFrom(
        numpy_helper.from_array(weight, dense.graph.node[conv].input[1])
    )
    smaller = onnx_asr.shrink(dense).model
    assert len(read_kept(smaller)) == 1
    options = RepairOptions(method="paired", samples=128, verify_samples=64)
    data = digit_images()[0]
    result = onnx_asr.repair(smaller, data, options, dense=dense)
    np.testing.assert_allclose(first_output(result.model, data[:8]), first_output(dense, data[:8]), atol=1e-3)


@pytest.mark.parametrize(
    ("size", "target", "shapes"),
    [
        ("4,4", (4, 128), None),
        ("4,4", (4, -1), None),
        ("4,4", (1, -1), None),
        ("H,W", (-1, 128), {"x": (1, 3, 4, 4)}),
        ("H,W", (4, 128), {"x": (4, 3, 4, 4)}),
    ],
)
def test_sizes_that_are_written_into_the_graph(size: str, target: tuple[int, ...], shapes: Any) -> None:
    """A batch size is found, others are given, and recorded for the repair."""
    model = net(
        f"""
        g (float[N,3,{size}] x) => (float[M,5] y) {{
          a = Conv <pads=[1,1,1,1]> (x, w)
          r = Relu (a)
          f = Reshape (r, target)
          y = Gemm (f, v, b)
        }}
        """,
        w=(8, 3, 3, 3),
        v=(128, 5),
        b=(5,),
        target=np.array(target),
    )
    smaller = onnx_asr.prune_channels(model, onnx_asr.ChannelPruneOptions(0.5), input_shapes=shapes).model
    assert parameter(smaller, 0, 1).shape == (4, 3, 3, 3)
    assert parameter(smaller, 3, 1).shape == (64, 5)
    options = onnx_asr.RepairOptions("refit", samples=32, verify_samples=12)
    x = np.random.default_rng(0).standard_normal((48, 3, 4, 4)).astype(np.float32)
    repaired = onnx_asr.repair(smaller, x, options, dense=model)
    assert repaired.verification is not None
    assert repaired.verification.verdict == "closer"
    if shapes is not None:
        del smaller.metadata_props[[entry.key for entry in smaller.metadata_props].index("onnx_asr.input_shapes")]
        with pytest.raises(ModelError):
            onnx_asr.repair(smaller, x, options, dense=model)
