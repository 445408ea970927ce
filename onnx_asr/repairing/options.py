"""What a repair can be asked to do, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from onnx_asr.errors import OptionError
from onnx_asr.numerics.gains import Prior

FEW_ROWS, FEW_ROWS_RIDGE = 5000, 0.1

Method = Literal["auto", "refit", "paired", "asr", "layerwise", "raw", "bn"]
METHODS: tuple[Method, ...] = get_args(Method)
SWEEP_METHODS = ("none", *reversed(METHODS), "compress")
"""What the cells of a sweep are made by: no repair, one of the methods, or pruning and repair in rounds."""
BatchNormMode = Literal["exact", "ema"]
Score = Literal["magnitude", "row", "lamp", "activation", "variance", "gram"]
SCORES: tuple[Score, ...] = get_args(Score)
DATA_AWARE: tuple[Score, ...] = ("activation", "variance", "gram")

SENSITIVITY_SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Sparsities that every layer is tried at."""


def check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Refuse a name that is not among the known ones.

    Raises:
        OptionError: Saying which there are.
    """
    if value not in known:
        raise OptionError(f"{what} '{value}' is unknown: give one of {', '.join(known)}")


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
    """The parts of the recipe; each can be switched off.

    Attributes:
        rows: Sampled output positions a point, over all images; the last round of ``compress`` takes twice as many.
        ridge: Pull toward the dense weights; where there are few rows at least ``FEW_ROWS_RIDGE``.
        relu_steps: ReLU-aware steps; 0 switches them off.
        gain_power: Exponent of the final gain; 0 switches it off.
        block_targets: Match the sum at residual Adds.
        classifier: Refit Gemm and MatMul nodes, too.
        class_steps: Steps that bring the classes' probabilities closer to the dense network's; 0 switches them off.
        seed: Of the positions.
    """

    rows: int = 12_000
    ridge: float = 1e-2
    relu_steps: int = 3
    gain_power: float = 0.5
    block_targets: bool = True
    classifier: bool = True
    class_steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ridge", "gain_power", "relu_steps", "class_steps", "seed"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise OptionError(f"{name.replace('_', '-')} {value} is out of range: give a number from 0 up")
        check_at_least("refit-rows", self.rows, 1)


@dataclass(frozen=True)
class RepairOptions:
    """What a repair does; everything but paths, data and execution.

    Attributes:
        method: What to repair with; "auto" tries several and keeps the one closest to the dense model.
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
        time_budget: Seconds that "auto" may spend on trying candidates; None for no limit.
        skip_bad_images: Pass over the files of an image folder that cannot be read, instead of refusing it.
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

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if self.bn not in get_args(BatchNormMode):
            raise OptionError(f"BatchNormalization mode '{self.bn}' is unknown: give 'exact' or 'ema'")
        if isinstance(self.prior, str) and self.prior not in ("median", "mean"):
            raise OptionError(f"prior '{self.prior}' is unknown: give 'median', 'mean' or a number")
        if not isinstance(self.prior, str) and not (np.isfinite(self.prior) and self.prior >= 0):
            raise OptionError(f"prior {self.prior} is out of range: give a number from 0 up")
        if not 0 < self.momentum <= 1:
            raise OptionError(f"momentum {self.momentum} is out of range: give the weight of a new batch, 0 < m <= 1")
        if self.time_budget is not None and not self.time_budget >= 0:
            raise OptionError(f"time-budget {self.time_budget} is out of range: give seconds from 0 up")
        if not (np.isfinite(self.reliability_power) and self.reliability_power >= 0):
            raise OptionError(f"reliability-power {self.reliability_power} is out of range: give a number from 0 up")
        for name, least in (
            ("samples", 1),
            ("gain_samples", 1),
            ("verify_samples", 0),
            ("batch_size", 1),
            ("ema_batches", 1),
            ("ema_batch_size", 2),
        ):
            value = getattr(self, name)
            if value is not None:
                check_at_least(name, value, least)
