"""How close a model is to another one on data, and how accurate it is if labels are known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import onnx

from onnx_asr.arrays import Array, Floats, Integers
from onnx_asr.data import Dataset
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import DataError, ModelError
from onnx_asr.graph.index import GraphIndex, ancestors, is_standard
from onnx_asr.networks.detection import Detections
from onnx_asr.networks.samples import batch_size_for, feeds, input_specs, whole_batches

_TINY = 1e-12


@dataclass(frozen=True)
class Fidelity:
    """Quality of a model's outputs on some samples; None where a measure does not apply.

    Attributes:
        samples: Number of samples.
        top1: Share of samples whose largest output is the label's class.
        top5: Share of samples whose label is among the five largest outputs.
        agreement: Share of samples with the same largest output as the dense model; of equal values in the first output
            where no output is a floating-point number.
        kl: Mean Kullback-Leibler divergence, dense || model, of the class probabilities, in nats.
        snr_db: ``10 log10(sum y_d^2 / sum (y_d - y)^2)`` over all floating-point outputs; infinite where equal.
        detection_error: For detectors, how far what they find is from what the dense model finds: scores, and boxes
            where it is confident; see :mod:`onnx_asr.networks.detection`.
        metric: What the user's own measure gave; lower is better.
        mean_ap: Mean average precision of a detector over the overlaps 0.5, 0.55, ... 0.95: mAP@[.5:.95].
        mean_ap50: Its mean average precision at an overlap of 0.5: mAP@.5.
        by_labels: Top-1 and top-5 by labels that the data have, where nobody asked for a comparison; for reports.
    """

    samples: int
    top1: float | None = None
    top5: float | None = None
    agreement: float | None = None
    kl: float | None = None
    snr_db: float | None = None
    detection_error: float | None = None
    metric: float | None = None
    mean_ap: float | None = None
    mean_ap50: float | None = None
    by_labels: tuple[float, float | None] | None = field(default=None, repr=False)

    @property
    def distance(self) -> float:
        """The distance that a repair minimises: the user's own metric if there is one, else the divergence."""
        return self.divergence if self.metric is None else self.metric

    @property
    def divergence(self) -> float:
        """The distance of the outputs from the dense model's.

        KL for classifiers; the detection error for detectors; else the relative output error ``10^(-snr/20)``; else,
        where no output is a floating-point number (ArgMax heads), the share of values that disagree.
        """
        if self.kl is not None:
            return self.kl if math.isfinite(self.kl) else math.inf
        if self.detection_error is not None:
            return self.detection_error
        if self.snr_db is not None:
            return float(10 ** (-self.snr_db / 20))
        assert self.agreement is not None, "a distance needs a dense model"
        return 1.0 - self.agreement


Outputs = list[Array]


def collect_outputs(
    model: onnx.ModelProto, data: Dataset, indices: Integers, runtime: Runtime, batch_size: int | None = None
) -> Outputs:
    """Run a model over samples; one array per output, in the model's order, samples along the first axis.

    Outputs behind a NonMaxSuppression, whose number depends on the data, are replaced by the boxes and scores it reads,
    and integers that a QuantizeLinear makes by what it reads.

    Raises:
        ModelError: When onnxruntime cannot run the model.
        DataError: When the data do not fit its inputs.
    """
    batches = run_batches(model, compared_outputs(GraphIndex.of(model)), data, indices, runtime, batch_size)
    parts = [values.values() for _, values in batches]
    return [joined(part) for part in zip(*parts, strict=True)]


def run_batches(
    model: onnx.ModelProto,
    names: Sequence[str],
    data: Dataset,
    indices: Integers,
    runtime: Runtime,
    batch_size: int | None = None,
) -> Iterator[tuple[Integers, dict[str, Array]]]:
    """Run a model over samples: for every batch their positions, and these of its tensors, in this order.

    Raises:
        ModelError: When onnxruntime cannot run the model.
        DataError: When the data do not fit its inputs.
    """
    specs = input_specs(GraphIndex.of(model))
    session = Session(with_outputs(model, names), runtime)
    step = batch_size_for(specs, batch_size)
    used = whole_batches(indices, specs)
    for start in range(0, len(used), step):
        positions = used[start : start + step]
        yield positions, session.run(feeds(specs, data.batch(positions)))


