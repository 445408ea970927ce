"""Write docs/options.md: every command and option, as the command line itself declares them.

python -m tools.docs.options_reference
"""

from __future__ import annotations

from collections.abc import Iterable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from cyclopts import App
from cyclopts.argument import Argument

from onnx_asr.cli.app import COMMANDS, EXIT_CODES, PROGRAM
from onnx_asr.cli.values import separated
from tools.arguments import script_parser
from tools.paths import ROOT

TARGET = ROOT / "docs" / "options.md"
HEAD = """# Options

All commands and their options. Written by `python -m tools.docs.options_reference` from the declarations that `--help`
shows; a test fails where it is out of date.
"""


def reference() -> str:
    links = ", ".join(f"[{name}](#{name})" for name in COMMANDS)
    parts = [HEAD, f"`onnx-resuscitate [options] COMMAND ...`: {links}\n", table(PROGRAM)]
    parts += [f"## {name}\n\n{PROGRAM[name].help}\n\n{table(PROGRAM[name])}" for name in COMMANDS]
    return "\n".join([*parts, f"{EXIT_CODES}\n"])


def table(app: App) -> str:
    """One row per option, by panel as in the help."""
    rows = ["| option | value | default | meaning |", "|---|---|---|---|"]
    arguments = app.assemble_argument_collection(parse_docstring=True).filter_by(show=True)
    for panel in sorted(arguments.groups, key=lambda panel: panel.sort_key):
        rows += [f"| **{panel.name}** | | | |"] if panel.name not in ("Arguments", "Options") else []
        rows += map(row, arguments.filter_by(group=panel))
    return "\n".join(rows) + "\n"


def row(argument: Argument) -> str:
    default = "required" if argument.required else shown_default(argument)
    names = ", ".join(f"`{name}`" for name in sorted(argument.names, key=lambda name: name.startswith("--")))
    value = "/".join(kinds(argument.hint)) if argument.index is None else ""
    if argument.parameter.converter is not None:
        value = f"{value}[,{value}]" if argument.parameter.converter is separated else "SIZE"
    cells = names, value, default, " ".join((argument.parameter.help or "").replace("``", "`").split())
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shown_default(argument: Argument) -> str:
    shown = argument.show_default
    return shown(argument.field_info.default) or "" if callable(shown) else str(shown or "")


def kinds(hint: Any) -> Iterable[str]:
    """The values that a type takes: names, or what stands for a number or a text; nothing for a flag."""
    if get_origin(hint) in (Union, UnionType, tuple):
        for part in get_args(hint):
            yield from kinds(part)
    elif get_args(hint):
        yield from (f"`{name}`" for name in get_args(hint))
    else:
        yield from {int: ["N"], float: ["X"], str: ["TEXT"]}.get(hint, [])


if __name__ == "__main__":
    script_parser(__doc__).parse_args()
    TARGET.write_text(reference(), encoding="utf-8")
