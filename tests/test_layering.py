"""Who may import what: one table, and a walk over every import, those in function bodies too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "onnx_asr"

STANDARD = set(sys.stdlib_module_names)
# Longest prefix first. "package" stands for the modules of the package itself that a layer may use, by prefix.
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "onnx_asr.errors": (set(), set()),
    "onnx_asr.version": (set(), set()),
    "onnx_asr.numerics": ({"numpy"}, {"onnx_asr.numerics", "onnx_asr.errors"}),
    "onnx_asr.graph": ({"numpy", "onnx"}, {"onnx_asr.graph", "onnx_asr.errors"}),
    "onnx_asr.engine": (
        {"numpy", "onnx", "onnxruntime"},
        {"onnx_asr.engine", "onnx_asr.graph", "onnx_asr.numerics", "onnx_asr.errors"},
    ),
    "onnx_asr.data": ({"numpy", "PIL", "tomli"}, {"onnx_asr.data", "onnx_asr.errors"}),
    "onnx_asr.report": ({"numpy", "onnx", "jinja2", "matplotlib"}, {"onnx_asr"}),
    "onnx_asr.cli": ({"typer", "rich", "click"}, {"onnx_asr"}),
    "onnx_asr.sweeping.workers": (
        {"onnx", "dask", "distributed"},
        {
            "onnx_asr.sweeping",
            "onnx_asr.blas",
            "onnx_asr.data",
            "onnx_asr.graph.tensors",
            "onnx_asr.networks",
            "onnx_asr.errors",
        },
    ),
    "onnx_asr.viewing": ({"netron"}, {"onnx_asr.model_io", "onnx_asr.ownership", "onnx_asr.errors"}),
    "onnx_asr.__main__": (set(), {"onnx_asr.cli"}),
    "onnx_asr": ({"numpy", "onnx", "google"}, {"onnx_asr"}),  # the pipelines, with NEVER
}
NEVER = {  # pipelines know neither the command line nor reports, reports not the command line
    "onnx_asr": {"onnx_asr.cli", "onnx_asr.report"},
    "onnx_asr.report": {"onnx_asr.cli"},
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("onnx_asr", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Everything imported anywhere in a module, as dotted names of modules or of what is taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            yield from (f"{node.module}.{item.name}" for item in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__"):
                argument = node.args[0]
                if name == "onnx_asr":  # the public names, imported when they are asked for
                    continue
                assert isinstance(argument, ast.Constant), f"{name} imports what only a run can tell"
                yield str(argument.value)


def within(module: str, layers: set[str]) -> bool:
    return any(module == layer or module.startswith(f"{layer}.") for layer in layers)


def layer_of(name: str) -> str:
    return max((layer for layer in TABLE if within(name, {layer})), key=len)


def violations(name: str, tree: ast.Module) -> list[str]:
    layer = layer_of(name)
    libraries, own = TABLE[layer]
    bad = []
    for target in imports(name, tree):
        root = target.split(".")[0]
        if root == "onnx_asr":
            allowed = within(target, own) and not within(target, NEVER.get(layer, set()))
            if target.startswith("onnx_asr.version"):
                allowed = True
        else:
            allowed = root in STANDARD or root in libraries
        if not allowed:
            bad.append(f"{name} imports {target}")
    return bad


def test_every_import_is_in_the_table() -> None:
    found = modules()
    assert len(found) > 25
    assert [bad for name, tree in found.items() for bad in violations(name, tree)] == []


def test_only_the_engine_imports_onnxruntime() -> None:
    users = {layer_of(name) for name, tree in modules().items() if any("onnxruntime" in i for i in imports(name, tree))}
    assert users == {"onnx_asr.engine"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("onnx_asr.numerics.x", "import onnx"),
        ("onnx_asr.numerics.x", "from onnx_asr.graph.index import GraphIndex"),
        ("onnx_asr.graph.x", "def f():\n    import onnxruntime"),
        ("onnx_asr.graph.x", "from onnx_asr.engine.lockstep import Lane"),
        ("onnx_asr.graph.x", "from onnx_asr import networks"),
        ("onnx_asr.engine.x", "from onnx_asr.repairing import repair"),
        ("onnx_asr.data.x", "from onnx import helper"),
        ("onnx_asr.repairing", "def f():\n    def g():\n        from onnx_asr.cli import main"),
        ("onnx_asr.repairing", "from onnx_asr import cli"),
        ("onnx_asr.repairing", "from onnx_asr.report.data import repair_data"),
        ("onnx_asr.report.x", "from onnx_asr.cli.app import run"),
        ("onnx_asr.repairing", "import onnxruntime as ort"),
        ("onnx_asr.repairing", "import importlib\nimportlib.import_module('torch')"),
        ("onnx_asr.cli.x", "import torch"),
    ],
)
def test_a_violation_is_seen(module: str, source: str) -> None:
    assert len(violations(module, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("onnx_asr.numerics.x", "import math\nimport numpy as np\nfrom onnx_asr.errors import OptionError"),
        ("onnx_asr.engine.x", "import onnxruntime\nfrom onnx_asr.graph.index import GraphIndex"),
        ("onnx_asr.cli.x", "import typer\nfrom onnx_asr.repairing import repair"),
    ],
)
def test_what_is_allowed_is_not(module: str, source: str) -> None:
    assert violations(module, ast.parse(source)) == []
