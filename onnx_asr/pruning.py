"""The pruning pipeline: scores to masks to zeros in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import onnx
from numpy.typing import NDArray

from onnx_asr.calibration import Calibration
from onnx_asr.data import Dataset, Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.errors import OptionError
from onnx_asr.fidelity import Fidelity
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.points import Skip
from onnx_asr.graph.shapes import Cost, cost
from onnx_asr.masking import (
    LayerSparsity,
    PrunableWeight,
    Scope,
    apply_masks,
    make_masks,
    prunable_weights,
    share_of_zeros,
    split_narrow,
    units_of,
)
from onnx_asr.model_io import ModelSource, check_finite, load
from onnx_asr.networks import Execution
from onnx_asr.numerics.masks import keep_count
from onnx_asr.numerics.scores import cheapest_keep
from onnx_asr.options import DATA_AWARE, SCORES, SENSITIVITY_SPARSITIES, RepairOptions, Score, check_choice
from onnx_asr.patterns import Pattern, check_sparsity
from onnx_asr.repairing import RepairJob
from onnx_asr.scoring import data_free_scores, weight_scores
from onnx_asr.trials import try_masks

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
    pattern: str = "unstructured",
    scope: Scope = "global",
    score: Score = "magnitude",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    data: DataSource | Dataset | None = None,
    samples: int = RepairOptions.samples,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    execution: Execution | None = None,
) -> PruneResult:
    """Zero the weights of smallest score.

    Unstructured: the number of zeros is exactly ``round(sparsity n)`` over all weights together (scopes "global",
    "erk" and "sensitivity") or in each ("layer"), except where there are more already: existing zeros are kept. N:M:
    the ``n`` largest of every ``m`` consecutive input channels stay; a weight with fewer than ``m`` input channels a
    group stays dense. Blocks (Nx1): ``N`` consecutive output channels of a group share their zeros, a last block may
    have fewer; a block's score is the mean of its members', and ``round(sparsity n)`` of the blocks go, by the same
    scopes. Ties are broken by position.

    Args:
        model: Path or ModelProto of the dense model; it is not changed.
        sparsity: Share of weights (or blocks) to zero, in [0, 1); not given where the pattern is N:M.
        pattern: "unstructured"; "N:M" along the input channels, as sparse tensor cores expect; or "Nx1", such as 4x1.
        scope: Compare scores over the whole network, or within each weight: all of one sparsity ("layer"), or
            Erdos-Renyi-kernel sparsities, which spare small layers ("erk"); or the sparsities at which the distances
            from the dense network's outputs add up to the least, each layer's measured alone and refitted at several
            sparsities ("sensitivity", which needs data; see :func:`onnx_asr.sensitivity` for what that takes).
        score: See :mod:`onnx_asr.scoring`; "activation", "variance" and "gram" need data.
        include: Regular expressions on node or weight names that take part; empty for all.
        exclude: Regular expressions that do not.
        data: Calibration samples for the scores and the scope that need them, as for :func:`onnx_asr.repair`.
        samples: How many of them to use.
        seed: Of the sample.
        preprocessing: What to do to images.
        execution: Execution providers, memory limit, progress.

    Raises:
        OptionError: Sparsity out of range, a bad pattern, an unknown score, or nothing left to prune.
        ModelError: Not an ONNX model, quantized, weights not finite, or without weights.
        DataError: Missing, broken or unfitting data.
    """
    shape = Pattern.parse(pattern)
    check_sparsity(sparsity, shape)
    check_choice("scope", scope, get_args(Scope))
    check_choice("score", score, SCORES)
    _check_combination(shape, scope, score, data is not None)
    dense = load(model)
    index = GraphIndex.of(dense)
    check_finite(index, "dense")
    weights, skips = prunable_weights(index, include, exclude)
    weights, narrow = split_narrow(index, weights, shape)
    points = [weight.points[0] for weight in weights]
    counts = None
    if data is None:
        scores = data_free_scores(index, points, score)
    else:
        held_out = RepairOptions.verify_samples if scope == "sensitivity" else 0
        settings = RepairOptions(method="refit", samples=samples, verify_samples=held_out, seed=seed)
        job, execution = RepairJob.of(dense, dense, data, settings, preprocessing), execution or Execution()
        calibration = job.load_calibration()
        scores = weight_scores(job.networks, points, score, calibration, execution)
        if scope == "sensitivity":
            assert sparsity is not None
            counts = _sensitivity_counts(job, weights, scores, shape, sparsity, calibration, execution)
    masks = make_masks(index, weights, scores, shape, sparsity, scope, counts)
    options = {
        "sparsity": sparsity,
        "pattern": str(shape),
        "scope": scope,
        "score": score,
        "include": list(include),
        "exclude": list(exclude),
    }
    pruned, layers = apply_masks(index, weights, masks)
    without_batchnorm = not any(point.batchnorm is not None for point in points)
    folded = score == "magnitude" and scope == "global" and shape.n is None and without_batchnorm and len(points) > 1
    return PruneResult(
        model=pruned,
        layers=layers,
        skips=(*skips, *narrow),
        before=cost(index),
        after=cost(GraphIndex.of(pruned)),
        options=options,
        notes=(_FOLDED,) if folded else (),
    )


def _check_combination(pattern: Pattern, scope: Scope, score: Score, data_given: bool) -> None:
    """Refuse a scope that the pattern overrules, what lacks the samples it needs, and samples that nothing looks at."""
    if scope == "sensitivity" and pattern.n is not None:
        raise OptionError(f"pattern {pattern} sets the sparsity of every layer: leave --scope sensitivity out")
    readers = [f"score '{score}'"] * (score in DATA_AWARE) + [f"scope '{scope}'"] * (scope == "sensitivity")
    if readers and not data_given:
        raise OptionError(f"{readers[0]} needs calibration samples: give them (--data)")
    if data_given and not readers:
        raise OptionError(f"score '{score}' reads no data: leave them out (--data)")


def sensitivities(
    job: RepairJob,
    weights: Sequence[PrunableWeight],
    scores: Sequence[NDArray[Any]],
    pattern: Pattern,
    sparsities: Sequence[float],
    calibration: Calibration,
    execution: Execution,
) -> list[list[Fidelity]]:
    """Fidelity to the dense network with one weight alone at each of the sparsities, refitted."""
    index = job.networks.pruned
    masks = [
        [make_masks(index, [weight], [values], pattern, share, "layer")[0] for share in sparsities]
        for weight, values in zip(weights, scores, strict=True)
    ]
    return try_masks(job, [weight.points for weight in weights], masks, calibration, execution)


def _sensitivity_counts(
    job: RepairJob,
    weights: Sequence[PrunableWeight],
    scores: Sequence[NDArray[Any]],
    pattern: Pattern,
    sparsity: float,
    calibration: Calibration,
    execution: Execution,
) -> list[int]:
    """Units to keep in every weight.

    The last sparsity tried leaves a quarter of the density asked for: no weight ends up with less than that, or 0.05.
    """
    sparsities = sorted({*SENSITIVITY_SPARSITIES, 1 - (1 - sparsity) / 4})
    found = sensitivities(job, weights, scores, pattern, sparsities, calibration, execution)
    index = job.networks.pruned
    sizes = [units_of(index, weight, values, pattern).size for weight, values in zip(weights, scores, strict=True)]
    zeros = [[size - keep_count(size, share) for share in sparsities] for size in sizes]
    costs = [[fidelity.distance for fidelity in tried] for tried in found]
    return cheapest_keep(sizes, zeros, costs, keep_count(sum(sizes), sparsity))
