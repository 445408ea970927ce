"""Input patches of convolutions at sampled output positions.

For every sampled output position ``o`` and kernel tap ``k`` the input position is, along each spatial axis,

    convolution:            i = stride o - pad + dilation k
    transposed convolution: i = (o + pad - dilation k) / stride, where that is a whole number

and the patch holds 0 where ``i`` lies outside the input (padding). With the patches as rows, a convolution is
``X @ W_rows.T`` (ONNX operators Conv and ConvTranspose).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnx_asr.arrays import Array, Integers, Singles


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


def gather_patches(tensor: Array, table: Integers, positions: Integers, groups: int) -> Singles:
    """Patches [N * P, groups, taps * C / groups] of a chunk [N, C, *spatial] at each image's positions [N, P].

    ``table`` [outputs, taps] is that of :func:`input_positions`. The channels of a tap lie together, as in
    ``WeightLayout.to_patches``.
    """
    images, channels = tensor.shape[:2]
    size = math.prod(tensor.shape[2:])
    taps = table.shape[1]
    wanted = table[positions].reshape(images, -1)  # [N, P * taps]
    if 2 * wanted.shape[1] < size:
        patches = gather_outputs(tensor, wanted)
    else:  # to channels last, so that each patch is copied from whole cache lines
        by_position = tensor.reshape(images, channels, size).transpose(0, 2, 1)
        rows = wanted + (np.arange(images) * size)[:, None]
        by_position = np.ascontiguousarray(by_position, dtype=np.float32).reshape(-1, channels)
        patches = np.take(by_position, rows.ravel(), axis=0, mode="clip")
    padding = wanted.ravel() < 0
    if padding.any():
        patches[padding] = 0.0
    if groups == 1:
        return patches.reshape(-1, 1, taps * channels)
    grouped = patches.reshape(-1, taps, groups, channels // groups).transpose(0, 2, 1, 3)  # [rows, G, taps, C/G]
    return np.ascontiguousarray(grouped).reshape(len(grouped), groups, -1)


def gather_outputs(tensor: Array, positions: Integers) -> Singles:
    """Values of a chunk [N, C, *spatial] at each image's positions [N, P], [N * P, C]."""
    images, channels = tensor.shape[:2]
    maps = tensor.reshape(images, channels, -1)
    return maps[np.arange(images)[:, None], :, positions].astype(np.float32, copy=False).reshape(-1, channels)
