"""Pruning and repair in one: mask rounds.

In round ``i`` of ``R`` the sparsity is ``s (1 - (1 - i / R)^3)``: many weights go at first and few at the end (the
schedule of gradual pruning, arXiv 1710.01878). N:M patterns lose one weight of every group of ``m`` per round. The
first mask ranks the dense weights, each later one the weights as refitted in the round before; pruned weights stay
pruned, and every round refits from the dense weights. So each mask is chosen by magnitudes after the other weights have
taken over for those that were pruned. Rounds that only rank weights take one ReLU-aware step; the last one samples
twice as many positions as a plain refit. The others share one run of the dense network, whose sampled outputs are in
files where memory is limited: they are a part of what a pass would write there.

Between the first round and the last, the ranking over all layers only decides how many weights (or blocks) each layer
keeps. The layer's refit decides which, in ``NARROWING`` steps of equal ratio: refit under the mask so far, drop the
smallest, refit again, from one set of rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import numpy as np
import onnx

from onnx_asr.arrays import Array, Floats, Mask
from onnx_asr.data import Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.engine.buffers import BufferPool
from onnx_asr.engine.loading import load
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource
from onnx_asr.graph.shapes import InputShapes
from onnx_asr.graph.skips import Skip
from onnx_asr.json_values import MERGED, key
from onnx_asr.networks.cost import Cost, cost
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution, timed
from onnx_asr.networks.operations import Probe
from onnx_asr.networks.pair import Network, Pair
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.sparsity import LayerSparsity, collapse_note
from onnx_asr.numerics.patterns import Pattern
from onnx_asr.pruning.allocation import ScopeTrial, ScopeTrials, chosen_scope, scope_note, trial_verifier
from onnx_asr.pruning.masks import (
    PrunableWeight,
    apply_masks,
    keep_units,
    make_masks,
    prunable_weights,
    split_narrow,
    split_useless,
    units_of,
)
from onnx_asr.pruning.options import CompressOptions, Scope
from onnx_asr.pruning.scores import input_factors
from onnx_asr.repairing.job import RepairJob
from onnx_asr.repairing.options import chosen
from onnx_asr.repairing.pipeline import run_method, verified
from onnx_asr.repairing.refit import Narrowing, repair_refit
from onnx_asr.repairing.result import RepairResult
from onnx_asr.repairing.rows import DenseCache
from onnx_asr.repairing.verification import Samples, Verifier

LAST_ROWS = 2
"""Sampled positions of the last round, as a multiple of the refit recipe's."""

NARROWING = 2
"""Steps in which a layer loses its weights within a round."""

ALLOCATION_SHARE = 0.25
"""Share of the time budget for trying scopes."""

LAST_COST = 3.0
"""Roughly how many times a round's seconds the last one takes; only for the time budget."""

_UNTRIED = "scope auto: 'global' was used, as one batch of samples is too few to try others"


@dataclass(frozen=True)
class CompressResult:
    """A pruned and repaired model.

    Attributes:
        repair: The last round's repair, with the model and its verification (before: the last mask without repair).
        layers: Zeros in every weight that took part.
        left_dense: Layers that pattern or target leave dense, and why.
        before: Size of the given model.
        after: Size of the compressed one.
        options: As given.
        round_seconds: Wall time of every round.
        scope: How zeros were shared out between the layers; None for N:M patterns.
        scopes: What was tried for it.
        masked: The dense model under the last mask, without repair.
    """

    derived: ClassVar = ("helps",)

    repair: RepairResult = field(metadata=MERGED)
    layers: tuple[LayerSparsity, ...]
    left_dense: tuple[Skip, ...]
    before: Cost
    after: Cost
    options: CompressOptions = field(metadata=key("compress"))
    round_seconds: tuple[float, ...]
    scope: Scope | None
    scopes: tuple[ScopeTrial, ...]
    masked: onnx.ModelProto = field(repr=False)

    @property
    def model(self) -> onnx.ModelProto:
        """The compressed model."""
        return self.repair.model

    @property
    def helps(self) -> str:
        """Hardware and runtimes that benefit from the zeros."""
        return Pattern.parse(self.options.pattern).helps


