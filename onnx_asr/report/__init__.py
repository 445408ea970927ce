"""Reports as one self-contained HTML file; only they, and plots, need jinja2 and matplotlib."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from onnx_asr.errors import OptionError
from onnx_asr.ownership import DISTRIBUTION

_NEEDED = {"--report": ("jinja2", "matplotlib"), "--plot": ("matplotlib",)}
PLOTS = (".svg", ".png")


def check_libraries(option: str) -> None:
    """Make sure that the libraries that an option needs are installed.

    Raises:
        OptionError: When one is missing.
    """
    missing = [name for name in _NEEDED[option] if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"{option} needs {' and '.join(missing)}, which are not installed: pip install {DISTRIBUTION}[report]"
        )


def check_format(plot: str | os.PathLike[str]) -> None:
    """Make sure that the name of a plot says a format; a device or pipe, which has no such name, gets SVG.

    Raises:
        OptionError: When the format is unknown.
    """
    if Path(plot).suffix not in PLOTS and (Path(plot).is_file() or not Path(plot).exists()):
        raise OptionError(f"--plot '{plot}' is not in a known format: give a name that ends in {' or '.join(PLOTS)}")
