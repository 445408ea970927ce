"""The benchmark of detectors: cells to JSON to the table of a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.bench import detectors
from tools.paper.work import read_json, write_json

PAGE = "before\n<!-- table: detectors -->\nold\n<!-- end -->\nafter\n"


def cell(net: str, sparsity: str, method: str, precision: float | None) -> dict[str, Any]:
    half = None if precision is None else 2 * precision
    return {"net": net, "sparsity": sparsity, "method": method, "mean_ap": precision, "mean_ap50": half}


def store(work: Path, *cells: dict[str, Any]) -> None:
    for number, one in enumerate(cells):
        write_json(work / one["net"] / f"{number}.json", one)


def test_the_table_of_a_page(tmp_path: Path) -> None:
    data, page = tmp_path / "data.json", tmp_path / "page.md"
    page.write_text(PAGE)
    paths = ["--data", str(data), "--page", str(page)]
    store(
        tmp_path / "first",
        cell("fastestdet", "0", "dense", 17.0),
        cell("fastestdet", "2:4", "refit", 12.0),
        cell("fastestdet", "0.5", "refit", 10.0),
        cell("fastestdet", "0.5", "none", 1.94),
        cell("yolox_nano", "0", "dense", 28.9),
        cell("yolox_nano", "0.5", "bn", None),  # which has no BatchNormalization
        cell("yolox_nano", "0.5", "compress:rounds=8", 26.0),
    )
    detectors.main(["table", "--work", str(tmp_path / "first"), *paths])
    expected = [
        "before",
        "<!-- table: detectors -->",
        "| net (dense) | method | 50% | 2:4 |",
        "|---|---|---|---|",
        "| FastestDet, 17.0 (34.0) | none | 1.9 (3.9) | - |",
        "|  | `refit` | 10.0 (20.0) | 12.0 (24.0) |",
        "| YOLOX-nano (BatchNormalization folded), 28.9 (57.8) | `compress:rounds=8` | 26.0 (52.0) | - |",
        "<!-- end -->",
        "after",
    ]
    assert page.read_text().splitlines() == expected
    store(tmp_path / "second", cell("fastestdet", "0.5", "refit", 11.0))
    detectors.main(["table", "--work", str(tmp_path / "second"), *paths])
    assert len(read_json(data)["cells"]) == 7
    expected[5] = "|  | `refit` | 11.0 (22.0) | 12.0 (24.0) |"
    assert page.read_text().splitlines() == expected
    page.write_text(PAGE)
    detectors.main(["table", *paths])
    assert page.read_text().splitlines() == expected


def test_a_page_without_the_table(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("no table")
    with pytest.raises(SystemExit, match="add them"):
        detectors.main(["table", "--data", str(tmp_path / "data.json"), "--page", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == "no table"


def test_finished_cells_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    def measured(bench: detectors.Bench, sparsity: str, method: str) -> dict[str, Any]:
        made.append((sparsity, method))
        return {"mean_ap": 1.0, "mean_ap50": 2.0}

    monkeypatch.setattr(detectors.Bench, "cell", measured)
    monkeypatch.setattr(detectors.Bench, "settings", lambda bench: {"images": bench.images})
    command = ["measure", "--work", str(tmp_path), "--nets", "fastestdet", "--sparsities", "0.5", "2:4"]
    detectors.main([*command, "--methods", "none", "refit"])
    assert made == [("0", "dense"), ("0.5", "none"), ("0.5", "refit"), ("2:4", "none"), ("2:4", "refit")]
    stored = json.loads((tmp_path / "fastestdet" / "2-4 refit.json").read_text())
    assert stored["sparsity"] == "2:4"
    assert stored["settings"] == {"images": 96}
    made.clear()
    detectors.main([*command, "--methods", "none", "bn", "refit"])
    assert made == [("0.5", "bn"), ("2:4", "bn")]
    made.clear()
    detectors.main([*command, "--methods", "none", "--images", "64"])
    assert made == [("0", "dense"), ("0.5", "none"), ("2:4", "none")]