def compress(
    model: ModelSource,
    data: DataSource,
    options: CompressOptions | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    input_shapes: InputShapes | None = None,
    execution: Execution | None = None,
) -> CompressResult:
    """Prune and repair jointly, by mask rounds.

    Args:
        model: The dense model: a path, or an object of onnx, onnx-graphsurgeon or onnx-ir, which is not changed.
        data: Calibration samples, as for :func:`onnx_asr.repair`.
        options: What to zero, rounds, samples, seed and refit recipe; at least a sparsity or an N:M pattern.
        preprocessing: How to prepare images.
        input_shapes: Shapes of inputs with open sizes, for FLOPs; by default those of a sample.
        execution: Execution providers, memory limit, progress.

    Raises:
        OptionError: Options out of range, or nothing left to prune.
        ModelError: A model that cannot be pruned or repaired.
        DataError: Missing, broken or unfitting data.
    """
    options, execution = chosen(options, CompressOptions, data), execution or Execution()
    settings = replace(options.repair, method="refit")
    begun = time.perf_counter()
    seconds: dict[str, float] = {}
    round_seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        dense = Network.of(load(model), "dense", compared=True)
        samples = Samples.of(data, dense, settings, preprocessing, execution, verify=True)
        verifier = Verifier(dense.index.model, samples, execution)
        if samples.metric is not None:
            verifier.check_reference()
        execution.progress("loading data", 0.0)
        calibration = samples.load()
    probe = Probe({**samples.shapes, **(input_shapes or {})}, execution.runtime)
    before = cost(dense.index, probe)
    with timed(seconds, "allocate"):
        rounds = _Rounds(dense, options, calibration, execution)
        rounds.share_out(verifier, calibration)
    with timed(seconds, "rounds"):
        weights, masks = rounds.last_masks(round_seconds, begun)
    with timed(round_seconds, "last"):
        masked, layers = apply_masks(dense.index, weights, masks)
        pruned = Network.of(masked, "pruned", compared=True)
        last = replace(settings, refit=replace(settings.refit, rows=LAST_ROWS * settings.refit.rows))
        job = RepairJob.on(
            pruned, Pair.between(pruned, dense.index), samples, last, verifier if len(samples.held_out) else None
        )
        with timed(seconds, "repair"):
            result = run_method(job, calibration, execution)
        with timed(seconds, "verify"):
            result = verified(job, result, execution)
    execution.progress("done", 1.0)
    return CompressResult(
        repair=replace(
            result,
            seconds=seconds,
            notes=(*result.notes, *scope_note(rounds.trials), *rounds.notes, *collapse_note(layers)),
        ),
        layers=layers,
        left_dense=rounds.left_dense,
        before=before,
        after=cost(GraphIndex.of(result.model), probe),
        options=options,
        round_seconds=tuple(round_seconds.values()),
        scope=rounds.scope,
        scopes=rounds.trials,
        masked=masked,
    )


Step = tuple[Pattern, float | None]
"""A round's goal: a pattern, and a sparsity where the pattern leaves it open."""


def _schedule(options: CompressOptions, pattern: Pattern) -> list[Step]:
    if pattern.n is None:
        assert options.sparsity is not None
        left = [1 - number / options.rounds for number in range(1, options.rounds + 1)]
        return [(pattern, options.sparsity * (1 - share**3)) for share in left]
    kept = np.linspace(pattern.m, pattern.n, min(options.rounds, pattern.m - pattern.n) + 1)[1:]
    return [(replace(pattern, n=round(float(n))), None) for n in kept]


