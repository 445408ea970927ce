"""One self-contained HTML file about what a command did; jinja2 and matplotlib are needed for it and nothing else."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from onnx_asr.errors import OptionError
from onnx_asr.model_io import check_writable
from onnx_asr.ownership import DISTRIBUTION

_NEEDED = ("jinja2", "matplotlib")


def check_report(path: str | os.PathLike[str], output: Path | None) -> Path:
    """Where a report goes, after making sure, before any work is done, that one can be made and written there.

    Raises:
        OptionError: When a library is missing, or the report would replace the result.
        OutputError: When no file can be written there.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"--report needs {' and '.join(missing)}, which this environment does not have: "
            f"pip install {DISTRIBUTION}[report]"
        )
    target = check_writable(path)
    if output is not None and target.resolve() == output.resolve():
        raise OptionError(f"--report and --output both name '{target}': give the report a file of its own")
    return target
