"""A walk over the calibration samples: the lanes of one or more networks, and their common buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from onnx_asr.engine.buffers import BufferPool
from onnx_asr.engine.lane import Chunk, Lane
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.samples import Calibration, feeds, input_specs
from onnx_asr.numerics.rows import MEMORY, Resources


class Walk:
    """Takes networks through the calibration samples, as a context manager that holds their buffers.

    Attributes:
        calibration: The samples.
        resources: For matrix work on the way; what may have to leave memory is kept within the same limit.
    """

    def __init__(self, calibration: Calibration, execution: Execution) -> None:
        self.calibration = calibration
        self._runtime = execution.sessions
        self._pool = BufferPool(execution.memory_limit, calibration.nbytes)
        self.resources = Resources(MEMORY if execution.memory_limit is None else self._pool, execution.workers)

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.__exit__(*exc)

    def lane(self, draft: Draft, targets: Iterable[str]) -> Lane:
        """A network before its first step, fed with the samples in its own input types.

        What is set in the draft between two steps counts from the next one on. ``targets`` are all tensors that the
        steps will request, repeated once per request.
        """
        specs = input_specs(draft.index)
        chunks = [feeds(specs, chunk) for chunk in self.calibration.chunks]
        return Lane(draft.index, targets, chunks, self._pool, self._runtime, draft.plan)

    def step(self, targets: Mapping[Lane, Sequence[str]]) -> Iterator[list[Chunk]]:
        """Run every lane up to its targets, all of them on one chunk before any is run on the next.

        Yields the targets of every lane, chunk by chunk; see :meth:`Lane.advance` for how long they are valid.
        """
        for chunks in zip(*(lane.advance(names) for lane, names in targets.items()), strict=True):
            yield list(chunks)
        self._pool.trim()
