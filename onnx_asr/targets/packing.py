"""What zeros are worth in a file: every weight as stored, compressed, and as a sparse initializer."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Literal

import numpy as np

from onnx_asr.graph.index import FLOAT_TYPES, GraphIndex

_GZIP_LEVEL, _BROTLI_QUALITY = 6, 9
_INDEX_BYTES = 8
"""Of the position that a sparse initializer holds for each of its values (int64, by the ONNX specification)."""

Form = Literal["stored", "gzip", "brotli", "sparse"]


@dataclass(frozen=True)
class Packed:
    """Bytes of one weight.

    Attributes:
        name: Of the weight.
        layers: Nodes that read it.
        shape: As stored.
        sparsity: Share of zeros.
        stored: Bytes in the file.
        gzip: After deflate at level 6, the default of gzip.
        brotli: After brotli at quality 9; None where the library is missing.
        sparse: As a sparse initializer: the values that are not zero, and 8 bytes for the position of each.
    """

    derived: ClassVar = ("smallest",)

    name: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    sparsity: float
    stored: int
    gzip: int
    brotli: int | None
    sparse: int

    @property
    def smallest(self) -> Form:
        """The form with the fewest bytes."""
        sizes: dict[Form, int | None] = {
            "stored": self.stored,
            "gzip": self.gzip,
            "brotli": self.brotli,
            "sparse": self.sparse,
        }
        return min((size, form) for form, size in sizes.items() if size is not None)[1]


@dataclass(frozen=True)
class FileUse:
    """What the zeros of a model are worth in a file.

    Attributes:
        weights: Every floating-point weight with two axes or more, in file order.
        has_brotli: Whether brotli is installed.
    """

    derived: ClassVar = ("name", "stored", "gzip", "brotli", "sparse", "sparse_where_smaller")
    name: ClassVar[Literal["file"]] = "file"

    weights: tuple[Packed, ...]
    has_brotli: bool

    @property
    def stored(self) -> int:
        """Bytes of all weights."""
        return sum(weight.stored for weight in self.weights)

    @property
    def gzip(self) -> int:
        """Bytes of all weights after gzip."""
        return sum(weight.gzip for weight in self.weights)

    @property
    def brotli(self) -> int | None:
        """Bytes of all weights after brotli; None where it is missing."""
        return sum(weight.brotli or 0 for weight in self.weights) if self.has_brotli else None

    @property
    def sparse(self) -> int:
        """Bytes of all weights as sparse initializers."""
        return sum(weight.sparse for weight in self.weights)

    @property
    def sparse_where_smaller(self) -> int:
        """Bytes of all weights, each as a sparse initializer if that is smaller than it is now."""
        return sum(min(weight.stored, weight.sparse) for weight in self.weights)


def file_use(index: GraphIndex) -> FileUse:
    """Pack every weight of a network."""
    brotli = _brotli()
    readers: dict[str, list[str]] = {}
    for position, node in enumerate(index.nodes):
        for name in filter(None, node.input):
            if index.is_constant(name) and index.element_type(name) in FLOAT_TYPES and len(index.shape(name)) > 1:
                readers.setdefault(name, []).append(index.label(position))
    weights = []
    for name, layers in readers.items():
        value = index.value(name)
        content, nonzeros = np.ascontiguousarray(value).tobytes(), int(np.count_nonzero(value))
        weights.append(
            Packed(
                name=name,
                layers=tuple(layers),
                shape=tuple(value.shape),
                sparsity=1 - nonzeros / max(1, value.size),
                stored=len(content),
                gzip=len(zlib.compress(content, _GZIP_LEVEL)),
                brotli=None if brotli is None else brotli(content),
                sparse=nonzeros * (value.dtype.itemsize + _INDEX_BYTES),
            )
        )
    return FileUse(tuple(weights), brotli is not None)


def _brotli() -> Callable[[bytes], int] | None:
    """What brotli makes of bytes, in bytes; None where it is not installed."""
    try:
        library = import_module("brotli")
    except ImportError:
        return None
    return lambda content: len(library.compress(content, quality=_BROTLI_QUALITY))
