"""Broken and malicious files are refused with one clear error. Most were found by tools/check/fuzz.py."""

from __future__ import annotations

import os
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser
from PIL import Image

from onnx_asr.cli.app import run as command
from onnx_asr.data import InputSpec, Preprocessing, open_data
from onnx_asr.engine.loading import load
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import DataError, ModelError, OnnxAsrError, StructureError
from onnx_asr.graph.points import survey
from onnx_asr.networks.fidelity import collect_outputs
from onnx_asr.networks.pair import Pair
from onnx_asr.networks.samples import input_specs
from onnx_asr.pruning.options import PruneOptions
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import RefitRecipe, RepairOptions
from onnx_asr.repairing.pipeline import repair
from tests.graphs import bn, constant, copy, images, index, masked, net, residual_net, set_parameter, weights

Spoil = Callable[[onnx.ModelProto], None]


def first_initializer(model: onnx.ModelProto) -> onnx.TensorProto:
    return model.graph.initializer[0]


# --- bytes ---


@pytest.mark.parametrize("seed", range(5))
def test_bytes_at_random_are_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    sound = residual_net().SerializeToString()
    flipped = bytearray(sound)
    for _ in range(20):
        flipped[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
    path = tmp_path / "m.onnx"
    for data in (bytes(flipped), sound[: rng.randrange(len(sound))], sound[99:], rng.randbytes(999)):
        path.write_bytes(data)
        try:
            prune(path, options=PruneOptions(0.5))
        except OnnxAsrError as error:
            assert str(path) in str(error) or "constant" in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["m.json", "m.textproto", "m.onnxtxt", "m"])
def test_whatever_the_name_is_a_model_is_protobuf(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("{")
    with pytest.raises(ModelError, match="not an ONNX model"):
        load(path)
    path.write_bytes(residual_net().SerializeToString())
    assert load(path).graph.name == "residual"


# --- fields ---


def wrong_size(model: onnx.ModelProto) -> None:
    first_initializer(model).dims[0] += 1


def no_inputs(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[1:]


def unknown_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("colour", 3))


def a_graph_for_a_number(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    node.attribute.append(helper.make_attribute("epsilon", onnx.GraphProto(name="g")))


def no_such_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 2**40


@pytest.mark.parametrize("spoil", [wrong_size, no_inputs, unknown_attribute, a_graph_for_a_number, no_such_opset])
def test_fields_that_contradict_each_other_are_not_valid(tmp_path: Path, spoil: Spoil) -> None:
    model = residual_net()
    spoil(model)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"m\.onnx' is not a valid ONNX model: .*; export it again"):
        load(path)
    with pytest.raises(ModelError, match="the model is not a valid ONNX model"):
        load(model)


def test_what_onnxruntime_runs_is_not_refused_for_its_form() -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }", ir=3, opset=8, w=(4, 4))
    model.graph.ClearField("name")
    model.graph.output[0].ClearField("type")
    assert load(model) is model  # nor for an initializer that is no input, as IR 3 has it
    Session(model, Runtime(threads=1))


def test_an_impossible_ir_version_is_left_to_onnxruntime() -> None:
    model = residual_net()
    model.ir_version = 2**40
    with pytest.raises(ModelError, match="onnxruntime cannot load"):
        Session(load(model), Runtime(threads=1))


def test_nodes_out_of_order_are_refused() -> None:
    model = residual_net()
    model.graph.node[0].input[0] = model.graph.node[1].output[0]
    with pytest.raises(ModelError, match="no earlier node produces"):
        index(load(model))


@pytest.mark.parametrize("name", [b"BatchNormalization", b"some.domain"])
def test_names_that_are_not_text(tmp_path: Path, name: bytes) -> None:
    """onnx's checker refuses such names, or fails when it quotes them."""
    model = residual_net()
    model.opset_import.append(onnx.helper.make_opsetid("some.domain", 1))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString().replace(name, name[:-1] + b"\xb1", 1))
    with pytest.raises(ModelError, match="ONNX model"):
        load(path)


