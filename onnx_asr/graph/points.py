"""Correction points: the tensors whose channels a repair can set, and the reasons where it cannot.

A point is the output of a Conv, ConvTranspose, Gemm or MatMul(+Add) whose weight is a constant, together with the
BatchNormalization that directly and alone follows it, or the input of a BatchNormalization that follows anything else
(pre-activation nets, DenseNet, BatchNormalization after Add).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.errors import ModelError
from onnx_asr.graph.index import (
    FLOAT_TYPES,
    GraphIndex,
    ancestors,
    attribute,
    is_standard,
    node_reads,
    subgraphs,
)

Kind = Literal["Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"]

WEIGHT_SLOT = 1
BN_SCALE, BN_BIAS, BN_MEAN, BN_VAR = 1, 2, 3, 4
_QUANTIZED = {
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "QLinearAdd",
    "QGemm",
    "QAttention",
}
_OTHER_LAYERS = {
    "DeformConv",
    "Einsum",
    "GRU",
    "LSTM",
    "RNN",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "NhwcConv",
    "NhwcFusedConv",
}


@dataclass(frozen=True)
class Point:
    """One correction point.

    Attributes:
        kind: Operator of the node that owns the rewritable parameters.
        node: Position of that node.
        tensor: The measured tensor: the node's output (after a MatMul's Add), or a lone BatchNormalization's input.
        channel_axis: Axis of the channels in ``tensor``; negative counts from the end.
        channels: Number of channels.
        weight_slot: Input slot of the weight; None for a lone BatchNormalization.
        bias_node: Node that holds the bias: ``node`` itself, the Add behind a MatMul, or None (MatMul without Add).
        bias_slot: Input slot of the bias in ``bias_node``; the slot may be empty or missing.
        batchnorm: Position of the BatchNormalization that belongs to the point, if any.
        level: Largest number of points on a path from the inputs to this one, itself included.
        name: What to call the point in reports.
    """

    kind: Kind
    node: int
    tensor: str
    channel_axis: int
    channels: int
    weight_slot: int | None
    bias_node: int | None
    bias_slot: int
    batchnorm: int | None
    level: int
    name: str


@dataclass(frozen=True)
class Skip:
    """A node that has parameters but cannot be repaired, and why."""

    node: int
    name: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """All correction points of a graph in file order, and everything skipped."""

    points: tuple[Point, ...]
    skips: tuple[Skip, ...]

    @property
    def has_batchnorm(self) -> bool:
        """Whether a BatchNormalization belongs to any of the points."""
        return any(point.batchnorm is not None for point in self.points)


def refuse_quantized(index: GraphIndex) -> None:
    """Raise where the graph is already quantized.

    Raises:
        ModelError: On QuantizeLinear, QLinearConv and their relatives.
    """
    for position, node in enumerate(index.nodes):
        if node.op_type in _QUANTIZED:
            raise ModelError(
                f"the model is already quantized (node {index.label(position)} is a {node.op_type}): its weights "
                "are integers that cannot be repaired; repair the float model first, then quantize the result"
            )


def survey(index: GraphIndex) -> Survey:
    """Find the correction points of a graph and number their levels.

    Raises:
        ModelError: When the graph is already quantized.
    """
    refuse_quantized(index)
    points: list[Point] = []
    skips: list[Skip] = []
    level: dict[str, int] = {}
    owned: set[int] = set()
    alive = ancestors(index, index.outputs)
    for position, node in enumerate(index.nodes):
        depth = max((level.get(name, 0) for name in node_reads(node)), default=0)
        if position not in owned:
            found = _examine(index, position, depth + 1)
            if found is not None and position not in alive:
                found = _skip(index, position, "no output of the model depends on it")
            if isinstance(found, Point):
                points.append(found)
                if found.batchnorm is not None:
                    owned.add(found.batchnorm)
                depth += 1
            elif found is not None:
                skips.append(found)
        for name in node.output:
            level[name] = depth
    return Survey(tuple(points), tuple(skips))


def without_selected(index: GraphIndex, found: Survey) -> Survey:
    """A survey whose points behind a NonMaxSuppression are skips.

    Such a node keeps other boxes in the dense network than in the pruned one, so that the two cannot be compared there.
    """
    selected: set[str] = set()
    for node in index.nodes:
        if is_standard(node, "NonMaxSuppression") or not selected.isdisjoint(node_reads(node)):
            selected.update(node.output)
    behind = [point for point in found.points if not selected.isdisjoint(node_reads(index.nodes[point.node]))]
    reason = "it follows a NonMaxSuppression, which keeps other boxes in the dense model than in the pruned one"
    skips = [*found.skips, *(_skip(index, point.node, reason) for point in behind)]
    points = tuple(point for point in found.points if point not in behind)
    return Survey(points, tuple(sorted(skips, key=lambda skip: skip.node)))


def _examine(index: GraphIndex, position: int, level: int) -> Point | Skip | None:
    node = index.nodes[position]
    if is_standard(node, "Conv", "ConvTranspose", "Gemm", "BatchNormalization") and index.is_constant(node.input[0]):
        return _skip(index, position, "it reads no data, only constants")
    if is_standard(node, "Conv", "ConvTranspose"):
        return _convolution(index, position, level)
    if is_standard(node, "Gemm"):
        return _gemm(index, position, level)
    if is_standard(node, "MatMul"):
        return _matmul(index, position, level)
    if is_standard(node, "BatchNormalization"):
        reason = _batchnorm_obstacle(index, position)
        if reason:
            return _skip(index, position, reason)
        channels = int(index.value(node.input[BN_SCALE]).size)
        return Point(
            "BatchNormalization",
            position,
            node.input[0],
            1,
            channels,
            None,
            None,
            0,
            position,
            level,
            index.label(position),
        )
    if node.op_type in _OTHER_LAYERS and any(index.is_constant(name) for name in node.input if name):
        return _skip(index, position, f"{node.op_type} is not repaired; fused layers are when exported one by one")
    inner = next((item for item in _inner_nodes(node) if is_standard(item, *get_args(Kind))), None)
    if inner is not None:
        return _skip(index, position, f"{node.op_type} with a {inner.op_type} in a subgraph, which is left as it is")
    return None


def _inner_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for graph in subgraphs(node):
        for item in graph.node:
            yield item
            yield from _inner_nodes(item)


def _skip(index: GraphIndex, position: int, reason: str) -> Skip:
    return Skip(position, index.label(position), index.nodes[position].op_type, reason)


def _weight_obstacle(index: GraphIndex, name: str) -> str | None:
    if not index.is_constant(name):
        return "its weight is computed at run time"
    if index.element_type(name) not in FLOAT_TYPES:
        return "its weight is not a floating-point tensor"
    if index.value(name).size == 0:
        return "its weight is empty"
    return None


def _bias_obstacle(index: GraphIndex, node: onnx.NodeProto, slot: int) -> str | None:
    if len(node.input) > slot and node.input[slot] and not index.is_constant(node.input[slot]):
        return "its bias is computed at run time"
    return None


def _batchnorm_obstacle(index: GraphIndex, position: int) -> str | None:
    node = index.nodes[position]
    if attribute(node, "training_mode", 0):
        return "BatchNormalization in training mode: export the model in evaluation mode"
    if len([name for name in node.output if name]) > 1:
        return "BatchNormalization with training outputs: export the model in evaluation mode"
    if attribute(node, "spatial", 1) != 1:
        return "BatchNormalization with spatial=0 has no channel statistics"
    for slot in (BN_SCALE, BN_BIAS, BN_MEAN, BN_VAR):
        if not index.is_constant(node.input[slot]):
            return "BatchNormalization whose parameters are computed at run time"
    if len({index.value(node.input[slot]).size for slot in (BN_SCALE, BN_BIAS, BN_MEAN, BN_VAR)}) > 1:
        return "BatchNormalization whose parameters differ in size: the file is damaged, export the model again"
    return None


def following_batchnorm(index: GraphIndex, tensor: str) -> int | None:
    """Position of the BatchNormalization that alone reads a tensor, if its parameters can be read."""
    consumer = index.sole_consumer(tensor)
    if consumer is None:
        return None
    node = index.nodes[consumer]
    if not is_standard(node, "BatchNormalization") or node.input[0] != tensor:
        return None
    return None if _batchnorm_obstacle(index, consumer) else consumer


def _convolution(index: GraphIndex, position: int, level: int) -> Point | Skip:
    node = index.nodes[position]
    reason = _weight_obstacle(index, node.input[1]) or _bias_obstacle(index, node, 2)
    if reason:
        return _skip(index, position, reason)
    weight = index.value(node.input[1])
    if weight.ndim < 3:
        return _skip(index, position, f"a weight of rank {weight.ndim} has no kernel")
    transposed = node.op_type == "ConvTranspose"
    groups = int(attribute(node, "group", 1))
    if groups < 1 or weight.shape[0] % groups:
        return _skip(index, position, f"a weight of shape {weight.shape} does not divide into {groups} groups")
    axes = weight.ndim - 2
    for name, length in (("strides", axes), ("dilations", axes), ("pads", 2 * axes), ("output_padding", axes)):
        given = attribute(node, name, None)
        if given is not None and len(given) != length:
            return _skip(index, position, f"{name} {list(given)} do not fit a kernel of {axes} axes")
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    tensor = node.output[0]
    kind: Kind = "ConvTranspose" if transposed else "Conv"
    batchnorm = following_batchnorm(index, tensor)
    return Point(
        kind, position, tensor, 1, int(channels), WEIGHT_SLOT, position, 2, batchnorm, level, index.label(position)
    )


def _gemm(index: GraphIndex, position: int, level: int) -> Point | Skip:
    node = index.nodes[position]
    reason = _weight_obstacle(index, node.input[1]) or _bias_obstacle(index, node, 2)
    if reason:
        return _skip(index, position, reason)
    if attribute(node, "alpha", 1.0) == 0.0 or attribute(node, "beta", 1.0) == 0.0:
        return _skip(index, position, "Gemm with alpha or beta of zero ignores its weight or bias")
    weight = index.value(node.input[1])
    if weight.ndim != 2:
        return _skip(index, position, f"Gemm weight of rank {weight.ndim}, not 2")
    channels = weight.shape[0] if attribute(node, "transB", 0) else weight.shape[1]
    if len(node.input) > 2 and node.input[2]:
        bias = index.value(node.input[2])
        if bias.size not in (1, channels) or (bias.ndim == 2 and bias.shape[0] != 1):
            return _skip(index, position, f"Gemm bias of shape {bias.shape} is not one value a channel")
    tensor = node.output[0]
    batchnorm = following_batchnorm(index, tensor)
    return Point(
        "Gemm", position, tensor, 1, int(channels), WEIGHT_SLOT, position, 2, batchnorm, level, index.label(position)
    )


def _matmul(index: GraphIndex, position: int, level: int) -> Point | Skip:
    node = index.nodes[position]
    constant = [slot for slot in (0, 1) if index.is_constant(node.input[slot])]
    if not constant:
        return _skip(index, position, "MatMul of two activations has no weight")
    if len(constant) == 2:
        return _skip(index, position, "MatMul of two constants")
    slot = constant[0]
    reason = _weight_obstacle(index, node.input[slot])
    if reason:
        return _skip(index, position, reason)
    weight = index.value(node.input[slot])
    if weight.ndim != 2:
        return _skip(index, position, f"MatMul weight of rank {weight.ndim}, not 2, has no single channel axis")
    channels, axis = (weight.shape[1], -1) if slot == 1 else (weight.shape[0], -2)
    tensor, bias_node, bias_slot = node.output[0], None, 0
    following = index.sole_consumer(tensor)
    if following is not None and is_standard(index.nodes[following], "Add"):
        add = index.nodes[following]
        other = 1 if add.input[0] == tensor else 0
        if index.is_constant(add.input[other]) and is_channel_bias(index.value(add.input[other]), channels, axis):
            tensor, bias_node, bias_slot = add.output[0], following, other
    return Point(
        "MatMul", position, tensor, axis, int(channels), slot, bias_node, bias_slot, None, level, index.label(position)
    )


def is_channel_bias(bias: NDArray[Any], channels: int, axis: int) -> bool:
    """Whether a constant operand of an Add is one value a channel, or one for all."""
    if bias.ndim < -axis:
        return bias.size == 1 and axis == -1
    return bias.size in (1, channels) and bias.shape[axis] in (1, channels) and bias.size == bias.shape[axis]


def weight_of(index: GraphIndex, point: Point) -> NDArray[Any]:
    """The weight of a point that has one, as stored."""
    assert point.weight_slot is not None
    return index.value(index.nodes[point.node].input[point.weight_slot])


def weight_rows(point: Point, node: onnx.NodeProto, weight: NDArray[Any]) -> NDArray[Any]:
    """A weight as one row per output channel.

    ``rows[i]`` holds every weight that feeds output channel ``i``, shape [C_out, K]: Conv [C_out, C_in/group, *k];
    ConvTranspose [C_in, C_out/group, *k] regrouped (ONNX operator ConvTranspose); Gemm and MatMul transposed as needed.
    """
    if point.kind == "Conv":
        return weight.reshape(weight.shape[0], -1)
    if point.kind == "ConvTranspose":
        groups = int(attribute(node, "group", 1))
        inputs, per_group = weight.shape[0] // groups, weight.shape[1]
        grouped = weight.reshape(groups, inputs, per_group, -1)  # [G, I, O, k]
        return np.ascontiguousarray(grouped.transpose(0, 2, 1, 3)).reshape(groups * per_group, -1)
    if _rows_are_transposed(point, node):
        return np.ascontiguousarray(weight.T)
    return weight


def weight_blocks(point: Point, node: onnx.NodeProto, weight: NDArray[Any]) -> NDArray[Any]:
    """A weight by group, output channel in the group, input channel in the group and tap: [G, O, I, taps]."""
    convolution = point.kind in ("Conv", "ConvTranspose")
    groups = int(attribute(node, "group", 1)) if convolution else 1
    taps = math.prod(weight.shape[2:]) if convolution else 1
    return weight_rows(point, node, weight).reshape(groups, point.channels // groups, -1, taps)


def channel_view(point: Point, node: onnx.NodeProto, weight: NDArray[Any]) -> NDArray[Any]:
    """A weight as [C_out, C_in / group, taps]."""
    blocks = weight_blocks(point, node, weight)
    return blocks.reshape(-1, *blocks.shape[2:])


def rows_to_weight(point: Point, node: onnx.NodeProto, rows: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Inverse of :func:`weight_rows`, back to the stored shape."""
    if point.kind == "Conv":
        return rows.reshape(shape)
    if point.kind == "ConvTranspose":
        groups = int(attribute(node, "group", 1))
        inputs, per_group = shape[0] // groups, shape[1]
        grouped = rows.reshape(groups, per_group, inputs, -1).transpose(0, 2, 1, 3)  # [G, I, O, k]
        return np.ascontiguousarray(grouped).reshape(shape)
    if _rows_are_transposed(point, node):
        return np.ascontiguousarray(rows.T)
    return rows.reshape(shape)


def _rows_are_transposed(point: Point, node: onnx.NodeProto) -> bool:
    if point.kind == "Gemm":
        return not attribute(node, "transB", 0)
    return point.weight_slot == 1
