"""What a model measures beside the bars that it has to clear: a gate in continuous integration."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx

from onnx_asr.engine.loading import load
from onnx_asr.errors import OptionError
from onnx_asr.graph.external import data_files
from onnx_asr.graph.model_io import ModelSource
from onnx_asr.measuring.bars import AGAINST_DENSE, Bars, measure_of, option_of
from onnx_asr.measuring.inspection import describe
from onnx_asr.networks.cost import byte_size
from onnx_asr.networks.fidelity import Fidelity


@dataclass(frozen=True)
class Criterion:
    """One bar, and whether it was cleared.

    Attributes:
        name: Of the bar, as in :class:`Bars`.
        bar: Its value.
        measured: What the model measured; NaN where its outputs are not finite, which clears no bar.
    """

    derived: ClassVar = ("passed",)

    name: str
    bar: float
    measured: float

    @property
    def passed(self) -> bool:
        """Whether the bar was cleared; a value equal to the bar clears it."""
        return self.measured >= self.bar if self._is_least else self.measured <= self.bar

    def __str__(self) -> str:
        side = "below" if self._is_least else "above"
        verdict = "clears" if self.passed else f"is {side}" if math.isfinite(self.measured) else "does not clear"
        return f"{measure_of(self.name)} {self.measured:.6g} {verdict} {option_of(self.name)} {self.bar:.15g}"

    @property
    def _is_least(self) -> bool:
        return self.name.startswith("min_")


@dataclass(frozen=True)
class CheckResult:
    """The bars of a model, each with what was measured.

    Attributes:
        criteria: In the order of :class:`Bars`.
        fidelity: Quality of the outputs, where a bar asks for it.
    """

    derived: ClassVar = ("passed",)

    criteria: tuple[Criterion, ...]
    fidelity: Fidelity | None

    @property
    def passed(self) -> bool:
        """Whether all bars were cleared."""
        return not self.missed

    @property
    def missed(self) -> tuple[Criterion, ...]:
        """The bars that were not cleared."""
        return tuple(criterion for criterion in self.criteria if not criterion.passed)


def check(model: ModelSource, bars: Bars, fidelity: Fidelity | None = None) -> CheckResult:
    """Compare what a model measures with bars.

    Args:
        model: A path, or an object of onnx, onnx-graphsurgeon or onnx-ir.
        bars: The least and the most that it may measure.
        fidelity: What :func:`onnx_asr.evaluate` measured; bars on size and sparsity need none.

    Returns:
        Every bar with its measure; :attr:`CheckResult.passed` is the verdict.

    Raises:
        ModelError: A model that cannot be read.
        OptionError: A bar on a measure that the fidelity, or a model without floating-point weights, does not have.
    """
    network = load(model)
    criteria = []
    for name, bar in bars.given.items():
        measure = measure_of(name)
        if measure == "size":
            measured: float | None = _bytes_of(model, network)
        elif measure == "sparsity":
            measured = _sparsity(network)
        else:
            measured = None if fidelity is None else getattr(fidelity, measure)
        if measured is None:
            raise OptionError(f"{option_of(name)} does not apply: {_why_missing(measure, fidelity)}")
        criteria.append(Criterion(name, bar, measured))
    return CheckResult(tuple(criteria), fidelity)


def _why_missing(measure: str, fidelity: Fidelity | None) -> str:
    if fidelity is None:
        return "it is measured on samples: give what evaluate measured on them"
    if measure in ("top1", "top5"):
        return (
            "the data have no labels: give one sub-folder of images per class, --labels TABLE for a folder, or "
            "'labels' in an .npz"
        )
    if measure in ("mean_ap", "mean_ap50"):
        return "no boxes were given to compare with: give them with --annotations and --decode"
    if all(getattr(fidelity, name) is None for name in AGAINST_DENSE):
        return "the model was not compared with a dense one: give it with --dense"
    if measure == "metric":
        return "no metric was measured: give one with --metric"
    bars = ("min_snr_db", "min_agreement", "max_kl", "max_detection_error")
    having = [option_of(name) for name in bars if getattr(fidelity, measure_of(name)) is not None]
    return f"the outputs of these models have no {measure.replace('_', ' ')}: give {' or '.join(having)}"


def _bytes_of(source: ModelSource, network: onnx.ModelProto) -> int:
    """Bytes on the disk where there is a file, else of the model in memory."""
    if not isinstance(source, (str, os.PathLike)):
        return byte_size(network)
    path = Path(source)
    return sum(file.stat().st_size for file in {path, *data_files(path)})


def _sparsity(network: onnx.ModelProto) -> float:
    found = describe(network, all_quantized=True)
    if not any(layer.weights for layer in found.layers):
        raise OptionError("min-sparsity does not apply: the model has no layer with floating-point weights")
    return found.sparsity
