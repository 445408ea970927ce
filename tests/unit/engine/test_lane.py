"""The segmented walk against one plain full run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_asr.engine.buffers import BufferPool
from onnx_asr.engine.lane import Lane
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import ModelError, OptionError
from onnx_asr.graph.edit import EditPlan, apply
from tests.graphs import dense_net, images, index, net, parameter, residual_net, run

NETS = {"residual": residual_net, "dense": dense_net}
STOPS = {
    "residual": [["stem"], ["a"], ["b", "stem_r"], ["c", "short"], ["logits"]],
    "dense": [["stem"], ["a"], ["cat"], ["b"], ["sum"], ["up"], ["logits"]],
}


def chunks_of(x: np.ndarray, size: int) -> list[dict[str, np.ndarray]]:
    return [{"x": x[start : start + size]} for start in range(0, len(x), size)]


def walk(
    model: onnx.ModelProto,
    x: np.ndarray,
    stops: list[list[str]],
    *,
    size: int = 8,
    limit: int | None = None,
    threads: int = 1,
    plan: EditPlan | None = None,
) -> dict[str, np.ndarray]:
    """Every requested tensor, chunks joined."""
    parts: dict[str, list[np.ndarray]] = {}
    with BufferPool(limit) as pool:
        targets = [name for names in stops for name in names]
        lane = Lane(index(model), targets, chunks_of(x, size), pool, Runtime(threads=threads), plan)
        for names in stops:
            for chunk in lane.advance(names):
                for name, value in chunk.items():
                    parts.setdefault(name, []).append(value.copy())
            pool.trim()
    return {name: np.concatenate(values) for name, values in parts.items()}


@pytest.mark.parametrize("size", [32, 8, 7, 1])
@pytest.mark.parametrize("name", NETS)
def test_segments_add_up_to_one_full_run(name: str, size: int) -> None:
    """The last chunk is shorter than the others."""
    model, x = NETS[name](), images(32, seed=1)
    tensors = [tensor for names in STOPS[name] for tensor in names]
    expected = run(model, {"x": x}, tensors)
    actual = walk(model, x, STOPS[name], size=size)
    assert set(actual) == set(tensors)
    for tensor in tensors:
        np.testing.assert_allclose(actual[tensor], expected[tensor], atol=2e-5, err_msg=tensor)


@pytest.mark.parametrize("limit", [0, 20_000, 10**9])
@pytest.mark.parametrize("name", NETS)
def test_a_memory_limit_changes_no_bit(name: str, limit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, x = NETS[name](), images(32, seed=1)
    free = walk(model, x, STOPS[name])
    assert list(tmp_path.iterdir()) == []
    tight = walk(model, x, STOPS[name], limit=limit)
    for tensor, values in free.items():
        np.testing.assert_array_equal(tight[tensor], values)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize("name", NETS)
def test_threads_change_no_bit(name: str) -> None:
    model, x = NETS[name](), images(32, seed=1)
    one, two = (walk(model, x, STOPS[name], threads=threads) for threads in (1, 2))
    for tensor, values in one.items():
        np.testing.assert_array_equal(two[tensor], values)


def test_edits_take_effect_in_the_segments_that_follow() -> None:
    """As in the walk: measure a tensor, then change the BatchNormalization behind it."""
    model, x = residual_net(), images(24, seed=1)
    spots = {node.output[0]: place for place, node in enumerate(model.graph.node)}
    plan = EditPlan()
    with BufferPool() as pool:
        lane = Lane(index(model), ["a", "logits"], chunks_of(x, 8), pool, Runtime(threads=1), plan)
        list(lane.advance(["a"]))
        plan.values[spots["a_n"], 1] = parameter(model, spots["a_n"], 1) * 3
        plan.values[spots["b"], 2] = np.linspace(-1, 1, 8)  # a bias where there is none
        found = np.concatenate([chunk["logits"].copy() for chunk in lane.advance(["logits"])])
    expected = run(apply(index(model), plan), {"x": x})["logits"]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(found - run(model, {"x": x})["logits"]).max() > 0.01


def test_a_transform_stands_for_new_weights_of_the_producer() -> None:
    model, x = residual_net(), images(24, seed=1)
    gain, shift = np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8)
    with BufferPool() as pool:
        lane = Lane(index(model), ["a", "logits"], chunks_of(x, 8), pool, Runtime(threads=1))
        list(lane.advance(["a"]))
        lane.transform("a", gain, shift, 1)
        found = np.concatenate([chunk["logits"].copy() for chunk in lane.advance(["logits"])])
    spots = {node.output[0]: place for place, node in enumerate(model.graph.node)}
    weight = parameter(model, spots["a"], 1) * gain[:, None, None, None]
    changed = apply(index(model), EditPlan(values={(spots["a"], 1): weight, (spots["a"], 2): shift}))
    np.testing.assert_allclose(found, run(changed, {"x": x})["logits"], atol=2e-5)


def test_a_transform_in_float16_overflows_only_where_its_result_does() -> None:
    model = net("g (float16[N,1] x) => (float16[N,1] y) { a = Neg (x)  y = Neg (a) }")
    x = np.array([[-40_000], [-30_000], [-60_000]], np.float16)
    with BufferPool() as pool:
        lane = Lane(index(model), ["a", "y"], [{"x": x}], pool, Runtime(threads=1))
        list(lane.advance(["a"]))
        lane.transform("a", np.array([2.0]), np.array([-30_000.0]), 1)
        (chunk,) = ({name: value.copy() for name, value in item.items()} for item in lane.advance(["y"]))
    np.testing.assert_allclose(chunk["y"].astype(float), [[-50_000], [-30_000], [-np.inf]], rtol=1e-3)


def test_a_node_can_be_computed_by_the_caller() -> None:
    """The function gets chunk number and input; the rest of the network gets its result."""
    model, x = residual_net(), images(20, seed=1)
    spots = {node.output[0]: place for place, node in enumerate(model.graph.node)}
    numbers = []

    def half(number: int, tensor: np.ndarray) -> np.ndarray:
        numbers.append(number)
        return np.maximum(tensor, 0) / 2

    with BufferPool() as pool:
        lane = Lane(index(model), ["stem_n", "logits"], chunks_of(x, 8), pool, Runtime(threads=1))
        list(lane.advance(["stem_n"]))
        lane.replace(spots["stem_r"], half)
        found = np.concatenate([chunk["logits"].copy() for chunk in lane.advance(["logits"])])
    assert numbers == [0, 1, 2]
    # Relu(z) / 2 = Relu(z / 2): the same net with scale and bias of that BatchNormalization halved
    changes = {(spots["stem_n"], slot): parameter(model, spots["stem_n"], slot) / 2 for slot in (1, 2)}
    expected = run(apply(index(model), EditPlan(values=changes)), {"x": x})["logits"]
    np.testing.assert_allclose(found, expected, atol=2e-5)


class CountingPool(BufferPool):
    """Counts the bytes in use."""

    def __init__(self) -> None:
        super().__init__()
        self.out: dict[int, int] = {}
        self.peak = 0

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        array = super().allocate(shape, dtype)
        self.out[array.ctypes.data] = array.nbytes
        self.peak = max(self.peak, sum(self.out.values()))
        return array

    def release(self, array: np.ndarray) -> None:
        self.out.pop(array.ctypes.data, None)
        super().release(array)


def test_tensors_are_let_go_once_nobody_needs_them() -> None:
    """Forty layers in a row: never more than two layers' tensors at a time."""
    layers = 40
    lines = [f"t{i + 1} = Conv (t{i}, w)" for i in range(layers)]
    model = net(
        f"g (float[N,4,8,8] x) => (float[N,4,8,8] y) {{ t0 = Relu (x) {' '.join(lines)} y = Relu (t{layers}) }}",
        w=(4, 4, 1, 1),
    )
    x = images(32, seed=1, shape=(4, 8, 8))
    pool = CountingPool()
    stops = [f"t{i + 1}" for i in range(layers)]
    with pool:
        lane = Lane(index(model), stops, chunks_of(x, 8), pool, Runtime(threads=1))
        for stop in stops:
            for _ in lane.advance([stop]):
                pass
            assert sum(pool.out.values()) <= x.nbytes
        assert pool.peak <= 2 * x.nbytes
        assert sum(pool.out.values()) == 0


