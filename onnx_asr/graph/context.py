"""The surroundings of a correction point: the residual Add behind it, and the ReLU that hides part of its errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx_asr.graph.index import GraphIndex, ancestors, attribute, input_name, is_standard
from onnx_asr.graph.points import LayerPoint, Point, following_batchnorm

_CLASS_SHAPING = ("Softmax", "LogSoftmax", "Identity", "Flatten", "Reshape", "Squeeze", "Dropout")


@dataclass(frozen=True)
class Context:
    """The surroundings of one point that has weights.

    Attributes:
        point: The point.
        source: The tensor that the weights multiply.
        output: The point's output after its own BatchNormalization.
        shortcut: The other operand of the residual Add that ``output`` alone feeds, where this point corrects the sum.
        batchnorm: Position of a BatchNormalization between the Add (or the output) and the ReLU, if there is one.
        relu: Whether nothing but ReLUs read the result.
        classes: Whether the result is the graph's first output, a matrix, or becomes it through a Softmax and changes
            of shape alone: with one row per sample, it holds the logits of classes.
    """

    point: LayerPoint
    source: str
    output: str
    shortcut: str | None
    batchnorm: int | None
    relu: bool
    classes: bool


def contexts(index: GraphIndex, points: Sequence[Point]) -> list[Context]:
    """Surroundings of every point with weights, ordered so that each comes after all it depends on.

    Where two branches meet in an Add, the branch whose last point comes later corrects the sum: the other branch is its
    shortcut.
    """
    ordered = sorted((point for point in points if isinstance(point, LayerPoint)), key=lambda p: (p.level, p.node))
    rank = {point.node: number for number, point in enumerate(ordered)}
    return [_context(index, point, rank) for point in ordered]


def steps(index: GraphIndex, items: Sequence[Context]) -> list[list[Context]]:
    """Contexts in groups that can be measured together, each after all it depends on.

    A group is a level, split where a shortcut depends on another point of the same level.
    """
    result = []
    for level in sorted({item.point.level for item in items}):
        pending = [item for item in items if item.point.level == level]
        while pending:
            nodes = {item.point.node for item in pending}
            ready = [item for item in pending if nodes.isdisjoint(ancestors(index, filter(None, [item.shortcut])))]
            result.append(ready)
            pending = [item for item in pending if item not in ready]
    return result


def _context(index: GraphIndex, point: LayerPoint, rank: dict[int, int]) -> Context:
    source = index.nodes[point.node].input[point.layer.data_slot]
    output = point.tensor if point.batchnorm is None else index.nodes[point.batchnorm].output[0]
    shortcut, result = _shortcut(index, point, output, rank)
    batchnorm = None
    if point.channel_axis == 1:  # the axis of BatchNormalization; that of a MatMul counts from the end
        batchnorm = following_batchnorm(index, result)
        result = result if batchnorm is None else index.nodes[batchnorm].output[0]
    readers = index.consumers.get(result, [])
    relu = bool(readers) and result not in index.outputs and all(_is_relu(index, reader) for reader in readers)
    return Context(point, source, output, shortcut, batchnorm, relu, _becomes_classes(index, result))


def _becomes_classes(index: GraphIndex, name: str) -> bool:
    first = index.outputs[0]
    while name != first:
        reader = index.sole_consumer(name, *_CLASS_SHAPING)
        if reader is None:
            return False
        name = index.nodes[reader].output[0]
    declared = index.model.graph.output[0].type.tensor_type
    return name not in index.consumers and (not declared.HasField("shape") or len(declared.shape.dim) == 2)


def _shortcut(index: GraphIndex, point: Point, output: str, rank: dict[int, int]) -> tuple[str | None, str]:
    """The shortcut that is added to an output, and the sum; None and the output where this point corrects no sum."""
    consumer = index.sole_consumer(output, "Add")
    if consumer is None:
        return None, output
    others = [name for name in index.nodes[consumer].input if name != output]
    if len(others) != 1 or index.is_constant(others[0]):
        return None, output
    if any(rank.get(node, -1) >= rank[point.node] for node in ancestors(index, others)):
        return None, output
    return str(others[0]), index.nodes[consumer].output[0]


def _is_relu(index: GraphIndex, position: int) -> bool:
    """Relu, or Clip from 0 (ReLU6)."""
    node = index.nodes[position]
    if not is_standard(node, "Clip"):
        return is_standard(node, "Relu")
    minimum, source = attribute(node, "min", None), input_name(node, 1)
    if source and index.is_constant(source):
        minimum = float(index.value(source))
    return bool(minimum == 0.0)
