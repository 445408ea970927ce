"""How zeros are allocated to the weights of a model: by measured costs, or by scopes that are tried."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnx_asr.arrays import Array
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.networks.operations import Operations
from onnx_asr.networks.pair import Network, Pair
from onnx_asr.networks.samples import Calibration
from onnx_asr.numerics.masks import keep_count
from onnx_asr.numerics.patterns import Pattern
from onnx_asr.numerics.scores import cheapest_keep
from onnx_asr.pruning.masks import PrunableWeight, make_masks, units_of
from onnx_asr.pruning.options import Scope
from onnx_asr.repairing.refit import repair_refit
from onnx_asr.repairing.rows import DenseCache
from onnx_asr.repairing.verification import Verifier

TRIED: tuple[Scope, ...] = ("global", "erk", "mixed")
"""Scopes that "auto" tries, in this order."""

CLOSER = 0.9
"""Another scope than "global" is chosen if its distance is below this share of that of "global"; see `chosen_scope`."""

_SAMPLES, _ROWS = 128, 4000  # of the quick refit


@dataclass(frozen=True)
class LayerCosts:
    """Measured cost of zeros in every weight.

    Attributes:
        sizes: Units (weights, or blocks) of every weight.
        zeros: Numbers of zeros that were tried in it, ascending.
        costs: Distance of the outputs from the dense model's at each.
        prices: Price of one of its units; None where all are equal.
    """

    sizes: Sequence[int]
    zeros: Sequence[Sequence[int]]
    costs: Sequence[Sequence[float]]
    prices: Sequence[float] | None = None

    def keep(self, sparsity: float) -> list[int]:
        """Units that every weight keeps; the sparsity is the share of the total price to remove."""
        if self.prices is None:
            return cheapest_keep(self.sizes, self.zeros, self.costs, keep_count(sum(self.sizes), sparsity))
        total = sum(size * price for size, price in zip(self.sizes, self.prices, strict=True))
        return cheapest_keep(self.sizes, self.zeros, self.costs, (1 - sparsity) * total, self.prices)


def layer_costs(
    weights: Sequence[PrunableWeight],
    scores: Sequence[Array],
    pattern: Pattern,
    sparsities: Sequence[float],
    found: Sequence[Sequence[Fidelity]],
) -> LayerCosts:
    """The fidelities of single layers at the sparsities, as costs of zeros."""
    sizes = [units_of(weight, values, pattern).size for weight, values in zip(weights, scores, strict=True)]
    zeros = [[size - keep_count(size, share) for share in sparsities] for size in sizes]
    return LayerCosts(sizes, zeros, [[fidelity.distance for fidelity in tried] for tried in found])


def unit_flops(operations: Operations, weights: Sequence[PrunableWeight], sizes: Sequence[int]) -> list[float]:
    """Operations per unit of every weight."""
    return [
        sum(operations.by_node[point.node] for point in weight.points) / size
        for weight, size in zip(weights, sizes, strict=True)
    ]


@dataclass(frozen=True)
class ScopeTrial:
    """What a quick refit reaches with the zeros shared out by one scope.

    Attributes:
        scope: How zeros were shared out.
        fidelity: Of the refitted network to the dense one, on held-out samples.
        seconds: Wall time.
        floor: Distance of the dense network from itself: 0, but for a metric of the user's own.
    """

    scope: Scope
    fidelity: Fidelity
    seconds: float
    floor: float = field(default=0.0, repr=False)

    @property
    def excess(self) -> float:
        """What pruning adds to the distance."""
        return self.fidelity.distance - self.floor


@dataclass(frozen=True)
class ScopeTrials:
    """Tries scopes for one network: masks by the scores, a quick refit, and the distance on held-out samples.

    Attributes:
        dense: The network.
        weights: Those that are pruned.
        scores: Of every weight's entries.
        pattern: Which sets of weights may survive; not N:M.
        sparsity: Share of units to drop.
        calibration: Samples to refit on: the first 128, or half of them if there are fewer than twice as many.
        verifier: Measures the distance on other samples.
        execution: How to run.
    """

    dense: Network
    weights: Sequence[PrunableWeight]
    scores: Sequence[Array]
    pattern: Pattern
    sparsity: float
    calibration: Calibration
    verifier: Verifier
    execution: Execution

    def run(self, seconds: float | None = None) -> tuple[ScopeTrial, ...]:
        """Try one scope after the other, but none that would not end within ``seconds`` except the first."""
        trials: list[ScopeTrial] = []
        kept = DenseCache()
        begun = time.perf_counter()
        for number, scope in enumerate(TRIED):
            if trials and seconds is not None and time.perf_counter() - begun + trials[-1].seconds > seconds:
                break
            self.execution.progress(f"trying scope {scope}", number / len(TRIED))
            started = time.perf_counter()
            fidelity = self._try(scope, kept)
            floor = 0.0 if self.verifier.samples.metric is None else self.verifier.dense_metric
            trials.append(ScopeTrial(scope, fidelity, time.perf_counter() - started, floor))
        return tuple(trials)

    def _try(self, scope: Scope, kept: DenseCache) -> Fidelity:
        options = self.verifier.samples.options
        recipe = options.refit
        quick = replace(recipe, rows=min(_ROWS, recipe.rows), relu_steps=min(1, recipe.relu_steps))
        draft = Draft(self.dense.index)
        masks = make_masks(self.weights, self.scores, self.pattern, self.sparsity, scope, seed=options.seed)
        for weight, mask in zip(self.weights, masks, strict=True):
            value = self.dense.index.value(weight.tensor)
            for point in weight.points:
                draft.set_weight(point, np.where(mask, value, np.zeros((), value.dtype)))
        pair = Pair.with_itself(self.dense)
        repair_refit(pair, draft, _first(self.calibration), self.execution.quiet, quick, kept=kept)
        return self.verifier.fidelity(draft.model())


def _first(calibration: Calibration) -> Calibration:
    return calibration.head(min(_SAMPLES, calibration.count // 2))


def trial_verifier(verifier: Verifier, calibration: Calibration) -> Verifier | None:
    """What measures the trials: the verifier, or one on calibration samples that they are not refitted on.

    The latter where no samples are held out; None where there are no others.
    """
    samples = verifier.samples
    if len(samples.held_out) and samples.is_held_out:
        return verifier
    others = samples.chosen[_first(calibration).count : calibration.count]
    most = samples.options.verify_samples or type(samples.options).verify_samples
    return verifier.on(others[:most]) if len(others) >= samples.smallest_run else None


def chosen_scope(trials: Sequence[ScopeTrial]) -> Scope:
    """The scope to use: "global", unless another one's distance is clearly smaller."""
    usual, best = trials[0], min(trials, key=lambda trial: trial.excess)
    gained = usual.excess - best.excess  # an excess is negative where a metric prefers the pruned network
    return best.scope if gained > (1 - CLOSER) * abs(usual.excess) else usual.scope


def scope_note(trials: Sequence[ScopeTrial]) -> tuple[str, ...]:
    """What was chosen among the scopes that were tried, for the user; nothing where none was."""
    if not trials:
        return ()
    reached = ", ".join(f"{trial.scope} {trial.fidelity.distance:.3g}" for trial in trials)
    return (
        f"scope auto: zeros are shared out by '{chosen_scope(trials)}'; distances from the dense model on held-out "
        f"samples after a quick refit: {reached}",
    )
