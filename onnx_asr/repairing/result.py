"""Results of a repair."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx

from onnx_asr.graph.skips import Skip
from onnx_asr.json_values import MERGED, key
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.repairing.options import RepairOptions
from onnx_asr.repairing.point_report import PointReport


@dataclass(frozen=True)
class Verification:
    """Fidelity to the dense model on samples that took no part in the calibration.

    Attributes:
        before: The pruned model's.
        after: The repaired model's.
        held_out: Whether the samples were really held out (False where the data had too few).
    """

    derived: ClassVar = ("improved",)

    before: Fidelity
    after: Fidelity
    held_out: bool

    @property
    def improved(self) -> bool:
        """Whether the repair brought the model closer to the dense one, or left it as close as it was."""
        return self.after.distance <= self.before.distance


@dataclass(frozen=True)
class Candidate:
    """A method that "auto" tried on part of the calibration samples.

    Attributes:
        options: Method and settings.
        fidelity: To the dense model, on the held-out samples.
        seconds: Wall time.
    """

    derived: ClassVar = ("method",)

    options: RepairOptions = field(repr=False)
    fidelity: Fidelity = field(metadata=MERGED)
    seconds: float

    @property
    def method(self) -> str:
        """The method, with its setting where that is not the default."""
        if self.options.method == "paired" and self.options.reliability_power:
            return f"paired (rho^{self.options.reliability_power:g})"
        return self.options.method


@dataclass(frozen=True)
class RepairResult:
    """A repaired model and how it came about.

    Attributes:
        model: The repaired copy; the inputs are unchanged.
        options: Method and settings; for "auto", those that it chose.
        candidates: The methods that "auto" tried; empty where a method was given.
        points: Reports of the corrected points, in file order.
        skips: Nodes that were not repaired, and why.
        notes: Notes for the user.
        verification: Fidelity before and after; None without a dense model or where switched off.
        calibration_samples: Number of samples the statistics come from.
        calibration_digest: SHA-256 over these samples.
        sparsity: Share of zeros in the repaired weights, by point, overall.
        seconds: Wall time by stage.
    """

    derived: ClassVar = ("improved", "modified")

    model: onnx.ModelProto = field(repr=False)
    options: RepairOptions
    candidates: tuple[Candidate, ...]
    points: tuple[PointReport, ...]
    skips: tuple[Skip, ...] = field(metadata=key("skipped"))
    notes: tuple[str, ...]
    verification: Verification | None
    calibration_samples: int = field(metadata=key("calibration.samples"))
    calibration_digest: str = field(metadata=key("calibration.sha256"))
    sparsity: float
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> str | None:
        """The candidate that "auto" chose, with what sets it apart; None where a method was given."""
        return next((item.method for item in self.candidates if item.options == self.options), None)

    @property
    def modified(self) -> bool:
        """Whether any parameter was corrected; False where "auto" returns the pruned model unchanged."""
        return bool(self.points)

    @property
    def improved(self) -> bool:
        """Whether the result may replace its input: verified as no worse, or not verified at all."""
        return self.verification is None or self.verification.improved
