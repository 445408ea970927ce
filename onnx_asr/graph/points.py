"""Correction points: the tensors whose channels a repair can set, and the reasons where it cannot.

A point is the output of a Conv, ConvTranspose, Gemm or MatMul(+Add) whose weight is a constant, together with the
BatchNormalization that directly and alone follows it, or the input of a BatchNormalization that follows anything else
(pre-activation nets, DenseNet, BatchNormalization after Add).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import onnx

from onnx_asr.arrays import Array
from onnx_asr.errors import ModelError
from onnx_asr.graph.index import (
    FLOAT_TYPES,
    GraphIndex,
    Slot,
    ancestors,
    attribute,
    input_name,
    is_standard,
    node_reads,
    subgraphs,
)
from onnx_asr.graph.layers import (
    LAYERS,
    MULTIPLIES,
    NORMALIZATION,
    PER_CHANNEL_SLOTS,
    Layer,
    LayerKind,
    is_channel_bias,
)
from onnx_asr.graph.skips import Reason, Skip

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "DequantizeBFP"})
_QUANTIZED_LAYERS = {
    "QLinearConv": (3,), "QLinearMatMul": (0, 3), "ConvInteger": (1,), "MatMulInteger": (0, 1), "QGemm": (3,),
    "QLinearConvTranspose": (3,), "QAttention": (1,), "MatMulIntegerToFloat": (0, 1), "DynamicQuantizeMatMul": (1,),
    "DynamicQuantizeLSTM": (1,), "MatMulNBits": (1,), "MatMulBnb4": (1,), "MatMulFpQ4": (1,),
}  # fmt: skip
"""Operators, of whatever domain, whose weights are integers, and the input slots of these."""

_MATRIX_SLOTS = 3
"""The first inputs of an operator that multiplies matrices; biases, masks and states follow."""

WEIGHT_QUANTIZED = Reason("weight-quantized", "its weights are quantized to integers, and stay as they are")
READS_NO_DATA = Reason("reads-only-constants", "reads only constants, no data")
NOT_READ = Reason("no-output-depends-on-it", "no output of the model depends on it")
WEIGHT_NOT_FLOAT = Reason("weight-not-floating-point", "weight is not a floating-point tensor")
WEIGHT_EMPTY = Reason("weight-empty", "weight is empty")
BIAS_COMPUTED = Reason("bias-computed-at-run-time", "bias is computed at run time")
BIAS_NOT_PER_CHANNEL = Reason("bias-not-per-channel", "Gemm bias of shape {shape} is not one value per channel")
KERNEL_MISFIT = Reason("attribute-does-not-fit-kernel", "{name} {given} do not fit a kernel of {axes} axes")
WITHOUT_EFFECT = Reason("factor-of-zero", "Gemm with alpha or beta of zero ignores its weight or bias")
TRAINING_MODE = Reason(
    "batchnorm-in-training-mode", "BatchNormalization in training mode: export the model in evaluation mode"
)
NOT_SPATIAL = Reason("batchnorm-not-spatial", "BatchNormalization with spatial=0 has no channel statistics")
STATISTICS_COMPUTED = Reason(
    "batchnorm-computed-at-run-time", "BatchNormalization whose parameters are computed at run time"
)
SIZES_DIFFER = Reason(
    "batchnorm-sizes-differ",
    "BatchNormalization whose parameters differ in size: the file is damaged, export the model again",
)
OTHER_OPERATOR = Reason(
    "operator-not-supported", "{operator} is not supported; export its parts as separate nodes where you can"
)
IN_SUBGRAPH = Reason("layer-in-subgraph", "{operator} with a {inner} in a subgraph, which is not changed")
BEHIND_SELECTION = Reason(
    "behind-non-max-suppression",
    "follows a NonMaxSuppression, which selects different boxes in the dense and the pruned model",
)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a point is.

    Attributes:
        node: Position of its node.
        name: The node's name in reports.
        tensor: The measured tensor.
        level: Largest number of points on a path from the inputs to this one, itself included.
    """

    node: int
    name: str
    tensor: str
    level: int


