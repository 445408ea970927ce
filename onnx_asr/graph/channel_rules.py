"""How channels pass each operator (see ``channels``); an operator without a rule freezes what reaches it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx

from onnx_asr.graph.channel_trace import Obstacle, Rule, Tracer
from onnx_asr.graph.channels import Channels, Counted, Floats, Ids, Labels, Read, Sliced
from onnx_asr.graph.index import GraphIndex, attribute, describe, is_standard
from onnx_asr.graph.points import BN_BIAS, BN_MEAN, BN_SCALE, BN_VAR
from onnx_asr.graph.shapes import Shape


def trace(index: GraphIndex) -> Channels:
    """Follow the channels of a graph from node to node."""
    tracer = Tracer(index, RULES)
    for position in range(len(index.nodes)):
        tracer.follow(position)
    return tracer.result()


def _varying(count: int) -> Floats:
    return np.full(count, np.nan)


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
        added = bias.reshape(-1) if per_channel else _varying(len(ids))
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


def _normalization(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node, axis=1)
    if labels is None:
        return
    slots = (BN_SCALE, BN_BIAS, BN_MEAN, BN_VAR) if node.op_type == "BatchNormalization" else (1, 2)
    values = [tracer.constant(node.input[slot], "parameters") for slot in slots]
    if any(value.shape != labels.ids.shape for value in values) or len([name for name in node.output if name]) > 1:
        raise Obstacle("it does not normalise channel by channel")
    tracer.slices.extend(Sliced(position, slot, 0, labels.ids) for slot in slots)
    constant = _varying(len(labels.ids))
    if node.op_type == "BatchNormalization":
        constant = _evaluated(tracer, position, node, labels, [labels.constant])
        constant = np.where(values[0] == 0, values[1].astype(np.float64), constant)
    tracer.labels[node.output[0]] = replace(labels, constant=constant)


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
    values = _evaluated(tracer, position, node, first, carried) if constant else _varying(len(first.ids))
    tracer.labels[node.output[0]] = replace(first, constant=values)


def _evaluated(
    tracer: Tracer, position: int, node: onnx.NodeProto, labels: Labels, operands: Sequence[Floats]
) -> Floats:
    """What a node makes of channels that are constant."""
    known = ~np.isnan(np.stack(operands)).any(axis=0)
    if not known.any():
        return _varying(len(labels.ids))
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


def _concat(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    found = [tracer.labels.get(name) for name in node.input]
    known = [labels for labels in found if labels is not None]
    if not known:
        return
    rank = len(tracer.shape(node.input[0]))
    axis = int(attribute(node, "axis", 1)) % rank
    if len({labels.axis for labels in known}) != 1:
        raise Obstacle("its operands have their channels along different axes")
    if known[0].axis != axis:
        if len(known) != len(found):
            raise Obstacle("it meets a tensor whose channels cannot be removed")
        for labels in known[1:]:
            tracer.join(known[0].ids, labels.ids)
        same = np.all([labels.constant == known[0].constant for labels in known], axis=0)
        tracer.labels[node.output[0]] = replace(known[0], constant=np.where(same, known[0].constant, np.nan))
        return
    parts = []
    for name, own in zip(node.input, found, strict=True):
        if own is None:
            count = tracer.shape(name)[axis]
            ids = tracer.new(count)
            tracer.freeze(ids, f"Concat {describe(node, position)} takes them from '{name}', where they are fixed")
            own = Labels(axis, ids, _varying(count))
        parts.append(own)
    tracer.labels[node.output[0]] = Labels(
        axis, np.concatenate([part.ids for part in parts]), np.concatenate([part.constant for part in parts])
    )


def _split(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node)
    if labels is None:
        return
    rank = len(tracer.shape(node.input[0]))
    if int(attribute(node, "axis", 0)) % rank != labels.axis:
        for name in node.output:
            tracer.labels[name] = labels
        return
    sizes, where = tracer.integers(position, 1, "split")
    if sizes is None:
        if len(labels.ids) % len(node.output):
            raise Obstacle("its parts are not equal")
        sizes = [len(labels.ids) // len(node.output)] * len(node.output)
        tracer.join_groups(labels.ids, len(node.output))
    else:
        bounds = np.cumsum([0, *sizes])
        for entry, (start, stop) in enumerate(itertools.pairwise(bounds)):
            tracer.counts.append(Counted(position, where, entry, labels.ids[start:stop]))
    start = 0
    for name, size in zip(node.output, sizes, strict=True):
        part = slice(start, start + size)
        tracer.labels[name] = labels.along(lambda values, part=part: values[part])  # type: ignore[misc]
        start += size


def _slice(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node)
    if labels is None:
        return
    rank = len(tracer.shape(node.input[0]))
    axes, _ = tracer.integers(position, 3, "axes")
    if axes is not None and labels.axis not in [axis % rank for axis in axes]:
        tracer.labels[node.output[0]] = labels
        return
    starts, start_where = tracer.integers(position, 1, "starts")
    ends, end_where = tracer.integers(position, 2, "ends")
    steps, _ = tracer.integers(position, 4, "steps")
    assert starts is not None
    assert ends is not None
    entry = labels.axis if axes is None else [axis % rank for axis in axes].index(labels.axis)
    if steps is not None and steps[entry] != 1:
        raise Obstacle("it takes every so many channels")
    count = len(labels.ids)
    start, stop, _ = slice(starts[entry], ends[entry]).indices(count)
    if stop <= start:
        raise Obstacle("it takes no channels")
    tracer.counts.append(Counted(position, start_where, entry, labels.ids[:start]))
    tracer.counts.append(Counted(position, end_where, entry, labels.ids[:stop]))
    tracer.labels[node.output[0]] = labels.along(lambda values: values[start:stop])


def _pad(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node)
    if labels is None:
        return
    rank = len(tracer.shape(node.input[0]))
    amounts, where = tracer.integers(position, 1, "pads")
    axes, _ = tracer.integers(position, 3, "axes")
    mode = attribute(node, "mode", b"constant")
    assert amounts is not None
    order = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    spatial = any(amounts[i] for i in range(len(amounts)) if order[i % len(order)] != labels.axis)
    value = attribute(node, "value", 0.0)
    if len(node.input) > 2 and node.input[2]:
        value = float(tracer.constant(node.input[2], "value").reshape(-1)[0])
    constant = labels.constant
    if spatial and mode == b"constant":
        constant = np.where(constant == value, constant, np.nan)
    labels = replace(labels, constant=constant)
    if labels.axis not in order:
        tracer.labels[node.output[0]] = labels
        return
    entry = order.index(labels.axis)
    before, after = amounts[entry], amounts[entry + len(order)]
    if not before and not after:
        tracer.labels[node.output[0]] = labels
        return
    if mode != b"constant" or before < 0 or after < 0:
        raise Obstacle("it adds channels that are not constant, or takes some away")
    first, last = tracer.new(before), tracer.new(after)
    if before:
        tracer.counts.append(Counted(position, where, entry, first))
    if after:
        tracer.counts.append(Counted(position, where, entry + len(order), last))
    ids = np.concatenate([first, labels.ids, last])
    constant = np.concatenate([np.full(before, value), constant, np.full(after, value)])
    tracer.make(node.output[0], labels.axis, ids, constant)


def _pool(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node, axis=1)
    if labels is None:
        return
    if len([name for name in node.output if name]) > 1:
        raise Obstacle("it gives positions as well")
    constant = labels.constant
    if node.op_type in ("LpPool", "GlobalLpPool") or (
        node.op_type == "AveragePool" and pads(node) and attribute(node, "count_include_pad", 0)
    ):
        constant = np.where(constant == 0, constant, np.nan)
    tracer.labels[node.output[0]] = replace(labels, constant=constant)


def _reduce(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node)
    if labels is None:
        return
    rank = len(tracer.shape(node.input[0]))
    axes, _ = tracer.integers(position, 1, "axes")
    reduced = set(range(rank)) if not axes else {axis % rank for axis in axes}
    if labels.axis in reduced:
        raise Obstacle("it sums over channels")
    axis = labels.axis
    if not attribute(node, "keepdims", 1):
        axis -= sum(item < axis for item in reduced)
    constant = labels.constant
    if node.op_type not in ("ReduceMean", "ReduceMax", "ReduceMin"):
        constant = np.where(constant == 0, constant, np.nan)
    tracer.labels[node.output[0]] = Labels(axis, labels.ids, constant)


def _resize(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node)
    if labels is None:
        return
    if tracer.shape(node.output[0])[labels.axis] != len(labels.ids):
        raise Obstacle("it resizes the channel axis")
    if len(node.input) > 3 and node.input[3]:
        axes = attribute(node, "axes", None)
        rank = len(tracer.shape(node.input[0]))
        order = list(range(rank)) if axes is None else [axis % rank for axis in axes]
        if labels.axis in order:
            tracer.count_entry(position, 3, order.index(labels.axis), labels.ids)
    exact = attribute(node, "coordinate_transformation_mode", b"half_pixel") != b"tf_crop_and_resize"
    tracer.labels[node.output[0]] = labels if exact else replace(labels, constant=_varying(len(labels.ids)))


def _transpose(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node)
    if labels is None:
        return
    rank = len(tracer.shape(node.input[0]))
    order = list(attribute(node, "perm", range(rank)[::-1]))
    tracer.labels[node.output[0]] = replace(labels, axis=order.index(labels.axis))


def _reshape(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the channel axis alone, or merged with its neighbours."""
    labels = tracer.source(node)
    if labels is None:
        if node.input[1:] and node.input[1] in tracer.sizes:
            raise Obstacle("its shape counts channels of another tensor")
        return
    before, after = tracer.shape(node.input[0]), tracer.shape(node.output[0])
    place = _merged_axis(before, after, labels.axis)
    if place is None:
        raise Obstacle("it splits the channel axis, or mixes it with the batch")
    start, stop, axis = place
    block = before[start:stop]  # [..., C, ...] becomes one axis
    shape = [1] * len(block)
    shape[labels.axis - start] = -1
    merged = labels.along(lambda values: np.broadcast_to(values.reshape(shape), block).reshape(-1), axis)
    if is_standard(node, "Reshape"):
        copied = (0,) if not attribute(node, "allowzero", 0) and stop - start == 1 and axis == start else ()
        tracer.count_entry(position, 1, axis, merged.ids, (-1, *copied))
    tracer.labels[node.output[0]] = merged


