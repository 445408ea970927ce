"""Refit of one layer: least squares on the weights that survived, from sampled rows.

Per group of a convolution, with `X` [n, K] patches of the repaired network's input, and per output channel with target
`T` [n] (the dense network's output), surviving weights `S` and their dense values `w0`, solve

    min over w, b of  mean (T - w.X - b)^2 + R |w - w0|^2,   w = 0 outside S,   R = ridge mean(diag H) + 1e-12.

With `H = cov(X)` and `G = cov(T, X)` the answer is `(H_SS + R I) w = G_S + R w0`, `b = mean(T) - w.mean(X)`. It is
computed for the displacement from `w0`, and scaled to a unit diagonal by `D = diag(H) + R`:

    A = D^-1/2 (H + R I) D^-1/2,   v = D^1/2 w,   A_SS (v - v0)_S = (D^-1/2 G + R D^-1 v0 - A v0)_S.

So wherever the rows say nothing (inputs that never change, fewer rows than inputs, ridge 0 on a singular `H`) the
weights stay at `w0`: directions in which `A` is below `_NOISE` are rounding of the float32 products and are left alone.

**ReLU-aware step.** An error that the following ReLU hides is no error: where the dense pre-activation is <= 0, any
prediction below `theta` (0, or minus the shortcut that is added before the ReLU) is as good as any other, so there
`T <- min(w.X + b, theta)`. Only `G` and `mean(T)` change, `A` does not.

**Gain.** Least squares shrinks: `std(w.X) = corr std(T)`. At the end `w <- g w` with
`g = (std(T) / std(w.X))^gain_power` and the mean kept; 1 where the correlation is below `min_correlation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_asr.errors import OptionError

Array: TypeAlias = npt.NDArray[np.float64]
Single: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = npt.NDArray[np.bool_]
Index: TypeAlias = npt.NDArray[np.intp]

_CHUNK_VALUES = 2**20  # of X a product: summed in float32 within, in float64 across
_FEW_ROWS = 0.5  # n / K up to which A is applied through the rows: cheaper, and no [K, K] matrix is held
_RESIDUAL_EVERY = 4  # chunks, of which one measures the residual
_NOISE = 1e-6  # eigenvalues of A (unit diagonal) below this are rounding of the float32 products
_INVERSE_BYTES = 2**29  # of inverses kept between ReLU steps
_BATCH_BYTES = 2**26  # of systems inverted by one call
_BATCH_RATIO = 0.85  # supports of one batch are at least this share of its largest one
_CG_DRAFT = 1e-3  # |residual| / |load| good enough to see what the ReLU hides
_CG_FINAL = 5e-6  # and in the weights
_CG_STEPS = 400


class NotFiniteError(ValueError):
    """Samples or weights that are not finite, or too large to be squared in float32."""


@dataclass(frozen=True)
class RefitOptions:
    """How a layer is refitted.

    Attributes:
        ridge: Pull toward the surviving dense weights, as a share of the mean input variance.
        relu_steps: ReLU-aware steps, where a ReLU follows.
        gain_power: 0 keeps the least-squares weights, 1 restores the standard deviation of the target.
        min_correlation: Channels whose fit correlates less than this with their target get gain 1.
    """

    ridge: float = 1e-2
    relu_steps: int = 3
    gain_power: float = 0.5
    min_correlation: float = 0.05

    def __post_init__(self) -> None:
        for name in ("ridge", "relu_steps", "gain_power", "min_correlation"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise OptionError(f"{name} is {value}; it must be a finite number of at least 0")


@dataclass(frozen=True)
class RefitSolution:
    """A refitted layer.

    Attributes:
        weight: [G, M, K], exactly 0 where the mask is False.
        bias: [G * M].
        gain: [G * M], already contained in `weight`.
        residual_before: `sqrt(sum mean(e^2) / sum var(T))` over all channels for `w0` with `b = mean(T) - w0.mean(X)`;
            `e` is the error of the prediction, less what the ReLU hides where one follows, over every fourth chunk of
            the rows. Not divided where every target is constant.
        residual_after: The same for `weight` and `bias`.
        rows: The number n of samples.
        solver: What solved the systems: an inverse for each row, or conjugate gradients on the rows of a group at once.
    """

    weight: Array
    bias: Array
    gain: Array
    residual_before: float
    residual_after: float
    rows: int
    solver: Literal["inverse", "cg"]


def refit_rows(
    x: Single,
    target: Single,
    w0: npt.NDArray[np.floating],
    mask: Mask,
    options: RefitOptions,
    *,
    relu_floor: Single | None = None,
    dense_negative: Mask | None = None,
) -> RefitSolution:
    """`(H_SS + R I) w = G_S + R w0`, `b = mean(T) - w.mean(X)`, for every output channel of one layer.

    Args:
        x: [n, G, K] input patches; G groups of the convolution, K = C_in / G * kh * kw. Centred in place.
        target: [n, G * M] wanted outputs, the channels of a group side by side.
        w0: [G, M, K] dense weights; those outside the mask are not looked at.
        mask: [G, M, K], True where a weight survives.
        options: Ridge, ReLU-aware steps, gain.
        relu_floor: [n, G * M] `theta`; 0 if None.
        dense_negative: [n, G * M], where the dense pre-activation is <= 0; None if no ReLU follows.

    Returns:
        The refitted layer; always finite.

    Raises:
        ValueError: If shapes do not fit together, or a value is not finite or too large to be squared in float32.
    """
    _check_shapes(x, target, w0, mask, relu_floor, dense_negative)
    kept = np.where(mask, w0, 0.0).astype(np.float64)
    samples = _Samples(x, target, relu_floor, dense_negative, outputs=w0.shape[1])
    _check_finite(x=samples.input_mean, target=samples.target_mean, w0=kept, relu_floor=relu_floor)

    with np.errstate(over="ignore", invalid="ignore"):
        gram = samples.gram() if len(x) > _FEW_ROWS * x.shape[2] else None  # [G, K, K]
        diagonal = samples.input_variance() if gram is None else np.diagonal(gram, axis1=1, axis2=2).copy()  # [G, K]
        fit = samples.fit()
        spread = float(fit.variance.sum()) or 1.0
        error_before = samples.error(kept, fit.mean)
    if not all(np.isfinite(values).all() for values in (diagonal, fit.cross, spread, error_before)):
        raise NotFiniteError("x, target or w0 is too large to be squared in float32; scale the layer down")

    ridge = options.ridge * diagonal.mean(axis=1, keepdims=True) + 1e-12  # [G, 1]
    root = np.sqrt(diagonal + ridge)[:, None, :]  # D^1/2 [G, 1, K]
    pull = ridge[:, None, :] / root**2  # R D^-1 [G, 1, K]
    system = _RowSystem(x, root, pull) if gram is None else _GramSystem(gram, root)

    start = kept * root
    constant = pull * start - system.product(start)
    solver: _Inverse | _ConjugateGradients
    if isinstance(system, _GramSystem) and _inverse_is_cheaper(mask):
        solver = _Inverse(system.matrix, mask)
    else:
        solver = _ConjugateGradients(system, mask)
    for _ in range(options.relu_steps if dense_negative is not None else 0):
        scaled = start + solver.solve(np.where(mask, fit.cross / root + constant, 0.0), _CG_DRAFT)
        fit = samples.visible_fit(scaled / root, fit.mean)
    scaled = start + solver.solve(np.where(mask, fit.cross / root + constant, 0.0), _CG_FINAL)

    # var(w.X) = w'Hw = v'(A - R D^-1)v and cov(T, w.X) = w.G; a variance lost in rounding counts as 0.
    variance = np.vecdot(scaled, system.product(scaled) - pull * scaled)
    variance[variance <= _NOISE * np.vecdot(scaled, scaled - pull * scaled)] = 0.0
    gain = _gain(fit.variance, variance, np.vecdot(scaled, fit.cross / root), options)
    weight = scaled / root * gain[..., None]
    bias = fit.mean - np.vecdot(weight, samples.input_mean[:, None, :])
    return RefitSolution(
        weight=weight,
        bias=bias.ravel(),
        gain=gain.ravel(),
        residual_before=float(np.sqrt(error_before / spread)),
        residual_after=float(np.sqrt(samples.error(weight, fit.mean) / spread)),
        rows=len(x),
        solver=solver.name,
    )


def covariance(x: Single) -> Array:
    """`H = cov(X)` [G, K, K] of input patches [n, G, K], which are centred in place."""
    return _Samples(x, np.zeros((len(x), x.shape[1]), np.float32), None, None, outputs=1).gram()


def _check_shapes(
    x: Single,
    target: Single,
    w0: npt.NDArray[np.floating],
    mask: Mask,
    relu_floor: Single | None,
    dense_negative: Mask | None,
) -> None:
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; expected [n, G, K], none of them 0")
    rows, groups, inputs = x.shape
    if w0.ndim != 3 or w0.shape[::2] != (groups, inputs) or mask.shape != w0.shape or mask.dtype != np.bool_:
        raise ValueError(
            f"w0 is {w0.shape}, mask {mask.shape} {mask.dtype}; for x of shape {x.shape} both must be "
            f"[{groups}, M, {inputs}], the mask boolean"
        )
    outputs = (rows, groups * w0.shape[1])
    for name, array in (("target", target), ("relu_floor", relu_floor), ("dense_negative", dense_negative)):
        if array is not None and array.shape != outputs:
            raise ValueError(f"{name} has shape {array.shape}; expected [n, G * M] = {outputs}")
    if relu_floor is not None and dense_negative is None:
        raise ValueError("relu_floor is given without dense_negative; where a ReLU follows, give dense_negative too")


def _check_finite(**arrays: npt.NDArray[np.floating] | None) -> None:
    for name, array in arrays.items():
        if array is not None and not np.isfinite(array).all():
            raise NotFiniteError(f"{name} holds NaN or infinity; refit needs finite samples and weights")


def _gain(target_variance: Array, variance: Array, covariance: Array, options: RefitOptions) -> Array:
    """`(var(T) / var(w.X))^(gain_power / 2)`; 1 where either is 0 or the correlation is below `min_correlation`."""
    usable = (target_variance > 0) & (variance > 0)
    ratio = np.divide(target_variance, variance, out=np.ones_like(variance), where=usable)
    scale = np.sqrt(target_variance * variance)
    usable &= covariance >= options.min_correlation * scale
    return np.where(usable, ratio, 1.0) ** (options.gain_power / 2)


@dataclass(frozen=True)
class _Fit:
    """What least squares needs to know of a target: `cov(T, X)` [G, M, K], `mean(T)` and `var(T)` [G, M]."""

    cross: Array
    mean: Array
    variance: Array


class _Samples:
    """The rows of one layer, centred in place, read in chunks."""

    def __init__(
        self, x: Single, target: Single, relu_floor: Single | None, dense_negative: Mask | None, *, outputs: int
    ) -> None:
        groups, inputs = x.shape[1:]
        self._x = x
        self._target = target.reshape(-1, groups, outputs)
        self._floor = None if relu_floor is None else relu_floor.reshape(-1, groups, outputs)
        self._negative = None if dense_negative is None else dense_negative.reshape(-1, groups, outputs)
        # A sum of float32 values cannot overflow float64: these are finite exactly where all samples are.
        with np.errstate(over="ignore", invalid="ignore"):
            self.input_mean: Array = x.mean(axis=0, dtype=np.float64)  # [G, K]
            self.target_mean: Array = self._target.mean(axis=0, dtype=np.float64)  # [G, M]
            x -= self.input_mean.astype(np.float32)
        # Some 4 MB, but enough rows for the product to cost more than adding it up in float64.
        self._step = min(max(_CHUNK_VALUES // (groups * inputs), inputs // 2, 64), 4096)

    def gram(self) -> Array:
        """`H = cov(X)` [G, K, K]."""
        groups, inputs = self.input_mean.shape
        gram = np.zeros((groups, inputs, inputs))
        for _, chunk in self._chunks():
            gram += chunk.transpose(1, 2, 0) @ chunk.transpose(1, 0, 2)
        gram /= len(self._x)
        return gram

    def input_variance(self) -> Array:
        """`diag(H)` [G, K]."""
        return np.asarray(np.square(self._x).mean(axis=0, dtype=np.float64))

    def fit(self) -> _Fit:
        """The fit of the target as it was given."""
        return self._sum_up(((self._target[rows], chunk) for rows, chunk in self._chunks()), self.target_mean)

    def visible_fit(self, weight: Array, level: Array) -> _Fit:
        """The fit of what the ReLU lets through, for the prediction `weight . (X - mean(X)) + level`."""
        return self._sum_up(((target, chunk) for target, _, chunk in self._visible(weight, level)), level)

    def error(self, weight: Array, level: Array) -> float:
        """`sum mean(e^2)` over all channels and some chunks, `e` the error that the ReLU lets through."""
        total = 0.0
        count = 0
        for target, prediction, _ in self._visible(weight, level, _RESIDUAL_EVERY):
            total += float(np.square(target - prediction).sum(dtype=np.float64))
            count += len(target)
        return total / count

    def _sum_up(self, pairs: Iterator[tuple[Single, Single]], shift: Array) -> _Fit:
        """Moments of targets [c, G, M] with centred inputs [c, G, K]; `shift` [G, M] is near the targets' mean."""
        origin = shift.astype(np.float32)
        cross, total, square = np.zeros((*shift.shape, self._x.shape[2])), np.zeros(shift.shape), np.zeros(shift.shape)
        for target, chunk in pairs:
            target = target - origin
            cross += target.transpose(1, 2, 0) @ chunk.transpose(1, 0, 2)
            total += target.sum(axis=0, dtype=np.float64)
            square += np.square(target).sum(axis=0, dtype=np.float64)
        offset = total / len(self._x)
        variance = np.maximum(square / len(self._x) - offset**2, 0.0)
        return _Fit(cross / len(self._x), origin + offset, variance)

    def _visible(self, weight: Array, level: Array, every: int = 1) -> Iterator[tuple[Single, Single, Single]]:
        """Yields target, prediction [c, G, M] and centred inputs [c, G, K], without errors that the ReLU hides."""
        single, base = weight.transpose(0, 2, 1).astype(np.float32), level.astype(np.float32)
        for rows, chunk in self._chunks(every):
            target = self._target[rows]
            prediction = np.empty(target.shape, np.float32)
            np.matmul(chunk.transpose(1, 0, 2), single, out=prediction.transpose(1, 0, 2))
            prediction += base
            if self._negative is not None:
                floor = np.float32(0) if self._floor is None else self._floor[rows]
                target = np.where(self._negative[rows], np.minimum(prediction, floor), target)
            yield target, prediction, chunk

    def _chunks(self, every: int = 1) -> Iterator[tuple[slice, Single]]:
        """Yields rows and their `X - mean(X)` [c, G, K], one chunk of `every`."""
        for begin in range(0, len(self._x), every * self._step):
            rows = slice(begin, min(begin + self._step, len(self._x)))
            yield rows, self._x[rows]


