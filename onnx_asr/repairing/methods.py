"""What each repair method needs, does and leaves alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from onnx_asr.data import Dataset
from onnx_asr.errors import DataError, OptionError
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.points import NormPoint, skip
from onnx_asr.graph.skips import Reason, Skip
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import Networks
from onnx_asr.networks.samples import Calibration, load_calibration
from onnx_asr.repairing.channelwise import batchnorm_track, gain_track, paired_track, walk
from onnx_asr.repairing.moving_average import recalibrate_ema
from onnx_asr.repairing.options import Method, RepairOptions
from onnx_asr.repairing.point_report import Reports
from onnx_asr.repairing.refit import repair_refit

ONLY_BATCHNORM = Reason(
    "no-batchnorm", "no BatchNormalization belongs to it; method 'bn' changes only BatchNormalizations"
)
NO_DENSE = Reason(
    "no-batchnorm-no-dense", "no BatchNormalization belongs to it, and there is no dense model to compare with"
)
MATCHED_BEFORE = Reason("matched-upstream", "its input is already matched by the refit of the layers before it")
CLASSIFIER_OFF = Reason("classifier-off", "the refit of Gemm and MatMul nodes is switched off")
FIRST_LAYER = Reason("first-layer", "first layer: method '{method}' does not change it")
CONVOLUTIONS_ONLY = Reason("convolutions-only", "method '{method}' scales only convolutions")


def check_method(method: Method, *, dense: bool, batchnorm: bool) -> None:
    """Refuse a method that can do nothing for a pruned network.

    Args:
        method: The method.
        dense: Whether the dense network is there, too.
        batchnorm: Whether the pruned one has a BatchNormalization that can be corrected.

    Raises:
        OptionError: Saying which one can.
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


def correct(
    networks: Networks,
    dataset: Dataset,
    chosen: NDArray[np.int64],
    calibration: Calibration,
    options: RepairOptions,
    execution: Execution,
) -> tuple[EditPlan, Reports]:
    """The edits of a method, and what they do at each point.

    Args:
        networks: The pruned network, with the dense one where there is one.
        dataset: All samples; ``--bn ema`` draws its batches from them.
        chosen: Indices of the calibration samples.
        calibration: These samples, prepared.
        options: The method, any but "auto", and its settings.
        execution: Execution providers, memory limit, progress.

    Raises:
        ModelError: When the activations of a network are not finite.
        DataError: When the samples do not fill a batch of ``--bn ema``.
    """
    plan = EditPlan()
    if options.method == "refit":
        return plan, repair_refit(networks, calibration, execution, plan, options.refit)
    if options.method == "paired":
        track = paired_track(networks, plan, options.reliability_power)
        walk(networks, [track], calibration, execution)
        return plan, track.reports
    gains: Reports = {}
    if options.method != "bn":
        assert options.method in ("asr", "raw", "layerwise")
        track = gain_track(networks, plan, options.method, options.prior, options.bias_correction)
        gain_set = calibration if options.gain_samples is None else calibration.head(options.gain_samples)
        walk(networks, [track], gain_set, execution)
        gains = track.reports
    if not networks.survey.has_batchnorm:
        return plan, gains
    if options.bn == "exact":
        track = batchnorm_track(networks, plan)
        walk(networks, [track], calibration, execution)
        return plan, _joined(gains, track.reports)
    batches = _ema_batches(dataset, chosen, calibration.batch_size, options)
    statistics = recalibrate_ema(networks, batches, execution, plan, options.momentum, options.ema_batch_size)
    return plan, _joined(gains, statistics)


def _ema_batches(dataset: Dataset, chosen: NDArray[np.int64], batch_size: int, options: RepairOptions) -> Calibration:
    """``ema_batches`` batches drawn in a seeded order, round after round where the samples do not suffice."""
    if len(chosen) < options.ema_batch_size:
        raise DataError(
            f"--bn ema needs {options.ema_batch_size} samples a batch, {len(chosen)} are there: "
            "give more images or a smaller --ema-batch-size"
        )
    generator = np.random.default_rng(options.seed)
    rounds = []
    for _ in range(-(-options.ema_batches // (len(chosen) // options.ema_batch_size))):
        order = generator.permutation(chosen)
        rounds.append(order[: len(order) - len(order) % options.ema_batch_size])
    order = np.concatenate(rounds)[: options.ema_batches * options.ema_batch_size]
    return load_calibration(dataset, order, batch_size)


def _joined(gains: Reports, statistics: Reports) -> Reports:
    """Gains of a convolution and the re-estimated statistics behind it are one report."""
    return {
        **statistics,
        **{
            position: replace(report, written="weights+batchnorm") if position in statistics else report
            for position, report in gains.items()
        },
    }


def untouched(networks: Networks, reports: Reports, options: RepairOptions) -> list[Skip]:
    """Points the method leaves alone, with the reason."""
    first = networks.first_layers()
    skips = []
    for point in networks.survey.points:
        if point.node in reports:
            continue
        if options.method == "bn":
            reason = ONLY_BATCHNORM
        elif networks.dense is None:
            reason = NO_DENSE
        elif options.method == "refit" and isinstance(point, NormPoint):
            reason = MATCHED_BEFORE
        elif options.method == "refit":
            reason = CLASSIFIER_OFF
        elif point.node in first:
            reason = FIRST_LAYER.format(method=options.method)
        else:
            reason = CONVOLUTIONS_ONLY.format(method=options.method)
        skips.append(skip(point, reason))
    return skips
