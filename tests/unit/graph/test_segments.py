"""Segments that are cut out of a graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_asr.engine.session import Runtime, Session
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.segments import Boundary, extract
from tests.graphs import (
    images,
    index,
    net,
    residual_net,
    run,
)


def test_a_segment_holds_its_nodes_and_their_initializers_only() -> None:
    model = residual_net()
    at = {node.output[0]: p for p, node in enumerate(model.graph.node)}
    segment = extract(
        index(model), [at["a"], at["stem_r"]], {"stem_n": Boundary(1, (None, 8, 8, 8))}, ["a"], EditPlan()
    )
    assert [node.output[0] for node in segment.graph.node] == ["stem_r", "a"]
    assert [tensor.name for tensor in segment.graph.initializer] == ["a_w"]
    dims = segment.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims][1:] == [8, 8, 8]
    full = run(model, {"x": images(3, seed=1)}, ["stem_n", "a"])
    np.testing.assert_allclose(run(segment, {"stem_n": full["stem_n"]})["a"], full["a"], atol=1e-6)


@pytest.mark.parametrize("element", ["float", "float16", "double"])
def test_planned_values_and_an_added_bias_are_in_the_segment(element: str) -> None:
    dtype = {"float": np.float32, "float16": np.float16, "double": np.float64}[element]
    weight = np.eye(2, dtype=dtype)
    text = f"g ({element}[N,2] x) => ({element}[N,2] y) {{ p = MatMul (x, w)  y = Neg (p) }}"
    model = net(text, ir=3, w=weight)
    plan = EditPlan({(0, 1): weight * 3.0}, {0: np.array([1.0, 2.0])})
    boundary = Boundary(int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))), None)
    segment = extract(index(model), [0, 1], {"x": boundary}, ["p", "y"], plan)
    assert segment.ir_version >= 4
    out = Session(segment, Runtime(threads=1)).run({"x": np.ones((1, 2), dtype)})
    np.testing.assert_array_equal(out["p"], np.array([[4, 5]], dtype))
    np.testing.assert_array_equal(out["y"], -out["p"])
    assert out["p"].dtype == dtype
