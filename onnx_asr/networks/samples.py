"""Model inputs, and calibration data in chunks that fit them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnx_asr.arrays import Integers
from onnx_asr.data import Dataset, InputSpec
from onnx_asr.engine.lane import Chunk
from onnx_asr.errors import DataError, ModelError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.tensors import dtype_of

_MIN_BATCH, _MAX_BATCH = 8, 64
_BATCH_ELEMENTS = 8 * 3 * 224 * 224


def input_specs(index: GraphIndex) -> list[InputSpec]:
    """Name, dtype and shape of the graph inputs that are not initializers.

    Raises:
        ModelError: When an input is not a tensor, its number of axes is not declared, or its element type unknown.
    """
    specs = []
    for value in index.inputs:
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"model input '{value.name}' is not a tensor; only tensor inputs can be fed with data")
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            raise ModelError(
                f"model input '{value.name}' does not declare its axes; export the model with a shape for its inputs, "
                "dynamic sizes included"
            )
        dims = tensor.shape.dim
        shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in dims)
        specs.append(InputSpec(value.name, dtype_of(tensor.elem_type, f"model input '{value.name}'"), shape))
    return specs


def fixed_batch(specs: Sequence[InputSpec]) -> int | None:
    """The batch size that a model fixes; None where it is dynamic."""
    return next((spec.shape[0] for spec in specs if spec.shape and spec.shape[0] is not None), None)


def batch_size_for(specs: Sequence[InputSpec], asked: int | None = None) -> int:
    """Samples per run: the fixed batch size, else the given one, else 8 to 64 by input size.

    The choice depends on the model alone, so that results do not depend on the machine.
    """
    given = fixed_batch(specs) or asked
    if given is not None:
        return given
    elements = max(1, math.prod(size or 32 for size in specs[0].shape[1:]))
    return int(min(_MAX_BATCH, max(_MIN_BATCH, 2 ** int(math.log2(max(1, _BATCH_ELEMENTS // elements))))))


def whole_batches(indices: Integers, *inputs: Sequence[InputSpec]) -> Integers:
    """Drop the last samples so that whole batches remain for every model with a fixed batch size.

    Raises:
        DataError: When not even one batch is left.
    """
    step = math.lcm(*(fixed_batch(specs) or 1 for specs in inputs))
    usable = len(indices) - len(indices) % step
    if usable == 0:
        raise DataError(
            f"{len(indices)} samples do not fill one batch: the model fixes batches of {step}; "
            f"give at least {step} samples, or export the model with a dynamic batch axis"
        )
    return indices[:usable]


def feeds(specs: Sequence[InputSpec], batch: Chunk) -> Chunk:
    """A batch under the names and in the types of a model's inputs, assigned to them by order.

    Raises:
        DataError: When there are more or fewer arrays than inputs.
    """
    if len(batch) != len(specs):
        wanted, given = (", ".join(map(repr, names)) for names in ([spec.name for spec in specs], batch))
        raise DataError(f"the model's inputs are {wanted}, the data hold {given}: give one array for each input")
    return {spec.name: value.astype(spec.dtype, copy=False) for spec, value in zip(specs, batch.values(), strict=True)}


@dataclass(frozen=True)
class Calibration:
    """Calibration samples in chunks, ready to run.

    Attributes:
        chunks: Arrays by input name, per chunk; every chunk but the last has ``batch_size`` samples.
        count: Number of samples.
        batch_size: Samples per chunk.
        digest: SHA-256 over the prepared samples in order, whatever the chunks.
        seen: What dense detectors find in the samples, by the models' identity, once it is known.
    """

    chunks: tuple[Chunk, ...]
    count: int
    batch_size: int
    digest: str
    seen: dict[int, tuple[object, Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Memory that the chunks take."""
        return sum(value.nbytes for chunk in self.chunks for value in chunk.values())

    def head(self, count: int) -> Calibration:
        """The first chunks, as many as hold ``count`` samples (at least one)."""
        number = max(1, math.ceil(count / self.batch_size))
        chunks = self.chunks[:number]
        return Calibration(chunks, min(self.count, number * self.batch_size), self.batch_size, self.digest, self.seen)


def load_calibration(data: Dataset, indices: Integers, batch_size: int) -> Calibration:
    """Prepare samples in chunks of ``batch_size``, the last of which may be shorter.

    Raises:
        DataError: When a sample is broken or the samples differ in size.
    """
    sha = hashlib.sha256()
    chunks = []
    for start in range(0, len(indices), batch_size):
        chunk = data.batch(indices[start : start + batch_size])
        for row in range(len(next(iter(chunk.values())))):
            for value in chunk.values():
                sha.update(np.ascontiguousarray(value[row]).tobytes())
        chunks.append(chunk)
    return Calibration(tuple(chunks), len(indices), batch_size, sha.hexdigest())
