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

MIN_CANDIDATE_SAMPLES, MAX_CANDIDATE_SAMPLES = 32, 128
"""Samples on which the channel rules are tried: a quarter of all, within these limits."""
RELIABILITY_POWER = 0.25
INTACT_SNR = 60.0
"""Decibels below which outputs differ, whatever their divergence: that of scores beyond every bound is 0."""
FITTED_SAMPLES = 64
"""Calibration samples that a refitted model is measured on, beside the held-out ones."""
FEW_SAMPLES, DAMAGE_LEFT = 2.0, 0.05
"""More samples would help where a model is this many times as far from the dense one on held-out samples as on those it
was fitted to, and at this share of the distance before the repair."""
_FEW_SAMPLES = (
    "more calibration samples would help: the distance from the dense model is {:.3g} on samples that the weights were "
    "fitted to, and {:.3g} on others (--samples)"
)
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
    before = None
    if job.verifier is not None:
        execution.progress("verifying", 0.0)
        with timed(seconds, "verify"):
            before = job.verifier.fidelity(pruned)
            if job.verifier.noise.covers(before) and (before.snr_db is None or before.snr_db >= INTACT_SNR):
                result = _given_back(job, _result(job, Draft(job.pruned.index), {}, (), calibration), before, "equal")
                execution.progress("done", 1.0)
                return replace(result, notes=(*result.notes, _INTACT), seconds=seconds)
    choice = _Choice(job)
    with timed(seconds, "choose"):
        if options.method == "auto":
            choice = _choose(job, calibration, execution)
    with timed(seconds, "repair"):
        result = choice.result or run_method(choice.job, calibration, execution)
    del calibration  # it may take more memory than everything that the verification needs
    with timed(seconds, "verify"):
        worse = not choice.candidates
        result = verified(choice.job, result, execution, keep_worse=worse, before=before, after=choice.fidelity)
    execution.progress("done", 1.0)
    return replace(result, candidates=choice.candidates, seconds=seconds)


def run_method(job: RepairJob, calibration: Calibration, execution: Execution) -> RepairResult:
    """Run the method of a job, any but "auto"; the result is not verified.

    Raises:
        ModelError: When the activations of a network are not finite.
        DataError: When the samples do not fill a batch of ``--bn ema``.
    """
    draft = Draft(job.pruned.index)
    return _result(job, draft, *_correct(job, draft, calibration, execution), calibration)


def _result(
    job: RepairJob, draft: Draft, reports: Reports, skips: Sequence[Skip], calibration: Calibration
) -> RepairResult:
    """The result of a job whose method has filled a draft."""
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


def verified(
    job: RepairJob,
    result: RepairResult,
    execution: Execution,
    *,
    keep_worse: bool = True,
    before: Fidelity | None = None,
    after: Fidelity | None = None,
) -> RepairResult:
    """A result with its verification, where there is a dense model and a held-out sample.

    The pruned model is given back where it is as close to the dense one as the repaired one, but for rounding, and
    without ``keep_worse`` where it is closer. ``before`` and ``after`` are the fidelities of the two, where known.
    """
    verifier = job.verifier
    if verifier is None:
        return result
    execution.progress("verifying", 0.0)
    before = before or verifier.fidelity(job.pruned.index.model)
    after = after or verifier.fidelity(result.model)
    verdict, note = _judged(verifier, before, after)
    if before.metric is not None and before.metric < verifier.dense_metric - verifier.noise.metric:
        result = replace(result, notes=(*result.notes, _LOWER_IS_BETTER.format(before.metric, verifier.dense_metric)))
    if verdict == "closer" or (verdict == "further" and keep_worse):
        fitted = _fitted(verifier, result)
        least = DAMAGE_LEFT * before.divergence
        if fitted is not None and after.divergence > max(FEW_SAMPLES * fitted.divergence, least):
            result = replace(result, notes=(*result.notes, _FEW_SAMPLES.format(fitted.divergence, after.divergence)))
        return replace(result, verification=_verification(job, before, after, verdict, fitted))
    result = _given_back(job, result, before, verdict)
    return replace(result, notes=(*result.notes, note))


def _fitted(verifier: Verifier, result: RepairResult) -> Fidelity | None:
    """Fidelity of a refitted model on some of the samples that it was fitted to."""
    samples = verifier.samples
    if result.options.method != "refit" or not samples.is_held_out:
        return None
    return verifier.on(samples.chosen[: max(FITTED_SAMPLES, samples.smallest_run)]).fidelity(result.model)


