"""Refit of one layer: least squares on the surviving weights, from sampled rows.

Per group of a convolution, with `X` [n, K] patches of the repaired network's input, and per output channel with target
`T` [n] (the dense network's output), surviving weights `S` and their dense values `w0`, solve

    min over w, b of  mean (T - w.X - b)^2 + R |w - w0|^2,   w = 0 outside S,   R = ridge mean(diag H) + 1e-12.

With `H = cov(X)` and `G = cov(T, X)` the answer is `(H_SS + R I) w = G_S + R w0`, `b = mean(T) - w.mean(X)`. It is
computed for the displacement from `w0`, and scaled to a unit diagonal by `D = diag(H) + R`:

    A = D^-1/2 (H + R I) D^-1/2,   v = D^1/2 w,   A_SS (v - v0)_S = (D^-1/2 G + R D^-1 v0 - A v0)_S.

So wherever the rows carry no information (constant inputs, fewer rows than inputs, ridge 0 on a singular `H`) the
weights stay at `w0`: directions in which `A` is below `NOISE` are rounding of the float32 products.

**ReLU-aware step.** An error that the following ReLU hides does not count: where the dense pre-activation is <= 0, all
predictions below `theta` (0, or minus the shortcut that is added before the ReLU) are equally good, so there
`T <- min(w.X + b, theta)`. Only `G` and `mean(T)` change, `A` does not.

**Gain.** Least squares shrinks: `std(w.X) = corr std(T)`. At the end `w <- g w` with
`g = (std(T) / std(w.X))^gain_power` and the mean kept; 1 where the correlation is below `min_correlation`.

**Classes.** Where the outputs are logits `z = w.X + b` of classes, with `p = softmax(T)`, `w1` the weights so far and
`C = class_ridge mean(diag H)`, the following steps minimize

    mean KL(p || softmax(z)) + C/4 |w - w1|^2,   w = 0 outside S.

The Hessian of `KL` by `z` is at most 1/2, so that `1/4 |z - (z' - 2 (softmax(z') - p))|^2` bounds it from above, up to
a constant, and touches it at `z'` (Boehning, 1992): each step is the least squares above with that target and the ridge
`C`, and none makes the sum larger.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_asr.arrays import Array, Floats, Mask, Singles
from onnx_asr.errors import OptionError
from onnx_asr.numerics.few_rows import RowBlock, RowFit, RowSpace
from onnx_asr.numerics.rows import Fit, Inputs, Patches, Resources, Targets, softmax
from onnx_asr.numerics.systems import (
    NOISE,
    Cholesky,
    ConjugateGradients,
    GramSystem,
    RowSystem,
    cheapest_way,
    factors_are_cheaper,
    outputs_that_fit,
)
from onnx_asr.numerics.workers import ALONE

_CG_DRAFT = 1e-3  # |residual| / |load| that suffices to see what the ReLU hides
_CG_FINAL = 5e-6  # and for the final weights
_FINAL_STEPS = 90  # of conjugate gradients that these take in total, with three ReLU-aware steps
_DRAFT_STEPS = 30  # and those of a draft


Solver: TypeAlias = Literal["cholesky", "row space", "cg"]


class NotFiniteError(ValueError):
    """Samples or weights that are not finite, or too large to be squared in float32."""


@dataclass(frozen=True)
class RefitOptions:
    """Options of a layer's refit.

    Attributes:
        ridge: Pull toward the surviving dense weights, as a share of the mean input variance.
        relu_steps: ReLU-aware steps, where a ReLU follows.
        gain_power: 0 keeps the least-squares weights, 1 restores the standard deviation of the target.
        min_correlation: Channels whose fit correlates less than this with their target get gain 1.
        class_steps: Steps on the divergence, where the outputs are logits of classes.
        class_ridge: Pull of these steps toward their start, as a share of the mean input variance.
    """

    ridge: float = 1e-2
    relu_steps: int = 3
    gain_power: float = 0.5
    min_correlation: float = 0.05
    class_steps: int = 20
    class_ridge: float = 0.1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (np.isfinite(value) and value >= 0):
                raise OptionError(f"{name} {value} is out of range: give a finite number of at least 0")


@dataclass(frozen=True)
class RefitSolution:
    """A refitted layer.

    Attributes:
        weight: [G, M, K], exactly 0 where the mask is False.
        bias: [G * M].
        gain: [G * M], already contained in `weight`.
        residual_before: `sqrt(sum mean(e^2) / sum var(T))` over all channels for `w0` with `b = mean(T) - w0.mean(X)`;
            `e` is the error of the prediction, without what a following ReLU hides, over every eighth chunk of the
            rows, or all in the space of the rows. Not divided where every target is constant.
        residual_after: The same for `weight` and `bias`.
        rows: The number n of samples.
        solver: Cholesky factors per output channel, in the space of the inputs or of the rows, or conjugate gradients
            on all channels of a group.
        steps: Total number of conjugate-gradient steps; 0 for factors.
        converged: Whether every solution met its tolerance within the limit of steps.
    """

    weight: Floats
    bias: Floats
    gain: Floats
    residual_before: float
    residual_after: float
    rows: int
    solver: Solver
    steps: int
    converged: bool


class LayerRefit:
    """`(H_SS + R I) w = G_S + R w0`, `b = mean(T) - w.mean(X)`, for every output channel of one layer.

    Under one mask, or under several, each within the last: :meth:`draft` and :meth:`narrow` take weights out by what
    they are worth in a refit so far, :meth:`solve` ends it.

    Args:
        x: [n, G, K] input patches; G groups of the convolution, K = C_in / G * kh * kw. Centred in place where they are
            an array.
        target: [n, G * M] wanted outputs, the channels of a group side by side.
        w0: [G, M, K] dense weights; those outside the mask are not looked at.
        mask: [G, M, K], True where a weight survives.
        relu_floor: [n, G * M] `theta`; 0 if None.
        dense_negative: [n, G * M], where the dense pre-activation is <= 0; None if no ReLU follows.
        classes: Whether the outputs of a group are logits of classes.
        resources: Hold and process the rows; the store has `x`.

    Raises:
        ValueError: Here or in a method, if shapes do not fit together, or a value is not finite or too large to be
            squared in float32.
    """

    def __init__(
        self,
        x: Singles | Patches,
        target: Singles,
        w0: npt.NDArray[np.floating],
        mask: Mask,
        options: RefitOptions,
        *,
        relu_floor: Singles | None = None,
        dense_negative: Mask | None = None,
        classes: bool = False,
        resources: Resources | None = None,
    ) -> None:
        _check_shapes(x, w0, mask, target=target, relu_floor=relu_floor, dense_negative=dense_negative)
        self._inputs = Inputs(x, resources)
        _check_finite(x=self._inputs.mean, relu_floor=relu_floor)
        self._w0, self._mask, self._options, self._classes = w0, mask, options, classes
        groups, outputs = w0.shape[:2]
        self._targets = Targets(
            self._inputs,
            target.reshape(-1, groups, outputs),
            None if relu_floor is None else relu_floor.reshape(-1, groups, outputs),
            None if dense_negative is None else dense_negative.reshape(-1, groups, outputs),
            softmax(target.reshape(-1, groups, outputs)) if classes else None,
        )
        self._way = _cheapest(self._targets, mask, options, classes)
        step = outputs if classes else self._way.outputs_at_once(mask)
        self._blocks = [slice(begin, begin + step) for begin in range(0, outputs, step)]

    def draft(self) -> Floats:
        """The weights [G, M, K] under the mask so far, to choose from.

        The first draft looks at the rows, and once more through the ReLU; those after it fit to what it saw.
        """

        def draft(block: slice) -> Floats:
            return self._way.draft(block, self._start(block), self._mask[:, block])

        return np.concatenate(list(self._way.workers.map(draft, self._blocks)), axis=1)

    def narrow(self, keep: Mask) -> None:
        """Take the weights out of the mask where `keep` [G, M, K] is False."""
        self._mask = self._mask & keep

    def solve(self) -> RefitSolution:
        """The refitted layer, always finite; rows and dense weights are used up."""
        starts = {block.start: self._start(block) for block in self._blocks}
        del self._w0

        def solve(block: slice) -> _Part:
            return self._way.solve(block, starts.pop(block.start), self._mask[:, block])  # nobody else holds the start

        parts = list(self._way.workers.map(solve, self._blocks))
        self._way.release()
        if self._classes and self._options.class_steps:
            assert isinstance(self._way, _InputWay)
            parts = [self._way.toward_classes(parts.pop(), self._mask)]
        spread = sum(part.spread for part in parts) or 1.0
        return RefitSolution(
            weight=np.concatenate([part.weight for part in parts], axis=1),
            bias=np.concatenate([part.bias for part in parts], axis=1).ravel(),
            gain=np.concatenate([part.gain for part in parts], axis=1).ravel(),
            residual_before=float(np.sqrt(sum(part.error_before for part in parts) / spread)),
            residual_after=float(np.sqrt(sum(part.error_after for part in parts) / spread)),
            rows=len(self._inputs),
            solver="cg" if any(part.solver == "cg" for part in parts) else parts[0].solver,
            steps=sum(part.steps for part in parts),
            converged=all(part.converged for part in parts),
        )

    def _start(self, block: slice) -> Floats:
        return np.where(self._mask[:, block], self._w0[:, block], 0.0).astype(np.float64, copy=False)


def _cheapest(targets: Targets, mask: Mask, options: RefitOptions, classes: bool) -> _InputWay | _RowWay:
    """The way to solve a layer; the steps on classes need inputs that are no more than the rows."""
    inputs = targets.inputs
    way = cheapest_way(mask, len(inputs), _FINAL_STEPS, inputs.resources.limits.gram_bytes)
    if way == "row space" and not classes:
        return _RowWay(targets, options)
    return _InputWay(targets, options, by_gram=way != "rows")


class _InputWay:
    """Least squares by the covariance of the inputs, block by block of output channels."""

    workers = ALONE  # which its parts have of their own

    def __init__(self, targets: Targets, options: RefitOptions, *, by_gram: bool) -> None:
        self._targets, self._options, self._by_gram = targets, options, by_gram
        self._system = _system(targets.inputs, options.ridge, by_gram)
        self._fits: dict[int, Fit] = {}  # what the first draft saw

    def outputs_at_once(self, mask: Mask) -> int:
        """Output channels of every group that are solved for at once."""
        groups, _, inputs = mask.shape
        step: int = max(1, self._targets.inputs.resources.limits.block_values // (groups * inputs))
        if isinstance(self._system, GramSystem) and factors_are_cheaper(mask, _FINAL_STEPS):
            step = min(step, outputs_that_fit(mask))
        return step

    def draft(self, block: slice, start: Floats, mask: Mask) -> Floats:
        """The weights of a block [G, M, K]."""
        system = self._system
        pulled = _Pulled(system, start, mask, _DRAFT_STEPS)
        fit = self._fits.get(block.start)
        if fit is None:
            targets = self._targets.of(block)
            fit = _first_fit(targets, start)
            if targets.negative is not None and self._options.relu_steps:
                fit = targets.visible_fit(pulled.fitted(fit.cross, _CG_DRAFT), fit.mean)
            self._fits[block.start] = fit
        cross = fit.cross / system.root
        scaled = pulled.scaled(cross.copy(), _CG_DRAFT)
        scaled *= _gain(fit, cross, scaled, pulled.pull(scaled), self._options)[..., None]
        scaled /= system.root
        return scaled

    def solve(self, block: slice, start: Floats, mask: Mask) -> _Part:
        """A block, refitted."""
        system, targets = self._system, self._targets.of(block)
        steps = 0 if targets.negative is None else self._options.relu_steps
        fit = self._fits.pop(block.start, None)
        if fit is None:
            fit = _first_fit(targets, start)
        else:
            steps = max(0, steps - 1)
        with np.errstate(over="ignore", invalid="ignore"):
            error_before = targets.error(start, fit.mean)
        _check_squares(error_before)

        spread = float(fit.variance.sum())
        pulled = _Pulled(system, start, mask, _FINAL_STEPS)
        del start
        for _ in range(steps):
            fit = targets.visible_fit(pulled.fitted(fit.cross, _CG_DRAFT), fit.mean)
        cross = np.divide(fit.cross, system.root, out=fit.cross)
        weight = pulled.scaled(cross.copy(), _CG_FINAL)
        solver = pulled.solver
        report = (solver.name, solver.steps, solver.converged)
        gain = _gain(fit, cross, weight, pulled.pull(weight), self._options)
        del pulled, solver  # and the factors with it

        weight /= system.root
        weight *= gain[..., None]
        bias = fit.mean - np.vecdot(weight, targets.inputs.mean[:, None, :])
        return _Part(weight, bias, gain, spread, error_before, targets.error(weight, fit.mean), *report)

    def release(self) -> None:
        """Give back what the store holds."""
        self._system.release()

    def toward_classes(self, part: _Part, mask: Mask) -> _Part:
        """The steps on the divergence, from the weights of the one part that there is."""
        targets, mean = self._targets, self._targets.inputs.mean[:, None, :]
        weight, level = part.weight, part.bias + np.vecdot(part.weight, mean)
        part = replace(part, weight=np.empty(0))  # each step's weights are let go of for the next one's
        system = _system(targets.inputs, self._options.class_ridge, self._by_gram)
        pulled = _Pulled(system, weight, mask, _FINAL_STEPS)
        for _ in range(self._options.class_steps):
            fit = targets.class_fit(weight, level)
            del weight
            weight, level = pulled.fitted(fit.cross, _CG_DRAFT), fit.mean
            del fit
        system.release()
        return replace(
            part,
            weight=weight,
            bias=level - np.vecdot(weight, mean),
            error_after=targets.error(weight, level),
            steps=part.steps + pulled.solver.steps,
            converged=part.converged and pulled.solver.converged,
        )


class _RowWay:
    """Least squares in the space of the rows; blocks of output channels are solved side by side."""

    def __init__(self, targets: Targets, options: RefitOptions) -> None:
        self._targets, self._options = targets, options
        self._space = RowSpace(targets.inputs, *_scales(targets.inputs.variance(), options.ridge))
        self._seen: dict[int, Floats] = {}  # by the first draft
        self.workers = targets.inputs.resources.workers

    def outputs_at_once(self, mask: Mask) -> int:
        """Output channels of every group that are solved for at once."""
        return self._space.outputs_at_once(self._targets.inputs.resources.limits.block_values)

    def draft(self, block: slice, start: Floats, mask: Mask) -> Floats:
        """The weights of a block [G, M, K]."""
        rows = self._block(block, start, mask)
        target = self._seen.get(block.start)
        if target is None:
            target = rows.given
            if self._targets.negative is not None and self._options.relu_steps:
                target = rows.seen(target)
            self._seen[block.start] = target
        fit = rows.fit(target)
        return fit.weight * self._gain(fit)[..., None]

    def solve(self, block: slice, start: Floats, mask: Mask) -> _Part:
        """A block, refitted."""
        rows = self._block(block, start, mask)
        steps = 0 if self._targets.negative is None else self._options.relu_steps
        target = self._seen.pop(block.start, None)
        if target is None:
            target = rows.given
        else:
            steps = max(0, steps - 1)
        mean, spread = target.mean(axis=-1), float(target.var(axis=-1).sum())
        error_before = rows.error_before(mean)
        _check_squares(error_before, spread)
        for _ in range(steps):
            target = rows.seen(target)
        fit = rows.fit(target)
        gain = self._gain(fit)
        weight = fit.weight * gain[..., None]
        bias = fit.level - np.vecdot(weight, self._targets.inputs.mean[:, None, :])
        prediction = fit.level[..., None] + gain[..., None] * (fit.prediction - fit.level[..., None])
        return _Part(weight, bias, gain, spread, error_before, rows.error(prediction), "row space", 0, True)

    def release(self) -> None:
        """Give back what the store holds."""
        self._space.release()

    def _block(self, block: slice, start: Floats, mask: Mask) -> RowBlock:
        targets = self._targets.of(block)
        with np.errstate(over="ignore", invalid="ignore"):
            _check_finite(target=targets.target.mean(axis=0, dtype=np.float64), w0=start)
            return RowBlock(self._space, targets, start, mask)

    def _gain(self, fit: RowFit) -> Floats:
        scaled = fit.weight * self._space.root
        return _restored(fit.variance, fit.covariance, fit.predicted, NOISE * np.vecdot(scaled, scaled), self._options)


def _system(inputs: Inputs, ridge_share: float, by_gram: bool) -> GramSystem | RowSystem:
    """`A` of a layer."""
    with np.errstate(over="ignore", invalid="ignore"):
        gram = inputs.gram() if by_gram else None  # [G, K, K]
        diagonal = inputs.variance() if gram is None else np.diagonal(gram, axis1=1, axis2=2).copy()  # [G, K]
    root, ridge = _scales(diagonal, ridge_share)
    pull = ridge[:, None, None] / root**2
    if gram is None:
        return RowSystem(inputs, root, pull)
    return GramSystem(gram, root, pull, inputs.resources)


def _scales(diagonal: Floats, ridge_share: float) -> tuple[Floats, Floats]:
    """`D^1/2` [G, 1, K] and `R` [G] for `diag(H)` [G, K]."""
    _check_squares(diagonal)
    ridge = ridge_share * diagonal.mean(axis=1) + 1e-12
    return np.sqrt(diagonal + ridge[:, None])[:, None, :], ridge


@dataclass(frozen=True)
class _Part:
    """Some output channels of every group: weight [G, M, K], bias and gain [G, M], sums of their errors, the solver."""

    weight: Floats
    bias: Floats
    gain: Floats
    spread: float
    error_before: float
    error_after: float
    solver: Solver
    steps: int
    converged: bool


class _Pulled:
    """Ridge least squares of the weights that a mask keeps, toward `start` [G, M, K], which is 0 outside it."""

    def __init__(self, system: GramSystem | RowSystem, start: Floats, mask: Mask, steps: int) -> None:
        self._system, self._mask = system, mask
        self._start = start * system.root
        self.solver: Cholesky | ConjugateGradients
        cheaper = factors_are_cheaper(mask, steps) and mask.shape[1] <= outputs_that_fit(mask)
        if isinstance(system, GramSystem) and cheaper:
            self.solver = Cholesky(system, mask, self._start)
        else:
            self.solver = ConjugateGradients(system, mask, self._start)

    def scaled(self, load: Floats, tolerance: float) -> Floats:
        """`v = D^1/2 w` [G, M, K] for `D^-1/2 cov(T, X)` [G, M, K], which is overwritten."""
        load += self._system.pull * self._start
        load -= self.solver.image
        np.copyto(load, 0.0, where=~self._mask)
        return np.asarray(self._start + self.solver.solve(load, tolerance))

    def pull(self, scaled: Floats) -> Floats:
        """`R D^-1 (v0 - v)` [G, M, K]."""
        return np.asarray(self._system.pull * (self._start - scaled))

    def fitted(self, cross: Floats, tolerance: float) -> Floats:
        """`w` [G, M, K] for `cov(T, X)` [G, M, K], which is overwritten."""
        cross /= self._system.root
        scaled = self.scaled(cross, tolerance)
        scaled /= self._system.root
        return scaled


def _first_fit(targets: Targets, start: Floats) -> Fit:
    with np.errstate(over="ignore", invalid="ignore"):
        fit = targets.fit()
    _check_finite(target=fit.mean, w0=start)
    _check_squares(fit.cross, fit.variance)
    return fit


def _check_shapes(x: Singles | Patches, w0: npt.NDArray[np.floating], mask: Mask, **outputs: Array | None) -> None:
    if len(x.shape) != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; expected [n, G, K], none of them 0")
    rows, groups, inputs = x.shape
    if w0.ndim != 3 or w0.shape[::2] != (groups, inputs) or mask.shape != w0.shape or mask.dtype != np.bool_:
        raise ValueError(
            f"w0 is {w0.shape}, mask {mask.shape} {mask.dtype}; for x of shape {x.shape} both must be "
            f"[{groups}, M, {inputs}], the mask boolean"
        )
    expected = (rows, groups * w0.shape[1])
    for name, array in outputs.items():
        if array is not None and array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}; expected [n, G * M] = {expected}")
    if outputs["relu_floor"] is not None and outputs["dense_negative"] is None:
        raise ValueError("relu_floor is given without dense_negative; where a ReLU follows, give dense_negative too")


def _check_finite(**arrays: npt.NDArray[np.floating] | None) -> None:
    for name, array in arrays.items():
        if array is not None and not np.isfinite(array).all():
            raise NotFiniteError(f"{name} holds NaN or infinity; refit needs finite samples and weights")


def _gain(fit: Fit, cross: Floats, scaled: Floats, pull: Floats, options: RefitOptions) -> Floats:
    """`(var(T) / var(w.X))^(gain_power / 2)`; 1 where either is 0 or the correlation is below `min_correlation`.

    `cov(T, w.X) = w.G = v.cross` with `v = D^1/2 w` and the cross moments scaled by `D^-1/2`. By the equations that `w`
    solves, `var(w.X) = w'Hw = w.G + R w.(w0 - w) = v.(cross + pull)`; below rounding, it counts as 0.
    """
    covariance = np.vecdot(scaled, cross)
    variance = covariance + np.vecdot(scaled, pull)
    return _restored(fit.variance, covariance, variance, NOISE * np.vecdot(scaled, scaled), options)


def _restored(target: Floats, covariance: Floats, variance: Floats, rounding: Floats, options: RefitOptions) -> Floats:
    """The gain from `var(T)`, `cov(T, w.X)` and `var(w.X)`, which counts as 0 up to `rounding`; all [G, M]."""
    variance = np.where(variance <= rounding, 0.0, variance)
    usable = (target > 0) & (variance > 0)
    ratio = np.divide(target, variance, out=np.ones_like(variance), where=usable)
    usable &= covariance >= options.min_correlation * np.sqrt(target * variance)
    return np.where(usable, ratio, 1.0) ** (options.gain_power / 2)


def _check_squares(*values: Floats | float) -> None:
    if not all(np.isfinite(value).all() for value in values):
        raise NotFiniteError("x, target or w0 is too large to be squared in float32; scale the layer down")
