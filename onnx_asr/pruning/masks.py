"""Masks: the weights that take part, scores to masks, masks to zeros in a copy of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_asr.arrays import Array, Mask
from onnx_asr.errors import ModelError, OptionError
from onnx_asr.graph.edit import EditPlan, apply, set_metadata
from onnx_asr.graph.fixed import fixed_by_own_weights
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.layers import WeightLayout
from onnx_asr.graph.points import LayerPoint, Survey, skip
from onnx_asr.graph.skips import Reason, Skip
from onnx_asr.networks.sparsity import LayerSparsity, share_of_zeros
from onnx_asr.numerics.masks import block_scores, keep_count, keep_largest, keep_n_of_m, spread_blocks
from onnx_asr.numerics.patterns import Pattern
from onnx_asr.numerics.scores import erk_shares, proportional_keep
from onnx_asr.pruning.options import Scope
from onnx_asr.targets.rules import TARGETS, RuntimeName
from onnx_asr.targets.usable import form_of, lost_cause
from onnx_asr.version import __version__

EXCLUDED = Reason("excluded-by-pattern", "excluded by a pattern")
NOT_INCLUDED = Reason("not-included-by-pattern", "not included by a pattern")
TOO_NARROW = Reason(
    "fewer-inputs-than-pattern",
    "{inputs} input channels per group, fewer than the {m} of pattern {pattern}: stays dense",
)
NO_GAIN = Reason("no-gain-on-target", "stays dense for {title}: {cause}")


@dataclass(frozen=True)
class PrunableWeight:
    """A constant weight and every point that reads it."""

    tensor: str
    points: tuple[LayerPoint, ...]

    @property
    def name(self) -> str:
        """The first reader's name."""
        return self.points[0].name

    @property
    def layout(self) -> WeightLayout:
        """How the first reader lays it out."""
        return self.points[0].layer.layout


def prunable_weights(
    index: GraphIndex, found: Survey, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[PrunableWeight], list[Skip]]:
    """Weights of the Conv, ConvTranspose, Gemm and MatMul nodes found in a graph whose names match.

    A node takes part when a regular expression of ``include``, if there is any, matches within its name or its
    weight's, and none of ``exclude`` does; a fixed operator only when one of ``include`` does.

    Raises:
        OptionError: When a pattern is not a regular expression, or none is left.
        ModelError: When the graph has no weights.
    """
    readers: dict[str, list[LayerPoint]] = {}
    for point in found.layers:
        readers.setdefault(index.nodes[point.node].input[point.layer.weight_slot], []).append(point)
    if not readers:
        raise ModelError(
            "nothing to prune: the model has no Conv, ConvTranspose, Gemm or MatMul with constant weights; give a "
            "float model that holds its weights"
        )
    wanted, unwanted = [_compile(pattern) for pattern in include], [_compile(pattern) for pattern in exclude]
    weights, skips, fixed = [], list(found.skips), fixed_by_own_weights(index)
    for tensor, points in readers.items():
        texts = [tensor, *(point.name for point in points)]
        chosen = any(pattern.search(text) for pattern in wanted for text in texts)
        reason = None if chosen else NOT_INCLUDED if wanted else next(filter(None, map(fixed, points)), None)
        if any(pattern.search(text) for pattern in unwanted for text in texts):
            reason = EXCLUDED
        if reason is None:
            weights.append(PrunableWeight(tensor, tuple(points)))
        else:
            skips.append(skip(points[0], reason))
    if not weights and not wanted and not unwanted:
        raise OptionError(
            f"nothing to prune: all layers are fixed operators ({skips[-1].name}: {skips[-1].reason}); name those that "
            "were trained (--include)"
        )
    if not weights:
        raise OptionError(
            f"--include {list(include)} and --exclude {list(exclude)} leave no weight to prune: give patterns that "
            f"match names such as '{next(iter(readers.values()))[0].name}' or '{next(iter(readers))}'"
        )
    return weights, skips


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(
            f"'{pattern}' is not a regular expression: {error}; give one in the syntax of Python's re"
        ) from error


def split_narrow(weights: Sequence[PrunableWeight], pattern: Pattern) -> tuple[list[PrunableWeight], list[Skip]]:
    """Split off the weights with fewer input channels than a group of an N:M pattern, as skips.

    Raises:
        OptionError: When all have.
    """
    wide, skips = [], []
    for weight in weights:
        inputs = weight.layout.inputs
        if pattern.n is None or inputs >= pattern.m:
            wide.append(weight)
        else:
            skips.append(skip(weight.points[0], TOO_NARROW.format(inputs=inputs, m=pattern.m, pattern=pattern)))
    if not wide:
        raise OptionError(
            f"no weight has the {pattern.m} input channels that pattern {pattern} needs: choose a pattern with smaller "
            "groups, such as 1:2"
        )
    return wide, skips