def _merged_axis(before: Shape, after: Shape, axis: int) -> tuple[int, int, int] | None:
    """Run of axes ``start:stop`` around ``axis`` that is one axis afterwards, and that axis."""
    if before[axis] == 1:
        return None
    for start in range(axis, -1, -1):
        for stop in range(axis + 1, len(before) + 1):
            for place in range(len(after)):
                same_prefix = math.prod(before[:start]) == math.prod(after[:place])
                if same_prefix and math.prod(before[start:stop]) == after[place]:
                    return start, stop, place
    return None


def _softmax(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node)
    if labels is None:
        return
    axis = int(attribute(node, "axis", -1)) % len(tracer.shape(node.input[0]))
    if tracer.opset < 13 or axis == labels.axis:
        raise Obstacle("it mixes channels")
    tracer.labels[node.output[0]] = replace(labels, constant=_varying(len(labels.ids)))


def _shape(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node)
    if labels is None:
        return
    entries: list[int | Ids | None] = [None] * len(tracer.shape(node.input[0]))
    entries[labels.axis] = labels.ids
    part = entries[attribute(node, "start", 0) : attribute(node, "end", len(entries))]
    if any(entry is not None for entry in part):
        tracer.sizes[node.output[0]] = part


_ELEMENTWISE = (
    "Abs Add Cast Ceil Celu Clip Cos Div Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log "
    "Max Mean Min Mish Mul Neg Pow PRelu Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum "
    "Tanh ThresholdedRelu"
)
_REDUCE = "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare"
RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCE.split(), _reduce),
    **dict.fromkeys(("Conv", "ConvTranspose"), _convolution),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _normalization),
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _pool),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Concat": _concat,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
