"""The samples of a run: some to calibrate on, some held out to verify on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx

from onnx_asr.arrays import Integers
from onnx_asr.data import Dataset, InputSpec, Preprocessing, open_data, sample_indices
from onnx_asr.data.sources import DataSource
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import DataError, ModelError, OptionError
from onnx_asr.networks.batching import settled_inputs
from onnx_asr.networks.detection import Detections
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import (
    LEVELS,
    Fidelity,
    Noise,
    Outputs,
    accuracy,
    check_reference,
    collect_outputs,
    compare,
    detections_in,
    is_classifier,
    not_finite,
)
from onnx_asr.networks.metric import Metric, MetricSamples, NamedOutputs, named_outputs
from onnx_asr.networks.pair import Network
from onnx_asr.networks.samples import Calibration, batch_size_for, fixed_batch, load_calibration, whole_batches
from onnx_asr.repairing.options import RepairOptions

_FEW_NAMES = 5
_NOISE_SAMPLES = 64


@dataclass(frozen=True)
class Samples:
    """The samples of a run.

    Attributes:
        dataset: All samples.
        inputs: Inputs of the network, with the batch size that its graph fixes if it does.
        options: Numbers of samples, seed, batch size.
        chosen: Integers of the calibration samples.
        held_out: Integers of the samples to verify on.
        metric: The user's own measure, if there is one.
    """

    dataset: Dataset
    inputs: Sequence[InputSpec]
    options: RepairOptions
    chosen: Integers
    held_out: Integers
    metric: Metric | None = None

    @classmethod
    def of(
        cls,
        data: DataSource,
        network: Network,
        options: RepairOptions,
        preprocessing: Preprocessing | None,
        execution: Execution,
        *,
        verify: bool,
    ) -> Samples:
        """Open the data and divide them; ``verify`` says whether any are to be held out.

        Raises:
            DataError: Missing, broken or unfitting data.
            ModelError: When onnxruntime runs the network on no batch of samples.
            OptionError: Preprocessing that does not fit the data, batches for ``--bn ema`` that do not fit the
                network's, or a metric that cannot be had or has nothing to measure.
        """
        metric = None if options.metric is None else Metric.of(options.metric)
        if metric is not None and not (verify and options.verify_samples):
            raise OptionError(
                f"metric '{metric.name}' compares with the dense model on held-out samples: give the dense model "
                "(--dense), and --verify-samples above 0"
            )
        most = options.samples + (options.verify_samples if verify else 0)
        skip = options.skip_bad_images
        dataset = open_data(data, network.inputs, preprocessing=preprocessing, skip_bad_images=skip, most=most)
        inputs = settled_inputs(network.index, dataset, execution.sessions, options.batch_size)
        fixed = fixed_batch(inputs) or 1
        if options.bn == "ema" and options.ema_batch_size % fixed:
            raise OptionError(
                f"ema-batch-size {options.ema_batch_size} is no multiple of {fixed}, the number of samples that the "
                "model takes at once: give one that is"
            )
        return cls(dataset, inputs, options, *split_samples(len(dataset), options, verify, fixed), metric)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs for the smallest run on these samples: one, or a batch of the size that is fixed."""
        return {name: (self.smallest_run, *value.shape) for name, value in self.dataset.load(0).items()}

    @property
    def smallest_run(self) -> int:
        """Samples in the smallest run: one, or a batch of the size that the graph fixes."""
        return fixed_batch(self.inputs) or 1

    @property
    def batch_size(self) -> int:
        """Samples per run."""
        return batch_size_for(self.inputs, self.options.batch_size)

    @property
    def verified(self) -> Integers:
        """The samples to verify on, in whole batches.

        Raises:
            DataError: When they do not fill one.
        """
        return whole_batches(self.held_out, self.inputs)

    def outputs(self, model: onnx.ModelProto, runtime: Runtime, least: int | None = None) -> Outputs:
        """The outputs of a version of the network on the samples to verify on, or on whole batches of ``least``."""
        size = self.batch_size
        chosen = self.verified if least is None else self.verified[: math.ceil(least / size) * size]
        return collect_outputs(model, self.dataset, chosen, runtime, size)

    @property
    def is_held_out(self) -> bool:
        """Whether the samples to verify on take no part in the calibration; not so where there are too few."""
        return not bool(np.isin(self.held_out, self.chosen).any())

    @property
    def notes(self) -> list[str]:
        """Notes for the user about the samples."""
        notes = []
        if len(self.chosen) < self.options.samples:
            notes.append(
                f"{len(self.chosen)} calibration samples instead of {self.options.samples}: "
                f"the data have {len(self.dataset)}"
            )
        if self.dataset.is_cut:
            notes.append(
                f"only the first {len(self.dataset)} samples of the data were read, as they come one after the other: "
                "shuffle them if they are sorted"
            )
        if skipped := self.dataset.unreadable:
            few = ", ".join(skipped[:_FEW_NAMES]) + (", ..." if len(skipped) > _FEW_NAMES else "")
            notes.append(f"{len(skipped)} images cannot be read and were skipped: {few}")
        fixed = fixed_batch(self.inputs) or 1
        if rest := len(self.chosen) % fixed + (len(self.held_out) % fixed if self.is_held_out else 0):
            notes.append(f"the model takes {fixed} samples at once: {rest} that do not fill a batch are left out")
        if not self.is_held_out:
            notes.append("too few samples to hold any out: the verification used calibration samples")
        return notes

    def load(self) -> Calibration:
        """Prepare the calibration samples.

        Raises:
            DataError: When a sample is broken, or there are too few for a batch of the size that the model fixes.
        """
        batch_size = self.batch_size
        if self.options.bn == "ema":
            batch_size = math.gcd(batch_size, self.options.ema_batch_size)
        return load_calibration(self.dataset, whole_batches(self.chosen, self.inputs), batch_size)


