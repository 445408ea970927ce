"""The rules of all operators; an operator without a rule freezes the units that reach it."""

from __future__ import annotations

from onnx_asr.channels.computing import COMPUTING
from onnx_asr.channels.moving import MOVING
from onnx_asr.channels.trace import Tracer
from onnx_asr.channels.units import Channels
from onnx_asr.graph.index import GraphIndex

RULES = COMPUTING | MOVING


def trace(index: GraphIndex) -> Channels:
    """Follow the channels of a graph from node to node."""
    tracer = Tracer(index, RULES)
    for position in range(len(index.nodes)):
        tracer.follow(position)
    return tracer.result()
