"""The demonstration: prune an embedded net until it collapses, repair it with every method, keep the best.

Calibration reads the embedded folder of images, without labels; the scores come from other images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from onnx_asr.data import PRESETS
from onnx_asr.engine.loading import load
from onnx_asr.errors import ModelError, OptionError, OutputError
from onnx_asr.files.outputs import Destination
from onnx_asr.graph.model_io import save
from onnx_asr.json_values import MERGED, key
from onnx_asr.measuring.evaluation import evaluate
from onnx_asr.networks.execution import Execution, silent
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.pruning.options import PruneOptions
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import METHODS, Method, RepairOptions
from onnx_asr.repairing.pipeline import repair
from onnx_asr.repairing.result import RepairResult

_SAMPLES, _VERIFY_SAMPLES = 384, 128  # together the embedded calibration images


@dataclass(frozen=True)
class DemoRow:
    """One version of the net.

    Attributes:
        name: "dense", "pruned", or the method that repaired it.
        fidelity: Its scores.
        seconds: Time to make it; None for the dense net.
        chosen: The method that "auto" chose; None for everything else.
    """

    name: str
    fidelity: Fidelity = field(metadata=MERGED)
    seconds: float | None
    chosen: str | None = None


@dataclass(frozen=True)
class DemoResult:
    """All versions of the net, and the two files written: the pruned one and the best repaired one.

    Attributes:
        model: File name of the embedded net.
        sparsity: Share of zeros in the pruned weights.
        calibration: Folder of the calibration images.
        calibration_samples: Number of them that the statistics come from.
        rows: Dense, pruned, and one version per method.
        best: The method with the highest top-1.
    """

    model: str
    sparsity: float
    calibration: Path = field(metadata=key("calibration.path"))
    calibration_samples: int = field(metadata=key("calibration.samples"))
    rows: tuple[DemoRow, ...]
    best: str
    pruned: Path
    repaired: Path
    notes: tuple[str, ...]


def run_demo(folder: Path, model: str, sparsity: float, execution: Execution) -> DemoResult:
    """Prune an embedded net, repair it with every method, write the pruned model and the best repaired one.

    The folder is created if missing, and files of these names in it are replaced. The model is the family of a net in
    ``models/manifest.json``.

    Raises:
        OptionError: An unknown net, or a sparsity out of range.
        OutputError: The folder cannot be written.
    """
    options, models = PruneOptions(sparsity), _embedded_models()
    manifest = json.loads((models / "manifest.json").read_text(encoding="utf-8"))
    files = {entry["family"]: models / entry["file"] for entry in manifest["models"]}
    if model not in files:
        raise OptionError(f"there is no embedded model '{model}': give one of {', '.join(files)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder '{folder}': {error.strerror}; choose another with -o") from error
    stem = folder / files[model].stem
    pruned_path, repaired_path = (Destination.of(f"{stem}_{what}.onnx").path for what in ("pruned", "repaired"))
    preprocessing = PRESETS[manifest["preprocessing"]["preset"]]
    calibration, validation = (models / manifest["data"][name] for name in ("calibration_folder", "validation_npz"))
    dense, quiet = load(files[model]), replace(execution, progress=silent)

    def row(name: str, version: onnx.ModelProto, seconds: float | None, chosen: str | None = None) -> DemoRow:
        scores = evaluate(version, validation, dense=dense, preprocessing=preprocessing, execution=quiet)
        return DemoRow(name, scores, seconds, chosen)

    started = time.perf_counter()
    pruned = prune(dense, options=options)
    seconds = time.perf_counter() - started
    rows = [row("dense", dense, None), row("pruned", pruned.model, seconds)]
    results: dict[Method, RepairResult] = {}
    for number, method in enumerate(METHODS):
        execution.progress(f"repairing: {method}", number / len(METHODS))
        how = RepairOptions(method, samples=_SAMPLES, verify_samples=_VERIFY_SAMPLES)
        result = repair(pruned.model, calibration, how, dense=dense, preprocessing=preprocessing, execution=quiet)
        results[method] = result
        rows.append(row(method, result.model, sum(result.seconds.values()), result.chosen))
    scores = {made.name: made.fidelity for made in rows}
    best = max(METHODS, key=lambda name: (scores[name].top1 or 0.0, -scores[name].distance, name != "auto"))
    save(pruned.model, pruned_path)
    save(results[best].model, repaired_path)
    execution.progress("done", 1.0)
    return DemoResult(
        files[model].name,
        pruned.sparsity,
        calibration,
        results[best].calibration_samples,
        tuple(rows),
        best,
        pruned_path,
        repaired_path,
        _notes(results),
    )


def _embedded_models() -> Path:
    """The folder of the embedded nets: package data once installed, beside the package in a checkout.

    Raises:
        ModelError: When it is missing.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "models", package.parent / "models"):
        if (folder / "manifest.json").is_file():
            return folder
    raise ModelError(f"the embedded models are missing from {package / 'models'}: install the package again")


def _notes(results: Mapping[Method, RepairResult]) -> tuple[str, ...]:
    """The notes of all methods; one that several methods share appears once, with all their names."""
    found: dict[str, list[str]] = {}
    for method, result in results.items():
        for note in result.notes:
            found.setdefault(note.replace(f"'{method}'", "{methods}"), []).append(f"'{method}'")
    return tuple(note.replace("{methods}", ", ".join(methods)) for note, methods in found.items())
