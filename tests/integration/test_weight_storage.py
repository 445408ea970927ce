"""However a file holds its weights: every command does what it does with plain initializers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_asr
from onnx_asr.engine.loading import load
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.layers import LAYERS
from onnx_asr.graph.model_io import save
from tests.graphs import bn, copy, first_output, images, net

TEXT = """g (float[N,3,8,8] x) => (float[N,4] y) {
    a = Conv <pads=[1,1,1,1]> (x, wa, ba)  n = BatchNormalization (a, n_gamma, n_beta, n_mean, n_var)  r = Relu (n)
    b = Conv <pads=[1,1,1,1]> (r, wb, bb)  s = Relu (b)  p = GlobalAveragePool (s)  f = Flatten (p)
    y = Gemm <transB=1> (f, wy, by)
}"""
SHAPES = {"wa": (6, 3, 3, 3), "ba": (6,), "wb": (8, 6, 3, 3), "bb": (8,), "wy": (4, 8), "by": (4,)}
DEAD = {"wa": [2], "wb": [1, 5], "ba": [2], "bb": [1, 5], "n_beta": [2], "n_mean": [2]}
DATA = images(40, seed=1)
EXECUTION = onnx_asr.Execution(onnx_asr.Runtime(threads=1))
REPAIR = onnx_asr.RepairOptions(method="refit", samples=24, verify_samples=16)


def plain() -> onnx.ModelProto:
    """A network with dead channels; all its values are the same in float16, and the running variances are all 1."""
    model = net(TEXT, **SHAPES, **{**bn("n", channels=6), "n_var": np.ones(6, np.float32)})
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
        value[DEAD.get(tensor.name, [])] = 0
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def zeroed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with a third of the weights set to zero: a pruned version."""
    result = copy(model)
    for tensor in result.graph.initializer:
        value = numpy_helper.to_array(tensor).copy()
        if value.ndim > 1:
            value[np.abs(value) < np.quantile(np.abs(value), 0.5)] = 0
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return result