class _GramSystem:
    """`A` as a matrix for each group, [G, K, K]; the Gram matrix is scaled in place."""

    def __init__(self, gram: Array, root: Array) -> None:
        gram /= root  # in place: a copy would be 170 MB at K = 4608
        gram /= root.transpose(0, 2, 1)
        np.einsum("gkk->gk", gram)[...] = 1.0
        self.matrix = gram

    def product(self, vectors: Array) -> Array:
        """`P A` for [G, M, K]."""
        return np.asarray(vectors @ self.matrix)

    def single(self, group: int) -> Callable[[Single], Single]:
        """`P A` of one group, for [M, K] in float32."""
        matrix = self.matrix[group].astype(np.float32)
        return lambda vectors: vectors @ matrix


class _RowSystem:
    """`P A = ((P D^-1/2) X' X / n) D^-1/2 + R P D^-1`, from the centred rows [n, G, K]."""

    def __init__(self, x: Single, root: Array, pull: Array) -> None:
        self._x = x
        self._scale: Single = (1.0 / root).astype(np.float32)
        self._pull = pull

    def product(self, vectors: Array) -> Array:
        """`P A` for [G, M, K]."""
        image = np.stack([self._covered(group, part.astype(np.float32)) for group, part in enumerate(vectors)])
        return image + self._pull * vectors

    def single(self, group: int) -> Callable[[Single], Single]:
        """`P A` of one group, for [M, K] in float32."""
        pull: Single = self._pull[group].astype(np.float32)
        return lambda vectors: self._covered(group, vectors) + pull * vectors

    def _covered(self, group: int, vectors: Single) -> Single:
        rows, scale = self._x[:, group], self._scale[group]
        image: Single = ((vectors * scale) @ rows.T) @ rows
        image *= scale / np.float32(len(rows))
        return image


