"""Node order: ONNX wants every tensor produced before it is read; some converters append nodes at the end."""

from __future__ import annotations

import heapq
from graphlib import CycleError, TopologicalSorter

import onnx

from onnx_asr.graph.index import node_reads


def topologically_sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself where its nodes are in order, else a copy in which each node moves no further than it has to.

    A cycle is left as it is; the index reports it.
    """
    nodes = list(model.graph.node)
    producer = {name: position for position, node in enumerate(nodes) for name in node.output if name}
    needs = [{producer[name] for name in node_reads(node) if name in producer} for node in nodes]
    if all(max(before, default=-1) < position for position, before in enumerate(needs)):
        return model
    sorter = TopologicalSorter(dict(enumerate(needs)))
    try:
        sorter.prepare()
    except CycleError:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    ready: list[int] = []
    while sorter.is_active():
        for position in sorter.get_ready():
            heapq.heappush(ready, position)
        first = heapq.heappop(ready)
        result.graph.node.append(nodes[first])
        sorter.done(first)
    return result
