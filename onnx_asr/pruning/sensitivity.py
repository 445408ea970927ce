"""The sensitivity pipeline: how far the outputs move when one weight alone is pruned and refitted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from onnx_asr.arrays import Floats
from onnx_asr.data import Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.engine.loading import load
from onnx_asr.graph.model_io import ModelSource
from onnx_asr.graph.points import weight_of
from onnx_asr.graph.skips import Skip
from onnx_asr.json_values import MERGED, key
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.networks.pair import Network
from onnx_asr.networks.samples import Calibration
from onnx_asr.numerics.patterns import Pattern
from onnx_asr.pruning.masks import PrunableWeight, make_masks, prunable_weights
from onnx_asr.pruning.options import Score, SensitivityOptions
from onnx_asr.pruning.scores import Values, WalkedScores
from onnx_asr.repairing.options import chosen
from onnx_asr.repairing.refit import write_refit
from onnx_asr.repairing.rows import RowSampler, dense_rows
from onnx_asr.repairing.verification import Samples, Verifier


@dataclass(frozen=True)
class AtSparsity:
    """One weight alone at a sparsity, refitted."""

    derived: ClassVar = ("distance",)

    sparsity: float
    fidelity: Fidelity = field(metadata=MERGED)

    @property
    def distance(self) -> float:
        """Distance from the dense model's outputs."""
        return self.fidelity.distance


@dataclass(frozen=True)
class LayerSensitivity:
    """The effect on the outputs of pruning one weight.

    Attributes:
        name: Its first reader.
        op_type: That node's operator.
        shape: Of the weight as stored.
        size: Number of weights.
        tried: The effect of each sparsity, ascending.
    """

    name: str
    op_type: str
    shape: tuple[int, ...]
    size: int
    tried: tuple[AtSparsity, ...]


@dataclass(frozen=True)
class SensitivityResult:
    """The effect on the outputs of pruning every weight by itself.

    Attributes:
        layers: Weights that took part, in file order.
        skips: Nodes with weights that took no part, and why.
        sparsities: Sparsities that were tried, ascending.
        score: The score that ranked the weights of a layer.
        samples: Held-out samples measured on.
        calibration_samples: Samples refitted on.
        notes: Notes for the user.
        seconds: Wall time.
        metric: Name of the user's own metric, if it was the measure.
    """

    derived: ClassVar = ("measure",)

    layers: tuple[LayerSensitivity, ...]
    skips: tuple[Skip, ...] = field(metadata=key("skipped"))
    sparsities: tuple[float, ...]
    score: Score
    samples: int
    calibration_samples: int
    notes: tuple[str, ...]
    seconds: float
    metric: str | None = None

    @property
    def distance_name(self) -> str:
        """Name of the distance."""
        first = self.layers[0].tried[0].fidelity
        if first.metric is not None:
            return f"metric {self.metric}"
        if first.kl is not None:
            return "KL divergence"
        if first.detection_error is not None:
            return "detection error"
        return "share of unequal outputs" if first.snr_db is None else "relative output error"

    @property
    def measure(self) -> str:
        """Name of all that was measured."""
        return f"{self.distance_name} and agreement" if self.shows_agreement else self.distance_name

    @property
    def shows_agreement(self) -> bool:
        """Whether the agreement stands beside the distance: for classifiers."""
        return self.layers[0].tried[0].fidelity.kl is not None


