"""Scores to masks with an exact number of surviving weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_asr.arrays import Array, Floats, Mask


def keep_largest(scores: Sequence[Array], keep: int) -> list[Mask]:
    """Masks that keep the ``keep`` entries with the largest scores over all arrays, which may have any shape.

    Ties are broken by position: earlier arrays first, then earlier entries in C order.
    """
    if not scores:
        return []
    flat = np.concatenate([np.asarray(score).ravel() for score in scores])
    mask = np.full(flat.size, keep >= flat.size)
    if 0 < keep < flat.size:
        threshold = np.partition(flat, flat.size - keep)[flat.size - keep]
        mask = flat > threshold
        mask[np.flatnonzero(flat == threshold)[: keep - int(mask.sum())]] = True
    ends = np.cumsum([score.size for score in scores])
    return [part.reshape(score.shape) for part, score in zip(np.split(mask, ends[:-1]), scores, strict=True)]


def keep_count(size: int, sparsity: float) -> int:
    """Entries that survive at a sparsity: ``size - round(sparsity size)``."""
    return size - round(sparsity * size)


def keep_n_of_m(scores: Array, n: int, m: int) -> Mask:
    """A mask that keeps the ``n`` largest scores [C_out, C_in, taps] of every ``m`` consecutive C_in (N:M sparsity).

    A last group of fewer than ``m`` channels counts as padded with zeros, which are pruned first. Ties are broken by
    position.

    >>> keep_n_of_m(np.array([[[3.0], [1.0], [2.0], [9.0]]]), 2, 4)[0, :, 0].tolist()
    [True, False, False, True]
    """
    outputs, inputs, taps = scores.shape
    padded = np.full((outputs, -(-inputs // m) * m, taps), -np.inf)
    padded[:, :inputs] = scores
    groups = padded.reshape(outputs, -1, m, taps)
    order = np.argsort(-groups, axis=2, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[:, :, :n], True, axis=2)
    return np.asarray(mask.reshape(padded.shape)[:, :inputs])


def block_scores(scores: Array, height: int) -> Floats:
    """Mean scores [G, ceil(O / height), I, taps] of every ``height`` consecutive output channels of [G, O, I, taps].

    The mean and not the sum, so that a last block with fewer channels compares with the others.
    """
    starts = np.arange(0, scores.shape[1], height)
    sizes = np.minimum(height, scores.shape[1] - starts)
    sums = np.add.reduceat(scores.astype(np.float64), starts, axis=1)
    return np.asarray(sums / sizes[:, None, None])


def spread_blocks(mask: Mask, height: int, outputs: int) -> Mask:
    """Expand a mask of blocks [G, ceil(outputs / height), I, taps] to all their channels [G, outputs, I, taps]."""
    return np.asarray(np.repeat(mask, height, axis=1)[:, :outputs])


def find_n_of_m(mask: Mask) -> tuple[int, int] | None:
    """The N:M pattern that a mask [C_out, C_in, taps] follows along C_in for M of 2, 4, 8 or 16, or None.

    No group of ``m`` has more than ``n`` entries left, and nine in ten whole groups have exactly ``n``; the first
    condition alone also holds for any very sparse mask. Of several patterns, the one with the smallest ``m``.
    """
    outputs, inputs, taps = mask.shape
    for m in (2, 4, 8, 16):
        whole = inputs - inputs % m
        if whole == 0:
            break
        left = mask[:, :whole].reshape(outputs, whole // m, m, taps).sum(axis=2)
        n = int(left.max())
        rest = mask[:, whole:].sum(axis=1).max(initial=0)
        if 0 < n < m and rest <= n and (left == n).mean() >= 0.9:
            return n, m
    return None