@dataclass(frozen=True)
class Verifier:
    """Measures models against the dense one on the held-out samples; the dense one runs once, when first needed."""

    dense: onnx.ModelProto
    samples: Samples
    execution: Execution

    def fidelity(self, model: onnx.ModelProto) -> Fidelity:
        """Fidelity of a model to the dense one.

        Raises:
            ModelError: When onnxruntime cannot run the model, or its outputs do not fit the dense one's.
        """
        outputs = self.samples.outputs(model, self.execution.sessions)
        fidelity, metric = self._compared(outputs), self.samples.metric
        if metric is None:
            return fidelity
        return metric.added(fidelity, self._asked, self._named_reference, outputs)

    @property
    def dense_fidelity(self) -> Fidelity:
        """The dense model's own, without the user's metric."""
        return self._compared(self._reference)

    @cached_property
    def labels_error(self) -> str | None:
        """What is wrong with the labels that the data have; None where nothing is, or where they do not matter."""
        if self._labels is None:
            return None
        try:
            accuracy(self._reference, self._labels)
        except DataError as error:
            return str(error)
        return None

    def _compared(self, outputs: Outputs) -> Fidelity:
        fidelity = replace(compare(self._reference, outputs, self._detections), samples=len(self.samples.verified))
        if self._labels is None or self.labels_error is not None:
            return fidelity
        return replace(fidelity, by_labels=accuracy(outputs, self._labels))

    def on(self, indices: Integers) -> Verifier:
        """The same on other samples."""
        return replace(self, samples=replace(self.samples, held_out=indices))

    @cached_property
    def dense_metric(self) -> float:
        """The user's own metric of the dense model itself.

        Raises:
            OptionError: When it fails.
        """
        assert self.samples.metric is not None
        return self.samples.metric(self._asked, self._named_reference, self._reference)

    @property
    def is_finite(self) -> bool:
        """Whether the dense model puts out neither NaN nor infinities."""
        return not_finite(self._reference) == 0.0

    def check_reference(self) -> None:
        """Refuse a dense model that nothing can be compared with, and a metric that does not measure it.

        Raises:
            ModelError: When the dense model puts out NaN or infinities.
            OptionError: When the metric of it is no finite number.
        """
        check_reference(self._reference)
        if self.samples.metric is not None:
            self.samples.metric.check_dense(self.dense_metric)

    @cached_property
    def noise(self) -> Noise:
        """How far rounding moves distances from the dense model: one more run of it, without graph optimisations.

        A relative error shows on some of the samples; how many values or boxes differ, or how far a metric moves, on
        all of them.
        """
        runtime = replace(self.execution.sessions, optimized=False)
        metric = self.samples.metric
        floating = all(np.issubdtype(value.dtype, np.floating) for value in self._reference)
        partly = floating and self._detections is None and metric is None
        try:
            again = self.samples.outputs(self.dense, runtime, _NOISE_SAMPLES if partly else None)
        except ModelError:  # it runs in no other way than the usual one
            return Noise.between(self._reference, None, self._detections)
        same = [whole[: len(part)] for whole, part in zip(self._reference, again, strict=True)]
        noise = Noise.between(same, again, self._detections)
        if partly:
            noise = replace(noise, samples=len(self._reference[0]))
        if metric is None:
            return noise
        moved = abs(metric(self._asked, self._named_reference, again) - self.dense_metric)
        return replace(noise, metric=LEVELS * moved)

    @property
    def _asked(self) -> MetricSamples:
        return MetricSamples(self.samples.dataset, self.samples.verified)

    @cached_property
    def _labels(self) -> Integers | None:
        """The samples' classes, where the data have labels and the dense model is a classifier."""
        labels = self.samples.dataset.labels
        return None if labels is None or not is_classifier(self._reference) else labels[self.samples.verified]

    @cached_property
    def _detections(self) -> Detections | None:
        return detections_in(self._reference)

    @cached_property
    def _named_reference(self) -> NamedOutputs:
        return named_outputs(self.dense, self._reference)

    @cached_property
    def _reference(self) -> Outputs:
        return self.samples.outputs(self.dense, self.execution.sessions)


def split_samples(count: int, options: RepairOptions, verify: bool, batch: int = 1) -> tuple[Integers, Integers]:
    """Calibration and held-out sample indices, both seeded, without overlap wherever there are two batches or more.

    Where the data have fewer samples than both parts together ask for, a fifth of them is held out, and at least one
    ``batch``, which is what the model takes at once.
    """
    wanted = options.verify_samples if verify else 0
    if wanted == 0:
        return sample_indices(count, options.samples, options.seed), np.empty(0, np.int64)
    held = min(wanted, max(count - options.samples, count // 5))
    if batch > 1 and held < batch:
        held = batch if count >= 2 * batch else 0
    if held == 0:
        everything = sample_indices(count, options.samples, options.seed)
        return everything, everything
    chosen = sample_indices(count, min(options.samples, count - held), options.seed)
    rest = np.setdiff1d(np.arange(count), chosen)
    return chosen, rest[sample_indices(len(rest), held, options.seed)]
