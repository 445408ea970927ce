"""Buffers at their limits: spill files, exhausted memory, full disks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_asr.engine.buffers import BufferPool
from onnx_asr.engine.lane import Lane
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import OutputError
from tests.graphs import images, index, residual_net


def walk(limit: int | None) -> Iterator[np.ndarray]:
    x = images(12, seed=1)
    chunks = [{"x": x[at : at + 5]} for at in range(0, 12, 5)]
    with BufferPool(limit) as pool:
        lane = Lane(index(residual_net()), ["a", "logits"], chunks, pool, Runtime(threads=1))
        for name in ("a", "logits"):
            for chunk in lane.advance([name]):
                yield chunk[name]


@pytest.fixture
def spilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the buffers that were spilled to files."""
    sizes: list[int] = []

    class Spy(np.memmap):
        def __new__(cls, *arguments: Any, **rest: Any) -> Any:
            array = super().__new__(cls, *arguments, **rest)
            sizes.append(array.nbytes)
            return array

    monkeypatch.setattr(np, "memmap", Spy)
    return sizes


def test_memory_beyond_the_limit_is_in_files(spilled: list[int]) -> None:
    list(walk(None))
    assert spilled == []
    list(walk(10**9))
    assert spilled == []
    list(walk(0))
    everything = sum(spilled)
    spilled.clear()
    list(walk(30_000))
    assert 0 < sum(spilled) < everything


def test_free_buffers_make_room_for_others(spilled: list[int]) -> None:
    """After a large stage its buffers are free: the small ones of the next stay in memory."""
    with BufferPool(1000) as pool:
        pool.release(pool.allocate((1000,), np.dtype(np.uint8)))
        small = pool.allocate((600,), np.dtype(np.uint8))
        assert spilled == []
        pool.allocate((600,), np.dtype(np.uint8))[:] = 1
        assert spilled == [600]
        small[:] = 0


def test_spill_files_are_never_seen(tmp_path: Path, spilled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to remove, however the process ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in walk(0):
        assert list(tmp_path.iterdir()) == []
    assert spilled


def test_nowhere_to_spill_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match=r"cannot put \d+ bytes .*missing.*; raise --memory-limit"):
        list(walk(0))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_full_disk_is_an_error_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left on device; raise --memory-limit"):
        list(walk(0))
