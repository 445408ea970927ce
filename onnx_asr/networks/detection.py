"""How much of what a dense detector finds another model finds too, without knowing how its outputs are decoded.

Thousands of places are looked at, and only the few that the dense network is confident about count. Its outputs tell
where: channels that stay within [0, 1], or whole maps of logits that are nearly always very negative, are scores. One
of them is objectness if, where it is high, another one is high too, which classes, excluding each other, do not do;
then the scores are its products with the others. All other channels are values, such as boxes, at a place whose
confidence ``c`` is its highest score in the dense network. With all scores as one vector ``s``, and values ``v`` of
variance ``V`` where the dense network is confident,

    ``D^2 = 1 - <s_d, s> / (|s_d| |s|) + sum c min(1, (v_d - v)^2 / V) / sum c``.

The cosine ignores a common factor of all scores, as average precision does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_asr.arrays import Array, Floats, Integers, Mask

_TRIED = 16  # samples by which channels are told apart
_TOLERANCE = 1e-6  # by which rounding takes a probability out of [0, 1]
_SPARSE, _COMMON = 0.5, 0.7  # largest share of the places that take part in a score; in that of a common class
_TOGETHER, _APART = 0.6, 1.4  # least co-occurrence of objectness, and its least ratio to that of any class
_SURE = 0.1  # confidence that the dense network has to reach somewhere
_SHUT = 1e-4  # objectness below which, in both networks, a place is passed over
_LOW, _MOSTLY = -2.0, 0.9  # logits of maps where nearly nothing is found, and their least share
_TINY = 1e-12


@dataclass(frozen=True)
class _Head:
    """One output: what its channels are.

    Attributes:
        output: Its position among the outputs.
        axis: Its channel axis, the sample axis not counted.
        scores: Channels that are scores.
        gate: The channel that is objectness, which multiplies the others.
        logits: Whether its scores are stored as logits.
        values: Channels that are none.
    """

    output: int
    axis: int
    scores: Integers
    gate: int | None
    logits: bool
    values: Integers

    def scores_of(self, rows: Floats) -> Floats:
        """Scores [places, K] of one sample [places, channels]."""
        found = _probabilities(rows[:, self.scores], self.logits)
        return found if self.gate is None else found * _probabilities(rows[:, [self.gate]], self.logits)

    def is_open(self, rows: Array) -> Mask:
        """Places [places] of one sample that may have an object."""
        if self.gate is None:
            return np.ones(len(rows), bool)
        least = math.log(_SHUT) if self.logits else _SHUT
        return np.asarray(rows[:, self.gate] > least)

    def rows_of(self, value: Array) -> Array:
        """One sample of the output as [places, channels]."""
        return np.moveaxis(value, self.axis, -1).reshape(-1, value.shape[self.axis])


Places = list[_Head]
"""Outputs that say something about the same places."""


@dataclass(frozen=True)
class Detections:
    """What a dense detector's outputs mean.

    Attributes:
        groups: Outputs by the places that they speak of, each with scores and values.
        scales: Mean and variance of every value where the dense network is confident, by output: [2, values].
    """

    groups: tuple[Places, ...]
    scales: dict[int, Floats]

    @classmethod
    def of(cls, dense: Sequence[Array]) -> Detections | None:
        """Tell from the outputs of the dense network, samples along the first axis; None where it is no detector."""
        by_places: dict[tuple[int, ...], Places] = {}
        for position, value in enumerate(dense):
            by_sample = value.ndim >= 3 and len(value) == len(dense[0])  # not so where results are of all samples
            if by_sample and value.size and np.issubdtype(value.dtype, np.floating):
                head = _head(position, value)
                shape = value.shape[1:]
                by_places.setdefault(shape[: head.axis] + shape[head.axis + 1 :], []).append(head)
        groups = tuple(
            heads
            for heads in by_places.values()
            if any(len(head.scores) for head in heads) and any(len(head.values) for head in heads)
        )
        if not groups or not _is_sparse(groups, dense):
            return None
        sums: dict[int, Floats] = {}
        for confidence, head, rows in _values(groups, dense):
            values = rows[:, head.values]
            moments = np.stack([np.ones_like(values), values, np.square(values)])
            sums[head.output] = sums.get(head.output, 0.0) + np.einsum("p,mpv->mv", confidence, moments)
        scales = {}
        for output, (weight, first, second) in sums.items():
            mean = first / np.maximum(weight, _TINY)
            scales[output] = np.stack([mean, np.maximum(second / np.maximum(weight, _TINY) - np.square(mean), _TINY)])
        return cls(groups, scales)

    def confidences(self, outputs: Sequence[Array], sample: int) -> list[Floats]:
        """The confidence at all places of one sample, in their shape, by group."""
        found = []
        for heads in self.groups:
            rows = {head.output: head.rows_of(outputs[head.output][sample]).astype(np.float64) for head in heads}
            shape = outputs[heads[0].output].shape[1:]
            places = shape[: heads[0].axis] + shape[heads[0].axis + 1 :]
            found.append(_detected(heads, rows)[0].reshape(places))
        return found

    def error(self, dense: Sequence[Array], other: Sequence[Array]) -> float:
        """The distance ``D`` of another model's outputs; infinite where they are not finite."""
        products = np.zeros(3)  # <s_d, s>, |s_d|^2, |s|^2
        missed = weights = 0.0
        for sample in range(len(dense[0])):
            for heads in self.groups:
                wanted, found = _open_rows(heads, dense, other, sample=sample)
                confidence, expected = _detected(heads, wanted)
                _, scores = _detected(heads, found)
                for one, two in zip(expected, scores, strict=True):
                    products += np.vdot(one, two), np.vdot(one, one), np.vdot(two, two)
                for head in (head for head in heads if len(head.values)):
                    gap = wanted[head.output][:, head.values] - found[head.output][:, head.values]
                    errors = np.minimum(np.square(gap) / self.scales[head.output][1], 1.0)
                    missed += float(confidence @ errors.sum(axis=1))
                    weights += float(confidence.sum()) * errors.shape[1]
        both, first, second = products
        cosine = both / math.sqrt(max(first * second, _TINY))
        distance = max(0.0, 1.0 - cosine) + missed / max(weights, _TINY)
        return math.sqrt(distance) if math.isfinite(distance) else math.inf


