"""Whether a model with fewer channels still computes the same, on random input.

The error of an output is ``|y - y'| / |y|``. Of values that are saturated it says nothing: float32 sigmoids of about
1e-7 are a few units of rounding, and those of about 1 hide what is in front of them. So where the graph ends in a
Sigmoid, a Softmax or the like, what these read is compared, and of their results, which are of the order of 1,
``|y - y'| / max(|y|, sqrt(n))``. Whatever error the same model shows between two optimisation levels of onnxruntime is
rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_asr.arrays import Array, Floats
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import ModelError
from onnx_asr.graph.index import GraphIndex, is_standard
from onnx_asr.graph.shapes import InputShapes
from onnx_asr.networks.fidelity import compared_outputs, not_finite, with_outputs
from onnx_asr.networks.latency import fed_with, random_feeds

MAX_ERROR, MAX_HALF_ERROR = 1e-5, 4e-3
"""Largest error that rounding always explains; the second for float16 weights."""
_NOISE = 10  # times the error between two optimisation levels is still rounding
_SATURATING = ("ArgMax", "Hardmax", "HardSigmoid", "LogSoftmax", "Sigmoid", "Softmax", "Tanh")
_ARRANGING = ("Cast", "Concat", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


class Reference:
    """A model run on standard normal input, or on its absolute values where more outputs are finite for these.

    Attributes:
        notes: What part of the outputs could not be compared, if any.

    Raises:
        ModelError: The model cannot be run, or puts out nothing but NaN and infinities.
        OptionError: When a shape does not fit the model.
    """

    def __init__(self, given: GraphIndex, runtime: Runtime, input_shapes: InputShapes | None = None) -> None:
        self._given, self._runtime, self._tensors = given, runtime, _Tensors.of(given)
        self._feeds = random_feeds(given, input_shapes)
        self._values = self._run(given.model, runtime)
        unknown = not_finite(self._values.values())
        if unknown:
            normal = self._feeds, self._values
            self._feeds = {name: np.abs(value) for name, value in self._feeds.items()}
            self._values = self._run(given.model, runtime)
            if not_finite(self._values.values()) >= unknown:
                self._feeds, self._values = normal
            unknown = not_finite(self._values.values())
        if unknown == 1:
            raise ModelError(
                "the given model puts out nothing but NaN or infinite values on random input, so no smaller one can be "
                "compared with it: look for the first node whose output is not finite"
            )
        self.notes = (
            f"{unknown:.1%} of what the given model puts out on random input is NaN or infinite; the smaller model was "
            "compared with it in the rest",
        )[: bool(unknown)]

    def error(self, smaller: onnx.ModelProto) -> float:
        """The largest error of a compared tensor.

        Raises:
            ModelError: It is more than rounding explains.
        """
        error = self._tensors.error(self._values, self._run(smaller, self._runtime))
        limit = MAX_HALF_ERROR if _holds_half(self._given.model.graph) else MAX_ERROR
        if not error <= limit:
            with suppress(ModelError):  # some models run in no other way than the usual one
                plain = self._run(self._given.model, replace(self._runtime, optimized=False))
                limit = max(limit, _NOISE * self._tensors.error(self._values, plain))
        if not error <= limit:
            raise ModelError(
                f"the smaller model's outputs differ from what they should be by {error:.2g} of their size on random "
                f"input, more than the {limit:.2g} that rounding explains, so it is not written: this is a bug, please "
                "report it with the output of 'inspect --json'"
            )
        return error

    def _run(self, model: onnx.ModelProto, runtime: Runtime) -> Mapping[str, Array]:
        with fed_with(self._feeds):
            return Session(with_outputs(model, self._tensors.names), runtime).run(self._feeds)


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a model that are compared.

    Attributes:
        sharp: Outputs, and what saturating operators at the end of the graph read.
        bounded: Outputs that come from these operators.
    """

    sharp: tuple[str, ...]
    bounded: tuple[str, ...]

    @classmethod
    def of(cls, index: GraphIndex) -> _Tensors:
        sharp, bounded = [], []
        for output in compared_outputs(index):
            front = _in_front(index, output)
            sharp += front or [output]
            bounded += [output] if front else []
        return cls(tuple(dict.fromkeys(sharp)), tuple(dict.fromkeys(bounded)))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.sharp, *self.bounded]))

    def error(self, expected: Mapping[str, Array], found: Mapping[str, Array]) -> float:
        """The largest error."""
        sharp = [_error(expected[name], found[name]) for name in self.sharp]
        bounded = [_error(expected[name], found[name], bounded=True) for name in self.bounded]
        return max([*sharp, *bounded], default=0.0)


def _in_front(index: GraphIndex, output: str) -> list[str]:
    """Tensors in front of the saturating operators that an output comes from, and of all that is joined with them."""
    front: dict[str, None] = {}
    found, pending = False, [output]
    while pending:
        name = pending.pop()
        position = index.producer.get(name)
        if position is None or name in front:
            continue
        node = index.nodes[position]
        if is_standard(node, *_SATURATING):
            found = True
            pending.append(node.input[0])
        elif is_standard(node, *_ARRANGING) and not index.is_constant(name):
            pending.extend(node.input if node.op_type == "Concat" else node.input[:1])
        else:
            front[name] = None
    return list(front) if found else []


def _holds_half(graph: onnx.GraphProto) -> bool:
    """Whether any constant is float16."""
    tensors = [*graph.initializer, *(item.values for item in graph.sparse_initializer)]
    for node in graph.node:
        if is_standard(node, "Constant"):
            tensors += [value for item in node.attribute for value in (item.t, item.sparse_tensor.values)]
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in tensors)


def _error(expected: Array, found: Array, bounded: bool = False) -> float:
    """The error of a tensor where the expected values are finite; of integers the share of unequal ones."""
    if expected.shape != found.shape:
        return float("inf")
    if not np.issubdtype(expected.dtype, np.floating):
        return 0.0 if bounded else float(np.mean(expected != found))
    exact: Floats = expected.astype(np.float64)
    finite = np.isfinite(exact)
    if not finite.all():
        exact, found = exact[finite], found[finite]
    size = float(np.linalg.norm(exact))
    if bounded:
        size = max(size, exact.size**0.5)
    return float(np.linalg.norm(exact - found)) / (size or 1.0)
