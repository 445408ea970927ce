"""The values of a report: a dict of JSON values that the template lays out."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from onnx_asr.data import Dataset, Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.engine.loading import load
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource
from onnx_asr.json_values import key, plain
from onnx_asr.measuring.damage import COLLAPSED_RATIO, DAMAGE_SAMPLES, PointDamage, draw_samples, measure_damage
from onnx_asr.measuring.inspection import Inspection, Layer, describe
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.pruning.compression import CompressResult
from onnx_asr.pruning.zeros import PruneResult
from onnx_asr.repairing.job import RepairJob
from onnx_asr.repairing.options import flattened
from onnx_asr.repairing.result import PointReport, RepairResult, Verification
from onnx_asr.version import __version__

ReportValues = dict[str, Any]

_THUMBNAILS, _THUMBNAIL_SIDE = 8, 96
_WORST, _UNHURT = 3, 0.05  # layers listed as most damaged; decades by which the variances of others may be off
_DEAD_RATIO = 1e-4  # that a dead channel counts as


@dataclass(frozen=True)
class Run:
    """A call of a command: its name, the whole command line, and the paths that it read and wrote, by role."""

    derived: ClassVar = ("version",)
    version: ClassVar = __version__

    command: str
    line: str = field(metadata=key("command_line"))
    files: dict[str, str | list[str] | None]
    preprocessing: Preprocessing | None = None


def inspect_data(run: Run, inspection: Inspection) -> ReportValues:
    """The report of an inspection."""
    return _report(
        run,
        [_layer(layer) for layer in inspection.layers],
        versions=[_version("model", inspection)],
        skipped=inspection.skips,
        damage_samples=inspection.samples,
        target=inspection.target,
        options={"opset": inspection.opset, "inputs": ", ".join(inspection.inputs), **inspection.metadata},
        notes=(*inspection.notes, *inspection.advice),
    )


def prune_data(run: Run, result: PruneResult, dense: ModelSource) -> ReportValues:
    """The report of a pruning."""
    pruned = describe(result.model)
    return _report(
        run,
        [_layer(layer) for layer in pruned.layers],
        versions=[_version("dense", describe(load(dense))), _version("pruned", pruned)],
        skipped=result.skips,
        options=flattened(asdict(result.options)),
        notes=result.notes,
    )


def compress_data(
    run: Run, result: CompressResult, dense: ModelSource, data: DataSource, execution: Execution
) -> ReportValues:
    """The report of a compression; the model before the repair is the dense one under the last mask."""
    names = ("last mask, no repair", "compressed")
    values = repair_data(run, result.repair, result.masked, dense, data, execution, names)
    seconds = {f"round {number}": value for number, value in enumerate(result.round_seconds, 1)}
    asked = {name: value for name, value in plain(result.options).items() if name != "repair"}
    values["options"] = flattened(asked) | values["options"]
    return values | {"seconds": values["seconds"] | seconds}


def repair_data(
    run: Run,
    result: RepairResult,
    pruned: ModelSource,
    dense: ModelSource | None,
    data: DataSource,
    execution: Execution,
    names: tuple[str, str] = ("pruned", "repaired"),
) -> ReportValues:
    """The report of a repair, with the channels of both networks measured against the dense one."""
    given, reference = load(pruned), None if dense is None else load(dense)
    job = RepairJob.of(given, reference, data, result.options, run.preprocessing, execution)
    models = {names[0]: given, names[1] if result.modified else f"{names[0]} (given back)": result.model}
    before: dict[int, PointDamage] = {}
    after, samples = before, 0
    if job.pair is not None:
        seed, batch_size = result.options.seed, result.options.batch_size
        calibration = draw_samples(
            job.samples.dataset, job.samples.chosen, job.samples.inputs, DAMAGE_SAMPLES, seed, batch_size
        )
        versions = [job.pruned.index, GraphIndex.of(result.model)]
        before, after = measure_damage(job.pair, versions, calibration, execution)
        samples = calibration.count
    fidelities, notes = _fidelities(list(models), result.verification)
    sizes = {name: describe(model) for name, model in models.items()}
    if reference is not None:
        sizes = {"dense": describe(reference)} | sizes
    reports = {report.node: report for report in result.points}
    layers = [
        _layer(replace(layer, damage=before.get(layer.node)), after.get(layer.node), reports.get(layer.node))
        for layer in sizes[names[0]].layers
    ]
    return _report(
        run,
        layers,
        versions=[_version(name, size, fidelities.get(name)) for name, size in sizes.items()],
        skipped=result.skips,
        damage_samples=samples,
        options=flattened(plain(result.options)),
        notes=[*result.notes, *notes],
        improved=result.improved,
        held_out=result.verification is not None and result.verification.held_out,
        candidates=[plain(item) | {"chosen": item.method == result.chosen} for item in result.candidates],
        calibration={"samples": result.calibration_samples, "sha256": result.calibration_digest},
        thumbnails=_thumbnails(job.samples.dataset, job.samples.chosen),
        seconds=result.seconds,
    )


def _report(run: Run, layers: Sequence[ReportValues], **values: Any) -> ReportValues:
    """The parts of all reports, with defaults for those that only some have."""
    defaults: ReportValues = {
        "damage_samples": 0,
        "target": None,
        "notes": [],
        "improved": True,
        "held_out": False,
        "candidates": [],
        "calibration": None,
        "thumbnails": [],
        "seconds": {},
    }
    numbered = [{"number": number, **layer} for number, layer in enumerate(layers, 1)]
    measured = {"layers": numbered, "hurt_most": _hurt_most(layers), "collapsed_ratio": COLLAPSED_RATIO}
    return {**plain(run), **measured, **defaults, **plain(values)}


def _hurt_most(layers: Sequence[ReportValues]) -> list[int]:
    """Numbers of the layers whose variances pruning moved furthest, worst first."""
    errors = {}
    for number, layer in enumerate(layers, 1):
        ratios = [ratio for ratio in (layer["before"] or {}).get("ratios", ()) if ratio is not None]
        if ratios:
            levels = np.log10(np.maximum(ratios, _DEAD_RATIO))
            errors[number] = float(np.sqrt(np.square(levels).mean()))
    worst = sorted(errors, key=lambda number: (errors[number], number), reverse=True)[:_WORST]
    return [number for number in worst if errors[number] > _UNHURT]


def _version(name: str, inspection: Inspection, fidelity: Fidelity | None = None) -> ReportValues:
    """One row of the summary."""
    return {
        "name": name,
        "sparsity": inspection.sparsity,
        "bytes": inspection.file_bytes,
        "compressed_bytes": inspection.compressed_bytes,
        "batchnorm": inspection.batchnorm,
        "fidelity": fidelity,
    }


def _layer(layer: Layer, after: PointDamage | None = None, report: PointReport | None = None) -> ReportValues:
    values: ReportValues = plain(layer)
    done: ReportValues = plain(report) or {}
    values |= {"before": values.pop("damage"), "after": plain(after)}
    return values | {name: done.get(name) for name in ("written", "gain", "shrinkage", "residual", "converged")}


def _fidelities(names: Sequence[str], verification: Verification | None) -> tuple[dict[str, Fidelity], list[str]]:
    """Fidelities of the verification, by name; where the data have labels, with top-1 and for the dense model too."""
    if verification is None:
        return {}, []
    known = dict(zip(names, (verification.before, verification.after), strict=True))
    if verification.before.by_labels is None:
        error = verification.labels_error
        return known, [] if error is None else [f"no top-1: {error}"]
    assert verification.dense is not None
    return {name: _with_top1(fidelity) for name, fidelity in ({"dense": verification.dense} | known).items()}, []


def _with_top1(fidelity: Fidelity) -> Fidelity:
    assert fidelity.by_labels is not None
    top1, top5 = fidelity.by_labels
    return replace(fidelity, top1=top1, top5=top5)


def _thumbnails(dataset: Dataset, chosen: np.ndarray[Any, np.dtype[np.int64]]) -> list[ReportValues]:
    """Evenly spaced calibration images; none where the data are not images."""
    shown = []
    for position in np.unique(np.linspace(0, len(chosen) - 1, _THUMBNAILS).astype(int)):
        image = dataset.thumbnail(int(chosen[position]))
        if image is None:
            return []
        image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded = base64.b64encode(buffer.getvalue()).decode()
        shown.append({"name": dataset.names[chosen[position]], "png": encoded})
    return shown