def _open_rows(heads: Places, *networks: Sequence[Array], sample: int) -> list[dict[int, Floats]]:
    """Rows [places, channels] of one sample by output, for each network, where any of them may have an object."""
    rows = [{head.output: head.rows_of(outputs[head.output][sample]) for head in heads} for outputs in networks]
    for head in heads:
        kept = np.logical_or.reduce([head.is_open(found[head.output]) for found in rows])
        rows = [{output: value[kept] for output, value in found.items()} for found in rows]
    return [{output: value.astype(np.float64) for output, value in found.items()} for found in rows]


@np.errstate(over="ignore")
def _probabilities(values: Floats, logits: bool) -> Floats:
    return np.asarray(1 / (1 + np.exp(-values)) if logits else np.clip(values, 0.0, 1.0), np.float64)


def _detected(heads: Places, rows: dict[int, Floats]) -> tuple[Floats, list[Floats]]:
    """Confidence [places], and the scores of every output that has any [places, K], for one sample.

    Scores of several outputs at one place, such as classes and centreness, multiply each other.
    """
    scores = [head.scores_of(rows[head.output]) for head in heads if len(head.scores)]
    highest = [found.max(axis=1, initial=0.0) for found in scores]
    if len(scores) == 1:
        return highest[0], scores
    others = [np.prod(highest[:number] + highest[number + 1 :], axis=0) for number in range(len(scores))]
    return np.prod(highest, axis=0), [found * other[:, None] for found, other in zip(scores, others, strict=True)]


def _values(groups: Sequence[Places], dense: Sequence[Array]) -> Iterator[tuple[Floats, _Head, Floats]]:
    """Confidence [places], output and [places, channels], for every sample and output with values."""
    for sample in range(len(dense[0])):
        for heads in groups:
            (rows,) = _open_rows(heads, dense, sample=sample)
            confidence, _ = _detected(heads, rows)
            yield from ((confidence, head, rows[head.output]) for head in heads if len(head.values))


