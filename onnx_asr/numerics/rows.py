"""Sampled rows of one layer, in chunks: moments of the inputs, and of targets with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from onnx_asr.arrays import Array, Floats, Mask, Singles

_CHUNK_VALUES = 2**20  # of X per product: summed in float32 within a chunk, in float64 across chunks
_RESIDUAL_EVERY = 8  # one chunk of this many measures the residual


@dataclass(frozen=True)
class SolverLimits:
    """How a refit divides its work, and when it stops.

    Attributes:
        few_rows: n / K up to which `A` is applied through the rows: cheaper, and no [K, K] matrix is held.
        block_values: Values of W solved for at once.
        piece_values: Values of a Gram matrix that are in memory at a time, where a store keeps it elsewhere.
        cg_steps: Conjugate-gradient steps of one solution.
    """

    few_rows: float = 0.5
    block_values: int = 2**20
    piece_values: int = 2**21
    cg_steps: int = 400


LIMITS = SolverLimits()


class BufferStore(Protocol):
    """Keeps rows and Gram matrices, in memory or, while they are not used, elsewhere."""

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array with undefined contents."""

    def set_aside(self, array: Array) -> None:
        """Say that an array is not used for a while."""

    def release(self, array: Array) -> None:
        """Say that an array is not used any more."""


