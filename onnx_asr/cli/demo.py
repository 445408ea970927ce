"""The demonstration: prune an embedded net until it collapses, repair it with every method, keep the best.

Calibration reads the embedded folder of images, without labels; the scores come from other images.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from onnx_asr.data import PRESETS, Preprocessing, open_data
from onnx_asr.errors import ModelError, OptionError, OutputError
from onnx_asr.graph.files import check_writable
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import load, save
from onnx_asr.json_values import MERGED, key
from onnx_asr.measuring.evaluation import measure
from onnx_asr.networks.execution import Execution, silent
from onnx_asr.networks.fidelity import Fidelity, collect_outputs
from onnx_asr.networks.samples import input_specs
from onnx_asr.numerics.patterns import Pattern, check_sparsity
from onnx_asr.pruning.options import PruneOptions
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import METHODS, Method, RepairOptions
from onnx_asr.repairing.pipeline import repair
from onnx_asr.repairing.result import RepairResult

MODEL, SPARSITY = "resnet", 0.95
SAMPLES, VERIFY_SAMPLES = 384, 128  # together the embedded calibration images


@dataclass(frozen=True)
class DemoRow:
    """One version of the net.

    Attributes:
        name: What it is called.
        fidelity: How good it is.
        seconds: What it took to make; None where it was there.
        chosen: What "auto" chose; None for everything else.
    """

    name: str
    fidelity: Fidelity = field(metadata=MERGED)
    seconds: float | None
    chosen: str | None = None


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration did.

    Attributes:
        model: The embedded net's file name.
        sparsity: Share of zeros in the pruned weights.
        calibration: Where the calibration images are.
        calibration_samples: How many of them the statistics come from.
        rows: Dense, pruned and one version a method.
        best: The method of highest top-1.
        pruned: The pruned file.
        repaired: The best method's file.
        notes: What a reader of the rows should know.
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


def embedded_models() -> Path:
    """The folder of the embedded nets: package data once installed, beside the package in a checkout.

    Raises:
        ModelError: When it is missing.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "models", package.parent / "models"):
        if (folder / "manifest.json").is_file():
            return folder
    raise ModelError(f"the embedded models are missing from {package / 'models'}: install the package again")


def run_demo(
    folder: str | os.PathLike[str],
    *,
    model: str = MODEL,
    sparsity: float = SPARSITY,
    execution: Execution | None = None,
) -> DemoResult:
    """Prune an embedded net, repair it with every method, write the pruned file and the best repaired one.

    Args:
        folder: Where the two files go; it is made if it is missing, and files of these names are replaced.
        model: Family of the net: see ``models/manifest.json``.
        sparsity: Share of weights to zero.
        execution: How to run.

    Raises:
        OptionError: An unknown net, or a sparsity out of range.
        OutputError: The folder cannot be written.
    """
    execution = execution or Execution()
    check_sparsity(sparsity, Pattern())
    models = embedded_models()
    manifest = json.loads((models / "manifest.json").read_text(encoding="utf-8"))
    files = {entry["family"]: models / entry["file"] for entry in manifest["models"]}
    if model not in files:
        raise OptionError(f"there is no embedded model '{model}': give one of {', '.join(files)}")
    source = files[model]
    output = _folder(folder)
    pruned_path, repaired_path = (
        check_writable(output / f"{source.stem}_{what}.onnx") for what in ("pruned", "repaired")
    )

    preprocessing = PRESETS[manifest["preprocessing"]["preset"]]
    calibration = models / manifest["data"]["calibration_folder"]
    dense = load(source)
    validation = open_data(
        models / manifest["data"]["validation_npz"], input_specs(GraphIndex.of(dense)), preprocessing=preprocessing
    )
    everything = np.arange(len(validation))
    reference = collect_outputs(dense, validation, everything, execution.sessions)
    started = time.perf_counter()
    pruned = prune(dense, options=PruneOptions(sparsity))
    pruning = time.perf_counter() - started
    results = _repaired_by_all(dense, pruned.model, calibration, preprocessing, execution)

    def row(name: str, candidate: onnx.ModelProto, seconds: float, chosen: str | None = None) -> DemoRow:
        outputs = collect_outputs(candidate, validation, everything, execution.sessions)
        return DemoRow(name, measure(outputs, reference, validation.labels), seconds, chosen)

    rows = [
        DemoRow("dense", measure(reference, reference, validation.labels), None),
        row("pruned", pruned.model, pruning),
        *(row(name, item.model, sum(item.seconds.values()), item.chosen) for name, item in results.items()),
    ]
    fidelity = {item.name: item.fidelity for item in rows}
    best = max(METHODS, key=lambda name: (fidelity[name].top1 or 0.0, -fidelity[name].distance, name != "auto"))
    save(pruned.model, pruned_path)
    save(results[best].model, repaired_path)
    execution.progress("done", 1.0)
    return DemoResult(
        source.name,
        pruned.sparsity,
        calibration,
        results[best].calibration_samples,
        tuple(rows),
        best,
        pruned_path,
        repaired_path,
        _notes(results),
    )


def _repaired_by_all(
    dense: onnx.ModelProto,
    pruned: onnx.ModelProto,
    calibration: Path,
    preprocessing: Preprocessing,
    execution: Execution,
) -> dict[Method, RepairResult]:
    """What every method makes of the pruned net."""
    results: dict[Method, RepairResult] = {}
    for number, method in enumerate(METHODS):
        execution.progress(f"repairing: {method}", number / len(METHODS))
        results[method] = repair(
            pruned,
            calibration,
            RepairOptions(method=method, samples=SAMPLES, verify_samples=VERIFY_SAMPLES),
            dense=dense,
            preprocessing=preprocessing,
            execution=replace(execution, progress=silent),
        )
    return results


def _notes(results: Mapping[Method, RepairResult]) -> tuple[str, ...]:
    """The notes of all methods; one that several methods have is told once, with all their names."""
    found: dict[str, list[str]] = {}
    for method, result in results.items():
        for note in result.notes:
            found.setdefault(note.replace(f"'{method}'", "{methods}"), []).append(f"'{method}'")
    return tuple(note.replace("{methods}", ", ".join(methods)) for note, methods in found.items())


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder '{folder}': {error.strerror}; choose another with -o") from error
    return folder
