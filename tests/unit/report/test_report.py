"""The data of reports against a golden file; the page is self-contained, escapes names and fits a phone."""

from __future__ import annotations

import html
import importlib.util
import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr.data import Preprocessing
from onnx_asr.errors import OptionError, OutputError
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.repairing.options import RefitRecipe, RepairOptions
from onnx_asr.report import check_format, check_libraries
from onnx_asr.report.data import Run, compress_data, inspect_data, prune_data, repair_data
from onnx_asr.report.html import render, write_report
from onnx_asr.report.sweep_data import sweep_data
from onnx_asr.sweeping.grid import Cell, PruneGoal
from onnx_asr.sweeping.result import Outcome, SweepResult
from onnx_asr.targets.packing import FileUse
from tests.graphs import copy, digits, images, residual_net
from tools.paths import MODELS

GOLDEN = Path(__file__).parents[2] / "golden" / "report.json"
FOLDER = str(MODELS / "data" / "digits_calibration")
DIGITS = Preprocessing.from_options(preset="digits")
VARYING = {"seconds", "version", "bytes", "compressed_bytes", "sha256", "png"}
NASTY = "<script>alert('x')</script>&\"quoted\""


def zeroed(model: onnx.ModelProto, sparsity: float) -> onnx.ModelProto:
    return onnx_asr.prune(model, options=onnx_asr.PruneOptions(sparsity)).model


def repaired(model: onnx.ModelProto, dense: onnx.ModelProto, **given: Any) -> dict[str, Any]:
    """The report of a repair on digits."""
    options = RepairOptions(**{"samples": 128, "verify_samples": 64, **given})
    result = onnx_asr.repair(model, FOLDER, options, dense=dense, preprocessing=DIGITS)
    files = {"model": "pruned.onnx", "dense": "dense.onnx", "data": "images", "output": "repaired.onnx"}
    run = Run("repair", "onnx-resuscitate repair pruned.onnx", files, DIGITS)
    return repair_data(run, result, model, dense, FOLDER, Execution())


@cache
def auto() -> dict[str, Any]:
    return repaired(zeroed(digits("resnet"), 0.9), digits("resnet"), refit=RefitRecipe(rows=2000))


def rounded(values: Any) -> Any:
    """Remove what differs between runs or versions."""
    if isinstance(values, Mapping):
        return {key: rounded(value) for key, value in values.items() if key not in VARYING}
    if isinstance(values, (list, tuple)):
        return [rounded(value) for value in values]
    if isinstance(values, float):
        return float(f"{values:.4g}")
    return values


def differences(mine: Any, its: Any, where: str = "") -> list[str]:
    """Paths at which two plain values differ by more than 1%."""
    if isinstance(mine, Mapping) and isinstance(its, Mapping):
        if mine.keys() != its.keys():
            return [f"{where}: keys {sorted(mine.keys() ^ its.keys())}"]
        return [line for key in mine for line in differences(mine[key], its[key], f"{where}.{key}")]
    if isinstance(mine, list) and isinstance(its, list):
        if len(mine) != len(its):
            return [f"{where}: {len(mine)} items, not {len(its)}"]
        pairs = enumerate(zip(mine, its, strict=True))
        return [line for number, pair in pairs for line in differences(*pair, f"{where}[{number}]")]
    if isinstance(mine, float) and isinstance(its, (int, float)):
        return [] if math.isclose(mine, its, rel_tol=0.01, abs_tol=1e-4) else [f"{where}: {mine}, not {its}"]
    return [] if mine == its else [f"{where}: {mine!r}, not {its!r}"]


def test_the_values_are_those_stored(request: pytest.FixtureRequest) -> None:
    values = repaired(zeroed(digits("resnet"), 0.9), digits("resnet"), method="paired", reliability_power=0.25)
    mine = json.loads(json.dumps(rounded(values), allow_nan=False))
    if request.config.getoption("--regenerate"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(mine, indent=1) + "\n")
    assert differences(mine, json.loads(GOLDEN.read_text())) == []


def test_a_broken_value_is_found() -> None:
    golden = json.loads(GOLDEN.read_text())
    broken = json.loads(GOLDEN.read_text())
    broken["layers"][3]["after"]["ratios"][0] *= 1.05
    (line,) = differences(broken, golden)
    assert line.startswith(".layers[3].after.ratios[0]: ")


