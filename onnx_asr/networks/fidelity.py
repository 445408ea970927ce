"""How close a model is to another one on data, and how accurate it is if labels are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_asr.arrays import Array, Floats, Integers
from onnx_asr.data import Dataset
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import ModelError
from onnx_asr.graph.index import GraphIndex, ancestors, is_standard
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
    """

    samples: int
    top1: float | None = None
    top5: float | None = None
    agreement: float | None = None
    kl: float | None = None
    snr_db: float | None = None

    @property
    def distance(self) -> float:
        """The distance that a repair minimises.

        KL for classifiers; else the relative output error ``10^(-snr/20)``; else, where no output is a floating-point
        number (ArgMax heads), the share of values that disagree.
        """
        if self.kl is not None:
            return self.kl if math.isfinite(self.kl) else math.inf
        if self.snr_db is not None:
            return float(10 ** (-self.snr_db / 20))
        assert self.agreement is not None, "a distance needs a dense model"
        return 1.0 - self.agreement


Outputs = list[Array]


def collect_outputs(
    model: onnx.ModelProto, data: Dataset, indices: Integers, runtime: Runtime, batch_size: int | None = None
) -> Outputs:
    """Run a model over samples; one array per output, in the model's order, samples along the first axis.

    Outputs behind a NonMaxSuppression, whose number depends on the data, are replaced by the boxes and scores it reads.

    Raises:
        ModelError: When onnxruntime cannot run the model.
        DataError: When the data do not fit its inputs.
    """
    index = GraphIndex.of(model)
    specs = input_specs(index)
    session = Session(_with_outputs(model, _compared_outputs(index)), runtime)
    step = batch_size_for(specs, batch_size)
    used = whole_batches(indices, specs)
    batches = (data.batch(used[start : start + step]) for start in range(0, len(used), step))
    parts = [session.run(feeds(specs, batch)).values() for batch in batches]
    return [_joined(part) for part in zip(*parts, strict=True)]


def _compared_outputs(index: GraphIndex) -> list[str]:
    names: list[str] = []
    for output in index.outputs:
        behind = sorted(ancestors(index, [output]))
        selections = [index.nodes[p] for p in behind if is_standard(index.nodes[p], "NonMaxSuppression")]
        read = [name for node in selections for name in node.input if name and not index.is_constant(name)]
        names.extend(read or [output])
    return list(dict.fromkeys(names))


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    if [value.name for value in model.graph.output] == names:
        return model
    declared = {value.name: value for value in model.graph.output}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.output[:]
    result.graph.output.extend(declared.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return result


def _joined(parts: Sequence[Array]) -> Array:
    if any(part.ndim == 0 or part.shape[1:] != parts[0].shape[1:] for part in parts):
        return np.concatenate([part.ravel() for part in parts])
    return np.concatenate(parts)


def compare(dense: Outputs, other: Outputs) -> Fidelity:
    """Agreement, KL divergence and SNR of a model's outputs against the dense model's, without labels.

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
    agreement = kl = None
    if is_classifier(dense):
        agreement = float(np.mean(dense[0].argmax(axis=1) == other[0].argmax(axis=1)))
        reference, value = log_probabilities(dense[0]), log_probabilities(other[0])
        kl = float(np.mean((np.exp(reference) * (reference - value)).sum(axis=1)))
    elif snr is None and dense:
        agreement = float(np.mean(dense[0] == other[0]))
    return Fidelity(len(dense[0]), agreement=agreement, kl=kl, snr_db=snr)


def accuracy(outputs: Outputs, labels: Integers, label_offset: int = 0) -> tuple[float, float | None]:
    """Top-1 and (from six classes up) top-5 of a classifier's first output; class = argmax - ``label_offset``.

    Raises:
        ModelError: When the first output is not one score per class.
    """
    if not is_classifier(outputs):
        raise ModelError(
            f"top-1 needs a first output of shape [samples, classes]; this model gives {outputs[0].shape}: "
            "drop the labels to measure agreement and SNR against a dense model"
        )
    scores = outputs[0]
    wanted = labels[: len(scores)] + label_offset
    top1 = float(np.mean(scores.argmax(axis=1) == wanted))
    if scores.shape[1] <= 5:
        return top1, None
    best = np.argpartition(-scores, 5, axis=1)[:, :5]
    return top1, float(np.mean((best == wanted[:, None]).any(axis=1)))


def is_classifier(outputs: Outputs) -> bool:
    """Whether the first output is one floating-point score per class: [N, C] with C above 1."""
    first = outputs[0]
    return first.ndim == 2 and first.shape[1] > 1 and bool(np.issubdtype(first.dtype, np.floating))


def log_probabilities(scores: Array) -> Floats:
    """Log-probabilities of logits; scores that already are a distribution are taken as they are."""
    values = scores.astype(np.float64)
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1.0, atol=1e-3):
        return np.asarray(np.log(np.maximum(values, _TINY)))
    shifted = values - values.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _snr(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(signal, _TINY) / noise)
