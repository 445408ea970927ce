"""Operators with parameters: the only module that knows their slots, channel axes, groups, transposes and factors.

    Conv           y = W * x + b            W [G O, I, *kernel], G groups of I input and O output channels
    ConvTranspose  y = W *' x + b           W [G I, O, *kernel]
    Gemm           y = alpha x W + beta b   W [I, O], or [O, I] with transB; x transposed with transA
    MatMul         y = x W or y = W x       W [I, O] or [O, I]; a bias is an Add behind it

(ONNX operator specifications.) BatchNormalization and InstanceNormalization hold one value per channel and parameter.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import onnx

from onnx_asr.arrays import Array
from onnx_asr.graph.index import GraphIndex, attribute, input_name, is_standard
from onnx_asr.graph.skips import Reason

MULTIPLIES = re.compile("Attention|Attn|Conv|DFT|Einsum|Gemm|GRU|LSTM|MatMul|MoE|RNN")
"""In the names of operators, of any domain, that multiply matrices."""

GROUP = "group"
"""Attribute of a convolution: its number of groups."""

LayerKind = Literal["Conv", "ConvTranspose", "Gemm", "MatMul"]
LAYERS: tuple[LayerKind, ...] = get_args(LayerKind)
CONVOLUTIONS: tuple[LayerKind, ...] = ("Conv", "ConvTranspose")

NORMALIZATION = "BatchNormalization"
BN_SCALE, BN_BIAS, BN_MEAN, BN_VAR = 1, 2, 3, 4
PER_CHANNEL_SLOTS = {NORMALIZATION: (BN_SCALE, BN_BIAS, BN_MEAN, BN_VAR), "InstanceNormalization": (1, 2)}
"""Input slots that hold one value per channel."""

WEIGHT_COMPUTED = Reason("weight-computed-at-run-time", "weight is computed at run time")
NO_WEIGHT = Reason("no-constant-weight", "MatMul of two activations has no weight")
NO_KERNEL = Reason("weight-without-kernel", "weight of rank {rank} has no kernel axes")
NOT_2D = Reason("weight-not-2d", "{kind} weight is of rank {rank}, not 2-D")
UNEVEN_GROUPS = Reason("groups-do-not-divide", "weight of shape {shape} does not divide into {groups} groups")


@dataclass(frozen=True)
class WeightLayout:
    """Where a weight has its G groups, their O output and I input channels, and the k taps of its kernel.

    One weight takes four forms. A ConvTranspose of two groups, four input and six output channels:

    >>> layout = WeightLayout((4, 3, 5, 5), groups=2, inputs_first=True)
    >>> layout.channels, layout.groups, layout.outputs, layout.inputs, layout.taps
    (6, 2, 3, 2, 25)
    >>> stored = np.arange(300.0).reshape(layout.shape)
    >>> layout.to_rows(stored).shape       # [G O, I k]: all weights of an output channel
    (6, 50)
    >>> layout.to_blocks(stored).shape     # [G, O, I, k]
    (2, 3, 2, 25)
    >>> layout.to_patches(stored).shape    # [G, O, k I]: in the order of input patches, the channels of a tap together
    (2, 3, 50)

    and each goes back:

    >>> bool((layout.from_patches(layout.to_patches(stored)) == stored).all())
    True

    A Gemm without transB stores its inputs first, and its patches are its rows:

    >>> layout = WeightLayout((7, 3), inputs_first=True)
    >>> stored = np.arange(21.0).reshape(7, 3)
    >>> layout.to_rows(stored).shape, layout.to_patches(stored).shape
    ((3, 7), (1, 3, 7))

    Attributes:
        shape: As stored: [G O, I, *kernel], or [G I, O, *kernel] where inputs come first.
        inputs_first: Whether the first axis is that of the input channels.
    """

    shape: tuple[int, ...]
    groups: int = 1
    inputs_first: bool = False

    @property
    def outputs(self) -> int:
        """O, output channels per group."""
        return self.shape[1] if self.inputs_first else self.shape[0] // self.groups

    @property
    def inputs(self) -> int:
        """I, input channels per group."""
        return self.shape[0] // self.groups if self.inputs_first else self.shape[1]

    @property
    def taps(self) -> int:
        """Places of the kernel, k; 1 for a matrix."""
        return math.prod(self.shape[2:])

    @property
    def channels(self) -> int:
        """Output channels of all groups, G O."""
        return self.groups * self.outputs

    @property
    def input_axis(self) -> int:
        """Axis of the stored weight along which its input channels run."""
        return 0 if self.inputs_first else 1

    @property
    def output_axis(self) -> int:
        """Axis of the stored weight along which its output channels run."""
        return 1 - self.input_axis

    def to_blocks(self, stored: Array) -> Array:
        """Stored to [G, O, I, k]."""
        if not self.inputs_first:
            return stored.reshape(self.groups, self.outputs, self.inputs, self.taps)
        grouped = stored.reshape(self.groups, self.inputs, self.outputs, self.taps)
        return np.ascontiguousarray(grouped.transpose(0, 2, 1, 3))

    def from_blocks(self, blocks: Array) -> Array:
        """[G, O, I, k] to stored."""
        if not self.inputs_first:
            return blocks.reshape(self.shape)
        return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3)).reshape(self.shape)

    def to_rows(self, stored: Array) -> Array:
        """Stored to [G O, I k]."""
        return self.to_blocks(stored).reshape(self.channels, self.inputs * self.taps)

    def from_rows(self, rows: Array) -> Array:
        """[G O, I k] to stored."""
        return self.from_blocks(rows.reshape(self.groups, self.outputs, self.inputs, self.taps))

    def to_patches(self, stored: Array) -> Array:
        """Stored to [G, O, k I]."""
        swapped = np.ascontiguousarray(self.to_blocks(stored).transpose(0, 1, 3, 2))
        return swapped.reshape(self.groups, self.outputs, self.taps * self.inputs)

    def from_patches(self, patches: Array) -> Array:
        """[G, O, k I] to stored."""
        split = patches.reshape(self.groups, self.outputs, self.taps, self.inputs)
        return self.from_blocks(np.ascontiguousarray(split.transpose(0, 1, 3, 2)))


@dataclass(frozen=True)
class Layer:
    """A node that multiplies what it reads with a constant weight.

    Attributes:
        weight_slot: Input slot of the weight; the data are in the other one of 0 and 1.
        bias_slot: Input slot of the bias, which may be empty or missing; None for a MatMul.
        input_axis: Axis of the channels in what it reads; negative counts from the end.
        output_axis: Axis of the channels in what it makes.
    """

    kind: LayerKind
    layout: WeightLayout
    weight_slot: int = 1
    bias_slot: int | None = 2
    input_axis: int = 1
    output_axis: int = 1
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def data_slot(self) -> int:
        """Input slot of the data."""
        return 1 - self.weight_slot

    @property
    def is_convolution(self) -> bool:
        """Whether it is a Conv or ConvTranspose."""
        return self.kind in CONVOLUTIONS

    @property
    def is_transposed(self) -> bool:
        """Whether it is a ConvTranspose."""
        return self.kind == "ConvTranspose"

    def bias_name(self, node: onnx.NodeProto) -> str:
        """Tensor of the node's own bias; empty where there is none."""
        return "" if self.bias_slot is None else input_name(node, self.bias_slot)

    @classmethod
    def of(cls, index: GraphIndex, position: int) -> Layer | Reason:
        """The layer of a node whose operator is one of :data:`LAYERS`, or why it has none that can be read."""
        node = index.nodes[position]
        slot = 1
        if not index.is_constant(node.input[1]):
            if node.op_type != "MatMul":
                return WEIGHT_COMPUTED
            if not index.is_constant(node.input[0]):
                return NO_WEIGHT
            slot = 0
        shape = index.shape(node.input[slot])
        if is_standard(node, *CONVOLUTIONS):
            if len(shape) < 3:
                return NO_KERNEL.format(rank=len(shape))
            groups = int(attribute(node, GROUP, 1))
            if groups < 1 or shape[0] % groups:
                return UNEVEN_GROUPS.format(shape=shape, groups=groups)
            kind: LayerKind = "ConvTranspose" if node.op_type == "ConvTranspose" else "Conv"
            return cls(kind, WeightLayout(shape, groups, inputs_first=kind == "ConvTranspose"))
        if len(shape) != 2:
            return NOT_2D.format(kind=node.op_type, rank=len(shape))
        if node.op_type == "Gemm":
            layout = WeightLayout(shape, inputs_first=not attribute(node, "transB", 0))
            alpha, beta = (float(attribute(node, name, 1.0)) for name in ("alpha", "beta"))
            return cls("Gemm", layout, input_axis=0 if attribute(node, "transA", 0) else 1, alpha=alpha, beta=beta)
        axis = -1 if slot == 1 else -2
        layout = WeightLayout(shape, inputs_first=slot == 1)
        return cls("MatMul", layout, weight_slot=slot, bias_slot=None, input_axis=axis, output_axis=axis)


def batchnorm_epsilon(node: onnx.NodeProto) -> float:
    """``epsilon`` of a BatchNormalization."""
    return float(attribute(node, "epsilon", 1e-5))


def is_channel_bias(bias: Array, channels: int, axis: int) -> bool:
    """Whether a constant operand of an Add is one value per channel, or one for all."""
    if bias.ndim < -axis:
        return bias.size == 1 and axis == -1
    return bias.size in (1, channels) and bias.shape[axis] in (1, channels) and bias.size == bias.shape[axis]
