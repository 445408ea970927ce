"""Write docs/options.md: every command and option, as the command line itself declares them.

python -m tools.docs.options_reference
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from onnx_asr.cli.app import app
from tools.arguments import script_parser
from tools.paths import ROOT

TARGET = ROOT / "docs" / "options.md"
HEAD = """# Options

All commands and their options. Written by `python -m tools.docs.options_reference` from the declarations that `--help`
shows; a test fails where it is out of date. Where no default is shown, the text tells it, or the option is off.
"""


def reference() -> str:
    group: Any = typer.main.get_command(app)
    parts = [HEAD, "`onnx-resuscitate COMMAND`: " + ", ".join(f"[{name}](#{name})" for name in group.commands) + "\n"]
    parts.append("\n".join(table(group)) + "\n")
    for name, command in group.commands.items():
        command.fill_in()
        parts.append(f"## {name}\n\n{command.help}\n\n" + "\n".join(table(command)) + "\n")
    return "\n".join([*parts, f"{group.epilog}\n"])


def table(command: Any) -> Iterator[str]:
    """One row a parameter: arguments first, then options, in the order of the help."""
    yield "| parameter | value | default | meaning |"
    yield "|---|---|---|---|"
    panels: dict[str, list[str]] = {"": []}
    for parameter in command.params:
        panels.setdefault(parameter.rich_help_panel or "", []).append(row(parameter))
    for panel, rows in panels.items():
        if panel:
            yield f"| **{panel}** | | | |"
        yield from rows


def row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return cells(f"`{parameter.metavar}`", "", "required", parameter.help)
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return cells(names, "" if parameter.is_flag else f"`{parameter.metavar}`", default(parameter), parameter.help)


def default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if isinstance(value, bool) and parameter.secondary_opts:
        return f"`{(parameter.opts if value else parameter.secondary_opts)[0]}`"
    return "" if value is None or isinstance(value, bool) else str(value)


def cells(*texts: str) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


if __name__ == "__main__":
    script_parser(__doc__).parse_args()
    TARGET.write_text(reference(), encoding="utf-8")
