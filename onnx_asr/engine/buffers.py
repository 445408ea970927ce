"""Memory for the tensors between two segments, with files behind it where there is a limit."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_asr.arrays import Array
from onnx_asr.errors import OutputError


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

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A buffer of that shape, contents undefined."""
        size = int(np.prod(shape)) * dtype.itemsize
        if size == 0:
            return np.empty(shape, dtype)
        free = self._free.get(size)
        raw = free.pop() if free else self._new(size)
        array = raw.view(dtype).reshape(shape)
        self._owned[array.ctypes.data] = raw
        return array

    def release(self, array: Array) -> None:
        """Give a buffer back; arrays that did not come from the pool are ignored."""
        self.set_aside(array)
        raw = self._owned.pop(array.ctypes.data, None)
        if raw is not None:
            self._free.setdefault(raw.nbytes, []).append(raw)

    def set_aside(self, array: Array) -> None:
        """Have a buffer that is in a file leave memory until it is next used; its content stays."""
        raw = self._owned.get(array.ctypes.data)
        if isinstance(raw, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapping: Any = raw.base
            mapping.madvise(mmap.MADV_DONTNEED)

    def trim(self) -> None:
        """Free the unused buffers; the next segment may need other sizes."""
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
            return np.frombuffer(mmap.mmap(-1, size), np.uint8)  # to the system when freed, unlike heap memory
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
