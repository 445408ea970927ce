"""Options of a repair, checked.

The command line takes its options from these classes: names, defaults, and the help from the docstrings. Nothing heavy
is imported here, so that help is quick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from onnx_asr.errors import OptionError

FEW_ROWS, FEW_ROWS_RIDGE = 5000, 0.1

Method = Literal["auto", "refit", "paired", "asr", "layerwise", "raw", "bn"]
METHODS: tuple[Method, ...] = get_args(Method)
BatchNormMode = Literal["exact", "ema"]
Prior = Literal["median", "mean"] | float
Options = TypeVar("Options")

_LEAST = {"samples": 1, "gain_samples": 1, "verify_samples": 0, "batch_size": 1, "ema_batches": 1, "ema_batch_size": 2}


def check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Refuse a name that is not among the known ones.

    Raises:
        OptionError: Saying which there are.
    """
    if value not in known:
        raise OptionError(f"{what} '{value}' is unknown: give one of {', '.join(known)}")


def chosen(options: Options | None, kind: type[Options], data: object = None) -> Options:
    """The options that a function was given, or those by default.

    Raises:
        OptionError: When something else stands in their place, or they or a number in the place of the data.
    """
    if isinstance(data, (int, float, kind)):
        raise OptionError(f"the data are {data!r:.80}: give samples, or none, and options={kind.__name__}(...)")
    if options is not None and not isinstance(options, kind):
        raise OptionError(f"the options are {options!r:.80}: give options={kind.__name__}(...)")
    return kind() if options is None else options


def check_time_budget(seconds: float | None) -> None:
    """Refuse a time budget below zero.

    Raises:
        OptionError: Naming the option.
    """
    if seconds is not None and not seconds >= 0:
        raise OptionError(f"time-budget {seconds} is out of range: give seconds from 0 up")


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuse a number below the least one.

    Raises:
        OptionError: Saying what that is.
    """
    if value < least:
        raise OptionError(f"{name.replace('_', '-')} {value} is out of range: give at least {least}")


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one level of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


@dataclass(frozen=True)
class RefitRecipe:
    """The parts of the recipe of ``refit``; each can be switched off.

    Attributes:
        rows: Output positions, sampled over all images, that each layer is fitted on; the last round of ``compress``
            takes twice as many.
        ridge: Strength of the pull toward the dense weights; at least 0.1 where a layer has fewer than 5000 rows.
        relu_steps: Steps that ignore errors which the following ReLU hides; 0 for none.
        gain_power: Exponent of the final gain per channel; 0 for none.
        block_targets: Match the sum behind a residual Add instead of the layer's own output.
        classifier: Refit Gemm and MatMul nodes too.
        class_steps: Steps that lower the KL divergence of a classifier's outputs; 0 for none.
        detection_rows: Share of a detector's positions that are drawn by the dense detector's confidence, image by
            image; 0 for none.
        seed: Seed of the sampled positions.
    """

    rows: int = 12_000
    ridge: float = 1e-2
    relu_steps: int = 3
    gain_power: float = 0.5
    block_targets: bool = True
    classifier: bool = True
    class_steps: int = 20
    detection_rows: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ridge", "gain_power", "relu_steps", "class_steps", "seed"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"{name.replace('_', '-')} {value} is out of range: give a number from 0 up")
        check_at_least("refit-rows", self.rows, 1)
        if not 0 <= self.detection_rows <= 1:
            raise OptionError(f"detection-rows {self.detection_rows} is out of range: give a share, 0 to 1")


@dataclass(frozen=True)
class RepairOptions:
    """How to repair; everything but paths, data and execution.

    Attributes:
        method: Repair method; "auto" tries several and keeps the one closest to the dense model.
        bn: How the methods "bn", "asr", "raw" and "layerwise" re-estimate BatchNormalization: "exact" over all samples,
            or "ema", a moving average over batches as in training.
        momentum: Weight of a new batch in the moving average, 0 < m <= 1.
        ema_batches: Number of batches in the moving average.
        ema_batch_size: Samples per batch in the moving average.
        prior: Variance at which "asr" trusts half of a channel's gain: the layer's "median" or "mean", or a number.
        bias_correction: Let "asr", "raw" and "layerwise" restore the channel means too.
        reliability_power: Exponent k in the gain of "paired", s_d / s_p * rho^k, with the correlation rho of a channel
            with its dense one; 0 trusts every gain fully.
        samples: Calibration samples.
        gain_samples: Samples for the gains of "asr", "raw" and "layerwise"; all calibration samples by default.
        verify_samples: Held-out samples that the result is verified on; 0 to skip the verification.
        batch_size: Samples per run; by default chosen by the size of the input.
        seed: Seed of every random choice.
        refit: Recipe of "refit".
        time_budget: Seconds that "auto" may spend on trying candidates; no limit by default.
        skip_bad_images: Skip images of a folder that cannot be read, and report how many.
        metric: A measure of your own, lower is better, that decides in place of the divergence from the dense model:
            "module:function", found in the current directory or among the installed packages.
    """

    method: Method = "auto"
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
    time_budget: float | None = None
    skip_bad_images: bool = False
    metric: str | Callable[..., float] | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if self.bn not in get_args(BatchNormMode):
            raise OptionError(f"BatchNormalization mode '{self.bn}' is unknown: give 'exact' or 'ema'")
        if isinstance(self.prior, str) and self.prior not in ("median", "mean"):
            raise OptionError(f"prior '{self.prior}' is unknown: give 'median', 'mean' or a number")
        if not isinstance(self.prior, str) and not (math.isfinite(self.prior) and self.prior >= 0):
            raise OptionError(f"prior {self.prior} is out of range: give a number from 0 up")
        if not 0 < self.momentum <= 1:
            raise OptionError(f"momentum {self.momentum} is out of range: give the weight of a new batch, 0 < m <= 1")
        check_time_budget(self.time_budget)
        if not (math.isfinite(self.reliability_power) and self.reliability_power >= 0):
            raise OptionError(f"reliability-power {self.reliability_power} is out of range: give a number from 0 up")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None:
                check_at_least(name, value, least)
