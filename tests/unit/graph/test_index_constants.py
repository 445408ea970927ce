"""Constants behind operators: the same values as in onnxruntime, in every operator set from 7 on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_asr.graph.index import _FOLDABLE, GraphIndex
from tests.graphs import run

FLOATS = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
FLOAT, FLOAT16, DOUBLE, INT32, INT64 = (
    getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "DOUBLE", "INT32", "INT64")
)
Case = tuple[str, list[np.ndarray], dict[str, Any]]


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def stored(value: Any, dtype: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array([value], dtype))


def with_axes(opset: int, operator: str, value: np.ndarray, axes: list[int]) -> Case:
    return (operator, [value], {"axes": axes}) if opset < 13 else (operator, [value, integers(*axes)], {})


def moving(opset: int) -> Iterator[Case]:
    negative = opset >= 11
    yield "Identity", [FLOATS], {}
    yield "Transpose", [FLOATS], {}
    yield "Transpose", [FLOATS], {"perm": [1, 0, 2]}
    yield "Reshape", [FLOATS, integers(0, -1)], {}
    if opset >= 14:
        yield "Reshape", [FLOATS[:, :0], integers(0, 5)], {"allowzero": 1}
    yield "Squeeze", [FLOATS[:1, :, :1]], {}
    for axes in ([0], [2, 0], *([[-3]] if negative else [])):
        yield with_axes(opset, "Squeeze", FLOATS[:1, :, :1], axes)
    for axes in ([0], [0, 2], [3, 0], *([[-1]] if negative else [])):
        yield with_axes(opset, "Unsqueeze", FLOATS, axes)
    yield "Flatten", [FLOATS], {}
    for axis in (0, 1, 2, 3, *([-1] if negative else [])):
        yield "Flatten", [FLOATS], {"axis": axis}
    yield "Shape", [FLOATS], {}
    if opset >= 15:
        yield "Shape", [FLOATS], {"start": -2, "end": 9}
    for axis in (0, 1, *([-1] if negative else [])):
        for places in (np.array(1), integers(0, 1), np.array([[0], [1]], np.int32)):
            yield "Gather", [FLOATS, places], {"axis": axis}
        yield "Concat", [FLOATS, FLOATS + 1], {"axis": axis}
    for starts, ends, axes in (([0], [1], [0]), ([1, 0], [9, -1], [1, 2]), ([0], [2**62], [2])):
        if opset < 10:
            yield "Slice", [FLOATS], {"starts": starts, "ends": ends, "axes": axes}
        else:
            yield "Slice", [FLOATS, integers(*starts), integers(*ends), integers(*axes)], {}
    if opset >= 10:
        yield "Slice", [FLOATS, integers(-1), integers(-9), integers(-1), integers(-1)], {}


def computing(opset: int) -> Iterator[Case]:
    for source in ("f4", "f2", "f8", "i4", "i8", "?"):
        for target in (FLOAT, FLOAT16, DOUBLE, INT32, INT64, onnx.TensorProto.BOOL):
            yield "Cast", [(3 * FLOATS).astype(source)], {"to": target}
    yield "Cast", [np.array([1e6, -7e4, 1e-9, np.inf], np.float32)], {"to": FLOAT16}
    if opset >= 9:
        yield "ConstantOfShape", [integers(2, 3)], {}
        yield "ConstantOfShape", [integers(2, 3)], {"value": stored(2.5, "f4")}
        yield "ConstantOfShape", [integers()], {"value": stored(3, "i8")}
    for operator in ("Add", "Sub", "Mul"):
        for dtype in ("f4", "f2", "f8", "i4", "i8"):
            for other in (np.arange(4), np.array(2.5), 3 * FLOATS[0]):
                yield operator, [(9 * FLOATS).astype(dtype), other.astype(dtype)], {}


@pytest.mark.parametrize("opset", range(7, onnx.defs.onnx_opset_version() + 1))
def test_constants_have_the_values_that_onnxruntime_computes(opset: int) -> None:
    seen = set()
    for operator, inputs, attributes in (*moving(opset), *computing(opset)):
        names = [f"i{number}" for number in range(len(inputs))]
        graph = helper.make_graph(
            [helper.make_node(operator, names, ["y"], **attributes)],
            "g",
            [],
            [onnx.ValueInfoProto(name="y")],
            [numpy_helper.from_array(np.ascontiguousarray(v), name) for v, name in zip(inputs, names, strict=True)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        expected = run(model, {})["y"]
        index = GraphIndex.of(model)
        assert index.is_constant("y")
        found = index.value("y")
        what = f"{operator} {attributes} of {[(value.shape, value.dtype) for value in inputs]}"
        np.testing.assert_array_equal(found, expected, err_msg=what, strict=True)
        seen.add(operator)
    assert seen == _FOLDABLE - (set() if opset >= 9 else {"ConstantOfShape"})
