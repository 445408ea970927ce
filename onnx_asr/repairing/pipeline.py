"""The repair pipeline: pair and survey the networks, walk, edit, verify on held-out samples."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.data import Dataset, Preprocessing, open_data, sample_indices
from onnx_asr.data.sources import DataSource
from onnx_asr.graph.edit import EditPlan, apply
from onnx_asr.graph.model_io import ModelSource, digest, inlined_functions, load
from onnx_asr.networks.execution import Execution, silent
from onnx_asr.networks.fidelity import Fidelity, Outputs, collect_outputs, compare
from onnx_asr.networks.pair import Networks
from onnx_asr.networks.samples import Calibration, batch_size_for, input_specs, load_calibration, whole_batches
from onnx_asr.networks.sparsity import share_of_zeros, starved
from onnx_asr.repairing.channelwise import Track, batchnorm_track, paired_track, walk
from onnx_asr.repairing.methods import check_method, correct, untouched
from onnx_asr.repairing.options import Method, RepairOptions
from onnx_asr.repairing.point_report import Reports
from onnx_asr.repairing.result import Candidate, RepairResult, Verification
from onnx_asr.version import __version__

CANDIDATE_SAMPLES = 256
RELIABILITY_POWER = 0.25
_FEW_NAMES = 5
REFIT_COST = 8.0
"""Roughly how many times ``paired``'s seconds ``refit`` takes; only for the time budget."""


def repair(
    model: ModelSource,
    data: DataSource | Dataset,
    options: RepairOptions | None = None,
    *,
    dense: ModelSource | None = None,
    preprocessing: Preprocessing | None = None,
    execution: Execution | None = None,
) -> RepairResult:
    """Give a pruned model its accuracy back.

    Args:
        model: Path or ModelProto of the pruned model; it is not changed.
        data: Calibration samples, no labels needed: whatever :func:`onnx_asr.open_data` takes, or a Dataset.
        options: Method and sizes; the default is ``auto`` on 512 samples, which returns the pruned model unchanged
            where nothing it tried came closer to the dense one.
        dense: The model that the pruned one was made from. Without it the running statistics stored in the pruned
            model's BatchNormalization take its place, and nothing can be verified.
        preprocessing: What to do to images; see :class:`onnx_asr.data.Preprocessing`.
        execution: Execution providers, memory limit, progress.

    Raises:
        ModelError: A model that cannot be repaired.
        StructureError: ``dense`` and ``model`` are not the same network.
        DataError: Missing, broken or unfitting data.
        OptionError: Options that contradict each other or the model.
    """
    execution = execution or Execution()
    started = time.perf_counter()
    job = RepairJob.of(
        load(model), None if dense is None else load(dense), data, options or RepairOptions(), preprocessing
    )
    execution.progress("loading data", 0.0)
    return finish(job, job.load_calibration(), execution, started, time.perf_counter())


def finish(
    job: RepairJob, calibration: Calibration, execution: Execution, started: float, loaded: float
) -> RepairResult:
    """Choose a method where that was asked for, correct, verify; ``started`` and ``loaded`` are clock readings."""
    candidates: list[Candidate] = []
    if job.options.method == "auto":
        job, candidates = _choose(job, calibration, execution)
    chosen = time.perf_counter()
    model, reports = job.correct(calibration, execution)
    repaired = time.perf_counter()
    samples, digested = calibration.count, calibration.digest
    del calibration  # there may be more of it in memory than of all else that is there while the result is verified
    verification = job.verify(model, execution) if job.can_verify else None
    skips = (*job.networks.survey.skips, *untouched(job.networks, reports, job.options))
    if candidates and verification is not None and not verification.improved:
        job.notes.append(
            "auto: nothing tried came closer to the dense model than the pruned model is, which is given back unchanged"
        )
        model, reports = apply(job.networks.pruned, EditPlan()), {}
    execution.progress("done", 1.0)
    seconds = {
        "load": loaded - started,
        "choose": chosen - loaded,
        "repair": repaired - chosen,
        "verify": time.perf_counter() - repaired,
    }
    return RepairResult(
        model=model,
        options=job.options,
        candidates=tuple(candidates),
        points=tuple(reports[position] for position in sorted(reports)),
        skips=skips,
        notes=tuple(job.notes),
        verification=verification,
        calibration_samples=samples,
        calibration_digest=digested,
        sparsity=share_of_zeros(job.networks.sparsities),
        seconds=seconds,
    )


