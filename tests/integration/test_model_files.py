"""Kinds of files: opsets, IR versions, external data, over 2 GB, functions, subgraphs; what a repair leaves alone."""

from __future__ import annotations

import io
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import onnx_asr
from onnx_asr.cli.app import run as command
from onnx_asr.engine.loading import load
from onnx_asr.errors import ModelError, StructureError
from onnx_asr.graph import tensors
from onnx_asr.graph.model_io import digest, save
from tests.graphs import (
    bn,
    constant,
    copy,
    dense_net,
    digits,
    images,
    magnitude_masks,
    masked,
    net,
    positions,
    pruned,
    residual_net,
    run,
)
from tools.paths import MODELS

OPTIONS = onnx_asr.RepairOptions(method="paired", samples=64, verify_samples=32)
REFIT = onnx_asr.RepairOptions(method="refit", samples=64, verify_samples=32)
DATA = images(96, seed=5)


def repaired(sparse: Any, dense: Any, options: onnx_asr.RepairOptions = OPTIONS) -> onnx_asr.RepairResult:
    result = onnx_asr.repair(sparse, DATA, options, dense=dense)
    assert result.improved
    return result


def session_scores(path: Path, x: np.ndarray) -> np.ndarray:
    """The first output of a plain session on a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def in_version(model: onnx.ModelProto, opset: int, ir: int) -> onnx.ModelProto:
    result = copy(model)
    result.opset_import[0].version, result.ir_version = opset, ir
    if ir < 4:
        result.graph.input.extend(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in result.graph.initializer
        )
    return result


NEWEST = (onnx.defs.onnx_opset_version(), onnx.IR_VERSION)


@pytest.mark.parametrize(("opset", "ir"), [(9, 3), (9, 4), (11, 6), (13, 7), (15, 8), (18, 8), (21, 10), NEWEST])
def test_every_opset_and_ir_version(opset: int, ir: int, tmp_path: Path) -> None:
    dense = residual_net()
    sparse = pruned(dense, 0.6)
    expected = repaired(sparse, dense).model
    old = in_version(sparse, opset, ir)
    path = save(repaired(old, in_version(dense, opset, ir)).model, tmp_path / "r.onnx")
    onnx.checker.check_model(path, full_check=True)
    result = onnx.load(path)
    assert (result.opset_import[0].version, result.ir_version) == (opset, ir)
    assert [value.name for value in result.graph.input] == [value.name for value in old.graph.input]
    for tensor in expected.graph.initializer:
        np.testing.assert_array_equal(constant(result, tensor.name), numpy_helper.to_array(tensor))
    np.testing.assert_allclose(session_scores(path, DATA), run(expected, {"x": DATA})["logits"], atol=1e-5)


def crowded() -> onnx.ModelProto:
    """A net with everything that an edit might lose: unnamed nodes, doc strings, value_info, unused weights."""
    model = residual_net()
    model.producer_name, model.producer_version, model.model_version = "someone", "7", 12
    model.domain, model.doc_string, model.graph.doc_string = "example", "model", "graph"
    model.metadata_props.add(key="owner", value="someone")
    model.opset_import.add(domain="com.microsoft", version=1)
    for number, node in enumerate(model.graph.node):
        node.name = f"node {number}" if number % 3 else ""
        node.doc_string = f"from line {number}"
    for name in ("unused", "unused too"):
        model.graph.initializer.insert(0, numpy_helper.from_array(np.arange(5, dtype=np.float32), name))
    for node in model.graph.node[::2]:
        model.graph.value_info.append(onnx.ValueInfoProto(name=node.output[0], doc_string="seen"))
    model.graph.input[0].doc_string = "pixels"
    return model


@pytest.mark.parametrize("method", ["paired", "refit", "bn"])
def test_everything_that_is_not_repaired_is_unchanged(method: Any, tmp_path: Path) -> None:
    dense = crowded()
    sparse = copy(dense)
    for position, mask in magnitude_masks(dense, 0.6).items():
        name = dense.graph.node[position].input[1]
        (tensor,) = (item for item in sparse.graph.initializer if item.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * mask, name))
    result = repaired(sparse, dense, onnx_asr.RepairOptions(method=method, samples=64, verify_samples=32))
    path = save(result.model, tmp_path / "r.onnx")
    onnx.checker.check_model(path, full_check=True)
    written = onnx.load(path)
    labels = [node.name or f"{node.op_type}:{node.output[0]}" for node in sparse.graph.node]
    touched = {labels.index(point.name) for point in result.points}
    assert touched

    added = {entry.key for entry in written.metadata_props} - {"owner"}
    assert added
    assert all(key.startswith("onnx_asr.") for key in added)
    readers = [sparse.graph.node[p] for p in touched] + [
        item for p in touched for item in sparse.graph.node if sparse.graph.node[p].output[0] in item.input
    ]
    may_change = {name for node in readers for name in node.input}
    kept = {item.name: item for item in written.graph.initializer}
    for item in sparse.graph.initializer:
        if item.name not in may_change:
            assert kept[item.name].SerializeToString() == item.SerializeToString()
    assert list(kept) == [item.name for item in sparse.graph.initializer]
    for position, (node, before) in enumerate(zip(written.graph.node, sparse.graph.node, strict=True)):
        if position in touched:
            assert node.doc_string.startswith(f"{before.doc_string}\n")
            node.doc_string = before.doc_string
        assert node.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)
    for model in (written, sparse):
        del model.graph.initializer[:], model.graph.node[:]
    del written.metadata_props[1:]
    assert written.SerializeToString(deterministic=True) == sparse.SerializeToString(deterministic=True)


# External data


@pytest.mark.parametrize("one_file", [True, False])
def test_external_data_in_external_data_out(one_file: bool, tmp_path: Path) -> None:
    """From the folder of the data, from another one, over an existing file; the new data lie beside the new model."""
    dense, source, there = digits("resnet"), tmp_path / "in", tmp_path / "out"
    for folder in (source, there):
        folder.mkdir()
    for name, model in (("dense", copy(dense)), ("pruned", pruned(dense, 0.8))):
        location = {"location": f"{name}.weights"} if one_file else {}
        onnx.save(
            model,
            source / f"{name}.onnx",
            save_as_external_data=True,
            all_tensors_to_one_file=one_file,
            size_threshold=0,
            **location,
        )
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    data = ("--data", str(MODELS / "data/digits_calibration.npz"), "--preset", "digits", "--samples", "64")
    arguments = ["repair", str(source / "pruned.onnx"), "--dense", str(source / "dense.onnx"), *data, "-q"]
    for _ in range(2):
        assert command([*arguments, "--method", "paired", "-o", str(there / "r.onnx")]) == 0
        assert {path.name: path.read_bytes() for path in source.iterdir()} == before
        model, weights = sorted(there.iterdir())
        assert (model.name, weights.suffix) == ("r.onnx", ".data")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(there, elsewhere)
    moved = elsewhere / "r.onnx"
    onnx.checker.check_model(moved, full_check=True)
    assert moved.stat().st_size < 64_000 < (elsewhere / weights.name).stat().st_size
    plain = onnx.load(moved)
    x = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(
        session_scores(moved, x), run(plain, {plain.graph.input[0].name: x})["logits"], atol=1e-4
    )


def test_the_pieces_of_a_data_file_can_be_mapped(tmp_path: Path) -> None:
    """Also weights that were not stored as raw bytes."""
    model = residual_net()
    typed = helper.make_tensor("fc_w", onnx.TensorProto.FLOAT, (10, 12), constant(model, "fc_w").ravel().tolist())
    (place,) = (i for i, tensor in enumerate(model.graph.initializer) if tensor.name == "fc_w")
    model.graph.initializer[place].CopyFrom(typed)
    path = save(model, tmp_path / "m.onnx", external_data=True)
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        offsets = [int(entry.value) for entry in tensor.external_data if entry.key == "offset"]
        assert all(offset % 4096 == 0 for offset in offsets)
    loaded = onnx.load(path)
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(constant(loaded, tensor.name), numpy_helper.to_array(tensor))


def test_a_model_whose_data_was_not_loaded_is_refused(tmp_path: Path) -> None:
    path = save(residual_net(), tmp_path / "m.onnx", external_data=True)
    with pytest.raises(ModelError, match="give the model's path"):
        load(onnx.load(path, load_external_data=False))


# Over protobuf's 2 GB


def with_table(model: onnx.ModelProto, rows: int) -> onnx.ModelProto:
    """Add to the scores a row of a large table, chosen by the best class; the table is not filled in."""
    result = copy(model)
    graph = result.graph
    scores = graph.output[0].name
    graph.node[-1].output[0] = "plain"
    table = graph.initializer.add()
    table.name, table.data_type = "table", onnx.TensorProto.FLOAT
    table.dims.extend([rows, 1024])
    for name, value in (("zero", 0), ("classes", 10), ("one", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    graph.node.extend(
        [
            helper.make_node("ArgMax", ["plain"], ["best"], axis=1, keepdims=0),
            helper.make_node("Gather", ["table", "best"], ["wide"]),
            helper.make_node("Slice", ["wide", "zero", "classes", "one"], ["row"]),
            helper.make_node("Add", ["plain", "row"], [scores]),
        ]
    )
    return result


def table_of(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == "table")


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set protobuf's limit below the size of the models of the next two tests."""
    monkeypatch.setattr(tensors, "WEIGHT_LIMIT", 1 << 20)


