"""Where the units of a dense graph lie along channel axes, and how many of them a smaller graph has left.

Units that occur in the same tensors are a group. Along an axis, a group's units lie in one or more stretches, in their
order: a Concat has one stretch per operand, a Flatten repeats each unit, channels last repeat the whole order. In the
smaller graph the same stretches follow each other, each with the units that are left. If ``k_g`` units of group ``g``
are left, an axis has

    sum over stretches of (repetitions of the stretch) * k_g

entries there. These equations, one per axis of a weight, are solved for all ``k_g``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from onnx_asr.channels.units import Channels, Ids
from onnx_asr.errors import StructureError


@dataclass(frozen=True)
class Stretch:
    """A part of an axis that holds each unit of one group equally often: [outer, units, inner].

    Attributes:
        group: Number of the group.
        outer: How often the units follow each other.
        inner: How often each unit is repeated before the next one.
    """

    group: int
    outer: int
    inner: int

    @property
    def times(self) -> int:
        """Entries per unit."""
        return self.outer * self.inner

    def places(self, start: int, count: int, units: Ids) -> Ids:
        """Entries of some units, [outer, units, inner], where the stretch begins at ``start`` and has ``count``."""
        outer, inner = np.arange(self.outer)[:, None, None], np.arange(self.inner)
        return start + (outer * count + units[:, None]) * self.inner + inner


Stretches = tuple[Stretch, ...]


class Groups:
    """The groups of units, divided further where an axis does not hold all of a group side by side.

    Attributes:
        units: Units of every group, in their order.
    """

    def __init__(self, channels: Channels) -> None:
        axes = [item.ids for item in channels.slices] + [item.ids for item in channels.counts]
        self._axes = [ids for ids in axes if len(ids)]
        self._group, self._rank = np.zeros(channels.units, np.int64), np.zeros(channels.units, np.int64)
        self.units = channels.groups()
        while True:
            for number, units in enumerate(self.units):
                self._group[units], self._rank[units] = number, np.arange(len(units))
            cuts = [np.unique(places) for places in self._cuts()]
            if not any(len(places) for places in cuts):
                break
            parts = zip(self.units, cuts, strict=True)
            self.units = [part for units, places in parts for part in np.split(units, places)]

    def _cuts(self) -> list[list[int]]:
        """By group, the ranks before which it has to be divided."""
        cuts: list[list[int]] = [[] for _ in self.units]
        last = np.array([len(units) - 1 for units in self.units], np.int64)
        for ids in self._axes:
            group, rank = self._group[ids], self._rank[ids]
            other, step = group[1:] != group[:-1], rank[1:] - rank[:-1]
            wraps = (rank[:-1] == last[group[:-1]]) & (rank[1:] == 0)
            breaks = other | ((step != 0) & (step != 1) & ~wraps)
            begins, ends = np.append(True, breaks), np.append(breaks, True)
            for number, place in zip(group[begins].tolist(), rank[begins].tolist(), strict=True):
                cuts[number].extend([place] if place else [])
            for number, place in zip(group[ends].tolist(), rank[ends].tolist(), strict=True):
                cuts[number].extend([place + 1] if place < last[number] else [])
        return cuts

    def stretches(self, ids: Ids) -> Stretches | None:
        """The stretches of an axis; None where units do not lie in order, or not equally often."""
        found = []
        bounds = np.flatnonzero(np.diff(self._group[ids])) + 1
        for part in np.split(ids, bounds) if len(ids) else []:
            group = int(self._group[part[0]])
            ranks, count = self._rank[part], len(self.units[group])
            inner = int(np.argmax(ranks != ranks[0])) or len(ranks)
            stretch = Stretch(group, len(part) // (count * inner), inner)
            order = np.broadcast_to(np.arange(count)[:, None], (stretch.outer, count, inner))
            if not np.array_equal(ranks, order.reshape(-1)):
                return None
            found.append(stretch)
        return tuple(found)


@dataclass(frozen=True)
class Equation:
    """The size of an axis of the smaller graph.

    Attributes:
        where: The node, for messages.
    """

    stretches: Stretches
    size: int
    where: str


def numbers_left(groups: Groups, frozen: Mapping[int, str], equations: Iterable[Equation]) -> list[int]:
    """How many units of every group are left.

    Args:
        groups: The groups.
        frozen: Reasons by group, for groups that cannot lose units.
        equations: Sizes of axes.

    Raises:
        StructureError: When the equations contradict each other, or leave a number open.
    """
    known = {group: len(groups.units[group]) for group in frozen}
    pending = list(equations)
    while True:
        later = []
        for equation in pending:
            times: Counter[int] = Counter()
            rest = equation.size
            for stretch in equation.stretches:
                if stretch.group in known:
                    rest -= stretch.times * known[stretch.group]
                else:
                    times[stretch.group] += stretch.times
            if len(times) > 1 and rest == sum(factor * len(groups.units[group]) for group, factor in times.items()):
                known |= {group: len(groups.units[group]) for group in times}
                continue
            if len(times) > 1:
                later.append(equation)
                continue
            ((group, factor),) = times.items() or ((-1, 1),)
            if rest % factor or not 0 <= rest // factor <= (len(groups.units[group]) if times else 0):
                raise StructureError(_contradiction(equation, frozen))
            if times:
                known[group] = rest // factor
        if len(later) == len(pending):
            break
        pending = later
    if pending:
        raise StructureError(f"the sizes do not tell how the {pending[0].size} channels of {pending[0].where} divide")
    return [known.get(group, len(units)) for group, units in enumerate(groups.units)]


def _contradiction(equation: Equation, frozen: Mapping[int, str]) -> str:
    reason = next((frozen[item.group] for item in equation.stretches if item.group in frozen), None)
    return f"{equation.where} has {equation.size} channels" + (
        ", which do not fit those of the other layers" if reason is None else f", but none can be missing: {reason}"
    )
