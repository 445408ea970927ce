"""Sampled rows of one layer, in chunks: moments of the inputs, and of targets with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from onnx_asr.arrays import Array, Floats, Mask, Singles
from onnx_asr.numerics.workers import ALONE, Workers

Result = TypeVar("Result")

_CHUNK_VALUES = 2**20  # of X per product: summed in float32 within a chunk, in float64 across chunks
_TAKEN_VALUES = 2**22  # of X per product at most, where every product takes its rows anew
_TILE = 1024  # largest side of a tile of the Gram matrix
_RESIDUAL_EVERY = 8  # one chunk of this many measures the residual


@dataclass(frozen=True)
class SolverLimits:
    """How a refit divides its work, and when it stops.

    Attributes:
        gram_bytes: Memory of the Gram matrices of a layer, beyond which `A` is applied through the rows.
        block_values: Values of W solved for at once.
        piece_values: Values of a Gram matrix that are in memory at a time, where a store keeps it elsewhere.
        cg_steps: Conjugate-gradient steps of one solution.
    """

    gram_bytes: int = 2**30
    block_values: int = 2**20
    piece_values: int = 2**21
    cg_steps: int = 400


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


@dataclass(frozen=True)
class Resources:
    """What a refit may use.

    Attributes:
        store: Holds the rows and Gram matrices.
        workers: Compute independent pieces.
        limits: How the work is divided.
    """

    store: BufferStore = MEMORY
    workers: Workers = ALONE
    limits: SolverLimits = field(default_factory=SolverLimits)

    def pieces(self, gram: Floats) -> Iterator[slice]:
        """Rows of [G, K, K] to work on in turn, each set aside afterwards."""
        groups, inputs = gram.shape[:2]
        step = max(1, self.limits.piece_values // (groups * inputs))
        for begin in range(0, inputs, step):
            yield slice(begin, min(begin + step, inputs))
            self.store.set_aside(gram)


class Patches(Protocol):
    """Input patches `X` [n, G, K] of more rows than are held: every pass takes them anew."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`n, G, K`."""

    def take(self, rows: slice) -> Singles:
        """A new array with some of the rows, [c, G, K]."""


