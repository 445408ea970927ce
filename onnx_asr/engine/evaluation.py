"""Single nodes, computed by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from onnx_asr.arrays import Array
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import ModelError
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.index import GraphIndex, ancestors
from onnx_asr.graph.segments import Boundary, extract


def evaluate(
    index: GraphIndex, runtime: Runtime, position: int, output: str, feeds: Mapping[str, Array]
) -> Array | None:
    """One output of the node at a position, computed from ``feeds`` and the graph's constants.

    Returns:
        None where onnxruntime does not run the node on values of these types.
    """
    boundaries = {
        name: Boundary(onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape) for name, value in feeds.items()
    }
    needed = ancestors(index, [output], feeds)
    assert position in needed
    try:
        session = Session(extract(index, needed, boundaries, [output], EditPlan()), runtime)
        return session.run(feeds)[output]
    except ModelError:
        return None
