"""Systems of masked ridge least squares with many right-hand sides, and their solvers.

With the unit diagonal `A = D^-1/2 (H + R I) D^-1/2` of :mod:`onnx_asr.numerics.refit`: `A_SS u_S = r_S` for every
output channel and its support `S`. Directions in which `A` is below `NOISE` are rounding of float32 products, and are
not solved for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy.linalg import lapack

from onnx_asr.arrays import Array, Floats, Integers, Mask, Singles
from onnx_asr.numerics.rows import Inputs, Resources

NOISE = 1e-6  # eigenvalues of A (unit diagonal) below this are rounding of the float32 products
SINGLE = 1e-4  # smallest pivot of a factor that float32 can tell from rounding
_FACTOR_BYTES = 2**29  # of factors kept between ReLU steps
_ROWS = 64  # right-hand sides of one piece of work
_RANK, _POWERS = 32, 3  # leading eigenvectors that precondition, and products with `A` that find them
_INPUTS_EACH = 64  # for each of these


class GramSystem:
    """`A` as one matrix per group, [G, K, K]; the Gram matrix, held by the store, is scaled in place.

    Attributes:
        root: `D^1/2` [G, 1, K].
        pull: `R D^-1` [G, 1, K].
    """

    def __init__(self, gram: Floats, root: Floats, pull: Floats, resources: Resources) -> None:
        for rows in resources.pieces(gram):  # in place: a copy would be 170 MB at K = 4608
            part = gram[:, rows]
            part /= root
            part /= root.transpose(0, 2, 1)[:, rows]
            np.einsum("gkk->gk", gram[:, rows, rows])[...] = 1.0
        self.root, self.pull = root, pull
        self._matrix, self.resources = gram, resources

    def product(self, vectors: Floats) -> Floats:
        """`P A` for [G, M, K]."""
        result = np.empty(vectors.shape)

        def multiply(rows: slice) -> None:
            np.matmul(vectors[:, rows], self._matrix, out=result[:, rows])

        self.resources.workers.run(multiply, _slices(vectors.shape[1]))
        self.set_aside()
        return result

    def single(self, group: int) -> Callable[[Singles], Singles]:
        """`P A` of one group, for [M, K] in float32."""
        matrix = np.empty(self._matrix.shape[1:], np.float32)
        for rows in self.resources.pieces(self._matrix):
            matrix[rows] = self._matrix[group, rows]
        return lambda vectors: vectors @ matrix

    def restricted(self, group: int, support: Integers) -> Floats:
        """`A_SS` [s, s] of one group."""
        return np.asarray(self._matrix[group][np.ix_(support, support)])

    def triangle(self, group: int, support: Integers, vector: Floats) -> tuple[Singles, Floats]:
        """The lower triangle of `A_SS` [s, s] of one group, in float32, with `A_SS u` for a vector `u` [s]."""
        flat, inputs, size = self._matrix[group].reshape(-1), self._matrix.shape[-1], len(support)
        lower, image = np.empty((size, size), np.float32), np.zeros(size)
        for begin in range(0, size, _ROWS):
            end = min(begin + _ROWS, size)
            part = flat.take(support[begin:end, None] * inputs + support[:end], mode="clip")  # faster than "raise"
            lower[begin:end, :end] = part
            image[begin:end] += part @ vector[:end]
            image[:begin] += vector[begin:end] @ part[:, :begin]
        return lower, image

    def set_aside(self) -> None:
        """Say that the matrix is not used for a while."""
        self.resources.store.set_aside(self._matrix)

    def release(self) -> None:
        """Give the matrix back to the store."""
        self.resources.store.release(self._matrix)


class RowSystem:
    """`P A = ((P D^-1/2) X' X / n) D^-1/2 + R P D^-1`, from the rows; attributes as above."""

    def __init__(self, inputs: Inputs, root: Floats, pull: Floats) -> None:
        self.root, self.pull, self.resources = root, pull, inputs.resources
        self._inputs = inputs
        self._scale: Singles = (1.0 / root).astype(np.float32)

    def product(self, vectors: Floats) -> Floats:
        """`P A` for [G, M, K]."""
        result = np.asarray(self.pull * vectors)

        def add(work: tuple[int, slice]) -> None:
            group, rows = work
            result[group, rows] += self._covered(group, vectors[group, rows].astype(np.float32))

        self.resources.workers.run(add, itertools.product(range(len(vectors)), _slices(vectors.shape[1])))
        return result

    def single(self, group: int) -> Callable[[Singles], Singles]:
        """`P A` of one group, for [M, K] in float32."""
        pull: Singles = self.pull[group].astype(np.float32)
        return lambda vectors: self._covered(group, vectors) + pull * vectors

    def release(self) -> None:
        """Do nothing: it holds only the rows."""

    def _covered(self, group: int, vectors: Singles) -> Singles:
        scale = self._scale[group]
        scaled, image = vectors * scale, np.zeros_like(vectors)
        for rows in self._inputs.chunks():
            part = self._inputs.centred(rows)[:, group]
            image += (scaled @ part.T) @ part
        image *= scale / np.float32(len(self._inputs))
        return image


def _slices(rows: int) -> Iterator[slice]:
    """Pieces of a number of right-hand sides."""
    return (slice(begin, min(begin + _ROWS, rows)) for begin in range(0, rows, _ROWS))


def factors_are_cheaper(mask: Mask, steps: int) -> bool:
    """Whether factors for a mask [G, M, K] take less time than `steps` of conjugate gradients on the Gram matrices."""
    return _factors(mask) < _gradients(mask, steps, 2e-11 * mask.shape[-1])


Way: TypeAlias = Literal["gram", "rows", "row space"]


def cheapest_way(mask: Mask, rows: int, steps: int, gram_bytes: int) -> Way:
    """How a layer of n rows with a mask [G, M, K] is solved in the least time.

    By its Gram matrices, if these take no more than `gram_bytes`; through its rows, by `steps` of conjugate gradients;
    or in the space of its rows (:mod:`onnx_asr.numerics.few_rows`).
    """
    groups, outputs, inputs = mask.shape
    seconds: dict[Way, float] = {"rows": _gradients(mask, steps, 4e-11 * rows)}
    if 8 * groups * inputs**2 <= gram_bytes:
        product = groups * inputs**2 * (1e-11 * rows + 1e-8)
        seconds["gram"] = product + min(_factors(mask), _gradients(mask, steps, 2e-11 * inputs))
    if rows < inputs:
        kept = float(mask.sum(dtype=np.float64))
        each = 7.5e-12 * rows**3 + 6e-11 * rows * inputs + 1e-4
        seconds["row space"] = kept * (1e-11 * rows**2 + 1e-9 * rows) + groups * outputs * each
    return min(seconds, key=lambda way: seconds[way])


# seconds measured on one core (AMD Zen 5)


def _factors(mask: Mask) -> float:
    size = mask.sum(axis=-1, dtype=np.float64)
    return float((3.5e-12 * size**3 + 4e-9 * size**2 + 4e-5).sum())


def _gradients(mask: Mask, steps: int, product: float) -> float:
    groups, outputs, inputs = mask.shape
    seconds: float = steps * groups * (1e-4 + outputs * inputs * (product + 5e-9))
    return seconds


def outputs_that_fit(mask: Mask) -> int:
    """For how many output channels of every group factors may be kept between ReLU steps, under a mask [G, M, K]."""
    largest = int(mask.sum(axis=-1).max())
    return max(_FACTOR_BYTES // (4 * len(mask) * largest**2 + 1), 1)


class Cholesky:
    """`u_S = A_SS^-1 r_S` by a factor for every row, in float32.

    Attributes:
        image: `A_SS v_S` for the vectors `v` [G, M, K] that it is made with; 0 outside the mask.
    """

    name: Literal["cholesky"] = "cholesky"
    steps = 0
    converged = True

    def __init__(self, system: GramSystem, mask: Mask, vectors: Floats) -> None:
        self.image = np.zeros(vectors.shape)
        self._workers = system.resources.workers
        flat, start, image = (array.reshape(-1, mask.shape[-1]) for array in (mask, vectors, self.image))
        rows = np.flatnonzero(flat.any(axis=-1))

        def factor(row: int) -> _Factor:
            support = np.flatnonzero(flat[row])
            group = row // mask.shape[1]
            lower, image[row, support] = system.triangle(group, support, start[row, support])
            upper, failed = lapack.spotrf(lower.T, clean=0, overwrite_a=1)
            if failed or (np.square(np.diagonal(upper)) < SINGLE).any():
                return _Factor(row, support, _inverse(system.restricted(group, support)))
            return _Factor(row, support, upper)

        def factors(part: Integers) -> list[_Factor]:
            return [factor(row) for row in part]

        self._pieces = list(self._workers.map(factors, (rows[part] for part in _slices(len(rows)))))
        system.set_aside()

    def solve(self, load: Floats, tolerance: float) -> Floats:
        """Solve for [G, M, K] right-hand sides that are 0 outside the mask; `tolerance` is always met."""
        result = np.zeros(load.shape)
        flat, flat_result = (array.reshape(-1, load.shape[-1]) for array in (load, result))

        def fill(factors: list[_Factor]) -> None:
            for factor in factors:
                flat_result[factor.row, factor.support] = factor.solve(flat[factor.row, factor.support])

        self._workers.run(fill, self._pieces)
        return result


@dataclass(frozen=True)
class _Factor:
    """The system `A_SS` of one row.

    Attributes:
        row: Number among all rows of all groups.
        support: `S` [s].
        matrix: Its Cholesky factor [s, s] in float32, or its inverse in float64 where a pivot is too small for that.
    """

    row: int
    support: Integers
    matrix: Singles | Floats

    def solve(self, load: Floats) -> Array:
        """`u_S` for `r_S` [s]."""
        if self.matrix.dtype == np.float64:
            return np.asarray(self.matrix @ load)
        return np.asarray(lapack.spotrs(self.matrix, load.astype(np.float32), overwrite_b=1)[0])


def _inverse(system: Floats) -> Floats:
    """Invert a symmetric system [s, s] of unit diagonal; eigenvalues below `NOISE` count as infinite.

    The diagonal of an inverse holds the variance inflation factors, which show whether there are such eigenvalues.
    """
    try:
        inverse = np.asarray(np.linalg.inv(system), np.float64)
        inflation = np.diagonal(inverse)
        if ((inflation > 0) & (inflation < 1 / NOISE)).all():
            return inverse
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(system)
    values[values < NOISE] = np.inf
    return np.asarray((vectors / values) @ vectors.T)


class ConjugateGradients:
    """`A_SS u_S = r_S` for all rows of a group: one float32 product `P A` per step, from the last solution.

    With a unit diagonal, Jacobi preconditioning is the identity; :class:`_Leading` is what preconditions.

    Attributes:
        image: `P A v` for the vectors `v` [G, M, K] that it is made with; 0 outside the mask.
        steps: Steps taken so far.
        converged: Whether every solution so far met its tolerance within the limit.
    """

    name: Literal["cg"] = "cg"

    def __init__(self, system: GramSystem | RowSystem, mask: Mask, vectors: Floats) -> None:
        self.image = system.product(vectors)
        np.copyto(self.image, 0.0, where=~mask)
        self.steps, self.converged = 0, True
        self._system, self._mask = system, mask
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
            self._improve(group, residual, goals[group])
        return self._last

    def _improve(self, group: int, residual: Floats, goals: Floats) -> None:
        """Continue from the last solution of one group's rows, until each residual [K] of [M, K] is below its goal."""
        norms = np.linalg.norm(residual, axis=-1)
        wanting = np.flatnonzero(norms > goals)
        if not len(wanting):
            return
        resources, product = self._system.resources, self._system.single(group)
        solution, mask = self._last[group], self._mask[group]
        leading = _Leading(product, mask.shape[1], min(_RANK, mask.shape[1] // _INPUTS_EACH, len(wanting) // 2))

        def descend(rows: Integers) -> tuple[int, bool]:
            scale = norms[rows, None]
            share = (goals[rows] / norms[rows]).astype(np.float32)
            begin = (residual[rows] / scale).astype(np.float32)
            found, steps, converged = _descend(product, leading, mask[rows], begin, share, resources.limits.cg_steps)
            solution[rows] += scale * found
            return steps, converged

        for steps, converged in resources.workers.map(descend, (wanting[part] for part in _slices(len(wanting)))):
            self.steps += steps
            self.converged &= converged


class _Leading:
    """Preconditions `A_SS` by the leading eigenvectors `U` [K, k] of `A`.

    A random support with a share `d` of the inputs has `A_SS = d A + (1 - d) I` on average. The inverse of that is
    approximated by `I + U diag(c / (d lambda + 1 - d) - 1) U'`, `c` its mean eigenvalue beside `U`, up to a factor.

    Args:
        product: `P A`.
        inputs: K.
        rank: k; 0 for the identity.
    """

    def __init__(self, product: Callable[[Singles], Singles], inputs: int, rank: int) -> None:
        vectors: Singles = np.random.default_rng(0).standard_normal((rank, inputs), np.float32)
        self._vectors: Singles = np.empty((inputs, 0), np.float32)
        self._values: Floats = np.empty(0)
        if rank:
            image = product(vectors) - vectors  # 0 for an input that depends on no other, as in all that follows
            for _ in range(_POWERS):  # within the range of A, so that nothing moves along its null space
                vectors = np.ascontiguousarray(np.linalg.qr(image.T.astype(np.float64))[0].T, dtype=np.float32)
                image = product(vectors)
            values, turn = np.linalg.eigh((image @ vectors.T).astype(np.float64))
            self._vectors = np.ascontiguousarray(vectors.T @ turn.astype(np.float32))
            self._values = np.maximum(values, 0.0)
        self._others = max(inputs - float(self._values.sum()), 0.0) / (inputs - rank)

    def weights(self, mask: Mask) -> Singles:
        """`c / (d lambda + 1 - d) - 1` for the supports of some rows [M, K], [M, k]."""
        share = mask.mean(axis=-1, keepdims=True)
        rest = 1 - share
        result: Singles = ((share * self._others + rest) / (share * self._values + rest + NOISE) - 1).astype(np.float32)
        return result

    def apply(self, residual: Singles, weights: Singles, kept: Singles) -> Singles:
        """The preconditioned residuals [M, K] of rows, 0 outside their supports."""
        if not weights.shape[1]:
            return np.array(residual)
        result: Singles = ((residual @ self._vectors) * weights) @ self._vectors.T
        result += residual
        result *= kept
        return result


def _descend(
    product: Callable[[Singles], Singles],
    leading: _Leading,
    mask: Mask,
    residual: Singles,
    goal: Singles,
    limit: int,
) -> tuple[Singles, int, bool]:
    """Conjugate gradients from 0 for rows of residual norm 1, until each row's residual is below its `goal`.

    A row stops at a direction whose curvature is below `NOISE`. `residual` is overwritten.

    Returns:
        The solution, the steps taken, and whether all rows stopped before the limit.
    """
    result = np.zeros(residual.shape, np.float32)  # takes no memory before rows are done
    rows = np.arange(len(residual))  # of `result`, for the rows still carried
    going = np.ones(len(residual), np.bool_)
    kept, weights = mask.astype(np.float32), leading.weights(mask)
    current = np.zeros_like(residual)
    direction = leading.apply(residual, weights, kept)
    slope = np.vecdot(residual, direction)
    for step in itertools.count(1):
        image = product(direction)
        image *= kept
        curvature = np.vecdot(direction, image)
        going &= curvature > NOISE * np.vecdot(direction, direction)
        length = np.divide(slope, curvature, out=np.zeros_like(slope), where=going)[:, None]
        current += length * direction
        image *= length
        residual -= image
        going &= np.vecdot(residual, residual) > goal**2
        if np.count_nonzero(going) < 0.75 * len(rows):
            result[rows] = current
            rows, goal, kept, weights, slope = rows[going], goal[going], kept[going], weights[going], slope[going]
            current, residual, direction = current[going], residual[going], direction[going]
            going = going[going]
        if step == limit or not going.any():
            break
        turned = leading.apply(residual, weights, kept)
        last, slope = slope, np.vecdot(residual, turned)
        direction *= np.divide(slope, last, out=np.zeros_like(slope), where=last > 0)[:, None]
        direction += turned
    result[rows] = current
    return result, step, not going.any()
