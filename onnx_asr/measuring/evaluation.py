"""The evaluation pipeline: one run of a model over data, compared with labels, a dense model, or both."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.arrays import Integers
from onnx_asr.data import Dataset, InputSpec, Preprocessing, open_data, sample_indices
from onnx_asr.data.sources import DataSource
from onnx_asr.detectors.options import DetectorOptions
from onnx_asr.engine.loading import load
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import DataError, ModelError, OptionError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource
from onnx_asr.measuring.precision import Examination
from onnx_asr.networks.batching import sampled_inputs, settled_inputs
from onnx_asr.networks.detection import Detections
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import (
    Fidelity,
    Outputs,
    accuracy,
    check_reference,
    collect_outputs,
    compare,
    compared_outputs,
    detections_in,
    is_classifier,
)
from onnx_asr.networks.metric import Metric, MetricSamples, MetricSource, NamedOutputs, named_outputs
from onnx_asr.networks.samples import batch_size_for, whole_batches
from onnx_asr.networks.sparsity import check_order
from onnx_asr.repairing.options import check_at_least

LabelSource = str | os.PathLike[str] | Sequence[int] | NDArray[np.integer[Any]]
"""A table of file name and class index (for a folder of images), or the class index of every sample."""


@dataclass(frozen=True)
class Scoring:
    """What models are scored on, and how.

    Attributes:
        force: Accept a dense model with more zeros than another one; as a rule the two were exchanged.
        labels: Class indices; None takes those that come with the data (sub-folders, ``labels`` in an .npz).
        label_offset: Added to a label, or to the position of a detector's category, to give the model's class: 1 for
            nets whose class 0 is "background".
        samples: Number of samples, drawn by ``seed``; None for all.
        seed: Of the draw.
        batch_size: Samples per run; None chooses by the input's size.
        metric: A measure of your own, beside the others: ``metric(samples, dense_outputs, outputs)``, see
            :class:`onnx_asr.MetricSamples`, or where to import it from, "module:function".
        detector: How a detector's boxes are read and compared with annotated ones.

    Raises:
        OptionError: A number is out of range, or there are labels for a detector.
    """

    force: bool = False
    labels: LabelSource | None = None
    label_offset: int = 0
    samples: int | None = None
    seed: int = 0
    batch_size: int | None = None
    metric: MetricSource | None = None
    detector: DetectorOptions = field(default_factory=DetectorOptions)

    def __post_init__(self) -> None:
        check_at_least("seed", self.seed, 0)
        if self.batch_size is not None:
            check_at_least("batch-size", self.batch_size, 1)
        if self.labels is not None and self.detector.annotations is not None:
            raise OptionError("labels are for classifiers, annotations for detectors: give one of them")


def evaluate(
    model: ModelSource,
    data: DataSource,
    *,
    dense: ModelSource | None = None,
    force: bool = False,
    preprocessing: Preprocessing | None = None,
    labels: LabelSource | None = None,
    label_offset: int = 0,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    metric: MetricSource | None = None,
    detector: DetectorOptions | None = None,
    execution: Execution | None = None,
) -> Fidelity:
    """Measure a model: top-1 and top-5 where labels are known, agreement, KL and SNR where a dense model is given.

    With ``detector``, the average precision of its boxes is measured as pycocotools measures it.

    Args:
        model: A path, or an object of onnx, onnx-graphsurgeon or onnx-ir.
        data: Whatever :func:`onnx_asr.data.open_data` takes.
        dense: The model to compare the outputs with.
        force: Accept a dense model with more zeros than the other one; as a rule the two were exchanged.
        preprocessing: Of images.
        labels: Class indices; None takes those that come with the data (sub-folders, ``labels`` in an .npz).
        label_offset: Added to a label, or to the position of a detector's category, to give the model's class: 1 for
            nets whose class 0 is "background".
        samples: Number of samples, drawn by ``seed``; None for all, which an endless stream does not have.
        seed: Of the draw.
        batch_size: Samples per run; None chooses by the input's size.
        metric: A measure of your own, beside the others: ``metric(samples, dense_outputs, outputs)``, see
            :class:`onnx_asr.MetricSamples`, or where to import it from, "module:function".
        detector: How a detector's boxes are read and compared with annotated ones.
        execution: Execution providers, progress.

    Returns:
        The measures; those without a reference are None. With a fixed batch size, samples that do not fill a batch
        are dropped; ``samples`` is the number of the others.

    Raises:
        ModelError: A model that cannot be read or run, has no scores to compare with labels or no outputs as its
            decoding expects them; a dense model that puts out NaN.
        DataError: Missing, broken or unfitting data, labels or annotations.
        OptionError: Neither labels, annotations nor a dense model, a number out of range, a dense model that seems to
            be the pruned one, a metric without a dense model or that fails; pycocotools is missing.
    """
    how = Scoring(force, labels, label_offset, samples, seed, batch_size, metric, detector or DetectorOptions())
    return evaluate_all([model], data, how, dense=dense, preprocessing=preprocessing, execution=execution)[0]


def evaluate_all(
    models: Sequence[ModelSource],
    data: DataSource,
    how: Scoring,
    *,
    dense: ModelSource | None = None,
    preprocessing: Preprocessing | None = None,
    execution: Execution | None = None,
) -> list[Fidelity]:
    """Measure several models with the same inputs on the same samples; the dense model runs once.

    Raises:
        ModelError, DataError, OptionError: As :func:`evaluate`; the inputs of two models differ.
    """
    if how.metric is not None and dense is None:
        raise OptionError("a metric is given the dense model's outputs too: give the dense model (--dense)")
    own = None if how.metric is None else Metric.of(how.metric)
    execution = execution or Execution()
    networks = [load(model) for model in models]
    reference = None if dense is None else load(dense)
    versions = [GraphIndex.of(version) for version in (*networks, reference) if version is not None]
    if reference is not None and not how.force:
        for version in versions[:-1]:
            check_order(version, versions[-1])
    inputs = [sampled_inputs(version) for version in versions]
    _check_inputs(inputs)
    dataset, classes = _open(data, inputs[0], how.labels, preprocessing, how.samples)
    examination = Examination.of(how.detector, dataset, how.label_offset)
    if classes is None and reference is None and examination is None:
        raise OptionError(
            "there is nothing to compare the model with: give the dense model (--dense), labels (one sub-folder of "
            "images per class, --labels TABLE for a folder, or 'labels' in an .npz), or the boxes of a detector's "
            "images (--annotations)"
        )
    indices = np.arange(len(dataset)) if examination is None else examination.positions()
    if how.samples is not None:
        indices = indices[sample_indices(len(indices), how.samples, how.seed)]
    settled = [settled_inputs(version, dataset, execution.runtime, how.batch_size) for version in versions]
    indices = whole_batches(indices, *settled)
    sizes = [batch_size_for(found, how.batch_size) for found in settled]
    shared = _Shared(MetricSamples(dataset, indices), how, execution.runtime, classes, examination, own)
    if reference is not None:
        execution.progress("running the dense model", 0.0)
        shared = shared.compared_with(reference, sizes[-1])
    results = []
    for number, (network, size) in enumerate(zip(networks, sizes, strict=False), len(versions) - len(networks)):
        execution.progress("running the model", number / len(versions))
        results.append(shared.measured(network, size))
    execution.progress("done", 1.0)
    return results


@dataclass(frozen=True)
class _Shared:
    """What all models of an evaluation share.

    Attributes:
        samples: Those that they run on.
        how: What they are scored on.
        runtime: Of onnxruntime.
        classes: Class of every sample of the data, where they are known.
        examination: Annotated boxes, where they are given.
        own: A measure of the user's.
        dense: The dense model's outputs, by name.
        detections: What these say where it is a detector.
    """

    samples: MetricSamples
    how: Scoring
    runtime: Runtime
    classes: Integers | None
    examination: Examination | None
    own: Metric | None
    dense: NamedOutputs | None = None
    detections: Detections | None = None

    def compared_with(self, reference: onnx.ModelProto, batch_size: int) -> _Shared:
        """The same, with a dense model to compare with.

        Raises:
            ModelError: It cannot be run, or puts out NaN.
        """
        outputs = collect_outputs(reference, self.samples.dataset, self.samples.indices, self.runtime, batch_size)
        check_reference(outputs)
        return replace(self, dense=named_outputs(reference, outputs), detections=detections_in(outputs))

    def measured(self, network: onnx.ModelProto, batch_size: int) -> Fidelity:
        """Measure a model."""
        dataset, indices = self.samples.dataset, self.samples.indices
        if self.examination is None:
            outputs = collect_outputs(network, dataset, indices, self.runtime, batch_size)
            return self._compared(outputs)
        kept = [] if self.dense is None else compared_outputs(GraphIndex.of(network))
        precision, outputs = self.examination.examined(network, kept, indices, self.runtime, batch_size)
        result = self._compared(outputs) if self.dense is not None else Fidelity(len(indices))
        return replace(result, mean_ap=precision.mean_ap, mean_ap50=precision.mean_ap50)

    def _compared(self, outputs: Outputs) -> Fidelity:
        dense = None if self.dense is None else list(self.dense.values())
        only_with_data = self.how.labels is None and dense is not None and not is_classifier(outputs)
        is_labelled = self.classes is not None and self.examination is None and not only_with_data
        labels = self.classes[self.samples.indices] if self.classes is not None and is_labelled else None
        result = measure(outputs, dense, labels, self.how.label_offset, self.detections)
        if self.own is not None and self.dense is not None:
            result = self.own.added(result, self.samples, self.dense, outputs)
        return replace(result, samples=len(self.samples))


def _check_inputs(specs: Sequence[Sequence[InputSpec]]) -> None:
    """Refuse models that do not take the same samples."""
    shown = [{spec.name: f"{spec.dtype} {spec.sample_shape()}" for spec in inputs} for inputs in specs]
    for other in shown[1:]:
        if other != shown[0]:
            raise ModelError(
                f"the models take different samples, {shown[0]} and {other}: give versions of one network, or evaluate "
                "them one by one"
            )


def measure(
    outputs: Outputs,
    dense: Outputs | None = None,
    labels: Integers | None = None,
    label_offset: int = 0,
    detections: Detections | None = None,
) -> Fidelity:
    """Measure outputs that are already computed; see :func:`evaluate` and, for ``detections``, :func:`compare`.

    Raises:
        ModelError: The outputs do not fit the dense model's, or are not class scores.
        DataError: A label is not among the model's classes.
    """
    result = Fidelity(len(outputs[0])) if dense is None else compare(dense, outputs, detections)
    if labels is None:
        return result
    top1, top5 = accuracy(outputs, labels, label_offset)
    return replace(result, top1=top1, top5=top5)


def _open(
    data: DataSource,
    specs: Sequence[InputSpec],
    labels: LabelSource | None,
    preprocessing: Preprocessing | None,
    samples: int | None,
) -> tuple[Dataset, Integers | None]:
    table = labels if isinstance(labels, (str, os.PathLike)) else None
    if table is not None and isinstance(data, Dataset):
        raise OptionError(
            f"labels '{table}' are a table for a folder of images, but the data are an open Dataset: give an array "
            "of class indices"
        )
    dataset = open_data(data, specs, preprocessing=preprocessing, labels=table, most=samples)
    if labels is None or table is not None:
        return dataset, dataset.labels
    given = np.asarray(labels)
    if given.shape != (len(dataset),) or given.dtype.kind not in "iu":
        raise DataError(
            f"labels of {given.dtype} in shape {given.shape} for {len(dataset)} samples: give a class index per sample"
        )
    return dataset, given.astype(np.int64)
