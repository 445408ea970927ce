"""Least squares of a layer with fewer rows than inputs, in the space of its rows.

With the columns `X_S` [n, s] of the centred rows that a channel's support `S` keeps, and the error of its dense weights
`e = T - mean(T) - w0.(X - mean(X))`, the solution of :mod:`onnx_asr.numerics.refit` is also

    (X_S X_S' + n R I) z = e,   w_S = w0_S + X_S' z,

and the error that it leaves is `n R z`. So a layer of any width takes one matrix [n, n] per output channel, and steps
behind a ReLU take no weights at all. `n R` is at least `NOISE` of the mean square of the columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import lapack

from onnx_asr.arrays import Array, Floats, Mask, Singles
from onnx_asr.numerics.rows import Inputs, Targets
from onnx_asr.numerics.systems import NOISE, SINGLE

_FACTOR_BYTES = 2**25  # of the factors of one block


class RowSpace:
    """The rows of a layer by their columns.

    Attributes:
        columns: `X - mean(X)` [G, K, n], held by the store.
        load: `n R` [G].
        root: `D^1/2` [G, 1, K].
    """

    def __init__(self, inputs: Inputs, root: Floats, ridge: Floats) -> None:
        rows, groups, size = inputs.shape
        self._store = inputs.resources.store
        self.columns: Singles = self._store.allocate((groups, size, rows), np.dtype(np.float32))
        for part in inputs.chunks():
            self.columns[..., part] = inputs.centred(part).transpose(1, 2, 0)
        self.root, self.load = root, rows * ridge

    def outputs_at_once(self, values: int) -> int:
        """Output channels of every group in a block of so many weights, whose factors fit into memory."""
        groups, size, rows = self.columns.shape
        return int(max(1, min(values // (groups * size), _FACTOR_BYTES // (4 * groups * rows**2))))

    def release(self) -> None:
        """Give the columns back to the store."""
        self._store.release(self.columns)


@dataclass(frozen=True)
class RowFit:
    """Least squares of a target `T` [G, M, n].

    Attributes:
        weight: `w` [G, M, K].
        prediction: `w.(X - mean(X)) + level` [G, M, n].
        level: `mean(T)` [G, M].
        variance: `var(T)` [G, M].
        covariance: `cov(T, w.X)` [G, M].
        predicted: `var(w.X)` [G, M].
    """

    weight: Floats
    prediction: Floats
    level: Floats
    variance: Floats
    covariance: Floats
    predicted: Floats


class RowBlock:
    """Some output channels of every group under a mask, each with its factor.

    Args:
        space: The rows.
        targets: Wanted outputs of the channels.
        start: `w0` [G, M, K], 0 outside the mask.
        mask: [G, M, K].

    Attributes:
        given: The targets as given, [G, M, n].
    """

    def __init__(self, space: RowSpace, targets: Targets, start: Floats, mask: Mask) -> None:
        self._space, self._start, self._mask = space, start, mask
        self.given: Floats = _by_channel(targets.target).astype(np.float64)
        self._floor = 0.0 if targets.floor is None else _by_channel(targets.floor)
        self._negative = None if targets.negative is None else _by_channel(targets.negative)
        self._begin: Floats = (start.astype(np.float32) @ space.columns).astype(np.float64)
        self._load = np.empty(mask.shape[:2])
        self._factors: list[Array] = []
        for group, channel in np.ndindex(*mask.shape[:2]):
            load, factor = _factor(space.columns[group], mask[group, channel], space.load[group])
            self._load[group, channel] = load
            self._factors.append(factor)

    def seen(self, target: Floats) -> Floats:
        """The targets given, without errors of the least squares of another target that the ReLU hides."""
        return self._visible(target - self._load[..., None] * self._solved(target))

    def fit(self, target: Floats) -> RowFit:
        """Least squares of a target [G, M, n]."""
        columns, level, count = self._space.columns, target.mean(axis=-1), target.shape[-1]
        step = self._solved(target).astype(np.float32) @ columns.transpose(0, 2, 1)
        np.copyto(step, 0.0, where=~self._mask)
        centred, prediction = target - level[..., None], self._begin + step @ columns
        return RowFit(
            self._start + step,
            prediction + level[..., None],
            level,
            np.vecdot(centred, centred) / count,
            np.vecdot(centred, prediction) / count,
            np.vecdot(prediction, prediction) / count - prediction.mean(axis=-1) ** 2,
        )

    def error_before(self, level: Floats) -> float:
        """`sum mean(e^2)` over the channels for `w0` and a level [G, M], `e` the error that the ReLU lets through."""
        return self.error(self._begin + level[..., None])

    def error(self, prediction: Floats) -> float:
        """The same for a prediction [G, M, n]."""
        return float(np.square(self._visible(prediction) - prediction).mean(axis=-1).sum())

    def _solved(self, target: Floats) -> Floats:
        """`z` [G, M, n]."""
        error = target - target.mean(axis=-1, keepdims=True) - self._begin
        result = np.empty(error.shape)
        loads, solutions = (array.reshape(-1, error.shape[-1]) for array in (error, result))
        for load, own, factor in zip(loads, solutions, self._factors, strict=True):
            solve = lapack.spotrs if factor.dtype == np.float32 else lapack.dpotrs
            own[...] = solve(factor, load.astype(factor.dtype))[0]
        return result

    def _visible(self, prediction: Floats) -> Floats:
        if self._negative is None:
            return self.given
        return np.where(self._negative, np.minimum(prediction, self._floor), self.given)


def _by_channel(array: Array) -> Array:
    """[n, G, M] as [G, M, n]."""
    return np.ascontiguousarray(array.transpose(1, 2, 0))


def _factor(columns: Singles, mask: Mask, load: float) -> tuple[float, Array]:
    """`n R` and the Cholesky factor of `X_S X_S' + n R I` [n, n], for columns [K, n] and the mask [K] of one channel.

    In float32, but in float64 where a pivot is too small for that.
    """
    support = np.flatnonzero(mask)
    kept = columns.take(support, axis=0)
    gram = kept.T @ kept
    load = max(load, NOISE * float(np.trace(gram, dtype=np.float64)) / max(len(support), 1))
    np.einsum("nn->n", gram)[...] += load
    factor, failed = lapack.spotrf(gram, clean=0)
    if not failed and (np.square(np.diagonal(factor)) >= SINGLE * np.diagonal(gram).max()).all():
        return load, np.asarray(factor)
    exact = kept.astype(np.float64)
    gram = exact.T @ exact
    np.einsum("nn->n", gram)[...] += load
    return load, np.asarray(lapack.dpotrf(gram, clean=0, overwrite_a=1)[0])
