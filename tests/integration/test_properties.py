"""Properties of every network: small random graphs, compared by plain full runs in onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnx_asr.engine.session import Runtime
from onnx_asr.networks.execution import Execution
from onnx_asr.repairing.options import METHODS, Method, RepairOptions
from onnx_asr.repairing.pipeline import repair
from tests.graphs import (
    copy,
    first_output,
    folded,
    images,
    parameter,
    positions,
    pruned,
    recalibrated,
    set_parameter,
    weights,
)

COUNT = 24
FEW = settings(max_examples=12)


@dataclass
class Builder:
    """A network that grows layer by layer.

    Attributes:
        inner: Position of a convolution whose channels only the one after it sees, and that one's position.
    """

    seed: int
    channels: int = 3
    size: int = 8
    last: str = "x"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    inner: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = np.random.default_rng(self.seed)

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def conv(self, source: str, inputs: int, outputs: int, kernel: int, stride: int, groups: int, pad: int) -> str:
        shape = (outputs, inputs // groups, kernel, kernel)
        weight = self._generator.normal(0, np.prod(shape[1:]) ** -0.5, shape)
        bias = self._generator.normal(0, 0.1, outputs)
        names = self.constant(weight), self.constant(bias)
        return self.node(
            "Conv", source, *names, kernel_shape=[kernel] * 2, strides=[stride] * 2, group=groups, pads=[pad] * 4
        )

    def normalised(self, source: str, channels: int, kept: bool) -> str:
        if kept:
            draw = self._generator
            scale, bias, mean = draw.uniform(0.5, 1.5, channels), draw.normal(0, 0.3, channels), np.zeros(channels)
            names = [self.constant(value) for value in (scale, bias, mean, np.ones(channels))]
            source = self.node("BatchNormalization", source, *names)
        return self.node("Relu", source)

    def model(self, classes: int) -> onnx.ModelProto:
        pooled = self.node("Flatten", self.node("GlobalAveragePool", self.last))
        weight = self._generator.normal(0, self.channels**-0.5, (classes, self.channels))
        output = self.node("Gemm", pooled, self.constant(weight), self.constant(np.zeros(classes)), transB=1)
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])],
            [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["N", classes])],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return recalibrated(model, {"x": images(COUNT, seed=7)})  # running statistics as after a training


@st.composite
def networks(draw: st.DrawFn, batchnorm: bool | None = None) -> tuple[onnx.ModelProto, list[tuple[int, int]]]:
    """A network, and the pairs of convolutions of which only the second reads the first."""
    build = Builder(draw(st.integers(0, 999)))

    def kept() -> bool:
        return draw(st.booleans()) if batchnorm is None else batchnorm

    for _ in range(draw(st.integers(1, 3))):
        source, channels = build.last, build.channels
        kind = draw(st.sampled_from(["conv", "pair", "residual", "concat", "pool"]))
        if kind == "pool" and build.size >= 4:
            operator = draw(st.sampled_from(["MaxPool", "AveragePool"]))
            build.last = build.node(operator, source, kernel_shape=[2, 2], strides=[2, 2])
            build.size //= 2
        elif kind == "pair":
            middle = 4 * draw(st.integers(1, 3))
            hidden = build.conv(source, channels, middle, 1, 1, 1, 0)
            first = len(build.nodes) - 1
            hidden = build.normalised(hidden, middle, kept())
            build.inner.append((first, len(build.nodes)))
            build.last = build.normalised(build.conv(hidden, middle, 8, 3, 1, 1, 1), 8, kept())
            build.channels = 8
        elif kind == "residual":
            branch = build.normalised(build.conv(source, channels, channels, 3, 1, 1, 1), channels, kept())
            build.last = build.node("Relu", build.node("Add", branch, source))
        elif kind == "concat":
            branch = build.normalised(build.conv(source, channels, 4, 3, 1, 1, 1), 4, kept())
            build.last, build.channels = build.node("Concat", source, branch, axis=1), channels + 4
        else:
            groups = draw(st.sampled_from([1, channels])) if channels % 4 == 0 else 1
            stride, pad = draw(st.sampled_from([1, 2])), draw(st.sampled_from([0, 1]))
            kernel = 3 if build.size >= 3 else 1
            wide = channels if groups > 1 else 8
            output = build.conv(source, channels, wide, kernel, stride, groups, pad)
            build.last, build.channels = build.normalised(output, wide, kept()), wide
            build.size = (build.size + 2 * pad - kernel) // stride + 1
    if not build.inner:  # so that there is always a convolution
        hidden = build.normalised(build.conv(build.last, build.channels, 8, 1, 1, 1, 0), 8, kept())
        build.inner.append((positions_of_last_conv(build), len(build.nodes)))
        build.last = build.normalised(build.conv(hidden, 8, 8, 1, 1, 1, 0), 8, kept())
        build.channels = 8
    return build.model(draw(st.integers(2, 7))), build.inner


def positions_of_last_conv(build: Builder) -> int:
    return max(place for place, node in enumerate(build.nodes) if node.op_type == "Conv")


def repaired(
    method: Method,
    damaged: onnx.ModelProto,
    dense: onnx.ModelProto,
    *,
    threads: int = 1,
    limit: int | None = None,
    batch_size: int = 8,
    samples: np.ndarray | None = None,
) -> onnx.ModelProto:
    data = images(COUNT, seed=7) if samples is None else samples
    options = RepairOptions(method=method, samples=len(data), verify_samples=0, batch_size=batch_size)
    execution = Execution(Runtime(threads=threads), limit)
    return repair(damaged, data, options, dense=dense, execution=execution).model


def outputs(model: onnx.ModelProto) -> np.ndarray:
    return first_output(model, images(COUNT, seed=7))


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(actual, expected, atol=tolerance * max(1.0, float(np.abs(expected).max())), rtol=0)


@FEW
@given(networks(), st.sampled_from(METHODS))
def test_a_network_repaired_by_itself_is_unchanged(drawn: Any, method: Method) -> None:
    model, _ = drawn
    assume(method not in ("bn", "auto") or positions(model, "BatchNormalization"))
    close(outputs(repaired(method, model, model)), outputs(model), 1e-4)


@FEW
@given(networks(), st.sampled_from(METHODS), st.sampled_from([0.3, 0.6, 0.9]))
def test_zeros_stay_zeros_and_numbers_finite(drawn: Any, method: Method, sparsity: float) -> None:
    model, _ = drawn
    damaged = pruned(model, sparsity)
    assume(method not in ("bn", "auto") or positions(model, "BatchNormalization"))
    result = repaired(method, damaged, model)
    for before, after in zip(weights(damaged).values(), weights(result).values(), strict=True):
        assert not after[before == 0].any()
    assert np.isfinite(outputs(result)).all()


@FEW
@given(networks(), st.sampled_from([method for method in METHODS if method != "auto"]))
def test_threads_and_memory_limit_change_no_bit_and_batches_little(drawn: Any, method: Method) -> None:
    model, _ = drawn
    assume(method != "bn" or positions(model, "BatchNormalization"))
    damaged = pruned(model, 0.6)
    result = repaired(method, damaged, model)
    expected = result.SerializeToString(deterministic=True)
    for changes in ({}, {"threads": 2}, {"limit": 0}, {"limit": 500_000}):
        assert repaired(method, damaged, model, **changes).SerializeToString(deterministic=True) == expected
    for batch_size in (1, 5, COUNT):
        close(outputs(repaired(method, damaged, model, batch_size=batch_size)), outputs(result), 1e-5)


@FEW
@given(networks(), st.sampled_from(["paired", "refit"]), st.sampled_from([0.3, 0.6]))
def test_folded_is_unfolded_under_the_same_mask(drawn: Any, method: Method, sparsity: float) -> None:
    model, _ = drawn
    damaged = pruned(model, sparsity)
    folded_result = repaired(method, folded(damaged), folded(model))
    close(outputs(folded_result), outputs(repaired(method, damaged, model)), 1e-3)


def permuted(model: onnx.ModelProto, pair: tuple[int, int], order: np.ndarray) -> onnx.ModelProto:
    """The same function, the channels between two convolutions in another order."""
    first, second = pair
    result = copy(model)
    for slot in (1, 2):
        set_parameter(result, first, slot, parameter(model, first, slot)[order])
    for between in range(first + 1, second):
        for slot in range(1, len(model.graph.node[between].input)):
            set_parameter(result, between, slot, parameter(model, between, slot)[order])
    set_parameter(result, second, 1, parameter(model, second, 1)[:, order])
    return result


@FEW
@given(networks(), st.sampled_from(["paired", "refit", "asr"]), st.randoms(use_true_random=False))
def test_permuted_channels_give_the_permuted_result(drawn: Any, method: Method, random: Any) -> None:
    model, inner = drawn
    damaged = pruned(model, 0.5)
    order = np.array(random.sample(range(len(parameter(model, inner[0][0], 1))), len(parameter(model, inner[0][0], 1))))
    dense_permuted, damaged_permuted = permuted(model, inner[0], order), permuted(damaged, inner[0], order)
    close(outputs(damaged_permuted), outputs(damaged), 1e-5)
    expected = outputs(permuted(repaired(method, damaged, model), inner[0], order))
    close(outputs(repaired(method, damaged_permuted, dense_permuted)), expected, 1e-3)


@FEW
@given(networks(), st.floats(0.05, 20.0))
def test_a_scaled_channel_is_restored(drawn: Any, factor: float) -> None:
    model, inner = drawn
    damaged = copy(model)
    node = inner[0][0]
    for slot in (1, 2):
        value = parameter(model, node, slot).copy()
        value[0] *= factor
        set_parameter(damaged, node, slot, value)
    close(outputs(repaired("paired", damaged, model)), outputs(model), 1e-3)


def without_values(model: onnx.ModelProto, changed: set[str]) -> bytes:
    """A model without the values that calibration may set, notes and metadata, as bytes."""
    result = copy(model)
    del result.metadata_props[:]
    for node in result.graph.node:
        node.doc_string = ""
    for tensor in result.graph.initializer:
        tensor.doc_string = ""
        if tensor.name in changed:
            tensor.raw_data = bytes(len(tensor.raw_data))
    return result.SerializeToString(deterministic=True)


@FEW
@given(networks(batchnorm=True), st.integers(1, 40))
def test_more_images_change_nothing_but_the_statistics(drawn: Any, count: int) -> None:
    model, _ = drawn
    damaged = pruned(model, 0.6)
    norms = [damaged.graph.node[place] for place in positions(damaged, "BatchNormalization")]
    statistics = {name for node in norms for name in node.input[3:]}
    few, many = (repaired("bn", damaged, model, samples=images(size, seed=7)) for size in (count, 64))
    assert without_values(few, statistics) == without_values(many, statistics) == without_values(damaged, statistics)


@FEW
@given(networks(), st.sampled_from([method for method in METHODS if method not in ("auto", "refit")]))
def test_the_same_images_again_change_nothing(drawn: Any, method: Method) -> None:
    model, _ = drawn
    assume(method != "bn" or positions(model, "BatchNormalization"))
    damaged, twice = pruned(model, 0.6), np.repeat(images(COUNT, seed=7), 2, axis=0)
    close(outputs(repaired(method, damaged, model, samples=twice)), outputs(repaired(method, damaged, model)), 1e-4)


@FEW
@given(networks(), st.sampled_from([0.3, 0.6, 0.9]))
def test_paired_a_second_time_changes_nothing_more(drawn: Any, sparsity: float) -> None:
    model, _ = drawn
    once = repaired("paired", pruned(model, sparsity), model)
    close(outputs(repaired("paired", once, model)), outputs(once), 1e-3)
