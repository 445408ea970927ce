"""Files are replaced completely or not at all."""

from __future__ import annotations

import itertools
import os
import sys
import threading
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
from onnx_asr.files import outputs
from onnx_asr.graph import model_io, tensors
from onnx_asr.graph.external import data_files
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
        if frame.f_code.co_filename not in (model_io.__file__, outputs.__file__):
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
        extra = set(names(tmp_path)) - set(there[version])
        assert set(there[version]) <= set(names(tmp_path))
        assert not extra or (version, extra) == ("new", set(there[""]) - set(there["new"]))  # not removed yet
        found.add((stopped, version))
        if not stopped:
            break
    assert found == {(True, ""), (True, "new"), (False, "new")}


def another(doc: str) -> onnx.ModelProto:
    model = residual_net(1)
    model.doc_string = doc
    return model


def test_a_data_file_that_was_written_for_the_same_model_goes_with_it(tmp_path: Path) -> None:
    target = save(residual_net(), tmp_path / "m.onnx", external_data=True)
    (old,) = data_files(target)
    save(another("1"), target, external_data=True)
    assert not old.exists()
    (old,) = data_files(target)
    save(another("2"), target)
    assert names(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("keeper", ["backup.bin", "other.onnx", "hard link", "symbolic link"])
def test_a_data_file_that_may_be_needed_stays(tmp_path: Path, keeper: str) -> None:
    target = save(residual_net(), tmp_path / "m.onnx", external_data=True)
    (old,) = data_files(target)
    content = old.read_bytes()
    if keeper == "hard link":
        (tmp_path / "kept").hardlink_to(old)
    elif keeper == "symbolic link":
        old.rename(tmp_path / "store")
        old.symlink_to("store")
    else:
        (tmp_path / keeper).write_bytes(target.read_bytes())  # a copy, which refers to the same data
    save(another("1"), target, external_data=True)
    assert old.read_bytes() == content


def test_a_data_file_that_a_loaded_model_reads_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = save(residual_net(), tmp_path / "m.onnx", external_data=True)
    monkeypatch.setattr(tensors, "WEIGHT_LIMIT", 1000)
    monkeypatch.setattr(tensors, "LARGE", 1000)
    model = load(target)
    assert any(tensors.is_left(tensor) for tensor in model.graph.initializer)
    save(another("1"), target)
    for read, stored in zip(model.graph.initializer, residual_net().graph.initializer, strict=True):
        np.testing.assert_array_equal(tensors.value_of(read), numpy_helper.to_array(stored))


def test_a_data_file_of_another_name_stays(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    for location in ("weights.bin", "other.onnx.0123456789ab.data", "m.onnx.data"):
        onnx.save(residual_net(), target, save_as_external_data=True, location=location, size_threshold=0)
        save(another("1"), target, external_data=True)
        assert (tmp_path / location).is_file()


def test_a_pipe_holds_a_whole_model(tmp_path: Path) -> None:
    model = residual_net()
    expected = model.SerializeToString(deterministic=True)
    with (tmp_path / "stream").open("w+b") as stream:
        path = Path(f"/dev/fd/{stream.fileno()}")
        assert save(model, path, external_data=True) == path
    assert load(tmp_path / "stream").SerializeToString(deterministic=True) == expected
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=save, args=(model, fifo))
    writer.start()
    assert load(fifo).SerializeToString(deterministic=True) == expected
    writer.join()
    assert names(tmp_path) == ["fifo", "stream"]


def test_a_pipe_cannot_lead_to_external_data(tmp_path: Path) -> None:
    target, fifo = save(residual_net(), tmp_path / "m.onnx", external_data=True), tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(target.read_bytes(),))
    writer.start()
    with pytest.raises(ModelError, match=r"the model in the pipe '.*' keeps its weights in other files"):
        load(fifo)
    writer.join()


