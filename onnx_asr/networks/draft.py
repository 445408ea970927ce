"""A draft of a model: its parameters in the form in which they are computed, read and set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx

from onnx_asr.arrays import Array, Floats
from onnx_asr.graph.edit import EditPlan, apply, stored
from onnx_asr.graph.index import GraphIndex, Slot
from onnx_asr.graph.layers import BN_BIAS, BN_MEAN, BN_SCALE, BN_VAR, batchnorm_epsilon
from onnx_asr.graph.points import LayerPoint
from onnx_asr.numerics.gains import BatchNormParameters, ChannelAffine

_BATCHNORM_SLOTS = {"scale": BN_SCALE, "bias": BN_BIAS, "mean": BN_MEAN, "var": BN_VAR}


class Draft:
    """A model with new values, in its plan, for some of its parameters; the model itself is not changed.

    Values are float64 unless stated otherwise, and always the newest: the draft's, else the model's.
    """

    def __init__(self, index: GraphIndex) -> None:
        self.index = index
        self.plan = EditPlan()

    def model(self, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
        """A copy of the model with the new values.

        Raises:
            ModelError: When a value is not finite in the type in which the model stores it.
        """
        return apply(self.index, self.plan, metadata)

    def weight(self, point: LayerPoint) -> Array:
        """The weight of a point in its stored shape, in whatever type it was set."""
        return self._current(point.weight)

    def set_weight(self, point: LayerPoint, value: Array) -> None:
        """Set the weight of a point in its stored shape."""
        self.plan.values[point.weight] = value

    def rows(self, point: LayerPoint) -> Floats:
        """The weight of a point as [C_out, K]."""
        return point.layer.layout.to_rows(self._read(point.weight))

    def set_rows(self, point: LayerPoint, rows: Floats) -> None:
        """Set the weight of a point from [C_out, K]."""
        self.set_weight(point, point.layer.layout.from_rows(rows))

    def blocks(self, point: LayerPoint) -> Floats:
        """The weight of a point as [G, O, I, taps]."""
        return point.layer.layout.to_blocks(self._read(point.weight))

    def folded_rows(self, point: LayerPoint) -> Floats:
        """Rows [C_out, K] that include ``alpha`` of a Gemm and the scale of the BatchNormalization behind the point."""
        rows = point.layer.alpha * self.rows(point)
        return rows if point.batchnorm is None else rows * self.batchnorm(point.batchnorm).slope[:, None]

    def bias(self, point: LayerPoint) -> Floats:
        """The bias added to each channel of a point, [C]; zeros where it has none."""
        if point.bias is None:
            added = self.plan.added_bias.get(point.node)
            return np.zeros(point.channels) if added is None else added.reshape(-1).astype(np.float64)
        value = self.plan.current(self.index, *point.bias)
        if value is None:
            return np.zeros(point.channels)
        bias: Floats = np.broadcast_to(value.astype(np.float64).reshape(-1), (point.channels,))
        return bias * point.layer.beta

    def set_bias(self, point: LayerPoint, bias: Floats) -> None:
        """Set the bias of a point, [C]; creates the slot, or an Add behind a MatMul, if there is none."""
        if point.layer.bias_slot is not None:
            self.plan.values[point.node, point.layer.bias_slot] = bias / point.layer.beta
            return
        shaped = bias.reshape([-1] + [1] * (-point.channel_axis - 1))
        if point.bias is None:
            self.plan.added_bias[point.node] = shaped
        else:
            node, slot = point.bias
            rank = self.index.value(self.index.nodes[node].input[slot]).ndim  # it may set the rank of the sum
            self.plan.values[point.bias] = shaped.reshape([1] * (rank - shaped.ndim) + list(shaped.shape))

    def batchnorm(self, position: int) -> BatchNormParameters:
        """Parameters of the BatchNormalization at a position."""
        values = {name: self._read((position, slot)) for name, slot in _BATCHNORM_SLOTS.items()}
        return BatchNormParameters(**values, epsilon=batchnorm_epsilon(self.index.nodes[position]))

    def set_batchnorm(self, position: int, new: BatchNormParameters) -> None:
        """Set parameters of the BatchNormalization at a position; those that do not change are not touched."""
        old = self.batchnorm(position)
        for name, slot in _BATCHNORM_SLOTS.items():
            if not np.array_equal(getattr(old, name), getattr(new, name)):
                self.plan.values[position, slot] = getattr(new, name)

    def apply_affine(self, point: LayerPoint, affine: ChannelAffine) -> None:
        """Set ``z -> gain z + shift`` at the output of a point's layer.

        Weight rows and bias take the gain. The shift goes to the bias, or to the mean of the BatchNormalization that
        follows: ``BN(z + c)`` has mean ``mu - c``.
        """
        self.set_rows(point, self.rows(point) * affine.gain[:, None])
        bias = self.bias(point)
        if point.batchnorm is None:
            self.set_bias(point, affine.gain * bias + affine.shift)
            return
        if bias.any():
            self.set_bias(point, affine.gain * bias)
        old = self.batchnorm(point.batchnorm)
        self.set_batchnorm(point.batchnorm, replace(old, mean=old.mean - affine.shift))

    def round(self, node: int) -> None:
        """Bring the new values of a node's inputs into the types in which the model stores them.

        Raises:
            ModelError: When a value is not finite in that type.
        """
        for key, value in self.plan.values_of(node):
            self.plan.values[key] = stored(self.index, *key, value)

    def _read(self, slot: Slot) -> Floats:
        return self._current(slot).astype(np.float64)

    def _current(self, slot: Slot) -> Array:
        value = self.plan.current(self.index, *slot)
        assert value is not None, f"input {slot[1]} of node {self.index.label(slot[0])} is absent"
        return value
