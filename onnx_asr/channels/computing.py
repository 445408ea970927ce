"""How channels pass the operators that compute: layers, normalization, arithmetic, pools and sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx

from onnx_asr.channels.trace import Obstacle, Rule, Tracer, from_the_front, passing
from onnx_asr.channels.units import Counted, Floats, Labels, Read, Sliced, varying
from onnx_asr.graph.index import attribute, describe
from onnx_asr.graph.points import BN_BIAS, BN_MEAN, BN_SCALE, BN_VAR


def _convolution(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    weight = tracer.constant(node.input[1], "weight")
    bias = tracer.constant(node.input[2], "bias") if len(node.input) > 2 and node.input[2] else None
    transposed = node.op_type == "ConvTranspose"
    groups = int(attribute(node, "group", 1))
    inputs, outputs = weight.shape[:2] if transposed else weight.shape[1::-1]
    # [G, O, I, taps] -> the rows that are all zero carry nothing but their bias
    if transposed:
        inputs //= groups
        live = (weight.reshape(groups, inputs, outputs, -1) != 0).any(axis=(1, 3)).reshape(-1)
    else:
        outputs //= groups
        live = (weight != 0).reshape(len(weight), -1).any(axis=1)
    labels = tracer.source(node, axis=1)
    ids = tracer.new(groups * outputs)
    constant = np.where(live, np.nan, np.zeros(len(ids)) if bias is None else bias)
    in_axis, out_axis = (0, 1) if transposed else (1, 0)
    if groups == 1 or inputs > 1:
        tracer.join_groups(ids, groups)
        if labels is not None:
            tracer.join_groups(labels.ids, groups)
            per_group = labels.ids if transposed else labels.ids[:inputs]
            tracer.slices.append(Sliced(position, 1, in_axis, per_group))
            tracer.reads.append(Read(position, labels))
        tracer.slices.append(Sliced(position, 1, out_axis, ids[:outputs] if transposed else ids))
    elif labels is None:
        tracer.freeze(ids, f"depthwise {describe(node, position)} reads channels that cannot be removed")
    else:
        tracer.join(ids, np.repeat(labels.ids, outputs))
        tracer.slices.append(Sliced(position, 1, 0, labels.ids if transposed else ids))
        tracer.counts.append(Counted(position, "group", 0, labels.ids))
        carried = np.repeat(labels.constant, outputs)
        taps = weight.astype(np.float64).reshape(len(ids), -1).sum(axis=1)
        exact = (carried == 0) | (not pads(node) and not transposed)
        through = np.where(exact & ~np.isnan(carried), carried, np.nan) * taps
        constant = np.where(np.isnan(constant), through + (0 if bias is None else bias), constant)
    tracer.slices.append(Sliced(position, 2, 0, ids))
    tracer.make(node.output[0], 1, ids, constant)


def pads(node: onnx.NodeProto) -> bool:
    """Whether a convolution or pool sees anything beside its input."""
    return attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or any(attribute(node, "pads", ()))


def _gemm(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    weight = tracer.constant(node.input[1], "weight")
    inner, outer = (1, 0) if attribute(node, "transB", 0) else (0, 1)
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = tracer.constant(node.input[2], "bias")
    labels = tracer.source(node, axis=0 if attribute(node, "transA", 0) else 1)
    if labels is not None:
        tracer.slices.append(Sliced(position, 1, inner, labels.ids))
        tracer.reads.append(Read(position, labels))
    ids = tracer.new(weight.shape[outer])
    tracer.slices.append(Sliced(position, 1, outer, ids))
    constant = np.where(weight.any(axis=inner), np.nan, 0.0)
    if bias is None:
        tracer.slices.append(Sliced(position, 2, 0, ids))
    else:
        if bias.ndim and bias.shape[-1] > 1:
            tracer.slices.append(Sliced(position, 2, bias.ndim - 1, ids))
        per_channel = bias.size == (bias.shape[-1] if bias.ndim else 1)
        added = bias.reshape(-1) if per_channel else varying(len(ids))
        constant = constant + attribute(node, "beta", 1.0) * added
    tracer.make(node.output[0], 1, ids, constant)


def _matmul(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    constants = [slot for slot in (0, 1) if tracer.index.is_constant(node.input[slot])]
    if len(constants) != 1:
        raise Obstacle("it multiplies two activations")
    slot = constants[0]
    weight = tracer.index.value(node.input[slot])
    rank = len(tracer.shape(node.input[1 - slot]))
    if weight.ndim != 2 or rank < 2:
        raise Obstacle("its weight is no matrix")
    inner, axis = (0, rank - 1) if slot == 1 else (1, rank - 2)
    labels = tracer.labels.get(node.input[1 - slot])
    if labels is not None and labels.axis != axis:
        raise Obstacle("it sums over another axis than that of the channels")
    if labels is not None:
        tracer.slices.append(Sliced(position, slot, inner, labels.ids))
        tracer.reads.append(Read(position, labels))
    ids = tracer.new(weight.shape[1 - inner])
    tracer.slices.append(Sliced(position, slot, 1 - inner, ids))
    tracer.make(node.output[0], axis, ids, np.where(weight.any(axis=inner), np.nan, 0.0))


def _normalization(tracer: Tracer, position: int, node: onnx.NodeProto, labels: Labels) -> Labels:
    slots = (BN_SCALE, BN_BIAS, BN_MEAN, BN_VAR) if node.op_type == "BatchNormalization" else (1, 2)
    values = [tracer.constant(node.input[slot], "parameters") for slot in slots]
    if any(value.shape != labels.ids.shape for value in values) or len([name for name in node.output if name]) > 1:
        raise Obstacle("it does not normalise channel by channel")
    tracer.slices.extend(Sliced(position, slot, 0, labels.ids) for slot in slots)
    constant = varying(len(labels.ids))
    if node.op_type == "BatchNormalization":
        constant = _evaluated(tracer, position, node, labels, [labels.constant])
        constant = np.where(values[0] == 0, values[1].astype(np.float64), constant)
    return replace(labels, constant=constant)


def _elementwise(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    """Any number of operands, broadcast against each other."""
    names = list(dict.fromkeys(name for name in node.input if name))
    if not any(name in tracer.labels for name in names):
        return
    if attribute(node, "broadcast", 0):
        raise Obstacle("it broadcasts as operator sets below 7 do")
    shape = tracer.shape(node.output[0])
    rank = len(shape)
    found: list[Labels] = []
    constant = True
    for name in names:
        if name in tracer.labels:
            labels = tracer.labels[name]
            axis = labels.axis + rank - len(tracer.shape(name))
            if len(labels.ids) == shape[axis]:
                found.append(replace(labels, axis=axis))
            else:
                tracer.freeze(labels.ids, f"{node.op_type} {describe(node, position)} spreads one channel over several")
                constant = False
    if len({labels.axis for labels in found}) != 1:
        raise Obstacle("its operands have their channels along different axes")
    first = found[0]
    for name in names:
        own = tracer.shape(name)
        axis = first.axis - rank + len(own)
        if name in tracer.labels:
            continue
        wide = axis >= 0 and own[axis] > 1
        if tracer.index.is_constant(name):
            if wide:
                tracer.slices.extend(
                    Sliced(position, slot, axis, first.ids) for slot, read in enumerate(node.input) if read == name
                )
            constant &= math.prod(own) == (own[axis] if wide else 1)
        elif wide:
            raise Obstacle("it meets a tensor whose channels cannot be removed")
        else:
            constant = False
    for other in found[1:]:
        tracer.join(first.ids, other.ids)
    carried = [labels.constant for labels in found]
    values = _evaluated(tracer, position, node, first, carried) if constant else varying(len(first.ids))
    tracer.labels[node.output[0]] = replace(first, constant=values)


def _evaluated(
    tracer: Tracer, position: int, node: onnx.NodeProto, labels: Labels, operands: Sequence[Floats]
) -> Floats:
    """What a node makes of channels that are constant."""
    known = ~np.isnan(np.stack(operands)).any(axis=0)
    if not known.any():
        return varying(len(labels.ids))
    types = [tracer.index.value(name).dtype for name in node.input if name and tracer.index.is_constant(name)]
    dtype = next((item for item in types if item.kind == "f"), np.dtype(np.float32))
    feeds = {}
    for name in node.input:
        if name in tracer.labels:
            own = tracer.labels[name]
            shape = [1] * len(tracer.shape(name))
            shape[own.axis] = -1
            feeds[name] = np.nan_to_num(own.constant).astype(dtype).reshape(shape)
    result = tracer.index.evaluate(position, node.output[0], feeds).reshape(-1)
    return np.where(known, result.astype(np.float64), np.nan)


def _pool(tracer: Tracer, position: int, node: onnx.NodeProto, labels: Labels) -> Labels:
    if len([name for name in node.output if name]) > 1:
        raise Obstacle("it gives positions as well")
    constant = labels.constant
    if node.op_type in ("LpPool", "GlobalLpPool") or (
        node.op_type == "AveragePool" and pads(node) and attribute(node, "count_include_pad", 0)
    ):
        constant = np.where(constant == 0, constant, np.nan)
    return replace(labels, constant=constant)


def _reduce(tracer: Tracer, position: int, node: onnx.NodeProto, labels: Labels) -> Labels:
    rank = len(tracer.shape(node.input[0]))
    axes, _ = tracer.integers(position, 1, "axes")
    reduced = set(from_the_front(axes or None, rank))
    if labels.axis in reduced:
        raise Obstacle("it sums over channels")
    axis = labels.axis
    if not attribute(node, "keepdims", 1):
        axis -= sum(item < axis for item in reduced)
    constant = labels.constant
    if node.op_type not in ("ReduceMean", "ReduceMax", "ReduceMin"):
        constant = np.where(constant == 0, constant, np.nan)
    return Labels(axis, labels.ids, constant)


def _softmax(tracer: Tracer, position: int, node: onnx.NodeProto, labels: Labels) -> Labels:
    axis = int(attribute(node, "axis", -1)) % len(tracer.shape(node.input[0]))
    if tracer.opset < 13 or axis == labels.axis:
        raise Obstacle("it mixes channels")
    return replace(labels, constant=varying(len(labels.ids)))


_ELEMENTWISE = (
    "Abs Add Cast Ceil Celu Clip Cos Div Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log "
    "Max Mean Min Mish Mul Neg Pow PRelu Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum "
    "Tanh ThresholdedRelu"
)
_REDUCE = "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare"
COMPUTING: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCE.split(), passing(_reduce)),
    **dict.fromkeys(("Conv", "ConvTranspose"), _convolution),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), passing(_normalization, axis=1)),
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool"), passing(_pool, axis=1)),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), passing(_pool, axis=1)),
    **dict.fromkeys(("Softmax", "LogSoftmax"), passing(_softmax)),
    "Gemm": _gemm,
    "MatMul": _matmul,
}