class _Rounds:
    """The rounds that rank weights, each by what the refit of the one before made of them.

    The dense network's sampled outputs are kept, so that it runs once for all rounds.

    Attributes:
        left_dense: Layers that pattern or target leave dense, and why.
        scope: How zeros are shared out between the layers; None for N:M patterns.
        trials: What was tried for it.
        notes: Notes for the user about the rounds.
    """

    def __init__(
        self, dense: Network, options: CompressOptions, calibration: Calibration, execution: Execution
    ) -> None:
        pattern, recipe = Pattern.parse(options.pattern), options.repair.refit
        weights, _ = prunable_weights(dense.index, dense.everything, options.include, options.exclude)
        weights, narrow = split_narrow(weights, pattern)
        self._weights, useless = split_useless(dense.index, weights, options.target)
        self.left_dense = (*narrow, *useless)
        self._factors = _factors(dense, self._weights, calibration, execution)
        self._steps = _schedule(options, pattern)
        self.scope: Scope | None = None if pattern.n is not None else options.scope
        self.trials: tuple[ScopeTrial, ...] = ()
        self._seed = options.repair.seed
        self._budget = options.time_budget
        self.notes: tuple[str, ...] = ()
        self._recipe = replace(recipe, relu_steps=min(recipe.relu_steps, 1))
        self._calibration = calibration.head(round(options.round_samples * calibration.count))
        self._execution = execution
        self._dense, self._pair = dense, Pair.with_itself(dense)
        self._kept = DenseCache() if execution.memory_limit is None else DenseCache(BufferPool(limit=0))  # in files
        self._dense_values = [dense.index.value(weight.tensor) for weight in self._weights]
        self._values: list[Array] = self._dense_values
        self._masks: list[Mask] = [np.ones(value.shape, bool) for value in self._values]

    def share_out(self, verifier: Verifier, calibration: Calibration) -> None:
        """Choose the scope, where the options leave that open and there are samples to choose by."""
        if self.scope != "auto":
            return
        self.scope = "global"
        pattern, sparsity = self._steps[-1]
        judge = trial_verifier(verifier, calibration)
        if judge is None:
            self.notes = (_UNTRIED,)
            return
        assert sparsity is not None
        scores = [self._score(number, value) for number, value in enumerate(self._values)]
        limit = None if self._budget is None else ALLOCATION_SHARE * self._budget
        self.trials = ScopeTrials(
            self._dense, self._weights, scores, pattern, sparsity, calibration, judge, self._execution
        ).run(limit)
        self.scope = chosen_scope(self.trials)

    def last_masks(self, seconds: dict[str, float], begun: float) -> tuple[list[PrunableWeight], list[Mask]]:
        """Run all rounds but the last: the weights that take part, and the masks of the last round.

        The wall time of every round is added to ``seconds``. ``begun`` is when the time budget began to run; a round is
        left out, with those after it, where it and the last one would not end within the budget, judged by the round
        before it, or by a trial of a scope, which takes less.
        """
        *steps, last = self._steps
        latest = self.trials[-1].seconds if self.trials else 0.0
        for number, step in enumerate(steps):
            expected = time.perf_counter() - begun + (1 + LAST_COST) * latest
            if self._budget is not None and expected > self._budget:
                done = f"{number + 1} {'rounds' if number else 'round'} instead of {len(steps) + 1}"
                self.notes = (*self.notes, f"{done}, to keep within the time budget")
                break
            execution = self._execution.part(f"mask round {number + 1} of {len(steps) + 1}", number, len(steps) + 1)
            execution.progress("", 0.0)
            with timed(seconds, f"round {number + 1}"):
                self._run(step, execution, narrowed=step[0].n is None and number > 0)
            latest = seconds[f"round {number + 1}"]
        return self._weights, self._goal(last)

    def _score(self, number: int, value: Array) -> Floats:
        """Scores of a weight's entries, below all others where already pruned."""
        return np.where(self._masks[number], np.abs(value.astype(np.float64)) * self._factors[number], -1.0)

    def _goal(self, step: Step) -> list[Mask]:
        """Masks of the weights that are worth most so far, over all layers."""
        scores = [self._score(number, value) for number, value in enumerate(self._values)]
        return make_masks(self._weights, scores, *step, self.scope or "global", seed=self._seed)

    def _run(self, step: Step, execution: Execution, *, narrowed: bool) -> None:
        """Refit from the dense weights under the masks of a goal.

        With ``narrowed`` the goal only says how many weights each layer keeps; each layer then begins with its mask so
        far, and its refit says which of them.
        """
        goal = self._goal(step)
        narrow: dict[int, list[Narrowing]] = {}
        if narrowed:
            for number, weight in enumerate(self._weights):
                narrow[weight.points[0].node] = self._narrow(number, goal[number], step[0])
        else:
            self._masks = goal
        draft = Draft(self._pair.dense)
        for weight, value, mask in zip(self._weights, self._dense_values, self._masks, strict=True):
            masked = np.where(mask, value, np.zeros((), value.dtype))
            for point in weight.points:
                draft.set_weight(point, masked)
        calibration, recipe = self._calibration, self._recipe
        reports, _ = repair_refit(
            self._pair, draft, calibration, execution, recipe, precise=True, kept=self._kept, narrow=narrow
        )
        self._values = [draft.weight(weight.points[0]) for weight in self._weights]
        for number, weight in enumerate(self._weights):
            if weight.points[0].node not in reports:
                self._masks[number] = goal[number]

    def _narrow(self, number: int, goal: Mask, pattern: Pattern) -> list[Narrowing]:
        """Steps from a layer's mask so far to one with as many units as its goal, which its refit chooses."""
        weight, masks = self._weights[number], (self._masks[number], goal)
        first, last = (np.count_nonzero(units_of(weight, mask.astype(np.float64), pattern)) for mask in masks)

        def keep(count: int, values: Floats) -> Mask:
            self._masks[number] = keep_units(weight, self._score(number, values), pattern, count, self._seed)
            return self._masks[number]

        shares = [step / NARROWING for step in range(1, NARROWING + 1)]
        return [partial(keep, round(first ** (1 - share) * last**share)) for share in shares]


def _factors(
    dense: Network, weights: Sequence[PrunableWeight], calibration: Calibration, execution: Execution
) -> list[Floats]:
    """Factors that make magnitudes of different layers comparable.

    1 where BatchNormalization is kept. Where it was folded, ``|W|`` carries each channel's arbitrary scale; there the
    factors of the score "variance".
    """
    points = [weight.points[0] for weight in weights]
    if any(point.batchnorm is not None for point in points):
        return [np.ones(()) for _ in points]
    execution.progress("measuring the dense network", 0.0)
    return input_factors(dense, points, "variance", calibration, execution)