def _inverse_is_cheaper(mask: Mask) -> bool:
    """Compares seconds, as measured on two cores (AMD Zen 5), and keeps the inverses within `_INVERSE_BYTES`."""
    groups, outputs, inputs = mask.shape
    size = mask.sum(axis=-1, dtype=np.float64)
    inverse = float((6e-11 * size**3 + 1.5e-8 * size**2 + 1e-6).sum())
    steps = 90  # in all, with three ReLU-aware steps
    gradients = steps * groups * (1e-4 + outputs * inputs * (1e-11 * inputs + 5e-9))
    return inverse < gradients and 8 * float((size**2).sum()) / _BATCH_RATIO**2 < _INVERSE_BYTES


class _Inverse:
    """`u_S = A_SS^-1 r_S`, all rows with supports of similar size as one batch, padded with the identity."""

    name: Literal["inverse"] = "inverse"

    def __init__(self, system: Array, mask: Mask) -> None:
        outputs, inputs = mask.shape[1:]
        flat = mask.reshape(-1, inputs)
        size = flat.sum(axis=-1)
        order = np.argsort(-size, kind="stable")
        self._batches: list[tuple[Index, Index, Array]] = []
        begin, end = 0, int(np.count_nonzero(size))  # empty rows come last and stay out
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

    def solve(self, load: Array, tolerance: float) -> Array:
        """Solves for [G, M, K] right-hand sides that are 0 outside the mask, beyond any `tolerance`."""
        flat = load.reshape(-1, load.shape[-1])
        result = np.zeros_like(flat)
        for rows, places, inverse in self._batches:
            result[rows, places] = (inverse @ flat[rows, places][..., None])[..., 0]
        return result.reshape(load.shape)


