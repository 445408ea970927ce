"""Scores of weights, and how many weights each layer keeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from onnx_asr.arrays import Array, Floats
from onnx_asr.numerics.masks import random_ranks

_MAX_INVERSE = 8192  # inputs up to which H is inverted: 0.5 GB


def lamp(weight: Array, seed: int | None = None) -> Floats:
    """``w^2 / sum of w'^2 over all w' of the weight with |w'| >= |w|`` (layer-adaptive magnitude, arXiv 2010.07611).

    Of equal magnitudes the earlier one counts as larger, or with a seed one by chance, so that there are no ties within
    a weight.
    """
    square = np.square(weight.astype(np.float64)).ravel()
    order = np.argsort(-square, kind="stable")
    if seed is not None and (np.diff(square[order]) == 0).any():
        order = np.lexsort((random_ranks(square.size, seed), -square))
    above = np.cumsum(square[order])
    score = np.empty_like(square)
    score[order] = np.divide(square[order], above, out=np.zeros_like(above), where=above > 0)
    return score.reshape(weight.shape)


def row_normalised(rows: Array) -> Floats:
    """``|w_ij| / rms_j(w_ij)`` for weights as rows [C_out, K]: independent of the scale of each output channel."""
    exact = np.abs(rows.astype(np.float64))
    size = np.sqrt(np.square(exact).mean(axis=1, keepdims=True))
    return np.asarray(np.divide(exact, size, out=np.zeros_like(exact), where=size > 0))


def saliency(rows: Array, gram: Floats, ridge: float) -> Floats:
    """``w^2 / [(H + R I)^-1]_jj``: the cost of removing a weight if the others compensate (optimal brain surgeon).

    Beyond 8,192 inputs ``H`` is replaced with its diagonal, ``w^2 (H_jj + R)``.

    Args:
        rows: Weights [C_out, K], the output channels of a group side by side.
        gram: ``H = cov(X)`` [G, K, K] of each group's inputs.
        ridge: ``R`` as a share of the mean input variance.
    """
    diagonal = np.diagonal(gram, axis1=1, axis2=2)
    damping = ridge * diagonal.mean(axis=1) + 1e-12
    cost = diagonal + damping[:, None]
    if gram.shape[2] <= _MAX_INVERSE:
        for group, matrix in enumerate(gram):
            cost[group] = 1.0 / np.diagonal(np.linalg.inv(matrix + damping[group] * np.eye(len(matrix))))
    square = np.square(rows.astype(np.float64)).reshape(len(gram), -1, gram.shape[2])
    return np.asarray(square * np.maximum(cost, 0.0)[:, None, :]).reshape(rows.shape)


def erk_shares(shapes: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> list[float]:
    """Entries of each layer, up to a factor, at Erdos-Renyi-kernel densities (arXiv 1911.11134).

    The density of a layer of shape [C_out, C_in / group, *kernel] and ``size`` entries is proportional to
    ``sum(shape) / prod(shape)``.
    """
    return [sum(shape) / math.prod(shape) * size for shape, size in zip(shapes, sizes, strict=True)]


def proportional_keep(shares: Sequence[float], most: Sequence[int], keep: int) -> list[int]:
    """Entries that each layer keeps, ``keep`` in total, in proportion to its share but not more than its ``most``.

    Where all layers together have fewer entries than ``keep``, they keep all.

    >>> proportional_keep([3.0, 1.0, 1.0], [2, 9, 9], 8)
    [2, 3, 3]
    """
    share, size = np.array(shares, np.float64), np.asarray(most, np.float64)
    full = np.zeros(len(share), bool)
    factor = 0.0
    while not full.all():
        factor = max((keep - size[full].sum()) / share[~full].sum(), 0.0)
        beyond = ~full & (factor * share > size)
        if not beyond.any():
            break
        full |= beyond
    wanted = np.where(full, size, factor * share)
    counts = np.floor(wanted).astype(int)
    room = np.where(counts < size, counts - wanted, np.inf)
    counts[np.argsort(room, kind="stable")[: min(keep, int(size.sum())) - int(counts.sum())]] += 1
    return [int(count) for count in counts]


def cheapest_keep(
    sizes: Sequence[int],
    zeros: Sequence[Sequence[int]],
    costs: Sequence[Sequence[float]],
    keep: float,
    prices: Sequence[float] | None = None,
) -> list[int]:
    """Entries that each layer keeps, worth at most ``keep`` in total, at the smallest total cost of their zeros.

    A layer's cost is the lower convex hull of (0, 0) and the measured points (zeros, cost), where a cost counts as no
    smaller than those of fewer zeros. The total is smallest if zeros go to the segments of the hulls in the order of
    slope divided by price. If all segments together are too short, the layers give up the entries beyond their last
    finite point, in order.

    >>> cheapest_keep([10, 10], [[5], [5]], [[1.0], [3.0]], keep=14)  # zeros cost less in the first layer
    [5, 9]

    Args:
        sizes: Number of entries of each layer.
        zeros: Numbers of zeros tried in each layer, ascending.
        costs: Their costs, at least 0; infinite ones are avoided.
        keep: Largest total price of the entries that are kept.
        prices: Price of an entry of each layer, above 0; 1 if not given, so that ``keep`` counts entries.
    """
    price = [1.0] * len(sizes) if prices is None else prices
    segments: list[tuple[float, int, int]] = []  # slope by price, layer, zeros
    for layer, size in enumerate(sizes):
        hull = _lower_hull(zeros[layer], costs[layer])
        segments += [(_slope(a, b) / price[layer], layer, b[0] - a[0]) for a, b in itertools.pairwise(hull)]
        segments.append((math.inf, layer, size - hull[-1][0]))
    counts, rest = list(sizes), sum(size * each for size, each in zip(sizes, price, strict=True)) - keep
    for _, layer, width in sorted(segments, key=lambda item: item[0]):
        taken = min(width, max(0, math.ceil(rest / price[layer])))
        counts[layer] -= taken
        rest -= taken * price[layer]
    return counts


def _lower_hull(zeros: Sequence[int], costs: Sequence[float]) -> list[tuple[int, float]]:
    """The corners of the lower convex hull of (0, 0) and the finite points, made monotone."""
    points: dict[int, float] = {}
    highest = 0.0
    for number, cost in zip(zeros, costs, strict=True):
        highest = max(highest, cost)
        if number > 0 and math.isfinite(highest):
            points[number] = highest
    hull = [(0, 0.0)]
    for x, y in points.items():
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
