"""How long two models take, run in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_asr.engine.session import Session

_WARM_UP = 2  # pairs: the first runs allocate
_LEAST_PAIRS, _MOST_PAIRS = 9, 400


@dataclass(frozen=True)
class Latency:
    """Run times of two models, in pairs: what else the machine does meets both alike.

    Attributes:
        seconds_before: Median of a run of the first model.
        seconds_after: Median of a run of the second.
        ratio: Median over the pairs of the second's time by the first's.
        low: The ratio that a quarter of the pairs stays below.
        high: The ratio that a quarter of the pairs exceeds.
        pairs: Number of pairs.
        shapes: What the inputs were.
    """

    seconds_before: float
    seconds_after: float
    ratio: float
    low: float
    high: float
    pairs: int
    shapes: dict[str, tuple[int, ...]]


def time_in_turns(first: Session, second: Session, feeds: Mapping[str, NDArray[Any]], seconds: float) -> Latency:
    """Run two models A B A B for about so many seconds, at least 9 pairs and at most 400."""
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < _WARM_UP + _LEAST_PAIRS or (len(times) < _MOST_PAIRS and time.perf_counter() < end):
        times.append((_timed(first, feeds), _timed(second, feeds)))
    pairs = np.array(times[_WARM_UP:])
    before, after = np.median(pairs, axis=0)
    low, ratio, high = np.quantile(pairs[:, 1] / pairs[:, 0], (0.25, 0.5, 0.75))
    shapes = {name: value.shape for name, value in feeds.items()}
    return Latency(float(before), float(after), float(ratio), float(low), float(high), len(pairs), shapes)


def _timed(session: Session, feeds: Mapping[str, NDArray[Any]]) -> float:
    started = time.perf_counter()
    session.run(feeds)
    return time.perf_counter() - started
