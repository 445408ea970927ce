"""Commands on sound input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_asr.repairing.options import METHODS
from tests.end_to_end.conftest import CALIBRATION, DENSE, FEW, FOLDER, PRESET, VALIDATION, cli, command, environment
from tools.paths import ASSETS, MODELS, ROOT


def zeros(path) -> dict[str, np.ndarray]:
    weights = {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
    return {name: value == 0 for name, value in weights.items() if value.ndim >= 2}


def top1(path, *options) -> float:
    data = () if "--data" in options else ("--data", VALIDATION)
    done = cli("evaluate", path, *data, *PRESET, "--json", *options)
    assert done.code == 0, done.err
    return done.json["top1"]


def test_prune_writes_what_it_reports(tmp_path):
    target = tmp_path / "pruned.onnx"
    done = cli("prune", DENSE, "-o", target, "--sparsity", 0.7, "--exclude", "stem", "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert report["output"] == str(target)
    assert report["sparsity"] == pytest.approx(0.7, abs=1e-4)
    layers = {layer["name"]: layer["zeros"] for layer in report["layers"]}
    assert sum(mask.sum() for mask in zeros(target).values()) == sum(layers.values()) > 0
    text = cli("prune", DENSE, "-o", target, "--sparsity", 0.7)
    assert text.code == 0
    assert "70.0%" in text.out
    assert report["after"]["nonzeros"] < 0.4 * report["before"]["nonzeros"]
    assert report["after"]["compressed"] < 0.6 * report["before"]["compressed"]
    assert report["after"]["flops"] == report["before"]["flops"] > 0
    assert "bytes after gzip" in text.out
    assert report["helps"] in text.out
    assert f"written: {target}" in text.out


def test_prune_pattern(tmp_path):
    target = tmp_path / "pruned.onnx"
    report = cli("prune", DENSE, "-o", target, "--pattern", "2:4", "--json").json
    assert report["options"]["pattern"] == "2:4"
    weight = max((numpy_helper.to_array(item) for item in onnx.load(target).graph.initializer), key=lambda w: w.size)
    groups = np.moveaxis(weight, 1, -1).reshape(-1, 4)  # [C_out taps C_in / 4, 4]
    assert ((groups != 0).sum(axis=1) <= 2).all()


def test_channels_are_removed_and_the_net_repaired(tmp_path):
    small, repaired = tmp_path / "small.onnx", tmp_path / "repaired.onnx"
    done = cli("prune", DENSE, "-o", small, "--pattern", "channel", "--sparsity", 0.4, "--multiple", 4, "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert report["after"]["flops"] < 0.5 * report["before"]["flops"]
    assert all(group["kept"] % 4 == 0 for group in report["groups"])
    options = ("--dense", DENSE, "--data", CALIBRATION, *PRESET, "--threads", "1")
    assert cli("repair", small, "-o", repaired, *options).code == 0
    assert top1(repaired) > top1(small) + 0.2
    text = cli("prune", DENSE, "-o", small, "--pattern", "channel", "--sparsity", 0.4)
    assert text.code == 0
    assert "FLOPs" in text.out


def test_prune_keeps_within_a_budget(tmp_path):
    small, sparse = tmp_path / "small.onnx", tmp_path / "sparse.onnx"
    channel = ("prune", DENSE, "-o", small, "--pattern", "channel")
    report = cli(*channel, "--target-size", "200kB", "--json").json
    assert 180_000 < small.stat().st_size == report["after"]["size"] <= 200_000
    assert report["options"]["budget"] == {"measure": "size", "limit": 200_000}
    assert report["latency"] is None
    report = cli("prune", DENSE, "-o", sparse, "--target-flops", 0.3, "--json").json
    assert 0.29 < report["after"]["nonzero_flops"] / report["before"]["nonzero_flops"] <= 0.3
    assert report["after"]["flops"] == report["before"]["flops"]
    batch = ("--input-shapes", "input:64,1,8,8", "--threads", 1)
    report = cli(*channel, "--target-latency", 0.75, *batch, "--json").json
    assert 0 < report["latency"]["ratio"] <= 0.75
    assert report["latency"]["low"] <= report["latency"]["ratio"] <= report["latency"]["high"]
    assert report["latency"]["shapes"] == {"input": [64, 1, 8, 8]}
    assert report["after"]["flops"] < report["before"]["flops"]


@pytest.mark.parametrize("command", ["prune", "compress", "shrink"])
def test_latency_is_measured_where_that_is_asked_for(command, tmp_path):
    arguments = {
        "prune": ("--sparsity", 0.5),
        "compress": ("--data", CALIBRATION, *PRESET, *FEW, "--refit-rows", 1000, "--rounds", 1, "--sparsity", 0.5),
        "shrink": (),
    }[command]
    done = cli(command, DENSE, "-o", tmp_path / "out.onnx", *arguments, "--measure-latency", "--threads", 1)
    assert (done.code, done.err) == (0, "")
    assert "milliseconds per run" in done.out
    assert "timed in onnxruntime on input:1,1,8,8" in done.out


def test_sensitivity_ranks_layers_and_allocates_the_zeros(tmp_path):
    few = ("--data", CALIBRATION, *PRESET, "--samples", 64, "--threads", "1")
    arguments = ("sensitivity", DENSE, *few, "--verify-samples", 32, "--sparsities", "0.9,0.5", "--exclude", "Gemm")
    done = cli(*arguments, "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert report["sparsities"] == [0.5, 0.9]
    assert (report["calibration_samples"], report["samples"]) == (64, 32)
    assert all(len(layer["tried"]) == 2 for layer in report["layers"])
    assert {skip["reason"] for skip in report["skipped"]} == {"excluded by a pattern"}
    low, high = (sum(layer["tried"][place]["distance"] for layer in report["layers"]) for place in (0, 1))
    assert 0 < low < high
    drawing = tmp_path / "sensitivity.svg"
    text = cli(*arguments, "--plot", drawing)
    assert all(layer["name"] in text.out for layer in report["layers"])
    assert "KL divergence" in text.out
    assert f"plot: {drawing}" in text.out
    assert all(layer["name"] in drawing.read_text() for layer in report["layers"])
    target = tmp_path / "pruned.onnx"
    report = cli("prune", DENSE, "-o", target, "--sparsity", 0.8, "--scope", "sensitivity", *few, "--json").json
    assert report["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert len({round(layer["sparsity"], 2) for layer in report["layers"]}) > 1


def test_shrink_writes_a_smaller_file_with_the_same_function(tmp_path):
    sparse, small = tmp_path / "sparse.onnx", tmp_path / "small.onnx"
    cli("prune", DENSE, "-o", sparse, "--sparsity", 0.97)
    done = cli("shrink", sparse, "-o", small, "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert report["error"] < 1e-5
    assert report["after"]["parameters"] < 0.5 * report["before"]["parameters"]
    assert small.stat().st_size < 0.5 * sparse.stat().st_size
    fidelity = cli("evaluate", small, "--dense", sparse, "--data", VALIDATION, *PRESET, "--json").json
    assert fidelity["agreement"] == 1.0
    text = cli("shrink", sparse, "-o", small).out
    assert "FLOPs" in text
    assert report["helps"] in text
    again = cli("shrink", small, "-o", tmp_path / "same.onnx").out
    assert "no channel can be removed" in again
    assert report["helps"] not in again


@pytest.mark.parametrize("method", METHODS)
def test_repair_with_each_method(method, pruned, tmp_path):
    target = tmp_path / "repaired.onnx"
    options = ("--dense", DENSE, "--data", FOLDER, *PRESET, *FEW, "--method", method)
    done = cli("repair", pruned, "-o", target, *options, "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert report["improved"]
    assert report["output"] == str(target)
    assert report["verification"]["after"]["kl"] < 0.5 * report["verification"]["before"]["kl"]
    assert bool(report["candidates"]) == (method == "auto")
    assert zeros(target).keys() == zeros(pruned).keys()
    for name, mask in zeros(pruned).items():
        assert (zeros(target)[name] >= mask).all(), name
    onnx.checker.check_model(str(target))
    assert top1(target) > top1(pruned) + 0.2


def test_auto_shows_what_it_tried(pruned, tmp_path):
    done = cli("repair", pruned, "-o", tmp_path / "r.onnx", "--dense", DENSE, "--data", CALIBRATION, *PRESET, *FEW)
    assert done.code == 0, done.err
    table = done.out.split("\n")
    assert table[0].split()[:2] == ["auto", "tried"]
    assert sum(line.rstrip().endswith("chosen") for line in table) == 1
    assert {"paired", "bn", "refit"} <= {line.split()[0] for line in table if line}


def test_a_time_budget_limits_auto(pruned, tmp_path):
    options = ("--dense", DENSE, "--data", CALIBRATION, *PRESET, *FEW, "--time-budget", 0, "--json")
    report = cli("repair", pruned, "-o", tmp_path / "r.onnx", *options).json
    assert report["candidates"]
    assert "refit" not in {candidate["method"] for candidate in report["candidates"]}
    assert any("time budget" in note for note in report["notes"])


def test_refit_options_reach_the_recipe(pruned, tmp_path):
    options = ("--method", "refit", "--refit-rows", 900, "--ridge", 0.1, "--relu-steps", 0, "--gain-power", 0)
    options += ("--no-block-targets", "--no-classifier", "--class-steps", 5, "--seed", 3, "--reliability-power", 0.5)
    data = ("--dense", DENSE, "--data", CALIBRATION, *PRESET, *FEW)
    given = cli("repair", pruned, "-o", tmp_path / "r.onnx", *data, *options, "--json").json["options"]
    assert given["refit"] == {
        "rows": 900,
        "detection_rows": 0.7,
        "ridge": 0.1,
        "relu_steps": 0,
        "gain_power": 0.0,
        "block_targets": False,
        "classifier": False,
        "class_steps": 5,
        "seed": 3,
    }
    assert (given["seed"], given["reliability_power"]) == (3, 0.5)


def test_repair_without_the_dense_model(pruned, tmp_path):
    target = tmp_path / "repaired.onnx"
    done = cli("repair", pruned, "-o", target, "--data", CALIBRATION, *PRESET, *FEW)
    assert done.code == 0, done.err
    assert "note: no dense model" in done.out
    assert top1(target) > top1(pruned) + 0.2


@pytest.mark.parametrize("goal", [("--sparsity", 0.95), ("--pattern", "1:4")], ids=["95%", "1:4"])
def test_compress(goal, tmp_path):
    target = tmp_path / "compressed.onnx"
    options = ("--data", FOLDER, *PRESET, *FEW, "--rounds", 2, "--round-samples", 1)
    done = cli("compress", DENSE, "-o", target, *goal, *options, "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert len(report["round_seconds"]) == 2
    assert report["improved"]
    assert report["verification"]["after"]["agreement"] > 0.7
    assert sum(mask.sum() for mask in zeros(target).values()) >= sum(layer["zeros"] for layer in report["layers"])
    assert top1(target) > 0.7


def test_compress_reports_how_close_it_came(tmp_path):
    options = ("--data", CALIBRATION, *PRESET, *FEW, "--rounds", 1, "--sparsity", 0.8)
    done = cli("compress", DENSE, "-o", tmp_path / "c.onnx", *options)
    assert done.code == 0, done.err
    assert "1 mask rounds" not in done.out
    for part in ("80.0%", "agreement", "KL divergence", "last mask, no repair", "compressed", "written: "):
        assert part in done.out


def test_evaluate_against_labels_and_the_dense_model(pruned):
    report = cli("evaluate", pruned, "--data", VALIDATION, *PRESET, "--dense", DENSE, "--json").json
    assert report["samples"] == 600
    assert report["top1"] < 0.5
    assert report["agreement"] < 0.5
    assert report["kl"] > 1
    assert report["top5"] >= report["top1"]
    text = cli("evaluate", DENSE, "--data", FOLDER, *PRESET)
    assert text.code == 0
    assert "top-1" in text.out
    assert "agreement" not in text.out


def test_evaluate_with_a_table_of_labels(tmp_path):
    names = sorted(path.relative_to(FOLDER).as_posix() for path in (MODELS / "data/digits_calibration").rglob("*.png"))
    table = tmp_path / "labels.tsv"
    table.write_text("".join(f"{name}\t{(int(name[0]) + 1) % 10}\n" for name in names))
    assert top1(DENSE, "--data", FOLDER, "--labels", table) < 0.05 < 0.97 < top1(DENSE, "--data", FOLDER)


def test_samples_from_several_places(pruned, tmp_path):
    listed = tmp_path / "list.txt"
    paths = sorted(Path(FOLDER).glob("**/*.png"))[:3]
    assert len(paths) == 3
    listed.write_text("".join(f"{path}\n" for path in paths))
    options = ("--data", VALIDATION, "--data", listed, "--dense", DENSE, "--scale", 1 / 127.5, "--mean", 1)
    together = cli("evaluate", pruned, *options, "--letterbox", 8, "--json").json
    assert together["data"] == [VALIDATION, str(listed)]
    assert together["samples"] == cli("evaluate", pruned, "--data", VALIDATION, *PRESET, "--json").json["samples"] + 3
    assert together["preprocessing"]["letterbox"] == 8
    page = tmp_path / "page.html"
    done = cli("inspect", pruned, *options, "--resize", "8x8", "--report", page, "--samples", 8)
    assert done.code == 0, done.err
    assert f"data {VALIDATION}, {listed}" in page.read_text()
    assert "8x9x1' is not a size" in cli("evaluate", pruned, *options, "--resize", "8x9x1").error
    assert "'' is not a size" in cli("evaluate", pruned, *options, "--letterbox", "").error
    assert "is given twice" in cli("evaluate", pruned, *options, "--data", VALIDATION).error


def test_json_is_all_there_is_on_stdout(pruned, tmp_path):
    data = ("--data", CALIBRATION, *PRESET)
    for arguments in (
        ("prune", DENSE, "-o", tmp_path / "a.onnx", "--sparsity", 0.5),
        ("repair", pruned, "-o", tmp_path / "b.onnx", "--dense", DENSE, "--method", "paired", *data, *FEW),
        ("evaluate", DENSE, "--dense", DENSE, *data),
    ):
        done = cli(*arguments, "--json", "-v")
        assert done.code == 0, done.err
        assert done.json["command"] == arguments[0]
        assert "NaN" not in done.out
        assert "Infinity" not in done.out


def test_quiet_says_nothing(tmp_path):
    done = cli("-q", "prune", DENSE, "-o", tmp_path / "a.onnx", "--sparsity", 0.5)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_a_result_that_is_worse_is_not_written_unless_forced(tmp_path):
    target, sparse = tmp_path / "repaired.onnx", tmp_path / "sparse.onnx"
    cli("prune", DENSE, "-o", sparse, "--sparsity", 0.02)  # so little that it hardly needs a repair
    options = ("--dense", DENSE, "--data", CALIBRATION, *PRESET, *FEW, "--method", "bn")
    done = cli("repair", sparse, "-o", target, *options, "--json")
    assert done.code == 1
    assert done.json["output"] is None
    assert not done.json["improved"]
    assert done.err.startswith("warning: ")
    assert not target.exists()
    target.write_bytes(b"mine")
    assert cli("repair", sparse, "-o", target, *options).code == 1
    assert target.read_bytes() == b"mine"
    done = cli("repair", sparse, "-o", target, *options, "--force")
    assert done.code == 1
    assert "--force" in done.err
    onnx.checker.check_model(str(target))


@pytest.mark.parametrize("method", ["auto", "bn"])
def test_where_there_is_nothing_to_repair_the_input_comes_back(method, tmp_path):
    target = tmp_path / "repaired.onnx"
    done = cli(
        "repair", DENSE, "-o", target, "--dense", DENSE, "--data", CALIBRATION, *PRESET, *FEW, "--method", method
    )
    assert (done.code, done.err) == (0, "")
    assert "nothing to repair" in done.out
    assert "given back" in done.out
    assert onnx.load(target) == onnx.load(DENSE)


def test_inspect_says_whose_zeros_are_of_use(pruned):
    done = cli("inspect", pruned, "--target", "tensorrt")
    assert (done.code, done.err) == (0, "")
    for words in (
        "few-outputs (11 layers): fewer than 256 output channels",
        "0.0% of the FLOPs",
        "[1] NVIDIA TensorRT",
    ):
        assert words in done.out, words
    packed = cli("inspect", pruned, "--target", "file", "--json").json["target"]
    assert packed["gzip"] < packed["stored"]
    assert packed["sparse_where_smaller"] == sum(min(row["stored"], row["sparse"]) for row in packed["weights"])
    assert "give one of the two" in cli("inspect", pruned, "--target", "file", "--channels", "x").error


def test_exchanged_models_are_refused(pruned, tmp_path):
    data = ("--dense", pruned, "--data", CALIBRATION, *PRESET)
    for arguments in (("repair", DENSE, "-o", tmp_path / "a.onnx", *FEW), ("inspect", DENSE), ("evaluate", DENSE)):
        assert "are the two exchanged?" in cli(*arguments, *data).error
        assert list(tmp_path.iterdir()) == []
    assert cli("inspect", DENSE, *data, "--force").code == 0
    assert cli("evaluate", DENSE, *data, "--force").code == 0


def test_demo(tmp_path):
    done = cli("demo", "--model", "vgg", "--sparsity", 0.9, "--json", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    report = done.json
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["dense", "pruned", *METHODS]
    assert rows["dense"]["top1"] > 0.97
    assert rows["pruned"]["top1"] < 0.3
    assert rows["refit"]["top1"] > 0.95
    written = tmp_path / "onnx-resuscitate-demo"
    assert sorted(path.name for path in written.iterdir()) == ["digits_vgg_pruned.onnx", "digits_vgg_repaired.onnx"]
    repaired = tmp_path / report["repaired"]
    assert top1(repaired) == pytest.approx(rows[report["best"]]["top1"], abs=2e-3)


def test_the_help_of_demo_names_the_embedded_nets():
    families = [model["family"] for model in json.loads((MODELS / "manifest.json").read_text())["models"]]
    text = " ".join(cli("demo", "--help").out.split())
    assert all(family in text for family in families)


def test_help_lists_the_methods():
    text = cli("repair", "--help").out
    assert all(method in text for method in METHODS)
    assert cli().out == cli("--help").out
    assert cli("--version").out.startswith("onnx-resuscitate ")


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from onnx_asr.cli.app import run; from onnx_asr.cli.app import COMMANDS; "
        "codes = [run([name, '--help']) for name in COMMANDS]; "
        "print({'numpy', 'onnx', 'onnxruntime', 'PIL'} & set(sys.modules), any(codes), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "set() False\n"


@pytest.mark.parametrize("place", ["before", "after"])
def test_options_of_the_display_may_stand_before_the_command(place, tmp_path):
    arguments = ("prune", DENSE, "-o", tmp_path / "pruned.onnx", "--sparsity", 0.5)
    done = cli("-q", *arguments) if place == "before" else cli(*arguments, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    missing = ("prune", "missing.onnx", "-o", tmp_path / "none.onnx", "--sparsity", 0.5)
    done = cli("--debug", *missing) if place == "before" else cli(*missing, "--debug")
    assert done.code == 2
    assert "Traceback" in done.err
    assert cli("-x", *arguments).error.endswith("See onnx-resuscitate prune --help")


def test_an_interrupt_leaves_nothing_behind(pruned, tmp_path):
    spill = tmp_path / "tmp"
    spill.mkdir()
    options = ("--dense", DENSE, "--data", FOLDER, *PRESET, "--method", "bn", "--bn", "ema", "--ema-batches", "100000")
    arguments = ["repair", str(pruned), "-o", str(tmp_path / "out.onnx"), *options, "--memory-limit", "1MB"]
    process = subprocess.Popen(
        [*command(), *arguments],
        env=environment() | {"TMPDIR": str(spill)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(4)
    assert process.poll() is None, "it was done too soon to be interrupted"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")
    assert os.listdir(tmp_path) == ["tmp"]
    assert not list(spill.glob("onnx-resuscitate-*"))  # onnxruntime itself leaves a file ".ses" where it is imported


def test_a_reader_that_leaves_changes_nothing(tmp_path):
    target = tmp_path / "pruned.onnx"
    process = subprocess.Popen(
        [*command(), "prune", DENSE, "-o", str(target), "--sparsity", "0.5"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert (process.wait(), err) == (0, "")
    assert target.exists()


def test_a_reader_of_the_help_may_leave():
    process = subprocess.Popen([*command(), "repair", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.skipif(not (ASSETS / "cifar10").is_dir(), reason="../shared/assets is not there")
def test_resnet20_at_90_percent(tmp_path):
    dense = ASSETS / "cifar10/resnet20_bn.onnx"
    preprocessing = ("--scale", 1 / 255, "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
    score = ("--data", ASSETS / "data/cifar10_test1k_lossless.npz", *preprocessing, "--json")
    pruned, repaired = tmp_path / "pruned.onnx", tmp_path / "repaired.onnx"
    assert cli("prune", dense, "-o", pruned, "--sparsity", 0.9).code == 0
    data = ("--data", ASSETS / "data/cifar10_train4k_lossless.npz", *preprocessing)
    done = cli("repair", pruned, "-o", repaired, "--dense", dense, *data, "--method", "paired")
    assert done.code == 0, done.err
    assert cli("evaluate", pruned, *score).json["top1"] < 0.15
    assert cli("evaluate", repaired, *score).json["top1"] > 0.48
