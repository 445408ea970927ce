"""How walks over networks are run: sessions, memory, progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from onnx_asr.engine.session import Runtime

Progress = Callable[[str, float], None]
"""Told what is being done and how much of it is done, 0 to 1."""


def silent(stage: str, fraction: float) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Execution:
    """How walks run: sessions, memory for samples and boundary tensors in bytes (None: no limit), progress."""

    runtime: Runtime = field(default_factory=Runtime)
    memory_limit: int | None = None
    progress: Progress = silent

    def __post_init__(self) -> None:
        if self.memory_limit is not None and not self.runtime.lean:
            object.__setattr__(self, "runtime", replace(self.runtime, lean=True))
