"""The repair pipeline: pair and survey the networks, choose a method, correct, verify on held-out samples."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnx_asr.data import Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.engine.loading import load
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource
from onnx_asr.graph.skips import Skip
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution, timed
from onnx_asr.networks.fidelity import Fidelity, Verdict
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.sparsity import check_order, share_of_zeros
from onnx_asr.repairing.channelwise import Track, batchnorm_track, gain_track, paired_track, run_tracks
from onnx_asr.repairing.job import RepairJob
from onnx_asr.repairing.moving_average import recalibrate_ema
from onnx_asr.repairing.options import Method, RepairOptions, chosen
from onnx_asr.repairing.refit import repair_refit
from onnx_asr.repairing.result import Candidate, RepairResult, Reports, Verification, unconverged
from onnx_asr.repairing.verification import Verifier

CANDIDATE_SAMPLES = 128
"""Samples on which the channel rules are tried."""
RELIABILITY_POWER = 0.25
_INTACT = (
    "the outputs of the pruned model are those of the dense one, but for rounding: there is nothing to repair, and the "
    "pruned model is returned unchanged"
)
_NO_CLOSER = (
    "what the repair changed in the distance from the dense model is rounding: the pruned model is returned unchanged"
)
_SAME_METRIC = "the repair did not move the metric by more than rounding does: the pruned model is returned unchanged"
_LOWER_IS_BETTER = (
    "the metric of the pruned model ({:.4g}) is lower than that of the dense one ({:.4g}): lower counts as better, so "
    "return 1 - accuracy in place of an accuracy"
)
_NOT_FINITE = (
    "the {given} model puts out NaN or infinities on the samples to verify on, which leaves nothing to compare: the "
    "pruned model is returned unchanged (--verify-samples 0 repairs without comparing)"
)
_FURTHER = "auto: nothing tried came closer to the dense model than the pruned model, which is returned unchanged"
REFIT_COST = 8.0
"""Roughly how many times ``paired``'s seconds ``refit`` takes; only for the time budget."""


def repair(
    model: ModelSource,
    data: DataSource,
    options: RepairOptions | None = None,
    *,
    dense: ModelSource | None = None,
    force: bool = False,
    preprocessing: Preprocessing | None = None,
    execution: Execution | None = None,
) -> RepairResult:
    """Restore a pruned model's accuracy.

    Args:
        model: The pruned model: a path, or an object of onnx, onnx-graphsurgeon or onnx-ir, which is not changed.
        data: Calibration samples, no labels needed: whatever :func:`onnx_asr.open_data` takes, or a Dataset.
        options: Method and sizes; the default is ``auto`` on 512 samples, which returns the pruned model unchanged
            where nothing it tried came closer to the dense one. So does any method where rounding explains the
            difference between the two.
        dense: The model that the pruned one was made from. Without it the running statistics stored in the pruned
            model's BatchNormalization take its place, and nothing can be verified.
        force: Accept a dense model with more zeros than the pruned one; as a rule the two were exchanged.
        preprocessing: How to prepare images; see :class:`onnx_asr.data.Preprocessing`.
        execution: Execution providers, memory limit, progress.

    Raises:
        ModelError: A model that cannot be repaired.
        StructureError: ``dense`` and ``model`` are not the same network.
        DataError: Missing, broken or unfitting data.
        OptionError: Options that contradict each other or the model; a dense model that seems to be the pruned one.
    """
    options, execution = chosen(options, RepairOptions, data), execution or Execution()
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        pruned, reference = load(model), None if dense is None else load(dense)
        if reference is not None and not force:
            check_order(GraphIndex.of(pruned), GraphIndex.of(reference))
        job = RepairJob.of(pruned, reference, data, options, preprocessing, execution)
        execution.progress("loading data", 0.0)
        calibration = job.samples.load()
    choice = _Choice(job)
    with timed(seconds, "choose"):
        if options.method == "auto":
            choice = _choose(job, calibration, execution)
    with timed(seconds, "repair"):
        result = choice.refit or run_method(choice.job, calibration, execution)
    del calibration  # it may take more memory than everything that the verification needs
    with timed(seconds, "verify"):
        result = verified(choice.job, result, execution, keep_worse=not choice.candidates)
    execution.progress("done", 1.0)
    return replace(result, candidates=choice.candidates, seconds=seconds)


