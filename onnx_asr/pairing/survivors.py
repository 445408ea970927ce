"""Which channels of a dense graph are left in a smaller one, told by their weights.

Every constant that has an entry per channel is evidence: the rows of the weights that make a channel, the columns of
those that read it, biases, BatchNormalization. For a channel ``p`` of the smaller graph and a channel ``d`` of the
dense one, with the entries ``P`` and ``D`` of all constants together,

    distance(p, d) = sum over P != 0 of (P - D)^2 / v / (2 n)

where ``v`` is the variance over the dense channels of the constant that an entry belongs to, and ``n`` the number of
entries: 0 for the same channel, also if weights of it were set to zero, and about 1 for two channels that have nothing
in common. Rows can be compared at the input channels that are known already, so channels become known from the inputs
of the graph on, and from its outputs back. A channel is known when its nearest counterpart is near and no other one
comes close: by the weights, or else with biases, scales and the like.

Where statistics were measured again and BatchNormalization was folded, or a repair gave each channel a gain, rows of
weights have other lengths. So where that fails, only the rows that make a channel count, up to a positive factor a,

    distance(p, d) = min over a >= 0 of |P - a D|^2 / |P|^2 = 1 - max(0, cos(P, D))^2

over the entries ``P != 0``, averaged over the weights that make it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from math import prod

import numpy as np

from onnx_asr.arrays import Array, Floats, Integers, Mask
from onnx_asr.channels.rules import trace
from onnx_asr.channels.stretches import Groups, Stretch, numbers_left
from onnx_asr.channels.units import KEPT_CHANNELS, Channels
from onnx_asr.errors import StructureError
from onnx_asr.graph.index import GraphIndex, is_standard
from onnx_asr.graph.layers import LAYERS, Layer
from onnx_asr.pairing.evidence import OTHER, STATISTIC, WEIGHT, Axis, Constant, read_evidence
from onnx_asr.pairing.match import Refolding, counterparts
from onnx_asr.pairing.refolding import refold
from onnx_asr.pairing.tails import Tail

_UNTOLD = (
    "the pruned model is smaller than the dense one, and which channels it kept is unknown: it has no record of them "
    f"that fits ('{KEPT_CHANNELS}' in metadata_props), and the weights do not tell"
)
_ADVICE = (
    "give the dense file that the pruned one was made from; if prune or shrink removed the channels and another tool "
    "dropped that entry, copy it back; if the model was trained after the channels were removed, repair it before that"
)
_NEAR = 0.1  # a distance; weights that differ by a third, root mean square
_MARGIN = 4.0  # the second nearest has to be so many times as far
_EQUAL = 1e-12  # a distance of rounding errors of float64
_ROUNDING = 1e-6  # a difference
_FEW = 16  # entries: fewer have to be equal, not only near
_ENTRIES = 1024  # of a constant that are compared per channel


@dataclass(frozen=True)
class Survivors:
    """The channels of a dense graph that are left in a smaller one.

    Attributes:
        channels: Of the dense graph.
        drop: [units] that are missing.
        total: Number of units in the groups that lost some.
        left: How many of these are left.
        difference: Root mean square of the differences between the weights that are left and the dense ones, as a
            share of that between unrelated channels; of the group in which it is largest.
        has_factors: Whether that is so apart from a factor for each channel.
    """

    channels: Channels
    drop: Mask
    total: int
    left: int
    difference: float
    has_factors: bool

    @property
    def note(self) -> str:
        """A sentence for the user."""
        close = f"differ from the dense model's by {100 * self.difference:.2g}%"
        if self.difference < _ROUNDING:
            close = "equal the dense model's" + (" up to rounding" if self.difference else "")
        apart = ", apart from a factor for each channel," if self.has_factors else ""
        return (
            "the pruned model has no record of its removed channels that fits: told by the weights, "
            f"{self.left} of {self.total} channels are left where some were removed; their weights{apart} {close}"
        )


def survivors(pruned: GraphIndex, dense: GraphIndex) -> Survivors | None:
    """Find out which channels of a dense graph are left in a smaller one; None where no weight is smaller.

    Raises:
        StructureError: When the two differ in more than numbers of channels, or the channels cannot be told.
    """
    nodes, changes = counterparts(pruned, dense)
    if not any(_is_smaller(pruned, position, dense, node) for position, node in nodes.items()):
        return None
    channels = trace(dense)
    try:
        if not changes:
            return _told_apart(pruned, dense, channels, nodes)
        plain = _without_tails(pruned, [change.pruned for change in changes])
        whole = _without_tails(dense, [change.dense for change in changes])
        found = _told_apart(plain, whole, trace(whole), counterparts(plain, whole)[0])
    except StructureError as error:
        raise StructureError(f"{_UNTOLD}: {error}; {_ADVICE}") from error
    drop = np.zeros(channels.units, bool)
    for name, (_, positions) in found.channels.kept(found.drop).items():
        if name in channels.tensors:
            drop[np.delete(channels.tensors[name].ids, positions)] = True
    return replace(found, channels=channels, drop=drop)


def _is_smaller(pruned: GraphIndex, position: int, dense: GraphIndex, node: int) -> bool:
    if not is_standard(pruned.nodes[position], *LAYERS) or not is_standard(dense.nodes[node], *LAYERS):
        return False
    mine, its = Layer.of(pruned, position), Layer.of(dense, node)
    return isinstance(mine, Layer) and isinstance(its, Layer) and prod(mine.layout.shape) < prod(its.layout.shape)


def _told_apart(pruned: GraphIndex, dense: GraphIndex, channels: Channels, nodes: Mapping[int, int]) -> Survivors:
    groups = Groups(channels)
    constants, counts = read_evidence(pruned, dense, channels, groups, nodes)
    frozen = {
        number: next(channels.frozen[unit] for unit in units.tolist() if unit in channels.frozen)
        for number, units in enumerate(groups.units)
        if not channels.removable[units].any()
    }
    equations = [equation for constant in constants for equation in constant.equations]
    left = numbers_left(groups, frozen, [*equations, *counts])
    lost = [number for number, units in enumerate(groups.units) if left[number] < len(units)]
    search = _Search(groups, left, constants)
    search.run()
    drop = np.zeros(channels.units, bool)
    for number in lost:
        drop[groups.units[number]] = True
        drop[groups.units[number][search.known[number]]] = False
    stuck = next((channels.frozen[unit] for unit in np.flatnonzero(drop).tolist() if unit in channels.frozen), None)
    if stuck is not None:
        raise StructureError(f"channels are missing that cannot be removed: {stuck}")
    total = sum(len(groups.units[number]) for number in lost)
    remaining = sum(left[number] for number in lost)
    return Survivors(channels, drop, total, remaining, search.difference, search.has_factors)


def _without_tails(index: GraphIndex, tails: list[Tail]) -> GraphIndex:
    """A copy with tails folded into their layers."""
    return GraphIndex.of(refold(index, [Refolding(replace(tail, nodes=()), tail) for tail in tails], {})[0])


@dataclass(frozen=True)
class _Site:
    """A stretch of a channel axis of a constant."""

    constant: Constant
    axis: Axis
    number: int


@dataclass(frozen=True)
class _Distances:
    """Distances between the channels of a group.

    Attributes:
        near: [k, n] between the k channels that are left and the n dense ones, where the former are not zero.
        full: [k, n] the same with zeros.
        entries: [k] that ``near`` is based on.
        size: Entries that ``full`` is based on.
    """

    near: Floats
    full: Floats
    entries: Floats
    size: int


@dataclass
class _Search:
    """The search for the channels that are left.

    Attributes:
        left: How many of every group are left.
        known: [k] per group: number of the dense unit; -1 for those that are not known yet.
        difference: See :class:`Survivors`; of the group in which it is largest.
    """

    groups: Groups
    left: list[int]
    constants: list[Constant]
    known: list[Integers] = field(init=False)
    difference: float = 0.0
    has_factors: bool = False

    def __post_init__(self) -> None:
        self.known = [
            np.arange(count) if count == len(units) else np.full(count, -1, np.int64)
            for count, units in zip(self.left, self.groups.units, strict=True)
        ]
        self._full = [len(units) for units in self.groups.units]
        self._lost = [group for group, count in enumerate(self.left) if 0 < count < self._full[group]]
        self._readers: dict[int, list[_Site]] = {}
        for constant in self.constants:
            for axis in constant.axes:
                for number, stretch in enumerate(axis.stretches or ()):
                    self._readers.setdefault(stretch.group, []).append(_Site(constant, axis, number))

    def run(self) -> None:
        """Identify all channels, then check them by all evidence.

        Raises:
            StructureError: Naming the channels that cannot be told, and why.
        """
        while True:
            before = self._unknown()
            for group, trust in product(self._lost, (WEIGHT, OTHER, None)):
                if (self.known[group] < 0).any():
                    self._identify(
                        group, self._row_distances(group) if trust is None else self._distances(group, trust)
                    )
            if self._unknown() == before:
                break
        for group in self._lost:
            self._settle(group)
        self.difference = max(map(self._difference, self._lost), default=0.0)

    def _unknown(self) -> int:
        return sum(int((known < 0).sum()) for known in self.known)

    def _identify(self, group: int, distances: _Distances | None) -> None:
        """Assign those channels of a group whose counterpart is clear."""
        if distances is None:
            return
        known = self.known[group]
        everywhere = np.arange(self._full[group])
        for channel in np.flatnonzero(known < 0):
            known[channel] = _clear(distances, int(channel), everywhere)
        self._check_order(group)
        for channel in np.flatnonzero(known < 0):
            between = self._candidates(group, int(channel))
            known[channel] = between[0] if len(between) == 1 else _clear(distances, int(channel), between)
        self._check_order(group)

    def _check_order(self, group: int) -> None:
        """Refuse channels that are there twice, or so arranged that the others have no place between them."""
        fixed = self._fixed(group)
        if len(fixed) > 2 + len({unit for _, unit in fixed[1:-1]}):
            raise StructureError(f"{self._name(group)} has the same channel of the dense model twice")
        if any(last - first < after - before for (before, first), (after, last) in pairwise(fixed)):
            raise StructureError(f"{self._name(group)} has the channels of the dense model in another order")

    def _fixed(self, group: int) -> list[tuple[int, int]]:
        """Channels that are known and what they are, between the ends of both."""
        known = self.known[group]
        inner = [(int(channel), int(known[channel])) for channel in np.flatnonzero(known >= 0)]
        return [(-1, -1), *inner, (len(known), self._full[group])]

    def _candidates(self, group: int, channel: int) -> Integers:
        """Dense units that a channel can be, since the order is kept."""
        (before, low), (after, high) = next(
            (first, second) for first, second in pairwise(self._fixed(group)) if first[0] < channel < second[0]
        )
        return np.arange(low + channel - before, high - (after - channel) + 1)

    def _settle(self, group: int) -> None:
        """Decide between channels that are alike in every respect, and check all by all evidence."""
        known, distances = self.known[group], self._final_distances(group)
        for channel in np.flatnonzero(known < 0):
            between = self._candidates(group, int(channel))
            row = distances[channel, between]
            nearest = between[row <= row.min() + _EQUAL]
            others = row[row > row.min() + _EQUAL]
            separate = row.min() <= _NEAR and (others >= _MARGIN * row.min()).all()
            if not separate or not (self._is_dead(group, int(channel)) or self._are_twins(group, nearest)):
                raise StructureError(self._doubt(group, int(channel), between[np.argsort(row, kind="stable")], row))
            known[channel] = nearest[0]
        self._check_order(group)
        wrong = _wrong(distances, known)
        by_rows = self._row_distances(group) if wrong.any() else None
        if by_rows is not None:
            self.has_factors = True
            equal = by_rows.near[np.arange(len(known)), known] <= _EQUAL
            suffice = (by_rows.entries >= _FEW) | ((by_rows.entries > 0) & equal)
            wrong &= ~suffice | _wrong(by_rows.near, known)
        for channel in np.flatnonzero(wrong):
            row = distances[channel]
            raise StructureError(self._doubt(group, int(channel), np.argsort(row, kind="stable"), row))

    def _final_distances(self, group: int) -> Floats:
        """[k, n] distances by the weights alone where these are many, or those of a dense channel."""
        weights, everything = (self._distances(group, trust) for trust in (WEIGHT, OTHER))
        if weights is None or everything is None:
            found = weights or everything
            return np.zeros((self.left[group], self._full[group])) if found is None else found.near
        suffice = (weights.entries >= _FEW) | ((weights.entries > 0) & (weights.near.min(axis=1) <= _EQUAL))
        return np.where(suffice[:, None], weights.near, everything.near)

    def _is_dead(self, group: int, channel: int) -> bool:
        """Whether no weight makes or reads a channel, so that it does not matter which one it is."""
        return not any(pruned[channel].any() for pruned, _ in self._evidence(group, WEIGHT))

    def _difference(self, group: int) -> float:
        """The difference between all channels of a group and their counterparts, root mean square."""
        by_rows = self._row_distances(group) if self.has_factors else None
        if by_rows is not None:
            own = by_rows.near[np.arange(self.left[group]), self.known[group]]
            return float(np.sqrt((own * by_rows.entries).sum() / max(1.0, by_rows.entries.sum())))
        total, entries = 0.0, 0
        for trust in (WEIGHT, OTHER):
            for pruned, dense in self._evidence(group, trust, _ENTRIES):
                variance, support = float(dense.var(axis=0).mean()), pruned != 0
                if variance > 0.0:
                    total += float(np.square(pruned - dense[self.known[group]])[support].sum()) / variance / 2
                    entries += int(support.sum())
            if entries:
                break
        return float(np.sqrt(total / max(1, entries)))

    def _doubt(self, group: int, channel: int, order: Integers, distances: Floats) -> str:
        share = [f"{100 * min(1.0, float(value)) ** 0.5:.2g}%" for value in np.sort(distances)[:2]]
        text = f"channel {channel} of {self._name(group)}"
        if np.sort(distances)[0] > _NEAR or len(share) < 2:
            return f"{text} is none of the dense model's (the nearest differs by {share[0]})"
        return (
            f"{text} could be channel {order[0]} of the dense model or channel {order[1]} (the weights differ by "
            f"{share[0]} and {share[1]})"
        )

    def _name(self, group: int) -> str:
        return self._readers[group][0].constant.where

    def _are_twins(self, group: int, units: Integers) -> bool:
        """Whether dense channels are equal in all that makes and reads them."""
        return all((dense[units] == dense[units[0]]).all() for _, dense in self._evidence(group, STATISTIC))

    def _distances(self, group: int, trust: int) -> _Distances | None:
        """Distances by what is known now; None without evidence."""
        shape = self.left[group], self._full[group]
        near, full = np.zeros(shape), np.zeros(shape)
        counts, size = np.zeros(shape[0]), 0
        for pruned, dense in self._evidence(group, trust, _ENTRIES):
            variance = float(dense.var(axis=0).mean())
            if variance == 0.0:
                continue
            support, center = (pruned != 0).astype(np.float64), dense.mean(axis=0)
            pruned, dense = pruned - center, dense - center  # a - b loses digits where both are large
            own, squares = support * pruned, np.square(dense)
            near += (np.square(own).sum(axis=1)[:, None] - 2 * own @ dense.T + support @ squares.T) / variance
            full += (np.square(pruned).sum(axis=1)[:, None] - 2 * pruned @ dense.T + squares.sum(axis=1)) / variance
            counts += support.sum(axis=1)
            size += dense.shape[1]
        if not size:
            return None
        near, full = np.maximum(near, 0.0), np.maximum(full, 0.0)
        return _Distances(near / (2 * np.maximum(counts, 1.0))[:, None], full / (2 * size), counts, size)

    def _row_distances(self, group: int) -> _Distances | None:
        """Distances of the rows that make channels, up to a factor each; None where no weight makes them."""
        shape = self.left[group], self._full[group]
        total, counts = np.zeros(shape), np.zeros(shape[0])
        for pruned, dense in self._evidence(group, WEIGHT, _ENTRIES, rows_only=True):
            support = (pruned != 0).astype(np.float64)
            lengths = np.square(pruned).sum(axis=1)[:, None] * (support @ np.square(dense).T)
            cosine = np.maximum(pruned @ dense.T, 0.0) / np.sqrt(np.maximum(lengths, np.finfo(np.float64).tiny))
            free = np.maximum(support.sum(axis=1) - 1, 0.0)
            total += free[:, None] * np.maximum(1 - np.square(cosine), 0.0)
            counts += free
        if not counts.any():
            return None
        near = np.where(counts[:, None] > 0, total / np.maximum(counts, 1.0)[:, None], 1.0)
        return _Distances(near, np.full(shape, np.inf), counts / 2, 0)

    def _evidence(
        self, group: int, trust: int, entries: int | None = None, *, rows_only: bool = False
    ) -> Iterator[tuple[Floats, Floats]]:
        """Entries [k, m] of the smaller graph and [n, m] of the dense one, constant by constant of at least some trust.

        Entries that belong to other channels, too, are compared where these are known; ``entries`` limits m.
        """
        for site in self._readers.get(group, ()):
            constant, own = site.constant, site.axis
            if rows_only and own.axis != constant.rows:
                continue
            others = [axis for axis in constant.axes if axis is not own]
            if constant.trust < trust or any(axis.stretches is None for axis in others):
                continue
            assert own.stretches is not None
            stretch = own.stretches[site.number]
            pruned, dense = constant.pruned, constant.dense
            rest = stretch.times * dense.size // prod(dense.shape[axis.axis] for axis in constant.axes)
            for other in others:
                kept, full = self._known_places(other)
                if entries is not None and len(kept) * rest > entries:
                    chosen = np.linspace(0, len(kept) - 1, max(1, entries // rest)).astype(np.int64)
                    kept, full = kept[chosen], full[chosen]
                pruned, dense = pruned.take(kept, other.axis), dense.take(full, other.axis)
            if dense.size:
                starts = own.starts(self.left)[site.number], own.starts(self._full)[site.number]
                yield (
                    _per_channel(pruned, own.axis, stretch, starts[0], self.left[group]),
                    _per_channel(dense, own.axis, stretch, starts[1], self._full[group]),
                )

    def _known_places(self, axis: Axis) -> tuple[Integers, Integers]:
        """Entries of all known channels along an axis, in both graphs."""
        kept, full = [np.arange(0)], [np.arange(0)]
        assert axis.stretches is not None
        for stretch, start, begin in zip(axis.stretches, axis.starts(self.left), axis.starts(self._full), strict=True):
            known = self.known[stretch.group]
            ranks = np.flatnonzero(known >= 0)
            kept.append(stretch.places(start, self.left[stretch.group], ranks).reshape(-1))
            full.append(stretch.places(begin, self._full[stretch.group], known[ranks]).reshape(-1))
        return np.concatenate(kept), np.concatenate(full)


def _per_channel(value: Array, axis: int, stretch: Stretch, start: int, count: int) -> Floats:
    """The entries of every channel of a stretch, [count, m]."""
    part = np.moveaxis(value, axis, 0)[start : start + stretch.times * count]
    blocks = part.reshape(stretch.outer, count, -1).swapaxes(0, 1)
    return np.asarray(blocks.reshape(count, -1), np.float64)


def _wrong(distances: Floats, known: Integers) -> Mask:
    """Which channels [k] are not near the dense ones that they were taken for, or others are nearer [k, n]."""
    own = distances[np.arange(len(known)), known]
    return np.asarray((own > _NEAR) | (own > _MARGIN * distances.min(axis=1) + _EQUAL))


def _clear(distances: _Distances, channel: int, units: Integers) -> int:
    """The dense unit that a channel clearly is, of some; -1 where none is."""
    near, full = distances.near[channel, units], distances.full[channel, units]
    is_few = distances.entries[channel] < _FEW
    for row, limit in ((near, _EQUAL if is_few else _NEAR), (full, _EQUAL)):
        if not distances.entries[channel] and row is near:
            continue
        order = np.argsort(row, kind="stable")
        first, second = row[order[0]], row[order[1]] if len(order) > 1 else np.inf
        if first <= limit and second > max(_MARGIN * first, 10 * _EQUAL):
            return int(units[order[0]])
    return -1
