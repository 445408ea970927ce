"""The workspace of a process: the dense model, the samples and the dense outputs, with which cells are computed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import onnx

from onnx_asr.data import Dataset, Preprocessing, open_data
from onnx_asr.data.sources import DataSource
from onnx_asr.engine.loading import load
from onnx_asr.errors import OptionError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource, digest
from onnx_asr.graph.points import survey, weight_of
from onnx_asr.json_values import plain
from onnx_asr.measuring.evaluation import measure
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import Fidelity, Outputs, collect_outputs, detections_in, is_classifier
from onnx_asr.networks.metric import Metric, MetricSamples, named_outputs
from onnx_asr.networks.pair import Network
from onnx_asr.networks.samples import whole_batches
from onnx_asr.pruning.channels import prune_channels
from onnx_asr.pruning.compression import compress
from onnx_asr.pruning.options import ChannelPruneOptions, CompressOptions, PruneOptions
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import Method, RepairOptions
from onnx_asr.repairing.pipeline import repair
from onnx_asr.repairing.result import RepairResult
from onnx_asr.repairing.verification import Samples
from onnx_asr.sweeping.grid import CHANNEL, Cell, PruneGoal, SweepSettings
from onnx_asr.sweeping.result import Outcome
from onnx_asr.version import __version__


@dataclass(frozen=True)
class Setup:
    """Arguments of :func:`onnx_asr.sweep` from which a process makes its workspace."""

    dense: ModelSource
    data: DataSource
    test: DataSource | None
    labels: str | None
    preprocessing: Preprocessing | None
    settings: SweepSettings


class Workspace:
    """Everything that the cells of a process share: models and samples are read, and the dense model run, once.

    Attributes:
        setup: Its arguments; the repair options split ``calibration`` as for ``auto``.
        dense: The dense model.
        calibration: The data to calibrate on.
        scored: The data to score on.
        dense_score: The score of the dense model itself: its top-1 where there are labels.
        notes: Remarks on the model and the samples.
        conditions: Digests and settings; workspaces with equal conditions give equal scores.

    Raises:
        ModelError: A model that cannot be repaired or run.
        DataError: Missing, broken or unfitting data or labels.
        OptionError: Nothing to score on, or a metric that fails on the dense model.
    """

    def __init__(self, setup: Setup, execution: Execution) -> None:
        self.setup, self.dense = setup, load(setup.dense)
        settings, options = setup.settings, setup.settings.repair
        if setup.test is None and options.verify_samples == 0:
            raise OptionError("verify-samples 0 leaves no samples to score on: give at least 1, or --test")
        network = Network.of(self.dense, "dense", compared=True)
        most = options.samples + options.verify_samples
        data = self._opened(setup.data, network, setup.labels if setup.test is None else None, most)
        self._metric = None if options.metric is None else Metric.of(options.metric)
        split = replace(options, metric=None)  # which may have nothing held out, with other samples to score on
        samples = Samples.of(data, network, split, None, execution, verify=True)
        self.calibration, self._chosen = data, len(samples.chosen)
        self.scored, indices = data, samples.held_out
        if setup.test is not None:
            self.scored = self._opened(setup.test, network, setup.labels)
            indices = np.arange(len(self.scored))
        self._indices, self._batch_size = whole_batches(indices, samples.inputs), samples.batch_size
        execution.progress("running the dense model", 0.0)
        self._reference = self._outputs(self.dense, execution)
        self._detections = detections_in(self._reference)
        self._labels, common = None, plain(settings)
        if self.scored.labels is not None and (setup.labels is not None or is_classifier(self._reference)):
            self._labels = self.scored.labels[self._indices]
        common["repair"].pop("method")
        self.conditions = {
            "version": __version__,
            "dense_sha256": digest(self.dense),
            "calibration": {"samples": self._chosen, "sha256": data.digest(samples.chosen)},
            "scored": {
                "samples": len(self._indices),
                "sha256": self.scored.digest(self._indices),
                "labels_sha256": None if self._labels is None else hashlib.sha256(self._labels.tobytes()).hexdigest(),
            },
            "providers": list(execution.runtime.providers),
            "metric_sha256": None if self._metric is None else self._metric.digest,
            "settings": common,
        }
        self.dense_score = self._measured(self._reference)
        if self._metric is not None and self.dense_score.metric is not None:
            self._metric.check_dense(self.dense_score.metric)
        self.notes = (*network.notes, *samples.notes)

    def pruned(self, goal: PruneGoal, execution: Execution) -> onnx.ModelProto:
        """The dense model, pruned.

        Raises:
            OnnxAsrError: When it cannot be pruned to this goal.
        """
        settings = self.setup.settings
        if goal.pattern == CHANNEL:
            channels = ChannelPruneOptions(goal.sparsity, include=settings.include, exclude=settings.exclude)
            return prune_channels(self.dense, channels).model
        options = PruneOptions(
            goal.sparsity,
            pattern=goal.pattern,
            scope="global" if goal.sparsity is None else settings.scope,
            score=settings.score,
            include=settings.include,
            exclude=settings.exclude,
            samples=self._chosen,
            seed=settings.repair.seed,
        )
        data = None if options.needs_data is None else self.calibration
        return prune(self.dense, data, options, execution=execution).model

    def score(self, cell: Cell, pruned: onnx.ModelProto | None, execution: Execution) -> Outcome:
        """Repair the pruned model (None for "compress") by the cell's method, and measure the result.

        Raises:
            OnnxAsrError: When the method cannot repair it.
        """
        seconds, chosen = 0.0, None
        if pruned is not None and cell.method == "none":
            model = pruned
        else:
            if pruned is None:
                result = self._compressed(cell.goal, execution)
            else:
                result = self._repaired(cast(Method, cell.method), pruned, execution)
            model, chosen = result.model, result.chosen
            seconds = sum(value for stage, value in result.seconds.items() if stage not in ("load", "verify"))
        execution.progress("scoring", 1.0)
        gone = 1 - _survivors(model) / _survivors(self.dense, zeros=True)
        return Outcome(self._measured(self._outputs(model, execution)), gone, seconds, chosen)

    def _repaired(self, method: Method, pruned: onnx.ModelProto, execution: Execution) -> RepairResult:
        """Only "auto" needs held-out samples: the others would verify on samples that are scored anyway."""
        options = self.setup.settings.repair
        if method != "auto" or options.verify_samples == 0:
            options = self._unverified
        options = replace(options, method=method)
        return repair(pruned, self.calibration, options, dense=self.dense, execution=execution)

    def _compressed(self, goal: PruneGoal, execution: Execution) -> RepairResult:
        if goal.pattern == CHANNEL:
            raise OptionError("'compress' zeros weights and cannot remove channels: use 'refit' with pattern channel")
        settings = self.setup.settings
        options = CompressOptions(
            goal.sparsity,
            goal.pattern,
            rounds=settings.rounds,
            include=settings.include,
            exclude=settings.exclude,
            repair=settings.repair if settings.repair.verify_samples else self._unverified,
        )
        return compress(self.dense, self.calibration, options, execution=execution).repair

    @property
    def _unverified(self) -> RepairOptions:
        """The same calibration samples, with none held out."""
        return replace(self.setup.settings.repair, samples=self._chosen, verify_samples=0, metric=None)

    def _opened(self, data: DataSource, network: Network, labels: str | None, most: int | None = None) -> Dataset:
        preprocessing, skip = self.setup.preprocessing, self.setup.settings.repair.skip_bad_images
        return open_data(
            data, network.inputs, preprocessing=preprocessing, labels=labels, skip_bad_images=skip, most=most
        )

    def _outputs(self, model: onnx.ModelProto, execution: Execution) -> Outputs:
        return collect_outputs(model, self.scored, self._indices, execution.sessions, self._batch_size)

    def _measured(self, outputs: Outputs) -> Fidelity:
        fidelity = measure(outputs, self._reference, self._labels, self.setup.settings.label_offset, self._detections)
        fidelity = replace(fidelity, samples=len(self._indices))
        if self._metric is None:
            return fidelity
        named = named_outputs(self.dense, self._reference)
        return self._metric.added(fidelity, MetricSamples(self.scored, self._indices), named, outputs)


def _survivors(model: onnx.ModelProto, zeros: bool = False) -> int:
    """Number of nonzero weights of a model, or of all."""
    index = GraphIndex.of(model)
    values = [weight_of(index, point) for point in survey(index).layers]
    return sum(value.size if zeros else int(np.count_nonzero(value)) for value in values)
