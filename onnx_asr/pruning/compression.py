"""Pruning and repair in one: mask rounds.

In round ``i`` of ``R`` the sparsity is ``s (1 - (1 - i / R)^3)``: many weights go at first and few at the end (the
schedule of gradual pruning, arXiv 1710.01878). N:M patterns lose one weight of every group of ``m`` a round. The first
mask ranks the dense weights, each later one the weights that the round before it refitted; what was pruned stays
pruned, and every round refits from the dense weights. So the next mask is chosen by what the weights are worth once
their neighbours have taken over what was lost. Rounds that only rank weights take one ReLU-aware step; the last samples
twice as many positions as a refit of its own. Without a memory limit, the others share one run of the dense network.

Between the first round and the last, the ranking over all layers only says how many weights (or blocks) each layer
keeps. Which of its own, the layer's refit says, in ``NARROWING`` steps of equal ratio: refit under the mask so far,
drop the smallest, refit again, from one set of rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.arrays import Mask
from onnx_asr.data import Dataset, Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource, load
from onnx_asr.graph.shapes import InputShapes
from onnx_asr.networks.cost import Cost, cost
from onnx_asr.networks.execution import Execution, silent
from onnx_asr.networks.pair import Networks
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.sparsity import LayerSparsity, starved
from onnx_asr.numerics.patterns import Pattern
from onnx_asr.pruning.masks import (
    PrunableWeight,
    apply_masks,
    keep_units,
    make_masks,
    prunable_weights,
    split_narrow,
    units_of,
)
from onnx_asr.pruning.options import CompressOptions
from onnx_asr.pruning.scores import input_factors
from onnx_asr.repairing.pipeline import RepairJob, finish
from onnx_asr.repairing.refit import Choice, repair_refit
from onnx_asr.repairing.result import RepairResult
from onnx_asr.repairing.rows import DenseRows

LAST_ROWS = 2
"""Sampled positions of the last round, as a multiple of the refit recipe's."""

NARROWING = 2
"""Steps in which a layer loses its weights within a round."""


@dataclass(frozen=True)
class CompressResult:
    """A pruned and repaired model.

    Attributes:
        repair: The last round's repair, with the model and its verification (before: the last mask without repair).
        layers: Zeros in every weight that took part.
        before: Size of the model that was given.
        after: Size of the compressed one.
        options: What was asked for.
        round_seconds: Wall time of every round.
        masked: The dense weights under the last mask, without repair.
    """

    repair: RepairResult
    layers: tuple[LayerSparsity, ...]
    before: Cost
    after: Cost
    options: CompressOptions
    round_seconds: tuple[float, ...]
    masked: onnx.ModelProto

    @property
    def model(self) -> onnx.ModelProto:
        """The compressed model."""
        return self.repair.model

    @property
    def helps(self) -> str:
        """What the zeros are good for."""
        return Pattern.parse(self.options.pattern).helps

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "compress": asdict(self.options),
            "before": asdict(self.before),
            "after": asdict(self.after),
            "helps": self.helps,
            "layers": [asdict(layer) | {"sparsity": layer.sparsity} for layer in self.layers],
            "round_seconds": list(self.round_seconds),
            **self.repair.to_dict(),
        }


