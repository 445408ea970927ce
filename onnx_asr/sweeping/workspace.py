"""The workspace of a process: the dense model, the samples and the dense outputs, with which cells are computed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.data import Dataset, Preprocessing, open_data
from onnx_asr.data.sources import DataSource
from onnx_asr.errors import OptionError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource, digest, load
from onnx_asr.graph.points import survey, weight_of
from onnx_asr.measuring.evaluation import measure
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import Fidelity, Outputs, collect_outputs, is_classifier
from onnx_asr.networks.pair import Network
from onnx_asr.networks.samples import input_specs, whole_batches
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
    """Arguments from which a process makes its workspace.

    Attributes:
        dense: The dense model, as the sweep was given it.
        data: Calibration samples.
        test: Samples to score on; None for the held-out ones of ``data``.
        labels: A table of labels for the scored samples, where they are a folder of images.
        preprocessing: Of images.
        settings: Settings that all cells share.
    """

    dense: ModelSource
    data: DataSource | Dataset
    test: DataSource | Dataset | None
    labels: str | None
    preprocessing: Preprocessing | None
    settings: SweepSettings


@dataclass(frozen=True)
class Workspace:
    """Everything that the cells of a process share.

    Attributes:
        setup: Its arguments; the repair options split ``calibration`` as for ``auto``.
        dense: The dense model.
        calibration: The data to calibrate on.
        chosen: Number of calibration samples.
        scored: The data to score on.
        indices: Of the scored samples.
        labels: Classes of the scored samples, where known.
        reference: The dense model's outputs on them.
        notes: Remarks on the model and the samples.
        conditions: Digests and settings; workspaces with equal conditions give equal scores.
    """

    setup: Setup
    dense: onnx.ModelProto
    calibration: Dataset
    chosen: int
    scored: Dataset
    indices: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    reference: Outputs
    notes: tuple[str, ...]
    conditions: dict[str, Any]

    @classmethod
    def of(cls, setup: Setup, execution: Execution) -> Workspace:
        """Read models and samples, and run the dense model.

        Raises:
            ModelError: A model that cannot be repaired or run.
            DataError: Missing, broken or unfitting data or labels.
            OptionError: Nothing to score on.
        """
        settings, dense = setup.settings, load(setup.dense)
        options = settings.repair
        if setup.test is None and options.verify_samples == 0:
            raise OptionError("verify-samples 0 leaves no samples to score on: give at least 1, or --test")
        data = _opened(setup, dense, setup.data, setup.labels if setup.test is None else None)
        network = Network.of(dense, "dense", compared=True)
        samples = Samples.of(data, network.inputs, options, None, verify=True)
        scored, indices = data, samples.held_out
        if setup.test is not None:
            scored = _opened(setup, dense, setup.test, setup.labels)
            indices = np.arange(len(scored))
        indices = whole_batches(indices, network.inputs)
        execution.progress("running the dense model", 0.0)
        reference = collect_outputs(dense, scored, indices, execution.sessions, options.batch_size)
        labels, common = None, asdict(settings)
        if scored.labels is not None and (setup.labels is not None or is_classifier(reference)):
            labels = scored.labels[indices]
        common["repair"].pop("method")
        conditions = {
            "version": __version__,
            "dense_sha256": digest(dense),
            "calibration": {"samples": len(samples.chosen), "sha256": data.digest(samples.chosen)},
            "scored": {
                "samples": len(indices),
                "sha256": scored.digest(indices),
                "labels_sha256": None if labels is None else hashlib.sha256(labels.tobytes()).hexdigest(),
            },
            "providers": list(execution.runtime.providers),
            "settings": common,
        }
        notes = (*network.notes, *samples.notes)
        return cls(setup, dense, data, len(samples.chosen), scored, indices, labels, reference, notes, conditions)

    def dense_score(self) -> Fidelity:
        """The score of the dense model itself: its top-1 where there are labels."""
        return self._measured(self.reference)

    def pruned(self, goal: PruneGoal, execution: Execution) -> onnx.ModelProto:
        """The dense model, pruned.

        Raises:
            OnnxAsrError: When it cannot be pruned to this goal.
        """
        settings = self.settings
        if goal.pattern == CHANNEL:
            channels = ChannelPruneOptions(goal.sparsity, include=settings.include, exclude=settings.exclude)
            return prune_channels(self.dense, channels).model
        options = PruneOptions(
            goal.sparsity,
            pattern=goal.pattern,
            scope=settings.scope,
            score=settings.score,
            include=settings.include,
            exclude=settings.exclude,
            samples=self.chosen,
            seed=settings.repair.seed,
        )
        data = None if options.needs_data is None else self.calibration
        return prune(self.dense, data, options, execution=execution).model

    def score(self, cell: Cell, pruned: onnx.ModelProto | None, execution: Execution) -> Outcome:
        """Repair the pruned model (None for "compress") by the cell's method, and measure the result.

        Raises:
            OnnxAsrError: When the method cannot repair it.
        """
        result: RepairResult | None = None
        if pruned is None:
            result = self._compressed(cell.goal, execution)
        elif cell.method != "none":
            result = self._repaired(cast(Method, cell.method), pruned, execution)
        model = result.model if result is not None else pruned
        assert model is not None
        execution.progress("scoring", 1.0)
        outputs = collect_outputs(model, self.scored, self.indices, execution.sessions, self.settings.repair.batch_size)
        seconds, chosen = 0.0, None
        if result is not None:
            seconds = sum(value for stage, value in result.seconds.items() if stage not in ("load", "verify"))
            chosen = result.chosen
        gone = 1 - _survivors(model) / _survivors(self.dense, zeros=True)
        return Outcome(self._measured(outputs), gone, seconds, chosen)

    def _repaired(self, method: Method, pruned: onnx.ModelProto, execution: Execution) -> RepairResult:
        """Only "auto" needs held-out samples: the others would verify on samples that are scored anyway."""
        options = replace(self.settings.repair if method == "auto" else self._unverified, method=method)
        return repair(pruned, self.calibration, options, dense=self.dense, execution=execution)

    def _compressed(self, goal: PruneGoal, execution: Execution) -> RepairResult:
        if goal.pattern == CHANNEL:
            raise OptionError("'compress' zeros weights and cannot remove channels: use 'refit' with pattern channel")
        settings = self.settings
        options = CompressOptions(
            goal.sparsity,
            goal.pattern,
            settings.rounds,
            include=settings.include,
            exclude=settings.exclude,
            repair=self._unverified,
        )
        return compress(self.dense, self.calibration, options, execution=execution).repair

    @property
    def settings(self) -> SweepSettings:
        """Settings that all cells share."""
        return self.setup.settings

    @property
    def _unverified(self) -> RepairOptions:
        """The same calibration samples, with none held out."""
        return replace(self.settings.repair, samples=self.chosen, verify_samples=0)

    def _measured(self, outputs: Outputs) -> Fidelity:
        fidelity = measure(outputs, self.reference, self.labels, self.settings.label_offset)
        return replace(fidelity, samples=len(self.indices))


def _opened(setup: Setup, dense: onnx.ModelProto, data: DataSource | Dataset, labels: str | None) -> Dataset:
    if isinstance(data, Dataset):
        return data
    return open_data(
        data,
        input_specs(GraphIndex.of(dense)),
        preprocessing=setup.preprocessing,
        labels=labels,
        skip_bad_images=setup.settings.repair.skip_bad_images,
    )


def _survivors(model: onnx.ModelProto, zeros: bool = False) -> int:
    """Number of nonzero weights of a model, or of all."""
    index = GraphIndex.of(model)
    values = [weight_of(index, point) for point in survey(index).layers]
    return sum(value.size if zeros else int(np.count_nonzero(value)) for value in values)
