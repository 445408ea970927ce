"""Write docs/options.md: every command and option, as the command line itself declares them.

python -m tools.docs.options_reference
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx_asr.cli.app import EXIT_CODES, program
from onnx_asr.cli.command import COMMANDS
from onnx_asr.cli.options import Option
from tools.arguments import script_parser
from tools.paths import ROOT

TARGET = ROOT / "docs" / "options.md"
HEAD = """# Options

All commands and their options. Written by `python -m tools.docs.options_reference` from the declarations that `--help`
shows; a test fails where it is out of date.
"""


def reference() -> str:
    parts = [HEAD, "`onnx-resuscitate [options] COMMAND ...`: " + ", ".join(f"[{name}](#{name})" for name in COMMANDS)]
    parts = ["\n".join(parts) + "\n", table(program().options)]
    parts += [f"## {name}\n\n{command.summary}\n\n{table(command.options)}" for name, command in COMMANDS.items()]
    return "\n".join([*parts, f"{EXIT_CODES}\n"])


def table(options: Sequence[Option]) -> str:
    """One row per option, by panel as in the help."""
    rows = ["| option | value | default | meaning |", "|---|---|---|---|"]
    titles = dict.fromkeys(["Arguments", "Options", *(option.panel for option in options)])
    for title in titles:
        found = [row(option) for option in options if option.panel == title]
        if found and title not in ("Arguments", "Options"):
            rows.append(f"| **{title}** | | | |")
        rows += found
    return "\n".join(rows) + "\n"


def row(option: Option) -> str:
    names = [option.metavar] if option.is_argument else sorted(option.names, key=len)
    if option.kind == "pair":
        names.append(f"--no-{names[0].removeprefix('--')}")
    value = f"`{option.metavar}`" if option.metavar and not option.is_argument else ""
    default = "required" if option.required else option.shown_default
    cells = ", ".join(f"`{name}`" for name in names), value, default, option.help
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    script_parser(__doc__).parse_args()
    TARGET.write_text(reference(), encoding="utf-8")