def run_method(job: RepairJob, calibration: Calibration, execution: Execution) -> RepairResult:
    """Run the method of a job, any but "auto"; the result is not verified.

    Raises:
        ModelError: When the activations of a network are not finite.
        DataError: When the samples do not fill a batch of ``--bn ema``.
    """
    draft = Draft(job.pruned.index)
    reports, skips = _correct(job, draft, calibration, execution)
    points = tuple(reports[position] for position in sorted(reports))
    return RepairResult(
        model=job.written(draft, points, calibration),
        options=job.options,
        candidates=(),
        points=points,
        skips=(*job.pruned.survey.skips, *skips),
        notes=(*job.notes, *unconverged(points)),
        verification=None,
        calibration_samples=calibration.count,
        calibration_digest=calibration.digest,
        sparsity=share_of_zeros(job.sparsities),
    )


def _correct(
    job: RepairJob, draft: Draft, calibration: Calibration, execution: Execution
) -> tuple[Reports, Sequence[Skip]]:
    """Fill a draft by the job's method: reports by node, and the points that it does not change."""
    options, pruned, pair = job.options, job.pruned, job.pair

    def walked(track: Track, samples: Calibration) -> tuple[Reports, Sequence[Skip]]:
        (reports,) = run_tracks(pruned, pair, [track], samples, execution)
        return reports, track.skips

    if options.method == "refit":
        assert pair is not None
        return repair_refit(pair, draft, calibration, execution, options.refit)
    if options.method == "paired":
        return walked(paired_track(pruned, pair, draft, options.reliability_power), calibration)
    gains: Reports = {}
    skips: Sequence[Skip] = ()
    if options.method != "bn":
        part = calibration if options.gain_samples is None else calibration.head(options.gain_samples)
        gains, skips = walked(gain_track(pruned, pair, draft, options), part)
        if not pruned.survey.has_batchnorm:
            return gains, skips
    track = batchnorm_track(pruned, draft)
    if options.bn == "exact":
        statistics, _ = walked(track, calibration)
    else:
        statistics = recalibrate_ema(job, draft, calibration.batch_size, execution)
    if options.method == "bn":
        return statistics, track.skips
    both = {node: replace(gains[node], written="weights+batchnorm") for node in gains.keys() & statistics.keys()}
    return gains | statistics | both, [skip for skip in skips if skip.node not in statistics]


def verified(job: RepairJob, result: RepairResult, execution: Execution, *, keep_worse: bool = True) -> RepairResult:
    """A result with its verification, where there is a dense model and a held-out sample.

    The pruned model is given back where it is as close to the dense one as the repaired one, but for rounding, and
    without ``keep_worse`` where it is closer.
    """
    verifier = job.verifier
    if verifier is None:
        return result
    execution.progress("verifying", 0.0)
    before, after = (verifier.fidelity(model) for model in (job.pruned.index.model, result.model))
    verdict, note = _judged(verifier, before, after)
    verification = Verification(before, after, job.samples.is_held_out, verdict)
    if before.metric is not None and before.metric < verifier.dense_metric - verifier.noise.metric:
        result = replace(result, notes=(*result.notes, _LOWER_IS_BETTER.format(before.metric, verifier.dense_metric)))
    if verdict == "closer" or (verdict == "further" and keep_worse):
        return replace(result, verification=verification)
    return replace(
        result,
        model=Draft(job.pruned.index).model(),
        points=(),
        notes=(*result.notes, note),
        verification=replace(verification, after=before),
    )