@dataclass(frozen=True)
class RepairJob:
    """Everything one repair works on.

    Attributes:
        pruned: The model to repair.
        dense: The model it came from, if given.
        networks: Both, indexed, surveyed and paired.
        dataset: All samples.
        chosen: Indices of the calibration samples.
        held_out: Indices of the samples for the verification.
        options: What to do.
        notes: What a user should know; added to along the way.
        reference: The dense model's outputs on the held-out samples, once they were computed.
    """

    pruned: onnx.ModelProto
    dense: onnx.ModelProto | None
    networks: Networks
    dataset: Dataset
    chosen: NDArray[np.int64]
    held_out: NDArray[np.int64]
    options: RepairOptions
    notes: list[str]
    reference: list[Outputs]

    @classmethod
    def of(
        cls,
        pruned: onnx.ModelProto,
        dense: onnx.ModelProto | None,
        data: DataSource | Dataset,
        options: RepairOptions,
        preprocessing: Preprocessing | None,
    ) -> RepairJob:
        """Check that the parts fit, and divide the samples."""
        networks = Networks.of(pruned, dense)
        check_method(options.method, dense=dense is not None, batchnorm=networks.survey.has_batchnorm)
        specs = input_specs(networks.pruned)
        if isinstance(data, Dataset):
            dataset = data
        else:
            dataset = open_data(data, specs, preprocessing=preprocessing, skip_bad_images=options.skip_bad_images)
        chosen, held_out = split_samples(len(dataset), options, verify=dense is not None)
        notes = _notes(networks, options, dataset, chosen, held_out)
        return cls(pruned, dense, networks, dataset, chosen, held_out, options, notes, [])

    @property
    def can_verify(self) -> bool:
        """Whether there is a dense model, and a sample, to verify with."""
        return self.dense is not None and len(self.held_out) > 0

    def load_calibration(self) -> Calibration:
        """Prepare the calibration samples."""
        specs = input_specs(self.networks.pruned)
        batch_size = batch_size_for(specs, self.options.batch_size)
        if self.options.bn == "ema":
            batch_size = math.gcd(batch_size, self.options.ema_batch_size)
        return load_calibration(self.dataset, whole_batches(self.chosen, specs), batch_size)

    def correct(self, calibration: Calibration, execution: Execution) -> tuple[onnx.ModelProto, Reports]:
        """The repaired copy, and what was done at each point."""
        plan, reports = correct(self.networks, self.dataset, self.chosen, calibration, self.options, execution)
        return self.written(plan, reports, calibration), reports

    def written(self, plan: EditPlan, reports: Reports, calibration: Calibration) -> onnx.ModelProto:
        """The copy with a plan written into it, with notes and metadata."""
        for position, report in reports.items():
            plan.notes[position] = report.note(self.options.method)
        provenance = _provenance(self.networks, self.dense, calibration, self.options)
        return apply(self.networks.pruned, plan, provenance)

    def measure(self, model: onnx.ModelProto, execution: Execution) -> Fidelity:
        """Fidelity to the dense model on the held-out samples."""
        assert self.dense is not None
        if not self.reference:
            self.reference.append(self._outputs(self.dense, execution))
        samples = whole_batches(self.held_out, input_specs(self.networks.pruned))
        return replace(compare(self.reference[0], self._outputs(model, execution)), samples=len(samples))

    def _outputs(self, model: onnx.ModelProto, execution: Execution) -> Outputs:
        return collect_outputs(model, self.dataset, self.held_out, execution.runtime, self.options.batch_size)

    def verify(self, model: onnx.ModelProto, execution: Execution) -> Verification:
        """Fidelity before and after."""
        execution.progress("verifying", 0.0)
        held_out = not bool(np.isin(self.held_out, self.chosen).any())
        return Verification(self.measure(self.pruned, execution), self.measure(model, execution), held_out)


