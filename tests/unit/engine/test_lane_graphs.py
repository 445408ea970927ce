"""Lanes on unusual graphs: each node runs once and every tensor comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr.engine.lane as lane_module
from onnx_asr.engine.buffers import BufferPool
from onnx_asr.engine.lane import Lane
from onnx_asr.engine.session import Runtime
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.points import survey
from onnx_asr.graph.segments import extract
from onnx_asr.networks.pair import by_level
from tests.graphs import (
    bn,
    constant,
    copy,
    dense_net,
    digit_images,
    digits,
    images,
    index,
    net,
    parameter,
    positions,
    residual_net,
    run,
    set_parameter,
)

TWO_OUTPUTS = """
two (float[N,3,8,8] x, float[N,3,8,8] extra) => (float[N,4] y, float[N,4,8,8] side) {
  a = Conv (x, a_w)
  side = BatchNormalization (a, n_gamma, n_beta, n_mean, n_var)
  again = BatchNormalization (a, m_gamma, m_beta, m_mean, m_var)
  s = Add (side, again)
  e = Conv (extra, a_w)
  t = Mul (s, e)
  b = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (t, b_w)
  p = GlobalAveragePool (b)
  y = Flatten (p)
}
"""

BRANCHING = """
branching (float[N,3,8,8] x) => (float[N,4,8,8] y) {
  a = Conv (x, a_w)
  r = Relu (a)
  flag = Constant <value = bool {1}> ()
  shift = Identity (stored)
  c = If (flag) <
    then_branch = t () => (float[N,4,8,8] p) { p = Add (r, shift) },
    else_branch = e () => (float[N,4,8,8] q) { q = Neg (r) }
  >
  b = Conv (c, b_w)
  y = Add (b, r)
}
"""

RAGGED = """
ragged (float[N,3] x) => (float[K] y) {
  a = Gemm (x, w)
  at = NonZero (a)
  picked = GatherND (a, places)
  places = Transpose <perm=[1,0]> (at)
  y = Relu (picked)
}
"""


def two_outputs() -> onnx.ModelProto:
    """Two inputs and outputs; IR 3, in which initializers are graph inputs; two points on one tensor."""
    model = net(TWO_OUTPUTS, ir=3, a_w=(4, 3, 1, 1), b_w=(4, 4, 3, 3), **bn("n", "m", channels=4))
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return model


def branching() -> onnx.ModelProto:
    """Tensors that only a subgraph reads, next to constants in a node and behind an Identity."""
    return net(BRANCHING, a_w=(4, 3, 1, 1), b_w=(4, 4, 1, 1), stored=(4, 1, 1))


NETS: dict[str, Callable[[], onnx.ModelProto]] = {
    "residual": residual_net,
    "dense": dense_net,
    "two outputs": two_outputs,
    "branching": branching,
    "digits_resnet": lambda: digits("resnet"),
    "digits_mobilenet": lambda: digits("mobilenet"),
    "digits_densenet": lambda: digits("densenet"),
}


def inputs_of(name: str, model: onnx.ModelProto, count: int = 12) -> dict[str, np.ndarray]:
    inputs = [value.name for value in index(model).inputs]
    if name.startswith("digits"):
        return {inputs[0]: digit_images()[0][:count]}
    return {name: images(count, seed=7 + number) for number, name in enumerate(inputs)}


def chunks_of(feeds: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    count = len(next(iter(feeds.values())))
    return [{name: value[at : at + size] for name, value in feeds.items()} for at in range(0, count, size)]


def stages_of(model: onnx.ModelProto) -> list[list[str]]:
    """The tensors of each level, then the outputs."""
    levels = [[point.tensor for point in group] for group in by_level(survey(index(model)).points)]
    return [*levels, [value.name for value in model.graph.output]]


class Ledger(BufferPool):
    """Keeps track of the buffers in use."""

    def __init__(self) -> None:
        super().__init__()
        self.out: dict[int, int] = {}

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        array = super().allocate(shape, dtype)
        assert array.ctypes.data not in self.out, "a buffer that is in use was handed out again"
        self.out[array.ctypes.data] = array.nbytes
        return array

    def release(self, array: np.ndarray) -> None:
        self.out.pop(array.ctypes.data, None)
        super().release(array)

    @property
    def bytes(self) -> int:
        return sum(self.out.values())


def walk(
    model: onnx.ModelProto,
    stages: list[list[str]],
    feeds: dict[str, np.ndarray],
    *,
    size: int = 5,
    plan: EditPlan | None = None,
    between: Callable[[Lane, int], None] = lambda lane, stage: None,
    pool: BufferPool | None = None,
) -> dict[str, np.ndarray]:
    """Advance stage by stage, calling ``between`` after each; the results are named ``"<stage>:<tensor>"``."""
    parts: dict[str, list[np.ndarray]] = {}
    with pool or BufferPool() as used:
        targets = [name for stage in stages for name in stage]
        lane = Lane(index(model), targets, chunks_of(feeds, size), used, Runtime(threads=1), plan)
        for number, stage in enumerate(stages):
            for chunk in lane.advance(stage):
                assert set(chunk) == set(stage)
                for name, value in chunk.items():
                    parts.setdefault(f"{number}:{name}", []).append(value.copy())
            between(lane, number)
    return {name: np.concatenate(values) for name, values in parts.items()}


def assert_close(actual: np.ndarray, expected: np.ndarray, name: str) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, atol=3e-6 * scale, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("size", [12, 5])
@pytest.mark.parametrize("name", NETS)
def test_a_walk_over_all_levels_gives_the_tensors_of_one_full_run(name: str, size: int) -> None:
    model = NETS[name]()
    feeds, stages, pool = inputs_of(name, model), stages_of(model), Ledger()
    assert len(stages) > 2
    expected = run(model, feeds, [tensor for stage in stages for tensor in stage])
    walked = walk(model, stages, feeds, size=size, pool=pool)
    assert len(walked) == sum(len(set(stage)) for stage in stages)
    for key, value in walked.items():
        assert_close(value, expected[key.split(":", 1)[1]], key)
    assert pool.out == {}  # nothing is held at the end


@pytest.mark.parametrize("name", NETS)
def test_every_node_runs_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NETS[name]()
    seen: Counter[int] = Counter()

    def counting(found: GraphIndex, at: Any, *rest: Any) -> onnx.ModelProto:
        at = set(at)
        seen.update(p for p in at if not all(found.is_constant(output) for output in found.nodes[p].output))
        return extract(found, at, *rest)

    monkeypatch.setattr(lane_module, "extract", counting)
    walk(model, stages_of(model), inputs_of(name, model))
    assert set(seen.values()) == {1}
    constants = {p for p, node in enumerate(model.graph.node) if all(map(index(model).is_constant, node.output))}
    assert set(seen) | constants == set(range(len(model.graph.node)))


def test_a_shortcut_is_held_exactly_as_long_as_it_is_needed() -> None:
    model = residual_net()
    feeds, pool = inputs_of("residual", model), Ledger()
    held: list[int] = []
    sizes = {name: value.nbytes for name, value in run(model, feeds, ["stem", "stem_r", "a", "b", "sum1_r"]).items()}
    stages = [["stem"], ["a"], ["b"], ["c", "short"], ["logits"]]
    walk(model, stages, feeds, pool=pool, between=lambda lane, _: held.append(pool.bytes))
    assert held[:3] == [sizes["stem"], sizes["stem_r"] + sizes["a"], sizes["stem_r"] + sizes["b"]]
    assert held[-1] == 0


def test_batchnorms_changed_just_after_they_were_measured() -> None:
    """As a repair does, level by level; the result equals one run of the file with all changes."""
    model = residual_net()
    feeds, stages = inputs_of("residual", model), stages_of(residual_net())
    plan, edited = EditPlan(), copy(model)
    norms = {model.graph.node[p].input[0]: p for p in positions(model, "BatchNormalization")}

    def change(lane: Lane, number: int) -> None:
        for tensor in stages[number]:
            if tensor in norms:
                value = parameter(model, norms[tensor], 3) + 0.1 * (number + 1)
                plan.values[norms[tensor], 3] = value
                set_parameter(edited, norms[tensor], 3, value)

    walked = walk(model, stages, feeds, plan=plan, between=change)
    expected = run(edited, feeds, [name for stage in stages for name in stage])
    assert np.abs(expected["logits"] - run(model, feeds)["logits"]).max() > 0.01
    for key, value in walked.items():
        assert_close(value, expected[key.split(":", 1)[1]], key)


def test_a_transform_along_the_last_axis() -> None:
    model = net("g (float[N,6,4] x) => (float[N,6,4] y) { p = MatMul (x, w)  y = Relu (p) }", w=(4, 4))
    feeds = {"x": np.random.default_rng(0).normal(size=(5, 6, 4)).astype(np.float32)}
    gain, shift = np.array([1.0, 2.0, 0.5, 0.0]), np.array([0.0, 1.0, -1.0, 0.25])

    def change(lane: Lane, number: int) -> None:
        lane.transform("p" if number == 0 else "y", gain, shift, -1)  # the second one: nobody needs it any more

    walked = walk(model, [["p"], ["y"]], feeds, size=2, between=change)
    assert_close(walked["1:y"], np.maximum(run(model, feeds, ["p"])["p"] * gain + shift, 0), "y")


def test_two_readers_of_one_tensor_can_both_be_replaced() -> None:
    """Two BatchNormalizations on one tensor, in training mode as ``--bn ema`` needs it."""
    model = two_outputs()
    feeds, pool = inputs_of("two outputs", model), Ledger()
    at = {node.output[0]: p for p, node in enumerate(model.graph.node)}

    def change(lane: Lane, number: int) -> None:
        if number == 0:
            lane.replace(at["side"], lambda n, tensor: tensor * 2)
            lane.replace(at["again"], lambda n, tensor: tensor * 3)

    walked = walk(model, [["a", "a"], ["y", "side"]], feeds, between=change, pool=pool)
    full = run(model, feeds, ["a", "e"])
    assert_close(walked["1:side"], full["a"] * 2, "side")
    rest = net(
        """
        g (float[N,4,8,8] t) => (float[N,4] y) {
          b = Conv <pads=[1,1,1,1]> (t, w)
          p = GlobalAveragePool (b)
          y = Flatten (p)
        }
        """,
        w=constant(model, "b_w"),
    )
    assert_close(walked["1:y"], run(rest, {"t": full["a"] * 5 * full["e"]})["y"], "y")
    assert pool.out == {}


def test_arrays_changed_in_place_are_what_later_nodes_read() -> None:
    model = residual_net()
    feeds = inputs_of("residual", model)
    with BufferPool() as pool:
        lane = Lane(index(model), ["a", "logits"], chunks_of(feeds, 5), pool, Runtime(threads=1))
        for chunk in lane.advance(["a"]):
            chunk["a"] += 1.0
        logits = np.concatenate([chunk["logits"].copy() for chunk in lane.advance(["logits"])])
    edited = copy(model)
    (at,) = (p for p, node in enumerate(model.graph.node) if node.output[0] == "a")
    set_parameter(edited, at, 2, np.ones(8))
    assert_close(logits, run(edited, feeds)["logits"], "logits")


def test_tensors_whose_size_depends_on_the_data() -> None:
    """Detection heads: the number of rows differs between chunks."""
    lines = RAGGED.splitlines()
    lines[4], lines[5] = lines[5], lines[4]  # in order
    model = net("\n".join(lines), w=(3, 2))
    x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    x[::3] = 0.0
    walked = walk(model, [["a"], ["picked"], ["y"]], {"x": x}, size=4)
    whole = run(model, {"x": x}, ["a", "picked"])
    np.testing.assert_allclose(walked["1:picked"], whole["picked"], atol=1e-6)
    np.testing.assert_allclose(walked["2:y"], whole["y"], atol=1e-6)
