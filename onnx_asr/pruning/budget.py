"""A limit on what a pruned model may cost, and the search for the smallest share of it to prune."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from onnx_asr.errors import ModelError, OptionError
from onnx_asr.networks.execution import Progress, silent
from onnx_asr.repairing.options import check_choice

Measure = Literal["latency", "size", "flops"]
STEPS = 1000


@dataclass(frozen=True)
class Budget:
    """What a pruned model may cost.

    Attributes:
        measure: "latency": of a run in onnxruntime, for whole channels. "size": bytes of the file where channels are
            removed, bytes after gzip where weights become zeros. "flops": of the smaller model, or those with a weight
            other than zero.
        limit: Share of what the dense model costs, above 0 and below 1; a size may be a number of bytes instead.
    """

    measure: Measure
    limit: float

    def __post_init__(self) -> None:
        check_choice("budget", self.measure, get_args(Measure))
        in_bytes = self.measure == "size" and self.limit >= 1
        if not (math.isfinite(self.limit) and (0 < self.limit < 1 or in_bytes)):
            more = ", or a number of bytes, as 500kB" if self.measure == "size" else ""
            raise OptionError(
                f"target-{self.measure} {self.limit:g} is out of range: give a share of the dense model's, above 0 and "
                f"below 1{more}"
            )

    def check_alone(self, sparsity: float | None) -> None:
        """Refuse a sparsity beside the budget.

        Raises:
            OptionError: When there is one.
        """
        if sparsity is not None:
            raise OptionError(f"sparsity and target-{self.measure} both say how much to prune: give one of them")

    def of(self, dense: float) -> float:
        """The limit in units of what the dense model costs.

        Raises:
            OptionError: When the dense model keeps within it already.
            ModelError: When what that costs is not known.
        """
        if not dense:
            raise ModelError("the model's FLOPs are not known, as shapes of its tensors are not")
        limit = self.limit if self.limit >= 1 else self.limit * dense
        if limit >= dense:
            raise OptionError(
                f"target-size {limit:,.0f} is no less than the {dense:,.0f} bytes that the model has: give less"
            )
        return limit


def smallest_share(budget: Budget, dense: float, cost: Callable[[float], float], progress: Progress = silent) -> float:
    """The smallest share to prune, in steps of a thousandth, that keeps within a budget.

    By bisection: what is pruned more is taken to cost less.

    Args:
        budget: The budget.
        dense: What the dense model costs.
        cost: What the model costs with a share of it pruned.
        progress: Told how far the search is.

    Raises:
        OptionError: When the dense model keeps within the budget already, or not even the largest share does.
        ModelError: When what the dense model costs is not known.
    """
    limit, costs = budget.of(dense), dict[int, float]()

    def fits(step: int) -> bool:
        progress(f"searching for target-{budget.measure} {budget.limit:g}", len(costs) / math.log2(STEPS))
        costs[step] = cost(step / STEPS)
        return costs[step] <= limit

    step = bisect_left(range(STEPS), True, key=fits)
    if step == STEPS:
        raise unreachable(budget, costs[STEPS - 1] / dense)
    return step / STEPS


def unreachable(budget: Budget, least: float) -> OptionError:
    """What to raise where even the most that can be pruned leaves too much of what the dense model costs."""
    return OptionError(
        f"target-{budget.measure} {budget.limit:g} cannot be reached: at the highest sparsity {least:.3g} of the dense "
        "model's is left; give more, or let more layers take part"
    )