def _choose(job: RepairJob, calibration: Calibration, execution: Execution) -> tuple[RepairJob, list[Candidate]]:
    """Try the candidate methods on part of the calibration samples; the job with the best one on the held-out ones."""
    if not job.can_verify:
        method: Method = "bn" if job.dense is None else "refit"
        why = "no dense model to choose by" if job.dense is None else "no held-out samples to choose by"
        job.notes.append(f"auto: {why}, so '{method}' was used")
        return replace(job, options=replace(job.options, method=method)), []
    part = calibration.head(CANDIDATE_SAMPLES)
    execution.progress("trying the channel rules", 0.0)
    begun = time.perf_counter()
    tracks = _candidate_tracks(job)
    walk(job.networks, [track for _, track in tracks], part, replace(execution, progress=silent))
    seconds = time.perf_counter() - begun
    candidates = []
    for options, track in tracks:
        model = replace(job, options=options).written(track.plan, track.reports, part)
        candidates.append(Candidate(options, job.measure(model, execution), seconds / len(tracks)))
    budget = job.options.time_budget
    if budget is not None and time.perf_counter() - begun + REFIT_COST * seconds > budget:
        job.notes.append("auto: 'refit' was not tried, it would have exceeded the time budget")
    else:
        execution.progress("trying refit", 0.0)
        options = replace(job.options, method="refit")
        begun = time.perf_counter()
        model, _ = replace(job, options=options).correct(part, replace(execution, progress=silent))
        seconds = time.perf_counter() - begun
        candidates.append(Candidate(options, job.measure(model, execution), seconds))
    best = min(candidates, key=lambda candidate: candidate.fidelity.distance)
    return replace(job, options=best.options), candidates


def _candidate_tracks(job: RepairJob) -> list[tuple[RepairOptions, Track]]:
    """The channel rules worth trying, to share one walk."""
    networks = job.networks
    found = [
        (replace(job.options, method="paired", reliability_power=power), paired_track(networks, EditPlan(), power))
        for power in (0.0, RELIABILITY_POWER)
    ]
    if networks.survey.has_batchnorm:
        found.append((replace(job.options, method="bn", bn="exact"), batchnorm_track(networks, EditPlan())))
    return found


def split_samples(count: int, options: RepairOptions, verify: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Calibration and held-out sample indices, both seeded, without overlap wherever there are two samples or more.

    Where the data have fewer samples than both parts together ask for, a fifth of them is held out.
    """
    wanted = options.verify_samples if verify else 0
    if wanted == 0:
        return sample_indices(count, options.samples, options.seed), np.empty(0, np.int64)
    held = min(wanted, max(count - options.samples, count // 5))
    if held == 0:
        everything = sample_indices(count, options.samples, options.seed)
        return everything, everything
    chosen = sample_indices(count, min(options.samples, count - held), options.seed)
    rest = np.setdiff1d(np.arange(count), chosen)
    return chosen, rest[sample_indices(len(rest), held, options.seed)]


def _notes(
    networks: Networks,
    options: RepairOptions,
    dataset: Dataset,
    chosen: NDArray[np.int64],
    held_out: NDArray[np.int64],
) -> list[str]:
    notes = []
    functions = inlined_functions(networks.pruned.model)
    if functions is not None:
        notes.append(f"model-local functions were written out in place: {functions}")
    if networks.dense is None:
        notes.append(
            "no dense model: the running statistics stored in the pruned model's BatchNormalization are the reference, "
            "and the result was not verified"
        )
    if len(chosen) < options.samples:
        notes.append(
            f"{len(chosen)} calibration samples of the {options.samples} asked for: the data have {len(dataset)}"
        )
    if dataset.unreadable:
        few = ", ".join(dataset.unreadable[:_FEW_NAMES]) + (", ..." if len(dataset.unreadable) > _FEW_NAMES else "")
        notes.append(f"{len(dataset.unreadable)} images cannot be read and were skipped: {few}")
    if len(held_out) and np.isin(held_out, chosen).any():
        notes.append("too few samples to hold any out: the verification used calibration samples")
    if options.method in ("asr", "raw", "layerwise") and options.bn == "exact":
        notes.append(
            f"before an exactly re-estimated BatchNormalization the gains of '{options.method}' cancel: what is "
            "left is 'bn' (use --bn ema for the paper's protocol)"
        )
    notes += starved(networks.sparsities)
    return notes


def _provenance(
    networks: Networks, dense: onnx.ModelProto | None, calibration: Calibration, options: RepairOptions
) -> dict[str, str]:
    entries = {
        "onnx_asr.version": __version__,
        "onnx_asr.method": options.method,
        "onnx_asr.options": json.dumps(asdict(options), sort_keys=True),
        "onnx_asr.calibration": f"{calibration.count} samples, sha256 {calibration.digest}",
        "onnx_asr.sparsity": f"{share_of_zeros(networks.sparsities):.6f}",
    }
    if dense is not None:
        entries["onnx_asr.dense_sha256"] = digest(dense)
    return entries
