"""Everything that one repair works on, checked, and the writing of its result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_asr.data import Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.errors import OptionError
from onnx_asr.graph.model_io import digest
from onnx_asr.graph.points import weight_of
from onnx_asr.json_values import plain
from onnx_asr.networks.cost import leftover_note
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import Network, Pair
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.sparsity import LayerSparsity, collapse_note, share_of_zeros
from onnx_asr.repairing.options import Method, RepairOptions
from onnx_asr.repairing.result import PointReport
from onnx_asr.repairing.verification import Samples, Verifier
from onnx_asr.version import __version__

_NO_DENSE = (
    "no dense model: the running statistics stored in the pruned model's BatchNormalization are the reference, and the "
    "result was not verified"
)


def check_method(method: Method, *, dense: bool, batchnorm: bool) -> None:
    """Refuse a method that cannot change a pruned network, with or without a dense one and BatchNormalization.

    Raises:
        OptionError: Naming a method that can.
    """
    if method == "refit" and not dense:
        raise OptionError("method 'refit' fits the dense model's outputs: give the dense model (--dense)")
    if batchnorm:
        return
    if method == "bn":
        raise OptionError(
            "method 'bn' re-estimates BatchNormalization, and the model has none (it was folded into the "
            "convolutions): use --method paired with --dense"
        )
    if not dense:
        raise OptionError(
            f"method '{method}' without a dense model needs stored BatchNormalization statistics, and the "
            "model has no BatchNormalization: give the dense model (--dense)"
        )


@dataclass(frozen=True)
class RepairJob:
    """Everything that one repair works on.

    Attributes:
        pruned: The network to repair.
        pair: The pair with the dense network, if that is given.
        samples: Calibration and held-out samples.
        verifier: Measures models against the dense one; None without a dense model or held-out samples.
        options: Method and settings.
        sparsities: Zeros in the weights of all points; those before pruning are the dense network's, or none.
        notes: Notes for the user.
    """

    pruned: Network
    pair: Pair | None
    samples: Samples
    verifier: Verifier | None
    options: RepairOptions
    sparsities: tuple[LayerSparsity, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: onnx.ModelProto,
        dense: onnx.ModelProto | None,
        data: DataSource,
        options: RepairOptions,
        preprocessing: Preprocessing | None,
        execution: Execution,
    ) -> RepairJob:
        """Check that the parts fit, and divide the samples.

        Raises:
            ModelError: A model that cannot be repaired.
            StructureError: The two models are not the same network.
            DataError: Missing, broken or unfitting data.
            OptionError: A method that cannot change this network.
        """
        pair = None if dense is None else Pair.of(model, dense)
        pruned = Network.of(model, "pruned", compared=False) if pair is None else pair.pruned
        check_method(options.method, dense=pair is not None, batchnorm=pruned.survey.has_batchnorm)
        samples = Samples.of(data, pruned, options, preprocessing, execution, verify=pair is not None)
        verifier = None
        if pair is not None and len(samples.held_out):
            verifier = Verifier(pair.source, samples, execution)
        job = cls.on(pruned, pair, samples, options, verifier)
        notes = (*job.notes, *collapse_note(job.sparsities), *leftover_note(pruned.index))
        return replace(job, notes=notes)

    @classmethod
    def on(
        cls, pruned: Network, pair: Pair | None, samples: Samples, options: RepairOptions, verifier: Verifier | None
    ) -> RepairJob:
        """A job of parts that fit."""
        sparsities = []
        for point in pruned.survey.layers:
            after = weight_of(pruned.index, point)
            before = np.ones_like(after) if pair is None else pair.dense_weight(point)
            sparsities.append(LayerSparsity.of(point, before, after))
        notes = [*pruned.notes, *(pair.notes if pair else [_NO_DENSE]), *samples.notes]
        if options.method in ("asr", "raw", "layerwise") and options.bn == "exact":
            notes.append(
                f"before an exactly re-estimated BatchNormalization the gains of '{options.method}' cancel, so the "
                "result equals that of 'bn' (use --bn ema for the paper's protocol)"
            )
        if samples.metric is not None and verifier is not None:
            verifier.check_reference()
            notes.append(f"metric {samples.metric.name} of the dense model itself: {verifier.dense_metric:.4g}")
        return cls(pruned, pair, samples, verifier, options, tuple(sparsities), tuple(notes))

    def written(self, draft: Draft, reports: Sequence[PointReport], calibration: Calibration) -> onnx.ModelProto:
        """The repaired model, with a note at every node that was corrected, and metadata."""
        for report in reports:
            draft.plan.notes[report.node] = report.note(self.options.method)
        metadata = {
            "onnx_asr.version": __version__,
            "onnx_asr.method": self.options.method,
            "onnx_asr.options": json.dumps(plain(self.options), sort_keys=True),
            "onnx_asr.calibration": f"{calibration.count} samples, sha256 {calibration.digest}",
            "onnx_asr.sparsity": f"{share_of_zeros(self.sparsities):.6f}",
        }
        if self.pair is not None:
            metadata["onnx_asr.dense_sha256"] = digest(self.pair.source)
            metadata |= self.pair.missing_metadata
        return draft.model(metadata)
