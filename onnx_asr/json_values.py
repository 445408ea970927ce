"""Results as JSON values."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def key(path: str) -> dict[str, str]:
    """Metadata of a field that JSON has under another name: "a" or, inside of a nested object, "a.b"."""
    return {"json": path}


MERGED = key("")
"""Metadata of a field whose own entries JSON has beside its neighbours."""


def function_name(function: Callable[..., Any]) -> str:
    """Module and name of a function, "module:function"; of an object that can be called, those of its class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def plain(value: Any) -> Any:
    """A result in values that ``json.dumps(..., allow_nan=False)`` takes.

    A dataclass becomes an object: its fields, see :func:`key` and ``MERGED``, without those that have ``repr=False``
    (such as models), and the properties that its class names in ``derived``. Arrays and sequences become lists, paths
    strings, functions their names, numbers that are not finite None, and a mapping whose keys are dataclasses a list of
    objects with the entries of key and value.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return _object(value)
    if isinstance(value, Mapping):
        if any(is_dataclass(name) for name in value):
            return [plain(name) | plain(item) for name, item in value.items()]
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # of numpy
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if callable(value):
        return function_name(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _object(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    names = {field.name: field.metadata.get("json", field.name) for field in fields(value) if field.repr}
    for name, path in (names | {name: name for name in getattr(value, "derived", ())}).items():
        item, target = plain(getattr(value, name)), found
        *outer, last = path.split(".")
        for step in outer:
            target = target.setdefault(step, {})
        if last:
            target[last] = item
        else:
            target |= item
    return found
