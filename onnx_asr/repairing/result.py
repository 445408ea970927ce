"""The result of a repair: at each correction point, and as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx

from onnx_asr.arrays import Floats
from onnx_asr.graph.points import Point
from onnx_asr.graph.skips import Skip
from onnx_asr.json_values import MERGED, key
from onnx_asr.networks.fidelity import Fidelity, Verdict
from onnx_asr.repairing.options import RepairOptions

_NAMED = 3


@dataclass(frozen=True)
class PointReport:
    """The correction at one point.

    Attributes:
        node: Position of the point's node in the file.
        name: The point's node.
        op_type: Its operator.
        written: Where the correction went: "weights", "batchnorm", "weights+batchnorm".
        channels: Number of channels.
        dead: Channels without variance in the pruned network.
        gain: Smallest, median and largest gain; None where statistics were replaced instead.
        residual: Relative error of the point's output before and after a refit; None for channel rules.
        shrinkage: Smallest, median and largest factor on a channel's raw gain (``asr``: ``s``; ``paired``: ``rho^k``);
            None where raw gains are trusted fully.
        converged: Whether the solver of a refit met its tolerance; False where it stopped at its limit of steps.
    """

    node: int
    name: str
    op_type: str
    written: str
    channels: int
    dead: int
    gain: tuple[float, float, float] | None
    residual: tuple[float, float] | None = None
    shrinkage: tuple[float, float, float] | None = None
    converged: bool = True

    @classmethod
    def of(
        cls, point: Point, written: str, dead: int, gain: Floats | None = None, shrinkage: Floats | None = None
    ) -> PointReport:
        """Summarise the gains [C] and shrinkage [C] of a point."""
        place = point.node, point.name, point.kind
        return cls(*place, written, point.channels, dead, _spread(gain), shrinkage=_spread(shrinkage))

    def note(self, method: str) -> str:
        """One sentence for the node's doc string."""
        parts = [f"onnx-resuscitate {method}: {self.written} of {self.channels} channels rewritten"]
        if self.gain is not None:
            parts.append(f"gain {self.gain[0]:.4g} to {self.gain[2]:.4g} (median {self.gain[1]:.4g})")
        if self.residual is not None:
            parts.append(f"relative output error {self.residual[0]:.4g} -> {self.residual[1]:.4g}")
        if self.dead:
            parts.append(f"{self.dead} dead channels")
        return ", ".join(parts)


Reports = dict[int, PointReport]
"""Reports by node position."""


def _spread(values: Floats | None) -> tuple[float, float, float] | None:
    return None if values is None else (float(values.min()), float(np.median(values)), float(values.max()))


def unconverged(reports: Sequence[PointReport]) -> tuple[str, ...]:
    """A note on the refits whose solver stopped at its limit of steps, where there are such."""
    names = [report.name for report in reports if not report.converged]
    if not names:
        return ()
    listed = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return (
        f"conjugate gradients stopped at the limit of steps in {len(names)} of {len(reports)} layers: {listed}; their "
        "weights are approximate: raise --ridge, or check the calibration samples",
    )


@dataclass(frozen=True)
class Verification:
    """Fidelity to the dense model on samples that took no part in the calibration.

    Attributes:
        before: The pruned model's.
        after: That of the model in the result: the repaired one, or the pruned one where that is given back.
        held_out: Whether the samples were really held out (False where the data had too few).
        verdict: Whether the repair brought the model "closer" to the dense one; "equal" where rounding explains the
            difference, or where there was nothing to repair.
        fitted: The repaired model's on some of the samples that ``refit`` fitted it to; None for other methods, where
            no samples were held out, and where the pruned model is given back.
        dense: The dense model's own; for reports.
        labels_error: What is wrong with the labels that the data have, if anything; for reports.
    """

    derived: ClassVar = ("improved",)

    before: Fidelity
    after: Fidelity
    held_out: bool
    verdict: Verdict
    fitted: Fidelity | None = None
    dense: Fidelity | None = field(default=None, repr=False)
    labels_error: str | None = field(default=None, repr=False)

    @property
    def improved(self) -> bool:
        """Whether the repair brought the model closer to the dense one, or left it as close as it was."""
        return self.verdict != "further"


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
        """The candidate that "auto" chose, with what sets it apart; None where a method was given or none helped."""
        return next((item.method for item in self.candidates if self.modified and item.options == self.options), None)

    @property
    def modified(self) -> bool:
        """Whether any parameter was corrected; False where the pruned model is given back."""
        return bool(self.points)

    @property
    def improved(self) -> bool:
        """Whether the result may replace its input: verified as no worse, or not verified at all."""
        return self.verification is None or self.verification.improved
