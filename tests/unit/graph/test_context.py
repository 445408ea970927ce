"""The surroundings of a point: residual sums, ReLUs and classes behind it, and the order of steps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from onnx_asr.graph.context import Context, contexts, steps
from onnx_asr.graph.points import survey
from tests.graphs import bn, index, net


def contexts_of(text: str, **weights: Any) -> tuple[dict[str, Context], list[list[str]]]:
    found = index(net(text, **weights))
    items = contexts(found, survey(found).points)
    return {item.point.tensor: item for item in items}, [
        [item.point.tensor for item in group] for group in steps(found, items)
    ]


def surroundings(item: Context) -> tuple[str, str | None, bool, bool]:
    return item.output, item.shortcut, item.batchnorm is not None, item.relu


W = {"w": (3, 3, 1, 1)}


SHAPE = "float[N,3,4,4]"


def test_contexts_of_a_residual_block() -> None:
    items, order = contexts_of(
        f"""
        g ({SHAPE} x) => ({SHAPE} y) {{
          a = Conv (x, w)
          an = BatchNormalization (a, n_gamma, n_beta, n_mean, n_var)
          ar = Relu (an)
          b = Conv (ar, w)
          bn = BatchNormalization (b, n_gamma, n_beta, n_mean, n_var)
          sum = Add (ar, bn)
          y = Relu (sum)
        }}
        """,
        **W,
        **bn("n", channels=3),
    )
    assert surroundings(items["a"]) == ("an", None, False, True)
    assert surroundings(items["b"]) == ("bn", "ar", False, True)
    assert order == [["a"], ["b"]]


def test_a_batchnorm_between_the_add_and_the_relu() -> None:
    items, _ = contexts_of(
        f"""
        g ({SHAPE} x) => ({SHAPE} y) {{
          a = Conv (x, w)
          sum = Add (a, x)
          n = BatchNormalization (sum, n_gamma, n_beta, n_mean, n_var)
          y = Relu (n)
        }}
        """,
        **W,
        **bn("n", channels=3),
    )
    assert surroundings(items["a"]) == ("a", "x", True, True)


@pytest.mark.parametrize(
    ("tail", "relu"),
    [
        ("y = Relu (a)", True),
        ("y = Clip (a, zero, six)", True),
        ("y = Clip (a, minus, six)", False),
        ("y = Clip (a)", False),
        ("y = Sigmoid (a)", False),
        ("y = Identity (a)", False),
        ("r = Relu (a)  y = Add (r, a)", False),
        ("r = Relu (a)  c = Clip (a, zero, six)  y = Add (r, c)", True),
    ],
)
def test_consumers_that_hide_negative_values(tail: str, relu: bool) -> None:
    scalars = {"zero": np.float32(0), "six": np.float32(6), "minus": np.float32(-1)}
    items, _ = contexts_of(f"g ({SHAPE} x) => ({SHAPE} y) {{ a = Conv (x, w) {tail} }}", **W, **scalars)
    assert items["a"].relu is relu


def test_a_relu_with_a_way_around_it_hides_nothing() -> None:
    items, _ = contexts_of(f"g ({SHAPE} x) => ({SHAPE} y, {SHAPE} a) {{ a = Conv (x, w)  y = Relu (a) }}", **W)
    assert not items["a"].relu


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("(float[N,5] x) => (float[N,4] y) { y = MatMul (x, m) }", True),
        ("(float[N,5] x) => (float[N,4] y) { a = MatMul (x, m)  y = Softmax (a) }", True),
        ("(float[N,5] x) => (float[N,4] y, float[N,4] a) { a = MatMul (x, m)  y = Softmax (a) }", False),
        ("(float[N,5] x) => (float[N,4] y) { a = MatMul (x, m)  y = Sigmoid (a) }", False),
        ("(float[N,5] x) => (float[N,5] x2, float[N,4] y) { x2 = Relu (x)  y = MatMul (x, m) }", False),
        ("(float[N,40,5] x) => (float[N,40,4] y) { y = MatMul (x, m) }", False),
        ("(float[N,3,1,1] x) => (float[N,3] y) { a = Conv (x, w)  s = Softmax <axis=1> (a)  y = Flatten (s) }", True),
        ("(float[N,3,1,1] x) => (float[N,3,1,1] y) { y = Conv (x, w) }", False),
    ],
)
def test_outputs_that_are_logits_of_classes(text: str, classes: bool) -> None:
    items, _ = contexts_of(f"g {text}", **W, m=(5, 4))
    (item,) = items.values()
    assert item.classes is classes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a = Conv (x, w)  y = Add (a, one)", "a constant"),
        ("a = Conv (x, w)  y = Add (a, a)", "itself"),
        ("a = Conv (x, w)  y0 = Add (a, x)  y = Add (y0, a)", "read twice"),
        ("a = Conv (x, w)  y = Mul (a, x)", "no sum"),
    ],
)
def test_inputs_that_are_not_shortcuts(text: str, why: str) -> None:
    items, _ = contexts_of(f"g ({SHAPE} x) => ({SHAPE} y) {{ {text} }}", **W, one=np.ones((1, 3, 1, 1), np.float32))
    assert items["a"].shortcut is None, why


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("operands", ["p, q", "q, p"])
def test_of_two_branches_of_one_level_only_the_later_one_corrects_the_sum(swapped: bool, operands: str) -> None:
    """Both end at level 2; the later one is measured after the other was written."""
    branches = ["p = Conv (r, w)", "q = Conv (r, w)"]
    if swapped:
        branches.reverse()
    items, order = contexts_of(
        f"""
        g ({SHAPE} x) => ({SHAPE} y) {{
          a = Conv (x, w)
          r = Relu (a)
          {branches[0]}
          {branches[1]}
          y = Add ({operands})
        }}
        """,
        **W,
    )
    first, second = branches[0][0], branches[1][0]
    assert items[first].shortcut is None
    assert items[second].shortcut == first
    assert order == [["a"], [first], [second]]


def test_the_longer_branch_corrects_the_sum_even_if_it_comes_first_in_the_file() -> None:
    items, order = contexts_of(
        f"""
        g ({SHAPE} x) => ({SHAPE} y) {{
          b = Conv (x, w)
          c = Conv (b, w)
          short = Conv (x, w)
          y = Add (c, short)
        }}
        """,
        **W,
    )
    assert (items["c"].shortcut, items["short"].shortcut) == ("short", None)
    assert order == [["b", "short"], ["c"]]


def test_steps_come_after_what_they_need() -> None:
    """Three branches into two sums, all on one level: each waits for the one before."""
    _, order = contexts_of(
        f"""
        g ({SHAPE} x) => ({SHAPE} y) {{
          p = Conv (x, w)
          q = Conv (x, w)
          s = Add (p, q)
          t = Conv (x, w)
          y = Add (s, t)
        }}
        """,
        **W,
    )
    assert order == [["p"], ["q"], ["t"]]
    flat = list(itertools.chain.from_iterable(order))
    assert len(flat) == len(set(flat)) == 3
