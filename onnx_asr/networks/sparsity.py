"""Zeros in the weights of a network, and layers with almost no weights left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnx_asr.arrays import Array
from onnx_asr.errors import OptionError
from onnx_asr.graph.index import FLOAT_TYPES, GraphIndex
from onnx_asr.graph.points import LayerPoint

_NAMED_LAYERS = 3
_FEW_ZEROS = 0.01
"""Share of a dense network's weights that may be zero: by chance, by underflow, or in dead channels whose
BatchNormalization was folded."""


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros in one weight before and after pruning."""

    derived: ClassVar = ("sparsity",)

    name: str
    op_type: str
    channels: int
    shape: tuple[int, ...]
    size: int
    zeros_before: int
    zeros: int

    @classmethod
    def of(cls, point: LayerPoint, before: Array, after: Array) -> LayerSparsity:
        """Count the zeros of a point's weight."""
        zeros = [value.size - int(np.count_nonzero(value)) for value in (before, after)]
        return cls(point.name, point.kind, point.channels, tuple(after.shape), after.size, *zeros)

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / max(1, self.size)

    @property
    def is_collapsed(self) -> bool:
        """Whether pruning left fewer weights than a tenth of the channels, where there were more before."""
        few = self.channels / 10
        return self.size - self.zeros < few <= self.size - self.zeros_before


def collapse_note(layers: Sequence[LayerSparsity]) -> tuple[str, ...]:
    """A note on the layers that collapsed, if any did."""
    found = sorted((layer for layer in layers if layer.is_collapsed), key=lambda layer: layer.size - layer.zeros)
    if not found:
        return ()
    named = ", ".join(
        f"{layer.name} ({layer.size - layer.zeros:,} of {layer.size:,})" for layer in found[:_NAMED_LAYERS]
    )
    more = ", ..." if len(found) > _NAMED_LAYERS else ""
    return (
        f"layer collapse: over nine tenths of the channels are constant in {len(found)} of {len(layers)} layers: "
        f"{named}{more}; unless a shortcut bypasses such a layer, no repair restores its signal: prune less, or spare "
        "it (--scope erk, --exclude)",
    )


def share_of_zeros(layers: Sequence[LayerSparsity]) -> float:
    """Share of zeros over all weights of the layers."""
    return sum(layer.zeros for layer in layers) / max(1, sum(layer.size for layer in layers))


def check_order(pruned: GraphIndex, dense: GraphIndex) -> None:
    """Refuse a dense network with more zeros than the pruned one, by more than a hundredth of the weights.

    A pruned network with fewer weights than the dense one may have lost zeros with its channels.

    Raises:
        OptionError: When the two are probably exchanged.
    """
    (size, zeros), (dense_size, dense_zeros) = _weights(pruned), _weights(dense)
    if size < dense_size or dense_zeros <= zeros + _FEW_ZEROS * size:
        return
    raise OptionError(
        f"{dense_zeros / dense_size:.1%} of the dense model's weights are zero, and {zeros / size:.1%} of the other "
        "one's: are the two exchanged? Give the pruned model first and the dense one as --dense, or --force if this is "
        "meant"
    )


def _weights(index: GraphIndex) -> tuple[int, int]:
    """Number of weights (entries of floating-point constants that have two axes or more), and how many are zero.

    A constant counts once for every node that reads it: with fewer channels, such nodes may need one each.
    """
    size = nonzeros = 0
    for name in (name for node in index.nodes for name in node.input if name and index.is_constant(name)):
        if index.element_type(name) in FLOAT_TYPES and len(index.shape(name)) > 1:
            value = index.value(name)
            size += value.size
            nonzeros += int(np.count_nonzero(value))
    return size, size - nonzeros
