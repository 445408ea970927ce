"""The repair pipeline: pair and survey the networks, choose a method, correct, verify on held-out samples."""

from __future__ import annotations

import time
from dataclasses import replace

from onnx_asr.data import Dataset, Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.graph.model_io import ModelSource, load
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution, timed
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.sparsity import share_of_zeros
from onnx_asr.repairing.channelwise import batchnorm_track, paired_track, walk
from onnx_asr.repairing.job import RepairJob
from onnx_asr.repairing.methods import correct
from onnx_asr.repairing.options import Method, RepairOptions
from onnx_asr.repairing.point_report import unconverged
from onnx_asr.repairing.result import Candidate, RepairResult, Verification
from onnx_asr.repairing.verification import Verifier

CANDIDATE_SAMPLES = 256
RELIABILITY_POWER = 0.25
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
        model: The pruned model: a path, or an object of onnx, onnx-graphsurgeon or onnx-ir, which is not changed.
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
    options, execution = options or RepairOptions(), execution or Execution()
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        pruned, reference = load(model), None if dense is None else load(dense)
        job = RepairJob.of(pruned, reference, data, options, preprocessing, execution)
        execution.progress("loading data", 0.0)
        calibration = job.samples.load()
    candidates: list[Candidate] = []
    with timed(seconds, "choose"):
        if options.method == "auto":
            job, candidates = _choose(job, calibration, execution)
    with timed(seconds, "repair"):
        result = run_method(job, calibration, execution)
    del calibration  # it may take more memory than everything that the verification needs
    with timed(seconds, "verify"):
        result = verified(job, result, execution)
    result = replace(result, candidates=tuple(candidates), seconds=seconds)
    execution.progress("done", 1.0)
    return result if result.improved or not candidates else _unchanged(result, job)


def run_method(job: RepairJob, calibration: Calibration, execution: Execution) -> RepairResult:
    """Run the method of a job, any but "auto"; the result is not verified.

    Raises:
        ModelError: When the activations of a network are not finite.
        DataError: When the samples do not fill a batch of ``--bn ema``.
    """
    found = correct(job, calibration, execution)
    points = tuple(found.reports[position] for position in sorted(found.reports))
    return RepairResult(
        model=job.written(found.draft, points, calibration),
        options=job.options,
        candidates=(),
        points=points,
        skips=(*job.pruned.survey.skips, *found.skips),
        notes=(*job.notes, *unconverged(points)),
        verification=None,
        calibration_samples=calibration.count,
        calibration_digest=calibration.digest,
        sparsity=share_of_zeros(job.sparsities),
    )


def verified(job: RepairJob, result: RepairResult, execution: Execution) -> RepairResult:
    """A result with its verification, where there is a dense model and a held-out sample."""
    if job.verifier is None:
        return result
    execution.progress("verifying", 0.0)
    before, after = (job.verifier.fidelity(model) for model in (job.pruned.index.model, result.model))
    return replace(result, verification=Verification(before, after, job.samples.is_held_out))


def _unchanged(result: RepairResult, job: RepairJob) -> RepairResult:
    """The pruned model as it was, in place of a result that is no closer to the dense one."""
    note = "auto: nothing tried came closer to the dense model than the pruned model, which is returned unchanged"
    return replace(result, model=Draft(job.pruned.index).model(), points=(), notes=(*result.notes, note))


def _choose(job: RepairJob, calibration: Calibration, execution: Execution) -> tuple[RepairJob, list[Candidate]]:
    """Try the candidate methods on part of the calibration samples: the job with the best on the held-out ones."""
    if job.verifier is None:
        method: Method = "bn" if job.pair is None else "refit"
        why = "no dense model to choose by" if job.pair is None else "no held-out samples to choose by"
        return job.chosen(replace(job.options, method=method), f"auto: {why}, so '{method}' was used"), []
    part = calibration.head(CANDIDATE_SAMPLES)
    begun = time.perf_counter()
    execution.progress("trying the channel rules", 0.0)
    candidates = _channel_candidates(job, job.verifier, part, execution.quiet)
    cost = REFIT_COST * sum(candidate.seconds for candidate in candidates)
    notes = []
    if job.options.time_budget is not None and time.perf_counter() - begun + cost > job.options.time_budget:
        notes.append("auto: 'refit' was not tried, it would have exceeded the time budget")
    else:
        execution.progress("trying refit", 0.0)
        candidates.append(_refit_candidate(job, job.verifier, part, execution.quiet))
    best = min(candidates, key=lambda candidate: candidate.fidelity.distance)
    return job.chosen(best.options, *notes), candidates


def _channel_candidates(
    job: RepairJob, verifier: Verifier, calibration: Calibration, execution: Execution
) -> list[Candidate]:
    """The channel rules worth trying, in one walk."""
    tracks = [
        (replace(job.options, method="paired", reliability_power=power), paired_track(job.pruned, job.pair, power))
        for power in (0.0, RELIABILITY_POWER)
    ]
    if job.pruned.survey.has_batchnorm:
        track = batchnorm_track(job.pruned, Draft(job.pruned.index))
        tracks.append((replace(job.options, method="bn", bn="exact"), track))
    seconds: dict[str, float] = {}
    with timed(seconds, "walk"):
        reports = walk(job.pruned, job.pair, [track for _, track in tracks], calibration, execution)
    candidates = []
    for (options, track), corrected in zip(tracks, reports, strict=True):
        model = replace(job, options=options).written(track.draft, list(corrected.values()), calibration)
        candidates.append(Candidate(options, verifier.fidelity(model), seconds["walk"] / len(tracks)))
    return candidates


def _refit_candidate(job: RepairJob, verifier: Verifier, calibration: Calibration, execution: Execution) -> Candidate:
    job = replace(job, options=replace(job.options, method="refit"))
    seconds: dict[str, float] = {}
    with timed(seconds, "refit"):
        model = run_method(job, calibration, execution).model
    return Candidate(job.options, verifier.fidelity(model), seconds["refit"])