def test_a_constant_with_more_data_than_its_shape() -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }", w=(4, 4))
    first_initializer(model).raw_data += bytes(12)
    with pytest.raises(ModelError, match=r"constant 'w' cannot be read: .* damaged"):
        index(model).value("w")


def test_a_constant_of_unknown_type() -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }", w=(4, 4))
    first_initializer(model).data_type = -7
    with pytest.raises(ModelError, match="constant 'w' cannot be read"):
        index(model).value("w")


@pytest.mark.parametrize("number", [-1, 0, 255, 2**31 - 1])
def test_a_weight_of_unknown_type_in_a_file(tmp_path: Path, number: int) -> None:
    model = residual_net()
    first_initializer(model).data_type = number
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=f"has element type {number}, which ONNX does not define"):
        load(path)


def test_a_constant_that_cannot_be_evaluated() -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { v = Reshape (w, s) y = MatMul (x, v) }", w=(4, 4), s=(3,))
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array([3, 5], np.int64), "s"))
    with pytest.raises(ModelError, match="constant 'v' cannot be read"):
        index(model).value("v")


@pytest.mark.parametrize("number", [-1, 0, 255, 2**31 - 1])
def test_an_input_of_unknown_type(number: int) -> None:
    model = residual_net()
    model.graph.input[0].type.tensor_type.elem_type = number
    with pytest.raises(ModelError, match=f"element type {number}"):
        input_specs(index(model))
    with pytest.raises(ModelError, match=f"element type {number}"):
        Pair.of(model, residual_net())


def test_a_negative_input_size_counts_as_open(tmp_path: Path) -> None:
    """Shape inference would crash on a Slice of it."""
    text = "g (float[N,3,8,8] x) => (float[N,K,H,W] y) { c = Slice (x, s, e, a) y = Conv (c, w) }"
    bounds = {name: np.array([value]) for name, value in (("s", 0), ("e", 5), ("a", 2))}
    model = net(text, w=(4, 3, 3, 3), **bounds)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = -(2**31)
    assert np.count_nonzero(constant(prune(model, options=PruneOptions(0.5)).model, "w") == 0) == 54


def test_a_tensor_that_is_stored_twice() -> None:
    """onnxruntime would take the last value; with this package, each reader could take another one."""
    model = residual_net()
    model.graph.initializer.append(first_initializer(model))
    name = re.escape(first_initializer(model).name)
    with pytest.raises(ModelError, match=rf"holds the tensor '{name}' twice .* remove one of the two"):
        load(model)
    model = residual_net()
    sparse = model.graph.sparse_initializer.add()
    sparse.values.name = first_initializer(model).name
    with pytest.raises(ModelError, match=rf"holds the tensor '{name}' twice"):
        load(model)


def test_a_tensor_that_is_stored_twice_in_a_subgraph() -> None:
    body = parser.parse_graph("b () => (float[1] z) <float[1] k = {1}, float[1] l = {2}> { z = Add (k, l) }")
    body.initializer[1].name = "k"
    model = net(
        "g (float[N,3,8,8] x, bool c) => (float[N,4,8,8] y) { y = Conv (x, w) z = Identity (c) }", w=(4, 3, 1, 1)
    )
    model.graph.node[1].CopyFrom(onnx.helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body))
    with pytest.raises(ModelError, match="holds the tensor 'k' twice"):
        load(model)


def test_operators_of_no_version(tmp_path: Path) -> None:
    model = residual_net()
    del model.opset_import[:]
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"m\.onnx' has no opset_import, so the version of its operators is unknown"):
        load(path)