def test_a_shortcut_is_held_until_the_add_has_read_it() -> None:
    model, x = residual_net(), images(16, seed=1)
    expected = run(model, {"x": x}, ["b", "stem_r", "sum1"])
    with BufferPool() as pool:
        lane = Lane(index(model), ["a", "b", "sum1"], chunks_of(x, 8), pool, Runtime(threads=1))
        for stop in ("a", "b"):
            list(lane.advance([stop]))
        found = np.concatenate([chunk["sum1"].copy() for chunk in lane.advance(["sum1"])])
    np.testing.assert_allclose(found, expected["sum1"], atol=2e-5)


def test_inputs_that_are_targets_and_repeated_targets() -> None:
    model, x = residual_net(), images(10, seed=1)
    with BufferPool() as pool:
        lane = Lane(index(model), ["x", "stem", "stem"], chunks_of(x, 4), pool, Runtime(threads=1))
        first = np.concatenate([chunk["x"].copy() for chunk in lane.advance(["x"])])
        twice = [np.concatenate([chunk["stem"].copy() for chunk in lane.advance(["stem"])]) for _ in range(2)]
    np.testing.assert_array_equal(first, x)
    np.testing.assert_array_equal(twice[0], twice[1])
    np.testing.assert_allclose(twice[0], run(model, {"x": x}, ["stem"])["stem"], atol=2e-5)