def test_what_a_repair_report_says() -> None:
    values = auto()
    dense, before, after = values["versions"]
    assert [row["name"] for row in values["versions"]] == ["dense", "pruned", "repaired"]
    assert dense["fidelity"]["top1"] > 0.95 > 0.5 > before["fidelity"]["top1"]
    assert after["fidelity"]["top1"] > 0.9
    assert after["fidelity"]["kl"] < 0.1 * before["fidelity"]["kl"]
    assert before["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert before["compressed_bytes"] < 0.5 * dense["compressed_bytes"]
    assert sum(item["chosen"] for item in values["candidates"]) == 1
    assert values["options"]["method"] == "refit"
    assert values["calibration"]["samples"] == 128
    assert [layer["number"] for layer in values["layers"]] == list(range(1, 12))
    last = values["layers"][9]
    assert last["before"]["collapsed"] > 0.5 * last["channels"] > last["after"]["collapsed"]
    assert all(layer["residual"][1] < 1 for layer in values["layers"])
    assert 1 <= len(values["thumbnails"]) <= 8
    page = render(values)
    for words in (
        "dense",
        "repaired",
        "Methods that auto tried",
        "Calibration samples",
        "KL divergence",
        "top-1",
        "output error",
    ):
        assert words in page, words


def test_the_layers_that_were_hurt_most_are_named() -> None:
    values = auto()
    errors = {}
    for layer in values["layers"]:
        ratios = np.array([ratio for ratio in layer["before"]["ratios"] if ratio is not None])
        errors[layer["number"]] = np.sqrt(np.mean(np.log10(np.clip(ratios, 1e-4, None)) ** 2))
    assert values["hurt_most"] == sorted(errors, key=errors.__getitem__)[:-4:-1]
    worst = values["layers"][values["hurt_most"][0] - 1]["name"]
    assert re.search(rf"Most damaged by pruning: layer \d+, {re.escape(worst)} \(.* after the repair", render(values))
    dense = digits("resnet")
    unhurt = inspect_data(
        Run("inspect", "l", {"model": "m"}), onnx_asr.inspect(dense, dense=dense, data=FOLDER, preprocessing=DIGITS)
    )
    assert unhurt["hurt_most"] == []
    assert "Most damaged" not in render(unhurt)


def test_shrinkage_of_the_methods_that_have_it() -> None:
    model, dense = zeroed(digits("resnet"), 0.9), digits("resnet")
    for given, shrinks in (
        ({"method": "asr", "bn": "exact"}, True),
        ({"method": "paired", "reliability_power": 0.5}, True),
        ({"method": "paired"}, False),
        ({"method": "raw", "bn": "exact"}, False),
    ):
        layers = repaired(model, dense, **given)["layers"]
        known = [layer["shrinkage"] for layer in layers if layer["gain"] is not None]
        assert known
        assert all((item is not None) == shrinks for item in known), given
        assert all(0 <= item[0] <= item[1] <= item[2] <= 1 for item in known if item is not None)


def test_without_a_dense_model_there_is_no_damage() -> None:
    model = zeroed(digits("resnet"), 0.9)
    options = RepairOptions(method="bn", samples=64)
    result = onnx_asr.repair(model, FOLDER, options, preprocessing=DIGITS)
    run = Run("repair", "line", {"model": "m.onnx", "output": "o.onnx"}, DIGITS)
    values = repair_data(run, result, model, None, FOLDER, Execution())
    assert [row["name"] for row in values["versions"]] == ["pruned", "repaired"]
    assert all(layer["before"] is layer["after"] is None for layer in values["layers"])
    page = render(values)
    assert "<h2>Channels</h2>" not in page
    assert "not verified" in page


def test_the_other_commands() -> None:
    dense = digits("vgg")
    result = onnx_asr.prune(dense, options=onnx_asr.PruneOptions(pattern="2:4"))
    page = render(prune_data(Run("prune", "line", {"model": "m.onnx"}), result, dense))
    assert page.count("<b>2:4</b>") == sum(layer.zeros > 0 for layer in result.layers)
    model = zeroed(dense, 0.9)
    inspection = onnx_asr.inspect(model, dense=dense, data=FOLDER, preprocessing=DIGITS)
    page = render(inspect_data(Run("inspect", "line", {"model": "m.onnx"}), inspection))
    assert "with a gain per layer" in page
    assert page.count("<img") == 2
    assert "repair without --dense" in render(
        inspect_data(Run("inspect", "l", {"model": "m"}), onnx_asr.inspect(model))
    )
    model.metadata_props.add(key="onnx_asr.options", value="value " * 20)
    page = render(inspect_data(Run("inspect", "l", {"model": "m"}), onnx_asr.inspect(model, target="tensorrt")))
    assert page.count('<div class="long">') == 1
    assert "0.0% of the FLOPs are in layers whose zeros it makes use of" in page
    assert "and at most 0.0% in those where other zeros, or quantization, could be of use" in page
    assert page.count("fewer than 256 output channels") == len(inspection.layers)
    use = onnx_asr.inspect(model, target="file").target
    assert isinstance(use, FileUse)
    page = render(inspect_data(Run("inspect", "l", {"model": "m"}), onnx_asr.inspect(model, target="file")))
    assert all(f'<td class="name">{weight.name}</td>' in page for weight in use.weights)
    compressed = onnx_asr.compress(
        dense,
        FOLDER,
        onnx_asr.CompressOptions(
            0.9, rounds=2, repair=RepairOptions(samples=64, verify_samples=64, refit=RefitRecipe(rows=2000))
        ),
        preprocessing=DIGITS,
    )
    values = compress_data(Run("compress", "line", {"model": "m.onnx"}, DIGITS), compressed, dense, FOLDER, Execution())
    assert [row["name"] for row in values["versions"]] == ["dense", "last mask, no repair", "compressed"]
    assert values["versions"][1]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert (values["options"]["rounds"], values["options"]["refit.rows"]) == (2, 4000)
    assert {"round 1", "round 2"} <= set(values["seconds"])


def test_labels_that_do_not_fit_are_reported_and_ignored(tmp_path: Path) -> None:
    dense = residual_net()
    model = zeroed(dense, 0.5)
    path = tmp_path / "feeds.npz"
    np.savez(path, x=images(96, seed=0), labels=np.full(96, 10))
    options = RepairOptions(method="paired", samples=48, verify_samples=32)
    result = onnx_asr.repair(model, path, options, dense=dense)
    values = repair_data(Run("repair", "line", {"model": "m"}), result, model, dense, str(path), Execution())
    assert values["versions"][0]["fidelity"] is None
    assert values["versions"][2]["fidelity"]["top1"] is None
    assert any(note.startswith("no top-1: labels from 10 to 10") for note in values["notes"])
    assert values["thumbnails"] == []
    render(values)


def nasty() -> str:
    """A page whose model, file and option names are markup."""
    dense = digits("resnet")
    for node in dense.graph.node:
        node.name = f"{NASTY}{node.name}"
    values = repaired(zeroed(dense, 0.9), copy(dense), method="paired")
    values["files"] = {"model": NASTY, "data": NASTY, "output": None}
    values |= {"command_line": NASTY, "notes": [NASTY], "skipped": [{"name": NASTY, "op_type": NASTY, "reason": NASTY}]}
    values["options"] = {NASTY: NASTY}
    values["thumbnails"][0]["name"] = NASTY
    values["versions"][1]["name"] = NASTY
    return render(values)


def test_names_are_escaped() -> None:
    page = nasty()
    assert "<script" not in page + of_a_sweep()
    assert page.count(html.escape(NASTY, quote=False).split("&lt;/")[0].replace("'", "&#39;")) > 15


def test_the_page_stands_alone() -> None:
    page = render(auto())
    links = re.findall(r'(?:src|href|action)="([^"]*)"', page)
    assert links
    assert all(link.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for link in links)
    assert not re.search(r"url\(|@import|<link|<script|<iframe", page)
    assert len(page) < 1_000_000
    assert page == render(auto())


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_report(auto(), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == render(auto())
    with pytest.raises(OutputError, match="missing' does not exist"):
        write_report(auto(), tmp_path / "missing" / "report.html")
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]


def test_obstacles_are_reported_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_libraries("--report")
    found = importlib.util.find_spec
    monkeypatch.setattr("onnx_asr.report.find_spec", lambda name: None if name == "jinja2" else found(name))
    with pytest.raises(OptionError, match=r"needs jinja2, .*: pip install onnx-resuscitate\[report\]"):
        check_libraries("--report")
    check_libraries("--plot")
    for good in ("a.svg", "a.png", "/dev/null"):
        check_format(good)
    for bad in (tmp_path / "a.pdf", tmp_path / "a"):
        with pytest.raises(OptionError, match=r"ends in \.svg or \.png"):
            check_format(bad)


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path is not None:
            return path
    pytest.skip("no chromium to look at the page with")


def of_a_sweep() -> str:
    """A page of a sweep with many cells, one of which failed with a long message."""
    goals = [PruneGoal(pattern, share) for pattern in ("unstructured", "4x1") for share in (0.5, 0.7, 0.8, 0.9, 0.95)]
    score = Outcome(Fidelity(600, top1=0.5, top5=0.9, agreement=0.5, kl=1.0, snr_db=3.0), 0.5, 1.0, "refit")
    cells = {Cell(goal, method): score for goal in goals for method in ("none", "auto", "compress")}
    cells[Cell(goals[0], "none")] = Outcome(error=9 * NASTY)
    conditions = {
        "dense_sha256": 64 * "0",
        "providers": ["CPUExecutionProvider"],
        "calibration": {"samples": 512, "sha256": 64 * "0"},
        "scored": {"samples": 600, "sha256": 64 * "0", "labels_sha256": None},
        "settings": {"scope": "global", "repair": {"samples": 512}},
    }
    assert score.fidelity is not None
    result = SweepResult(conditions, score.fidelity, cells, (NASTY,))
    return render(sweep_data(Run("sweep", 9 * NASTY, {"model": 9 * NASTY}), result))


@pytest.mark.parametrize("page", [nasty, lambda: render(auto()), of_a_sweep], ids=["long-names", "repair", "sweep"])
def test_no_sideways_scrolling_on_a_phone(page: Any, tmp_path: Path) -> None:
    browser = chromium()
    widths = "[innerWidth, document.documentElement.scrollWidth].join()"
    framed = page().replace("</body>", f"<script>parent.postMessage({widths}, '*')</script></body>")
    (tmp_path / "page.html").write_text(framed, encoding="utf-8")
    path = tmp_path / "phone.html"  # a window is never narrower than 500 pixels, a frame may be
    path.write_text(
        "<title>none</title><script>onmessage = event => document.title = event.data</script>"
        '<iframe src="page.html" style="width: 400px; border: 0"></iframe>'
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars --dump-dom"
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"<title>(.*)</title>", done.stdout)
    assert found is not None
    assert found[1] == "400,400"
