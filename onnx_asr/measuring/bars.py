"""Bars that a model has to clear."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from onnx_asr.errors import OptionError

_OF_THE_FILE = ("sparsity", "size")
AGAINST_DENSE = ("agreement", "kl", "snr_db", "detection_error", "metric")
_SIGNED = ("snr_db", "metric")
_SHARES = ("top1", "top5", "agreement", "mean_ap", "mean_ap50", "sparsity")


@dataclass(frozen=True)
class Bars:
    """The least and the most that a model may measure; None leaves a measure out.

    Attributes:
        min_top1: Least share of samples whose largest output is the label's class.
        min_top5: Least share of samples whose label is among the five largest outputs.
        min_agreement: Least share of samples with the same largest output as the dense model.
        max_kl: Largest mean KL divergence from the dense model, in nats.
        min_snr_db: Least signal-to-noise ratio of the outputs against the dense model's, in decibels.
        max_detection_error: Largest distance of what a detector finds from what the dense model finds.
        min_mean_ap: Least mAP@[.5:.95] of a detector, a share (0.27, not 27); needs --annotations.
        min_mean_ap50: Least mAP@.5 of a detector.
        max_metric: Largest value of a measure of your own (--metric), for which lower is better.
        min_sparsity: Least share of zeros in the weights of all layers, as inspect counts them.
        max_size: Most bytes of the file, with the files of weights beside it; a number with a unit, such as 5MB.

    Raises:
        OptionError: No bar, or one out of range.
    """

    min_top1: float | None = None
    min_top5: float | None = None
    min_agreement: float | None = None
    max_kl: float | None = None
    min_snr_db: float | None = None
    max_detection_error: float | None = None
    min_mean_ap: float | None = None
    min_mean_ap50: float | None = None
    max_metric: float | None = None
    min_sparsity: float | None = None
    max_size: int | None = None

    def __post_init__(self) -> None:
        if not self.given:
            names = ", ".join(option_of(item.name) for item in fields(self))
            raise OptionError(f"there is no bar to check: give at least one of {names}")
        for name, bar in self.given.items():
            measure, shown = measure_of(name), option_of(name)
            if measure in _SHARES and not 0 <= bar <= 1:
                raise OptionError(f"{shown} {bar:g} is out of range: give a share from 0 to 1")
            if not math.isfinite(bar) or (bar < 0 and measure not in _SIGNED):
                raise OptionError(f"{shown} {bar:g} is out of range: give a number of 0 or more")

    @property
    def given(self) -> dict[str, float]:
        """The bars by name, without those left out."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name)) is not None}

    def check_measurable(
        self, *, data: bool, dense: bool, labels: bool = False, metric: bool = False, annotations: bool = False
    ) -> None:
        """Refuse bars that nothing will be measured for, and what no bar needs; called before any work.

        Raises:
            OptionError: A bar on outputs without data, or on closeness to a dense model without one; data, a dense
                model, a table of labels, a metric or annotations without any bar that needs them.
        """
        of_outputs = [name for name in self.given if measure_of(name) not in _OF_THE_FILE]
        against_dense = [name for name in of_outputs if measure_of(name) in AGAINST_DENSE]
        if of_outputs and not data:
            raise OptionError(f"{option_of(of_outputs[0])} is measured on samples: give them with --data")
        if against_dense and not dense:
            raise OptionError(
                f"{option_of(against_dense[0])} is measured against the dense model: give it with --dense"
            )
        if data and not of_outputs:
            raise OptionError(
                "no bar needs the data: drop --data, or give a bar on what is measured on them, such as min-agreement"
            )
        measures = {measure_of(name) for name in self.given}
        for option, given, served in (
            ("dense", dense, AGAINST_DENSE),
            ("labels", labels, ("top1", "top5")),
            ("metric", metric, ("metric",)),
            ("annotations", annotations, ("mean_ap", "mean_ap50")),
        ):
            if given and not measures.intersection(served):
                fitting = [option_of(item.name) for item in fields(self) if measure_of(item.name) in served]
                raise OptionError(f"no bar needs --{option}: drop it, or give {' or '.join(fitting)}")


def measure_of(name: str) -> str:
    """The measure that a bar is for: "kl" for "max_kl"."""
    return name.partition("_")[2]


def option_of(name: str) -> str:
    """How a message, or the command line behind two hyphens, calls a bar."""
    return name.replace("_", "-")
