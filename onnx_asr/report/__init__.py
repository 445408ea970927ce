"""Reports as one self-contained HTML file; only they, and plots, need jinja2 and matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from onnx_asr.errors import OptionError
from onnx_asr.graph.files import check_writable
from onnx_asr.ownership import DISTRIBUTION

_NEEDED = {"--report": ("jinja2", "matplotlib"), "--plot": ("matplotlib",)}
_PLOTS = (".svg", ".png")


def check_report(path: str | os.PathLike[str], output: Path | None) -> Path:
    """The path of a report, checked before any work is done: it can be made, and written there.

    Raises:
        OptionError: When a library is missing, or the report would replace the result.
        OutputError: When no file can be written there.
    """
    return _checked("--report", path, {"--output": output})


def check_plot(path: str | os.PathLike[str], output: Path | None = None, report: Path | None = None) -> Path:
    """The path of a plot, checked in the same way.

    Raises:
        OptionError: When a library is missing, the format is unknown, or the plot would replace another result.
        OutputError: When no file can be written there.
    """
    if Path(path).suffix not in _PLOTS:
        raise OptionError(f"--plot '{path}' is not in a known format: give a name that ends in {' or '.join(_PLOTS)}")
    return _checked("--plot", path, {"--output": output, "--report": report})


def _checked(option: str, path: str | os.PathLike[str], others: Mapping[str, Path | None]) -> Path:
    missing = [name for name in _NEEDED[option] if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"{option} needs {' and '.join(missing)}, which are not installed: pip install {DISTRIBUTION}[report]"
        )
    target = check_writable(path)
    for other, taken in others.items():
        if taken is not None and target.resolve() == taken.resolve():
            raise OptionError(f"{option} and {other} both name '{target}': give each its own file")
    return target