def compared_outputs(index: GraphIndex) -> list[str]:
    """Outputs; in place of those behind a NonMaxSuppression, whose number depends on the data, what it reads."""
    names: list[str] = []
    for output in index.outputs:
        quantizer = index.made_by(output, "QuantizeLinear")
        if quantizer is not None:
            output = index.nodes[quantizer].input[0]
        behind = sorted(ancestors(index, [output]))
        selections = [index.nodes[p] for p in behind if is_standard(index.nodes[p], "NonMaxSuppression")]
        read = [name for node in selections for name in node.input if name and not index.is_constant(name)]
        names.extend(read or [output])
    return list(dict.fromkeys(names))


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with other outputs: any of its tensors."""
    if [value.name for value in model.graph.output] == names:
        return model
    declared = {value.name: value for value in model.graph.output}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.output[:]
    result.graph.output.extend(declared.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return result


def joined(parts: Sequence[Array]) -> Array:
    """The outputs on several batches as one array; flat where their number depends on the data."""
    if any(part.ndim == 0 or part.shape[1:] != parts[0].shape[1:] for part in parts):
        return np.concatenate([part.ravel() for part in parts])
    return np.concatenate(parts)


@np.errstate(invalid="ignore")
def compare(dense: Outputs, other: Outputs, detections: Detections | None = None) -> Fidelity:
    """Agreement, KL divergence, SNR and detection error of a model's outputs against the dense model's, without labels.

    Args:
        dense: The dense model's.
        other: The other model's.
        detections: What :func:`detections_in` tells of the dense model's.

    Raises:
        ModelError: When the two have different outputs.
    """
    if [array.shape for array in dense] != [array.shape for array in other]:
        raise ModelError(
            f"the models' outputs differ in shape: {[array.shape for array in dense]} for the dense one, "
            f"{[array.shape for array in other]} for the other; give two versions of the same network (if the number "
            "of results depends on the data, --verify-samples 0 repairs without comparing them)"
        )
    signal = noise = 0.0
    floating = False
    for reference, value in zip(dense, other, strict=True):
        if np.issubdtype(reference.dtype, np.floating):
            floating = True
            exact = reference.astype(np.float64)
            signal += float(np.square(exact).sum())
            noise += float(np.square(exact - value).sum())
    snr = _snr(signal, noise) if floating else None
    agreement = kl = detection_error = None
    if detections is not None:
        detection_error = math.inf if snr == -math.inf else detections.error(dense, other)
    if is_classifier(dense):
        agreement = float(np.mean(dense[0].argmax(axis=1) == other[0].argmax(axis=1)))
        reference, value = log_probabilities(dense[0]), log_probabilities(other[0])
        kl = float(np.mean((np.exp(reference) * (reference - value)).sum(axis=1)))
    elif snr is None and dense:
        agreement = float(np.mean(dense[0] == other[0]))
    return Fidelity(len(dense[0]), agreement=agreement, kl=kl, snr_db=snr, detection_error=detection_error)


def detections_in(dense: Outputs) -> Detections | None:
    """What the outputs of a dense detector mean; None where they are not finite, or those of another network."""
    if is_classifier(dense) or not_finite(dense) > 0:
        return None
    return Detections.of(dense)


def check_reference(dense: Outputs) -> None:
    """Refuse outputs of a dense model that no others can be compared with.

    Raises:
        ModelError: When they are not even equal to themselves, since they hold NaN or infinities.
    """
    if not math.isfinite(compare(dense, dense).distance):
        raise ModelError(
            f"{not_finite(dense):.1%} of what the dense model itself puts out on these samples is NaN or infinite, so "
            "no other model can be compared with it: check the samples and their preprocessing, or look for the first "
            "node whose output is not finite"
        )


def not_finite(outputs: Iterable[Array]) -> float:
    """Share of the floating-point values that are NaN or infinite."""
    masks = [np.isfinite(value) for value in outputs if np.issubdtype(value.dtype, np.floating)]
    total = sum(mask.size for mask in masks)
    return 1 - sum(int(mask.sum()) for mask in masks) / total if total else 0.0


Verdict = Literal["closer", "equal", "further"]
"""What one model is, measured against another one: closer to the dense model than that, or further from it."""

LEVELS = 4.0
"""Differences between two optimisation levels that rounding may reach elsewhere."""
_STEPS = 16 * float(np.finfo(np.float32).eps)
"""Relative error of outputs in float32 arithmetic, at least; the order in which sums are formed is free."""


@dataclass(frozen=True)
class Noise:
    """How far rounding alone moves the distance of a model's outputs from the dense model's.

    Two optimisation levels of onnxruntime compute one function in two orders. Their outputs ``y`` differ by a relative
    error ``r``; rounding is taken to reach ``max(4 r, 16 eps)`` with ``eps = 2^-23``, or half a step of the type of the
    outputs where that is more. It is independent from sample to sample, and of what pruning did. So a relative output
    error D, which is a norm, moves by ``sqrt(D^2 + r^2) - D``, and by ``r / sqrt(N)`` for N samples; a share of unequal
    values moves by 4 times the share that the levels disagree on. For class scores, ``d`` being the error of a
    log-probability, a divergence K of one sample moves by ``|sum_i (q_i - p_i) d| <= sqrt(2 K) d`` (Pinsker's
    inequality), their mean by ``1 / sqrt(N)`` of that, by ``d^2`` where K is close to 0, and by ``4 eps`` where scores
    are probabilities, whose sum is rounded.

    Attributes:
        relative: Relative error of the outputs, or share of unequal values.
        samples: Number of samples.
        scores: Error ``d`` of a log-probability; None where the distance is no divergence.
        sums: Error of the sum of probabilities.
        metric: How far rounding moves the user's own metric: 4 times the difference between the levels.
    """

    relative: float
    samples: int = 1
    scores: float | None = None
    sums: float = 0.0
    metric: float = 0.0

    @classmethod
    def between(cls, outputs: Outputs, again: Outputs | None, detections: Detections | None = None) -> Noise:
        """From the dense model's outputs, and those of the same file at another optimisation level if it runs there."""
        classifier = is_classifier(outputs)
        compared = slice(1) if classifier else slice(None)
        floating = [value.dtype for value in outputs[compared] if np.issubdtype(value.dtype, np.floating)]
        found = None if again is None else compare(outputs[compared], again[compared], detections)
        if not floating:
            return cls(0.0 if found is None else LEVELS * found.distance)  # not independent: ties of a few samples
        error = 0.0
        if found is not None and found.snr_db not in (None, -math.inf):  # the latter where a value is not finite
            error = replace(found, kl=None).divergence
        relative = max(LEVELS * error, _STEPS, *(float(np.finfo(kind).eps) / 2 for kind in floating))
        samples = len(outputs[0]) if outputs[0].ndim else 1
        if not classifier:
            return cls(relative, samples)
        scores = outputs[0].astype(np.float64)
        if are_probabilities(scores):
            return cls(relative, samples, relative, 4 * float(np.finfo(np.float32).eps))
        return cls(relative, samples, relative * float(np.sqrt(np.square(scores).mean())))

    def band(self, distance: float) -> float:
        """How far rounding moves a distance of this size."""
        if self.scores is not None:
            first = math.sqrt(2 * max(distance, 0.0) / self.samples) * self.scores
            return first + self.scores**2 + self.sums
        if self.samples == 1 or math.isinf(distance):
            return self.relative
        return math.hypot(distance, self.relative) - distance + self.relative / math.sqrt(self.samples)

    def covers(self, fidelity: Fidelity) -> bool:
        """Whether outputs of this fidelity are the dense model's, but for rounding."""
        return fidelity.divergence <= self.band(0.0)

    def verdict(self, before: Fidelity, after: Fidelity) -> Verdict:
        """Whether a model is closer to the dense one than another, by more than rounding explains."""
        gain = before.distance - after.distance
        own = before.metric is not None
        band = self.metric if own else self.band(min(before.distance, after.distance))
        if before.distance == after.distance or abs(gain) <= band:
            return "equal"
        return "closer" if gain > 0 else "further"