def test_weights_go_with_the_model_through_a_link_to_another_folder(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target = tmp_path / "store" / "m.onnx"
    (tmp_path / "link.onnx").symlink_to(target)
    save(residual_net(), tmp_path / "link.onnx", external_data=True)
    assert (tmp_path / "link.onnx").is_symlink()
    assert names(tmp_path / "store") == ["m.onnx"]
    assert not is_external(target)
    (tmp_path / "store" / "near.onnx").symlink_to("m.onnx")
    save(residual_net(), tmp_path / "store" / "near.onnx", external_data=True)
    assert is_external(target)
    assert load(target) == load(tmp_path / "store" / "near.onnx")


def test_a_model_over_2_gb_does_not_go_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "WEIGHT_LIMIT", 1000)
    read, write = os.pipe()
    try:
        with pytest.raises(OutputError, match="needs a second file beside it"):
            save(residual_net(), f"/dev/fd/{write}")
    finally:
        os.close(read)
        os.close(write)


def cached(folder: Path) -> Path:
    """A model with external data as the cache of Hugging Face holds it; the path of a snapshot."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "4f2c" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    onnx.save(residual_net(), blobs / "ab12", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    (blobs / "model.onnx_data").rename(blobs / "cd34")
    for name, blob in (("model.onnx", "ab12"), ("model.onnx_data", "cd34")):
        (snapshot / name).symlink_to(Path("../../../blobs", blob))
    return snapshot / "model.onnx"


@pytest.mark.parametrize("limit", [tensors.WEIGHT_LIMIT, 1000])
def test_the_cache_of_hugging_face_is_read_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(tensors, "WEIGHT_LIMIT", limit)
    monkeypatch.setattr(tensors, "LARGE", 1000)
    path = cached(tmp_path)
    with pytest.raises(ModelError, match=r"behind symbolic links .*: allow them with --external-links"):
        load(path)
    model = load(path, external_links=True)
    assert any(tensors.is_left(tensor) for tensor in model.graph.initializer) == (limit == 1000)
    for version in (model, load(save(model, tmp_path / "copy.onnx"))):
        for read, stored in zip(version.graph.initializer, residual_net().graph.initializer, strict=True):
            np.testing.assert_array_equal(tensors.value_of(read), numpy_helper.to_array(stored))
    assert names(tmp_path / "blobs") == ["ab12", "cd34"]


def test_links_out_of_the_cache_are_not_followed(tmp_path: Path) -> None:
    path = cached(tmp_path / "models--a")
    data = path.with_name("model.onnx_data")
    (tmp_path / "secret").write_bytes(data.read_bytes())
    data.unlink()
    data.symlink_to(tmp_path / "secret")
    for allowed in (False, True):
        with pytest.raises(ModelError, match="plain files in its folder"):
            load(path, external_links=allowed)


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


def test_pointers_of_git_lfs_are_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    target = tmp_path / "m.onnx"
    save(residual_net(), target, external_data=True)
    (data,) = data_files(target)
    data.write_bytes(pointer)
    with pytest.raises(ModelError, match=rf"{data.name}' is a pointer of Git LFS"):
        load(target)
    target.write_bytes(pointer)
    with pytest.raises(ModelError, match=r"m\.onnx' is a pointer of Git LFS"):
        load(target)


def test_a_link_without_its_data_names_the_model(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    save(residual_net(), tmp_path / "store" / "m.onnx", external_data=True)
    (tmp_path / "m.onnx").symlink_to(Path("store", "m.onnx"))
    for links in (False, True):
        with pytest.raises(ModelError, match=r"is a symbolic link, .* give '.*store/m\.onnx'"):
            load(tmp_path / "m.onnx", external_links=links)


def test_a_model_without_a_version_of_its_format_is_refused() -> None:
    model = residual_net()
    model.ClearField("ir_version")
    with pytest.raises(ModelError, match="has no ir_version"):
        load(model)


def test_data_files_of_another_version_are_told_from_broken_models(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    save(residual_net(), target, external_data=True)
    (data,) = data_files(target)
    data.write_bytes(data.read_bytes()[:-900])
    with pytest.raises(ModelError, match=r"the data files of '.*m\.onnx' do not fit it .* get all of them again"):
        load(target)


def test_a_way_out_of_the_folder_and_back_is_no_link(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    onnx.save(residual_net(), target, save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load(target, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = f"../{tmp_path.name}/w.bin"
    onnx.save(model, target)
    for links in (False, True):
        with pytest.raises(ModelError, match="must be plain files in its folder"):
            load(target, external_links=links)
