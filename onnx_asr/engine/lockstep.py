"""Walk one network, or a dense and a pruned one in lockstep, over the whole calibration set, segment by segment.

A lane is one network part-way through its forward pass on every calibration chunk at once: it holds only the tensors
that some later node still reads. ``advance`` cuts out the nodes between what is held and the tensors asked for, runs
that segment over all chunks, and lets go of what nobody needs any more. Parameters changed in the lane's plan take
effect in the next segment that holds their node, so every node runs once, with everything upstream already repaired.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.engine.session import Runtime, Session, owned
from onnx_asr.errors import OutputError
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.index import GraphIndex, ancestors, node_reads
from onnx_asr.graph.segments import Boundary, cut

Chunk = dict[str, NDArray[Any]]


class BufferPool:
    """Recycles chunk buffers; beyond a limit they are backed by nameless temporary files.

    Args:
        limit: Bytes of buffers to keep in memory; None for all.
        reserved: Bytes of the limit that others use.
    """

    def __init__(self, limit: int | None = None, reserved: int = 0) -> None:
        self._limit = limit
        self._in_memory = reserved
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._owned: dict[int, NDArray[np.uint8]] = {}

    def __enter__(self) -> BufferPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._owned.clear()
        self.trim()

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A buffer of that shape, contents undefined."""
        size = int(np.prod(shape)) * dtype.itemsize
        if size == 0:
            return np.empty(shape, dtype)
        free = self._free.get(size)
        raw = free.pop() if free else self._new(size)
        array = raw.view(dtype).reshape(shape)
        self._owned[array.ctypes.data] = raw
        return array

    def release(self, array: NDArray[Any]) -> None:
        """Give a buffer back; arrays that did not come from the pool are ignored."""
        self.set_aside(array)
        raw = self._owned.pop(array.ctypes.data, None)
        if raw is not None:
            self._free.setdefault(raw.nbytes, []).append(raw)

    def set_aside(self, array: NDArray[Any]) -> None:
        """Have a buffer that is in a file leave memory until it is next used; its content stays."""
        raw = self._owned.get(array.ctypes.data)
        if isinstance(raw, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapping: Any = raw.base
            mapping.madvise(mmap.MADV_DONTNEED)

    def trim(self) -> None:
        """Let go of the free buffers, whose sizes the next segment may not need."""
        for size, buffers in self._free.items():
            self._in_memory -= size * sum(not isinstance(raw, np.memmap) for raw in buffers)
        self._free.clear()

    def _new(self, size: int) -> NDArray[np.uint8]:
        if self._limit is None:
            return np.empty(size, np.uint8)
        if self._in_memory + size > self._limit:
            self.trim()
        if self._in_memory + size <= self._limit:
            self._in_memory += size
            return np.frombuffer(
                mmap.mmap(-1, size), np.uint8
            )  # leaves memory when it is let go, which the heap may not
        try:
            with tempfile.TemporaryFile(prefix="onnx-resuscitate-") as file:  # has no name; gone with its mapping
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a crash on the first write
                    os.posix_fallocate(file.fileno(), 0, size)
                return np.memmap(file, np.uint8, "r+")
        except OSError as error:
            raise OutputError(
                f"cannot put {size} bytes of activations into {tempfile.gettempdir()}: {error.strerror}; raise "
                "--memory-limit, lower --samples, or set TMPDIR to a folder with more space"
            ) from error


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
        counts = Counter(targets)
        asked = list(counts)
        positions = ancestors(self.index, asked, stop=self._held)
        self._remaining -= positions
        self._wanted -= counts
        reads = {name for position in positions for name in node_reads(self.index.nodes[position])}
        inputs = [name for name in self._held if name in reads]
        produced = {name for position in positions for name in self.index.nodes[position].output if name}
        needed = {name for name in produced if self._is_needed(name)}
        outputs = sorted(needed | (produced & set(asked)))
        spent = [name for name in inputs if not self._is_needed(name) and name not in asked]
        session = self._session(positions, inputs, outputs) if outputs else None
        fresh: dict[str, list[NDArray[Any]]] = {name: [] for name in outputs}
        for number in range(self._count):
            if session is not None:
                feeds = {name: self._held[name][number] for name in inputs}
                for name, array in session.run(feeds, outputs, self._pool.allocate).items():
                    fresh[name].append(array)
                for name in inputs:
                    if name in spent:
                        self._drop(self._held[name], number)
                    elif name not in asked:
                        self._pool.set_aside(self._held[name][number])
            yield {name: (fresh if name in fresh else self._held)[name][number] for name in asked}
            for name in dict.fromkeys([*outputs, *asked]):
                arrays = (fresh if name in fresh else self._held)[name]
                if self._is_needed(name):
                    self._pool.set_aside(arrays[number])
                else:
                    self._drop(arrays, number)
        self._held.update(fresh)
        for name in [*spent, *asked]:
            if not self._is_needed(name):
                self._held.pop(name, None)

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
        """Compute a one-input node here instead of in the next segment, from chunk number and input chunk."""
        node = self.index.nodes[position]
        source, output = node.input[0], node.output[0]
        self._remaining.discard(position)
        if not self._is_needed(output):
            return
        keep = self._is_needed(source)
        arrays = []
        for number, array in enumerate(self._held[source]):
            value = function(number, array)
            arrays.append(owned(value, self._pool.allocate))
            self._pool.set_aside(arrays[-1])
            if keep:
                self._pool.set_aside(array)
            else:
                self._drop(self._held[source], number)
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

    def _drop(self, arrays: list[NDArray[Any]], number: int) -> None:
        array, arrays[number] = arrays[number], np.empty(0, np.uint8)
        self._pool.release(array)

    def _session(self, positions: set[int], inputs: Sequence[str], outputs: Sequence[str]) -> Session:
        boundary = {name: _boundary(self._held[name]) for name in inputs}
        return Session(cut(self.index, positions, boundary, outputs, self.plan), self._runtime)


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


def lockstep(
    lanes: Sequence[Lane], targets: Sequence[Sequence[str]], visit: Callable[[int, list[Chunk]], None]
) -> None:
    """Advance several lanes together; ``visit`` sees chunk ``i`` of all of them before chunk ``i + 1`` is run."""
    iterators = [lane.advance(names) for lane, names in zip(lanes, targets, strict=True)]
    for number, chunks in enumerate(zip(*iterators, strict=True)):
        visit(number, list(chunks))
