"""Rules for operators that compute: layers, normalization, arithmetic, pools and sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx

from onnx_asr.arrays import Floats
from onnx_asr.channels.trace import Obstacle, OperatorRule, Tracer, from_the_front, passing
from onnx_asr.channels.units import ChannelLabels, Counted, Read, Sliced, varying
from onnx_asr.graph.index import attribute, input_name
from onnx_asr.graph.layers import GROUP, LAYERS, NORMALIZATION, PER_CHANNEL_SLOTS, Layer
from onnx_asr.graph.skips import Reason


def _layer(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    """Sum over the units of the input and start new ones; a depthwise convolution passes its units on."""
    layer = Layer.of(tracer.index, position)
    if isinstance(layer, Reason):
        raise Obstacle(layer.text)
    layout, slot, bias_name = layer.layout, layer.weight_slot, layer.bias_name(node)
    bias = tracer.constant(bias_name, "bias") if bias_name else None
    labels, out_axis = _source(tracer, node, layer)
    wanted = layout.inputs * layout.groups
    if labels is not None and len(labels.ids) != wanted:
        raise Obstacle(f"it reads {len(labels.ids)} channels, but has weights for {wanted}")
    ids = tracer.new(layout.channels)
    blocks = layout.to_blocks(tracer.index.value(node.input[slot]))
    # a row of zeros leaves nothing but the bias
    constant = np.where((blocks != 0).any(axis=(2, 3)).reshape(-1), np.nan, 0.0)
    added: Floats | float = 0.0
    if bias is not None:
        per_channel = bias.size == (bias.shape[-1] if bias.ndim else 1)
        if per_channel and bias.size not in (1, layout.channels):
            raise Obstacle(f"it has {layout.channels} channels, but a bias for {bias.size}")
        added = layer.beta * bias.reshape(-1) if per_channel else varying(len(ids))
    constant = constant + added
    in_axis = layout.input_axis
    if layout.groups == 1 or layout.inputs > 1:
        tracer.join_groups(ids, layout.groups)
        if labels is not None:
            tracer.join_groups(labels.ids, layout.groups)
            columns = Sliced(position, slot, in_axis, labels.ids[: layout.shape[in_axis]])
            tracer.slices.append(columns)
            tracer.reads.append(Read(labels, columns))
        tracer.slices.append(Sliced(position, slot, layout.output_axis, ids[: layout.shape[layout.output_axis]]))
    elif labels is None:
        tracer.freeze(ids, f"depthwise {tracer.name(position)} reads channels that cannot be removed")
    else:
        tracer.join(ids, np.repeat(labels.ids, layout.outputs))
        tracer.slices.append(Sliced(position, slot, 0, labels.ids if layer.is_transposed else ids))
        tracer.counts.append(Counted(position, GROUP, 0, labels.ids))
        carried = np.repeat(labels.constant, layout.outputs)
        taps = blocks.astype(np.float64).reshape(len(ids), -1).sum(axis=1)
        exact = (carried == 0) | (not pads(node) and not layer.is_transposed)
        through = np.where(exact & ~np.isnan(carried), carried, np.nan) * taps
        constant = np.where(np.isnan(constant), through + added, constant)
    if layer.bias_slot is not None and (bias is None or (bias.ndim and bias.shape[-1] > 1)):
        tracer.slices.append(Sliced(position, layer.bias_slot, 0 if bias is None else bias.ndim - 1, ids))
    tracer.labels[node.output[0]] = ChannelLabels(out_axis, ids, constant)
    tracer.made.append(node.output[0])


def _source(tracer: Tracer, node: onnx.NodeProto, layer: Layer) -> tuple[ChannelLabels | None, int]:
    """The channels that a layer sums over, if they can be followed, and the axis of those it makes."""
    if layer.input_axis >= 0:
        return tracer.source(node, layer.input_axis), layer.output_axis
    name = node.input[layer.data_slot]
    rank = len(tracer.shape(name))
    if rank < 2:
        raise Obstacle("it multiplies with a vector")
    labels, axis = tracer.labels.get(name), layer.input_axis % rank
    if labels is not None and labels.axis != axis:
        raise Obstacle("it sums over another axis than that of the channels")
    return labels, axis


def pads(node: onnx.NodeProto) -> bool:
    """Whether a convolution or pool pads its input."""
    return attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or any(attribute(node, "pads", ()))


def _normalization(tracer: Tracer, position: int, node: onnx.NodeProto, labels: ChannelLabels) -> ChannelLabels:
    slots = PER_CHANNEL_SLOTS[node.op_type]
    values = [tracer.constant(node.input[slot], "parameters") for slot in slots]
    if any(value.shape != labels.ids.shape for value in values) or any(node.output[1:]):
        raise Obstacle("it does not normalize channel by channel")
    tracer.slices.extend(Sliced(position, slot, 0, labels.ids) for slot in slots)
    constant = varying(len(labels.ids))
    if node.op_type == NORMALIZATION:
        constant = _evaluated(tracer, position, node, labels, [labels.constant])
        constant = np.where(values[0] == 0, values[1].astype(np.float64), constant)
    return replace(labels, constant=constant)


def _elementwise(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    """Join the units of operands, any number of them, that are broadcast against each other."""
    names = list(dict.fromkeys(name for name in node.input if name))
    labelled = [name for name in names if name in tracer.labels]
    if not labelled:
        return
    if attribute(node, "broadcast", 0):
        raise Obstacle("it uses the broadcasting of operator sets below 7")
    shape = tracer.shape(node.output[0])
    rank = len(shape)
    found: list[ChannelLabels] = []
    constant = True
    for name in labelled:
        labels = tracer.labels[name]
        axis = labels.axis + rank - len(tracer.shape(name))
        if len(labels.ids) == shape[axis]:
            found.append(replace(labels, axis=axis))
        else:
            tracer.freeze(labels.ids, f"{tracer.name(position)} broadcasts one channel to several")
            constant = False
    if len({labels.axis for labels in found}) != 1:
        raise Obstacle("its operands have their channels along different axes")
    first = found[0]
    if node.op_type == "Dropout" and input_name(node, 2):  # it may drop values at random, as in training
        constant = False
    for name in [name for name in names if name not in labelled]:
        own = tracer.shape(name)
        axis = first.axis - rank + len(own)
        wide = axis >= 0 and own[axis] > 1
        if tracer.index.is_constant(name):
            if wide:
                tracer.slices.extend(
                    Sliced(position, slot, axis, first.ids) for slot, read in enumerate(node.input) if read == name
                )
            constant &= math.prod(own) == (own[axis] if wide else 1)
        elif wide:
            raise Obstacle("another operand has channels that cannot be removed")
        else:
            constant = False
    for other in found[1:]:
        tracer.join(first.ids, other.ids)
    carried = [labels.constant for labels in found]
    values = _evaluated(tracer, position, node, first, carried) if constant else varying(len(first.ids))
    tracer.labels[node.output[0]] = replace(first, constant=values)
    for name in filter(None, node.output[1:]):  # the mask of a Dropout
        tracer.labels[name] = first.constant_where(False)


def _evaluated(
    tracer: Tracer, position: int, node: onnx.NodeProto, labels: ChannelLabels, operands: Sequence[Floats]
) -> Floats:
    """The node's results for channels that are constant."""
    known = ~np.isnan(np.stack(operands)).any(axis=0)
    if not known.any():
        return varying(len(labels.ids))
    types = [tracer.index.value(name).dtype for name in node.input if tracer.index.is_constant(name)]
    dtype = next((item for item in types if item.kind == "f"), np.dtype(np.float32))
    feeds = {}
    for name in node.input:
        if name in tracer.labels:
            own = tracer.labels[name]
            shape = [1] * len(tracer.shape(name))
            shape[own.axis] = -1
            feeds[name] = np.nan_to_num(own.constant).astype(dtype).reshape(shape)
    result = tracer.evaluate(position, node.output[0], feeds)
    if result is None or result.dtype.kind != "f":  # the type of what follows is not tracked
        return varying(len(labels.ids))
    values = result.reshape(-1).astype(np.float64)
    return np.where(known & np.isfinite(values), values, np.nan)


