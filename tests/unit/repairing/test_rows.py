"""Rows that are held, and rows that every pass gathers anew from what a lane holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import pytest

import onnx_asr
import onnx_asr.repairing.rows as sampling
from onnx_asr.engine.session import Runtime
from onnx_asr.graph.points import LayerPoint
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import Network
from onnx_asr.networks.samples import Calibration
from onnx_asr.numerics import patches
from onnx_asr.numerics.refit import LayerRefit
from onnx_asr.pruning.options import PruneOptions
from onnx_asr.repairing.options import RefitRecipe, RepairOptions
from onnx_asr.repairing.pipeline import repair
from tests.graphs import dense_net, images, residual_net, vision_transformer, weights


def repaired(dense: onnx.ModelProto, samples: int = 16, *, execution: Execution | None = None) -> onnx.ModelProto:
    damaged = onnx_asr.prune(dense, options=PruneOptions(0.5)).model
    shape = [size.dim_value for size in dense.graph.input[0].type.tensor_type.shape.dim[1:]]
    options = RepairOptions(method="refit", samples=samples, verify_samples=0, batch_size=5)
    x = images(samples, seed=1, shape=tuple(shape))
    return repair(damaged, x, options, dense=dense, execution=execution).model


NETS = {"residual": residual_net, "concatenated": dense_net, "transformer": vision_transformer}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS.keys())
def test_rows_that_are_not_held_give_the_same(make: Callable[[], onnx.ModelProto], monkeypatch):
    dense = make()
    held = weights(repaired(dense))
    monkeypatch.setattr(sampling, "MAX_ROW_BYTES", 0)
    unheld = weights(repaired(dense))
    assert held.keys() == unheld.keys()
    for node, value in held.items():
        np.testing.assert_allclose(unheld[node], value, atol=2e-3 * np.abs(value).max())


def test_rows_that_are_not_held_have_the_same_bits_on_threads_and_in_files(monkeypatch):
    monkeypatch.setattr(sampling, "MAX_ROW_BYTES", 0)
    dense = residual_net()
    one, *others = (
        repaired(dense, execution=Execution(Runtime(threads=threads), memory_limit=limit)).SerializeToString()
        for threads, limit in ((1, None), (3, None), (1, 0))
    )
    assert others == [one, one]


def test_rows_are_sampled_in_pieces_on_threads_with_the_same_bits(monkeypatch):
    dense = residual_net()
    one = repaired(dense, execution=Execution(Runtime(threads=1))).SerializeToString()
    monkeypatch.setattr(patches, "_PIECE_VALUES", 1)
    assert repaired(dense, execution=Execution(Runtime(threads=3))).SerializeToString() == one


def rows_seen(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[int]:
    seen: list[int] = []
    start = LayerRefit.__init__

    def counted(self: LayerRefit, x: np.ndarray, *rest: object, **options: object) -> None:
        seen.append(x.shape[0])
        start(self, x, *rest, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as context:
        context.setattr(LayerRefit, "__init__", counted)
        run()
    return seen


def test_rows_are_as_many_as_asked_for_whatever_is_held(monkeypatch):
    run = partial(repaired, residual_net())
    expected = rows_seen(monkeypatch, run)
    monkeypatch.setattr(sampling, "MAX_ROW_BYTES", 4 * 27 * 20)
    assert rows_seen(monkeypatch, run) == expected
    assert max(expected) == 16 * 64


def test_rows_that_outlast_their_source_are_held_within_the_limit(monkeypatch):
    network = Network.of(residual_net(), "dense", compared=True)
    chunk = {"x": images(16, seed=1)}
    calibration = Calibration((chunk,), 16, 16, "")
    points = [point for point in network.survey.points if isinstance(point, LayerPoint) and point.layer.is_convolution]
    monkeypatch.setattr(sampling, "MAX_ROW_BYTES", 4 * 27 * 48)
    found = list(sampling.dense_rows(network, points, RefitRecipe(), calibration, Execution()))
    assert found
    for sampler in found:
        assert sampler.is_held
        assert sampler.inputs.nbytes <= max(sampling.MAX_ROW_BYTES, sampler.inputs[:16].nbytes)  # one of every image
