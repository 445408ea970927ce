"""From channel rules to plan edits: read a point's parameters from the graph, write the corrected ones into a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_asr.arrays import Floats
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.layers import BN_BIAS, BN_MEAN, BN_SCALE, BN_VAR, batchnorm_epsilon
from onnx_asr.graph.points import LayerPoint
from onnx_asr.numerics.gains import BatchNormParameters, ChannelAffine


def read_batchnorm(index: GraphIndex, plan: EditPlan, position: int) -> BatchNormParameters:
    """Parameters of a BatchNormalization as planned so far, in float64."""
    scale, bias, mean, var = (_read(index, plan, position, slot) for slot in (BN_SCALE, BN_BIAS, BN_MEAN, BN_VAR))
    return BatchNormParameters(scale, bias, mean, var, batchnorm_epsilon(index.nodes[position]))


def plan_batchnorm(index: GraphIndex, plan: EditPlan, position: int, new: BatchNormParameters) -> None:
    """Plan new parameters of a BatchNormalization; those that do not change are left alone."""
    old = read_batchnorm(index, plan, position)
    for slot, before, after in (
        (BN_SCALE, old.scale, new.scale),
        (BN_BIAS, old.bias, new.bias),
        (BN_MEAN, old.mean, new.mean),
        (BN_VAR, old.var, new.var),
    ):
        if not np.array_equal(before, after):
            plan.values[position, slot] = after


def read_rows(index: GraphIndex, plan: EditPlan, point: LayerPoint) -> NDArray[Any]:
    """The weight of a point as [C_out, K] in float64."""
    return point.layer.layout.to_rows(_read(index, plan, *point.weight))


def read_blocks(index: GraphIndex, plan: EditPlan, point: LayerPoint) -> Floats:
    """The weight of a point as [G, O, I, taps] in float64."""
    return point.layer.layout.to_blocks(_read(index, plan, *point.weight))


def plan_rows(index: GraphIndex, plan: EditPlan, point: LayerPoint, rows: NDArray[Any]) -> None:
    """Plan a new weight given as [C_out, K]."""
    plan.values[point.weight] = point.layer.layout.from_rows(rows)


def read_bias(index: GraphIndex, plan: EditPlan, point: LayerPoint) -> Floats:
    """What the point's bias adds to every channel, [C]; zeros where there is none."""
    if point.bias is None:
        added = plan.added_bias.get(point.node)
        return np.zeros(point.channels) if added is None else added.reshape(-1).astype(np.float64)
    stored = plan.current(index, *point.bias)
    if stored is None:
        return np.zeros(point.channels)
    bias: Floats = np.broadcast_to(stored.astype(np.float64).reshape(-1), (point.channels,))
    return bias * point.layer.beta


def plan_bias(index: GraphIndex, plan: EditPlan, point: LayerPoint, bias: Floats) -> None:
    """Plan a new bias, per channel; the slot, or the Add behind a MatMul, is made where there is none."""
    if point.layer.bias_slot is not None:
        plan.values[point.node, point.layer.bias_slot] = bias / point.layer.beta
        return
    shaped = bias.reshape([-1] + [1] * (-point.channel_axis - 1))
    if point.bias is None:
        plan.added_bias[point.node] = shaped
    else:
        node, slot = point.bias
        rank = index.value(index.nodes[node].input[slot]).ndim  # it may set the rank of the sum
        plan.values[point.bias] = shaped.reshape([1] * (rank - shaped.ndim) + list(shaped.shape))


def plan_affine(index: GraphIndex, plan: EditPlan, point: LayerPoint, affine: ChannelAffine) -> None:
    """Plan ``z -> gain z + shift`` at the output of a point's producer.

    Weight rows and bias take the gain. The shift goes to the bias, or to the mean of the BatchNormalization that
    follows: ``BN(z + c)`` has mean ``mu - c``.
    """
    plan_rows(index, plan, point, read_rows(index, plan, point) * affine.gain[:, None])
    bias = read_bias(index, plan, point)
    if point.batchnorm is None:
        plan_bias(index, plan, point, affine.gain * bias + affine.shift)
        return
    if bias.any():
        plan_bias(index, plan, point, affine.gain * bias)
    old = read_batchnorm(index, plan, point.batchnorm)
    shifted = BatchNormParameters(old.scale, old.bias, old.mean - affine.shift, old.var, old.epsilon)
    plan_batchnorm(index, plan, point.batchnorm, shifted)


def _read(index: GraphIndex, plan: EditPlan, position: int, slot: int) -> Floats:
    value = plan.current(index, position, slot)
    assert value is not None, f"input {slot} of node {index.label(position)} is absent"
    return value.astype(np.float64)
