"""Node order: ONNX wants every tensor produced before it is read; some converters append what they add at the end."""

from __future__ import annotations

import heapq

import onnx

from onnx_asr.graph.index import node_reads


def topologically_sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself where its nodes are in order, else a copy with each moved no further than it has to be.

    A cycle is left as it is, for the index to name.
    """
    nodes = list(model.graph.node)
    producer = {name: position for position, node in enumerate(nodes) for name in node.output if name}
    needs = [{producer[name] for name in node_reads(node) if name in producer} for node in nodes]
    if all(max(before, default=-1) < position for position, before in enumerate(needs)):
        return model
    readers: list[list[int]] = [[] for _ in nodes]
    for position, before in enumerate(needs):
        for source in before:
            readers[source].append(position)
    missing = [len(before) for before in needs]
    ready = [position for position, count in enumerate(missing) if count == 0]
    order = []
    while ready:
        position = heapq.heappop(ready)
        order.append(position)
        for reader in readers[position]:
            missing[reader] -= 1
            if missing[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(nodes[position] for position in order)
    return result
