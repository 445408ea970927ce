"""The rules of all operators; an operator without a rule freezes the units that reach it."""

from __future__ import annotations

from onnx_asr.channels.computing import COMPUTING
from onnx_asr.channels.moving import MOVING
from onnx_asr.channels.trace import Evaluate, Tracer, unknown
from onnx_asr.channels.units import Channels
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.shapes import InputShapes

RULES = COMPUTING | MOVING


def trace(index: GraphIndex, evaluate: Evaluate = unknown, input_shapes: InputShapes | None = None) -> Channels:
    """Follow the channels of a graph from node to node, for :func:`onnx_asr.graph.shapes.typical_shapes`.

    ``evaluate`` computes what operators make of channels that are constant. It has to be what runs the model: other
    implementations differ from it in old operator sets.
    """
    tracer = Tracer(index, RULES, evaluate, input_shapes)
    for position in range(len(index.nodes)):
        tracer.follow(position)
    return tracer.result()