def test_an_operator_of_a_domain_that_is_not_imported() -> None:
    model = residual_net()
    model.graph.node[-1].domain = "elsewhere"
    with pytest.raises(ModelError, match="has no opset_import for the domain 'elsewhere'"):
        prune(model, options=PruneOptions(0.5))


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("groups", [-1, 0, 3])
def test_weights_that_do_not_divide_into_their_groups_are_skipped(operator: str, groups: int) -> None:
    text = f"g (float[N,4,8,8] x) => (float[N,K,H,W] y) {{ y = {operator} <group = {groups}> (x, w) }}"
    assert f"does not divide into {groups} groups" in survey(index(net(text, w=(4, 4, 1, 1)))).skips[0].reason


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("attribute", ["strides = [1]", "dilations = [1]", "pads = [0, 0]"])
def test_convolutions_whose_attributes_are_too_short_are_skipped(operator: str, attribute: str) -> None:
    text = f"g (float[N,4,8,8] x) => (float[N,K,H,W] y) {{ y = {operator} <{attribute}> (x, w) }}"
    assert "do not fit a kernel of 2 axes" in survey(index(net(text, w=(4, 4, 1, 1)))).skips[0].reason


def test_a_batchnorm_computed_at_run_time_behind_a_residual_add() -> None:
    text = """g (float[N,4,8,8] x) => (float[N,K,H,W] y) {
        c = Conv (x, w)  a = Add (c, x)  p = ReduceMean <axes = [0, 2, 3], keepdims = 0> (x)
        n = BatchNormalization (a, s, p, m, v)  r = Relu (n)  y = Conv (r, u) }"""
    dense = net(text, w=(4, 4, 1, 1), u=(4, 4, 1, 1), s=(4,), m=(4,), v=np.ones(4, np.float32))
    damaged = prune(dense, options=PruneOptions(0.5)).model
    options = RepairOptions("refit", samples=8, verify_samples=0)
    result = repair(damaged, images(8, seed=0, shape=(4, 8, 8)), options, dense=dense)
    assert [point.name for point in result.points] == ["Conv:c", "Conv:y"]
    assert [(skip.name, skip.op_type) for skip in result.skips] == [("BatchNormalization:n", "BatchNormalization")]


def test_a_sum_of_shapes_that_do_not_fit_is_refused() -> None:
    text = "g (float[N,4,8,8] x) => (float[N,K,H,W] y) { c = Conv <strides = [1, 2]> (x, w) a = Add (c, x) "
    text += "y = Conv (a, w) }"
    dense = net(text, w=(4, 4, 1, 1))
    options = RepairOptions("refit", samples=8, verify_samples=0)
    with pytest.raises(ModelError, match=r"onnxruntime cannot load the model 'g': .*Incompatible dimensions"):
        repair(prune(dense, options=PruneOptions(0.5)).model, images(8, seed=0, shape=(4, 8, 8)), options, dense=dense)


def test_a_slice_whose_lists_do_not_fit_is_refused() -> None:
    text = "g (float[N,4,8,8] x) => (float[N,K,H,W] y) { s = Slice (x, one, two, axes) y = Conv (s, w) }"
    model = net(text, one=np.array([0, 0]), two=np.array([4]), axes=np.array([2, 3]), w=(4, 4, 1, 1))
    options = RepairOptions("paired", samples=4, verify_samples=0)
    with pytest.raises(ModelError, match="onnxruntime cannot"):
        repair(prune(model, options=PruneOptions(0.5)).model, images(8, seed=0, shape=(4, 8, 8)), options, dense=model)


def test_an_empty_weight_is_skipped() -> None:
    model = net("g (float[N,4,8,8] x) => (float[N,K,H,W] y) { y = Conv (x, w) }", w=(0, 4, 1, 1))
    assert [skip.reason for skip in survey(index(model)).skips] == ["weight is empty"]


def test_batchnorm_parameters_of_different_sizes_are_skipped() -> None:
    text = "g (float[N,4,8,8] x) => (float[N,4,8,8] y) { c = Conv (x, w) y = BatchNormalization (c, s, b, m, v) }"
    model = net(text, w=(4, 4, 1, 1), s=(4,), b=(4,), m=(4,), v=(8,))
    found = survey(index(model))
    assert [point.batchnorm for point in found.points] == [None]
    assert "differ in size" in found.skips[0].reason


def test_layers_of_constants_are_skipped() -> None:
    text = "g (float[N,4,8,8] x) => (float[N,4,8,8] y) { n = BatchNormalization (c, s, b, m, v) o = Conv (c, c) "
    text += "k = Add (n, o) y = Conv (x, k) }"
    model = net(text, c=(4, 4, 1, 1), s=(4,), b=(4,), m=(4,), v=(4,))
    reasons = [skip.reason for skip in survey(index(model)).skips]
    assert reasons[:2] == ["reads only constants, no data"] * 2


