"""The repair pipeline: pair and survey the networks, walk, edit, verify on held-out samples."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.calibration import Calibration, batch_size_for, input_specs, load_calibration
from onnx_asr.channel_repair import (
    GainMethod,
    PointReport,
    Reports,
    recalibrate_ema,
    recalibrate_exact,
    repair_gains,
    repair_paired,
)
from onnx_asr.data import Dataset, Preprocessing, open_data, sample_indices
from onnx_asr.data.sources import DataSource
from onnx_asr.errors import DataError, OptionError
from onnx_asr.fidelity import Fidelity, Outputs, collect_outputs, compare
from onnx_asr.graph.edit import EditPlan, apply
from onnx_asr.graph.points import Skip
from onnx_asr.model_io import ModelSource, digest, load
from onnx_asr.networks import Execution, Networks
from onnx_asr.numerics.gains import Prior
from onnx_asr.refit_repair import repair_refit
from onnx_asr.refit_samples import RefitRecipe
from onnx_asr.version import __version__

Method = Literal["refit", "paired", "asr", "layerwise", "raw", "bn"]
METHODS: tuple[Method, ...] = get_args(Method)
BatchNormMode = Literal["exact", "ema"]


@dataclass(frozen=True)
class RepairOptions:
    """What a repair does; everything but paths, data and execution.

    Attributes:
        method: Channel rule (method.md).
        bn: How ``bn``, ``asr``, ``raw`` and ``layerwise`` re-estimate BatchNormalization: "exact" over the whole
            calibration set, or "ema", the moving average over batches of the ASR paper.
        momentum: Weight of a new batch in "ema".
        ema_batches: Number of batches in "ema".
        ema_batch_size: Samples a batch in "ema".
        prior: Shrinkage baseline of ``asr``.
        bias_correction: Whether ``asr``, ``raw`` and ``layerwise`` also restore the channel means.
        reliability_power: ``k`` in ``paired``'s gain ``s_d / s_p * rho^k``; 0 trusts every gain fully.
        samples: Calibration samples.
        gain_samples: Samples for the gains of ``asr``, ``raw`` and ``layerwise``; None for all calibration samples.
        verify_samples: Held-out samples for the verification; 0 switches it off.
        batch_size: Samples a run; None chooses by the input's size.
        seed: Of the sample.
        refit: The parts of ``refit``'s recipe.
    """

    method: Method = "paired"
    bn: BatchNormMode = "exact"
    momentum: float = 0.1
    ema_batches: int = 20
    ema_batch_size: int = 128
    prior: Prior = "median"
    bias_correction: bool = True
    reliability_power: float = 0.0
    samples: int = 512
    gain_samples: int | None = None
    verify_samples: int = 256
    batch_size: int | None = None
    seed: int = 0
    refit: RefitRecipe = field(default_factory=RefitRecipe)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"method '{self.method}' is unknown: give one of {', '.join(METHODS)}")
        if self.bn not in get_args(BatchNormMode):
            raise OptionError(f"BatchNormalization mode '{self.bn}' is unknown: give 'exact' or 'ema'")
        if isinstance(self.prior, str) and self.prior not in ("median", "mean"):
            raise OptionError(f"prior '{self.prior}' is unknown: give 'median', 'mean' or a number")
        if not isinstance(self.prior, str) and not (np.isfinite(self.prior) and self.prior >= 0):
            raise OptionError(f"prior {self.prior} is out of range: give a number from 0 up")
        if not 0 < self.momentum <= 1:
            raise OptionError(f"momentum {self.momentum} is out of range: give the weight of a new batch, 0 < m <= 1")
        for name, least in (
            ("samples", 1),
            ("gain_samples", 1),
            ("verify_samples", 0),
            ("batch_size", 1),
            ("ema_batches", 1),
            ("ema_batch_size", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name.replace('_', '-')} {value} is out of range: give at least {least}")


@dataclass(frozen=True)
class Verification:
    """Fidelity to the dense model on samples that took no part in the calibration.

    Attributes:
        before: The pruned model's.
        after: The repaired model's.
        held_out: Whether the samples were really held out (False where the data had too few).
    """

    before: Fidelity
    after: Fidelity
    held_out: bool

    @property
    def improved(self) -> bool:
        """Whether the repair brought the model closer to the dense one, or left it as close as it was."""
        return self.after.distance <= self.before.distance


@dataclass(frozen=True)
class RepairResult:
    """A repaired model and how it came about.

    Attributes:
        model: The repaired copy; the inputs are unchanged.
        options: What was asked for.
        points: What was done at each correction point, in file order.
        skips: What was not repaired, and why.
        notes: What else a user should know.
        verification: Fidelity before and after; None without a dense model or where switched off.
        calibration_samples: Number of samples the statistics come from.
        calibration_digest: SHA-256 over these samples.
        sparsity: Share of zeros in the repaired weights, by point, overall.
        seconds: Wall time by stage.
    """

    model: onnx.ModelProto
    options: RepairOptions
    points: tuple[PointReport, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]
    verification: Verification | None
    calibration_samples: int
    calibration_digest: str
    sparsity: float
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def improved(self) -> bool:
        """Whether the result may replace its input: verified as no worse, or not verified at all."""
        return self.verification is None or self.verification.improved

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        verification = None
        if self.verification is not None:
            verification = {
                "before": self.verification.before.to_dict(),
                "after": self.verification.after.to_dict(),
                "held_out": self.verification.held_out,
                "improved": self.verification.improved,
            }
        return {
            "options": asdict(self.options),
            "improved": self.improved,
            "verification": verification,
            "sparsity": self.sparsity,
            "calibration": {"samples": self.calibration_samples, "sha256": self.calibration_digest},
            "points": [asdict(point) for point in self.points],
            "skipped": [asdict(skip) for skip in self.skips],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def repair(
    pruned: ModelSource,
    data: DataSource | Dataset,
    *,
    dense: ModelSource | None = None,
    options: RepairOptions | None = None,
    preprocessing: Preprocessing | None = None,
    execution: Execution | None = None,
) -> RepairResult:
    """Give a pruned model its accuracy back.

    Args:
        pruned: Path or ModelProto; it is not changed.
        data: Calibration samples, no labels needed: whatever :func:`onnx_asr.data.open_data` takes, or a Dataset.
        dense: The model that ``pruned`` was made from. Without it the running statistics stored in the pruned model's
            BatchNormalization stand in for it, and nothing can be verified.
        options: Method and sizes; the default is ``paired`` on 512 samples.
        preprocessing: What to do to images; see :class:`onnx_asr.data.Preprocessing`.
        execution: Execution providers, memory limit, progress.

    Raises:
        ModelError: A model that cannot be repaired.
        StructureError: ``dense`` and ``pruned`` are not the same network.
        DataError: Missing, broken or unfitting data.
        OptionError: Options that contradict each other or the model.
    """
    options = options or RepairOptions()
    execution = execution or Execution()
    started = time.perf_counter()
    pruned_model = load(pruned)
    dense_model = None if dense is None else load(dense)
    networks = Networks.of(pruned_model, dense_model)
    _check_method(networks, options)
    specs = input_specs(networks.pruned)
    dataset = data if isinstance(data, Dataset) else open_data(data, specs, preprocessing=preprocessing)
    chosen, held_out = split_samples(len(dataset), options, verify=dense_model is not None)
    notes = _notes(networks, options, len(dataset), chosen, held_out)
    execution.progress("loading data", 0.0)
    batch_size = batch_size_for(specs, options.batch_size)
    if options.method not in ("paired", "refit") and options.bn == "ema":
        batch_size = int(np.gcd(batch_size, options.ema_batch_size))
    fixed = specs[0].shape[0] is not None
    calibration = load_calibration(dataset, chosen, batch_size, fixed)
    loaded = time.perf_counter()
    plan, reports = _correct(networks, calibration, dataset, chosen, options, execution)
    for position, report in reports.items():
        plan.notes[position] = report.note(options.method)
    skips = [*networks.survey.skips, *_untouched(networks, reports, options)]
    provenance = _provenance(networks, dense_model, calibration, options)
    model = apply(networks.pruned, plan, provenance)
    repaired = time.perf_counter()
    verification = None
    if dense_model is not None and len(held_out):
        execution.progress("verifying", 0.0)
        is_held_out = not np.isin(held_out, chosen).any()
        verification = _verify(dense_model, pruned_model, model, dataset, held_out, is_held_out, execution)
    execution.progress("done", 1.0)
    seconds = {
        "load": loaded - started,
        "repair": repaired - loaded,
        "verify": time.perf_counter() - repaired,
    }
    return RepairResult(
        model=model,
        options=options,
        points=tuple(reports[position] for position in sorted(reports)),
        skips=tuple(skips),
        notes=tuple(notes),
        verification=verification,
        calibration_samples=calibration.count,
        calibration_digest=calibration.digest,
        sparsity=weight_sparsity(networks),
        seconds=seconds,
    )


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


def weight_sparsity(networks: Networks) -> float:
    """Share of zeros over the weights of all points."""
    zeros = total = 0
    for point in networks.survey.points:
        if point.weight_slot is not None:
            value = networks.pruned.value(networks.pruned.nodes[point.node].input[point.weight_slot])
            zeros += int((value == 0).sum())
            total += value.size
    return zeros / max(1, total)


def _check_method(networks: Networks, options: RepairOptions) -> None:
    with_batchnorm = [point for point in networks.survey.points if point.batchnorm is not None]
    if with_batchnorm:
        return
    if options.method == "bn":
        raise OptionError(
            "method 'bn' re-estimates BatchNormalization, and the model has none (it was folded into the "
            "convolutions): use --method paired with --dense"
        )
    if networks.dense is None:
        raise OptionError(
            f"method '{options.method}' without a dense model needs stored BatchNormalization statistics, and the "
            "model has no BatchNormalization: give the dense model (--dense)"
        )


def _correct(
    networks: Networks,
    calibration: Calibration,
    dataset: Dataset,
    chosen: NDArray[np.int64],
    options: RepairOptions,
    execution: Execution,
) -> tuple[EditPlan, Reports]:
    plan = EditPlan()
    if options.method == "paired":
        return plan, repair_paired(networks, calibration, execution, plan, options.reliability_power)
    if options.method == "refit":
        return plan, repair_refit(networks, calibration, execution, plan, options.refit)
    reports: Reports = {}
    if options.method != "bn":
        gain_set = calibration if options.gain_samples is None else calibration.head(options.gain_samples)
        method: GainMethod = options.method
        reports = repair_gains(networks, gain_set, execution, plan, method, options.prior, options.bias_correction)
    if not any(point.batchnorm is not None for point in networks.survey.points):
        return plan, reports
    if options.bn == "exact":
        statistics = recalibrate_exact(networks, calibration, execution, plan)
    else:
        batches = _ema_batches(dataset, chosen, calibration.batch_size, options)
        statistics = recalibrate_ema(networks, batches, execution, plan, options.momentum, options.ema_batch_size)
    return plan, _joined(reports, statistics)


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
    return load_calibration(dataset, order, batch_size, fixed=True)


def _joined(gains: Reports, statistics: Reports) -> Reports:
    """Gains of a convolution and the re-estimated statistics behind it are one report."""
    merged = dict(statistics)
    for position, report in gains.items():
        written = "weights+batchnorm" if position in statistics else report.written
        merged[position] = PointReport(
            report.name, report.op_type, written, report.channels, report.dead, report.gain, report.residual
        )
    return merged


def _untouched(networks: Networks, reports: Reports, options: RepairOptions) -> list[Skip]:
    """Points the method leaves alone, with the reason."""
    first = networks.first_layers()
    skips = []
    for point in networks.survey.points:
        if point.node in reports:
            continue
        if options.method == "bn":
            reason = "no BatchNormalization belongs to it; method 'bn' changes nothing else"
        elif networks.dense is None:
            reason = "no BatchNormalization belongs to it, and there is no dense model to compare with"
        elif point.node in first:
            reason = f"first layer: method '{options.method}' leaves it alone"
        else:
            reason = f"method '{options.method}' scales convolutions only"
        skips.append(Skip(point.node, point.name, point.kind, reason))
    return skips


def _notes(
    networks: Networks,
    options: RepairOptions,
    available: int,
    chosen: NDArray[np.int64],
    held_out: NDArray[np.int64],
) -> list[str]:
    notes = []
    if networks.dense is None:
        notes.append(
            "no dense model: the running statistics stored in the pruned model's BatchNormalization are the reference, "
            "and the result was not verified"
        )
    if len(chosen) < options.samples:
        notes.append(f"{len(chosen)} calibration samples of the {options.samples} asked for: the data have {available}")
    if len(held_out) and np.isin(held_out, chosen).any():
        notes.append("too few samples to hold any out: the verification used calibration samples")
    if options.method in ("asr", "raw", "layerwise") and options.bn == "exact":
        notes.append(
            f"before an exactly re-estimated BatchNormalization the gains of '{options.method}' cancel: there it "
            "equals 'bn' (use --bn ema for the paper's protocol)"
        )
    return notes


def _provenance(
    networks: Networks, dense: onnx.ModelProto | None, calibration: Calibration, options: RepairOptions
) -> dict[str, str]:
    entries = {
        "onnx_asr.version": __version__,
        "onnx_asr.method": options.method,
        "onnx_asr.options": json.dumps(asdict(options), sort_keys=True),
        "onnx_asr.calibration": f"{calibration.count} samples, sha256 {calibration.digest}",
        "onnx_asr.sparsity": f"{weight_sparsity(networks):.6f}",
    }
    if dense is not None:
        entries["onnx_asr.dense_sha256"] = digest(dense)
    return entries


def _verify(
    dense: onnx.ModelProto,
    pruned: onnx.ModelProto,
    repaired: onnx.ModelProto,
    dataset: Dataset,
    indices: Sequence[int] | NDArray[np.int64],
    held_out: bool,
    execution: Execution,
) -> Verification:
    def outputs(model: onnx.ModelProto) -> Outputs:
        return collect_outputs(model, dataset, indices, execution.runtime)

    reference = outputs(dense)
    return Verification(compare(reference, outputs(pruned)), compare(reference, outputs(repaired)), held_out)