def test_the_callers_chunks_are_only_read() -> None:
    model, x = residual_net(), images(16, seed=1)
    before = x.copy()
    x.setflags(write=False)
    walk(model, x, STOPS["residual"])
    np.testing.assert_array_equal(x, before)


def test_a_pool_uses_buffers_again() -> None:
    with BufferPool() as pool:
        first = pool.allocate((4, 5), np.dtype(np.float32))
        place = first.ctypes.data
        pool.release(first)
        assert pool.allocate((2, 10), np.dtype(np.float32)).ctypes.data == place
        assert pool.allocate((2, 10), np.dtype(np.float32)).ctypes.data != place
        pool.release(np.zeros(3))  # not from the pool: nothing happens
        assert pool.allocate((0, 3), np.dtype(np.float32)).shape == (0, 3)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_spilled_buffers_leave_memory_and_keep_their_content() -> None:
    def resident() -> int:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(("RssAnon", "RssFile")))

    count, megabytes = 6, 16
    with BufferPool(megabytes << 20, reserved=megabytes << 20) as pool:
        before = resident()
        buffers = []
        for number in range(count):
            buffers.append(pool.allocate((megabytes, 1 << 18), np.dtype(np.float32)))
            buffers[-1][...] = number
            pool.set_aside(buffers[-1])
        assert resident() - before < megabytes << 10
        for number, buffer in enumerate(buffers):
            assert (buffer == number).all()
            pool.release(buffer)
        assert resident() - before < megabytes << 10
        again = pool.allocate((megabytes, 1 << 18), np.dtype(np.float32))
        assert again.ctypes.data in {buffer.ctypes.data for buffer in buffers}


def test_a_model_that_cannot_run_is_a_model_error() -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }", w=(3, 4))
    with pytest.raises(ModelError, match="onnxruntime cannot"):
        Session(model, Runtime(threads=1)).run({"x": np.zeros((1, 4), np.float32)})


def test_a_part_that_cannot_run_is_named() -> None:
    model = net("g (float[N,4] x) => (float[N,3] y) { [first] a = Relu (x)  [second] y = MatMul (a, w) }", w=(4, 3))
    with BufferPool() as pool:
        lane = Lane(index(model), ["a", "y"], [{"x": np.zeros((2, 5), np.float32)}], pool, Runtime(threads=1))
        list(lane.advance(["a"]))
        with pytest.raises(ModelError, match=r"cannot (load|run) the part of the model up to 'y' \(nodes .*MatMul"):
            list(lane.advance(["y"]))


def test_providers_that_are_not_there_are_refused() -> None:
    with pytest.raises(OptionError, match="CPUExecutionProvider"):
        Runtime(providers=("NoSuchProvider",))
