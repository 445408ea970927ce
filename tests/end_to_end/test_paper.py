"""tools/paper/reproduce.py on a tiny net: the grid, its resumption, its tables; training if torch is installed."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import onnx_asr
from tests.end_to_end.conftest import environment
from tools.paper.grid import scaled
from tools.paths import ROOT

NET = "resnet50"  # the one that the paper's ablation is about; what stands in for it is a net of models/
SPARSITY, IMAGES, SCORED = "0.9", 256, 200
METHODS = ("none", "bn", "asr", "refit")
CELLS = {"damage", "none", "bn:20", "bn:exact", "asr:20", "asr:exact", "refit"}
SCALED = {f"{method}:{how},scaled" for method in ("bn", "asr") for how in ("20", "exact")}
UNPRUNED = {"0 dense", "0 bn:20", "0 bn:20,scaled", "0 bn:exact"}
ABLATION = {f"asr:20{rest},scaled" for rest in (",mean", ",fixed", ",no shift", ",mean,no shift", ",fixed,no shift")}
PAGE = ROOT / "docs" / "paper.md"


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tools.paper.reproduce", *map(str, arguments)]


def script(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    line = command(*arguments)
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=check)


def repair(work: Path, methods: tuple[str, ...] = METHODS, images: int = IMAGES, jobs: int = 1) -> list[str]:
    """Names of the cells that a run computed; those of the net without pruning start with 0."""
    grid = ("--sparsities", SPARSITY, "--methods", *methods, "--batches", "20", "--threads", "1", "--jobs", f"{jobs}")
    done = script("repair", "--work", work, *grid, "--images", str(images), "--score-images", str(SCORED))
    found = [line.split(": ")[0].removeprefix(f"{NET} ") for line in done.stdout.splitlines()]
    return [name.removeprefix(f"{SPARSITY} ") for name in found]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a finished grid."""
    work = tmp_path_factory.mktemp("work")
    shutil.copy(ROOT / "models" / "digits_resnet.onnx", work / f"{NET}.onnx")
    record = {"settings": {"width": 1.0, "epochs": 40}, "preset": "digits", "parameters": 160_000, "top1": 0.99}
    (work / f"{NET}.json").write_text(json.dumps(record))
    for part, name, times in (("train", "calibration", 6), ("test", "validation", 1)):
        with np.load(ROOT / "models" / "data" / f"digits_{name}.npz") as arrays:
            repeated = {key: np.concatenate([arrays[key]] * times) for key in ("images", "labels")}
            np.savez(work / f"{part}.npz", **repeated)
    assert set(repair(work, jobs=2)) == UNPRUNED | CELLS | SCALED | ABLATION
    return work


@pytest.fixture
def work(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "work"))


def cell(work: Path, name: str) -> Path:
    return work / "cells" / NET / f"{SPARSITY} {name}.json".replace(":", "-")


def test_a_cell_is_what_the_public_api_gives(finished: Path) -> None:
    with np.load(finished / "test.npz") as arrays:
        data, labels = {"images": arrays["images"][:SCORED]}, arrays["labels"][:SCORED]
    preprocessing = onnx_asr.Preprocessing.from_options(preset="digits")
    for name, sparsity, path in (
        ("dense", 0.0, finished / "cells" / NET / "0 dense.json"),
        ("none", 0.9, cell(finished, "none")),
    ):
        model = onnx_asr.prune(finished / f"{NET}.onnx", options=onnx_asr.PruneOptions(sparsity)).model
        expected = onnx_asr.evaluate(model, data, labels=labels, preprocessing=preprocessing).top1
        assert json.loads(path.read_text())["top1"] == expected, name
    top1 = {name: json.loads(cell(finished, name).read_text())["top1"] for name in CELLS - {"damage"}}
    assert top1["none"] < 0.5 < min(top1["bn:exact"], top1["refit"])
    assert top1["asr:exact"] == pytest.approx(top1["bn:exact"], abs=0.01)  # the gains cancel
    settings = json.loads(cell(finished, "asr:20,mean,no shift,scaled").read_text())["settings"]
    options = settings["options"]
    assert settings["unit_variance"]
    expected = {"method": "asr", "bn": "ema", "ema_batches": 20, "samples": 2560, "gain_samples": 64, "prior": "mean"}
    assert options.items() >= (expected | {"bias_correction": False, "momentum": 0.1, "ema_batch_size": 128}).items()


