"""Pruning and repair in one: mask rounds.

In round ``i`` of ``R`` the density is ``d^(i / R)`` (N:M patterns: one weight of every group of ``m`` goes a round).
The first mask ranks the dense weights, each later one the weights that the round before it refitted; what was pruned
stays pruned, and every round refits from the dense weights. So the next mask is chosen by what the weights are worth
once their neighbours have taken over what was lost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.calibration import Calibration
from onnx_asr.data import Dataset, Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.engine.lockstep import BufferPool, Chunk, lockstep
from onnx_asr.errors import OptionError
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.points import rows_to_weight
from onnx_asr.model_io import ModelSource, load
from onnx_asr.networks import Execution, Networks, silent
from onnx_asr.numerics.moments import Moments
from onnx_asr.options import RepairOptions
from onnx_asr.pruning import (
    LayerSparsity,
    Pattern,
    PrunableWeight,
    apply_masks,
    check_sparsity,
    pattern_mask,
    prunable_weights,
    split_narrow,
    unstructured_masks,
)
from onnx_asr.refit_repair import repair_refit
from onnx_asr.repairing import RepairJob, finish
from onnx_asr.result import RepairResult

Masks = list[NDArray[np.bool_]]


@dataclass(frozen=True)
class CompressOptions:
    """How to compress.

    Attributes:
        sparsity: Share of weights to zero, in [0, 1); None where the pattern is N:M.
        pattern: "unstructured" or "N:M".
        rounds: Mask rounds; for N:M at most ``m - n``.
        round_samples: Samples of every round but the last, as a share of all.
        include: Regular expressions on names that take part; empty for all.
        exclude: Regular expressions that do not.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    rounds: int = 5
    round_samples: float = 0.5
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, Pattern.parse(self.pattern))
        if self.rounds < 1:
            raise OptionError(f"rounds {self.rounds} is out of range: give at least 1")
        if not 0 < self.round_samples <= 1:
            raise OptionError(f"round-samples {self.round_samples} is out of range: give a share, 0 < share <= 1")


@dataclass(frozen=True)
class CompressResult:
    """A pruned and repaired model.

    Attributes:
        repair: The last round's repair, with the model and its verification (before: the last mask without repair).
        layers: Zeros in every weight that took part.
        options: What was asked for.
        round_seconds: Wall time of every round.
    """

    repair: RepairResult
    layers: tuple[LayerSparsity, ...]
    options: CompressOptions
    round_seconds: tuple[float, ...]

    @property
    def model(self) -> onnx.ModelProto:
        """The compressed model."""
        return self.repair.model

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "compress": asdict(self.options),
            "layers": [asdict(layer) | {"sparsity": layer.sparsity} for layer in self.layers],
            "round_seconds": list(self.round_seconds),
            **self.repair.to_dict(),
        }


def compress(
    dense: ModelSource,
    data: DataSource | Dataset,
    options: CompressOptions,
    *,
    repair_options: RepairOptions | None = None,
    preprocessing: Preprocessing | None = None,
    execution: Execution | None = None,
) -> CompressResult:
    """Prune and repair jointly, by mask rounds.

    Args:
        dense: Path or ModelProto; it is not changed.
        data: Calibration samples, as for :func:`onnx_asr.repair`.
        options: Sparsity or pattern, rounds.
        repair_options: Samples, seed and refit recipe; the method is always ``refit``.
        preprocessing: What to do to images.
        execution: Execution providers, memory limit, progress.

    Raises:
        OptionError: Options out of range, or nothing left to prune.
        ModelError: A model that cannot be pruned or repaired.
        DataError: Missing, broken or unfitting data.
    """
    execution = execution or Execution()
    started = time.perf_counter()
    model = load(dense)
    settings = replace(repair_options or RepairOptions(), method="refit")
    job = RepairJob.of(model, model, data, settings, preprocessing)
    execution.progress("loading data", 0.0)
    calibration = job.load_calibration()
    loaded = time.perf_counter()
    index = GraphIndex.of(model)
    pattern = Pattern.parse(options.pattern)
    weights, skips = prunable_weights(index, options.include, options.exclude)
    weights, narrow = split_narrow(index, weights, pattern)
    ranking = _Ranking.of(job.networks, weights, calibration, execution)
    masks: Masks = [np.ones(index.value(weight.tensor).shape, bool) for weight in weights]
    plan = EditPlan()
    seconds = []
    schedule = _schedule(options, pattern)
    for number, step in enumerate(schedule):
        begun = time.perf_counter()
        scores = ranking.scores(plan, masks)
        masks = _next_masks(index, weights, scores, step)
        pruned = apply_masks(index, weights, masks, [*skips, *narrow], asdict(options))
        job = replace(job, pruned=pruned.model, networks=Networks.of(pruned.model, model))
        if number + 1 == len(schedule):
            break
        execution.progress(f"mask round {number + 1} of {len(schedule)}", number / len(schedule))
        part = calibration.head(round(options.round_samples * calibration.count))
        plan = EditPlan()
        repair_refit(job.networks, part, replace(execution, progress=silent), plan, settings.refit)
        seconds.append(time.perf_counter() - begun)
    result = finish(job, calibration, execution, begun, begun)
    seconds.append(time.perf_counter() - begun)
    stages = {"load": loaded - started, "rounds": begun - loaded}
    stages.update((stage, result.seconds[stage]) for stage in ("repair", "verify"))
    return CompressResult(replace(result, seconds=stages), pruned.layers, options, tuple(seconds))


