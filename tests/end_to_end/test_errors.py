"""Mistakes of users: one clear line, exit code 2, no output file, existing files untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from PIL import Image

from tests.end_to_end.conftest import CALIBRATION, DENSE, FOLDER, PRESET, VALIDATION, cli
from tools.paths import MODELS

DATA = ("--data", CALIBRATION, *PRESET)
OTHER = str(MODELS / "digits_vgg.onnx")


def refused(*arguments, output: Path) -> str:
    """The error of a command that writes a file, with and without a file at its destination."""
    first = cli(*arguments, "-o", output).error
    assert not output.exists()
    output.write_bytes(b"mine")
    assert cli(*arguments, "-o", output, "--json").error == first
    assert output.read_bytes() == b"mine"
    leftovers = [path.name for path in output.parent.iterdir() if path.name.startswith(".")]
    assert leftovers == []
    return first


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out.onnx"


@pytest.fixture
def broken(tmp_path) -> dict[str, str]:
    """Files that are not usable models."""
    relu = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N,1,8,8] input) => (float[N,1,8,8] y) { y = Relu(input) }'
    )
    nan = onnx.load(DENSE)
    weight = max(nan.graph.initializer, key=lambda item: len(item.raw_data))
    value = numpy_helper.to_array(weight).copy()
    value.flat[7] = np.nan
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    files = {name: str(tmp_path / f"{name}.onnx") for name in ("missing", "text", "noconv", "nan", "empty")}
    onnx.save(relu, files["noconv"])
    onnx.save(nan, files["nan"])
    Path(files["text"]).write_text("this is not a model, it is a text\n" * 9)
    Path(files["empty"]).touch()
    return files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "does not exist"),
        ("text", "is not an ONNX model"),
        ("empty", "is not an ONNX model"),
        ("noconv", "no Conv"),
        ("nan", "NaN"),
    ],
)
def test_a_bad_model(name, words, broken, output):
    assert words in refused("prune", broken[name], "--sparsity", 0.5, output=output)
    assert words in refused("repair", broken[name], "--dense", DENSE, *DATA, output=output.with_name("r.onnx"))
    assert words in refused("compress", broken[name], "--sparsity", 0.5, *DATA, output=output.with_name("c.onnx"))
    if name != "noconv":
        assert words in refused("shrink", broken[name], output=output.with_name("s.onnx"))


def test_channels_removed_by_another_tool(tmp_path, output):
    small = tmp_path / "small.onnx"
    assert cli("prune", DENSE, "-o", small, "--pattern", "channel", "--sparsity", 0.5).code == 0
    model = onnx.load(small)
    del model.metadata_props[:]
    onnx.save(model, small)
    result = cli("repair", small, "--dense", DENSE, *DATA, "-o", output, "--method", "bn", "--json")
    assert result.code == 0
    assert any("144 of 288 channels are left" in note for note in result.json["notes"])
    output.unlink()
    generator = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1:
            value = generator.permutation(numpy_helper.to_array(tensor).reshape(-1)).reshape(tensor.dims)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, small)
    error = refused("repair", small, "--dense", DENSE, *DATA, output=output)
    assert "which channels it kept is unknown" in error
    assert "give the dense file that the pruned one was made from" in error


def test_a_bad_dense_model(broken, output):
    assert "NaN" in refused("repair", DENSE, "--dense", broken["nan"], *DATA, output=output)
    assert "does not exist" in cli("evaluate", DENSE, "--dense", broken["missing"], *DATA).error


def test_different_structure(output):
    error = refused("repair", DENSE, "--dense", OTHER, *DATA, output=output)
    assert "dense" in error
    assert "pruned" in error


def images(folder: Path, size: tuple[int, int]) -> Path:
    folder.mkdir()
    for number in range(4):
        Image.new("L", size, number).save(folder / f"{number}.png")
    return folder


def test_bad_data(tmp_path, output):
    empty, text = tmp_path / "empty", tmp_path / "data.txt"
    empty.mkdir()
    text.write_text("no data")
    archive = tmp_path / "data.npz"
    archive.write_bytes(b"PK no archive")
    large = images(tmp_path / "large", (9, 9))
    for data, words in (
        (tmp_path / "missing", "does not exist"),
        (empty, "holds no images"),
        (text, "line 1: 'no data' is no image file"),
        (archive, "cannot read arrays"),
        (large, "9"),
    ):
        done = cli("repair", DENSE, "--dense", DENSE, "--data", data, *PRESET, "-o", output)
        assert words in done.error
        assert str(data.name) in done.error or "size" in done.error
        assert words in cli("evaluate", DENSE, "--data", data, *PRESET, "--dense", DENSE).error
    assert not output.exists()


def test_a_name_that_the_system_refuses() -> None:
    long = "x" * 300
    for line in (
        ("prune", DENSE, "-o", long, "--sparsity", 0.5),
        ("inspect", long),
        ("evaluate", DENSE, "--data", long),
    ):
        assert f"cannot use '{long}': File name too long" in cli(*line).error


def test_whole_numbers_for_a_floating_point_input(tmp_path, output):
    arrays = np.load(VALIDATION)
    pixels = arrays["images"].transpose(0, 3, 1, 2)
    np.savez(tmp_path / "whole.npz", input=pixels, labels=arrays["labels"])
    data = ("--data", tmp_path / "whole.npz")
    words = "array of uint8 for model input 'input', which expects float32, and nothing says how to scale"
    for line in (
        ("repair", DENSE, "--dense", DENSE, "-o", output),
        ("compress", DENSE, "--sparsity", 0.5, "-o", output),
        ("prune", DENSE, "--sparsity", 0.5, "--score", "activation", "-o", output),
        ("sweep", DENSE, "--sparsities", 0.5, "-o", output),
        ("sensitivity", DENSE),
        ("inspect", DENSE, "--dense", DENSE),
        ("evaluate", DENSE),
    ):
        assert words in cli(*line, *data).error
    assert not output.exists()
    scaled = cli("evaluate", DENSE, *data, "--json", "--preset", "digits").json
    assert scaled["top1"] == cli("evaluate", DENSE, "--data", VALIDATION, *PRESET, "--json").json["top1"]


def test_labels_missing(tmp_path):
    flat = images(tmp_path / "flat", (8, 8))
    assert "labels" in cli("evaluate", DENSE, "--data", flat, *PRESET).error
    table = tmp_path / "labels.csv"
    assert "labels.csv" in cli("evaluate", DENSE, "--data", flat, *PRESET, "--labels", table).error
    table.write_text("0.png,1\n")
    assert "1.png" in cli("evaluate", DENSE, "--data", flat, *PRESET, "--labels", table).error
    table.write_text("".join(f"{number}.png,17\n" for number in range(4)))
    assert "17" in cli("evaluate", DENSE, "--data", flat, *PRESET, "--labels", table).error
    assert "images in files" in cli("evaluate", DENSE, "--data", VALIDATION, *PRESET, "--labels", table).error


@pytest.mark.parametrize("sparsity", ["1", "-0.1", "1.5", "nan"])
def test_sparsity_out_of_range(sparsity, output):
    assert sparsity in refused("prune", DENSE, "--sparsity", sparsity, output=output)
    assert sparsity in refused("compress", DENSE, "--sparsity", sparsity, *DATA, output=output.with_name("c.onnx"))


@pytest.mark.parametrize("place", ["missing/out.onnx", "folder", "file/out.onnx"])
@pytest.mark.parametrize("command", ["prune", "repair", "compress"])
def test_output_path_not_writable(command, place, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"mine")
    arguments = {
        "prune": ("prune", DENSE, "--sparsity", 0.5),
        "repair": ("repair", DENSE, "--dense", DENSE, *DATA),
        "compress": ("compress", DENSE, "--sparsity", 0.5, *DATA),
    }
    error = cli(*arguments[command], "-o", tmp_path / place).error
    assert "output" in error
    assert str(tmp_path) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert list((tmp_path / "folder").iterdir()) == []


def test_demo_refuses_too(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot make the folder" in cli("demo", "-o", tmp_path / "file" / "out").error
    assert "give one of" in cli("demo", "--model", "alexnet", "-o", tmp_path / "out").error
    assert "out of range" in cli("demo", "--sparsity", 2, "-o", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


CHANNEL = ("--pattern", "channel")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prune", DENSE), "sparsity is missing"),
        (("prune", DENSE, "--pattern", "4:2"), "pattern '4:2'"),
        (("prune", DENSE, "--pattern", "2:4", "--sparsity", 0.5), "drop --sparsity"),
        (("prune", DENSE, "--sparsity", 0.5, "--scope", "node"), '"node" for --scope'),
        (("prune", DENSE, "--sparsity", 0.5, "--scope", "sensitivity"), "needs calibration samples"),
        (("prune", DENSE, "--pattern", "2:4", "--scope", "sensitivity", *DATA), "drop --scope sensitivity"),
        (("prune", DENSE, "--sparsity", 0.5, "--include", "("), "regular expression"),
        (("prune", DENSE, "--sparsity", 0.5, "--include", "nothing_of_this_name"), "no weight"),
        (("prune", DENSE, "--sparsiti", 0.5), "--sparsiti"),
        (("prune", DENSE, "--sparsity", "90%"), "--sparsity"),
        (("prune",), "--help"),
        (("prune", DENSE, "--sparsity", 0.5, "--multiple", 8), "--pattern channel"),
        (("prune", DENSE, "--pattern", "channel"), "share of channels"),
        (("prune", DENSE, "--target-latency", 0.6), "--pattern channel"),
        (("prune", DENSE, *CHANNEL, "--target-latency", 0.6, "--sparsity", 0.5), "give one of them"),
        (("prune", DENSE, *CHANNEL, "--target-latency", 0.6, "--target-flops", 0.5), "give one of them"),
        (("prune", DENSE, *CHANNEL, "--target-latency", 1.5), "target-latency 1.5"),
        (("prune", DENSE, *CHANNEL, "--target-size", "1kB"), "target-size 1000 cannot be reached"),
        (("prune", DENSE, "--target-size", "3MB"), "3,000,000"),
        (("prune", DENSE, "--target-size", "lots"), "--target-size: 'lots'"),
        (("prune", DENSE, "--pattern", "2:4", "--target-flops", 0.5), "drop target-flops"),
        (("prune", DENSE, "--sparsity", 0.5, "--input-shapes", "1,1,8,8"), "name:1,3,224,224"),
        (("prune", DENSE, "--sparsity", 0.5, "--input-shapes", "image:1,1,8,8"), "give shapes of input"),
        (("prune", DENSE, "--sparsity", 0.5, "--measure-latency", "--input-shapes", "input:1,1,9,8"), "?,1,8,8"),
        (("shrink", DENSE, "--measure-latency", "--input-shapes", "input:1,1,8"), "?,1,8,8"),
        (("compress", DENSE, *DATA, "--pattern", "channel", "--sparsity", 0.5), "prune --pattern channel"),
        (("shrink",), "--help"),
        (("widen",), "widen"),
        (("repair", DENSE, "--dense", DENSE), "--data"),
        (("repair", DENSE, "--dense", DENSE, *DATA, "--method", "magic"), '"auto", "refit", "paired"'),
        (("repair", DENSE, "--dense", DENSE, *DATA, "--samples", 0), "samples 0"),
        (("repair", DENSE, "--dense", DENSE, *DATA, "--time-budget", -1), "time-budget"),
        (("repair", DENSE, "--dense", DENSE, *DATA, "--ridge", -1), "ridge"),
        (("repair", DENSE, "--dense", DENSE, *DATA, "--memory-limit", "lots"), "lots"),
        (("repair", DENSE, "--dense", DENSE, *DATA, "--providers", "TPU"), "TPU"),
        (("repair", DENSE, *DATA, "--method", "refit"), "--dense"),
        (("repair", DENSE, "--data", CALIBRATION, "--preset", "mnist"), "mnist"),
        (("repair", DENSE, "--data", FOLDER, "--mean", "1,b"), '--mean: unable to convert "b"'),
        (("compress", DENSE, *DATA, "--sparsity", 0.5, "--rounds", 0), "rounds 0"),
        (("compress", DENSE, *DATA, "--sparsity", 0.5, "--round-samples", 2), "round-samples 2"),
    ],
)
def test_bad_usage(arguments, words, output):
    assert words in cli(*arguments, "-o", output).error
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sparsities", "0.5;0.9"), "0.5;0.9"),
        (("--sparsities", "0.5,1"), "sparsity 1.0"),
        (("--sparsities", "0,0.5"), "above 0"),
        (("--score", "best"), '"best" for --score'),
        (("--verify-samples", 0), "verify-samples 0"),
        (("--include", "nothing_of_this_name"), "no weight"),
        (("--plot", "sensitivity.pdf"), ".svg or .png"),
        (("--plot", "missing/sensitivity.svg"), "missing"),
    ],
)
def test_bad_usage_of_sensitivity(options, words):
    assert words in cli("sensitivity", DENSE, *DATA, *options).error


def test_debug_shows_the_traceback(output):
    done = cli("prune", "missing.onnx", "-o", output, "--sparsity", 0.5, "--debug")
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("error: ")


def test_another_distribution_in_the_package(tmp_path, output, monkeypatch):
    info = tmp_path / "site" / "onnx_asr-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnx-asr\nVersion: 9.9\n")
    (info / "RECORD").write_text("onnx_asr/__init__.py,,\nonnx_asr/cli.py,,\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    error = cli("prune", DENSE, "--sparsity", 0.5, "-o", output).error
    assert "onnx-asr" in error
    assert "pip uninstall" in error
