"""Imports go downward only, function bodies included."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "onnx_asr"
STDLIB = frozenset(sys.stdlib_module_names)
ERRORS = "onnx_asr.errors"

# Part of the package -> what its modules may import besides the standard library, by dotted prefix.
ALLOWED = {
    "numerics": ("numpy", ERRORS, "onnx_asr.numerics"),
    "graph": ("numpy", "onnx", ERRORS, "onnx_asr.graph"),
    "data": ("numpy", "PIL", "tomli", ERRORS, "onnx_asr.data"),
    "engine": ("numpy", "onnx", "onnxruntime", ERRORS, "onnx_asr.graph", "onnx_asr.numerics", "onnx_asr.engine"),
    "cli": ("numpy", "typer", "click", "rich", "onnx_asr"),
}
LOWER = tuple(f"onnx_asr.{part}" for part in ("numerics", "graph", "data", "engine"))
# Top-level modules, lowest first: each may import those on lines above its own, and every lower part.
ORDER = (
    ("errors", "version"),
    ("calibration", "model_io", "rewrite"),
    ("fidelity", "networks"),
    ("refit_samples", "channel_repair"),
    ("options", "refit_repair"),
    ("result", "pruning"),
    ("repair", "evaluation"),
    ("compression", "demo"),
    ("__init__",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def imports(source: str, package: str) -> set[str]:
    """Absolute names of everything imported anywhere in a module; ``from a import b`` counts as ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value))
    return found


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def violations(module: Path, source: str) -> set[str]:
    """What a module at this path inside the package must not import, of what it does import."""
    part = module.parts[0] if len(module.parts) > 1 else None
    names = imports(source, ".".join(["onnx_asr", *module.parts[:-1]]))
    names = {name for name in names if name.split(".")[0] not in STDLIB}
    if part is not None:
        allowed = ALLOWED[part]
        return {name for name in names if not under(name, allowed)}
    if module.stem == "__main__":
        return {name for name in names if not under(name, ("onnx_asr.cli",))}
    bad = set()
    for name in names:
        if not under(name, ("onnx_asr",)):
            if name.split(".")[0] not in ("numpy", "onnx", "google"):
                bad.add(name)
        elif not under(name, LOWER):
            target = [*name.split("."), ""][1]
            if RANK.get(target, len(ORDER)) >= RANK[module.stem]:
                bad.add(name)
    return bad


MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def test_the_walk_sees_the_whole_package():
    assert len(MODULES) > 30
    assert {path.parts[0] for path in MODULES if len(path.parts) > 1} == set(ALLOWED)
    assert {path.stem for path in MODULES if len(path.parts) == 1} == {*RANK, "__main__"}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_downward(module):
    assert violations(module, (PACKAGE / module).read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("module", "line", "culprit"),
    [
        ("numerics/gains.py", "import onnx", "onnx"),
        ("numerics/gains.py", "from onnx_asr import graph", "onnx_asr.graph"),
        ("numerics/gains.py", "from ..graph import index", "onnx_asr.graph.index"),
        ("numerics/gains.py", "from onnx_asr.options import Method", "onnx_asr.options.Method"),
        ("graph/index.py", "import onnxruntime as ort", "onnxruntime"),
        ("graph/index.py", "import onnxscript", "onnxscript"),
        ("graph/index.py", "from onnx_asr.engine.session import Session", "onnx_asr.engine.session.Session"),
        ("graph/index.py", "import importlib\nimportlib.import_module('onnxruntime')", "onnxruntime"),
        ("data/labels.py", "from onnx import helper", "onnx.helper"),
        ("data/labels.py", "from onnx_asr.calibration import Chunk", "onnx_asr.calibration.Chunk"),
        ("engine/lockstep.py", "from onnx_asr.networks import Networks", "onnx_asr.networks.Networks"),
        ("engine/lockstep.py", "import rich.console", "rich.console"),
        ("fidelity.py", "import onnxruntime", "onnxruntime"),
        ("repair.py", "from onnx_asr.cli.show import show", "onnx_asr.cli.show.show"),
        ("compression.py", "from onnx_asr import demo", "onnx_asr.demo"),
        ("pruning.py", "import typer", "typer"),
        ("channel_repair.py", "from onnx_asr.repair import repair", "onnx_asr.repair.repair"),
        ("networks.py", "import onnx_asr", "onnx_asr"),
        ("cli/app.py", "import onnxruntime", "onnxruntime"),
    ],
)
def test_an_injected_violation_is_seen(module, line, culprit):
    path = Path(module)
    source = (PACKAGE / path).read_text(encoding="utf-8")
    body = "\n".join(f"        {text}" for text in line.splitlines())
    assert violations(path, f"{source}\n\nclass _Hidden:\n    def hidden(self):\n{body}\n") == {culprit}
