"""The results file: finished cells and the conditions that their scores depend on, rewritten after each cell."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx_asr.errors import OutputError
from onnx_asr.files.outputs import Destination, write_text
from onnx_asr.json_values import plain
from onnx_asr.repairing.options import flattened
from onnx_asr.sweeping.grid import Cell
from onnx_asr.sweeping.result import Outcome, SweepResult, cell_from

_KIND = "onnx-resuscitate sweep"
_FEW, _LONG = 3, 24  # differences listed in an error, and characters of a value in it


class ResultsFile:
    """A results file.

    Attributes:
        keeps: Whether it can be replaced after every cell and read again; False for a device or a pipe.

    Raises:
        OutputError: When the file exists but is not a results file, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        destination = Destination.of(path, text=True)
        self.keeps = destination.file is not None
        self._path = destination.path
        self._conditions, self._cells = _read(self._path) if self.keeps else (None, {})

    def finished(self, conditions: Mapping[str, Any]) -> dict[Cell, Outcome]:
        """The cells that earlier runs finished under the same conditions, whatever their grid, without failed ones.

        Raises:
            OutputError: When they ran under other conditions.
        """
        if self._conditions is None:
            return {}
        there, now = (flattened(values) for values in (self._conditions, plain(conditions)))
        differing = [name for name in sorted({*there, *now}) if there.get(name) != now.get(name)]
        if differing:
            differing.sort(key=lambda name: name.endswith("sha256"))  # readable values first
            listed = "; ".join(
                f"{name} is {_short(there.get(name))} there, {_short(now.get(name))} now" for name in differing[:_FEW]
            )
            more = f"; and {len(differing) - _FEW} more" if len(differing) > _FEW else ""
            raise OutputError(
                f"'{self._path}' holds the cells of another sweep ({listed}{more}): give another file with --output, "
                "or remove this one"
            )
        return {cell: outcome for cell, outcome in self._cells.items() if outcome.error is None}

    def write(self, result: SweepResult) -> None:
        """Replace the file, or write into the device or pipe.

        Raises:
            OutputError: When it cannot be written; it then stays as it was.
        """
        write_text(json.dumps({"kind": _KIND, **plain(result)}, indent=1, allow_nan=False) + "\n", self._path)


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[Cell, Outcome]]:
    """Conditions and cells that a file holds; without a file, none."""
    if not path.exists():
        return None, {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["kind"] != _KIND or not isinstance(values["conditions"], dict):
            raise ValueError("it is of another kind")
        return values["conditions"], dict(map(cell_from, values["cells"]))
    except OSError as error:
        raise OutputError(f"cannot read '{path}': {error.strerror}; give another file with --output") from error
    except (ValueError, KeyError, TypeError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise OutputError(
            f"'{path}' exists and is not the results file of a sweep, so it is not replaced: give another file with "
            "--output"
        ) from error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."
