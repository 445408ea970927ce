"""How networks are run: sessions, memory, progress, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from onnx_asr.engine.session import Runtime
from onnx_asr.numerics.workers import Workers

Progress = Callable[[str, float], None]
"""Called with the stage and the fraction of it that is done, 0 to 1."""


def silent(stage: str, fraction: float) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Execution:
    """How networks are run.

    Attributes:
        runtime: Execution providers and threads; numpy's work takes as many threads.
        memory_limit: Bytes for samples and for tensors between segments; None for no limit.
        progress: Called while the work goes on.
    """

    runtime: Runtime = field(default_factory=Runtime)
    memory_limit: int | None = None
    progress: Progress = silent

    @property
    def sessions(self) -> Runtime:
        """How sessions run: with a memory limit they are lean, which makes them slower."""
        return self.runtime if self.memory_limit is None else replace(self.runtime, lean=True)

    @property
    def workers(self) -> Workers:
        """Threads for matrix work."""
        return Workers.of(self.runtime.threads)

    @property
    def quiet(self) -> Execution:
        """The same without progress, for a part of a larger job."""
        return replace(self, progress=silent)

    def part(self, stage: str, number: int, parts: int) -> Execution:
        """The same for one of the equal parts of a stage, counted from 0, whose own stages are not named."""
        return replace(self, progress=lambda _, fraction: self.progress(stage, (number + fraction) / parts))


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of a block to that of its stage."""
    begun = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begun
