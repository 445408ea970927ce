"""Options of the pruning commands, checked; nothing heavy is imported here, so that help is quick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from onnx_asr.errors import OptionError
from onnx_asr.numerics.patterns import Pattern, check_share, check_sparsity
from onnx_asr.repairing.options import RepairOptions, check_at_least, check_choice, check_time_budget
from onnx_asr.targets.rules import RUNTIMES, TARGETS, RuntimeName

Score = Literal["magnitude", "row", "lamp", "activation", "variance", "gram"]
SCORES: tuple[Score, ...] = get_args(Score)
DATA_AWARE: tuple[Score, ...] = ("activation", "variance", "gram")

Scope = Literal["global", "mixed", "erk", "layer", "sensitivity", "auto"]
"""How zeros are shared out between the layers."""
CompressScope = Literal["auto", "global", "mixed", "erk"]
"""How ``compress`` shares zeros out between the layers."""
MEASURED: tuple[Scope, ...] = ("sensitivity", "auto")
"""Scopes that need data."""
ChannelScope = Literal["layer", "global"]
"""Where scores of channels are compared."""
Measure = Literal["latency", "size", "flops"]

SENSITIVITY_SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Sparsities at which every layer is tried."""


@dataclass(frozen=True)
class Budget:
    """A limit on the cost of a pruned model.

    Attributes:
        measure: "latency": of a run in onnxruntime, for whole channels. "size": bytes of the file where channels are
            removed, bytes after gzip where weights become zeros. "flops": of the smaller model, or those with a nonzero
            weight.
        limit: Share of what the dense model costs, above 0 and below 1; a size may be a number of bytes instead.
    """

    measure: Measure
    limit: float

    def __post_init__(self) -> None:
        in_bytes = self.measure == "size" and self.limit >= 1
        if not (math.isfinite(self.limit) and (0 < self.limit < 1 or in_bytes)):
            more = ", or a number of bytes such as 500kB" if self.measure == "size" else ""
            raise OptionError(
                f"target-{self.measure} {self.limit:g} is out of range: give a share of the dense model's, above 0 and "
                f"below 1{more}"
            )

    def of(self, dense: float) -> float:
        """The limit in units of what the dense model costs.

        Raises:
            OptionError: When the dense model already keeps within it.
        """
        limit = self.limit if self.limit >= 1 else self.limit * dense
        if limit >= dense:
            raise OptionError(
                f"target-size {limit:,.0f} is not below the {dense:,.0f} bytes of the given model: give fewer bytes"
            )
        return limit


class _Goal:
    """A sparsity, or one of the targets in its place."""

    sparsity: float | None

    @property
    def budget(self) -> Budget | None:
        """The target, where there is one in place of a sparsity.

        Raises:
            OptionError: When there are several, one beside a sparsity, or one out of range.
        """
        limits = {measure: getattr(self, f"target_{measure}", None) for measure in get_args(Measure)}
        given = [Budget(measure, limit) for measure, limit in limits.items() if limit is not None]
        if len(given) > 1:
            names = " and ".join(f"target-{budget.measure}" for budget in given)
            raise OptionError(f"{names} each say how much to prune: give one of them")
        if given and self.sparsity is not None:
            raise OptionError(f"sparsity and target-{given[0].measure} both say how much to prune: give one of them")
        return given[0] if given else None


@dataclass(frozen=True)
class PruneOptions(_Goal):
    """Which weights to zero, and how many.

    Attributes:
        sparsity: Share of weights (or blocks) to zero, 0 <= S < 1. N:M patterns and targets take its place.
        target_size: Prune until the file, after gzip, has this share of the dense model's bytes, or this number of
            bytes.
        target_flops: Prune until this share of the dense model's FLOPs has a nonzero weight.
        pattern: "unstructured"; "N:M" keeps N of every M consecutive input channels, such as 2:4; "Nx1" prunes N
            consecutive output channels together at each input position, such as 4x1.
        target: Leave layers dense whose zeros this runtime would not make use of, by its documentation (see
            ``inspect``).
        scope: "global" ranks over the whole net; "erk" (Erdos-Renyi-kernel) spares small layers; "mixed" is halfway
            between the two; "layer" gives all layers one sparsity; "sensitivity" tries every layer on the data and
            allocates zeros where they cost least; "auto" tries global, mixed and erk on the data.
        score: What a weight is worth. "activation", "variance" and "gram" need data; "row" and "variance" suit nets
            whose BatchNormalization was folded.
        include: Prune only nodes or weights whose name matches one of these regular expressions; empty for all that
            were trained, which leaves out blur kernels and the like.
        exclude: Spare nodes or weights whose name matches one of these regular expressions.
        samples: Samples to draw from the data.
        seed: Seed of the draw, and of the order of equal scores.
    """

    derived: ClassVar[tuple[str, ...]] = ("budget",)

    sparsity: float | None = None
    target_size: float | None = field(default=None, kw_only=True)
    target_flops: float | None = field(default=None, kw_only=True)
    pattern: str = "unstructured"
    target: RuntimeName | None = field(default=None, kw_only=True)
    scope: Scope = "global"
    score: Score = "magnitude"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    samples: int = RepairOptions.samples
    seed: int = 0

    def __post_init__(self) -> None:
        shape, budget = Pattern.parse(self.pattern), self.budget
        if budget is None:
            check_sparsity(self.sparsity, shape)
        elif shape.n is not None:
            raise OptionError(f"pattern {shape} sets the sparsity itself: drop target-{budget.measure}")
        check_target(self.target, shape)
        check_choice("scope", self.scope, get_args(Scope))
        check_choice("score", self.score, SCORES)
        if self.scope != "global":
            _check_shared_out(shape, self.scope)
        if self.scope == "auto" and budget is not None:
            raise OptionError(f"scope 'auto' tries one sparsity: drop target-{budget.measure}, or choose another scope")
        check_at_least("samples", self.samples, 1)
        check_at_least("seed", self.seed, 0)

    @property
    def needs_data(self) -> str | None:
        """The option that needs calibration samples, if any does."""
        if self.score in DATA_AWARE:
            return f"score '{self.score}'"
        return f"scope '{self.scope}'" if self.scope in MEASURED else None