class Memory:
    """Keeps everything in memory."""

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array with undefined contents."""
        return np.empty(shape, dtype)

    def set_aside(self, array: Array) -> None:
        """Do nothing."""

    def release(self, array: Array) -> None:
        """Do nothing: an array goes with its last reference."""


MEMORY = Memory()


class Inputs:
    """Input patches `X` [n, G, K] of G groups, centred in place.

    Attributes:
        centred: `X - mean(X)` [n, G, K].
        mean: `mean(X)` [G, K]; finite exactly where all of `X` is, as a sum of float32 cannot overflow float64.
        store: Holds them, and their Gram matrix.
    """

    def __init__(self, x: Singles, store: BufferStore = MEMORY, limits: SolverLimits = LIMITS) -> None:
        groups, inputs = x.shape[1:]
        self.centred, self.store, self._limits = x, store, limits
        with np.errstate(over="ignore", invalid="ignore"):
            self.mean: Floats = x.mean(axis=0, dtype=np.float64)
            x -= self.mean.astype(np.float32)
        # about 4 MB, but enough rows for the product to cost more than its sum in float64
        self._step = min(max(_CHUNK_VALUES // (groups * inputs), inputs // 2, 64), 4096)

    def __len__(self) -> int:
        return len(self.centred)

    def gram(self) -> Floats:
        """`H = cov(X)` [G, K, K], held by the store."""
        groups, inputs = self.mean.shape
        gram = self.store.allocate((groups, inputs, inputs), np.dtype(np.float64))
        for rows in pieces(gram, self.store, self._limits):
            gram[:, rows] = 0.0
        for _, chunk in self.chunks():
            product = chunk.transpose(1, 2, 0) @ chunk.transpose(1, 0, 2)
            for rows in pieces(gram, self.store, self._limits):
                gram[:, rows] += product[:, rows]
            del product  # before there is another one
        for rows in pieces(gram, self.store, self._limits):
            gram[:, rows] /= len(self)
        return gram

    def variance(self) -> Floats:
        """`diag(H)` [G, K]."""
        return np.asarray(np.square(self.centred).mean(axis=0, dtype=np.float64))

    def chunks(self, every: int = 1) -> Iterator[tuple[slice, Singles]]:
        """Yield rows and their `X - mean(X)` [c, G, K], for one chunk of `every`."""
        for begin in range(0, len(self), every * self._step):
            rows = slice(begin, min(begin + self._step, len(self)))
            yield rows, self.centred[rows]
            self.store.set_aside(self.centred)


def pieces(gram: Floats, store: BufferStore, limits: SolverLimits) -> Iterator[slice]:
    """Rows of [G, K, K] to work on in turn, each set aside afterwards."""
    groups, inputs = gram.shape[:2]
    step = max(1, limits.piece_values // (groups * inputs))
    for begin in range(0, inputs, step):
        yield slice(begin, min(begin + step, inputs))
        store.set_aside(gram)


@dataclass(frozen=True)
class Fit:
    """Moments of a target for least squares: `cov(T, X)` [G, M, K], `mean(T)` and `var(T)` [G, M]."""

    cross: Floats
    mean: Floats
    variance: Floats


@dataclass(frozen=True)
class Targets:
    """Wanted outputs of M channels of every group, with their inputs.

    Attributes:
        target: `T` [n, G, M].
        floor: `theta` [n, G, M]; 0 if None.
        negative: [n, G, M], where the dense pre-activation is <= 0; None if no ReLU follows.
        probabilities: `softmax(T)` over M [n, G, M] where the outputs are logits of classes; else None.
    """

    inputs: Inputs
    target: Singles
    floor: Singles | None
    negative: Mask | None
    probabilities: Singles | None

    def of(self, channels: slice) -> Targets:
        """The targets of some channels of every group."""
        floor = None if self.floor is None else self.floor[..., channels]
        negative = None if self.negative is None else self.negative[..., channels]
        probabilities = None if self.probabilities is None else self.probabilities[..., channels]
        return Targets(self.inputs, self.target[..., channels], floor, negative, probabilities)

    def fit(self) -> Fit:
        """The fit of the target as given."""
        with np.errstate(over="ignore", invalid="ignore"):
            mean = self.target.mean(axis=0, dtype=np.float64)
        return self._sum_up(((self.target[rows], chunk) for rows, chunk in self.inputs.chunks()), mean)

    def visible_fit(self, weight: Floats, level: Floats) -> Fit:
        """The fit without errors that the ReLU hides, for the prediction `weight . (X - mean(X)) + level`."""
        return self._sum_up(((target, chunk) for target, _, chunk in self._visible(weight, level)), level)

    def class_fit(self, weight: Floats, level: Floats) -> Fit:
        """The fit of `z - 2 (softmax(z) - softmax(T))`, with the logits `z = weight . (X - mean(X)) + level`."""
        wanted = self.probabilities
        assert wanted is not None
        predicted = self._predicted(weight, level)
        return self._sum_up(((z - 2 * (softmax(z) - wanted[rows]), chunk) for rows, z, chunk in predicted), level)

    def error(self, weight: Floats, level: Floats) -> float:
        """`sum mean(e^2)` over all channels and some chunks, `e` the error that the ReLU lets through."""
        total, count = 0.0, 0
        for target, prediction, _ in self._visible(weight, level, _RESIDUAL_EVERY):
            total += float(np.square(target - prediction).sum(dtype=np.float64))
            count += len(target)
        return total / count

    def _sum_up(self, pairs: Iterator[tuple[Singles, Singles]], shift: Floats) -> Fit:
        """Moments of targets [c, G, M] with centred inputs [c, G, K]; `shift` [G, M] is near the targets' mean."""
        origin = shift.astype(np.float32)
        cross = np.zeros((*shift.shape, self.inputs.centred.shape[2]))
        total, square = np.zeros(shift.shape), np.zeros(shift.shape)
        for target, chunk in pairs:
            target = target - origin
            cross += target.transpose(1, 2, 0) @ chunk.transpose(1, 0, 2)
            total += target.sum(axis=0, dtype=np.float64)
            square += np.square(target).sum(axis=0, dtype=np.float64)
        offset = total / len(self.inputs)
        variance = np.maximum(square / len(self.inputs) - offset**2, 0.0)
        cross /= len(self.inputs)
        return Fit(cross, origin + offset, variance)

    def _visible(self, weight: Floats, level: Floats, every: int = 1) -> Iterator[tuple[Singles, Singles, Singles]]:
        """Yield target, prediction [c, G, M] and centred inputs [c, G, K], without errors that the ReLU hides."""
        for rows, prediction, chunk in self._predicted(weight, level, every):
            target = self.target[rows]
            if self.negative is not None:
                floor = np.float32(0) if self.floor is None else self.floor[rows]
                target = _where(self.negative[rows], np.minimum(prediction, floor), target)
            yield target, prediction, chunk

    def _predicted(self, weight: Floats, level: Floats, every: int = 1) -> Iterator[tuple[slice, Singles, Singles]]:
        """Yield rows, prediction [c, G, M] and centred inputs [c, G, K]."""
        single, base = weight.transpose(0, 2, 1).astype(np.float32), level.astype(np.float32)
        for rows, chunk in self.inputs.chunks(every):
            prediction = np.empty((len(chunk), *level.shape), np.float32)
            np.matmul(chunk.transpose(1, 0, 2), single, out=prediction.transpose(1, 0, 2))
            prediction += base
            yield rows, prediction, chunk


def _where(mask: Mask, chosen: Singles, other: Singles) -> Singles:
    """`np.where(mask, chosen, other)`, five times as fast where the mask is irregular; `chosen` is overwritten.

    No branch per element: `other ^ ((chosen ^ other) & m)`, where the bits of `m` are all 1 or all 0.
    """
    bits, rest = chosen.view(np.int32), other.view(np.int32)
    bits ^= rest
    bits &= np.negative(mask.view(np.int8)).astype(np.int32)
    bits ^= rest
    return chosen


def softmax(logits: Singles) -> Singles:
    """`exp(z) / sum exp(z)` over the last axis."""
    result: Singles = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result /= result.sum(axis=-1, keepdims=True)
    return result
