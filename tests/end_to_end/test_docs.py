"""The examples in docs/ run as printed, and docs/options.md matches the code."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import onnx_asr
from tests.end_to_end.conftest import PRESET, VALIDATION, cli, environment, run_blocks
from tests.end_to_end.howto import section
from tests.graphs import detector, first_output, net
from tools.paths import ROOT

DOCS = ROOT / "docs"
QUANTIZE = section("Quantize a repaired net with onnxruntime")
OPENVINO = section("Convert a repaired net for OpenVINO")
TENSORRT = section("2:4 for TensorRT")
GRAPHSURGEON = section("Edit with onnx-graphsurgeon before and after a repair")
METRIC = section("Judge a detector by mAP")


def agreement(path: Path, dense: str) -> float:
    report = cli("evaluate", path, "--dense", ROOT / "models" / dense, "--data", VALIDATION, *PRESET, "--json").json
    return float(report["agreement"])


def test_quantization(folder: Path) -> None:
    pytest.importorskip("onnxconverter_common")
    assert run_blocks(QUANTIZE, folder).count("top-5") == 2
    assert agreement(folder / "int8.onnx", "digits_resnet.onnx") > 0.95
    assert agreement(folder / "half.onnx", "digits_resnet.onnx") > 0.95
    assert "no layer with floating-point weights" in cli("check", folder / "int8.onnx", "--min-sparsity", 0.5).error
    weights = [numpy_helper.to_array(item) for item in onnx.load(folder / "int8.onnx").graph.initializer]
    weights = [value for value in weights if value.dtype == np.int8 and value.ndim >= 2]
    assert sum(np.sum(value == 0) for value in weights) / sum(value.size for value in weights) > 0.89


def test_openvino(folder: Path) -> None:
    pytest.importorskip("openvino")
    printed = run_blocks(OPENVINO, folder)
    assert float(printed.split("same class:")[1]) > 0.99
    assert agreement(folder / "repaired.onnx", "digits_mobilenet.onnx") > 0.95


def test_the_pattern_for_tensorrt(folder: Path) -> None:
    assert "few-outputs (11 layers)" in run_blocks(TENSORRT, folder)
    first, *others = cli("inspect", folder / "repaired.onnx", "--json").json["layers"]
    assert first["pattern"] == "dense"
    assert {layer["pattern"] for layer in others} == {"2:4"}
    assert agreement(folder / "repaired.onnx", "digits_resnet.onnx") > 0.97


def test_graphsurgeon_before_and_after(folder: Path) -> None:
    pytest.importorskip("onnx_graphsurgeon")
    assert "closer to the dense model: True" in run_blocks(GRAPHSURGEON, folder)
    final = onnx.load(folder / "final.onnx")
    assert {"onnx_asr.kept_channels", "onnx_asr.version"} <= {entry.key for entry in final.metadata_props}
    pixels = np.load(VALIDATION)["images"].transpose(0, 3, 1, 2).astype(np.float32) / 255
    probabilities = first_output(final, pixels)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    scores = first_output(onnx.load(ROOT / "models" / "digits_resnet.onnx"), (pixels - 0.5) / 0.5)
    assert (probabilities.argmax(axis=1) == scores.argmax(axis=1)).mean() > 0.9


def test_a_metric_of_ones_own(folder: Path) -> None:
    onnx.save(detector(), folder / "detector.onnx")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(60):
        pixels = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
        pixels.resize((64, 64), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.png")
    printed = run_blocks(METRIC, folder)
    ((before, after),) = re.findall(r"^metric, lower is better +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert float(after) < 0.8 * float(before)
    assert "itself: 0\n" in printed
    data = ("--data", "images", "--scale", "0.00392157")
    unknown = cli("evaluate", "repaired.onnx", "--dense", "detector.onnx", *data, "--metric", "other:score", cwd=folder)
    assert "no module 'other'" in unknown.error
    (folder / "higher.py").write_text((folder / "detector_map.py").read_text().replace("return 1 - np", "return np"))
    given = ("repair", "pruned.onnx", "-o", "worse.onnx", "--dense", "detector.onnx", *data, "--metric", "higher:score")
    refused = cli(*given, "--method", "paired", cwd=folder)
    assert refused.code == 1
    assert "lower counts as better" in refused.out
    assert not (folder / "worse.onnx").exists()


def test_a_model_that_another_tool_pruned(folder: Path) -> None:
    """Without the benchmark, which needs other nets."""
    pytest.importorskip("onnxsim")
    printed = run_blocks(section("Repair what another pruner made").split("```text")[0], folder)
    assert printed.count("that no node reads are left in the file") == 1
    for name in ("sparsegpt", "magnitude"):
        assert agreement(folder / f"{name}-repaired.onnx", "digits_resnet.onnx") > 0.95


def photographs(folder: Path, count: int, seed: int) -> None:
    """Smooth random images."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 7, 3), np.uint8))
        coarse.resize((280, 240), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def test_the_tutorial(folder: Path) -> None:
    """With a small net instead of the exported one, and few images."""
    model = net(
        """
        g (float[N,3,224,224] images) => (float[N,10] scores) {
          a = Conv <strides=[8,8]> (images, w1, b1)  b = Relu (a)
          c = Conv <strides=[2,2]> (b, w2, b2)  d = Relu (c)
          e = Conv (d, w3, b3)  f = Relu (e)
          h = GlobalAveragePool (f)  i = Flatten (h)  scores = Gemm <transB=1> (i, w4, b4)
        }
        """,
        **{"w1": (16, 3, 8, 8), "w2": (24, 16, 3, 3), "w3": (32, 24, 3, 3), "w4": (10, 32)},
        **{"b1": (16,), "b2": (24,), "b3": (32,), "b4": (10,)},
    )
    onnx.save(model, folder / "resnet18.onnx")
    photographs(folder / "images", 40, seed=0)
    photographs(folder / "validation", 10, seed=1)
    (folder / "labels.tsv").write_text("".join(f"{number}.jpg\t{number}\n" for number in range(10)))
    text = (DOCS / "tutorial.md").read_text()
    (export,) = re.findall(r"```python\n.*?```\n", text, re.DOTALL)
    printed = run_blocks(text.replace(export, ""), folder)
    for words in ("BatchNormalization: none", "agreement (KL)", "collapsed", "auto tried", "top-1", "mask rounds"):
        assert words in printed, words
    assert len(json.loads((folder / "sweep.json").read_text())["cells"]) == 9
    for name in ("sweep.svg", "repaired.onnx", "report.html", "small.onnx"):
        assert (folder / name).stat().st_size > 0


def test_the_functions_are_those_of_the_package(folder: Path) -> None:
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+)\((.*?)\)`", text, re.MULTILINE))
    public = {name for name in onnx_asr.__all__ if inspect.isfunction(getattr(onnx_asr, name))}
    assert set(shown) == public - {"load", "save", "open_data", "plain"}
    for name, arguments in shown.items():
        parameters = inspect.signature(getattr(onnx_asr, name)).parameters.values()
        positional, _, keywords = arguments.partition(", *, ")
        assert positional.split(", ") == [item.name for item in parameters if item.kind != item.KEYWORD_ONLY], name
        assert set(filter(None, keywords.split(", "))) <= {item.name for item in parameters}, name
    report, measured, streamed = run_blocks(text, folder).splitlines()
    assert streamed == "256 True"
    assert json.loads(report)["improved"]
    assert all(0.9 < float(value) <= 1 for value in measured.split()[:2])


def test_the_options_are_those_of_the_code() -> None:
    script = "from tools.docs.options_reference import reference; print(reference(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == (DOCS / "options.md").read_text(encoding="utf-8"), "run tools.docs.options_reference"


PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "models/README.md")), *sorted(DOCS.glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for file, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = path.parent / file if file else path
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


def options_of_commands() -> dict[str, set[str]]:
    """The options of every command, as docs/options.md lists them."""
    sections = re.split(r"^## ([\w-]+)$", (DOCS / "options.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    rows = (re.findall(r"^\| (`-.*?) \|", text, re.MULTILINE) for text in sections[1::2])
    return {name: set(re.findall(r"--?[\w-]+", " ".join(row))) for name, row in zip(sections[::2], rows, strict=True)}


def test_commands_that_are_shown_have_these_options() -> None:
    known, seen = options_of_commands(), 0
    for path in PAGES:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, arguments in re.findall(r"\bonnx-resuscitate ([a-z][\w-]*) ([^`\n]*)", text):
            shown = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", arguments.split("#")[0]))
            assert shown <= known[name], f"{path.name}: {name} {arguments}"
            seen += len(shown)
    assert seen > 50


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_are_named_exist(path: Path) -> None:
    named = re.findall(r"\btests/\w[\w/]*(?:\.\w+)?", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_modules_that_are_named_exist() -> None:
    package, named = ROOT / "onnx_asr", set()
    for cell in re.findall(r"^\| (`[\w/]+(?:\.py)?`.*?) \| ", (DOCS / "architecture.md").read_text(), re.MULTILINE):
        paths = [Path(name) for name in re.findall(r"`([\w/]+\.py)`", cell)]
        named |= {package / paths[0].parent / path.name for path in paths}
    assert len(named) > 50
    assert [path for path in named if not path.is_file()] == []
