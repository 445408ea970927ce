"""The rooms of the package: who may import whom and which libraries, and the drawing of it in docs/architecture.md.

python -m tests.layering    # write the drawing anew
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tools.paths import ROOT

PACKAGE = ROOT / "onnx_asr"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- layers: written by `python -m tests.layering` -->", "<!-- end of layers -->"

STANDARD = frozenset(sys.stdlib_module_names) | {"tomllib"}  # which Python 3.10 does not have


@dataclass(frozen=True)
class Room:
    """A package, or a module that stands apart from its package.

    Attributes:
        holds: What it is for.
        imports: Rooms that it may import, besides itself and what stands apart in it.
        libraries: Libraries that it may import, besides the standard one.
    """

    holds: str
    imports: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset()


def room(holds: str, imports: str = "", libraries: str = "") -> Room:
    return Room(holds, frozenset(imports.split()), frozenset(libraries.split()))


_ROOT = "arrays errors json_values version"
_BELOW_NETWORKS = f"{_ROOT} numerics graph data channels engine pairing"
_BELOW_PURPOSES = f"{_BELOW_NETWORKS} networks repairing"
_BELOW_REPORT = f"{_BELOW_PURPOSES} targets pruning measuring sweeping"
TABLE: dict[str, Room] = {
    "arrays": room("types of arrays", "", "numpy"),
    "json_values": room("results as JSON values"),
    "errors": room("what can go wrong"),
    "version": room("the version"),
    "ownership": room("whether the import package is ours alone", "errors"),
    "blas": room("threads of matrix products"),
    "files": room("where outputs go", "errors"),
    "numerics": room("mathematics", _ROOT, "numpy scipy threadpoolctl"),
    "graph": room("ONNX graphs and files", f"{_ROOT} files", "numpy onnx google"),
    "graph.foreign": room("models of other libraries", "errors", "onnx onnx_graphsurgeon onnx_ir"),
    "data": room("samples", _ROOT, "numpy PIL tomli"),
    "detectors": room("boxes of detectors, and their precision", _ROOT, "numpy pycocotools"),
    "channels": room("channels and their removal", f"{_ROOT} graph", "numpy onnx"),
    "pairing": room("dense and pruned graph, node by node", f"{_ROOT} graph channels", "numpy onnx"),
    "engine": room("sessions, lanes, buffers", f"{_ROOT} graph", "numpy onnx onnxruntime"),
    "networks": room("the pair, its samples, fidelity, latency", _BELOW_NETWORKS, "numpy onnx"),
    "repairing": room("repair by every method", f"{_BELOW_NETWORKS} networks", "numpy onnx"),
    "targets": room("where zeros are of use", f"{_ROOT} graph networks", "numpy onnx brotli"),
    "pruning": room("zeros, channels, joint pruning and repair", f"{_BELOW_PURPOSES} targets", "numpy onnx"),
    "measuring": room("inspection, damage, evaluation", f"{_BELOW_PURPOSES} targets detectors", "numpy onnx"),
    "sweeping": room("grids of cells", f"{_BELOW_PURPOSES} pruning measuring ownership files", "numpy onnx"),
    "sweeping.workers": room("cells in other processes", f"{_BELOW_PURPOSES} blas sweeping", "onnx dask distributed"),
    "report": room("results as one HTML page", f"{_BELOW_REPORT} ownership files", "numpy jinja2 matplotlib"),
    "olive": room("a pass of Olive", f"{_BELOW_PURPOSES} pruning", "onnx"),
    "olive.resuscitation": room("the pass itself", f"{_BELOW_PURPOSES} pruning olive", "olive"),
    "demo": room("an embedded net, pruned and repaired", f"{_BELOW_REPORT} files", "onnx"),
    "cli": room(
        "parse, call, print", f"{_BELOW_REPORT} detectors ownership blas files report olive demo", "onnx cyclopts rich"
    ),
    "cli.viewing": room("Netron on a port of this machine", f"{_ROOT} graph ownership cli", "netron"),
    "__init__": room("the public names, imported when they are asked for", f"{_BELOW_REPORT} detectors ownership"),
    "__main__": room("python -m onnx_asr", "cli"),
}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name without the package's."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def room_of(name: str) -> str:
    """The room of a module: the longest entry of the table that its name begins with.

    Raises:
        KeyError: When the module is in no room.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in TABLE:
            return ".".join(parts[:length])
    raise KeyError(f"onnx_asr.{name} is in no room of the table")


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
            if called in ("import_module", "__import__") and name != "__init__":  # which imports its public names
                argument = node.args[0]
                assert isinstance(argument, ast.Constant), f"{name} imports what only a run can tell"
                yield str(argument.value)


def violations(name: str, tree: ast.Module) -> list[str]:
    """Imports of a module that its room may not make."""
    own = room_of(name)
    bad = []
    for target in imports(name, tree):
        library, _, inside = target.partition(".")
        if library != "onnx_asr":
            allowed = library in STANDARD | TABLE[own].libraries
        elif not inside:
            allowed = False
        else:
            other = room_of(inside)
            allowed = f"{other}.".startswith(f"{own}.") or other in TABLE[own].imports
        if not allowed:
            bad.append(f"onnx_asr.{name} imports {target}")
    return bad


@cache
def floor(name: str) -> int:
    """The largest number of rooms below one."""
    return max((1 + floor(below) for below in TABLE[name].imports), default=0)


def drawing() -> str:
    """The rooms by floor, the highest first, as a table of Markdown."""
    packages = [name for name in TABLE if (PACKAGE / name).is_dir()]
    ground = [name for name in TABLE if floor(name) <= 1 and "." not in name and name not in packages]
    rows = ["| floor | room | holds | imports | libraries |", "|---|---|---|---|---|"]
    heights = {name: floor(name) for name in packages}
    numbers = {height: number for number, height in enumerate(sorted(set(heights.values())), start=1)}
    for name in sorted(packages, key=lambda name: (-heights[name], packages.index(name))):
        apart = {other: TABLE[other] for other in TABLE if other.startswith(f"{name}.")}
        below = ", ".join(other for other in packages if other in TABLE[name].imports) or "-"
        libraries = ", ".join(sorted(TABLE[name].libraries))
        for other, one in apart.items():
            libraries += f"; {', '.join(sorted(one.libraries - TABLE[name].libraries))} in `{other}` alone"
        rows.append(f"| {numbers[heights[name]]} | `{name}` | {TABLE[name].holds} | {below} | {libraries} |")
    rows.append(f"| 0 | {', '.join(f'`{name}`' for name in ground)} | modules at the top | - | - |")
    return "\n".join(rows)


def page_with_drawing(text: str) -> str:
    """The page with the drawing as the table has it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{drawing()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with_drawing(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
