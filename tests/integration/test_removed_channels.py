"""Repairs of networks that lost channels, and the record of them: the same as with the record."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_asr
from onnx_asr.channels.units import KEPT_CHANNELS, read_kept
from onnx_asr.repairing.options import Method
from tests.graphs import copy, digit_images, digits, folded

IMAGES = digit_images()[0][:64]


def without_record(model: onnx.ModelProto) -> onnx.ModelProto:
    model = copy(model)
    del model.metadata_props[:]
    return model


def through_graphsurgeon(model: onnx.ModelProto) -> onnx.ModelProto:
    surgeon = pytest.importorskip("onnx_graphsurgeon")
    exported = surgeon.export_onnx(surgeon.import_onnx(model))
    assert not exported.metadata_props
    return exported


def repaired(model: onnx.ModelProto, dense: onnx.ModelProto, method: Method) -> onnx_asr.RepairResult:
    options = onnx_asr.RepairOptions(method=method, verify_samples=8)
    return onnx_asr.repair(model, IMAGES, options, dense=dense)


def parameters(model: onnx.ModelProto) -> list[bytes]:
    """Every parameter, in the order in which nodes read them."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return [stored[name].tobytes() for node in model.graph.node for name in node.input if name in stored]


@pytest.mark.parametrize("lose", [without_record, through_graphsurgeon])
@pytest.mark.parametrize(
    ("name", "method"), [("resnet", "refit"), ("densenet", "paired"), ("mobilenet", "bn"), ("vgg", "paired")]
)
def test_a_repair_gives_the_same(name: str, method: Method, lose: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
    dense = digits(name)
    cut = onnx_asr.prune_channels(dense, onnx_asr.ChannelPruneOptions(0.3)).model
    expected, result = repaired(cut, dense, method), repaired(lose(cut), dense, method)
    assert parameters(result.model) == parameters(expected.model)
    assert result.verification == expected.verification
    assert read_kept(result.model) == read_kept(cut) != {}
    assert set(result.notes) - set(expected.notes) == {note for note in result.notes if "told by the weights" in note}
    assert len(result.notes) == len(expected.notes) + 1


def test_the_record_serves_later_steps() -> None:
    dense = digits("resnet")
    cut = without_record(onnx_asr.prune_channels(dense, onnx_asr.ChannelPruneOptions(0.3)).model)
    first = repaired(cut, dense, "refit").model
    thinned = onnx_asr.prune(first, options=onnx_asr.PruneOptions(0.5)).model
    assert any(entry.key == KEPT_CHANNELS for entry in thinned.metadata_props)
    assert not any("told by the weights" in note for note in repaired(thinned, dense, "bn").notes)


def test_batchnorm_folded_when_the_channels_were_removed() -> None:
    """As after Torch-Pruning and onnxsim."""
    dense = digits("resnet")
    cut = onnx_asr.prune_channels(dense, onnx_asr.ChannelPruneOptions(0.3)).model
    expected, result = repaired(folded(cut), dense, "paired"), repaired(folded(without_record(cut)), dense, "paired")
    assert parameters(result.model) == parameters(expected.model)
    assert result.improved


def test_an_inspection_tells_how_the_channels_were_found() -> None:
    dense = digits("resnet")
    cut = onnx_asr.prune_channels(dense, onnx_asr.ChannelPruneOptions(0.3)).model
    expected, result = (onnx_asr.inspect(item, IMAGES, dense=dense) for item in (cut, without_record(cut)))
    assert expected.notes == ()
    assert "told by the weights" in result.notes[0]
    for layer, other in zip(result.layers, expected.layers, strict=True):
        assert layer.damage is not None
        assert other.damage is not None
        assert np.array_equal(layer.damage.dense_std, other.damage.dense_std)
