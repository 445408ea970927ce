"""The per-channel scales and shifts that alone follow a layer: what tools fold into its weight and bias.

    z = W x + b
    t = s_n (... (s_1 z + h_1) ...) + h_n = S z + H

A BatchNormalization has s = gamma / sqrt(var + epsilon) and h = beta - mean s (ONNX operator specification); a Mul,
Div, Add or Sub with a constant has one of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from onnx_asr.arrays import Floats, Integers, Mask
from onnx_asr.graph.index import GraphIndex, Slot, is_standard
from onnx_asr.graph.layers import (
    CONVOLUTIONS,
    NORMALIZATION,
    PER_CHANNEL_SLOTS,
    Layer,
    batchnorm_epsilon,
    is_channel_bias,
)
from onnx_asr.graph.points import following_batchnorm
from onnx_asr.pairing.forms import Form, through

_ARITHMETIC = ("Mul", "Div", "Add", "Sub")


@dataclass(frozen=True)
class Step:
    """One scale and shift.

    Attributes:
        operator: BatchNormalization, Mul, Div, Add or Sub.
        values: [C] each: gamma, beta, mean and variance; or the constant operand.
        shape: As they are stored, C at most once and otherwise ones.
        slot: Input slot of the data.
        epsilon: Of a BatchNormalization.
    """

    operator: str
    values: tuple[Floats, ...]
    shape: tuple[int, ...]
    slot: int = 0
    epsilon: float = 0.0

    @property
    def affine(self) -> tuple[Floats, Floats]:
        """S and h, [C] each."""
        if self.operator == NORMALIZATION:
            gamma, beta, mean, variance = self.values
            scale = gamma / np.sqrt(variance + self.epsilon)
            return scale, beta - mean * scale
        (value,) = self.values
        one, zero = np.ones_like(value), np.zeros_like(value)
        if self.operator == "Mul":
            return value, zero
        if self.operator == "Div":
            return one / value, zero
        if self.operator == "Add":
            return one, value
        return (one, -value) if self.slot == 0 else (-one, value)

    @property
    def is_scalar(self) -> bool:
        """Whether one number is stored for all channels."""
        return math.prod(self.shape) == 1

    @property
    def stored(self) -> list[Floats]:
        """The values in their shape."""
        if self.is_scalar:
            return [value[:1].reshape(self.shape) for value in self.values]
        return [value.reshape([1 if size == 1 else -1 for size in self.shape]) for value in self.values]

    def neutral(self, where: Mask) -> Step:
        """The same without a scale or shift in some channels [C]; one number for all channels stays unless all are."""
        if self.is_scalar and not where.all():
            return self
        neutral = {NORMALIZATION: (1.0, 0.0, 0.0, 1.0 - self.epsilon), "Mul": (1.0,), "Div": (1.0,)}
        pairs = zip(neutral.get(self.operator, (0.0,)), self.values, strict=True)
        return replace(self, values=tuple(np.where(where, new, old) for new, old in pairs))

    def widened(self, positions: Integers, channels: int) -> Step:
        """The step of a network with more channels [channels], neutral in those that are not among ``positions``."""
        missing = np.ones(channels, bool)
        missing[positions] = False
        wide = tuple(np.full(channels, value[0]) for value in self.values)
        for value, own in zip(wide, self.values, strict=True):
            value[positions] = own
        return replace(self, values=wide).neutral(missing)


def composed(steps: tuple[Step, ...], channels: int) -> tuple[Floats, Floats]:
    """S and H of several steps in a row, [C] each."""
    scale, shift = np.ones(channels), np.zeros(channels)
    for step in steps:
        own_scale, own_shift = step.affine
        scale, shift = scale * own_scale, shift * own_scale + own_shift
    return scale, shift


@dataclass(frozen=True)
class Tail:
    """A layer and the steps behind it.

    Attributes:
        index: The graph that they are in.
        form: The layer.
        layer: How its node holds its parameters.
        nodes: Positions of the steps, from the layer on.
    """

    index: GraphIndex
    form: Form
    layer: Layer
    nodes: tuple[int, ...]

    @property
    def bias(self) -> Slot | None:
        """(node, slot) of the layer's bias, which may be missing; None for a MatMul without Add."""
        if self.layer.bias_slot is not None:
            return self.form.node, self.layer.bias_slot
        if self.form.bias == self.form.node:
            return None
        product = self.index.nodes[self.form.node].output[0]
        return self.form.bias, 1 if self.index.nodes[self.form.bias].input[0] == product else 0

    @property
    def layer_end(self) -> str:
        """Tensor z."""
        return str(self.index.nodes[self.form.bias].output[0])

    @property
    def end(self) -> str:
        """Tensor t."""
        return str(self.index.nodes[self.nodes[-1]].output[0]) if self.nodes else self.layer_end

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps, from the layer on."""
        return tuple(self._step(position) for position in self.nodes)

    def _step(self, position: int) -> Step:
        node = self.index.nodes[position]
        channels = self.layer.layout.channels
        if node.op_type == NORMALIZATION:
            slots, slot, epsilon = PER_CHANNEL_SLOTS[NORMALIZATION], 0, batchnorm_epsilon(node)
        else:
            slot, epsilon = _data_slot(self.index, position), 0.0
            slots = (1 - slot,)
        stored = [self.index.value(node.input[slot]).astype(np.float64) for slot in slots]
        values = tuple(np.broadcast_to(value.reshape(-1), channels) for value in stored)
        return Step(node.op_type, values, stored[0].shape, slot, epsilon)


def tail_of(index: GraphIndex, form_of: Callable[[int], Form], position: int) -> Tail | None:
    """The tail that ends with the output of a node, which may have any number of readers; None where there is none."""
    nodes: list[int] = []
    while True:
        form = form_of(position)
        layer = _layer(index, form)
        if layer is not None:
            break
        data = _data(index, position)
        if data is None:
            return None
        nodes.insert(0, position)
        source = through(index, data)
        while index.sole_consumer(data) is not None and data != source:
            data = index.nodes[index.producer[data]].input[0]
        if index.sole_consumer(data) is None or data not in index.producer:
            return None
        position = index.producer[data]
    tail = Tail(index, form, layer, tuple(nodes))
    return tail if all(_is_per_channel(tail, position) for position in nodes) else None


def _layer(index: GraphIndex, form: Form) -> Layer | None:
    """How a fully connected layer or convolution with constant parameters holds them."""
    node = index.nodes[form.node]
    if form.weight_shape is None and not is_standard(node, *CONVOLUTIONS):
        return None
    layer = Layer.of(index, form.node)
    if not isinstance(layer, Layer) or 0.0 in (layer.alpha, layer.beta, *layer.layout.shape):
        return None
    bias = layer.bias_name(node)
    return (
        layer
        if not bias or (index.is_constant(bias) and index.value(bias).size in (1, layer.layout.channels))
        else None
    )


def _data(index: GraphIndex, position: int) -> str | None:
    """What a node that could be a step scales and shifts."""
    node = index.nodes[position]
    if is_standard(node, NORMALIZATION):
        return str(node.input[0]) if following_batchnorm(index, node.input[0]) == position else None
    if not is_standard(node, *_ARITHMETIC) or sum(map(index.is_constant, node.input)) != 1:
        return None
    slot = _data_slot(index, position)
    return None if slot and node.op_type == "Div" else str(node.input[slot])


def _data_slot(index: GraphIndex, position: int) -> int:
    return 1 if index.is_constant(index.nodes[position].input[0]) else 0


def _is_per_channel(tail: Tail, position: int) -> bool:
    """Whether a step has one finite scale and shift per channel of the layer."""
    index, layer = tail.index, tail.layer
    node = index.nodes[position]
    rank = len(layer.layout.shape)
    channels = layer.layout.channels
    if node.op_type == NORMALIZATION:
        fits = layer.kind != "MatMul" and index.value(node.input[1]).size == channels
    else:
        constant = index.value(node.input[1 - _data_slot(index, position)])
        fits = constant.ndim <= rank and (constant.size == 1 or is_channel_bias(constant, channels, 1 - rank))
    if not fits:
        return False
    with np.errstate(all="ignore"):
        return bool(np.isfinite(tail._step(position).affine).all())
