"""How many samples a network takes at once, and along which axis.

Exporters write the batch size of their example into a Reshape, an Expand or the first state of a recurrent layer, and
yet declare an open one. What a graph takes is therefore tried on a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import onnx

from onnx_asr.data import Dataset, InputSpec
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import ModelError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.shapes import Shape, written_batches
from onnx_asr.networks.fidelity import compared_outputs, with_outputs
from onnx_asr.networks.samples import feeds, fixed_batch, input_specs

_PROBES = (3, 5, 7, 11)
"""Batch sizes that are rarely written into a graph."""

Dim = int | str
"""A declared dimension: its size, or its name, which may be empty."""


def sampled_inputs(index: GraphIndex) -> list[InputSpec]:
    """The inputs of a network that is fed with samples along their first axes.

    Raises:
        ModelError: As :func:`input_specs`; when the samples of an input lie along another axis, or the first axes of
            two inputs have different fixed sizes.
    """
    specs = input_specs(index)
    outputs, inputs = ([_dims(value) for value in values] for values in (index.model.graph.output, index.inputs))
    for number, (spec, dims) in enumerate(zip(specs, inputs, strict=True)):
        others = {other[0] for other in [*inputs[:number], *inputs[number + 1 :]] if other}
        results = {other[0] for other in outputs if other}
        for axis, dim in enumerate(dims[1:], start=1):
            named = _is_batch(dim) and not _is_batch(dims[0])
            shared = dim and isinstance(dim, str) and isinstance(dims[0], int)
            if named or (shared and (dim in others or (dim in results and dims[0] != 1))):
                raise _misplaced(spec, [dim or "?" for dim in dims], f"axis {axis} is that of the samples")
    firsts = {spec.name: dims[0] for spec, dims in zip(specs, inputs, strict=True) if dims and isinstance(dims[0], int)}
    if len(set(firsts.values())) > 1:
        sizes = ", ".join(f"{size} of '{name}'" for name, size in firsts.items())
        raise ModelError(
            f"the first axes of the model's inputs have different fixed sizes ({sizes}), and samples have to lie along "
            "the first axis of each: export the model with one batch size, or put a Transpose in front"
        )
    return specs


def settled_inputs(index: GraphIndex, data: Dataset, runtime: Runtime, asked: int | None) -> list[InputSpec]:
    """The inputs of a network, with the batch size that its graph holds where it takes no other one.

    Tried are a size that nothing suggests, then the one that the user asks for, 1, and those written into the graph.

    Raises:
        ModelError: When onnxruntime runs the network on none of them, or when its samples lie along another axis.
        DataError: When the first sample is broken.
    """
    specs, trial = sampled_inputs(index), _Trial(index, data, runtime)
    declared = fixed_batch(specs)
    if declared is not None:
        trial.check_first_axis(specs, declared)
        return specs
    written = written_batches(index)
    probe = next((size for size in _PROBES if size not in written), _PROBES[0])
    sizes = list(dict.fromkeys(filter(None, (probe, asked, 1, *written))))
    for size in sizes:
        if trial.takes(size):
            return specs if size == probe else [replace(spec, shape=(size, *spec.shape[1:])) for spec in specs]
    raise ModelError(f"{trial.errors[1]} (tried were batches of {', '.join(map(str, sizes))})")


@dataclass(frozen=True)
class _Trial:
    """Runs of a network on its first sample, repeated."""

    index: GraphIndex
    data: Dataset
    runtime: Runtime

    @cached_property
    def errors(self) -> dict[int, ModelError]:
        """Why batches failed, by their size."""
        return {}

    def takes(self, size: int) -> bool:
        """Whether the network runs on a batch of this size and does not join its samples."""
        session = self._session  # one that cannot be loaded is an error of its own
        try:
            shapes = self._run(session, size)
        except ModelError as error:
            self.errors[size] = error
            return False
        return size == 1 or any(_has_batch(shape, size) for shape in shapes)

    def check_first_axis(self, specs: Sequence[InputSpec], declared: int) -> None:
        """Refuse a network whose fixed first axis shows in no output, while another axis does.

        Raises:
            ModelError: When its samples lie along that other axis.
        """
        opened = [spec for spec in specs if declared > 1 and None in spec.shape[1:]]
        if not opened:
            return
        try:
            shapes = self._run(self._session, declared)
        except ModelError:
            return  # the run that needs it has more to say
        if any(_has_batch(shape, declared) for shape in shapes):
            return
        sample = self.data.load(0)
        for spec in opened:
            for axis, (size, length) in enumerate(zip(spec.shape[1:], sample[spec.name].shape, strict=True), start=1):
                if size is None and any(shape and shape[0] == length for shape in shapes):
                    dims = ["?" if length is None else length for length in spec.shape]
                    raise _misplaced(spec, dims, f"the outputs have one entry per place along axis {axis}")

    def _run(self, session: Session, size: int) -> list[Shape]:
        batch = self.data.batch([0] * size)
        return [value.shape for value in session.run(feeds(input_specs(self.index), batch)).values()]

    @cached_property
    def _session(self) -> Session:
        return Session(with_outputs(self.index.model, compared_outputs(self.index)), self.runtime)


def _misplaced(spec: InputSpec, dims: Sequence[Dim], why: str) -> ModelError:
    return ModelError(
        f"model input '{spec.name}' has shape [{', '.join(map(str, dims))}], and {why}: samples have to lie along the "
        "first axis; export the model that way, or put a Transpose in front"
    )


def _dims(value: onnx.ValueInfoProto) -> list[Dim]:
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]


def _is_batch(dim: Dim) -> bool:
    return isinstance(dim, str) and "batch" in dim.lower()


def _has_batch(shape: Shape, size: int) -> bool:
    """Whether an output has an axis of the batch, or its first axis holds a multiple of it."""
    return size in shape or (len(shape) > 0 and shape[0] > 0 and shape[0] % size == 0)