def _inverse(systems: Array) -> Array:
    """Inverts symmetric systems [B, s, s] of unit diagonal; eigenvalues below `_NOISE` count as infinite.

    The diagonal of an inverse holds the variance inflation factors, which tell whether that is needed.
    """
    try:
        inverse = np.asarray(np.linalg.inv(systems), np.float64)
        inflation = np.diagonal(inverse, axis1=1, axis2=2)
        doubtful = ~((inflation > 0) & (inflation < 1 / _NOISE)).all(axis=-1)
    except np.linalg.LinAlgError:
        inverse = np.empty_like(systems)
        doubtful = np.ones(len(systems), np.bool_)
    if doubtful.any():
        values, vectors = np.linalg.eigh(systems[doubtful])
        values[values < _NOISE] = np.inf
        inverse[doubtful] = (vectors / values[:, None, :]) @ vectors.transpose(0, 2, 1)
    return inverse


class _ConjugateGradients:
    """`A_SS u_S = r_S` for all rows of a group at once: one float32 product `P A` a step, started warm.

    A unit diagonal makes Jacobi preconditioning the identity.
    """

    name: Literal["cg"] = "cg"

    def __init__(self, system: _GramSystem | _RowSystem, mask: Mask) -> None:
        self._system = system
        self._products = [system.single(group) for group in range(len(mask))]
        self._mask = mask
        self._last: Array = np.zeros(mask.shape)

    def solve(self, load: Array, tolerance: float) -> Array:
        """Solves for [G, M, K] right-hand sides that are 0 outside the mask, to `|residual| <= tolerance |load|`."""
        distance = load - np.where(self._mask, self._system.product(self._last), 0.0)
        for group, wanted in enumerate(load):
            solution, mask, residual = self._last[group], self._mask[group], distance[group]
            norm, goal = np.linalg.norm(residual, axis=-1), tolerance * np.linalg.norm(wanted, axis=-1)
            rows = np.flatnonzero(norm > goal)
            scale = norm[rows, None]
            share = (goal[rows] / norm[rows]).astype(np.float32)
            step = _descend(self._products[group], mask[rows], (residual[rows] / scale).astype(np.float32), share)
            solution[rows] += scale * step
        return self._last


def _descend(product: Callable[[Single], Single], mask: Mask, residual: Single, goal: Single) -> Single:
    """Conjugate gradients from 0 for rows of residual norm 1, until each row's residual is below its `goal`.

    A row stops at a direction whose curvature is below `_NOISE`.
    """
    result = np.zeros_like(residual)
    rows = np.arange(len(residual))  # of `result`, for the rows still carried
    going = np.ones(len(residual), np.bool_)
    kept = mask.astype(np.float32)
    current = np.zeros_like(residual)
    direction = residual.copy()
    square = np.vecdot(residual, residual)
    for _ in range(_CG_STEPS):
        image = product(direction)
        image *= kept
        curvature = np.vecdot(direction, image)
        going &= curvature > _NOISE * np.vecdot(direction, direction)
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
        if not going.any():
            break
        direction *= np.divide(square, last, out=np.zeros_like(square), where=last > 0)[:, None]
        direction += residual
    result[rows] = current
    return result
