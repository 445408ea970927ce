"""The repair methods, walk by walk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_asr.errors import DataError
from onnx_asr.graph.skips import Skip
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.samples import Calibration, load_calibration
from onnx_asr.repairing.channelwise import Track, batchnorm_track, gain_track, paired_track, walk
from onnx_asr.repairing.job import RepairJob
from onnx_asr.repairing.moving_average import recalibrate_ema
from onnx_asr.repairing.options import RepairOptions
from onnx_asr.repairing.point_report import Reports
from onnx_asr.repairing.refit import refit_skips, repair_refit
from onnx_asr.repairing.verification import Samples


@dataclass(frozen=True)
class Corrections:
    """The corrections of a method.

    Attributes:
        draft: The new parameters.
        reports: A report of each corrected point, by node.
        skips: The points that the method does not change, and why.
    """

    draft: Draft
    reports: Reports
    skips: Sequence[Skip]


def correct(job: RepairJob, calibration: Calibration, execution: Execution) -> Corrections:
    """Run the method of a job, any but "auto".

    Args:
        job: The networks, the samples and the method's settings.
        calibration: The calibration samples, prepared.
        execution: Execution providers, memory limit, progress.

    Raises:
        ModelError: When the activations of a network are not finite.
        DataError: When the samples do not fill a batch of ``--bn ema``.
    """
    options, pruned = job.options, job.pruned
    if options.method == "refit":
        assert job.pair is not None
        draft = Draft(pruned.index)
        reports = repair_refit(job.pair, draft, calibration, execution, options.refit)
        return Corrections(draft, reports, refit_skips(pruned.survey.points, options.refit))
    if options.method == "paired":
        return _walked(job, paired_track(pruned, job.pair, options.reliability_power), calibration, execution)
    draft = Draft(pruned.index)
    if options.method == "bn":
        return _statistics(job, draft, calibration, execution)
    assert options.method in ("asr", "raw", "layerwise")
    dense = job.pair is not None
    track = gain_track(pruned, draft, options.method, options.prior, options.bias_correction, dense=dense)
    part = calibration if options.gain_samples is None else calibration.head(options.gain_samples)
    gains = _walked(job, track, part, execution)
    if not pruned.survey.has_batchnorm:
        return gains
    statistics = _statistics(job, draft, calibration, execution).reports
    skips = [skip for skip in gains.skips if skip.node not in statistics]
    return Corrections(draft, _joined(gains.reports, statistics), skips)


def _walked(job: RepairJob, track: Track, calibration: Calibration, execution: Execution) -> Corrections:
    (reports,) = walk(job.pruned, job.pair, [track], calibration, execution)
    return Corrections(track.draft, reports, track.skips)


def _statistics(job: RepairJob, draft: Draft, calibration: Calibration, execution: Execution) -> Corrections:
    """BatchNormalization re-estimated."""
    options = job.options
    track = batchnorm_track(job.pruned, draft)
    if options.bn == "exact":
        return _walked(job, track, calibration, execution)
    batches = _ema_batches(job.samples, calibration.batch_size, options)
    momentum, size = options.momentum, options.ema_batch_size
    reports = recalibrate_ema(job.pruned, draft, batches, execution, momentum=momentum, batch_samples=size)
    return Corrections(draft, reports, track.skips)


def _ema_batches(samples: Samples, batch_size: int, options: RepairOptions) -> Calibration:
    """``ema_batches`` batches drawn in a seeded order, round after round where the samples do not suffice."""
    chosen, size = samples.chosen, options.ema_batch_size
    if len(chosen) < size:
        raise DataError(
            f"--bn ema needs {size} samples per batch, and there are only {len(chosen)}: give more images, or a "
            "smaller --ema-batch-size"
        )
    generator = np.random.default_rng(options.seed)
    rounds = []
    for _ in range(-(-options.ema_batches // (len(chosen) // size))):
        order = generator.permutation(chosen)
        rounds.append(order[: len(order) - len(order) % size])
    return load_calibration(samples.dataset, np.concatenate(rounds)[: options.ema_batches * size], batch_size)


def _joined(gains: Reports, statistics: Reports) -> Reports:
    """Gains of a convolution and the re-estimated statistics behind it are one report."""
    return {
        **statistics,
        **{
            position: replace(report, written="weights+batchnorm") if position in statistics else report
            for position, report in gains.items()
        },
    }