@pytest.mark.parametrize("net", ["resnet", "vgg", "densenet"])
def test_a_scaled_net_is_the_same_function(net: str) -> None:
    model = onnx.load(ROOT / "models" / f"digits_{net}.onnx")
    with np.load(ROOT / "models" / "data" / "digits_validation.npz") as arrays:
        data, labels = {"images": arrays["images"][:64]}, arrays["labels"][:64]
    preprocessing = onnx_asr.Preprocessing.from_options(preset="digits")
    before = [onnx.numpy_helper.to_array(item).copy() for item in model.graph.initializer]
    larger = scaled(model, 4)
    measured = onnx_asr.evaluate(larger, data, dense=model, labels=labels, preprocessing=preprocessing)
    assert measured.agreement == 1
    assert measured.kl == pytest.approx(0, abs=1e-6)
    after = [onnx.numpy_helper.to_array(item) for item in larger.graph.initializer]
    assert any(np.array_equal(new, 4 * old) and old.ndim == 4 for new, old in zip(after, before, strict=True))


def test_only_missing_and_outdated_cells_are_computed(work: Path) -> None:
    assert repair(work) == []
    first = cell(work, "none").read_text()
    cell(work, "none").unlink()
    (cell(work, "none").parent / f"{SPARSITY} none.json.1.part").write_text('{"top1"')  # a run was killed
    assert repair(work) == ["none"]
    assert json.loads(cell(work, "none").read_text())["top1"] == json.loads(first)["top1"]
    assert repair(work, ("none", "refit"), images=128) == ["refit", "0 bn:exact"]
    shutil.copy(ROOT / "models" / "digits_vgg.onnx", work / f"{NET}.onnx")
    assert repair(work, ("none",)) == ["0 dense", "damage", "none", "0 bn:20", "0 bn:20,scaled", "0 bn:exact"]


def test_no_process_survives_a_killed_run(work: Path) -> None:
    shutil.rmtree(work / "cells")
    grid = ("--images", "128", "--score-images", "100", "--batches", "20", "--threads", "1")
    line = command("repair", "--work", work, *grid, "--jobs", "2")
    run = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert run.stdout is not None
        assert run.stdout.readline()
        run.kill()
        run.communicate(timeout=60)  # to the end: no process holds the other side of the pipe
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def test_zeros_can_be_allocated_by_another_scope(work: Path) -> None:
    grid = ("--sparsities", "0.9 erk", "--methods", "none", "--batches", "20", "--score-images", str(SCORED))
    script("repair", "--work", work, *grid)
    with np.load(work / "test.npz") as arrays:
        data, labels = {"images": arrays["images"][:SCORED]}, arrays["labels"][:SCORED]
    model = onnx_asr.prune(work / f"{NET}.onnx", options=onnx_asr.PruneOptions(0.9, scope="erk")).model
    preprocessing = onnx_asr.Preprocessing.from_options(preset="digits")
    expected = onnx_asr.evaluate(model, data, labels=labels, preprocessing=preprocessing).top1
    found = json.loads((work / "cells" / NET / "0.9 erk none.json").read_text())["top1"]
    assert found == expected != json.loads(cell(work, "none").read_text())["top1"]


@pytest.mark.parametrize(
    "option", [("--jobs", "0"), ("--sparsities", "0.9 foo"), ("--sparsities", "2:4 erk"), ("--sparsities", "1.5")]
)
def test_options_are_checked(option: tuple[str, str], tmp_path: Path) -> None:
    done = script("repair", "--work", tmp_path, *option, check=False)
    assert done.returncode == 2
    assert f"argument {option[0]}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_json_and_tables_say_what_the_cells_say(work: Path, tmp_path: Path) -> None:
    data, page = tmp_path / "paper.json", tmp_path / "paper.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    script("table", "--work", work, "--data", data, "--page", page)
    collected = json.loads(data.read_text())
    assert (collected["images"], collected["score_images"]) == (IMAGES, SCORED)
    assert set(collected["cells"][NET][SPARSITY]) == CELLS | SCALED | ABLATION
    text = page.read_text(encoding="utf-8")
    for name in ("none", "refit"):
        top1 = json.loads(cell(work, name).read_text())["top1"]
        assert collected["cells"][NET][SPARSITY][name]["top1"] == top1
        assert f"| `{name}` | {100 * top1:.1f}" in text
    dense = json.loads((work / "cells" / NET / "0 dense.json").read_text())["top1"]
    row = next(line for line in text.splitlines() if line.startswith("| ResNet-50 | 90% | 59.6 |"))
    assert f"| {100 * collected['cells'][NET][SPARSITY]['refit']['top1'] / dense:.1f} | – |" in row  # no auto

    refit = json.loads(cell(work, "refit").read_text())
    refit["settings"]["score_images"] = SCORED + 1
    cell(work, "refit").write_text(json.dumps(refit))
    before = data.read_text()
    done = script("table", "--work", work, "--data", data, "--page", page, check=False)
    assert done.returncode == 1
    assert f"scored on [{SCORED}, {SCORED + 1}] images" in done.stderr
    assert data.read_text() == before


