"""Latency by a clock that the tests move, and the inputs it is measured on."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
import onnx_asr.networks.latency as latency
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import ModelError, OptionError
from onnx_asr.graph.shapes import fed_shapes
from onnx_asr.networks.cost import cost
from onnx_asr.networks.latency import Latency, measure_latency, random_feeds, time_in_turns
from onnx_asr.networks.operations import Probe
from tests.graphs import index, net, run


def weights(model: onnx.ModelProto) -> int:
    return sum(math.prod(item.dims) for item in model.graph.initializer)


def wide() -> onnx.ModelProto:
    return net(
        "g (float[N,3,H,W] x, int64[1] k) => (y) { a = Conv <pads=[1,1,1,1]> (x, wa) b = Relu (a) "
        "y = Conv <pads=[1,1,1,1]> (b, wy) }",
        wa=(256, 3, 3, 3),
        wy=(8, 256, 3, 3),
    )


def test_open_sizes_are_filled_in_or_given() -> None:
    found = index(wide())
    assert fed_shapes(found) == {"x": (1, 3, 224, 224), "k": (1,)}
    given = {"x": [2, 3, 16, 24]}
    assert fed_shapes(found, given)["x"] == (2, 3, 16, 24)
    feeds = random_feeds(found, given)
    assert {name: value.shape for name, value in feeds.items()} == {"x": (2, 3, 16, 24), "k": (1,)}
    assert feeds["k"].dtype == np.int64
    assert run(wide(), feeds)["y"].shape == (2, 8, 16, 24)
    assert cost(found, Probe(given)).flops == 2 * 2 * 16 * 24 * 9 * (256 * 3 + 8 * 256)
    for shape in ([2, 4, 16, 24], [2, 3, 16], [0, 3, 16, 24]):
        with pytest.raises(OptionError, match="input 'x' cannot have shape"):
            fed_shapes(found, {"x": shape})


class Clock:
    """A clock that moves only where a test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)


def test_latencies_are_those_of_the_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes a second per thousand parameters; an eighth of the inner channels is left."""
    clock = Clock(monkeypatch)

    class Timed(Session):
        def __init__(self, model: onnx.ModelProto, runtime: Runtime) -> None:
            super().__init__(model, runtime)
            self.seconds = weights(model) / 1000

        def run(self, feeds: Any, *rest: Any) -> Any:
            clock.now += self.seconds
            return super().run(feeds, *rest)

    monkeypatch.setattr(latency, "Session", Timed)
    model, given = wide(), {"x": [1, 3, 16, 16]}
    smaller = onnx_asr.prune_channels(model, onnx_asr.ChannelPruneOptions(0.875), input_shapes=given).model
    found = measure_latency(model, smaller, input_shapes=given, seconds=0)
    assert (weights(model), weights(smaller)) == (9 * 256 * (3 + 8), 9 * 32 * (3 + 8))
    assert found.seconds_before == pytest.approx(25.344)
    assert found.seconds_after == pytest.approx(25.344 / 8)
    assert (found.low, found.ratio, found.high) == pytest.approx((0.125, 0.125, 0.125))
    assert found.shapes == {"x": (1, 3, 16, 16), "k": (1,)}


@pytest.mark.parametrize(("seconds", "pairs"), [(0.0, 9), (59.0, 18), (60.1, 19), (1e6, 398)])
def test_runs_are_taken_in_turns_for_the_time_that_is_given(
    seconds: float, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of the first take two seconds, runs of the second take one."""
    clock, order = Clock(monkeypatch), []

    class Fake:
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def run(self, feeds: Any) -> None:
            order.append(self.name)
            clock.now += self.seconds

    found = time_in_turns(Fake("a", 2.0), Fake("b", 1.0), {}, seconds)  # type: ignore[arg-type]
    assert order == ["a", "b"] * (pairs + 2)  # two to warm up
    assert found == Latency(2.0, 1.0, 0.5, 0.5, 0.5, pairs, {})


def test_the_ratio_is_a_median_over_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine slows down threefold half-way, and one pair is disturbed."""
    clock, run_number = Clock(monkeypatch), itertools.count()

    class Fake:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def run(self, feeds: Any) -> None:
            number = next(run_number)
            clock.now += self.seconds * (3 if number >= 12 else 1) * (100 if number == 9 else 1)

    found = time_in_turns(Fake(2.0), Fake(1.0), {}, 0)  # type: ignore[arg-type]
    assert (found.low, found.ratio, found.high) == (0.5, 0.5, 0.5)
    assert (found.seconds_before, found.seconds_after) == (6.0, 3.0)


def test_a_shape_that_the_model_does_not_take_is_named() -> None:
    body = "g (float[N,3,H,W] x) => (y) { t = Reshape (x, shape) y = Conv (t, wy) }"
    model = net(body, shape=np.array([1, 3, 10, 10]), wy=(2, 3, 1, 1))
    with pytest.raises(ModelError, match=r"x:1,3,224,224.*--input-shapes"):
        measure_latency(model, model)
    assert measure_latency(model, model, input_shapes={"x": [1, 3, 10, 10]}, seconds=0).pairs == 9


def test_shapes_beyond_memory_are_refused() -> None:
    huge = index(net(f"g (float[{2**40},3,4,4] x) => (float y) {{ y = Conv (x, w) }}", w=(3, 3, 1, 1)))
    with pytest.raises(ModelError, match=r"input 'x' of shape \[1099511627776, 3, 4, 4\] does not fit into memory"):
        random_feeds(huge)