@dataclass(frozen=True, kw_only=True)
class LayerPoint(_Place):
    """The output of a layer with a constant weight, or of the Add behind a MatMul.

    Attributes:
        layer: How the node holds its parameters.
        bias: (node, slot) of the bias, which may be empty or missing; None for a MatMul without Add.
        batchnorm: Position of the BatchNormalization that belongs to the point, if any.
    """

    layer: Layer
    bias: Slot | None
    batchnorm: int | None

    @property
    def kind(self) -> LayerKind:
        """Operator of the node."""
        return self.layer.kind

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.layer.layout.channels

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in ``tensor``; negative counts from the end."""
        return self.layer.output_axis

    @property
    def weight(self) -> Slot:
        """(node, slot) of the weight."""
        return self.node, self.layer.weight_slot


@dataclass(frozen=True, kw_only=True)
class NormPoint(_Place):
    """The input of a BatchNormalization, its node, that belongs to no layer."""

    channels: int
    kind: ClassVar[Literal["BatchNormalization"]] = "BatchNormalization"
    channel_axis: ClassVar[int] = 1

    @property
    def batchnorm(self) -> int:
        """Position of the BatchNormalization, as for a layer's."""
        return self.node


Point: TypeAlias = LayerPoint | NormPoint


@dataclass(frozen=True)
class Survey:
    """All correction points of a graph in file order, and everything skipped."""

    points: tuple[Point, ...]
    skips: tuple[Skip, ...]

    @property
    def layers(self) -> tuple[LayerPoint, ...]:
        """The points that have weights."""
        return tuple(point for point in self.points if isinstance(point, LayerPoint))

    @property
    def has_batchnorm(self) -> bool:
        """Whether a BatchNormalization belongs to any of the points."""
        return any(point.batchnorm is not None for point in self.points)


def survey(index: GraphIndex, *, all_quantized: bool = False) -> Survey:
    """Find the correction points of a graph and number their levels.

    Raises:
        ModelError: When weights are quantized, and no layer has others, unless ``all_quantized`` layers are accepted.
    """
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
                found = NOT_READ
            if isinstance(found, Reason):
                skips.append(Skip(position, index.label(position), node.op_type, found.text, found.code))
            elif found is not None:
                points.append(found)
                if found.batchnorm is not None:
                    owned.add(found.batchnorm)
                depth += 1
        for name in node.output:
            level[name] = depth
    result = Survey(tuple(points), tuple(skips))
    quantized = next((skip for skip in skips if skip.code == WEIGHT_QUANTIZED.code), None)
    if quantized is not None and not result.layers and not all_quantized:
        raise ModelError(
            f"the model is already quantized (node {quantized.name}, a {quantized.op_type}, has integers for weights): "
            "prune and repair the float model first, then quantize the result"
        )
    return result


def is_quantizing(node: onnx.NodeProto) -> bool:
    """Whether a node makes or reads integers in place of floating-point numbers."""
    return node.op_type in _QUANTIZERS or node.op_type in _QUANTIZED_LAYERS


def without_selected(index: GraphIndex, found: Survey) -> Survey:
    """A survey whose points behind a NonMaxSuppression are skips.

    Such a node keeps other boxes in the dense network than in the pruned one, so that the two cannot be compared there.
    """
    selected: set[str] = set()
    for node in index.nodes:
        if is_standard(node, "NonMaxSuppression") or not selected.isdisjoint(node_reads(node)):
            selected.update(node.output)
    behind = [point for point in found.points if not selected.isdisjoint(node_reads(index.nodes[point.node]))]
    skips = [*found.skips, *(skip(point, BEHIND_SELECTION) for point in behind)]
    points = tuple(point for point in found.points if point not in behind)
    return Survey(points, tuple(sorted(skips, key=lambda item: item.node)))


def skip(point: Point, reason: Reason) -> Skip:
    """A point that is not changed."""
    return Skip(point.node, point.name, point.kind, reason.text, reason.code)


def _examine(index: GraphIndex, position: int, level: int) -> Point | Reason | None:
    node = index.nodes[position]
    layer = is_standard(node, *LAYERS)
    slots = (0, 1) if layer else _QUANTIZED_LAYERS.get(node.op_type, ())
    if any(_is_quantized(index, input_name(node, slot), in_integers=not layer) for slot in slots):
        return WEIGHT_QUANTIZED
    if layer:
        return _layer_point(index, position, level)
    if is_standard(node, NORMALIZATION):
        reason = _batchnorm_obstacle(index, position)
        if reason is not None:
            return reason
        channels, name = int(index.value(node.input[1]).size), index.label(position)
        return NormPoint(node=position, tensor=node.input[0], channels=channels, level=level, name=name)
    if MULTIPLIES.search(node.op_type) and any(_is_matrix(index, name) for name in node.input[:_MATRIX_SLOTS] if name):
        return OTHER_OPERATOR.format(operator=node.op_type)
    inner = next((item for item in _inner_nodes(node) if is_standard(item, *LAYERS, NORMALIZATION)), None)
    return None if inner is None else IN_SUBGRAPH.format(operator=node.op_type, inner=inner.op_type)


