"""Walks: several lanes in step, each fed in its own types."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from onnx_asr.engine.lane import Chunk, Lane
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.walk import Walk
from tests.graphs import images, index, net, residual_net, run


def samples(x: np.ndarray, size: int) -> Calibration:
    chunks = tuple({"x": x[start : start + size]} for start in range(0, len(x), size))
    return Calibration(chunks, len(x), size, "")


def test_lanes_go_chunk_by_chunk_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lane runs its second chunk before all have run their first."""
    order: list[tuple[Lane, int]] = []
    advance = Lane.advance

    def spy(self: Lane, targets: list[str]) -> Iterator[Chunk]:
        for number, chunk in enumerate(advance(self, targets)):
            order.append((self, number))
            yield chunk

    monkeypatch.setattr(Lane, "advance", spy)
    model, x = residual_net(), images(20, seed=1)
    with Walk(samples(x, 8), Execution()) as walk:
        first, second = (walk.lane(Draft(index(model)), ["stem"]) for _ in range(2))
        sizes = [[len(chunk["stem"]) for chunk in chunks] for chunks in walk.step({first: ["stem"], second: ["stem"]})]
    assert sizes == [[8, 8], [8, 8], [4, 4]]
    assert order == [(lane, number) for number in range(3) for lane in (first, second)]


def test_a_network_is_fed_under_its_own_names_and_types() -> None:
    model = net("g (float16[N,3] z) => (float16[N,3] y) { y = Neg (z) }")
    x = images(4, seed=1)[:, :, 0, 0]
    with Walk(samples(x, 4), Execution()) as walk:
        ((chunk,),) = (
            [{name: value.copy() for name, value in one.items()} for one in chunks]
            for chunks in walk.step({walk.lane(Draft(index(model)), ["y"]): ["y"]})
        )
    np.testing.assert_array_equal(chunk["y"], run(model, {"z": x.astype(np.float16)})["y"])


def test_buffers_are_free_when_the_walk_ends() -> None:
    with Walk(samples(images(8, seed=1), 8), Execution(memory_limit=0)) as walk:
        held = walk.resources.store.allocate((4,), np.dtype(np.float32))
        assert isinstance(held.base, np.memmap)
    again = walk.resources.store.allocate((4,), np.dtype(np.float32))
    assert again.ctypes.data != held.ctypes.data
