"""Input patches of convolutions at sampled output positions.

For every sampled output position ``o`` and kernel tap ``k`` the input position is, along each spatial axis,

    convolution:            i = stride o - pad + dilation k
    transposed convolution: i = (o + pad - dilation k) / stride, where that is a whole number

and the patch holds 0 where ``i`` lies outside the input (padding). With the patches as rows, a convolution is
``X @ W_rows.T`` (ONNX operators Conv and ConvTranspose).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnx_asr.arrays import Array, Floats, Integers, Singles

_PIECE_VALUES = 2**17  # of patches, or of the maps that they come from, that are worth a thread's while


@dataclass(frozen=True)
class ConvGeometry:
    """Spatial geometry of a convolution; every tuple has one entry per spatial axis.

    Attributes:
        kernel: Taps along each axis.
        strides: Input positions per output position; the inverse where transposed.
        dilations: Distance between taps.
        pads: Padding before the first element of each axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int
    transposed: bool


def sample_positions(images: int, size: int, rows: int, seed: tuple[int, ...]) -> Integers:
    """Seeded output positions [images, P]: all where ``rows`` suffices, else at least one per image.

    Stratified: each image's ``size`` positions are divided into ``P`` equal runs, from each of which one is drawn.
    """
    per_image = max(1, rows // images)
    if per_image >= size:
        return np.broadcast_to(np.arange(size), (images, size))
    offsets = np.random.default_rng(seed).random((images, per_image))
    drawn = ((np.arange(per_image) + offsets) * (size / per_image)).astype(np.int64)
    return np.minimum(drawn, size - 1)


def weighted_positions(shares: Floats, rows: int, seed: tuple[int, ...]) -> Integers:
    """Seeded output positions [images, P] by their shares [images, size], which add up to 1; some come repeatedly.

    Stratified: the cumulated shares of an image are divided into ``P`` equal runs, from each of which one is drawn.
    """
    images, size = shares.shape
    per_image = min(max(1, rows // images), size)
    offsets = np.random.default_rng(seed).random((images, per_image))
    wanted = (np.arange(per_image) + offsets) / per_image
    edges = np.cumsum(shares, axis=1)
    drawn = [np.searchsorted(edge, at, side="right") for edge, at in zip(edges, wanted, strict=True)]
    return np.asarray(np.minimum(np.stack(drawn), size - 1), np.int64)


def input_positions(geometry: ConvGeometry, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> Integers:
    """Flat input position of every flat output position and tap, [outputs, taps]; -1 in the padding."""
    flat = np.zeros((1, 1), np.int64)
    valid = np.ones((1, 1), bool)
    for axis, (size, extent) in enumerate(zip(input_shape, output_shape, strict=True)):
        out = np.arange(extent)[:, None]
        tap = np.arange(geometry.kernel[axis])[None, :]
        stride, dilation, pad = geometry.strides[axis], geometry.dilations[axis], geometry.pads[axis]
        index, rest = stride * out - pad + dilation * tap, np.zeros(1)
        if geometry.transposed:
            index, rest = np.divmod(out + pad - dilation * tap, stride)
        inside = (rest == 0) & (index >= 0) & (index < size)
        outputs, taps = flat.shape[0] * extent, flat.shape[1] * tap.size
        flat = (flat[:, None, :, None] * size + index[None, :, None, :]).reshape(outputs, taps)
        valid = (valid[:, None, :, None] & inside[None, :, None, :]).reshape(outputs, taps)
    return np.where(valid, flat, -1)


def gather_patches(
    tensor: Array, table: Integers, positions: Integers, groups: int, out: Singles | None = None
) -> Singles:
    """Patches [N * P, groups, taps * C / groups] of a chunk [N, C, *spatial] at each image's positions [N, P].

    ``table`` [outputs, taps] is that of :func:`input_positions`. The channels of a tap lie together, as in
    ``WeightLayout.to_patches``. They are written into ``out``, where it is given.
    """
    images, channels = tensor.shape[:2]
    size = math.prod(tensor.shape[2:])
    taps = table.shape[1]
    if out is None:
        out = np.empty((positions.size, groups, taps * channels // groups), np.float32)
    wanted = table[positions].reshape(images, -1)  # [N, P * taps]
    by_tap = out.reshape(-1, channels) if groups == 1 else np.empty((wanted.size, channels), np.float32)
    if 2 * wanted.shape[1] < size:
        by_tap[...] = gather_outputs(tensor, wanted)
    else:  # to channels last, so that each patch is copied from whole cache lines
        by_position = tensor.reshape(images, channels, size).transpose(0, 2, 1)
        rows = wanted + (np.arange(images) * size)[:, None]
        by_position = np.ascontiguousarray(by_position, dtype=np.float32).reshape(-1, channels)
        np.take(by_position, rows.ravel(), axis=0, out=by_tap, mode="clip")
    padding = wanted.ravel() < 0
    if padding.any():
        by_tap[padding] = 0.0
    if groups > 1:
        grouped = by_tap.reshape(-1, taps, groups, channels // groups).transpose(0, 2, 1, 3)  # [rows, G, taps, C/G]
        out.reshape(-1, groups, taps, channels // groups)[...] = grouped
    return out


def gather_outputs(tensor: Array, positions: Integers) -> Singles:
    """Values of a chunk [N, C, *spatial] at each image's positions [N, P], [N * P, C]."""
    images, channels = tensor.shape[:2]
    maps = tensor.reshape(images, channels, -1)
    return maps[np.arange(images)[:, None], :, positions].astype(np.float32, copy=False).reshape(-1, channels)


@dataclass(frozen=True)
class ConvRows:
    """Sampled rows of a convolution on one chunk.

    Attributes:
        source: Its input [N, C, *spatial].
        table: That of :func:`input_positions`, [outputs, taps].
        positions: Flat output positions [N, P].
        groups: Its groups.
    """

    source: Array
    table: Integers
    positions: Integers
    groups: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the patches: [N * P, groups, taps * C / groups]."""
        return self.positions.size, self.groups, self.table.shape[1] * self.source.shape[1] // self.groups

    def take(self, rows: slice, out: Singles) -> None:
        """Write some of the patches: those that begin within an image, of whole images, of the beginning of one."""
        per_image, begin = self.positions.shape[1], rows.start
        while begin < rows.stop:
            image, first = divmod(begin, per_image)
            images = (rows.stop - begin) // per_image if first == 0 else 0
            last = per_image if images else min(per_image, first + rows.stop - begin)
            chosen = slice(image, image + max(images, 1))
            positions = self.positions[chosen, first:last]
            end = begin + positions.size
            part = out[begin - rows.start : end - rows.start]
            gather_patches(self.source[chosen], self.table, positions, self.groups, part)
            begin = end

    def pieces(self) -> Iterator[slice]:
        """The rows of some whole images at a time."""
        per_image = self.positions.shape[1]
        values = max(self.source[0].size, math.prod(self.shape) // len(self.source))
        return _runs(self.positions.size, per_image * max(1, _PIECE_VALUES // values))

    def of(self, output: Array) -> Singles:
        """The same rows of an output [N, C, *spatial], [N * P, C]."""
        return gather_outputs(output, self.positions)


@dataclass(frozen=True)
class MatrixRows:
    """Sampled rows of a matrix product on one chunk.

    Attributes:
        source: Its input, [..., K]; [..., K, n] if `transposed`.
        rows: Numbers of the rows [R].
        transposed: Whether the channels lie along the last axis but one.
    """

    source: Array
    rows: Integers
    transposed: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the rows: [R, 1, K]."""
        return len(self.rows), 1, self.source.shape[-2 if self.transposed else -1]

    def take(self, rows: slice, out: Singles) -> None:
        """Write some of the rows."""
        out[:, 0] = self._table(self.source)[self.rows[rows]]

    def pieces(self) -> Iterator[slice]:
        """Some rows at a time; all of them, where they have to be transposed first."""
        count, _, width = self.shape
        return _runs(count, count if self.transposed else max(1, _PIECE_VALUES // width))

    def of(self, output: Array) -> Singles:
        """The same rows of an output, [R, C]."""
        return self._table(output)[self.rows].astype(np.float32, copy=False)

    def _table(self, tensor: Array) -> Array:
        tensor = np.swapaxes(tensor, -1, -2) if self.transposed else tensor
        return tensor.reshape(-1, tensor.shape[-1])


def _runs(count: int, step: int) -> Iterator[slice]:
    """Consecutive pieces of a number of rows."""
    return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))