def test_weights_of_the_wrong_rank_are_skipped() -> None:
    for operator in ("Conv", "ConvTranspose", "Gemm"):
        model = net(f"g (float[N,4,8,8] x) => (float[N,K,H,W] y) {{ y = {operator} (x, w) }}", w=(4,))
        assert "rank 1" in survey(index(model)).skips[0].reason


def test_a_weight_that_is_a_vector_in_one_network_does_not_match() -> None:
    text = "g (float[N,4] x) => (float[N,K] y) { h = Gemm (x, v) y = MatMul (h, w) }"
    with pytest.raises(StructureError, match="where the dense model has"):
        Pair.of(net(text, v=(4, 4), w=(4,)), net(text, v=(4, 4), w=(4, 4)))


def test_another_number_of_inputs_is_another_network() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }"
    dense = net(text, w=(4, 4))
    dense.graph.input.append(helper.make_tensor_value_info("idle", onnx.TensorProto.FLOAT, ["N", 4]))
    with pytest.raises(StructureError, match="1 inputs, the dense model 2"):
        Pair.of(net(text, w=(4, 4)), dense)
    data = open_data(np.zeros((4, 4), np.float32), input_specs(index(net(text, w=(4, 4)))))
    with pytest.raises(DataError, match="inputs are 'x', 'idle', the data hold 'x'"):
        collect_outputs(dense, data, [0, 1], Runtime(threads=1))


def test_an_output_listed_twice_is_one_output() -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }", w=(4, 4))
    model.graph.output.append(model.graph.output[0])
    assert Session(model, Runtime(threads=1)).output_names == ["y"]


def test_layers_too_large_to_be_refitted_are_named() -> None:
    dense = net("g (float[N,3,8,8] x) => (float[N,K,H,W] y) { y = Conv (x, w) }", w=(4, 3, 3, 3))
    set_parameter(dense, 0, 1, np.full((4, 3, 3, 3), 1e30, np.float32))
    options = RepairOptions("refit", samples=8, verify_samples=0, refit=RefitRecipe(rows=200))
    with pytest.raises(ModelError, match="activations at Conv:y are infinite, NaN or beyond"):
        repair(dense, images(8, seed=0), options, dense=dense)


# --- external data ---


@pytest.mark.parametrize("location", ["../secret.bin", "{folder}/secret.bin", "link.bin", "out/secret.bin", "fifo", ""])
def test_weights_outside_the_models_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(9999))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "out").symlink_to(tmp_path)
    os.mkfifo(folder / "fifo")
    assert "cannot read the model" in refusal(folder, location=location.format(folder=tmp_path))


@pytest.mark.parametrize("entry", [{"offset": "-1"}, {"offset": "x"}, {"offset": "10000"}, {"length": "10000000000"}])
def test_weights_beyond_the_end_of_their_file_are_refused(tmp_path: Path, entry: dict[str, str]) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(9999))
    assert "m.onnx" in refusal(tmp_path, location="w.bin", **entry)


def refusal(folder: Path, **entries: str) -> str:
    model = residual_net()
    tensor = first_initializer(model)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError) as caught:
        load(path)
    return str(caught.value)


# --- data ---

SPEC = InputSpec("input", np.dtype(np.float32), (None, 1, 8, 8))
UNIT = Preprocessing(scale=1 / 255)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    class Harm:  # what unpickling would run
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    np.savez(tmp_path / "a.npz", input=np.array([Harm()], object))
    np.save(tmp_path / "a.npy", np.array([Harm()], object), allow_pickle=True)
    for name in ("a.npz", "a.npy"):
        with pytest.raises(DataError, match="pickled Python objects are refused"):
            open_data(tmp_path / name, [SPEC])
    assert not (tmp_path / "harm").exists()