def split_useless(
    index: GraphIndex, weights: Sequence[PrunableWeight], runtime: RuntimeName | None
) -> tuple[list[PrunableWeight], list[Skip]]:
    """Split off the weights whose zeros a runtime would not make use of, in any of their readers, as skips.

    Raises:
        OptionError: When that is so for all.
    """
    if runtime is None:
        return list(weights), []
    target = TARGETS[runtime]
    useful, skips = [], []
    useless: dict[str, None] = {}
    for weight in weights:
        stored = index.value(weight.tensor)
        causes = [lost_cause(form_of(index, point.node, point.layer, stored), target) for point in weight.points]
        if None in causes:
            useful.append(weight)
            continue
        useless |= {str(cause): None for cause in causes}
        skips.append(skip(weight.points[0], NO_GAIN.format(cause=causes[0], title=target.title)))
    if not useful:
        raise OptionError(
            f"no layer would gain from zeros in {target.title}: {'; '.join(useless)}; 'inspect --target {runtime}' "
            "shows every layer, and without --target they are pruned all the same"
        )
    return useful, skips


def make_masks(
    weights: Sequence[PrunableWeight],
    scores: Sequence[Array],
    pattern: Pattern,
    sparsity: float | None,
    scope: Scope,
    counts: Sequence[int] | None = None,
    *,
    seed: int,
) -> list[Mask]:
    """Masks of the largest scores; scores and masks have the weights' stored shapes.

    Args:
        weights: The weights.
        scores: Scores of every weight's entries; below 0 where an entry is gone already.
        pattern: Which sets of weights may survive.
        sparsity: Share of units (weights, or blocks) to drop; None for N:M.
        scope: Where scores are compared; ignored for N:M.
        counts: Units that every weight keeps, for scope "sensitivity".
        seed: Of the order of equal scores.
    """
    if pattern.n is not None:
        return [_pattern_mask(*each, pattern.n, pattern.m, seed) for each in zip(weights, scores, strict=True)]
    assert sparsity is not None
    units = [units_of(weight, values, pattern) for weight, values in zip(weights, scores, strict=True)]
    sizes = [unit.size for unit in units]
    total = keep_count(sum(sizes), sparsity)
    if scope == "global":
        masks = keep_largest(units, total, seed)
        return [_spread(weight, mask, pattern) for weight, mask in zip(weights, masks, strict=True)]
    if scope == "layer":
        counts = [keep_count(size, sparsity) for size in sizes]
    elif scope != "sensitivity":
        shapes = [(weight.layout.channels, weight.layout.inputs, *weight.layout.shape[2:]) for weight in weights]
        most = [int(np.count_nonzero(unit >= 0)) for unit in units]
        counts = proportional_keep(erk_shares(shapes, sizes), most, total)
        if scope == "mixed":
            ranked = [int(np.count_nonzero(mask)) for mask in keep_largest(units, total, seed)]
            shares = [math.sqrt(max(a, 1) * max(b, 1)) for a, b in zip(counts, ranked, strict=True)]
            counts = proportional_keep(shares, most, total)
    assert counts is not None
    return [keep_units(*each[:2], pattern, each[2], seed) for each in zip(weights, scores, counts, strict=True)]


def keep_units(weight: PrunableWeight, scores: Array, pattern: Pattern, count: int, seed: int) -> Mask:
    """The mask of one weight that keeps the ``count`` units of largest score."""
    (mask,) = keep_largest([units_of(weight, scores, pattern)], count, seed)
    return _spread(weight, mask, pattern)


def _pattern_mask(weight: PrunableWeight, scores: Array, n: int, m: int, seed: int) -> Mask:
    layout = weight.layout
    channels = layout.to_blocks(scores).reshape(layout.channels, layout.inputs, layout.taps)
    return layout.from_rows(keep_n_of_m(channels, n, m, seed))


def units_of(weight: PrunableWeight, scores: Array, pattern: Pattern) -> Array:
    """Scores of the units that are kept or dropped: entries as stored, or blocks [G, ceil(O / height), I, taps]."""
    return scores if pattern.height == 1 else block_scores(weight.layout.to_blocks(scores), pattern.height)


def _spread(weight: PrunableWeight, mask: Mask, pattern: Pattern) -> Mask:
    """Expand a mask of units to the weight's stored shape."""
    if pattern.height == 1:
        return mask
    return weight.layout.from_blocks(spread_blocks(mask, pattern.height, weight.layout.outputs))


def apply_masks(
    index: GraphIndex, weights: Sequence[PrunableWeight], masks: Sequence[Mask]
) -> tuple[onnx.ModelProto, tuple[LayerSparsity, ...]]:
    """A copy of the model with zeros where the masks are False, and the number of zeros in each weight."""
    plan = EditPlan()
    layers = []
    for weight, mask in zip(weights, masks, strict=True):
        before = index.value(weight.tensor)
        after = np.where(mask, before, np.zeros((), before.dtype))
        for point in weight.points:
            plan.values[point.weight] = after
        layers.append(LayerSparsity.of(weight.points[0], before, after))
    pruned = apply(index, plan)
    set_metadata(pruned, "onnx_asr.version", __version__)
    set_metadata(pruned, "onnx_asr.sparsity", f"{share_of_zeros(layers):.6f}")
    return pruned, tuple(layers)
