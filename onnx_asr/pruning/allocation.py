"""How zeros are allocated to the weights of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx_asr.arrays import Array
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.networks.operations import Operations
from onnx_asr.numerics.masks import keep_count
from onnx_asr.numerics.patterns import Pattern
from onnx_asr.numerics.scores import cheapest_keep
from onnx_asr.pruning.masks import PrunableWeight, units_of


@dataclass(frozen=True)
class LayerCosts:
    """Measured cost of zeros in every weight.

    Attributes:
        sizes: Units (weights, or blocks) of every weight.
        zeros: Numbers of zeros that were tried in it, ascending.
        costs: Distance of the outputs from the dense model's at each.
        prices: Price of one of its units; None where all are equal.
    """

    sizes: Sequence[int]
    zeros: Sequence[Sequence[int]]
    costs: Sequence[Sequence[float]]
    prices: Sequence[float] | None = None

    def keep(self, sparsity: float) -> list[int]:
        """Units that every weight keeps; the sparsity is the share of the total price to remove."""
        if self.prices is None:
            return cheapest_keep(self.sizes, self.zeros, self.costs, keep_count(sum(self.sizes), sparsity))
        total = sum(size * price for size, price in zip(self.sizes, self.prices, strict=True))
        return cheapest_keep(self.sizes, self.zeros, self.costs, (1 - sparsity) * total, self.prices)


def layer_costs(
    weights: Sequence[PrunableWeight],
    scores: Sequence[Array],
    pattern: Pattern,
    sparsities: Sequence[float],
    found: Sequence[Sequence[Fidelity]],
) -> LayerCosts:
    """The fidelities of single layers at the sparsities, as costs of zeros."""
    sizes = [units_of(weight, values, pattern).size for weight, values in zip(weights, scores, strict=True)]
    zeros = [[size - keep_count(size, share) for share in sparsities] for size in sizes]
    return LayerCosts(sizes, zeros, [[fidelity.distance for fidelity in tried] for tried in found])


def unit_flops(operations: Operations, weights: Sequence[PrunableWeight], sizes: Sequence[int]) -> list[float]:
    """Operations per unit of every weight."""
    return [
        sum(operations.by_node[point.node] for point in weight.points) / size
        for weight, size in zip(weights, sizes, strict=True)
    ]