@dataclass(frozen=True)
class ChannelPruneOptions(_Goal):
    """Which channels to remove, and how many.

    Attributes:
        sparsity: Share of channels to remove, 0 <= S < 1. A target takes its place.
        target_latency: Prune until a run in onnxruntime takes this share of the dense model's time; measured.
        target_size: Prune until the file has this share of the dense model's bytes, or this number of bytes.
        target_flops: Prune until this share of the dense model's FLOPs is left.
        scope: "layer" ranks within each group of coupled channels; "global" over the whole net.
        multiple: Leave multiples of this number of channels; kernels are fastest at multiples of 8 or 16.
        include: Prune only layers whose node or weight name matches one of these regular expressions; empty for all
            that were trained, which leaves out blur kernels and the like.
        exclude: Spare layers whose node or weight name matches one of these regular expressions.
    """

    pattern: ClassVar[str] = "channel"
    derived: ClassVar[tuple[str, ...]] = ("budget", "pattern")

    sparsity: float | None = None
    target_latency: float | None = field(default=None, kw_only=True)
    target_size: float | None = field(default=None, kw_only=True)
    target_flops: float | None = field(default=None, kw_only=True)
    scope: ChannelScope = "layer"
    multiple: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.budget is None:
            check_share(self.sparsity, "channels to remove")
        check_choice("scope", self.scope, get_args(ChannelScope))
        check_at_least("multiple", self.multiple, 1)


@dataclass(frozen=True)
class SensitivityOptions:
    """Sparsities to try in every layer.

    Attributes:
        sparsities: Sparsities to try every layer at, each above 0 and below 1.
        score: What a weight is worth, as in ``prune``.
        include: Prune only nodes or weights whose name matches one of these regular expressions; empty for all that
            were trained, which leaves out blur kernels and the like.
        exclude: Spare nodes or weights whose name matches one of these regular expressions.
        repair: Samples, seed and refit recipe; the method is always ``refit``.
    """

    sparsities: Sequence[float] = SENSITIVITY_SPARSITIES
    score: Score = "magnitude"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    repair: RepairOptions = field(default_factory=RepairOptions)

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)
        if not [check_share(share, "weights to zero") for share in self.sparsities] or 0 in self.sparsities:
            raise OptionError("sparsities have to be above 0: give at least one, such as 0.5,0.9")
        if self.repair.verify_samples < 1:
            raise OptionError("verify-samples 0 leaves no samples to measure on: give at least 1")


@dataclass(frozen=True)
class CompressOptions:
    """How to prune and repair in rounds.

    Attributes:
        sparsity: Share of weights (or blocks) to zero, 0 <= S < 1. N:M patterns take its place.
        pattern: "unstructured", "N:M" or "Nx1", as in ``prune``.
        target: Leave layers dense whose zeros this runtime would not make use of, by its documentation (see
            ``inspect``).
        scope: How zeros are shared out between the layers: "global", "mixed" or "erk" as in ``prune``; "auto" tries the
            three with a quick refit, and keeps to "global" unless another comes clearly closer to the dense model.
        rounds: Mask rounds; for N:M at most ``m - n``.
        round_samples: Samples of every round but the last, as a share of all.
        include: Prune only nodes or weights whose name matches one of these regular expressions; empty for all that
            were trained, which leaves out blur kernels and the like.
        exclude: Spare nodes or weights whose name matches one of these regular expressions.
        time_budget: Seconds within which to end, judged by what was done so far: if need be with fewer rounds, in the
            end with the last one alone, and with fewer scopes tried; no limit by default.
        repair: Samples, seed and refit recipe; the method is always ``refit``.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    target: RuntimeName | None = field(default=None, kw_only=True)
    scope: CompressScope = "auto"
    rounds: int = 5
    round_samples: float = 0.5
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    time_budget: float | None = None
    repair: RepairOptions = field(default_factory=RepairOptions)

    def __post_init__(self) -> None:
        pattern = Pattern.parse(self.pattern)
        check_sparsity(self.sparsity, pattern)
        check_target(self.target, pattern)
        check_choice("scope", self.scope, get_args(CompressScope))
        if self.scope != "auto":
            _check_shared_out(pattern, self.scope)
        check_at_least("rounds", self.rounds, 1)
        check_time_budget(self.time_budget)
        if not 0 < self.round_samples <= 1:
            raise OptionError(f"round-samples {self.round_samples} is out of range: give a share, 0 < share <= 1")


def _check_shared_out(pattern: Pattern, scope: str) -> None:
    if pattern.n is not None:
        raise OptionError(f"pattern {pattern} sets the sparsity of every layer: drop --scope {scope}")


def check_target(target: RuntimeName | None, pattern: Pattern) -> None:
    """Check that a runtime is known, and makes use of zeros in a pattern.

    Raises:
        OptionError: Otherwise.
    """
    if target is None:
        return
    check_choice("target", target, RUNTIMES)
    wanted = TARGETS[target].pattern
    if wanted is not None and str(pattern) != wanted:
        raise OptionError(
            f"target {target} makes use of {wanted} zeros alone, not of pattern {pattern}: give --pattern {wanted}, or "
            "drop --target"
        )