def _pool(tracer: Tracer, position: int, node: onnx.NodeProto, labels: ChannelLabels) -> ChannelLabels:
    if any(node.output[1:]):
        raise Obstacle("it also returns Integers")
    counts_padding = node.op_type == "AveragePool" and pads(node) and attribute(node, "count_include_pad", 0)
    keeps_constants = not counts_padding and node.op_type not in ("LpPool", "GlobalLpPool")
    return labels.constant_where(keeps_constants | (labels.constant == 0))


def _reduce(tracer: Tracer, position: int, node: onnx.NodeProto, labels: ChannelLabels) -> ChannelLabels:
    axes, _ = tracer.integers(position, 1, "axes")
    reduced = set(from_the_front(axes or None, len(tracer.shape(node.input[0]))))
    if labels.axis in reduced:
        raise Obstacle("it sums over channels")
    dropped = 0 if attribute(node, "keepdims", 1) else sum(axis < labels.axis for axis in reduced)
    keeps_constants = node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin")
    return replace(labels.constant_where(keeps_constants | (labels.constant == 0)), axis=labels.axis - dropped)


def _softmax(tracer: Tracer, position: int, node: onnx.NodeProto, labels: ChannelLabels) -> ChannelLabels:
    axis = int(attribute(node, "axis", -1)) % len(tracer.shape(node.input[0]))
    if tracer.opset < 13 or axis == labels.axis:
        raise Obstacle("it mixes channels")
    return labels.constant_where(False)


_ELEMENTWISE = (
    "Abs Add Cast Ceil Celu Clip Cos Div Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log "
    "Max Mean Min Mish Mul Neg Pow PRelu Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum "
    "Tanh ThresholdedRelu"
)
_REDUCE = "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare"
COMPUTING: dict[str, OperatorRule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCE.split(), passing(_reduce)),
    **dict.fromkeys(LAYERS, _layer),
    **dict.fromkeys(PER_CHANNEL_SLOTS, passing(_normalization, axis=1)),
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool"), passing(_pool, axis=1)),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), passing(_pool, axis=1)),
    **dict.fromkeys(("Softmax", "LogSoftmax"), passing(_softmax)),
}