def compress(
    model: ModelSource,
    data: DataSource | Dataset,
    options: CompressOptions | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    input_shapes: InputShapes | None = None,
    execution: Execution | None = None,
) -> CompressResult:
    """Prune and repair jointly, by mask rounds.

    Args:
        model: Path or ModelProto of the dense model; it is not changed.
        data: Calibration samples, as for :func:`onnx_asr.repair`.
        options: What to zero, rounds, samples, seed and refit recipe; at least a sparsity or an N:M pattern.
        preprocessing: What to do to images.
        input_shapes: Shapes of inputs that leave sizes open, for FLOPs; else their batch is 1 and their other open
            sizes are 224.
        execution: Execution providers, memory limit, progress.

    Raises:
        OptionError: Options out of range, or nothing left to prune.
        ModelError: A model that cannot be pruned or repaired.
        DataError: Missing, broken or unfitting data.
    """
    options, execution = options or CompressOptions(), execution or Execution()
    started = time.perf_counter()
    dense = load(model)
    settings = replace(options.repair, method="refit")
    job = RepairJob.of(dense, dense, data, settings, preprocessing)
    execution.progress("loading data", 0.0)
    calibration = job.load_calibration()
    loaded = time.perf_counter()
    index = GraphIndex.of(dense)
    before = cost(index, input_shapes)
    pattern = Pattern.parse(options.pattern)
    weights, _ = prunable_weights(index, options.include, options.exclude)
    weights, _ = split_narrow(weights, pattern)
    ranking = replace(settings.refit, relu_steps=min(settings.refit.relu_steps, 1))
    factors = _factors(job.networks, weights, calibration, execution)
    values = [index.value(weight.tensor) for weight in weights]
    masks: list[Mask] = [np.ones(value.shape, bool) for value in values]
    seconds = []
    kept: dict[int, list[DenseRows]] | None = {} if execution.memory_limit is None else None
    schedule = _schedule(options, pattern)
    for number, step in enumerate(schedule):
        begun = time.perf_counter()
        goal = make_masks(weights, _scores(values, factors, masks), *step, "global")
        narrowed = pattern.n is None and 0 < number < len(schedule) - 1
        given = masks if narrowed else goal
        masked, layers = apply_masks(index, weights, given)
        job = replace(job, pruned=masked, networks=Networks.of(masked, dense))
        if number + 1 == len(schedule):
            break
        execution.progress(f"mask round {number + 1} of {len(schedule)}", number / len(schedule))
        part = calibration.head(round(options.round_samples * calibration.count))
        plan = EditPlan()
        quiet = replace(execution, progress=silent)
        nodes = _pruned_nodes(job.networks, weights)
        chosen: dict[int, Mask] = {}
        narrow = _narrowing(weights, nodes, factors, pattern, given, goal, chosen) if narrowed else {}
        repair_refit(job.networks, part, quiet, plan, ranking, precise=True, kept=kept, narrow=narrow)
        masks = [chosen.get(node, mask) for node, mask in zip(nodes, goal, strict=True)]
        values = _refitted(job.networks, weights, nodes, plan)
        seconds.append(time.perf_counter() - begun)
    del kept
    last = replace(settings, refit=replace(settings.refit, rows=LAST_ROWS * settings.refit.rows))
    result = finish(replace(job, options=last), calibration, execution, begun, begun)
    seconds.append(time.perf_counter() - begun)
    stages = {"load": loaded - started, "rounds": begun - loaded}
    stages.update((stage, result.seconds[stage]) for stage in ("repair", "verify"))
    return CompressResult(
        repair=replace(result, seconds=stages, notes=(*result.notes, *starved(layers))),
        layers=layers,
        before=before,
        after=cost(GraphIndex.of(result.model), input_shapes),
        options=options,
        round_seconds=tuple(seconds),
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


def _factors(
    networks: Networks, weights: Sequence[PrunableWeight], calibration: Calibration, execution: Execution
) -> list[NDArray[np.float64]]:
    """What to multiply magnitudes with before weights of different layers are compared.

    1 where BatchNormalization is kept. Where it was folded, ``|W|`` carries each channel's arbitrary scale; there the
    factors of the score "variance".

    Args:
        networks: The dense model with itself.
        weights: The weights.
        calibration: The samples.
        execution: How to run.
    """
    if any(weight.points[0].batchnorm is not None for weight in weights):
        return [np.ones(()) for _ in weights]
    execution.progress("measuring the dense network", 0.0)
    return input_factors(networks, [weight.points[0] for weight in weights], "variance", calibration, execution)


def _scores(
    values: Sequence[NDArray[Any]], factors: Sequence[NDArray[np.float64]], masks: Sequence[Mask]
) -> list[NDArray[np.float64]]:
    """Scores of the weights' values, below all others where already pruned."""
    parts = zip(values, factors, masks, strict=True)
    return [np.where(mask, np.abs(value.astype(np.float64)) * factor, -1.0) for value, factor, mask in parts]


def _narrowing(
    weights: Sequence[PrunableWeight],
    nodes: Sequence[int],
    factors: Sequence[NDArray[np.float64]],
    pattern: Pattern,
    given: Sequence[Mask],
    goal: Sequence[Mask],
    chosen: dict[int, Mask],
) -> dict[int, list[Choice]]:
    """By node, what takes entries (or blocks) out of a weight's mask until there are as many as in the goal's.

    Args:
        weights: The weights.
        nodes: Their nodes.
        factors: Of their magnitudes.
        pattern: What is kept or dropped as one.
        given: Masks to begin with.
        goal: Masks that say how many stay.
        chosen: Where the masks that the choices leave are put, by node.
    """

    def choice(number: int, keep: int) -> Choice:
        def choose(value: NDArray[np.float64]) -> Mask:
            mask = chosen.get(nodes[number], given[number])
            (scores,) = _scores([value], [factors[number]], [mask])
            chosen[nodes[number]] = keep_units(weights[number], scores, pattern, keep)
            return chosen[nodes[number]]

        return choose

    choices = {}
    shares = [step / NARROWING for step in range(1, NARROWING + 1)]
    for number, weight in enumerate(weights):
        begin, end = (
            np.count_nonzero(units_of(weight, mask.astype(np.float64), pattern))
            for mask in (given[number], goal[number])
        )
        choices[nodes[number]] = [choice(number, round(begin ** (1 - share) * end**share)) for share in shares]
    return choices


def _pruned_nodes(networks: Networks, weights: Sequence[PrunableWeight]) -> list[int]:
    """Where the pruned network has the nodes of the dense model's weights."""
    assert networks.pairing is not None
    pruned_node = {dense: pruned for pruned, dense in networks.pairing.nodes.items()}
    return [pruned_node[weight.points[0].node] for weight in weights]


def _refitted(
    networks: Networks, weights: Sequence[PrunableWeight], nodes: Sequence[int], plan: EditPlan
) -> list[NDArray[Any]]:
    """What a refit of the pruned model made of the dense model's weights."""
    values = []
    for weight, node in zip(weights, nodes, strict=True):
        value = plan.current(networks.pruned, node, weight.points[0].layer.weight_slot)
        assert value is not None
        values.append(value)
    return values
