"""Scores to masks with an exact number of surviving weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_asr.arrays import Array, Floats, Integers, Mask

_ROUNDING = 1e-12  # of scores that are equal but for the rounding of their factors


def keep_largest(scores: Sequence[Array], keep: int, seed: int | None = None) -> list[Mask]:
    """Masks that keep the ``keep`` entries with the largest scores over all arrays, which may have any shape.

    Ties are broken by position: earlier arrays first, then earlier entries in C order. With a seed, ties of scores
    above 0 are spread over the arrays in proportion to their numbers there, so that they leave none without an entry
    where that can be avoided; within an array, a random order decides.
    """
    if not scores:
        return []
    flat = np.concatenate([np.asarray(score).ravel() for score in scores])
    mask = np.full(flat.size, keep >= flat.size)
    if 0 < keep < flat.size:
        threshold = np.partition(flat, flat.size - keep)[flat.size - keep]
        rounding = 0.0 if seed is None or threshold <= 0 else _ROUNDING
        mask = flat > threshold * (1 + rounding)
        tied, rest = (flat >= threshold * (1 - rounding)) & ~mask, keep - int(mask.sum())
        if seed is None or threshold <= 0:
            mask[np.flatnonzero(tied)[:rest]] = True
        else:
            _spread_ties(_split(mask, scores), _split(tied, scores), rest, seed)
    return [part.reshape(score.shape) for part, score in zip(_split(mask, scores), scores, strict=True)]


def _split(flat: Mask, scores: Sequence[Array]) -> list[Mask]:
    """The part of each array, as views."""
    return np.split(flat, np.cumsum([score.size for score in scores])[:-1])


def _spread_ties(masks: Sequence[Mask], tied: Sequence[Mask], keep: int, seed: int) -> None:
    """Set ``keep`` of the tied entries in the masks."""
    counts = np.array([np.count_nonzero(each) for each in tied])
    shares, rests = np.divmod(keep * counts, counts.sum())
    shares[np.argsort(-rests, kind="stable")[: keep - int(shares.sum())]] += 1
    for number in np.flatnonzero((counts > 0) & (shares == 0)).tolist():
        giver = int(np.argmax(shares))
        if shares[giver] > 1 and not masks[number].any():
            shares[giver] -= 1
            shares[number] += 1
    for number, (mask, each, share) in enumerate(zip(masks, tied, shares.tolist(), strict=True)):
        entries = np.flatnonzero(each)
        if share < len(entries):
            entries = entries[np.argsort(random_ranks(mask.size, seed, number)[entries])[:share]]
        mask[entries] = True


def random_ranks(size: int, *seed: int) -> Integers:
    """The numbers from 0 to ``size - 1`` in a random order that no version of numpy changes."""
    return np.argsort(np.argsort(np.random.PCG64(seed).random_raw(size), kind="stable"), kind="stable")


def keep_count(size: int, sparsity: float) -> int:
    """Entries that survive at a sparsity: ``size - round(sparsity size)``."""
    return size - round(sparsity * size)


def keep_n_of_m(scores: Array, n: int, m: int, seed: int | None = None) -> Mask:
    """A mask that keeps the ``n`` largest scores [C_out, C_in, taps] of every ``m`` consecutive C_in (N:M sparsity).

    A last group of fewer than ``m`` channels counts as padded with zeros, which are pruned first. Ties are broken by
    position, or with a seed in a random order where scores are above 0.

    >>> keep_n_of_m(np.array([[[3.0], [1.0], [2.0], [9.0]]]), 2, 4)[0, :, 0].tolist()
    [True, False, False, True]
    """
    outputs, inputs, taps = scores.shape
    padded = np.full((outputs, -(-inputs // m) * m, taps), -np.inf)
    padded[:, :inputs] = scores
    groups = padded.reshape(outputs, -1, m, taps)
    if seed is None:
        order = np.argsort(-groups, axis=2, kind="stable")
    else:
        ranks = random_ranks(groups.size, seed).reshape(groups.shape)
        order = np.lexsort((np.where(groups > 0, ranks, -1), -groups), axis=2)
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
