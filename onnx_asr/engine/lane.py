"""A network run over the whole calibration set, segment by segment.

A lane is one network part-way through its forward pass on every calibration chunk at once: it holds only the tensors
that some later node still reads. ``advance`` cuts out the nodes between what is held and the tensors asked for, runs
that segment over all chunks, and releases tensors that are no longer needed. Parameters changed in the lane's plan take
effect in the next segment that holds their node, so every node runs once, with everything upstream already repaired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx

from onnx_asr.arrays import Array, Floats
from onnx_asr.engine.buffers import BufferPool
from onnx_asr.engine.session import Runtime, Session, owned
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.index import GraphIndex, ancestors, node_reads
from onnx_asr.graph.segments import Boundary, extract

Chunk = dict[str, Array]
"""Tensors of some samples, by name."""


class Lane:
    """One network on its way through the calibration set.

    Args:
        index: The network.
        targets: Every tensor to be requested, repeated once per request, in any order.
        chunks: The graph inputs per chunk; the arrays are only read.
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
        self._held = {value.name: [chunk[value.name] for chunk in chunks] for value in index.inputs}
        self._count = len(chunks)

    def _is_constant(self, position: int) -> bool:
        return all(self.index.is_constant(name) for name in self.index.nodes[position].output if name)

    def advance(self, targets: Iterable[str]) -> Iterator[Chunk]:
        """Run up to ``targets`` and yield them chunk by chunk.

        The arrays yielded belong to the lane: they may be changed in place (the change is what later segments see) and
        are only valid until the iterator goes on, unless a later node or target needs them.
        """
        counts = Counter(targets)
        asked = list(counts)
        positions = ancestors(self.index, asked, stop=self._held)
        self._remaining -= positions
        self._wanted -= counts
        inputs, outputs = self._edges(positions, asked)
        session = self._session(positions, inputs, outputs) if outputs else None
        fresh: dict[str, list[Array]] = {name: [] for name in outputs}

        def chunks_of(name: str) -> list[Array]:
            return (fresh if name in fresh else self._held)[name]

        for number in range(self._count):
            if session is not None:
                feeds = {name: self._held[name][number] for name in inputs}
                for name, array in session.run(feeds, outputs, self._pool.allocate).items():
                    fresh[name].append(array)
                del feeds
                for name in inputs:
                    if name not in asked:
                        self._put_away(name, self._held[name], number)
            yield {name: chunks_of(name)[number] for name in asked}
            for name in dict.fromkeys([*outputs, *asked]):
                self._put_away(name, chunks_of(name), number)
        self._held.update(fresh)
        for name in [*inputs, *asked]:
            if not self._is_needed(name):
                self._held.pop(name, None)

    def _edges(self, positions: set[int], asked: Sequence[str]) -> tuple[list[str], list[str]]:
        """Held tensors that the nodes read, and outputs that are requested or needed later."""
        reads = {name for position in positions for name in node_reads(self.index.nodes[position])}
        produced = {name for position in positions for name in self.index.nodes[position].output if name}
        needed = {name for name in produced if self._is_needed(name)}
        return [name for name in self._held if name in reads], sorted(needed | (produced & set(asked)))

    def transform(self, name: str, gain: Floats, shift: Floats, axis: int) -> None:
        """Replace a held tensor by ``gain * tensor + shift`` per channel, in place: its producer's new parameters."""
        for array in self._held.get(name, ()):
            shape = [1] * array.ndim
            shape[axis] = -1
            kind = np.promote_types(array.dtype, np.float32)  # in float16, gain * tensor alone may be too large
            with np.errstate(over="ignore"):  # whoever measures the next tensors sees what became infinite
                array[...] = array * gain.reshape(shape).astype(kind) + shift.reshape(shape).astype(kind)
            self._pool.set_aside(array)

    def replace(self, position: int, function: Callable[[int, Array], Array]) -> None:
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
        arrays = []
        for number, array in enumerate(self._held[source]):
            value = function(number, array)
            arrays.append(owned(value, self._pool.allocate))
            self._pool.set_aside(arrays[-1])
            self._put_away(source, self._held[source], number)
        self._held[output] = arrays
        if not self._is_needed(source):
            del self._held[source]

    def _is_needed(self, name: str) -> bool:
        """Whether a node still to run reads the tensor, or a later advance requests it."""
        readers = self.index.consumers.get(name, ())
        return not self.index.is_constant(name) and (name in self._wanted or not self._remaining.isdisjoint(readers))

    def _put_away(self, name: str, arrays: list[Array], number: int) -> None:
        """Set a chunk's array aside, or release it."""
        if self._is_needed(name):
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


def _boundary(arrays: Sequence[Array]) -> Boundary:
    """Element type, and the dimensions that all chunks share (the first one left open: the last chunk may be short)."""
    first = arrays[0]
    element_type = int(onnx.helper.np_dtype_to_tensor_dtype(first.dtype))
    if any(array.ndim != first.ndim for array in arrays):
        return Boundary(element_type, None)
    sizes = [{array.shape[axis] for array in arrays} for axis in range(first.ndim)]
    return Boundary(element_type, tuple(min(own) if axis and len(own) == 1 else None for axis, own in enumerate(sizes)))
