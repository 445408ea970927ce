"""Where units lie along axes, and how many of them sizes leave."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_asr.channels.rules import trace
from onnx_asr.channels.stretches import Equation, Groups, Stretch, numbers_left
from onnx_asr.errors import StructureError
from tests.graphs import index, net


def groups_of(body: str, **weights: object) -> Groups:
    shapes = {"v": (4, 3, 1, 1), "w": (2, 3, 1, 1)}
    text = f"g (float[1,3,2,2] x) => (y) {{ a = Conv (x, v)  b = Conv (x, w)  {body} }}"
    return Groups(trace(index(net(text, **shapes, **weights))))


def test_operands_of_a_concat_follow_each_other() -> None:
    groups = groups_of("c = Concat <axis=1> (a, b, a)  y = Conv (c, u)", u=(5, 10, 1, 1))
    assert groups.stretches(np.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 3])) == (
        Stretch(0, 1, 1),
        Stretch(1, 1, 1),
        Stretch(0, 1, 1),
    )


def test_a_flatten_repeats_each_unit_and_channels_last_repeat_them_all() -> None:
    groups = groups_of("y = Add (a, a)")
    assert groups.stretches(np.repeat(np.arange(4), 3)) == (Stretch(0, 1, 3),)
    assert groups.stretches(np.tile(np.arange(4), 2)) == (Stretch(0, 2, 1),)
    assert groups.stretches(np.tile(np.repeat(np.arange(4), 3), 2)) == (Stretch(0, 2, 3),)
    assert groups.stretches(np.array([1, 0, 2, 3])) is None
    assert groups.stretches(np.array([0, 0, 1, 2, 3])) is None
    places = Stretch(0, 2, 3).places(10, 4, np.array([1, 3]))
    assert places[0].tolist() == [[13, 14, 15], [19, 20, 21]]
    assert (places[1] - places[0] == 12).all()


def test_a_slice_divides_a_group() -> None:
    values = {"s": np.array([1]), "e": np.array([3]), "c": np.array([1]), "q": (5, 2, 1, 1), "u": (5, 4, 1, 1)}
    groups = groups_of("d = Slice (a, s, e, c)  p = Conv (d, q)  y = Conv (a, u)", **values)
    assert [units.tolist() for units in groups.units[:3]] == [[0], [3], [1, 2]]


def test_sizes_tell_how_many_are_left() -> None:
    groups = groups_of("c = Concat <axis=1> (a, b)  y = Conv (c, u)", u=(5, 6, 1, 1))
    both, first, second = (Stretch(0, 1, 1), Stretch(1, 1, 2)), (Stretch(0, 1, 1),), (Stretch(1, 1, 1),)
    assert numbers_left(groups, {}, [Equation(both, 5, "c"), Equation(first, 3, "a")])[:2] == [3, 1]
    assert numbers_left(groups, {0: "an output"}, [Equation(both, 6, "c")])[:2] == [4, 1]
    assert numbers_left(groups, {}, [Equation(both, 8, "c")])[:2] == [4, 2]
    with pytest.raises(StructureError, match="the sizes do not tell how the 5 channels of c divide"):
        numbers_left(groups, {}, [Equation(both, 5, "c")])
    with pytest.raises(StructureError, match="c has 6 channels, which do not fit those of the other layers"):
        numbers_left(groups, {}, [Equation(both, 6, "c"), Equation(first, 3, "a")])
    with pytest.raises(StructureError, match="b has 1 channels, but none can be missing: an output"):
        numbers_left(groups, {1: "an output"}, [Equation(second, 1, "b")])