def test_a_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 1, 8, 8), np.float32))
    data = (tmp_path / "a.npy").read_bytes().replace(b"(4, 1, 8, 8)", b"(2**50,1,8,)")
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(DataError, match="cannot read arrays"):
        open_data(tmp_path / "a.npy", [SPEC])
    (tmp_path / "a.npy").write_bytes(data.replace(b"(2**50,1,8,)", b"(999999,8,8)"))
    with pytest.raises(DataError, match="cannot read arrays"):
        open_data(tmp_path / "a.npy", [SPEC])


def test_a_decompression_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("images.npy", "w") as member:
        for _ in range(9):
            member.write(bytes(1 << 20))
    claim = [struct.pack("<I", size) for size in (9 << 20, 3 << 30)]
    data = path.read_bytes()
    assert claim[0] in data
    path.write_bytes(data.replace(*claim))
    with pytest.raises(DataError, match=r"a\.npz would expand from \d+ to 3221225472 bytes .* numpy\.savez instead"):
        open_data(path, [SPEC], preprocessing=UNIT)


def test_images_that_start_programs_or_never_end_are_refused(tmp_path: Path) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file's name; a pipe is read until someone closes it."""
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match=r"script\.png cannot be read as an image: cannot identify"):
        open_data(tmp_path, [SPEC], preprocessing=UNIT)
    (tmp_path / "script.png").unlink()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png cannot be read as an image: it is missing or not a plain file"):
        open_data(tmp_path, [SPEC], preprocessing=UNIT)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(DataError, match=r"pipe\.npz is not a supported data source"):
        open_data(tmp_path / "pipe.npz", [SPEC], preprocessing=UNIT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, and four files that are not images."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"good{number}.png")
    whole = (folder / "good0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    Image.new("L", (8, 8)).save(folder / "bomb.bmp")
    header = bytearray((folder / "bomb.bmp").read_bytes())
    header[18:26] = struct.pack("<ii", 20_000, 20_000)  # width and height
    (folder / "bomb.bmp").write_bytes(header)
    return folder


def test_bad_images_are_named(folder: Path) -> None:
    for name in ("bomb.bmp", "cut.png", "empty.png", "text.png"):
        with pytest.raises(DataError, match=name):
            open_data(folder, [SPEC], preprocessing=UNIT).batch(range(8))
        (folder / name).unlink()
    assert len(open_data(folder, [SPEC], preprocessing=UNIT).batch(range(4))["input"]) == 4


def test_bad_images_are_skipped_where_that_is_asked_for(folder: Path) -> None:
    data = open_data(folder, [SPEC], preprocessing=UNIT, skip_bad_images=True)
    assert data.names == ("good0.png", "good1.png", "good2.png", "good3.png")
    assert data.unreadable == ("bomb.bmp", "cut.png", "empty.png", "text.png")
    for path in folder.glob("good*"):
        path.unlink()
    with pytest.raises(DataError, match=r"none of the 4 images .*bomb\.bmp"):
        open_data(folder, [SPEC], preprocessing=UNIT, skip_bad_images=True)


def test_skipped_images_are_counted_in_the_output(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dense.onnx"
    text = "g (float[N,1,8,8] input) => (float[N,K,H,W] y) "
    text += "{ c = Conv (input, w) y = BatchNormalization (c, b_gamma, b_beta, b_mean, b_var) }"
    model = net(text, w=(4, 1, 3, 3), **bn("b", channels=4))
    onnx.save(model, path)
    pruned = tmp_path / "pruned.onnx"
    onnx.save(masked(copy(model), {0: np.abs(weights(model)[0]) > 0.1}), pruned)
    arguments = ["repair", pruned, "-o", tmp_path / "out.onnx", "--dense", path, "--data", folder, "--preset", "unit"]
    arguments += ["--method", "bn", "--force"]
    assert command([str(argument) for argument in arguments]) == 2
    assert "bomb.bmp" in capsys.readouterr().err
    assert command([*(str(argument) for argument in arguments), "--skip-bad-images"]) in (0, 1)
    assert "4 images cannot be read and were skipped: bomb.bmp, cut.png" in capsys.readouterr().out
