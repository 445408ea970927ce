"""The pruning pipeline: scores to masks to zeros in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import onnx

from onnx_asr.data import Dataset, Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.errors import OptionError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource, check_finite, load
from onnx_asr.graph.shapes import InputShapes
from onnx_asr.graph.skips import Skip
from onnx_asr.networks.cost import Cost, compressed_size, cost, flops
from onnx_asr.networks.execution import Execution, Progress
from onnx_asr.networks.sparsity import LayerSparsity, share_of_zeros, starved
from onnx_asr.numerics.patterns import Pattern, check_sparsity
from onnx_asr.pruning.allocation import Allocation, layer_costs, sensitivities, unit_flops
from onnx_asr.pruning.budget import Budget, smallest_share
from onnx_asr.pruning.masks import Scope, prunable_weights, split_narrow
from onnx_asr.pruning.scores import data_free_scores, weight_scores
from onnx_asr.repairing.options import DATA_AWARE, SCORES, SENSITIVITY_SPARSITIES, RepairOptions, Score, check_choice
from onnx_asr.repairing.pipeline import RepairJob

_FOLDED = (
    "no BatchNormalization follows these layers; where it was folded into them, magnitudes of different channels do "
    "not compare: --score variance with --data, or --score row, chooses better"
)


@dataclass(frozen=True)
class PruneResult:
    """A pruned model and what was pruned in it.

    Attributes:
        model: The pruned copy.
        layers: Weights that took part, in file order.
        skips: Nodes with weights that took no part, and why.
        before: Size of the model that was given.
        after: Size of the pruned one.
        options: What was asked for.
        notes: What else a user should know.
    """

    model: onnx.ModelProto
    layers: tuple[LayerSparsity, ...]
    skips: tuple[Skip, ...]
    before: Cost
    after: Cost
    options: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """Share of zeros over all weights that took part."""
        return share_of_zeros(self.layers)

    @property
    def helps(self) -> str:
        """What the zeros are good for."""
        return Pattern.parse(self.options["pattern"]).helps

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "sparsity": self.sparsity,
            "options": self.options,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "helps": self.helps,
            "layers": [asdict(layer) | {"sparsity": layer.sparsity} for layer in self.layers],
            "skipped": [asdict(skip) for skip in self.skips],
            "notes": list(self.notes),
        }


def prune(
    model: ModelSource,
    sparsity: float | None = None,
    *,
    budget: Budget | None = None,
    pattern: str = "unstructured",
    scope: Scope = "global",
    score: Score = "magnitude",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    data: DataSource | Dataset | None = None,
    samples: int = RepairOptions.samples,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    input_shapes: InputShapes | None = None,
    execution: Execution | None = None,
) -> PruneResult:
    """Zero the weights of smallest score.

    Unstructured: the number of zeros is exactly ``round(sparsity n)`` over all weights together (scopes "global",
    "erk" and "sensitivity") or in each ("layer"), except where there are more already: existing zeros are kept. N:M:
    the ``n`` largest of every ``m`` consecutive input channels stay; a weight with fewer than ``m`` input channels a
    group stays dense. Blocks (Nx1): ``N`` consecutive output channels of a group share their zeros, a last block may
    have fewer; a block's score is the mean of its members', and ``round(sparsity n)`` of the blocks go, by the same
    scopes. Ties are broken by position. With a budget, it is the smallest sparsity that keeps within it.

    Args:
        model: Path or ModelProto of the dense model; it is not changed.
        sparsity: Share of weights (or blocks) to zero, in [0, 1); not given where the pattern is N:M, or with a budget.
        budget: What the pruned model may cost in bytes after gzip, or in operations with a weight other than zero;
            scope "sensitivity" then shares out these operations, instead of the weights.
        pattern: "unstructured"; "N:M" along the input channels, as sparse tensor cores expect; or "Nx1", such as 4x1.
        scope: Compare scores over the whole network, or within each weight: all of one sparsity ("layer"), or
            Erdos-Renyi-kernel sparsities, which spare small layers ("erk"); or the sparsities at which the distances
            from the dense network's outputs add up to the least, each layer's measured alone and refitted at several
            sparsities ("sensitivity", which needs data; see :func:`onnx_asr.sensitivity` for what that takes).
        score: See :mod:`onnx_asr.pruning.scores`; "activation", "variance" and "gram" need data.
        include: Regular expressions on node or weight names that take part; empty for all.
        exclude: Regular expressions that do not.
        data: Calibration samples for the scores and the scope that need them, as for :func:`onnx_asr.repair`.
        samples: How many of them to use.
        seed: Of the sample.
        preprocessing: What to do to images.
        input_shapes: Shapes of inputs that leave sizes open, for FLOPs; else their batch is 1 and their other open
            sizes are 224.
        execution: Execution providers, memory limit, progress.

    Raises:
        OptionError: Sparsity out of range, a bad pattern, an unknown score, a budget that cannot be reached, or nothing
            left to prune.
        ModelError: Not an ONNX model, quantized, weights not finite, or without weights.
        DataError: Missing, broken or unfitting data.
    """
    shape = Pattern.parse(pattern)
    _check_goal(shape, sparsity, budget)
    check_choice("scope", scope, get_args(Scope))
    check_choice("score", score, SCORES)
    _check_combination(shape, scope, score, data is not None)
    dense, execution = load(model), execution or Execution()
    index = GraphIndex.of(dense)
    check_finite(index, "dense")
    before = cost(index, input_shapes)
    weights, skips = prunable_weights(index, include, exclude)
    weights, narrow = split_narrow(weights, shape)
    points = [weight.points[0] for weight in weights]
    costs = None
    if data is None:
        scores = data_free_scores(index, points, score)
    else:
        held_out = RepairOptions.verify_samples if scope == "sensitivity" else 0
        settings = RepairOptions(method="refit", samples=samples, verify_samples=held_out, seed=seed)
        job = RepairJob.of(dense, dense, data, settings, preprocessing)
        calibration = job.load_calibration()
        scores = weight_scores(job.networks, points, score, calibration, execution)
        if scope == "sensitivity":
            tried = _tried(sparsity, budget, before)
            found = sensitivities(job, weights, scores, shape, tried, calibration, execution)
            costs = layer_costs(index, weights, scores, shape, tried, found)
            if budget is not None and budget.measure == "flops":
                costs = replace(costs, prices=unit_flops(index, weights, costs.sizes, input_shapes))
    allocation = Allocation(index, weights, scores, shape, scope, costs)
    share = sparsity if budget is None else _within(budget, allocation, before, input_shapes, execution.progress)
    pruned, layers = allocation.pruned(share)
    options = {
        "sparsity": sparsity,
        "budget": None if budget is None else asdict(budget),
        "pattern": str(shape),
        "scope": scope,
        "score": score,
        "include": list(include),
        "exclude": list(exclude),
    }
    without_batchnorm = not any(point.batchnorm is not None for point in points)
    folded = score == "magnitude" and scope == "global" and shape.n is None and without_batchnorm and len(points) > 1
    return PruneResult(
        model=pruned,
        layers=layers,
        skips=(*skips, *narrow),
        before=before,
        after=cost(GraphIndex.of(pruned), input_shapes),
        options=options,
        notes=((_FOLDED,) if folded else ()) + starved(layers),
    )


def _check_goal(pattern: Pattern, sparsity: float | None, budget: Budget | None) -> None:
    """Refuse what does not say once, and in terms that apply to zeros, how much to prune."""
    if budget is None:
        check_sparsity(sparsity, pattern)
        return
    if budget.measure == "latency":
        raise OptionError("zeros make no model faster in onnxruntime: give target-latency with --pattern channel")
    if pattern.n is not None:
        raise OptionError(f"pattern {pattern} sets the sparsity itself: leave target-{budget.measure} out")
    budget.check_alone(sparsity)


def _tried(sparsity: float | None, budget: Budget | None, dense: Cost) -> list[float]:
    """Sparsities to try every weight at.

    The last one leaves a quarter of the density asked for: no weight ends up with less than that, or 0.05. A budget's
    share is about the density that it comes to.
    """
    if budget is not None:
        whole = _cost(budget, dense)
        sparsity = 1 - budget.of(whole) / whole
    assert sparsity is not None
    return sorted({*SENSITIVITY_SPARSITIES, 1 - (1 - sparsity) / 4})


def _cost(budget: Budget, cost: Cost) -> int:
    """What the budget limits: of zeros only those count that compression, or a sparse kernel, makes use of."""
    return cost.compressed if budget.measure == "size" else cost.nonzero_flops


def _within(
    budget: Budget, allocation: Allocation, dense: Cost, input_shapes: InputShapes | None, progress: Progress
) -> float:
    """The smallest sparsity that keeps within a budget."""

    def cost_at(sparsity: float) -> int:
        pruned, _ = allocation.pruned(sparsity)
        if budget.measure == "size":
            return compressed_size(pruned)
        return flops(GraphIndex.of(pruned), input_shapes)[1]

    return smallest_share(budget, _cost(budget, dense), cost_at, progress)


def _check_combination(pattern: Pattern, scope: Scope, score: Score, data_given: bool) -> None:
    """Refuse a scope that the pattern overrules, what lacks the samples it needs, and samples that nothing looks at."""
    if scope == "sensitivity" and pattern.n is not None:
        raise OptionError(f"pattern {pattern} sets the sparsity of every layer: leave --scope sensitivity out")
    readers = [f"score '{score}'"] * (score in DATA_AWARE) + [f"scope '{scope}'"] * (scope == "sensitivity")
    if readers and not data_given:
        raise OptionError(f"{readers[0]} needs calibration samples: give them (--data)")
    if data_given and not readers:
        raise OptionError(f"score '{score}' reads no data: leave them out (--data)")