Step = float | tuple[int, int]
"""A round's goal: a sparsity, or N and M."""


def _schedule(options: CompressOptions, pattern: Pattern) -> list[Step]:
    if pattern.n is None:
        assert options.sparsity is not None
        density = 1.0 - options.sparsity
        steps = [1.0 - density ** (i / options.rounds) for i in range(1, options.rounds)]
        return [*steps, options.sparsity]
    kept = np.linspace(pattern.m, pattern.n, min(options.rounds, pattern.m - pattern.n) + 1)[1:]
    return [(round(float(n)), pattern.m) for n in kept]


def _next_masks(
    index: GraphIndex, weights: Sequence[PrunableWeight], scores: Sequence[NDArray[Any]], step: Step
) -> Masks:
    if isinstance(step, tuple):
        return [pattern_mask(index, weight, score, *step) for weight, score in zip(weights, scores, strict=True)]
    return unstructured_masks(scores, step, "global")


@dataclass(frozen=True)
class _Ranking:
    """How weights of different layers compare.

    Where BatchNormalization is kept: by magnitude as stored. Where it was folded, ``|W|`` carries each channel's
    arbitrary scale; there by the share of the layer's output variance that goes through the weight,
    ``W^2 Var(x_j) / mean_i Var(y_i)``.
    """

    networks: Networks  # of the dense model with itself
    weights: list[PrunableWeight]
    factors: list[NDArray[np.float64]] | None  # sqrt(Var(x_j) / mean Var(y)), in the weight's shape

    @classmethod
    def of(
        cls, networks: Networks, weights: list[PrunableWeight], calibration: Calibration, execution: Execution
    ) -> _Ranking:
        if any(weight.points[0].batchnorm is not None for weight in weights):
            return cls(networks, weights, None)
        index = networks.pruned
        execution.progress("measuring the dense network", 0.0)
        moments: dict[str, Moments] = {}
        axes = {}
        for weight in weights:
            point = weight.points[0]
            assert point.weight_slot is not None
            axes[index.nodes[point.node].input[1 - point.weight_slot]] = point.channel_axis
            axes[point.tensor] = point.channel_axis

        def visit(_: int, chunks: list[Chunk]) -> None:
            for name, axis in axes.items():
                chunk = Moments.of(chunks[0][name], axis)
                moments[name] = chunk if name not in moments else moments[name].merge(chunk)

        with BufferPool(execution.memory_limit, calibration.nbytes) as pool:
            lane = networks.pruned_lane(axes, calibration, pool, execution, EditPlan())
            lockstep([lane], [list(axes)], visit)
        return cls(networks, weights, [_factor(index, weight, moments) for weight in weights])

    def scores(self, plan: EditPlan, masks: Masks) -> list[NDArray[np.float64]]:
        """Scores of the planned weights (the dense ones where nothing is planned), 0 where already pruned."""
        scores = []
        for number, (weight, mask) in enumerate(zip(self.weights, masks, strict=True)):
            point = weight.points[0]
            assert point.weight_slot is not None
            value = plan.current(self.networks.pruned, point.node, point.weight_slot)
            assert value is not None
            score = np.abs(value.astype(np.float64))
            if self.factors is not None:
                score = score * self.factors[number]
            scores.append(np.where(mask, score, -1.0))
        return scores


def _factor(index: GraphIndex, weight: PrunableWeight, moments: dict[str, Moments]) -> NDArray[np.float64]:
    point = weight.points[0]
    node = index.nodes[point.node]
    assert point.weight_slot is not None
    shape = index.value(weight.tensor).shape
    inputs = moments[node.input[1 - point.weight_slot]].std
    groups = 1
    taps = 1
    if point.kind in ("Conv", "ConvTranspose"):
        taps = int(np.prod(shape[2:]))
        groups = len(inputs) // shape[1] if point.kind == "Conv" else point.channels // shape[1]
    per_group = inputs.reshape(groups, 1, -1, 1)  # [G, 1, C_in / G, 1]
    rows = np.broadcast_to(per_group, (groups, point.channels // groups, per_group.shape[2], taps))
    output = float(np.sqrt(moments[point.tensor].var.mean())) or 1.0
    return rows_to_weight(point, node, rows.reshape(point.channels, -1) / output, shape)