def sensitivity(
    model: ModelSource,
    data: DataSource,
    options: SensitivityOptions | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    execution: Execution | None = None,
) -> SensitivityResult:
    """Measure, for every weight alone, how far pruning and refitting it moves the outputs from the dense model's.

    The distance is the KL divergence for classifiers, the detection error for detectors, the relative error otherwise,
    or the metric of the options. It takes one pass over the calibration samples and, for every weight and sparsity, one
    refit of that layer and one pass over the held-out samples: ``calibration + layers * sparsities * held-out`` samples
    run through the network.

    Args:
        model: The dense model: a path, or an object of onnx, onnx-graphsurgeon or onnx-ir, which is not changed.
        data: Samples, no labels needed, as for :func:`onnx_asr.repair`.
        options: What to try; numbers of samples, seed and refit recipe.
        preprocessing: How to prepare images.
        execution: Execution providers, memory limit, progress.

    Raises:
        OptionError: Options out of range, or nothing left to try.
        ModelError: A model that cannot be pruned or refitted.
        DataError: Missing, broken or unfitting data.
    """
    started = time.perf_counter()
    options, execution = chosen(options, SensitivityOptions, data), execution or Execution()
    shares = tuple(sorted(set(options.sparsities)))
    dense = Network.of(load(model), "dense", compared=True)
    weights, skips = prunable_weights(dense.index, dense.everything, options.include, options.exclude)
    samples = Samples.of(data, dense, options.repair, preprocessing, execution, verify=True)
    calibration = samples.load()
    scores, found = fidelity_by_weight(
        dense, weights, options.score, Pattern(), shares, samples, calibration, execution
    )
    execution.progress("done", 1.0)
    layers = [
        LayerSensitivity(
            weight.name, weight.points[0].kind, values.shape, values.size, tuple(map(AtSparsity, shares, tried))
        )
        for weight, values, tried in zip(weights, scores, found, strict=True)
    ]
    return SensitivityResult(
        layers=tuple(layers),
        skips=tuple(skips),
        sparsities=shares,
        score=options.score,
        samples=found[0][0].samples,
        calibration_samples=calibration.count,
        notes=(*dense.notes, *samples.notes),
        seconds=time.perf_counter() - started,
        metric=None if samples.metric is None else samples.metric.name,
    )


def fidelity_by_weight(
    dense: Network,
    weights: Sequence[PrunableWeight],
    score: Score,
    pattern: Pattern,
    sparsities: Sequence[float],
    samples: Samples,
    calibration: Calibration,
    execution: Execution,
) -> tuple[Values, list[list[Fidelity]]]:
    """Fidelity on the held-out samples with one weight pruned and refitted, and everything else dense.

    One walk of the dense network over the calibration samples gives every weight its scores and its rows, from which it
    is refitted for each sparsity; each of these networks then runs over the held-out samples.

    Returns:
        The scores of every weight, and one fidelity for each sparsity.

    Raises:
        ModelError: When activations are not finite.
    """
    verifier = Verifier(dense.index.model, samples, execution)
    verifier.check_reference()
    results: list[list[Fidelity]] = [[] for _ in weights]
    weight_number = {point.node: number for number, weight in enumerate(weights) for point in weight.points}
    waiting: list[list[RowSampler]] = [[] for _ in weights]
    execution.progress("trying layers", 0.0)
    points = [point for weight in weights for point in weight.points]
    recipe, seed = samples.options.refit, samples.options.seed
    walked = WalkedScores(dense, [weight.points[0] for weight in weights], score, recipe, seed)
    scores: dict[int, Floats] = {}
    for sampler in dense_rows(dense, points, recipe, calibration, execution, walked):
        number = weight_number[sampler.point.node]
        weight, readers = weights[number], waiting[number]
        readers.append(sampler)
        if sampler.point is weight.points[0]:
            scores[number] = walked.of(sampler)
        if len(readers) < len(weight.points):
            continue
        value = weight_of(dense.index, sampler.point)
        for share in sparsities:
            (mask,) = make_masks([weight], [scores[number]], pattern, share, "layer", seed=seed)
            draft = Draft(dense.index)
            for reader in readers:
                draft.set_weight(reader.point, np.where(mask, value, np.zeros((), value.dtype)))
                write_refit(draft, reader.again())
            results[number].append(verifier.fidelity(draft.model()))
        readers.clear()
        execution.progress("trying layers", sum(bool(found) for found in results) / len(weights))
    return [scores[number] for number in range(len(weights))], results
