"""The cells of a sweep: goals of pruning, each repaired by every method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

from onnx_asr.errors import OptionError
from onnx_asr.json_values import MERGED
from onnx_asr.numerics.patterns import Pattern, check_share
from onnx_asr.pruning.options import SCORES, SENSITIVITY_SPARSITIES, Scope, Score
from onnx_asr.repairing.options import METHODS, RepairOptions, check_at_least, check_choice

SWEEP_METHODS = ("none", *reversed(METHODS), "compress")
"""Methods of a sweep: no repair, a method of ``repair``, or pruning and repair in rounds."""
CHANNEL = "channel"


@dataclass(frozen=True)
class PruneGoal:
    """One way to prune, shared by all methods.

    Attributes:
        pattern: "unstructured", "N:M", "Nx1" or "channel".
        sparsity: Share of weights, blocks or channels; None where the pattern sets it.
    """

    pattern: str
    sparsity: float | None

    @property
    def share(self) -> float:
        """Fraction pruned: the requested sparsity, or the one that the pattern implies."""
        if self.sparsity is not None:
            return self.sparsity
        shape = Pattern.parse(self.pattern)
        assert shape.n is not None
        return 1 - shape.n / shape.m

    def __str__(self) -> str:
        if self.sparsity is None:
            return self.pattern
        share = f"{100 * self.sparsity:g}%"
        return share if self.pattern == "unstructured" else f"{self.pattern} {share}"


@dataclass(frozen=True)
class Cell:
    """One model of a sweep: a goal of pruning and a method of repair."""

    goal: PruneGoal = field(metadata=MERGED)
    method: str

    def __str__(self) -> str:
        return f"{self.method} at {self.goal}"


@dataclass(frozen=True)
class SweepGrid:
    """The cells of a sweep: every pattern at every sparsity, by every method.

    Attributes:
        sparsities: Shares to prune, each in [0, 1); by default 0.5, 0.7, 0.8, 0.9 and 0.95. N:M patterns set their own.
        patterns: "unstructured", "N:M" or "Nx1", as in ``prune``; "channel" removes whole channels.
        methods: "none" leaves the pruned model as it is; any method of ``repair``; "compress" prunes and repairs in
            rounds.
    """

    sparsities: tuple[float, ...] | None = None
    patterns: tuple[str, ...] = ("unstructured",)
    methods: tuple[str, ...] = ("none", "paired", "refit")

    def __post_init__(self) -> None:
        for name in ("patterns", "methods"):
            if not getattr(self, name):
                raise OptionError(f"a sweep without {name} has no cells: give at least one")
        for method in self.methods:
            check_choice("method", method, SWEEP_METHODS)
        free = [pattern for pattern in self.patterns if not _sets_sparsity(pattern)]
        if self.sparsities is not None:
            if not free:
                raise OptionError(f"pattern {self.patterns[0]} sets the sparsity itself: drop --sparsities")
            if not self.sparsities:
                raise OptionError("a sweep without sparsities has no cells: give at least one, such as 0.5,0.9")
            for share in self.sparsities:
                check_share(share, "weights to zero")

    @property
    def cells(self) -> list[Cell]:
        """All cells, each once, in table order."""
        shares = SENSITIVITY_SPARSITIES if self.sparsities is None else self.sparsities
        goals = [
            PruneGoal(pattern, share)
            for pattern in self.patterns
            for share in ((None,) if _sets_sparsity(pattern) else shares)
        ]
        return in_order(Cell(goal, method) for goal in goals for method in self.methods)


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """Each cell once: by pattern, then by sparsity, then by method."""

    def place(cell: Cell) -> tuple[Any, ...]:
        goal, kind = cell.goal, {"unstructured": 0, CHANNEL: 1}.get(cell.goal.pattern, 2)
        return goal.sparsity is None, kind, goal.pattern, goal.share, SWEEP_METHODS.index(cell.method)

    return sorted(set(cells), key=place)


def _sets_sparsity(pattern: str) -> bool:
    return pattern != CHANNEL and Pattern.parse(pattern).n is not None


@dataclass(frozen=True)
class SweepSettings:
    """Settings that all cells of a sweep share.

    Attributes:
        scope: How ``prune`` shares zeros out between the layers, where the pattern leaves it open.
        score: Score by which ``prune`` ranks weights.
        include: Prune only nodes or weights whose name matches one of these regular expressions; empty for all that
            were trained, which leaves out blur kernels and the like.
        exclude: Spare nodes or weights whose name matches one of these regular expressions.
        rounds: Mask rounds of ``compress``.
        repair: Samples, seed and settings of the methods; the method itself is the cell's.
        label_offset: Added to a label to give the model's class: 1 where class 0 is background.
    """

    scope: Scope = "global"
    score: Score = "magnitude"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rounds: int = 5
    repair: RepairOptions = field(default_factory=RepairOptions)
    label_offset: int = 0

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, get_args(Scope))
        check_choice("score", self.score, SCORES)
        check_at_least("rounds", self.rounds, 1)
