"""Who may import whom: every import, those in function bodies too, against the table of tests/layering.py."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import pytest

from tests.layering import PACKAGE, PAGE, TABLE, floor, imports, modules, page_with_drawing, room_of, violations

FLOORS = (
    {"arrays", "errors", "json_values", "version", "blas"},
    {"ownership", "numerics", "data", "detectors", "files"},
    {"graph"},
    {"channels", "engine"},
    {"pairing"},
    {"networks"},
    {"repairing", "targets"},
    {"pruning", "measuring"},
    {"sweeping", "olive"},
    {"report", "demo"},
    {"cli"},
)
LIBRARIES = sorted({library for row in TABLE.values() for library in row.libraries} | {"torch", "scipy"})
FORBIDDEN = [
    (name, other)
    for name, row in TABLE.items()
    for other in TABLE
    if other not in row.imports and not f"{other}.".startswith(f"{name}.")
]


def test_every_import_is_in_the_table() -> None:
    found = modules()
    assert len(found) > 25
    assert [bad for name, tree in found.items() for bad in violations(name, tree)] == []


def test_every_row_has_a_module_and_every_permission_is_used() -> None:
    used: dict[str, set[str]] = {name: set() for name in TABLE}
    for name, tree in modules().items():
        used[room_of(name)].update(target.split(".")[0] for target in imports(name, tree))
    unused = {
        name: sorted(row.libraries - used[name]) for name, row in TABLE.items() if not row.libraries <= used[name]
    }
    assert unused == {}
    assert {room_of(name) for name in modules()} == set(TABLE)


def test_rooms_stand_on_the_floors_that_they_are_meant_for() -> None:
    height = {name: number for number, names in enumerate(FLOORS) for name in names}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= height.keys()
    for name in height:
        assert all(height[below] < height[name] for below in TABLE[name].imports), name
    assert sorted(packages, key=lambda name: (floor(name), name)) == sorted(
        packages, key=lambda name: (height[name], name)
    )


def test_no_room_is_crowded() -> None:
    lines: dict[str, int] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        name = parts[0] if len(parts) > 1 else "top"
        lines[name] = lines.get(name, 0) + len(path.read_text(encoding="utf-8").splitlines())
    assert {name: count for name, count in lines.items() if count > 2500} == {}
    assert lines["top"] < 300


def test_modules_do_not_import_each_other_in_circles() -> None:
    found = modules()
    below: dict[str, set[str]] = {}
    for name, tree in found.items():
        below[name] = set()
        for target in imports(name, tree):
            inside = target.removeprefix("onnx_asr.")
            known = [part for part in (inside, inside.rpartition(".")[0]) if part in found and part != name]
            if target.startswith("onnx_asr.") and known:
                below[name].add(known[0])
    assert len(list(TopologicalSorter(below).static_order())) == len(found)


def test_only_the_engine_imports_onnxruntime() -> None:
    users = {room_of(name) for name, tree in modules().items() if any("onnxruntime" in i for i in imports(name, tree))}
    assert users == {"engine"}


@pytest.mark.parametrize(("name", "other"), FORBIDDEN, ids=lambda value: value)
def test_a_room_may_import_only_what_its_row_allows(name: str, other: str) -> None:
    source = "import onnx_asr" if other == "__init__" else f"def f():\n    from onnx_asr.{other} import x"
    assert len(violations(name, ast.parse(source))) == 1


@pytest.mark.parametrize("name", TABLE)
def test_a_room_may_not_import_other_libraries(name: str) -> None:
    for library in LIBRARIES:
        found = violations(name, ast.parse(f"import {library}.x"))
        assert len(found) == (library not in TABLE[name].libraries)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("numerics.x", "import onnx"),
        ("numerics.x", "from onnx_asr.graph.index import GraphIndex"),
        ("graph.x", "def f():\n    import onnxruntime"),
        ("graph.x", "from onnx_asr.engine.lane import Lane"),
        ("graph.x", "from onnx_asr import networks"),
        ("engine.x", "from onnx_asr.numerics.masks import Mask"),
        ("data.x", "from onnx import helper"),
        ("channels.x", "from onnx_asr.networks.draft import Draft"),
        ("networks.x", "from onnx_asr.demo.pipeline import run_demo"),
        ("networks.x", "from onnx_asr.repairing.pipeline import repair"),
        ("repairing.x", "from onnx_asr.pruning.compression import compress"),
        ("repairing.x", "def f():\n    def g():\n        from onnx_asr.cli import main"),
        ("repairing.x", "import onnxruntime as ort"),
        ("repairing.x", "import importlib\nimportlib.import_module('torch')"),
        ("pruning.masks", "from onnx_asr.sweeping.pipeline import sweep"),
        ("pruning.x", "from onnx_asr.measuring.damage import damage"),
        ("measuring.x", "from onnx_asr.pruning.masks import apply_masks"),
        ("sweeping.x", "import distributed"),
        ("report.x", "from onnx_asr.cli.app import run"),
        ("cli.x", "import torch"),
        ("cli.x", "import netron"),
    ],
)
def test_a_violation_is_found(name: str, source: str) -> None:
    assert len(violations(name, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("numerics.x", "import math\nimport numpy as np\nfrom onnx_asr.errors import OptionError"),
        ("engine.x", "import onnxruntime\nfrom onnx_asr.graph.index import GraphIndex"),
        ("sweeping.workers", "from distributed import Client\nfrom onnx_asr.sweeping.grid import SweepGrid"),
        ("cli.x", "import rich\nfrom onnx_asr.repairing.pipeline import repair"),
    ],
)
def test_allowed_imports_are_no_violations(name: str, source: str) -> None:
    assert violations(name, ast.parse(source)) == []


def test_a_module_in_no_room_is_refused() -> None:
    with pytest.raises(KeyError, match="in no room"):
        violations("elsewhere", ast.parse(""))


def test_the_drawing_is_that_of_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page_with_drawing(text) == text, "run: python -m tests.layering"
