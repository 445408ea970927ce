"""A network run over the whole calibration set, segment by segment.

A lane is one network part-way through its forward pass on every calibration chunk at once: it holds only the tensors
that some later node still reads. ``advance`` cuts out the nodes between what is held and the tensors asked for, runs
that segment over all chunks, and lets go of what nobody needs any more. Parameters changed in the lane's plan take
effect in the next segment that holds their node, so every node runs once, with everything upstream already repaired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.engine.buffers import BufferPool
from onnx_asr.engine.session import Runtime, Session, owned
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.index import GraphIndex, ancestors, node_reads
from onnx_asr.graph.segments import Boundary, extract

Chunk = dict[str, NDArray[Any]]
"""Tensors of some samples, by name."""


@dataclass(frozen=True)
class _Segment:
    """The nodes that one advance runs.

    Attributes:
        session: The nodes, loaded; None where everything that is asked for is held already.
        inputs: Held tensors that the nodes read.
        outputs: What the session is to give.
        asked: Tensors that the caller is to see.
        spent: Inputs that neither the caller nor a later node needs.
    """

    session: Session | None
    inputs: list[str]
    outputs: list[str]
    asked: list[str]
    spent: list[str]


class Lane:
    """One network on its way through the calibration set.

    Args:
        index: The network.
        targets: Every tensor that will be asked for, as often as it will be, in any order.
        chunks: The graph inputs, one mapping a chunk; the arrays are only read.
        pool: Where boundary tensors live.
        runtime: How to run.
        plan: Edits that the segments see; the caller adds to it between advances.
    """

    def __init__(
        self,
        index: GraphIndex,
        targets: Iterable[str],
        chunks: Sequence[Chunk],
        pool: BufferPool,
        runtime: Runtime,
        plan: EditPlan | None = None,
    ) -> None:
        self.index = index
        self.plan = plan if plan is not None else EditPlan()
        self._pool = pool
        self._runtime = runtime
        self._wanted = Counter(targets)
        self._remaining = {p for p in ancestors(index, self._wanted) if not self._is_constant(p)}
        self._held: dict[str, list[NDArray[Any]]] = {
            name: [chunk[name] for chunk in chunks] for name in (value.name for value in index.inputs)
        }
        self._count = len(chunks)

    def _is_constant(self, position: int) -> bool:
        return all(self.index.is_constant(name) for name in self.index.nodes[position].output if name)

    def advance(self, targets: Iterable[str]) -> Iterator[Chunk]:
        """Run up to ``targets`` and yield them chunk by chunk.

        The arrays yielded belong to the lane: they may be changed in place (the change is what later segments see) and
        are only valid until the iterator goes on, unless a later node or target needs them.
        """
        segment = self._segment(Counter(targets))
        fresh: dict[str, list[NDArray[Any]]] = {name: [] for name in segment.outputs}

        def chunks_of(name: str) -> list[NDArray[Any]]:
            return (fresh if name in fresh else self._held)[name]

        for number in range(self._count):
            self._run(segment, number, fresh)
            yield {name: chunks_of(name)[number] for name in segment.asked}
            for name in dict.fromkeys([*segment.outputs, *segment.asked]):
                self._put_away(chunks_of(name), number, keep=self._is_needed(name))
        self._held.update(fresh)
        for name in [*segment.spent, *segment.asked]:
            if not self._is_needed(name):
                self._held.pop(name, None)

    def _segment(self, targets: Counter[str]) -> _Segment:
        """The nodes between what is held and the targets; from here on they count as run."""
        asked = list(targets)
        positions = ancestors(self.index, asked, stop=self._held)
        self._remaining -= positions
        self._wanted -= targets
        reads = {name for position in positions for name in node_reads(self.index.nodes[position])}
        inputs = [name for name in self._held if name in reads]
        produced = {name for position in positions for name in self.index.nodes[position].output if name}
        outputs = sorted({name for name in produced if self._is_needed(name)} | (produced & set(asked)))
        spent = [name for name in inputs if not self._is_needed(name) and name not in asked]
        session = self._session(positions, inputs, outputs) if outputs else None
        return _Segment(session, inputs, outputs, asked, spent)

    def _run(self, segment: _Segment, number: int, fresh: dict[str, list[NDArray[Any]]]) -> None:
        """Run a segment on one chunk and put away what it has read."""
        if segment.session is None:
            return
        feeds = {name: self._held[name][number] for name in segment.inputs}
        for name, array in segment.session.run(feeds, segment.outputs, self._pool.allocate).items():
            fresh[name].append(array)
        for name in segment.inputs:
            if name not in segment.asked:
                self._put_away(self._held[name], number, keep=name not in segment.spent)

    def transform(self, name: str, gain: NDArray[np.float64], shift: NDArray[np.float64], axis: int) -> None:
        """Replace a held tensor by ``gain * tensor + shift`` per channel, in place: its producer's new parameters."""
        for array in self._held.get(name, ()):
            shape = [1] * array.ndim
            shape[axis] = -1
            kind = np.promote_types(array.dtype, np.float32)  # in float16, gain * tensor alone may be too large
            with np.errstate(over="ignore"):  # whoever measures the next tensors sees what became infinite
                array[...] = array * gain.reshape(shape).astype(kind) + shift.reshape(shape).astype(kind)
            self._pool.set_aside(array)

    def replace(self, position: int, function: Callable[[int, NDArray[Any]], NDArray[Any]]) -> None:
        """Compute a node here instead of in the next segment, from chunk number and input chunk.

        The node has one output, and one input that is not a constant: its first.
        """
        node = self.index.nodes[position]
        source, *parameters = node.input
        (output,) = (name for name in node.output if name)
        assert all(self.index.is_constant(name) for name in parameters if name)
        self._remaining.discard(position)
        if not self._is_needed(output):
            return
        keep = self._is_needed(source)
        arrays = []
        for number, array in enumerate(self._held[source]):
            value = function(number, array)
            arrays.append(owned(value, self._pool.allocate))
            self._pool.set_aside(arrays[-1])
            self._put_away(self._held[source], number, keep)
        self._held[output] = arrays
        if not keep:
            del self._held[source]

    def _is_needed(self, name: str) -> bool:
        """Whether a node still to run reads the tensor, or a later advance asks for it."""
        if self.index.is_constant(name):
            return False
        if name in self._wanted:
            return True
        return any(position in self._remaining for position in self.index.consumers.get(name, ()))

    def _put_away(self, arrays: list[NDArray[Any]], number: int, keep: bool) -> None:
        """A chunk's array is not used for a while, or not used any more."""
        if keep:
            self._pool.set_aside(arrays[number])
        else:
            array, arrays[number] = arrays[number], np.empty(0, np.uint8)
            self._pool.release(array)

    def _session(self, positions: set[int], inputs: Sequence[str], outputs: Sequence[str]) -> Session:
        boundary = {name: _boundary(self._held[name]) for name in inputs}
        model = extract(self.index, positions, boundary, outputs, self.plan)
        first, last = (self.index.label(position) for position in (min(positions), max(positions)))
        name = f"the part of the model up to '{outputs[-1]}' (nodes {first} to {last})"
        return Session(model, self._runtime, name)


def _boundary(arrays: Sequence[NDArray[Any]]) -> Boundary:
    """Element type, and the dimensions that all chunks share (the first one left open: the last chunk may be short)."""
    first = arrays[0]
    element_type = int(onnx.helper.np_dtype_to_tensor_dtype(first.dtype))
    if any(array.ndim != first.ndim for array in arrays):
        return Boundary(element_type, None)
    shape: list[int | None] = list(first.shape)
    for axis in range(first.ndim):
        if axis == 0 or any(array.shape[axis] != first.shape[axis] for array in arrays):
            shape[axis] = None
    return Boundary(element_type, tuple(shape))