def filled() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    dense = residual_net()
    pair = with_table(pruned(dense, 0.6), 300), with_table(dense, 300)
    for model in pair:
        table_of(model).raw_data = np.random.default_rng(0).normal(size=(300, 1024)).astype("f4").tobytes()
    return pair


def test_weights_left_in_their_file_count_as_if_they_were_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = filled()
    expected = repaired(*pair, REFIT).model
    paths = [save(model, tmp_path / name, external_data=True) for model, name in zip(pair, "pd", strict=True)]
    monkeypatch.setattr(tensors, "WEIGHT_LIMIT", 1 << 20)
    result = repaired(*paths, REFIT).model
    assert not table_of(result).raw_data
    written = save(result, tmp_path / "r")
    assert save(result, written) == written  # over itself
    assert digest(load(written)) == digest(load(save(load(written), tmp_path / "copy")))
    found = onnx.load(written)
    for tensor in expected.graph.initializer:
        np.testing.assert_array_equal(constant(found, tensor.name), numpy_helper.to_array(tensor))
    np.testing.assert_allclose(session_scores(written, DATA), run(expected, {"x": DATA})["logits"], atol=1e-5)
    sizes = {path: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(sizes) == 8
    assert onnx_asr.evaluate(written, DATA, dense=paths[1]).snr_db is not None


@pytest.mark.usefixtures("small_limit")
def test_models_held_in_memory_may_be_over_the_limit_too(tmp_path: Path) -> None:
    sparse, dense = filled()
    result = repaired(sparse, dense).model
    path = save(result, tmp_path / "r.onnx")
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_allclose(session_scores(path, DATA), run(result, {"x": DATA})["logits"], atol=1e-5)


@pytest.mark.usefixtures("small_limit")
def test_weights_left_in_a_file_have_to_be_there(tmp_path: Path) -> None:
    path = save(filled()[0], tmp_path / "m.onnx")
    (data,) = tmp_path.glob("*.data")
    os.truncate(data, 5000)
    with pytest.raises(ModelError, match="incomplete"):
        load(path)
    outside = tmp_path / "inner" / "m.onnx"
    outside.parent.mkdir()
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = f"../{data.name}" if entry.key == "location" else entry.value
    onnx.save(model, outside)
    with pytest.raises(ModelError, match="keep the model and its external data together"):
        load(outside)


GIB = 1 << 30
ROWS = 2_150_000_000 // 4096


def available_memory() -> int:
    """Bytes available without swapping; 0 if unknown."""
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


@pytest.mark.skipif(available_memory() < 6 * GIB, reason="takes 6 GB of memory")
def test_a_model_over_2_gb(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 8 * GIB:
        pytest.skip("takes 8 GB of disk")
    dense = digits("resnet")
    for name, model in (("dense", dense), ("pruned", pruned(dense, 0.8))):
        model = with_table(model, ROWS)
        table_of(model).data_location = onnx.TensorProto.EXTERNAL
        table_of(model).external_data.add(key="location", value=f"{name}.weights")
        onnx.save(model, tmp_path / f"{name}.onnx")
        with (tmp_path / f"{name}.weights").open("wb") as file:
            file.truncate(ROWS * 4096)
            file.seek(0)
            file.write(np.full((10, 1024), 0.25, np.float32).tobytes())
    size = (tmp_path / "pruned.weights").stat().st_size
    assert size > 2**31
    data = ["--data", str(MODELS / "data/digits_calibration.npz"), "--preset", "digits", "--samples", "64"]
    options = ["--dense", str(tmp_path / "dense.onnx"), "--method", "paired", "--threads", "1", "-q"]
    output = tmp_path / "r.onnx"
    subprocess.run(
        [sys.executable, "-m", "onnx_asr", "repair", str(tmp_path / "pruned.onnx"), "-o", str(output), *data, *options],
        cwd=MODELS.parent,
        check=True,
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < 2.5 * size
    x = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)
    scores = session_scores(output, x)
    assert scores.shape == (4, 10)
    plain = onnx.load(output, load_external_data=False)
    assert {item.name for item in plain.graph.initializer if not item.external_data}.isdisjoint({"table"})
    for path in tmp_path.iterdir():
        path.unlink()


# Parts of a graph that are not nodes of the main graph


FUNCTIONS = """
<ir_version: 9, opset_import: ["": 17, "blocks": 1]>
g (float[N,3,8,8] x) => (float[N,10] logits) {
  a = blocks.Layer (x, v, v_gamma, v_beta, v_mean, v_var)
  b = blocks.Layer (a, w, w_gamma, w_beta, w_mean, w_var)
  p = GlobalAveragePool (b)
  f = Flatten (p)
  logits = Gemm <transB=1> (f, fc_w, fc_b)
}
<opset_import: ["": 17], domain: "blocks">
Layer (x, w, gamma, beta, mean, var) => (y) {
  c = Conv <pads=[1,1,1,1]> (x, w)
  n = BatchNormalization (c, gamma, beta, mean, var)
  y = Relu (n)
}
"""


def with_functions() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A net of two calls of one function, and the same without functions."""
    plain = net(
        """
        g (float[N,3,8,8] x) => (float[N,10] logits) {
          c = Conv <pads=[1,1,1,1]> (x, v)
          cn = BatchNormalization (c, v_gamma, v_beta, v_mean, v_var)
          a = Relu (cn)
          d = Conv <pads=[1,1,1,1]> (a, w)
          dn = BatchNormalization (d, w_gamma, w_beta, w_mean, w_var)
          b = Relu (dn)
          p = GlobalAveragePool (b)
          f = Flatten (p)
          logits = Gemm <transB=1> (f, fc_w, fc_b)
        }
        """,
        v=(8, 3, 3, 3),
        w=(16, 8, 3, 3),
        fc_w=(10, 16),
        fc_b=(10,),
        **bn("v", channels=8),
        **bn("w", channels=16),
    )
    calls = onnx.parser.parse_model(FUNCTIONS)
    calls.graph.initializer.extend(plain.graph.initializer)
    return calls, plain


def test_model_local_functions_are_written_out(tmp_path: Path) -> None:
    calls, plain = with_functions()
    masks = {p: mask for p, mask in magnitude_masks(plain, 0.5).items() if p != len(plain.graph.node) - 1}
    weights = {plain.graph.node[p].input[1]: mask for p, mask in masks.items()}
    sparse = copy(calls)
    for tensor in sparse.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * weights[tensor.name], tensor.name))
    result = repaired(sparse, calls)
    assert any("blocks::Layer" in note for note in result.notes)
    assert len(sparse.functions) == 1  # the input is not changed
    path = save(result.model, tmp_path / "r.onnx")
    onnx.checker.check_model(path, full_check=True)
    written = onnx.load(path)
    assert not written.functions
    assert [item.domain for item in written.opset_import] == [""]
    assert {entry.key: entry.value for entry in written.metadata_props}["onnx_asr.inlined_functions"] == "blocks::Layer"
    expected = repaired(masked(plain, masks), plain).model
    np.testing.assert_allclose(session_scores(path, DATA), run(expected, {"x": DATA})["logits"], atol=1e-5)
    again = repaired(sparse, plain)  # one with functions, the other without
    np.testing.assert_allclose(run(again.model, {"x": DATA})["logits"], run(expected, {"x": DATA})["logits"], atol=1e-5)
    assert onnx_asr.prune(calls, options=onnx_asr.PruneOptions(0.5)).sparsity == pytest.approx(0.5, abs=1e-3)


def test_subgraphs_are_left_alone_and_named(tmp_path: Path) -> None:
    text = """
    g (float[N,3,8,8] x) => (float[N,4] y) {
      a = Conv <pads=[1,1,1,1]> (x, v, vb)
      r = Relu (a)
      total = ReduceSum <keepdims=0> (x)
      flag = Greater (total, zero)
      b = If (flag) <
        then_branch = t () => (float[N,4,8,8] p) { p = Conv <pads=[1,1,1,1]> (r, w) },
        else_branch = e () => (float[N,4,8,8] q) { q = Conv <pads=[1,1,1,1]> (r, u) } >
      g = GlobalAveragePool (b)
      y = Flatten (g)
    }
    """
    shapes = {"v": (6, 3, 3, 3), "vb": (6,), "w": (4, 6, 3, 3), "u": (4, 6, 3, 3), "zero": np.float32(0)}
    dense = net(text, **shapes)
    sparse = masked(dense, {0: magnitude_masks(dense, 0.6)[0]})
    result = repaired(sparse, dense)
    (skip,) = result.skips
    assert (skip.op_type, [point.name for point in result.points]) == ("If", ["Conv:a"])
    path = save(result.model, tmp_path / "r.onnx")
    onnx.checker.check_model(path, full_check=True)
    assert onnx.load(path).graph.node[4].SerializeToString() == sparse.graph.node[4].SerializeToString()
    for name in ("w", "u"):
        np.testing.assert_array_equal(constant(onnx.load(path), name), constant(dense, name))
    session_scores(path, DATA)


def made_sparse(model: onnx.ModelProto, flat: bool) -> onnx.ModelProto:
    """Every weight of a Conv and Gemm as a sparse initializer."""
    result = copy(model)
    for position in positions(model, "Conv", "Gemm"):
        name = result.graph.node[position].input[1]
        value = constant(result, name)
        (tensor,) = (item for item in result.graph.initializer if item.name == name)
        result.graph.initializer.remove(tensor)
        places = np.flatnonzero(value) if flat else np.argwhere(value)
        result.graph.sparse_initializer.append(
            helper.make_sparse_tensor(
                numpy_helper.from_array(value[value != 0], name),
                numpy_helper.from_array(places.astype(np.int64)),
                value.shape,
            )
        )
    return result


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("options", [OPTIONS, REFIT], ids=["paired", "refit"])
def test_sparse_initializers_stay_sparse(flat: bool, options: onnx_asr.RepairOptions, tmp_path: Path) -> None:
    dense = residual_net()
    plain = pruned(dense, 0.6)
    sparse = made_sparse(plain, flat)
    path = save(repaired(sparse, dense, options).model, tmp_path / "r.onnx")
    onnx.checker.check_model(path)  # the full check knows no sparse initializers, not even in the input
    written = onnx.load(path)
    before, after = sparse.graph.sparse_initializer, written.graph.sparse_initializer
    assert [item.values.name for item in after] == [item.values.name for item in before]
    assert [item.indices.SerializeToString() for item in after] == [item.indices.SerializeToString() for item in before]
    expected = repaired(plain, dense, options).model
    np.testing.assert_allclose(session_scores(path, DATA), run(expected, {"x": DATA})["logits"], atol=1e-5)


def test_a_sparse_initializer_that_two_nodes_share() -> None:
    """Each node gets its own dense copy, and the shared original is removed."""
    text = "g (float[N,3] x) => (float[N,3] y) { a = MatMul (x, w)  b = Relu (a)  y = MatMul (b, w) }"
    dense = net(text, w=(3, 3))
    weight = constant(dense, "w")
    sparse = net(text)
    kept = np.flatnonzero(np.abs(weight).ravel() > 0.2)
    values = numpy_helper.from_array(weight.ravel()[kept], "w")
    sparse.graph.sparse_initializer.append(helper.make_sparse_tensor(values, numpy_helper.from_array(kept), (3, 3)))
    data = np.random.default_rng(0).normal(size=(96, 3)).astype(np.float32)
    result = onnx_asr.repair(sparse, data, REFIT, dense=dense)
    onnx.checker.check_model(result.model)
    assert not result.model.graph.sparse_initializer
    run(result.model, {"x": data})


def test_nodes_out_of_order_are_put_in_order() -> None:
    """Nodes move no further than necessary; onnxruntime runs such files, onnx refuses them."""
    dense = residual_net()
    sparse = pruned(dense, 0.6)
    expected = repaired(sparse, dense).model
    moved = [(0, 4), (12, 2), (16, 0), (7, 15)]
    for original in (dense, sparse):
        nodes = list(original.graph.node)
        for source, target in moved:
            nodes.insert(target, nodes.pop(source))
        del original.graph.node[:]
        original.graph.node.extend(nodes)
    before = sparse.SerializeToString()
    result = repaired(sparse, dense).model
    assert sparse.SerializeToString() == before
    onnx.checker.check_model(result, full_check=True)
    np.testing.assert_allclose(run(result, {"x": DATA})["logits"], run(expected, {"x": DATA})["logits"], atol=1e-5)
    late = net("g (float[N,2] x) => (float[N,2] y) { a = Relu (x) b = Neg (x) c = Exp (x) y = Sum (a, b, c) }")
    nodes = list(late.graph.node)
    del late.graph.node[:]
    late.graph.node.extend([nodes[0], nodes[3], nodes[1], nodes[2]])
    assert [node.output[0] for node in load(late).graph.node] == ["a", "b", "c", "y"]


def test_a_cycle_is_refused() -> None:
    model = net("g (float[N,2] x) => (float[N,2] y) { a = Add (x, x) y = Relu (a) }")
    model.graph.node[0].input[1] = "y"
    with pytest.raises(ModelError, match="reads tensor 'y'"):
        onnx_asr.prune(model, options=onnx_asr.PruneOptions(0.5))


def test_batchnorm_in_training_mode_is_named_and_left() -> None:
    text = """
    g (float[N,3,8,8] x) => (float[N,6,8,8] y) {
      a = Conv <pads=[1,1,1,1]> (x, v, vb)
      n, running_mean, running_var = BatchNormalization <training_mode=1> (a, n_gamma, n_beta, n_mean, n_var)
      r = Relu (n)
      y = Conv (r, w, wb)
    }
    """
    dense = net(text, v=(6, 3, 3, 3), vb=(6,), w=(6, 6, 1, 1), wb=(6,), **bn("n", channels=6))
    sparse = pruned(dense, 0.5)
    result = repaired(sparse, dense)
    assert [(skip.op_type, "training mode" in skip.reason) for skip in result.skips] == [("BatchNormalization", True)]
    assert result.model.graph.node[1] == sparse.graph.node[1]


# A dense and a pruned model of different origin


def exporters() -> dict[str, Callable[[Any, Any], onnx.ModelProto]]:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")

    def script(model: Any, x: Any) -> onnx.ModelProto:
        file = io.BytesIO()
        torch.onnx.export(
            model, x, file, dynamo=False, opset_version=13, dynamic_axes={"x": {0: "N"}}, input_names=["x"]
        )
        return onnx.load_from_string(file.getvalue())

    def dynamo(model: Any, x: Any) -> onnx.ModelProto:
        dynamic = ({0: torch.export.Dim("N")},)
        program = torch.onnx.export(
            model, (x,), dynamo=True, opset_version=18, dynamic_shapes=dynamic, input_names=["x"], verbose=False
        )
        return program.model_proto

    return {"script": script, "dynamo": dynamo}


@pytest.mark.filterwarnings("ignore")
def test_dense_from_one_exporter_pruned_from_another() -> None:
    """The result is the same as with one exporter."""
    made = exporters()
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
            self.drop, self.head = nn.Dropout(), nn.Linear(8, 10)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            x = nn.functional.relu(x + self.body(x))
            x = nn.functional.adaptive_avg_pool2d(x, 1)
            return self.head(self.drop(x.view(x.size(0), -1)))

    torch.manual_seed(0)
    module, x = Net().eval(), torch.randn(2, 3, 8, 8)
    models = {name: export(module, x) for name, export in made.items()}
    operators = [{node.op_type for node in model.graph.node} for model in models.values()]
    assert operators[0] != operators[1]
    for own, other in (("script", "dynamo"), ("dynamo", "script")):
        sparse = pruned(models[own], 0.7)
        name = sparse.graph.output[0].name
        expected, found = (
            run(repaired(sparse, models[origin], REFIT).model, {"x": DATA})[name] for origin in (own, other)
        )
        np.testing.assert_allclose(found, expected, atol=2e-3)
    flattened = copy(models["script"])
    next(node for node in flattened.graph.node if node.op_type == "Relu").op_type = "Tanh"
    with pytest.raises(StructureError, match=r"\(Relu\).*Tanh"):
        repaired(sparse, flattened)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_gemm_for_matmul_and_add_gives_the_same_repair(swapped: bool) -> None:
    """Also with a transposed weight."""
    plain = dense_net()
    gemm = copy(plain)
    turned = numpy_helper.from_array(np.ascontiguousarray(constant(plain, "fc_w").T), "fc_t")
    gemm.graph.initializer.append(turned)
    x, _ = gemm.graph.node[-2].input
    layer = helper.make_node("Gemm", [x, "fc_t", "fc_b"], [gemm.graph.node[-1].output[0]], transB=1)
    del gemm.graph.node[-2:]
    gemm.graph.node.append(layer)
    dense, other = (gemm, plain) if swapped else (plain, gemm)
    sparse = pruned(dense, 0.5)
    if not swapped:  # the helper prunes Conv, ConvTranspose and Gemm only
        position = len(plain.graph.node) - 2
        weight = constant(plain, "fc_w")
        sparse = masked(sparse, {position: np.abs(weight) > np.median(np.abs(weight))})
    expected, found = (run(repaired(sparse, origin, REFIT).model, {"x": DATA})["logits"] for origin in (dense, other))
    np.testing.assert_allclose(found, expected, atol=1e-4)
