"""Files are replaced completely or not at all."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_asr.engine.loading import load
from onnx_asr.errors import ModelError, OutputError
from onnx_asr.graph import files, model_io
from onnx_asr.graph.model_io import check_finite, digest, is_external, save
from tests.graphs import images, index, net, parameter, residual_net, run, set_parameter


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    model = residual_net()
    target = tmp_path / "m.onnx"
    assert save(model, target) == target
    assert load(target).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    assert load(str(target)).graph.name == "residual"
    assert names(tmp_path) == ["m.onnx"]
    assert load(model) is model
    assert not is_external(target)


def test_permissions_are_those_of_a_new_file_or_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    plain = tmp_path / "plain"
    plain.write_text("x")
    save(residual_net(), target)
    assert target.stat().st_mode == plain.stat().st_mode
    target.chmod(0o640)
    save(residual_net(1), target)
    assert target.stat().st_mode & 0o777 == 0o640


def test_external_data_lies_beside_the_model_and_runs(tmp_path: Path) -> None:
    model = residual_net()
    before = model.SerializeToString(deterministic=True)
    target = tmp_path / "m.onnx"
    save(model, target, external_data=True)
    assert model.SerializeToString(deterministic=True) == before
    assert len(names(tmp_path)) == 2
    assert is_external(target)
    assert target.stat().st_size < len(before)
    x = images(2, seed=0)
    loaded = load(target)
    np.testing.assert_array_equal(run(loaded, {"x": x})["logits"], run(model, {"x": x})["logits"])
    # again, over itself: the same two files, as large as before
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    save(model, target, external_data=True)
    assert [path.stat().st_size for path in sorted(tmp_path.iterdir())] == sizes
    np.testing.assert_array_equal(run(load(target), {"x": x})["logits"], run(model, {"x": x})["logits"])


def test_another_model_over_an_external_one_leaves_the_old_data_readable_until_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m.onnx"
    save(residual_net(), target, external_data=True)
    expected = load(target).SerializeToString(deterministic=True)
    before = names(tmp_path)

    def refuse(self: Path, other: Path) -> Path:
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match=r"cannot write '.*': no; make room or choose another output path"):
        save(residual_net(1), target, external_data=True)
    monkeypatch.undo()
    assert names(tmp_path) == before
    assert load(target).SerializeToString(deterministic=True) == expected


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
@pytest.mark.parametrize("external", [False, True])
def test_an_existing_file_survives_every_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, external: bool
) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"precious")

    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(model_io, "write_through", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        save(residual_net(), target, external_data=external)
    assert target.read_bytes() == b"precious"
    assert names(tmp_path) == ["m.onnx"]


def interrupted(function: Callable[[], object], count: int) -> bool:
    """Interrupt at the n-th line that ``model_io`` and ``files`` execute; return whether there was such a line."""
    left = count

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (model_io.__file__, files.__file__):
            return None
        left -= event == "line"
        if event == "line" and left == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("external", [False, True])
def test_an_interrupt_at_any_line_leaves_the_old_model_or_the_new_one(tmp_path: Path, external: bool) -> None:
    old, new = residual_net(), residual_net()
    new.doc_string = "new"
    set_parameter(new, 0, 1, parameter(new, 0, 1) * 2)
    target = save(old, tmp_path / "m.onnx", external_data=external)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    there = {"": names(tmp_path)}
    save(new, target, external_data=external)
    there["new"] = names(tmp_path)
    found = set()
    for count in itertools.count(1):
        for path in set(tmp_path.iterdir()) - set(files):
            path.unlink()
        for path, content in files.items():
            path.write_bytes(content)
        stopped = interrupted(lambda: save(new, target, external_data=external), count)
        version = load(target).doc_string
        assert names(tmp_path) == there[version]
        found.add((stopped, version))
        if not stopped:
            break
    assert found == {(True, ""), (True, "new"), (False, "new")}


@pytest.mark.parametrize(
    "content", [b"", b"not a model at all", b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x03\x04" + bytes(30)]
)
def test_what_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX model"):
        load(path)


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(residual_net().SerializeToString()[:-100])
    with pytest.raises(ModelError, match="not an ONNX model"):
        load(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.onnx' does not exist"):
        load(tmp_path / "nothing.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        load(tmp_path)
    save(residual_net(), tmp_path / "m.onnx", external_data=True)
    next(path for path in tmp_path.iterdir() if path.suffix == ".data").unlink()
    with pytest.raises(ModelError, match=r"cannot read the model|not an ONNX model"):
        load(tmp_path / "m.onnx")


def test_empty_models_are_refused() -> None:
    with pytest.raises(ModelError, match="no nodes"):
        load(onnx.ModelProto())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }", w=(4, 4))
    check_finite(index(model), "pruned")
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[1, 2] = value
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    with pytest.raises(ModelError, match="'w' of the pruned model"):
        check_finite(index(model), "pruned")


def test_weights_in_constant_nodes_and_behind_identities_are_looked_at_too() -> None:
    texts = {"nan": "w = Constant <value = float[2,2] {1.0, 1.0, 1.0, 1.0}> ()", "inf": "w = Identity (v)"}
    for spoilt, text in texts.items():
        value = np.array([[1, np.inf], [1, 1]], np.float32)
        weights = {"v": value} if spoilt == "inf" else {}
        model = net(f"g (float[N,2] x) => (float[N,2] y) {{ {text} y = MatMul (x, w) }}", **weights)
        if spoilt == "nan":
            check_finite(index(model), "pruned")
            value[0, 1] = np.nan
            model.graph.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(value))
        with pytest.raises(ModelError, match="'w' of the pruned model"):
            check_finite(index(model), "pruned")


def test_constants_other_than_weights_may_be_infinite_but_not_nan() -> None:
    """Padding with -inf before a max pool."""
    text = "g (float[N,4] x) => (float[N,K] y) { y = Pad (x, pads, fill) }"
    pads = np.array([0, 1, 0, 1], np.int64)
    check_finite(index(net(text, pads=pads, fill=np.float32(-np.inf))), "dense")
    with pytest.raises(ModelError, match="'fill' of the dense model"):
        check_finite(index(net(text, pads=pads, fill=np.float32(np.nan))), "dense")


def test_integers_may_be_anything() -> None:
    text = "g (float[N,4] x) => (float[M,K] y) { r = Reshape (x, s) y = Add (r, f) }"
    extremes = np.array([np.iinfo(np.int64).min, np.iinfo(np.int64).max])
    check_finite(index(net(text, s=extremes, f=np.float32(1))), "pruned")
    with pytest.raises(ModelError, match="'f' of the pruned model"):
        check_finite(index(net(text, s=extremes, f=np.float32(np.nan))), "pruned")


def test_a_model_is_not_written_into_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; create it first"):
        save(residual_net(), tmp_path / "nowhere" / "m.onnx")


def test_what_protobuf_cannot_hold_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: onnx.ModelProto, path: Path) -> None:
        raise ValueError("larger than the 2 GB limit")

    monkeypatch.setattr(onnx, "save", refuse)
    with pytest.raises(
        OutputError, match=r"cannot write '.*': larger than the 2 GB limit; keep large constants as init"
    ):
        save(residual_net(), tmp_path / "m.onnx")
    assert names(tmp_path) == []


def test_a_digest_tells_models_apart() -> None:
    model = residual_net()
    before = digest(model)
    assert before == digest(residual_net())
    set_parameter(model, 0, 1, np.zeros((8, 3, 3, 3)))
    assert digest(model) != before
