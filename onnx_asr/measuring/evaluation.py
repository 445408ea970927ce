"""The evaluation pipeline: one run of a model over data, compared with labels, a dense model, or both."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_asr.arrays import Integers
from onnx_asr.data import Dataset, InputSpec, Preprocessing, open_data, sample_indices
from onnx_asr.data.sources import DataSource
from onnx_asr.engine.loading import load
from onnx_asr.errors import DataError, OptionError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource
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
    detections_in,
    is_classifier,
)
from onnx_asr.networks.metric import Metric, MetricSamples, MetricSource, named_outputs
from onnx_asr.networks.samples import batch_size_for, whole_batches
from onnx_asr.networks.sparsity import check_order
from onnx_asr.repairing.options import check_at_least

LabelSource = str | os.PathLike[str] | Sequence[int] | NDArray[np.integer[Any]]
"""A table of file name and class index (for a folder of images), or the class index of every sample."""


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
    execution: Execution | None = None,
) -> Fidelity:
    """Measure a model: top-1 and top-5 where labels are known, agreement, KL and SNR where a dense model is given.

    Args:
        model: A path, or an object of onnx, onnx-graphsurgeon or onnx-ir.
        data: Whatever :func:`onnx_asr.data.open_data` takes.
        dense: The model to compare the outputs with.
        force: Accept a dense model with more zeros than the other one; as a rule the two were exchanged.
        labels: Class indices; None takes those that come with the data (sub-folders, ``labels`` in an .npz).
        preprocessing: Of images.
        samples: Number of samples, drawn by ``seed``; None for all.
        seed: Of the draw.
        label_offset: Added to a label to give the output's class: 1 for nets whose class 0 is "background".
        batch_size: Samples per run; None chooses by the input's size.
        metric: A measure of your own, beside the others: ``metric(samples, dense_outputs, outputs)``, see
            :class:`onnx_asr.MetricSamples`, or where to import it from, "module:function".
        execution: Execution providers, progress.

    Returns:
        The measures; those without a reference are None. With a fixed batch size, samples that do not fill a batch
        are dropped; ``samples`` is the number of the others.

    Raises:
        ModelError: A model that cannot be read or run, or has no scores to compare with labels; a dense model that
            puts out NaN.
        DataError: Missing, broken or unfitting data or labels.
        OptionError: Neither labels nor a dense model, a number out of range, a dense model that seems to be the
            pruned one, or a metric without a dense model or that fails.
    """
    check_at_least("seed", seed, 0)
    if batch_size is not None:
        check_at_least("batch-size", batch_size, 1)
    if metric is not None and dense is None:
        raise OptionError("a metric is given the dense model's outputs too: give the dense model (--dense)")
    own = None if metric is None else Metric.of(metric)
    execution = execution or Execution()
    network = load(model)
    reference = None if dense is None else load(dense)
    versions = [GraphIndex.of(version) for version in (network, reference) if version is not None]
    if reference is not None and not force:
        check_order(*versions)
    dataset, classes = _open(data, sampled_inputs(versions[0]), labels, preprocessing, samples)
    if classes is None and reference is None:
        raise OptionError(
            "there is nothing to compare the model with: give the dense model (--dense), or labels (one sub-folder of "
            "images per class, --labels TABLE for a folder, or 'labels' in an .npz)"
        )
    indices = np.arange(len(dataset)) if samples is None else sample_indices(len(dataset), samples, seed)
    specs = [settled_inputs(version, dataset, execution.runtime, batch_size) for version in versions]
    indices = whole_batches(indices, *specs)
    execution.progress("running the model", 0.0)
    outputs = collect_outputs(network, dataset, indices, execution.runtime, batch_size_for(specs[0], batch_size))
    dense_outputs = None
    if reference is not None:
        execution.progress("running the dense model", 0.5)
        size = batch_size_for(specs[1], batch_size)
        dense_outputs = collect_outputs(reference, dataset, indices, execution.runtime, size)
        check_reference(dense_outputs)
    if labels is None and dense_outputs is not None and not is_classifier(outputs):
        classes = None  # they only came with the data
    detections = None if dense_outputs is None else detections_in(dense_outputs)
    chosen = None if classes is None else classes[indices]
    result = measure(outputs, dense_outputs, chosen, label_offset, detections)
    if own is not None and reference is not None and dense_outputs is not None:
        named = named_outputs(reference, dense_outputs)
        result = own.added(result, MetricSamples(dataset, indices), named, outputs)
    execution.progress("done", 1.0)
    return replace(result, samples=len(indices))


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
    classes = outputs[0].shape[1]
    low, high = int(labels.min()) + label_offset, int(labels.max()) + label_offset
    if low < 0 or high >= classes:
        offset = f" with label offset {label_offset}" if label_offset else ""
        raise DataError(
            f"labels from {low - label_offset} to {high - label_offset}{offset} do not fit the model's {classes} "
            "classes (0 is the first): give the class index of each image, or shift it with --label-offset"
        )
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