def _is_sparse(groups: Sequence[Places], dense: Sequence[Array]) -> bool:
    """Whether the dense network is confident at few places, and at some."""
    few = [_few(value) if len(value) else value for value in dense]
    places, total, squares, highest = 0, 0.0, 0.0, 0.0
    for heads in groups:
        first = few[heads[0].output]
        places += first.size // first.shape[heads[0].axis + 1]
        for sample in range(len(first)):
            (rows,) = _open_rows(heads, few, sample=sample)
            confidence, _ = _detected(heads, rows)
            total += float(confidence.sum())
            squares += float(confidence @ confidence)
            highest = max(highest, float(confidence.max(initial=0.0)))
    return highest > _SURE and total**2 < _SPARSE * places * squares


def _few(value: Array) -> Array:
    """Some samples, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(value) - 1, _TRIED).astype(int))
    return np.asarray(value[chosen])


def _participation(scores: Floats) -> Floats:
    """Share of the places that take part, ``mean^2 / mean square``: 1 where all are equal."""
    return np.asarray(np.square(scores.mean(axis=0)) / np.maximum(np.square(scores).mean(axis=0), _TINY))


def _head(position: int, value: Array) -> _Head:
    """Tell the channels of one output apart."""
    axes = (1, value.ndim - 1)
    low, high = (limit.reshape(value.shape[1:]) for limit in (value.min(axis=0), value.max(axis=0)))
    inside = []
    for axis in axes:
        rest = tuple(other for other in range(value.ndim - 1) if other != axis - 1)
        inside.append((low.min(axis=rest) >= -_TOLERANCE) & (high.max(axis=rest) <= 1 + _TOLERANCE))
    shares = [float(mask.mean()) for mask in inside]
    if shares[0] == shares[1]:
        chosen = int(value.ndim == 3 and value.shape[1] > value.shape[2])
    else:
        chosen = int(shares[1] > shares[0])
    axis, probabilities = axes[chosen] - 1, np.flatnonzero(inside[chosen])
    everything = np.arange(value.shape[axis + 1])
    none = np.zeros(0, np.int64)
    whole = _Head(position, axis, none, None, False, everything)
    rows = np.concatenate([whole.rows_of(sample) for sample in _few(value)])
    if float((rows < _LOW).mean()) >= _MOSTLY and float(rows.max()) > 0:
        probabilities, logits = everything, True
    else:
        logits = False
    columns = _probabilities(rows[:, probabilities].astype(np.float64), logits)
    scores, gate = _scores(columns)
    channels = probabilities[scores]
    opener = None if gate is None else int(probabilities[gate])
    spoken_for = {*channels.tolist(), *([] if opener is None else [opener]), *probabilities[_background(columns)]}
    values = np.array([channel for channel in everything.tolist() if channel not in spoken_for], np.int64)
    return _Head(position, axis, channels, opener, logits, values)


def _scores(columns: Floats) -> tuple[Integers, int | None]:
    """Scores among probabilities [rows, K], and the one that is objectness, if there is one, which is not among them.

    Objectness is told by ``sum p_k^2 max_{j != k} p_j / sum p_k^2``.
    """
    background = _background(columns)
    spread = _participation(columns)
    known = np.setdiff1d(np.flatnonzero((spread < _SPARSE) & (columns.max(axis=0, initial=0.0) > 0)), background)
    partners = np.setdiff1d(np.flatnonzero(spread < _COMMON), background)
    if len(known) < 2 or len(partners) < 3:
        return known, None
    second, first = np.partition(columns[:, partners], -2, axis=1)[:, -2:].T
    sparse = columns[:, known]
    squares = np.square(sparse)
    highest = np.where(sparse >= first[:, None], second[:, None], first[:, None])
    together = (squares * highest).sum(axis=0) / squares.sum(axis=0)
    gate, rival = np.argsort(together)[::-1][:2]
    if together[gate] < _TOGETHER or together[gate] < _APART * together[rival]:
        return known, None
    return np.setdiff1d(np.arange(columns.shape[1]), known[gate]), int(known[gate])


def _background(columns: Floats) -> Integers:
    """The class of everything else, where probabilities [rows, K] add up to 1."""
    if columns.shape[1] < 2 or not np.allclose(columns.sum(axis=1), 1.0, atol=1e-3):
        return np.zeros(0, np.int64)
    return np.flatnonzero(columns.mean(axis=0) > 0.5)
