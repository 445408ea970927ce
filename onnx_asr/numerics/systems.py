"""Systems of masked ridge least squares with many right-hand sides, and their solvers.

With the unit diagonal `A = D^-1/2 (H + R I) D^-1/2` of :mod:`onnx_asr.numerics.refit`: `A_SS u_S = r_S` for every
output channel and its support `S`. Directions in which `A` is below `NOISE` are rounding of float32 products, and are
not solved for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_asr.arrays import Floats, Mask, Singles
from onnx_asr.numerics.rows import BufferStore, SolverLimits, pieces

Index: TypeAlias = npt.NDArray[np.intp]

NOISE = 1e-6  # eigenvalues of A (unit diagonal) below this are rounding of the float32 products
_INVERSE_BYTES = 2**29  # of inverses kept between ReLU steps
_BATCH_BYTES = 2**26  # of systems inverted by one call
_BATCH_RATIO = 0.85  # smallest support of a batch, as a share of its largest


class GramSystem:
    """`A` as one matrix per group, [G, K, K]; the Gram matrix, held by the store, is scaled in place.

    Attributes:
        root: `D^1/2` [G, 1, K].
        pull: `R D^-1` [G, 1, K].
    """

    def __init__(self, gram: Floats, root: Floats, pull: Floats, store: BufferStore, limits: SolverLimits) -> None:
        for rows in pieces(gram, store, limits):  # in place: a copy would be 170 MB at K = 4608
            part = gram[:, rows]
            part /= root
            part /= root.transpose(0, 2, 1)[:, rows]
            np.einsum("gkk->gk", gram[:, rows, rows])[...] = 1.0
        self.root, self.pull = root, pull
        self._matrix, self._store, self._limits = gram, store, limits

    def product(self, vectors: Floats) -> Floats:
        """`P A` for [G, M, K]."""
        result = np.asarray(vectors @ self._matrix)
        self._store.set_aside(self._matrix)
        return result

    def single(self, group: int) -> Callable[[Singles], Singles]:
        """`P A` of one group, for [M, K] in float32."""
        matrix = np.empty(self._matrix.shape[1:], np.float32)
        for rows in pieces(self._matrix, self._store, self._limits):
            matrix[rows] = self._matrix[group, rows]
        return lambda vectors: vectors @ matrix

    def inverse(self, mask: Mask) -> Inverse:
        """A solver for all systems of a mask [G, M, K]."""
        result = Inverse(self._matrix, mask)
        self._store.set_aside(self._matrix)
        return result

    def release(self) -> None:
        """Give the matrix back to the store."""
        self._store.release(self._matrix)


class RowSystem:
    """`P A = ((P D^-1/2) X' X / n) D^-1/2 + R P D^-1`, from the centred rows [n, G, K]; attributes as above."""

    def __init__(self, x: Singles, root: Floats, pull: Floats) -> None:
        self.root, self.pull = root, pull
        self._x = x
        self._scale: Singles = (1.0 / root).astype(np.float32)

    def product(self, vectors: Floats) -> Floats:
        """`P A` for [G, M, K]."""
        result = self.pull * vectors
        for group, part in enumerate(vectors):
            result[group] += self._covered(group, part.astype(np.float32))
        return result

    def single(self, group: int) -> Callable[[Singles], Singles]:
        """`P A` of one group, for [M, K] in float32."""
        pull: Singles = self.pull[group].astype(np.float32)
        return lambda vectors: self._covered(group, vectors) + pull * vectors

    def release(self) -> None:
        """Do nothing: it holds only the rows."""

    def _covered(self, group: int, vectors: Singles) -> Singles:
        rows, scale = self._x[:, group], self._scale[group]
        image: Singles = ((vectors * scale) @ rows.T) @ rows
        image *= scale / np.float32(len(rows))
        return image


def inverse_is_cheaper(mask: Mask, steps: int) -> bool:
    """Whether inverses take less time than `steps` of conjugate gradients, and fit in `_INVERSE_BYTES`.

    The coefficients are seconds measured on two cores (AMD Zen 5).
    """
    groups, outputs, inputs = mask.shape
    size = mask.sum(axis=-1, dtype=np.float64)
    inverse = float((6e-11 * size**3 + 1.5e-8 * size**2 + 1e-6).sum())
    gradients = steps * groups * (1e-4 + outputs * inputs * (1e-11 * inputs + 5e-9))
    return inverse < gradients and 8 * float((size**2).sum()) / _BATCH_RATIO**2 < _INVERSE_BYTES


class Inverse:
    """`u_S = A_SS^-1 r_S`; rows with supports of similar size form a batch, padded with the identity.

    Inverses and not Cholesky factors: numpy multiplies batches of matrices, but has no batched triangular solve.
    """

    name: Literal["inverse"] = "inverse"
    steps = 0
    converged = True

    def __init__(self, system: Floats, mask: Mask) -> None:
        outputs, inputs = mask.shape[1:]
        flat = mask.reshape(-1, inputs)
        size = flat.sum(axis=-1)
        order = np.argsort(-size, kind="stable")
        self._batches: list[tuple[Index, Index, Floats]] = []
        begin, end = 0, int(np.count_nonzero(size))  # empty rows come last and are skipped
        while begin < end:
            largest = int(size[order[begin]])
            similar = int(np.count_nonzero(size >= largest * _BATCH_RATIO))
            stop = min(similar, begin + max(1, _BATCH_BYTES // (8 * largest**2)))
            rows = order[begin:stop, None]
            places = np.argsort(~flat[rows[:, 0]], axis=-1, kind="stable")[:, :largest]  # the support, then padding
            real = flat[rows, places]
            systems = system[rows[..., None] // outputs, places[:, :, None], places[:, None, :]]
            systems *= real[:, :, None] & real[:, None, :]
            np.einsum("bkk->bk", systems)[...] = 1.0
            self._batches.append((rows, places, _inverse(systems)))
            begin = stop

    def solve(self, load: Floats, tolerance: float) -> Floats:
        """Solve for [G, M, K] right-hand sides that are 0 outside the mask; `tolerance` is always met."""
        flat = load.reshape(-1, load.shape[-1])
        result = np.zeros_like(flat)
        for rows, places, inverse in self._batches:
            result[rows, places] = (inverse @ flat[rows, places][..., None])[..., 0]
        return result.reshape(load.shape)


def _inverse(systems: Floats) -> Floats:
    """Invert symmetric systems [B, s, s] of unit diagonal; eigenvalues below `NOISE` count as infinite.

    The diagonal of an inverse holds the variance inflation factors, which show whether there are such eigenvalues.
    """
    try:
        inverse = np.asarray(np.linalg.inv(systems), np.float64)
        inflation = np.diagonal(inverse, axis1=1, axis2=2)
        doubtful = ~((inflation > 0) & (inflation < 1 / NOISE)).all(axis=-1)
    except np.linalg.LinAlgError:
        inverse = np.empty_like(systems)
        doubtful = np.ones(len(systems), np.bool_)
    if doubtful.any():
        values, vectors = np.linalg.eigh(systems[doubtful])
        values[values < NOISE] = np.inf
        inverse[doubtful] = (vectors / values[:, None, :]) @ vectors.transpose(0, 2, 1)
    return inverse


class ConjugateGradients:
    """`A_SS u_S = r_S` for all rows of a group: one float32 product `P A` per step, from the last solution.

    With a unit diagonal, Jacobi preconditioning is the identity.

    Attributes:
        steps: Steps taken so far.
        converged: Whether every solution so far met its tolerance within the limit.
    """

    name: Literal["cg"] = "cg"

    def __init__(self, system: GramSystem | RowSystem, mask: Mask, limits: SolverLimits) -> None:
        self.steps, self.converged = 0, True
        self._system, self._mask, self._limit = system, mask, limits.cg_steps
        self._last: Floats = np.zeros(mask.shape)

    def solve(self, load: Floats, tolerance: float) -> Floats:
        """Solve for [G, M, K] right-hand sides that are 0 outside the mask, to `|residual| <= tolerance |load|`.

        The right-hand sides are overwritten; the next call changes the solution.
        """
        goals = tolerance * np.linalg.norm(load, axis=-1)
        reached = self._system.product(self._last)
        np.copyto(reached, 0.0, where=~self._mask)
        load -= reached
        del reached
        for group, residual in enumerate(load):
            solution, mask, goal = self._last[group], self._mask[group], goals[group]
            norm = np.linalg.norm(residual, axis=-1)
            rows = np.flatnonzero(norm > goal)
            if not len(rows):
                continue
            scale = norm[rows, None]
            share = (goal[rows] / norm[rows]).astype(np.float32)
            begin = residual[rows]
            begin /= scale
            begin = begin.astype(np.float32)
            found, steps, converged = _descend(self._system.single(group), mask[rows], begin, share, self._limit)
            solution[rows] += scale * found
            self.steps += steps
            self.converged &= converged
        return self._last


def _descend(
    product: Callable[[Singles], Singles], mask: Mask, residual: Singles, goal: Singles, limit: int
) -> tuple[Singles, int, bool]:
    """Conjugate gradients from 0 for rows of residual norm 1, until each row's residual is below its `goal`.

    A row stops at a direction whose curvature is below `NOISE`. `residual` is overwritten.

    Returns:
        The solution, the steps taken, and whether all rows stopped before the limit.
    """
    result = np.zeros(residual.shape, np.float32)  # takes no memory before rows are done
    rows = np.arange(len(residual))  # of `result`, for the rows still carried
    going = np.ones(len(residual), np.bool_)
    kept = mask.astype(np.float32)
    current = np.zeros_like(residual)
    direction = residual.copy()
    square = np.vecdot(residual, residual)
    for step in itertools.count(1):
        image = product(direction)
        image *= kept
        curvature = np.vecdot(direction, image)
        going &= curvature > NOISE * np.vecdot(direction, direction)
        length = np.divide(square, curvature, out=np.zeros_like(square), where=going)[:, None]
        current += length * direction
        image *= length
        residual -= image
        last, square = square, np.vecdot(residual, residual)
        going &= square > goal**2
        if np.count_nonzero(going) < 0.75 * len(rows):
            result[rows] = current
            rows, goal, kept, last, square = rows[going], goal[going], kept[going], last[going], square[going]
            current, residual, direction = current[going], residual[going], direction[going]
            going = going[going]
        if step == limit or not going.any():
            break
        direction *= np.divide(square, last, out=np.zeros_like(square), where=last > 0)[:, None]
        direction += residual
    result[rows] = current
    return result, step, not going.any()
