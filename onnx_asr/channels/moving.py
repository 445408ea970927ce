"""Rules for operators that move values: joining, slicing, padding, resizing, reshaping."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import onnx

from onnx_asr.channels.trace import Obstacle, OperatorRule, Tracer, from_the_front, passing
from onnx_asr.channels.units import ChannelLabels, Counted, Ids, varying
from onnx_asr.graph.index import attribute, input_name, is_standard
from onnx_asr.graph.shapes import Shape


def _concat(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    found = [tracer.labels.get(name) for name in node.input]
    known = [labels for labels in found if labels is not None]
    if not known:
        return
    axis = int(attribute(node, "axis", 1)) % len(tracer.shape(node.input[0]))
    if len({labels.axis for labels in known}) != 1:
        raise Obstacle("its operands have their channels along different axes")
    if known[0].axis != axis:
        if len(known) != len(found):
            raise Obstacle("another operand has channels that cannot be removed")
        for labels in known[1:]:
            tracer.join(known[0].ids, labels.ids)
        same = np.all([labels.constant == known[0].constant for labels in known], axis=0)
        tracer.labels[node.output[0]] = known[0].constant_where(same)
        return
    ids, constant = [], []
    for name, own in zip(node.input, found, strict=True):
        if own is None:
            count = tracer.shape(name)[axis]
            own = ChannelLabels(axis, tracer.new(count), varying(count))
            tracer.freeze(own.ids, f"{tracer.name(position)} takes them from '{name}', where they cannot be removed")
        ids.append(own.ids)
        constant.append(own.constant)
    tracer.labels[node.output[0]] = ChannelLabels(axis, np.concatenate(ids), np.concatenate(constant))


def _split(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node)
    if labels is None:
        return
    if int(attribute(node, "axis", 0)) % len(tracer.shape(node.input[0])) != labels.axis:
        tracer.labels |= dict.fromkeys(node.output, labels)
        return
    sizes, where = tracer.integers(position, 1, "split")
    counted = sizes is not None
    if sizes is None:
        if len(labels.ids) % len(node.output):
            raise Obstacle("its parts differ in size")
        sizes = [len(labels.ids) // len(node.output)] * len(node.output)
        tracer.join_groups(labels.ids, len(node.output))
    if len(sizes) != len(node.output) or sum(sizes) != len(labels.ids):
        raise Obstacle(f"its sizes do not divide {len(labels.ids)} channels")
    bounds = itertools.pairwise(np.cumsum([0, *sizes]))
    for entry, (name, (start, stop)) in enumerate(zip(node.output, bounds, strict=True)):
        part = ChannelLabels(labels.axis, labels.ids[start:stop], labels.constant[start:stop])
        tracer.labels[name] = part
        if counted:
            tracer.counts.append(Counted(position, where, entry, part.ids))


def _slice(tracer: Tracer, position: int, node: onnx.NodeProto, labels: ChannelLabels) -> ChannelLabels:
    axes, _ = tracer.integers(position, 3, "axes")
    starts, start_where = tracer.integers(position, 1, "starts")
    ends, end_where = tracer.integers(position, 2, "ends")
    steps, _ = tracer.integers(position, 4, "steps")
    assert starts is not None
    assert ends is not None
    order = from_the_front(axes, len(tracer.shape(node.input[0])))[: len(starts)]
    if labels.axis not in order:
        return labels
    if len(ends) != len(starts):
        raise Obstacle("it has not as many ends as starts")
    entry = order.index(labels.axis)
    if steps is not None and steps[entry] != 1:
        raise Obstacle("its step is not 1")
    start, stop, _ = slice(starts[entry], ends[entry]).indices(len(labels.ids))
    if stop <= start:
        raise Obstacle("its result has no channels")
    tracer.counts.append(Counted(position, start_where, entry, labels.ids[:start]))
    tracer.counts.append(Counted(position, end_where, entry, labels.ids[:stop]))
    return labels.along(lambda values: values[start:stop])


def _pad(tracer: Tracer, position: int, node: onnx.NodeProto, labels: ChannelLabels) -> ChannelLabels:
    amounts, where = tracer.integers(position, 1, "pads")
    axes, _ = tracer.integers(position, 3, "axes")
    mode = attribute(node, "mode", b"constant")
    assert amounts is not None
    order = from_the_front(axes, len(tracer.shape(node.input[0])))
    spatial = any(amounts[i] for i in range(len(amounts)) if order[i % len(order)] != labels.axis)
    value, source = attribute(node, "value", 0.0), input_name(node, 2)
    if source:
        value = float(tracer.constant(source, "value").reshape(-1)[0])
    if spatial and mode == b"constant":
        labels = labels.constant_where(labels.constant == value)
    if labels.axis not in order:
        return labels
    entry = order.index(labels.axis)
    before, after = amounts[entry], amounts[entry + len(order)]
    if not before and not after:
        return labels
    if mode != b"constant" or before < 0 or after < 0:
        raise Obstacle("it adds channels that are not constant, or removes some")
    first, last = tracer.new(before), tracer.new(after)
    for place, added in ((entry, first), (entry + len(order), last)):
        if len(added):
            tracer.counts.append(Counted(position, where, place, added))
    ids = np.concatenate([first, labels.ids, last])
    constant = np.concatenate([np.full(before, value), labels.constant, np.full(after, value)])
    tracer.made.append(node.output[0])
    return ChannelLabels(labels.axis, ids, constant)


def _resize(tracer: Tracer, position: int, node: onnx.NodeProto, labels: ChannelLabels) -> ChannelLabels:
    if tracer.shape(node.output[0])[labels.axis] != len(labels.ids):
        raise Obstacle("it resizes the channel axis")
    if input_name(node, 3):
        order = from_the_front(attribute(node, "axes", None), len(tracer.shape(node.input[0])))
        if labels.axis in order:
            tracer.count_entry(position, 3, order.index(labels.axis), labels.ids)
    return labels.constant_where(attribute(node, "coordinate_transformation_mode", b"") != b"tf_crop_and_resize")


def _transpose(tracer: Tracer, position: int, node: onnx.NodeProto, labels: ChannelLabels) -> ChannelLabels:
    order = list(attribute(node, "perm", range(len(tracer.shape(node.input[0])))[::-1]))
    return replace(labels, axis=order.index(labels.axis))


def _reshape(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the channel axis stays alone, or is merged with its neighbors."""
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
    """Axes ``start:stop`` around ``axis`` that become one axis, and that axis; None where there are none."""
    if before[axis] == 1:
        return None
    ranges = range(axis, -1, -1), range(axis + 1, len(before) + 1), range(len(after))
    for start, stop, place in itertools.product(*ranges):
        same_prefix = math.prod(before[:start]) == math.prod(after[:place])
        if same_prefix and math.prod(before[start:stop]) == after[place]:
            return start, stop, place
    return None


def _shape(tracer: Tracer, position: int, node: onnx.NodeProto) -> None:
    labels = tracer.source(node)
    if labels is None:
        return
    entries: list[int | Ids | None] = [None] * len(tracer.shape(node.input[0]))
    entries[labels.axis] = labels.ids
    part = entries[attribute(node, "start", 0) : attribute(node, "end", len(entries))]
    if any(entry is not None for entry in part):
        tracer.sizes[node.output[0]] = part


MOVING: dict[str, OperatorRule] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Resize", "Upsample"), passing(_resize)),
    "Concat": _concat,
    "Pad": passing(_pad),
    "Shape": _shape,
    "Slice": passing(_slice),
    "Split": _split,
    "Transpose": passing(_transpose),
}
