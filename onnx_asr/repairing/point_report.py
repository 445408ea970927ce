"""Report of a repair at one correction point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_asr.arrays import Floats
from onnx_asr.graph.points import Point

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
        cls,
        point: Point,
        written: str,
        dead: int,
        gain: Floats | None = None,
        residual: tuple[float, float] | None = None,
        shrinkage: Floats | None = None,
        converged: bool = True,
    ) -> PointReport:
        """Summarise the gains of a point."""
        return cls(
            node=point.node,
            name=point.name,
            op_type=point.kind,
            written=written,
            channels=point.channels,
            dead=dead,
            gain=_spread(gain),
            residual=residual,
            shrinkage=_spread(shrinkage),
            converged=converged,
        )

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


Reports = dict[int, PointReport]
"""Reports by node position."""
