"""Pruning: magnitude scores to masks to zeros in the file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.calibration import Calibration
from onnx_asr.data import Dataset, Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.errors import ModelError, OptionError
from onnx_asr.fidelity import Fidelity
from onnx_asr.graph.edit import EditPlan, apply, set_metadata
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.points import Point, Skip, rows_to_weight, survey, weight_blocks
from onnx_asr.graph.shapes import Cost, cost
from onnx_asr.model_io import ModelSource, check_finite, load
from onnx_asr.networks import Execution
from onnx_asr.numerics.masks import block_scores, keep_count, keep_largest, keep_n_of_m, spread_blocks
from onnx_asr.numerics.scores import cheapest_keep, erk_keep
from onnx_asr.options import DATA_AWARE, SCORES, SENSITIVITY_SPARSITIES, RepairOptions, Score
from onnx_asr.repairing import RepairJob
from onnx_asr.scoring import data_aware_scores, data_free_scores
from onnx_asr.trials import try_masks
from onnx_asr.version import __version__

_FOLDED = (
    "no BatchNormalization follows these layers; where it was folded into them, magnitudes of different channels do "
    "not compare: --score variance with --data, or --score row, chooses better"
)

Scope = Literal["global", "layer", "erk", "sensitivity"]


@dataclass(frozen=True)
class Pattern:
    """Which sets of weights may survive.

    Attributes:
        n: Weights left of every ``m`` consecutive input channels; None where any may survive.
        m: See ``n``.
        height: Consecutive output channels of a group that share their zeros.
    """

    n: int | None = None
    m: int = 1
    height: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "unstructured", "N:M" or "Nx1".

        Raises:
            OptionError: When it is none of them.
        """
        if text == "unstructured":
            return cls()
        if text == "channel":
            raise OptionError(
                "whole channels are removed by 'prune --pattern channel' (onnx_asr.prune_channels); 'repair' restores "
                "the accuracy afterwards"
            )
        block = re.fullmatch(r"(\d+)x1", text)
        if block and int(block[1]) > 1:
            return cls(height=int(block[1]))
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise OptionError(
                f"pattern '{text}' is unknown: give 'unstructured', N:M with 0 < N < M, such as 2:4, or Nx1 with N "
                "above 1, such as 4x1"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def helps(self) -> str:
        """What the zeros are good for."""
        if (self.n, self.m) == (2, 4):
            return (
                "2:4 zeros save time on NVIDIA GPUs from Ampere on, with TensorRT; elsewhere they only make the file "
                "compress better"
            )
        if self.n is not None:
            return (
                f"{self} zeros save time only where kernels for this very pattern are at hand; elsewhere they make the "
                "file compress better (2:4 is what NVIDIA GPUs accelerate)"
            )
        if self.height > 1:
            return (
                "blocks of output channels save time in runtimes with sparse kernels for CPUs, as XNNPACK's for 1x1 "
                "convolutions (heights 2 and 4); onnxruntime has none, there they only make the file compress better"
            )
        return (
            "unstructured zeros make the file compress better; they save time only in runtimes with sparse kernels, "
            "and onnxruntime has none"
        )

    def __str__(self) -> str:
        if self.height > 1:
            return f"{self.height}x1"
        return "unstructured" if self.n is None else f"{self.n}:{self.m}"


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros in one weight before and after pruning."""

    name: str
    op_type: str
    shape: tuple[int, ...]
    size: int
    zeros_before: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / max(1, self.size)


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
        return _share(self.layers)

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


@dataclass(frozen=True)
class PrunableWeight:
    """A constant weight, and every point that reads it."""

    tensor: str
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        """The first reader's name."""
        return self.points[0].name


def prunable_weights(
    index: GraphIndex, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[PrunableWeight], list[Skip]]:
    """Weights of Conv, ConvTranspose, Gemm and MatMul nodes chosen by patterns.

    Args:
        index: The graph.
        include: Regular expressions; a node takes part when one is found in its name or its weight's. Empty: all.
        exclude: Regular expressions that take nodes out again.

    Raises:
        OptionError: When a pattern is not a regular expression, or none is left.
        ModelError: When the graph has no weights.
    """
    found = survey(index)
    readers: dict[str, list[Point]] = {}
    for point in found.points:
        if point.weight_slot is not None:
            readers.setdefault(index.nodes[point.node].input[point.weight_slot], []).append(point)
    if not readers:
        raise ModelError("the model has no Conv, ConvTranspose, Gemm or MatMul with constant weights: nothing to prune")
    wanted, unwanted = _compile(include), _compile(exclude)
    weights, skips = [], list(found.skips)
    for tensor, points in readers.items():
        texts = [tensor, *(point.name for point in points)]
        chosen = not wanted or any(pattern.search(text) for pattern in wanted for text in texts)
        barred = any(pattern.search(text) for pattern in unwanted for text in texts)
        if chosen and not barred:
            weights.append(PrunableWeight(tensor, tuple(points)))
        else:
            reason = "excluded by a pattern" if barred else "not included by a pattern"
            skips.append(Skip(points[0].node, points[0].name, points[0].kind, reason))
    if not weights:
        raise OptionError(
            f"--include {list(include)} and --exclude {list(exclude)} leave no weight to prune; "
            f"names look like '{next(iter(readers.values()))[0].name}' and '{next(iter(readers))}'"
        )
    return weights, skips


def _compile(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise OptionError(f"'{pattern}' is not a regular expression: {error}") from error
    return compiled


def check_sparsity(sparsity: float | None, pattern: Pattern) -> None:
    """Refuse a sparsity outside [0, 1), a missing one, and one beside an N:M pattern, which sets its own.

    Raises:
        OptionError: Saying what was received.
    """
    if pattern.n is None:
        check_share(sparsity, "weights to zero")
    elif sparsity is not None:
        raise OptionError(f"pattern {pattern} sets the sparsity itself: leave --sparsity out")


def check_share(sparsity: float | None, what: str) -> float:
    """The sparsity, if it is one.

    Raises:
        OptionError: When it is missing or outside [0, 1).
    """
    if sparsity is None:
        raise OptionError(f"the sparsity is missing: give the share of {what}, 0 <= sparsity < 1")
    if not (math.isfinite(sparsity) and 0 <= sparsity < 1):
        raise OptionError(f"sparsity {sparsity} is out of range: give the share of {what}, 0 <= sparsity < 1")
    return sparsity


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
    check_scope(scope, get_args(Scope))
    check_score(score)
    if scope == "sensitivity" and shape.n is not None:
        raise OptionError(f"pattern {shape} sets the sparsity of every layer: leave --scope sensitivity out")
    readers = [f"score '{score}'"] * (score in DATA_AWARE) + [f"scope '{scope}'"] * (scope == "sensitivity")
    if readers and data is None:
        raise OptionError(f"{readers[0]} needs calibration samples: give them (--data)")
    if data is not None and not readers:
        raise OptionError(f"score '{score}' reads no data: leave them out (--data)")
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
        execution = execution or Execution()
        held_out = RepairOptions.verify_samples if scope == "sensitivity" else 0
        settings = RepairOptions(method="refit", samples=samples, verify_samples=held_out, seed=seed)
        job = RepairJob.of(dense, dense, data, settings, preprocessing)
        calibration = job.load_calibration()
        scores = weight_scores(job, points, score, calibration, execution)
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


def weight_scores(
    job: RepairJob, points: Sequence[Point], score: Score, calibration: Calibration, execution: Execution
) -> list[NDArray[np.float64]]:
    """Scores of the points' weights, by whatever the score looks at."""
    if score in DATA_AWARE:
        return data_aware_scores(job.networks, points, score, calibration, execution)
    return data_free_scores(job.networks.pruned, points, score)


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
    sizes = [_units(index, weight, values, pattern).size for weight, values in zip(weights, scores, strict=True)]
    zeros = [[size - keep_count(size, share) for share in sparsities] for size in sizes]
    costs = [[fidelity.distance for fidelity in tried] for tried in found]
    return cheapest_keep(sizes, zeros, costs, keep_count(sum(sizes), sparsity))


def check_score(score: str) -> None:
    """Refuse an unknown score.

    Raises:
        OptionError: Saying which there are.
    """
    if score not in SCORES:
        raise OptionError(f"score '{score}' is unknown: give one of {', '.join(SCORES)}")


def check_scope(scope: str, known: Sequence[str]) -> None:
    """Refuse an unknown scope.

    Raises:
        OptionError: Saying which there are.
    """
    if scope not in known:
        raise OptionError(f"scope '{scope}' is unknown: give one of {', '.join(known)}")


def split_narrow(
    index: GraphIndex, weights: Sequence[PrunableWeight], pattern: Pattern
) -> tuple[list[PrunableWeight], list[Skip]]:
    """Weights that have at least one whole group of an N:M pattern, and the others as skips.

    Raises:
        OptionError: When none has.
    """
    wide, skips = [], []
    for weight in weights:
        inputs = channel_view(index, weight.points[0], index.value(weight.tensor)).shape[1]
        if pattern.n is None or inputs >= pattern.m:
            wide.append(weight)
        else:
            reason = f"{inputs} input channels a group are fewer than the {pattern.m} of pattern {pattern}: stays dense"
            skips.append(Skip(weight.points[0].node, weight.name, weight.points[0].kind, reason))
    if not wide:
        raise OptionError(f"no weight has the {pattern.m} input channels that pattern {pattern} needs")
    return wide, skips


def make_masks(
    index: GraphIndex,
    weights: Sequence[PrunableWeight],
    scores: Sequence[NDArray[Any]],
    pattern: Pattern,
    sparsity: float | None,
    scope: Scope,
    counts: Sequence[int] | None = None,
) -> list[NDArray[np.bool_]]:
    """Masks of what has the largest score, in the weights' stored shapes.

    Args:
        index: The graph.
        weights: The weights.
        scores: Of every weight's entries, in its stored shape.
        pattern: Which sets of weights may survive.
        sparsity: Share of units (weights, or blocks) to drop; None for N:M.
        scope: Where scores are compared; of no account for N:M.
        counts: Units that every weight keeps, for scope "sensitivity".
    """
    if pattern.n is not None:
        n, m = pattern.n, pattern.m
        return [_pattern_mask(index, weight, values, n, m) for weight, values in zip(weights, scores, strict=True)]
    assert sparsity is not None
    units = [_units(index, weight, values, pattern) for weight, values in zip(weights, scores, strict=True)]
    total = keep_count(sum(unit.size for unit in units), sparsity)
    if scope == "global":
        masks = keep_largest(units, total)
    else:
        if scope == "layer":
            counts = [keep_count(unit.size, sparsity) for unit in units]
        elif scope == "erk":
            counts = erk_keep(
                [_kernel_shape(index, weight) for weight in weights], [unit.size for unit in units], total
            )
        assert counts is not None
        masks = [keep_largest([unit], count)[0] for unit, count in zip(units, counts, strict=True)]
    return [_spread(index, weight, mask, pattern) for weight, mask in zip(weights, masks, strict=True)]


def _pattern_mask(index: GraphIndex, weight: PrunableWeight, scores: NDArray[Any], n: int, m: int) -> NDArray[np.bool_]:
    point = weight.points[0]
    mask = keep_n_of_m(channel_view(index, point, scores), n, m)
    return rows_to_weight(point, index.nodes[point.node], mask.reshape(len(mask), -1), scores.shape)


def _units(index: GraphIndex, weight: PrunableWeight, scores: NDArray[Any], pattern: Pattern) -> NDArray[Any]:
    """Scores of what is kept or dropped as one: entries as stored, or blocks [G, ceil(O / height), I, taps]."""
    if pattern.height == 1:
        return scores
    point = weight.points[0]
    return block_scores(weight_blocks(point, index.nodes[point.node], scores), pattern.height)


def _spread(index: GraphIndex, weight: PrunableWeight, mask: NDArray[np.bool_], pattern: Pattern) -> NDArray[np.bool_]:
    """The mask of a weight's entries, of that of its units."""
    if pattern.height == 1:
        return mask
    point = weight.points[0]
    rows = spread_blocks(mask, pattern.height, point.channels // len(mask)).reshape(point.channels, -1)
    return rows_to_weight(point, index.nodes[point.node], rows, index.value(weight.tensor).shape)


def _kernel_shape(index: GraphIndex, weight: PrunableWeight) -> tuple[int, ...]:
    """[C_out, C_in / group, *kernel]."""
    value = index.value(weight.tensor)
    kernel = value.shape[2:] if weight.points[0].kind in ("Conv", "ConvTranspose") else ()
    return (*channel_view(index, weight.points[0], value).shape[:2], *kernel)


def channel_view(index: GraphIndex, point: Point, value: NDArray[Any]) -> NDArray[Any]:
    """A point's weight, or what is as large, as [C_out, C_in / group, taps]."""
    blocks = weight_blocks(point, index.nodes[point.node], value)
    return blocks.reshape(-1, *blocks.shape[2:])


def apply_masks(
    index: GraphIndex, weights: Sequence[PrunableWeight], masks: Sequence[NDArray[np.bool_]]
) -> tuple[onnx.ModelProto, tuple[LayerSparsity, ...]]:
    """A copy of the model with zeros where the masks are False, and how many there are in each weight."""
    plan = EditPlan()
    layers = []
    for weight, mask in zip(weights, masks, strict=True):
        before = index.value(weight.tensor)
        after = np.where(mask, before, np.zeros((), before.dtype))
        for point in weight.points:
            assert point.weight_slot is not None
            plan.values[point.node, point.weight_slot] = after
        layers.append(
            LayerSparsity(
                weight.name,
                weight.points[0].kind,
                tuple(before.shape),
                before.size,
                int((before == 0).sum()),
                int((after == 0).sum()),
            )
        )
    pruned = apply(index, plan)
    set_metadata(pruned, "onnx_asr.version", __version__)
    set_metadata(pruned, "onnx_asr.sparsity", f"{_share(layers):.6f}")
    return pruned, tuple(layers)


def _share(layers: Sequence[LayerSparsity]) -> float:
    return sum(layer.zeros for layer in layers) / max(1, sum(layer.size for layer in layers))