def _is_matrix(index: GraphIndex, name: str) -> bool:
    """Whether a tensor is a constant of floating-point numbers in rows and columns, at least."""
    return index.is_constant(name) and index.element_type(name) in FLOAT_TYPES and len(index.shape(name)) > 1


def _is_quantized(index: GraphIndex, name: str, *, in_integers: bool) -> bool:
    """Whether a tensor is a weight that reaches its node through a quantizer, or as it is a node ``in_integers``."""
    if not name or index.is_constant(name):
        return bool(name) and in_integers
    before = [index.nodes[position] for position in ancestors(index, [name])]
    inputs = {value.name for value in index.inputs}
    if name in inputs or any(not inputs.isdisjoint(node_reads(node)) for node in before):
        return False
    return in_integers or any(node.op_type in _QUANTIZERS for node in before)


def _inner_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for graph in subgraphs(node):
        for item in graph.node:
            yield item
            yield from _inner_nodes(item)


def _layer_point(index: GraphIndex, position: int, level: int) -> LayerPoint | Reason:
    node = index.nodes[position]
    layer = Layer.of(index, position)
    if isinstance(layer, Reason):
        return layer
    obstacle = _layer_obstacle(index, node, layer)
    if obstacle is not None:
        return obstacle
    tensor, bias, batchnorm = node.output[0], None, None
    following = index.sole_consumer(tensor, "Add")
    if layer.bias_slot is not None:
        bias, batchnorm = (position, layer.bias_slot), following_batchnorm(index, tensor)
    elif following is not None:
        add = index.nodes[following]
        slot = 1 if add.input[0] == tensor else 0
        added = add.input[slot]
        if index.is_constant(added) and is_channel_bias(index.value(added), layer.layout.channels, layer.output_axis):
            tensor, bias = add.output[0], (following, slot)
    name = index.label(position)
    return LayerPoint(layer=layer, node=position, tensor=tensor, bias=bias, batchnorm=batchnorm, level=level, name=name)


def _layer_obstacle(index: GraphIndex, node: onnx.NodeProto, layer: Layer) -> Reason | None:
    weight, layout = node.input[layer.weight_slot], layer.layout
    if index.is_constant(node.input[layer.data_slot]):
        return READS_NO_DATA
    if index.element_type(weight) not in FLOAT_TYPES:
        return WEIGHT_NOT_FLOAT
    if 0 in layout.shape:
        return WEIGHT_EMPTY
    if layer.alpha == 0.0 or layer.beta == 0.0:
        return WITHOUT_EFFECT
    axes = len(layout.shape) - 2
    if layer.is_convolution:
        for name, length in (("strides", axes), ("dilations", axes), ("pads", 2 * axes), ("output_padding", axes)):
            given = attribute(node, name, None)
            if given is not None and len(given) != length:
                return KERNEL_MISFIT.format(name=name, given=list(given), axes=axes)
    name = layer.bias_name(node)
    if not name:
        return None
    if not index.is_constant(name):
        return BIAS_COMPUTED
    bias = index.value(name)
    if layer.kind == "Gemm" and (bias.size not in (1, layout.channels) or (bias.ndim == 2 and bias.shape[0] != 1)):
        return BIAS_NOT_PER_CHANNEL.format(shape=bias.shape)
    return None


def _batchnorm_obstacle(index: GraphIndex, position: int) -> Reason | None:
    node = index.nodes[position]
    if index.is_constant(node.input[0]):
        return READS_NO_DATA
    if attribute(node, "training_mode", 0) or any(node.output[1:]):
        return TRAINING_MODE
    if attribute(node, "spatial", 1) != 1:
        return NOT_SPATIAL
    parameters = [node.input[slot] for slot in PER_CHANNEL_SLOTS[NORMALIZATION]]
    if any(_is_quantized(index, name, in_integers=False) for name in parameters):
        return WEIGHT_QUANTIZED
    if not all(map(index.is_constant, parameters)):
        return STATISTICS_COMPUTED
    return SIZES_DIFFER if len({index.value(name).size for name in parameters}) > 1 else None


def following_batchnorm(index: GraphIndex, tensor: str) -> int | None:
    """Position of the BatchNormalization that alone reads a tensor, if its parameters can be read."""
    consumer = index.sole_consumer(tensor, NORMALIZATION)
    if consumer is None or index.nodes[consumer].input[0] != tensor or _batchnorm_obstacle(index, consumer):
        return None
    return consumer


def weight_of(index: GraphIndex, point: LayerPoint) -> Array:
    """The weight of a point, as stored."""
    return index.value(index.nodes[point.node].input[point.layer.weight_slot])