def _judged(verifier: Verifier, before: Fidelity, after: Fidelity) -> tuple[Verdict, str]:
    """What a repair brought, and the note where the pruned model is given back for it."""
    noise = verifier.noise
    if noise.covers(before):
        return "equal", _INTACT
    if math.isinf(before.divergence) and math.isinf(after.divergence):
        return "equal", _NOT_FINITE.format(given="pruned" if verifier.is_finite else "dense")
    verdict = noise.verdict(before, after)
    if verdict == "equal" and before.metric is not None:
        return verdict, _SAME_METRIC
    return verdict, _FURTHER if verdict == "further" else _NO_CLOSER


@dataclass(frozen=True)
class _Choice:
    """What to run.

    Attributes:
        job: The job with its method.
        candidates: What was tried.
        refit: The result, if it was chosen and is the one that was tried.
    """

    job: RepairJob
    candidates: tuple[Candidate, ...] = ()
    refit: RepairResult | None = None


def _choose(job: RepairJob, calibration: Calibration, execution: Execution) -> _Choice:
    """Try the channel rules on part of the calibration samples and ``refit`` on all: the best on the held-out ones.

    ``refit`` wins where much was pruned, and takes most of the time, so its result is kept.
    """
    if job.verifier is None:
        method: Method = "bn" if job.pair is None else "refit"
        why = "no dense model to choose by" if job.pair is None else "no held-out samples to choose by"
        note = f"auto: {why}, so '{method}' was used"
        return _Choice(replace(job, options=replace(job.options, method=method), notes=(*job.notes, note)))
    part = calibration.head(CANDIDATE_SAMPLES)
    begun = time.perf_counter()
    execution.progress("trying the channel rules", 0.0)
    candidates = _channel_candidates(job, job.verifier, part, execution.quiet)
    cost = REFIT_COST * sum(candidate.seconds for candidate in candidates) * calibration.count / part.count
    notes, refit = job.notes, None
    if job.options.time_budget is not None and time.perf_counter() - begun + cost > job.options.time_budget:
        notes = (*notes, "auto: 'refit' was not tried, it would have exceeded the time budget")
    else:
        execution.progress("trying refit", 0.0)
        begun, options = time.perf_counter(), replace(job.options, method="refit")
        refit = run_method(replace(job, options=options), calibration, execution)
        seconds = time.perf_counter() - begun
        candidates.append(Candidate(options, job.verifier.fidelity(refit.model), seconds))
    best = min(candidates, key=lambda candidate: (candidate.fidelity.distance, candidate.fidelity.divergence))
    kept = refit if best.options.method == "refit" else None
    return _Choice(replace(job, options=best.options, notes=notes), tuple(candidates), kept)


def _channel_candidates(
    job: RepairJob, verifier: Verifier, calibration: Calibration, execution: Execution
) -> list[Candidate]:
    """The channel rules worth trying, in one walk."""
    pruned = job.pruned
    tracks: dict[RepairOptions, Track] = {}
    for power in (0.0, RELIABILITY_POWER):
        options = replace(job.options, method="paired", reliability_power=power)
        tracks[options] = paired_track(pruned, job.pair, Draft(pruned.index), power)
    if pruned.survey.has_batchnorm:
        options = replace(job.options, method="bn", bn="exact")
        tracks[options] = batchnorm_track(pruned, Draft(pruned.index))
    begun = time.perf_counter()
    reports = run_tracks(pruned, job.pair, list(tracks.values()), calibration, execution)
    seconds = (time.perf_counter() - begun) / len(tracks)
    candidates = []
    for (options, track), corrected in zip(tracks.items(), reports, strict=True):
        model = replace(job, options=options).written(track.draft, list(corrected.values()), calibration)
        candidates.append(Candidate(options, verifier.fidelity(model), seconds))
    return candidates
