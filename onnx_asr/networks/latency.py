"""Latency of a pruned model against that of the dense one, on random input."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_asr.arrays import Array
from onnx_asr.engine.lane import Chunk
from onnx_asr.engine.loading import load
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import ModelError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource
from onnx_asr.graph.shapes import InputShapes, fed_shapes, shapes_text
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.samples import input_specs

SECONDS = 3.0  # about what a measurement takes
_WARM_UP = 2  # pairs: the first runs allocate
_LEAST_PAIRS, _MOST_PAIRS = 9, 400


@dataclass(frozen=True)
class Latency:
    """Run times of two models, measured in pairs, so that other load on the machine affects both alike.

    Attributes:
        seconds_before: Median run time of the first model.
        seconds_after: Median run time of the second.
        ratio: Median over the pairs of the second's time by the first's.
        low: The ratio that a quarter of the pairs stays below.
        high: The ratio that a quarter of the pairs exceeds.
        pairs: Number of pairs.
        shapes: Shapes of the inputs.
    """

    seconds_before: float
    seconds_after: float
    ratio: float
    low: float
    high: float
    pairs: int
    shapes: dict[str, tuple[int, ...]]


def time_in_turns(first: Session, second: Session, feeds: Mapping[str, Array], seconds: float) -> Latency:
    """Run two models alternately for about ``seconds`` seconds: at least 9 pairs and at most 400."""
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < _WARM_UP + _LEAST_PAIRS or (len(times) < _MOST_PAIRS and time.perf_counter() < end):
        times.append((_timed(first, feeds), _timed(second, feeds)))
    pairs = np.array(times[_WARM_UP:])
    before, after = np.median(pairs, axis=0).tolist()
    low, ratio, high = np.quantile(pairs[:, 1] / pairs[:, 0], (0.25, 0.5, 0.75)).tolist()
    shapes = {name: value.shape for name, value in feeds.items()}
    return Latency(before, after, ratio, low, high, len(pairs), shapes)


def _timed(session: Session, feeds: Mapping[str, Array]) -> float:
    started = time.perf_counter()
    session.run(feeds)
    return time.perf_counter() - started


def random_feeds(index: GraphIndex, input_shapes: InputShapes | None = None) -> Chunk:
    """Standard normal values, and integers 0 and 1, of :func:`onnx_asr.graph.shapes.fed_shapes`.

    Raises:
        ModelError: When they do not fit into memory.
    """
    generator = np.random.default_rng(0)
    shapes = fed_shapes(index, input_shapes)
    feeds = {}
    for spec in input_specs(index):
        shape = shapes[spec.name]
        floating = np.issubdtype(spec.dtype, np.floating)
        try:
            values = generator.standard_normal(shape) if floating else generator.integers(0, 2, shape)
        except (MemoryError, ValueError) as error:  # numpy counts in 64 bits
            raise ModelError(
                f"input '{spec.name}' of shape {list(shape)} does not fit into memory: give smaller shapes "
                "(--input-shapes), or export the model with others"
            ) from error
        feeds[spec.name] = values.astype(spec.dtype)
    return feeds


@contextmanager
def fed_with(feeds: Chunk) -> Iterator[None]:
    """Add what a model is fed with to the error of a block that loads it and runs it on :func:`random_feeds`.

    Raises:
        ModelError: When onnxruntime cannot load it or run it.
    """
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"{error}; it was fed with {shapes_text(feeds)}: give shapes that it takes (--input-shapes)"
        ) from error


class Stopwatch:
    """A dense model that is loaded once, to time others against it.

    Raises:
        ModelError: When onnxruntime cannot run the model.
        OptionError: When a shape does not fit the model.
    """

    def __init__(self, dense: GraphIndex, runtime: Runtime | None = None, input_shapes: InputShapes | None = None):
        self._runtime = runtime or Runtime()
        self._feeds = random_feeds(dense, input_shapes)
        with fed_with(self._feeds):
            self._session = Session(dense.model, self._runtime)
            self._session.run(self._feeds)

    def time(self, model: onnx.ModelProto, seconds: float = SECONDS) -> Latency:
        """Run the dense model and another one in turns, on the same random input."""
        return time_in_turns(self._session, Session(model, self._runtime), self._feeds, seconds)


def measure_latency(
    dense: ModelSource,
    pruned: ModelSource,
    *,
    input_shapes: InputShapes | None = None,
    seconds: float = SECONDS,
    execution: Execution | None = None,
) -> Latency:
    """Time two models in onnxruntime, run in turns on the same random input.

    Args:
        dense: A path, or an object of onnx, onnx-graphsurgeon or onnx-ir.
        pruned: Another one with the same inputs.
        input_shapes: Shapes of inputs with open sizes; by default their batch is 1 and their other open sizes are 224.
        seconds: Approximate duration; at least 9 pairs are run.
        execution: Execution providers and threads, as the models are to be run with.

    Raises:
        ModelError: Not an ONNX model, or onnxruntime cannot run it.
        OptionError: When a shape does not fit the model.
    """
    runtime = (execution or Execution()).runtime
    return Stopwatch(GraphIndex.of(load(dense)), runtime, input_shapes).time(load(pruned), seconds)
