"""Models of onnx-graphsurgeon and onnx-ir: the same results as from the file they came from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr.engine.loading import load
from onnx_asr.errors import ModelError
from onnx_asr.graph.model_io import digest, save
from onnx_asr.json_values import plain
from onnx_asr.networks.execution import Execution
from onnx_asr.pruning.compression import CompressOptions
from onnx_asr.repairing.options import RepairOptions
from onnx_asr.sweeping.grid import SweepGrid, SweepSettings
from onnx_asr.sweeping.workspace import Setup, Workspace
from tests.graphs import first_output, images, net, pruned, residual_net
from tools.paths import MODELS

Source = Any
X = images(96, seed=1)
DATA = {"x": X}
OPTIONS = RepairOptions(method="paired", samples=48, verify_samples=40)


def graphsurgeon(path: Path) -> Source:
    gs = pytest.importorskip("onnx_graphsurgeon")
    return gs.import_onnx(onnx.load(path))


def ir(path: Path) -> Source:
    return pytest.importorskip("onnx_ir").load(path)


LIBRARIES = {"onnx_graphsurgeon": graphsurgeon, "onnx_ir": ir}
library = pytest.mark.parametrize("imported", LIBRARIES.values(), ids=LIBRARIES)


def cells(dense: Source, _: Source) -> list[object]:
    grid = SweepGrid((0.5,), ("unstructured",), ("none", "paired"))
    result = onnx_asr.sweep(dense, DATA, grid, SweepSettings(repair=OPTIONS))
    return [outcome.fidelity for outcome in result.cells.values()]


def layers(dense: Source, sparse: Source) -> object:
    found = onnx_asr.inspect(sparse, dense=dense, data=DATA, samples=48)
    return [(layer.name, plain(layer.damage) if layer.damage else None) for layer in found.layers]


ENTRIES: dict[str, Callable[[Source, Source], object]] = {
    "load": lambda dense, _: load(dense),
    "prune": lambda dense, _: onnx_asr.prune(dense, options=onnx_asr.PruneOptions(0.6)).model,
    "prune_channels": lambda dense, _: onnx_asr.prune_channels(dense, onnx_asr.ChannelPruneOptions(0.5)).model,
    "shrink": lambda _, sparse: onnx_asr.shrink(sparse).model,
    "repair": lambda dense, sparse: onnx_asr.repair(sparse, DATA, OPTIONS, dense=dense).model,
    "compress": lambda dense, _: (
        onnx_asr.compress(dense, DATA, CompressOptions(sparsity=0.6, rounds=1, repair=OPTIONS)).model
    ),
    "evaluate": lambda dense, sparse: onnx_asr.evaluate(sparse, DATA, dense=dense),
    "inspect": layers,
    "sensitivity": lambda dense, _: (
        onnx_asr.sensitivity(dense, DATA, onnx_asr.SensitivityOptions(sparsities=(0.8,), repair=OPTIONS)).layers
    ),
    "sweep": cells,
    "measure_latency": lambda dense, sparse: onnx_asr.measure_latency(dense, sparse, seconds=0.01).shapes,
}


def comparable(result: object) -> object:
    return first_output(result, X).tobytes() if isinstance(result, onnx.ModelProto) else result


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    dense = residual_net()
    return save(dense, tmp_path / "dense.onnx"), save(pruned(dense, 0.7), tmp_path / "pruned.onnx")


@library
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_every_entry_point_takes_them(
    entry: Callable[[Source, Source], object], imported: Callable[[Path], Source], paths: tuple[Path, Path]
) -> None:
    dense, sparse = map(imported, paths)
    assert comparable(entry(dense, sparse)) == comparable(entry(*paths))


@library
def test_workers_are_sent_the_exported_model(imported: Callable[[Path], Source], paths: tuple[Path, Path]) -> None:
    """A ModelProto can be pickled, whatever holds for the objects of the libraries."""
    workers = pytest.importorskip("onnx_asr.sweeping.workers")
    setup = Setup(imported(paths[0]), DATA, None, None, None, SweepSettings(repair=OPTIONS))
    workspace = Workspace(setup, Execution())
    assert workers._sendable(workspace).dense is workspace.dense
    assert isinstance(workspace.dense, onnx.ModelProto)


def state(model: Source) -> str:
    domains = getattr(model, "import_domains", None)
    return f"{model} {domains} {id(domains)}"


@library
def test_inputs_are_not_modified(imported: Callable[[Path], Source], tmp_path: Path) -> None:
    """Neither by the domains that an export of graphsurgeon adds to the graph, nor by loading weights."""
    path = save(residual_net(), tmp_path / "m.onnx", external_data=True)
    model = imported(path)
    if imported is graphsurgeon:
        model.nodes[0].domain = "elsewhere"
    before = state(model)
    digests = {digest(load(model)) for _ in range(2)}
    assert state(model) == before
    assert len(digests) == 1
    if imported is ir:
        tensors = [value.const_value for value in model.graph.initializers.values()]
        assert any(type(tensor).__name__ == "ExternalTensor" for tensor in tensors)


@library
def test_external_data_are_loaded(imported: Callable[[Path], Source], tmp_path: Path) -> None:
    dense = residual_net()
    loaded = load(imported(save(dense, tmp_path / "m.onnx", external_data=True)))
    np.testing.assert_array_equal(first_output(loaded, X), first_output(dense, X))
    for path in tmp_path.glob("*.data"):
        path.unlink()
    np.testing.assert_array_equal(first_output(loaded, X), first_output(dense, X))


def test_external_data_that_are_gone_are_an_error(tmp_path: Path) -> None:
    model = ir(save(residual_net(), tmp_path / "m.onnx", external_data=True))
    for path in tmp_path.glob("*.data"):
        path.unlink()
    with pytest.raises(ModelError, match=r"onnx_ir cannot export the graph \(FileNotFoundError: .*\); fix the graph"):
        load(model)


def no_opset(graph: Source) -> None:
    graph.opset = graph.import_domains = None


def no_operator(graph: Source) -> None:
    graph.nodes[0].op = None


def no_output(graph: Source) -> None:
    graph.nodes[1].outputs.clear()


def no_nodes(graph: Source) -> None:
    graph.nodes.clear()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_opset, r"onnx_graphsurgeon cannot export the graph \(ValueError: it has no opset\)"),
        (no_operator, r"onnx_graphsurgeon cannot export the graph \(TypeError: .*\); fix the graph"),
        (no_output, r"the model is not a valid ONNX model: .* output size 0"),
        (no_nodes, r"the model is not an ONNX model, or an empty one: it has no nodes"),
    ],
)
def test_a_broken_graph_of_graphsurgeon_is_an_error(
    spoil: Callable[[Source], None], message: str, paths: tuple[Path, Path]
) -> None:
    graph = graphsurgeon(paths[0])
    spoil(graph)
    with pytest.raises(ModelError, match=message) as caught:
        load(graph)
    assert "\n" not in str(caught.value)


def test_a_broken_model_of_onnx_ir_is_an_error(paths: tuple[Path, Path]) -> None:
    model = ir(paths[0])
    model.graph.inputs[0].name = None
    with pytest.raises(ModelError, match=r"onnx_ir cannot export the graph \(\w+: .*\); fix the graph"):
        load(model)
    model = ir(paths[0])
    model.graph.opset_imports.clear()
    with pytest.raises(ModelError, match="has no opset_import, so"):
        load(model)


@pytest.mark.parametrize(
    "given", [None, 3, b"model", onnx.GraphProto(), np.zeros(3)], ids=lambda value: str(type(value))
)
def test_other_objects_are_refused(given: Source) -> None:
    with pytest.raises(
        ModelError, match=r"the model is of type .*\.(NoneType|int|bytes|GraphProto|ndarray); give a path"
    ):
        load(given)


def test_the_libraries_are_not_imported() -> None:
    script = (
        "import sys, onnx_asr\n"
        f"onnx_asr.prune({str(MODELS / 'digits_resnet.onnx')!r}, options=onnx_asr.PruneOptions(0.5))\n"
        "assert not {'onnx_graphsurgeon', 'onnx_ir'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def annotated() -> onnx.ModelProto:
    """A model with an entry in every place that docs/howto.md says an export drops."""
    model = net("g (float[N,4] x) => (float[N,4] y) { p = MatMul (x, w)  y = Relu (p) }", w=(4, 4))
    graph = model.graph
    model.domain, model.model_version = "domain", 3
    holders = (model, graph, graph.node[0], graph.input[0], graph.output[0], graph.value_info.add(name="p"))
    for holder in holders:
        holder.doc_string = "doc"
        holder.metadata_props.add(key="key", value="value")
    graph.node[0].name = "product"
    graph.value_info[0].type.CopyFrom(graph.output[0].type)
    graph.value_info.add(name="nobody").type.CopyFrom(graph.output[0].type)
    graph.input[0].type.denotation = "TENSOR"
    graph.input.add(name="w").type.CopyFrom(onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [4, 4]))
    graph.initializer.add(name="unused", data_type=onnx.TensorProto.FLOAT, dims=[1], raw_data=bytes(4))
    annotation = graph.quantization_annotation.add(tensor_name="p")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    return model


KEPT: dict[str, Callable[[onnx.ModelProto], object]] = {
    "weights": lambda model: [tensor.raw_data for tensor in model.graph.initializer if tensor.name == "w"],
    "operators": lambda model: [(node.name, node.op_type, *node.input) for node in model.graph.node],
    "opset": lambda model: [(entry.domain, entry.version) for entry in model.opset_import],
    "shapes of inner tensors": lambda model: [value.type for value in model.graph.value_info if value.name == "p"],
}
DROPPED: dict[str, Callable[[onnx.ModelProto], object]] = {
    "metadata": lambda model: len(model.metadata_props),
    "doc string": lambda model: model.doc_string,
    "domain": lambda model: model.domain,
    "version": lambda model: model.model_version,
    "metadata of the graph": lambda model: len(model.graph.metadata_props),
    "metadata of nodes": lambda model: len(model.graph.node[0].metadata_props),
    "doc strings of nodes": lambda model: model.graph.node[0].doc_string,
    "metadata of inputs": lambda model: len(model.graph.input[0].metadata_props),
    "doc strings of inputs": lambda model: model.graph.input[0].doc_string,
    "denotations": lambda model: model.graph.input[0].type.denotation,
    "doc strings of outputs": lambda model: model.graph.output[0].doc_string,
    "doc strings of inner tensors": lambda model: [
        item.doc_string for item in model.graph.value_info if item.name == "p"
    ],
    "shapes of nothing": lambda model: [value.name for value in model.graph.value_info if value.name == "nobody"],
    "quantization annotations": lambda model: len(model.graph.quantization_annotation),
    "unused initializers": lambda model: [item.name for item in model.graph.initializer if item.name != "w"],
    "initializers as inputs": lambda model: [value.name for value in model.graph.input],
}


@pytest.mark.parametrize(
    ("imported", "dropped"),
    [(graphsurgeon, DROPPED.keys()), (ir, {"shapes of nothing"})],
    ids=LIBRARIES,
)
def test_what_an_export_drops_is_what_the_documentation_says(
    imported: Callable[[Path], Source], dropped: Iterable[str], tmp_path: Path
) -> None:
    model = annotated()
    onnx.save(model, tmp_path / "m.onnx")
    exported = load(imported(tmp_path / "m.onnx"))
    assert {name for name, of in (KEPT | DROPPED).items() if of(exported) != of(model)} == set(dropped)


def test_onnx_ir_drops_sparse_initializers(tmp_path: Path) -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }", w=(4, 4))
    values = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    indices = onnx.helper.make_tensor("indices", onnx.TensorProto.INT64, [2], [0, 5])
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4, 4]))
    del model.graph.initializer[:]
    onnx.save(model, tmp_path / "m.onnx")
    assert load(graphsurgeon(tmp_path / "m.onnx")).graph.sparse_initializer
    assert not load(ir(tmp_path / "m.onnx")).graph.sparse_initializer
