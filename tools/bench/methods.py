"""Repair methods by a short text: "paired", or "paired:reliability_power=0.25,bn=ema"."""

from __future__ import annotations

import ast
from dataclasses import fields
from typing import Any

from onnx_asr.repairing.options import RefitRecipe, RepairOptions


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Split "name" or "name:key=value,key=value" into the name and its options."""
    method, _, rest = text.partition(":")
    overrides: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        try:
            overrides[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[key] = value
    return method, overrides


def recipe_of(overrides: dict[str, Any]) -> RefitRecipe:
    """Remove the fields of the refit recipe from a method's options; return the recipe."""
    parts = {item.name for item in fields(RefitRecipe)} - {"seed"}
    return RefitRecipe(**{key: overrides.pop(key) for key in list(overrides) if key in parts})


def method_options(text: str, **defaults: Any) -> RepairOptions:
    """Repair options of a method, on top of the defaults."""
    method, overrides = parse_method(text)
    return RepairOptions(**{**defaults, "method": method, "refit": recipe_of(overrides), **overrides})