class Inputs:
    """Input patches `X` [n, G, K] of G groups, centred: those that are held in place, others whenever they are taken.

    Attributes:
        shape: `n, G, K`.
        mean: `mean(X)` [G, K]; not finite where `X` is not, or is beyond 1e34.
        resources: Hold and process the rows and their Gram matrix.
    """

    def __init__(self, x: Singles | Patches, resources: Resources | None = None) -> None:
        self._x, self.shape, self.resources = x, x.shape, resources or Resources()
        rows, groups, inputs = x.shape
        # about 4 MB, but enough rows for the product to cost more than its sum in float64
        self._step = min(max(_CHUNK_VALUES // (groups * inputs), inputs // 2, 64), 4096)
        if not isinstance(x, np.ndarray):
            self._step = min(self._step, max(_TAKEN_VALUES // (groups * inputs), 64))
        self._centre: Singles = np.zeros((groups, inputs), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            self.mean: Floats = sum(self.map(lambda _, chunk: _sums(chunk)), np.zeros((groups, inputs))) / rows
            self._centre = self.mean.astype(np.float32)
            if isinstance(x, np.ndarray):
                for _ in self.map(lambda _, chunk: np.subtract(chunk, self._centre, out=chunk)):
                    pass

    def __len__(self) -> int:
        return int(self.shape[0])

    def chunks(self, every: int = 1) -> Iterator[slice]:
        """The rows of one chunk of `every`, in order."""
        for begin in range(0, len(self), every * self._step):
            yield slice(begin, min(begin + self._step, len(self)))

    def centred(self, rows: slice) -> Singles:
        """`X - mean(X)` [c, G, K] of some rows."""
        if isinstance(self._x, np.ndarray):
            return self._x[rows]
        with np.errstate(over="ignore", invalid="ignore"):
            chunk = self._x.take(rows)
            chunk -= self._centre
        return chunk

    def map(self, function: Callable[[slice, Singles], Result], every: int = 1) -> Iterator[Result]:
        """Yield what a function makes of the rows and `X - mean(X)` [c, G, K] of one chunk of `every`, in order."""
        chunks = self.chunks(every)
        for result in self.resources.workers.map(lambda rows: function(rows, self.centred(rows)), chunks):
            yield result
            self._set_aside()

    def _set_aside(self) -> None:
        """Say that the rows are not used for a while, where they are held."""
        if isinstance(self._x, np.ndarray):
            self.resources.store.set_aside(self._x)

    def gram(self) -> Floats:
        """`H = cov(X)` [G, K, K], held by the store: the tiles of its upper triangle, summed chunk by chunk."""
        groups, inputs = self.mean.shape
        store, workers = self.resources.store, self.resources.workers
        gram = store.allocate((groups, inputs, inputs), np.dtype(np.float64))
        for rows in self.resources.pieces(gram):
            gram[:, rows] = 0.0
        side = math.ceil(inputs / math.ceil(inputs / _TILE))
        edges = [slice(begin, begin + side) for begin in range(0, inputs, side)]
        tiles = [(left, right) for left in edges for right in edges if left.start <= right.start]

        def pieces() -> Iterator[tuple[Singles, slice, slice]]:
            for rows in self.chunks():
                chunk = self.centred(rows)
                for tile in tiles:
                    yield chunk, *tile

        def product(piece: tuple[Singles, slice, slice]) -> tuple[Singles, slice, slice]:
            chunk, left, right = piece  # where the two are the same, numpy computes a triangle
            return chunk[..., left].transpose(1, 2, 0) @ chunk[..., right].transpose(1, 0, 2), left, right

        for part, left, right in workers.map(product, pieces()):
            gram[:, left, right] += part
            if right is edges[-1]:
                store.set_aside(gram)
                self._set_aside()
        for left, right in tiles:
            gram[:, left, right] /= len(self)
            if left is not right:
                gram[:, right, left] = gram[:, left, right].transpose(0, 2, 1)
            store.set_aside(gram)
        return gram

    def variance(self) -> Floats:
        """`diag(H)` [G, K]."""
        total = sum(self.map(lambda _, chunk: _sums(np.square(chunk))), np.zeros(self.mean.shape))
        return np.asarray(total / len(self))


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
        return self._fit(lambda rows, _: self.target[rows], mean)

    def visible_fit(self, weight: Floats, level: Floats) -> Fit:
        """The fit without errors that the ReLU hides, for the prediction `weight . (X - mean(X)) + level`."""
        predict = _Prediction(weight, level)
        return self._fit(lambda rows, chunk: self._visible(rows, predict(chunk)), level)

    def class_fit(self, weight: Floats, level: Floats) -> Fit:
        """The fit of `z - 2 (softmax(z) - softmax(T))`, with the logits `z = weight . (X - mean(X)) + level`."""
        predict, wanted = _Prediction(weight, level), self.probabilities
        assert wanted is not None

        def target(rows: slice, chunk: Singles) -> Singles:
            logits = predict(chunk)
            return logits - 2 * (softmax(logits) - wanted[rows])

        return self._fit(target, level)

    def error(self, weight: Floats, level: Floats) -> float:
        """`sum mean(e^2)` over all channels and some chunks, `e` the error that the ReLU lets through."""
        predict = _Prediction(weight, level)

        def squares(rows: slice, chunk: Singles) -> tuple[float, int]:
            prediction = predict(chunk)
            error = self._visible(rows, prediction.copy()) - prediction
            return float(np.square(error).sum(dtype=np.float64)), len(error)

        total, count = 0.0, 0
        for square, rows in self.inputs.map(squares, _RESIDUAL_EVERY):
            total += square
            count += rows
        return total / count

    def _fit(self, target_of: Callable[[slice, Singles], Singles], shift: Floats) -> Fit:
        """Moments of targets [c, G, M] with centred inputs [c, G, K]; `shift` [G, M] is near the targets' mean."""
        origin = shift.astype(np.float32)

        def moments(rows: slice, chunk: Singles) -> tuple[Singles, Floats, Floats]:
            target = target_of(rows, chunk) - origin
            product = target.transpose(1, 2, 0) @ chunk.transpose(1, 0, 2)
            return product, _sums(target), _sums(np.square(target))

        cross = np.zeros((*shift.shape, self.inputs.shape[2]))
        mean, square = np.zeros(shift.shape), np.zeros(shift.shape)
        for product, sums, squares in self.inputs.map(moments):
            cross += product
            mean += sums
            square += squares
        for total in (cross, mean, square):
            total /= len(self.inputs)
        return Fit(cross, origin + mean, np.maximum(square - mean**2, 0.0))

    def _visible(self, rows: slice, prediction: Singles) -> Singles:
        """Targets [c, G, M] without errors that the ReLU hides; the prediction is overwritten."""
        if self.negative is None:
            return self.target[rows]
        floor = np.float32(0) if self.floor is None else self.floor[rows]
        return _where(self.negative[rows], np.minimum(prediction, floor, out=prediction), self.target[rows])


class _Prediction:
    """`weight . (X - mean(X)) + level` [c, G, M] for chunks of centred inputs [c, G, K]."""

    def __init__(self, weight: Floats, level: Floats) -> None:
        self._weight: Singles = weight.transpose(0, 2, 1).astype(np.float32)
        self._level: Singles = level.astype(np.float32)

    def __call__(self, chunk: Singles) -> Singles:
        result = np.empty((len(chunk), *self._level.shape), np.float32)
        np.matmul(chunk.transpose(1, 0, 2), self._weight, out=result.transpose(1, 0, 2))
        result += self._level
        return result


def _sums(chunk: Singles) -> Floats:
    """Sums over the rows of a chunk [c, G, K], added in float32 by a matrix product, which is the fastest way."""
    total = np.ones(len(chunk), np.float32) @ chunk.reshape(len(chunk), -1)
    return total.reshape(chunk.shape[1:]).astype(np.float64)


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
