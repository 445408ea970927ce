"""Olive's package configuration, which names the passes there are, with ours among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnx_asr.errors import DataError, OptionError

NAME = "ResuscitatePass"
ENTRY: Mapping[str, Any] = {
    "module_path": f"onnx_asr.olive.{NAME}",
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["*"],
    "supported_algorithms": [],
    "supported_quantization_encodings": [],
    "dataset": "dataset_optional",
    "module_dependencies": ["onnx-resuscitate"],
}
"""What Olive wants to know about a pass."""


def own_configuration() -> Path:
    """The configuration that the installed Olive uses where none is given; Olive is not imported.

    Raises:
        OptionError: When Olive is not installed.
    """
    spec = find_spec("olive")
    folders = [] if spec is None else spec.submodule_search_locations or []
    found = [file for file in (Path(folder) / "olive_config.json" for folder in folders) if file.is_file()]
    if not found:
        raise OptionError(
            "Olive is not installed here, so its own package configuration cannot be read: pip install "
            "'onnx-resuscitate[olive]', or name a configuration with --base"
        )
    return found[0]


def with_pass(base: Path) -> dict[str, Any]:
    """A package configuration with our pass added, or brought up to date; Olive takes names in any case.

    Raises:
        DataError: When the file is no package configuration.
    """
    try:
        values = json.loads(base.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read '{base}': {error.strerror}; check the path and its permissions") from error
    except ValueError as error:
        raise DataError(f"'{base}' is not JSON ({error}): give a package configuration of Olive") from error
    passes = values.get("passes") if isinstance(values, dict) else None
    if not isinstance(passes, dict):
        raise DataError(f"'{base}' is no package configuration of Olive: it has no object named 'passes'")
    others = {name: entry for name, entry in passes.items() if name.lower() != NAME.lower()}
    return {**values, "passes": {**others, NAME: dict(ENTRY)}}
