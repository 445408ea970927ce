"""The search for the smallest share of a model to prune that keeps within a budget."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable

from onnx_asr.errors import OptionError
from onnx_asr.networks.execution import Progress, silent
from onnx_asr.pruning.options import Budget

STEPS = 1000


def smallest_share(budget: Budget, dense: float, cost: Callable[[float], float], progress: Progress = silent) -> float:
    """The smallest share to prune, in steps of a thousandth, that keeps within a budget.

    By bisection: ``cost``, that of the model with a share of it pruned, is assumed to fall as more is pruned.

    Raises:
        OptionError: When the dense model already keeps within the budget, or not even the largest share does.
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
    """The error where even the highest sparsity leaves ``least`` of the dense model's cost, more than the budget."""
    return OptionError(
        f"target-{budget.measure} {budget.limit:g} cannot be reached: the highest sparsity leaves {least:.3g} of the "
        "dense model's; give a larger target, or let more layers take part (--include, --exclude)"
    )
