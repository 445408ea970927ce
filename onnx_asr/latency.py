"""Latency of a pruned model against that of the dense one, on random input."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_asr.calibration import Chunk, input_specs
from onnx_asr.engine.latency import Latency, time_in_turns
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import ModelError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.shapes import InputShapes, fed_shapes
from onnx_asr.model_io import ModelSource, load

SECONDS = 3.0
"""About what a measurement takes."""


def random_feeds(index: GraphIndex, input_shapes: InputShapes | None = None) -> Chunk:
    """Standard normal values, and integers 0 and 1, of :func:`onnx_asr.graph.shapes.fed_shapes`."""
    generator = np.random.default_rng(0)
    shapes = fed_shapes(index, input_shapes)
    feeds = {}
    for spec in input_specs(index):
        shape = shapes[spec.name]
        floating = np.issubdtype(spec.dtype, np.floating)
        values = generator.standard_normal(shape) if floating else generator.integers(0, 2, shape)
        feeds[spec.name] = values.astype(spec.dtype)
    return feeds


class Stopwatch:
    """A dense model that is loaded once, to time others against it.

    Raises:
        ModelError: When onnxruntime cannot run the model.
        OptionError: When a shape does not fit the model.
    """

    def __init__(self, dense: GraphIndex, runtime: Runtime | None = None, input_shapes: InputShapes | None = None):
        self._runtime = runtime or Runtime()
        self._feeds = random_feeds(dense, input_shapes)
        self._session = Session(dense.model, self._runtime)
        try:
            self._session.run(self._feeds)
        except ModelError as error:
            shapes = " ".join(f"{name}:{','.join(map(str, value.shape))}" for name, value in self._feeds.items())
            raise ModelError(
                f"{error}; it was fed with {shapes}: give shapes that it takes (--input-shapes)"
            ) from error

    def time(self, model: onnx.ModelProto, seconds: float = SECONDS) -> Latency:
        """Run the dense model and another one in turns, on the same random input."""
        return time_in_turns(self._session, Session(model, self._runtime), self._feeds, seconds)


def measure_latency(
    dense: ModelSource,
    pruned: ModelSource,
    *,
    input_shapes: InputShapes | None = None,
    runtime: Runtime | None = None,
    seconds: float = SECONDS,
) -> Latency:
    """Time two models in onnxruntime, run in turns on the same random input.

    Args:
        dense: Path or ModelProto.
        pruned: Path or ModelProto with the same inputs.
        input_shapes: Shapes of inputs that leave sizes open; else their batch is 1 and their other open sizes are 224.
        runtime: Execution providers and threads, as the models are to be run with.
        seconds: About what it takes; 9 pairs are run in any case.

    Raises:
        ModelError: Not an ONNX model, or onnxruntime cannot run it.
        OptionError: When a shape does not fit the model.
    """
    return Stopwatch(GraphIndex.of(load(dense)), runtime, input_shapes).time(load(pruned), seconds)