def accuracy(outputs: Outputs, labels: Integers, label_offset: int = 0) -> tuple[float, float | None]:
    """Top-1 and (from six classes up) top-5 of a classifier's first output; class = argmax - ``label_offset``.

    A sample with NaN among its scores has no class.

    Raises:
        ModelError: When the first output is not one score per class.
        DataError: A label is not among the model's classes.
    """
    if not is_classifier(outputs):
        raise ModelError(
            f"top-1 needs a first output of shape [samples, classes]; this model gives {outputs[0].shape}: "
            "drop the labels to measure agreement and SNR against a dense model"
        )
    scores = outputs[0]
    classes = scores.shape[1]
    low, high = int(labels.min()) + label_offset, int(labels.max()) + label_offset
    if low < 0 or high >= classes:
        offset = f" with label offset {label_offset}" if label_offset else ""
        raise DataError(
            f"labels from {low - label_offset} to {high - label_offset}{offset} do not fit the model's {classes} "
            "classes (0 is the first): give the class index of each image, or shift it with --label-offset"
        )
    wanted = labels[: len(scores)] + label_offset
    wanted = np.where(np.isnan(scores).any(axis=1), -1, wanted)
    top1 = float(np.mean(scores.argmax(axis=1) == wanted))
    if scores.shape[1] <= 5:
        return top1, None
    best = np.argpartition(-scores, 5, axis=1)[:, :5]
    return top1, float(np.mean((best == wanted[:, None]).any(axis=1)))


def is_classifier(outputs: Outputs) -> bool:
    """Whether the first output is one floating-point score per class: [N, C] with C above 1."""
    first = outputs[0]
    return first.ndim == 2 and first.shape[1] > 1 and bool(np.issubdtype(first.dtype, np.floating))


def are_probabilities(scores: Floats) -> bool:
    """Whether every row of scores is a distribution."""
    return bool((scores >= 0).all()) and np.allclose(scores.sum(axis=1), 1.0, atol=1e-3)


def log_probabilities(scores: Array) -> Floats:
    """Log-probabilities of logits; scores that already are a distribution are taken as they are."""
    values = scores.astype(np.float64)
    if are_probabilities(values):
        return np.asarray(np.log(np.maximum(values, _TINY)))
    shifted = values - values.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _snr(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(signal, _TINY) / noise)
