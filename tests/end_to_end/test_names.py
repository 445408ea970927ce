"""Names that are not ASCII, in a process whose encoding of file names is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import onnx
import pytest

from onnx_asr.engine.loading import load
from tests.end_to_end.conftest import CALIBRATION, DENSE, FOLDER, Done, cli, command, environment

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def ascii_cli(*arguments: object, cwd: Path) -> Done:
    """Run a command in an ASCII locale; what it prints is ASCII."""
    line = [*command(), *map(str, arguments)]
    done = subprocess.run(line, cwd=cwd, env=environment() | ASCII, capture_output=True, timeout=120, check=False)
    return Done(done.returncode, done.stdout.decode("ascii"), done.stderr.decode("ascii"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, its external data, images, labels and arrays, none of which has an ASCII name."""
    root = tmp_path / "größe 模型"
    images = root / "bilder 图片"
    images.mkdir(parents=True)
    rows = []
    for number, source in enumerate(sorted(Path(FOLDER).glob("**/*.png"))[:90]):
        shutil.copy(source, images / f"ö{number}.png")
        rows.append(f"ö{number}.png,{source.parent.name}\n")
    (root / "etiketten é.csv").write_text("".join(rows), encoding="utf-8")
    shutil.copy(CALIBRATION, root / "daten 数.npz")
    model = onnx.load(DENSE)
    for node in model.graph.node:
        node.name = f"слой {node.name}"
    onnx.save(model, root / "netz ä.onnx", save_as_external_data=True, location="gewichte ö.bin", size_threshold=0)
    return root


def test_every_kind_of_path(folder: Path) -> None:
    model, data = folder / "netz ä.onnx", ("--data", folder / "bilder 图片", "--preset", "digits")
    few = ("--samples", 40, "--verify-samples", 40)
    pruned, repaired = folder / "dünn.onnx", folder / "repariert 修.onnx"
    labels = ("--labels", folder / "etiketten é.csv")
    for line in (
        ("prune", model, "-o", pruned, "--sparsity", 0.9, "--report", folder / "seite é.html", "-v"),
        ("repair", pruned, "--dense", model, "-o", repaired, *data, *few, "--method", "paired", "-v"),
        ("inspect", repaired, "--dense", model, "--data", folder / "daten 数.npz", "--preset", "digits"),
        ("evaluate", repaired, *data, *labels, "--json"),
        ("sensitivity", model, *data, *few, "--sparsities", 0.5, "--plot", folder / "bild ü.svg"),
        (
            "sweep",
            model,
            *data,
            *labels,
            *few,
            "--sparsities",
            0.5,
            "--methods",
            "none",
            "-o",
            folder / "tab ü.json",
        ),
    ):
        done = ascii_cli(*line, cwd=folder)
        assert (done.code, done.err) == (0, ""), line
    for path in (pruned, repaired):
        load(path)
        assert any(other.name.startswith(f"{path.name}.") for other in folder.iterdir())
    assert "слой" in (folder / "seite é.html").read_text(encoding="utf-8")
    assert ascii_cli("evaluate", repaired, *data, *labels, "--json", cwd=folder).json["top1"] is not None


def test_errors_name_the_file(folder: Path) -> None:
    error = ascii_cli("inspect", folder / "fehlt ä.onnx", cwd=folder).error
    assert "fehlt \\udcc3\\udca4.onnx' does not exist" in error
    (folder / "gewichte ö.bin").unlink()
    error = ascii_cli("inspect", folder / "netz ä.onnx", cwd=folder).error
    assert "cannot read the model" in error


def test_a_folder_that_no_model_can_name(tmp_path: Path, folder: Path) -> None:
    odd = Path(str(tmp_path).encode().decode(), "b\udcff")
    shutil.copytree(folder, odd)
    assert "is not in UTF-8, so no model can refer to it: rename" in cli("inspect", odd / "netz ä.onnx").error
    assert cli("inspect", DENSE, "--report", odd / "r.html").code == 0
