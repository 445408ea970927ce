"""Commands that prepare the pipelines of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from onnx_asr.cli.outcome import DONE, Inputs, Outputs
from onnx_asr.cli.terminal import Terminal


def olive_config(
    *,
    output: Annotated[
        str, Parameter(name=("--output", "-o"), help='Where to write the configuration; "-" for standard output.')
    ],
    base: Annotated[
        str | None, Parameter(help="A package configuration to add to; by default that of the installed Olive.")
    ] = None,
    terminal: Terminal = Terminal(),
) -> int:
    """Write a package configuration for `olive run --package-config`: that of Olive, with ResuscitatePass added."""
    from json import dumps

    from onnx_asr.olive.package import NAME, own_configuration, with_pass

    outputs = Outputs.of(terminal, Inputs(tables={"--base": base}), table=output)
    source = own_configuration() if base is None else Path(base)
    values = with_pass(source)
    outputs.places["--output"].write((dumps(values, indent=2) + "\n").encode())
    counted = f"{len(values['passes'])} passes, {NAME} among them"
    result = {"base": source, "output": output, "passes": len(values["passes"])}
    outputs.terminal.result(result, f"{counted}; from {source}", f"written: {output}")
    return DONE
