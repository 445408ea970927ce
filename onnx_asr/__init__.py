"""Repair pruned ONNX vision networks: no retraining, no labels, no PyTorch.

The public names are those of ``__init__.pyi``. Each is imported when it is first used, so that the command line's help
does not wait for onnxruntime.
"""

from __future__ import annotations

import re
from importlib import import_module
from pkgutil import get_data
from typing import Any

from onnx_asr.ownership import check_owner
from onnx_asr.version import __version__ as __version__

_STUB = (get_data(__name__, "__init__.pyi") or b"").decode()
_HOMES = {name: home for home, name in re.findall(r"^from (\S+) import \w+ as (\w+)$", _STUB, re.MULTILINE)}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    check_owner()
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