def test_nets_of_another_folder_join_those_of_the_json(work: Path, tmp_path: Path) -> None:
    data, page = tmp_path / "paper.json", tmp_path / "paper.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    old = json.loads((ROOT / "docs" / "data" / "paper.json").read_text())
    old |= {"images": IMAGES, "score_images": SCORED}
    data.write_text(json.dumps(old))
    script("table", "--work", work, "--data", data, "--page", page)
    both = json.loads(data.read_text())
    assert list(both["nets"]) == list(both["cells"]) == ["resnet18", "resnet50", "densenet121", "vgg16"]
    assert {name for name in old["nets"] if both["nets"][name] == old["nets"][name]} == set(old["nets"]) - {NET}
    assert {name for name in old["cells"] if both["cells"][name] == old["cells"][name]} == set(old["cells"]) - {NET}
    assert set(both["cells"][NET]) == {"0", SPARSITY}

    data.write_text(json.dumps(old | {"images": IMAGES + 1}))
    done = script("table", "--work", work, "--data", data, "--page", page, check=False)
    assert done.returncode == 1
    assert f"the JSON have images {IMAGES + 1}, the new ones {IMAGES}" in done.stderr


def test_the_tables_of_the_page_are_those_of_its_json(tmp_path: Path) -> None:
    page = tmp_path / "paper.md"
    shutil.copy(PAGE, page)
    script("table", "--page", page)
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8"), "run tools/paper/reproduce.py table"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nets", "resnet18"), "resnet18.onnx with its .json is missing"),
        (("--score-images", "601"), "601 images were asked for, and there are 600"),
        (("--score-images", "100", "--batches", "25"), "3200 calibration images are needed, and there are 3072"),
    ],
)
def test_impossible_requests_are_refused(work: Path, arguments: tuple[str, ...], message: str) -> None:
    done = script("repair", "--work", work, *arguments, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["reproduce", "grid", "work", "tables"])
def test_only_training_needs_torch_and_only_public_names_are_used(name: str) -> None:
    tree = ast.parse((ROOT / "tools" / "paper" / f"{name}.py").read_text(encoding="utf-8"))
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "onnx_asr":
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onnx_asr"):
            assert node.module == "onnx_asr"
            used |= {item.name for item in node.names}
        elif isinstance(node, ast.Import):
            assert not [item.name for item in node.names if item.name.startswith(("torch", "onnx_asr."))]
    assert used <= set(onnx_asr.__all__)
    if name == "grid":
        assert used >= {"prune", "repair", "evaluate", "inspect", "RepairOptions"}


def archive(path: Path, classes: tuple[str, ...], count: int) -> None:
    """A few images of noise as JPEG files, in the layout of the real archive."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w:xz") as files:
        for part in ("train", "test"):
            for label in classes:
                for number in range(count):
                    content = io.BytesIO()
                    Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(content, "JPEG")
                    member = tarfile.TarInfo(f"{part}/{label}/{number:04d}.jpg")
                    member.size = len(content.getvalue())
                    files.addfile(member, io.BytesIO(content.getvalue()))


@pytest.mark.parametrize("net", ["resnet18", "resnet50", "densenet121", "vgg16"])
def test_training(net: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs torch: tools/paper/requirements.txt")
    images = tmp_path / "images.tar.xz"
    archive(images, ("ant", "bee", "cat"), 30)
    size = ("--width", "0.0625", "--epochs", "1", "--batch", "32", "--images", "64", "--float16")
    where = ("--device", "cpu", "--threads", "1")
    line = ("train", "--work", tmp_path / "work", "--archive", images, "--nets", net, *size, *where)
    script(*line)
    record = json.loads((tmp_path / "work" / f"{net}.json").read_text())
    model = onnx.load(tmp_path / "work" / f"{net}.onnx")
    kinds = [node.op_type for node in model.graph.node]
    depth = {"resnet18": (20, 20), "resnet50": (53, 53), "densenet121": (120, 121), "vgg16": (13, 13)}
    assert (kinds.count("Conv"), kinds.count("BatchNormalization")) == depth[net]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    weights = [onnx.numpy_helper.to_array(item) for item in model.graph.initializer if len(item.dims) > 1]
    assert len(weights) == depth[net][0] + 1
    assert all(value.dtype == np.float32 and (value == value.astype(np.float16)).all() for value in weights)
    with np.load(tmp_path / "work" / "test.npz") as arrays:
        data, labels = {"images": arrays["images"]}, arrays["labels"]
    preprocessing = onnx_asr.Preprocessing.from_options(preset="cifar10")
    assert onnx_asr.evaluate(model, data, labels=labels, preprocessing=preprocessing).top1 == record["top1"]
    assert script(*line).stdout == f"{net}: trained before\n"