def _given_back(job: RepairJob, result: RepairResult, before: Fidelity, verdict: Verdict) -> RepairResult:
    """A result with the pruned model in place of the repaired one, which was not better."""
    verification = _verification(job, before, before, verdict)
    return replace(result, model=Draft(job.pruned.index).model(), points=(), verification=verification)


def _verification(
    job: RepairJob, before: Fidelity, after: Fidelity, verdict: Verdict, fitted: Fidelity | None = None
) -> Verification:
    verifier = job.verifier
    assert verifier is not None
    known = verifier.dense_fidelity, verifier.labels_error
    return Verification(before, after, job.samples.is_held_out, verdict, fitted, *known)


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
        result: Its result, where it was tried on all calibration samples.
        fidelity: The fidelity of that.
    """

    job: RepairJob
    candidates: tuple[Candidate, ...] = ()
    result: RepairResult | None = None
    fidelity: Fidelity | None = None


def _choose(job: RepairJob, calibration: Calibration, execution: Execution) -> _Choice:
    """Try the channel rules on part of the calibration samples and ``refit`` on all: the best on the held-out ones.

    ``refit`` wins where much was pruned, and takes most of the time, so its result is kept; so is that of a channel
    rule where the part is the whole. What a channel rule brings back up to rounding is not refitted.
    """
    if job.verifier is None:
        method: Method = "bn" if job.pair is None else "refit"
        why = "no dense model to choose by" if job.pair is None else "no held-out samples to choose by"
        note = f"auto: {why}, so '{method}' was used"
        return _Choice(replace(job, options=replace(job.options, method=method), notes=(*job.notes, note)))
    part = calibration.head(max(MIN_CANDIDATE_SAMPLES, min(MAX_CANDIDATE_SAMPLES, calibration.count // 4)))
    begun = time.perf_counter()
    execution.progress("trying the channel rules", 0.0)
    candidates, best = _channel_rules(job, job.verifier, part, execution.quiet)
    if part.count < calibration.count:
        best = replace(best, result=None, fidelity=None)
    cost = REFIT_COST * sum(candidate.seconds for candidate in candidates) * calibration.count / part.count
    nearest = min(candidates, key=_distance)
    notes: tuple[str, ...] = ()
    if job.verifier.noise.covers(nearest.fidelity):
        notes = (f"auto: 'refit' was not tried, '{nearest.method}' brought back all but rounding",)
    elif job.options.time_budget is not None and time.perf_counter() - begun + cost > job.options.time_budget:
        notes = ("auto: 'refit' was not tried, it would have exceeded the time budget",)
    else:
        execution.progress("trying refit", 0.0)
        begun, own = time.perf_counter(), replace(job, options=replace(job.options, method="refit"))
        result = run_method(own, calibration, execution)
        seconds = time.perf_counter() - begun
        candidates.append(Candidate(own.options, job.verifier.fidelity(result.model), seconds))
        if _distance(candidates[-1]) < _distance(nearest):
            best = _Choice(own, (), result, candidates[-1].fidelity)
    if best.result is None:
        return replace(best, job=replace(best.job, notes=(*job.notes, *notes)), candidates=tuple(candidates))
    return replace(best, result=replace(best.result, notes=(*best.result.notes, *notes)), candidates=tuple(candidates))


def _distance(candidate: Candidate) -> tuple[float, float]:
    """What the best candidate has least of."""
    return candidate.fidelity.distance, candidate.fidelity.divergence


def _channel_rules(
    job: RepairJob, verifier: Verifier, calibration: Calibration, execution: Execution
) -> tuple[list[Candidate], _Choice]:
    """The channel rules worth trying, in one walk, and the best of them."""
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
    candidates: list[Candidate] = []
    best = _Choice(job)
    for (options, track), corrected in zip(tracks.items(), reports, strict=True):
        own = replace(job, options=options)
        result = _result(own, track.draft, corrected, track.skips, calibration)
        candidates.append(Candidate(options, verifier.fidelity(result.model), seconds))
        if min(candidates, key=_distance) is candidates[-1]:
            best = _Choice(own, (), result, candidates[-1].fidelity)
    return candidates, best