def replaced(model: onnx.ModelProto, hold: Callable[[onnx.ModelProto, str, np.ndarray], list[onnx.NodeProto]]) -> None:
    """Take every initializer out, and have ``hold`` put its value back: nodes that make it, or something else."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    del model.graph.initializer[:]
    nodes = [node for name, value in values.items() for node in hold(model, name, value)]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def stored(model: onnx.ModelProto, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name


def sparse_tensor(name: str, value: np.ndarray, flat: bool) -> onnx.SparseTensorProto:
    places = np.flatnonzero(value) if flat else np.argwhere(value)
    kept = numpy_helper.from_array(value[value != 0], name)
    return helper.make_sparse_tensor(kept, numpy_helper.from_array(places, f"{name}_places"), value.shape)


def constant_node(name: str, **setting: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], **setting)


def as_inputs(model: onnx.ModelProto) -> None:
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def as_typed_fields(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, value.shape, value.ravel().tolist()))


def sparsely(flat: bool) -> Callable[[onnx.ModelProto], None]:
    def hold(model: onnx.ModelProto, name: str, value: np.ndarray) -> list[onnx.NodeProto]:
        model.graph.sparse_initializer.append(sparse_tensor(name, value, flat))
        return []

    return lambda model: replaced(model, hold)


def as_constants(model: onnx.ModelProto) -> None:
    replaced(model, lambda _, name, value: [constant_node(name, value=numpy_helper.from_array(value))])


def as_sparse_constants(model: onnx.ModelProto) -> None:
    replaced(model, lambda _, name, value: [constant_node(name, sparse_value=sparse_tensor("", value, True))])


def as_lists(model: onnx.ModelProto) -> None:
    """Constant nodes with ``value_floats``, reshaped where a weight has several axes."""

    def hold(model: onnx.ModelProto, name: str, value: np.ndarray) -> list[onnx.NodeProto]:
        if value.ndim == 1:
            return [constant_node(name, value_floats=value.tolist())]
        flat = constant_node(f"{name}_flat", value_floats=value.ravel().tolist())
        shape = constant_node(f"{name}_shape", value_ints=value.shape)
        return [flat, shape, helper.make_node("Reshape", [*flat.output, *shape.output], [name])]

    replaced(model, hold)


def behind(operator: str, stored_as: Callable[[np.ndarray], np.ndarray], **attributes: Any) -> Callable[..., None]:
    """Initializers read by a node that makes the weight."""

    def hold(model: onnx.ModelProto, name: str, value: np.ndarray) -> list[onnx.NodeProto]:
        source = stored(model, f"{name}_source", stored_as(value))
        return [helper.make_node(operator, [source], [name], **attributes)]

    return lambda model: replaced(model, hold)


def reshaped(model: onnx.ModelProto) -> None:
    def hold(model: onnx.ModelProto, name: str, value: np.ndarray) -> list[onnx.NodeProto]:
        source = stored(model, f"{name}_flat", value.ravel())
        shape = stored(model, f"{name}_shape", np.array(value.shape))
        return [helper.make_node("Reshape", [source, shape], [name])]

    replaced(model, hold)


def unsqueezed(model: onnx.ModelProto) -> None:
    def hold(model: onnx.ModelProto, name: str, value: np.ndarray) -> list[onnx.NodeProto]:
        source, axes = stored(model, f"{name}_wide", value[None]), stored(model, f"{name}_axes", np.array([0]))
        return [helper.make_node("Squeeze", [source, axes], [name])]

    replaced(model, hold)


def filled(model: onnx.ModelProto) -> None:
    """The running variances by ConstantOfShape, everything else as it was."""

    def hold(model: onnx.ModelProto, name: str, value: np.ndarray) -> list[onnx.NodeProto]:
        if name != "n_var":
            stored(model, name, value)
            return []
        shape = stored(model, "n_shape", np.array(value.shape))
        return [helper.make_node("ConstantOfShape", [shape], [name], value=numpy_helper.from_array(value[:1]))]

    replaced(model, hold)


def in_a_function(model: onnx.ModelProto) -> None:
    """The whole network is a model-local function, and its weights are constants in there."""
    as_constants(model)
    opset = helper.make_opsetid("", 17)
    model.functions.append(helper.make_function("local", "Net", ["x"], ["y"], list(model.graph.node), [opset]))
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Net", ["x"], ["y"], domain="local"))
    model.opset_import.append(helper.make_opsetid("local", 1))


def given_to_a_function(model: onnx.ModelProto) -> None:
    """Initializers are arguments of the function."""
    names = ["x", *(tensor.name for tensor in model.graph.initializer)]
    opset = helper.make_opsetid("", 17)
    model.functions.append(helper.make_function("local", "Net", names, ["y"], list(model.graph.node), [opset]))
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Net", names, ["y"], domain="local"))
    model.opset_import.append(helper.make_opsetid("local", 1))


def split(model: onnx.ModelProto) -> None:
    """Each weight is joined from two initializers."""

    def hold(model: onnx.ModelProto, name: str, value: np.ndarray) -> list[onnx.NodeProto]:
        halves = np.array_split(value, 2)
        parts = [stored(model, f"{name}_{number}", half) for number, half in enumerate(halves)]
        return [helper.make_node("Concat", parts, [name], axis=0)]

    replaced(model, hold)


WAYS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "initializers": lambda model: None,
    "initializers that are inputs": as_inputs,
    "typed fields": as_typed_fields,
    "sparse initializers": sparsely(flat=True),
    "sparse initializers with coordinates": sparsely(flat=False),
    "Constant": as_constants,
    "Constant with sparse_value": as_sparse_constants,
    "Constant with value_floats": as_lists,
    "Identity": behind("Identity", lambda value: value),
    "Cast from float16": behind("Cast", lambda value: value.astype(np.float16), to=onnx.TensorProto.FLOAT),
    "Cast from float64": behind("Cast", lambda value: value.astype(np.float64), to=onnx.TensorProto.FLOAT),
    "Transpose": behind("Transpose", np.transpose),
    "Reshape": reshaped,
    "Squeeze": unsqueezed,
    "ConstantOfShape": filled,
    "Concat": split,
    "constants in a function": in_a_function,
    "arguments of a function": given_to_a_function,
    "external data": lambda model: None,
}


def parameters(model: onnx.ModelProto) -> list[np.ndarray]:
    """The parameters of all layers, in file order."""
    index = GraphIndex.of(load(model))
    layers = [node for node in index.nodes if node.op_type in (*LAYERS, "BatchNormalization")]
    return [index.value(name) for node in layers for name in node.input if index.is_constant(name)]


def prune(dense: Any, sparse: Any) -> onnx.ModelProto:
    return onnx_asr.prune(dense, options=onnx_asr.PruneOptions(sparsity=0.6), execution=EXECUTION).model


def prune_channels(dense: Any, sparse: Any) -> onnx.ModelProto:
    return onnx_asr.prune_channels(dense, onnx_asr.ChannelPruneOptions(sparsity=0.5), execution=EXECUTION).model


def shrink(dense: Any, sparse: Any) -> onnx.ModelProto:
    result = onnx_asr.shrink(dense, execution=EXECUTION)
    assert [group.kept for group in result.layers] == [5, 6]
    return result.model


def repair(dense: Any, sparse: Any) -> onnx.ModelProto:
    return onnx_asr.repair(sparse, DATA, REPAIR, dense=dense, execution=EXECUTION).model


def compress(dense: Any, sparse: Any) -> onnx.ModelProto:
    options = onnx_asr.CompressOptions(sparsity=0.5, rounds=2, repair=REPAIR)
    return onnx_asr.compress(dense, DATA, options, execution=EXECUTION).model


WRITING = [prune, prune_channels, shrink, repair, compress]


def held(way: str, model: onnx.ModelProto, path: Path) -> onnx.ModelProto | str:
    """A model that holds its weights in some way, or the path of one."""
    result = copy(model)
    WAYS[way](result)
    np.testing.assert_array_equal(first_output(result, DATA), first_output(model, DATA))
    return str(save(result, path, external_data=True)) if way == "external data" else result


@pytest.mark.parametrize("command", WRITING, ids=lambda command: command.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_has_the_same_parameters(
    way: str, command: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    dense = plain()
    expected = command(dense, zeroed(dense))
    found = command(held(way, dense, tmp_path / "dense.onnx"), held(way, zeroed(dense), tmp_path / "sparse.onnx"))
    for value, other in zip(parameters(found), parameters(expected), strict=True):
        np.testing.assert_array_equal(value, other)
    again = onnx.load(save(found, tmp_path / "written.onnx"))
    np.testing.assert_allclose(first_output(again, DATA), first_output(expected, DATA), rtol=1e-5, atol=1e-6)
    if "sparse initializers" in way:
        assert len(again.graph.sparse_initializer) >= (0 if command is compress else len(SHAPES))


def inspected(dense: Any, sparse: Any) -> Any:
    return onnx_asr.plain(onnx_asr.inspect(sparse, DATA, dense=dense, execution=EXECUTION))["layers"]


def evaluated(dense: Any, sparse: Any) -> Any:
    return onnx_asr.plain(onnx_asr.evaluate(sparse, DATA, dense=dense, execution=EXECUTION))


def sensitivity(dense: Any, sparse: Any) -> Any:
    options = onnx_asr.SensitivityOptions(sparsities=(0.5,))
    return onnx_asr.plain(onnx_asr.sensitivity(dense, DATA, options, execution=EXECUTION))["layers"]


def without_names(values: Any) -> Any:
    """Nodes have other names where a function was inlined, and other positions behind constants."""
    if isinstance(values, dict):
        return {key: without_names(value) for key, value in values.items() if key not in ("name", "node")}
    return [without_names(value) for value in values] if isinstance(values, list) else values


@pytest.mark.parametrize("command", [inspected, evaluated, sensitivity], ids=lambda command: command.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_measured_is_the_same(way: str, command: Callable[..., Any], tmp_path: Path) -> None:
    dense = plain()
    expected = command(dense, zeroed(dense))
    found = command(held(way, dense, tmp_path / "dense.onnx"), held(way, zeroed(dense), tmp_path / "sparse.onnx"))
    assert without_names(found) == without_names(expected)
