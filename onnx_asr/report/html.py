"""Lays out the values of a report as one HTML file that contains its styles and figures."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from onnx_asr.files.outputs import size_text, write_text
from onnx_asr.report.figures import heat_map, strip, svg
from onnx_asr.report.sweep_figure import draw


def write_report(values: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a report, whole or not at all.

    Raises:
        OutputError: When it cannot be written.
    """
    return write_text(render(values), path)


def render(values: Mapping[str, Any]) -> str:
    """The page; all text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share: "" if share is None else f"{share:.1%}",
        "number": lambda value: "" if value is None else f"{value:.3g}",
        "short": lambda value: "" if value is None else f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}",
        "size": size_text,
        "text": _text,
        "base64": lambda drawing: base64.b64encode(drawing.encode()).decode(),
    }
    template, figures = ("sweep", _curves) if values["command"] == "sweep" else ("report", _channels)
    return environment.get_template(f"{template}.html.j2").render(values, figures=figures(values))


def _curves(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of a sweep and their captions: one per panel, so that each fits a phone."""
    name, label = values["measure"]["name"], values["measure"]["label"]
    return [
        (svg(draw([panel], name, values["dense"][name])), f"{panel['title']}: {label}") for panel in values["panels"]
    ]


def _channels(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of the layers that were measured, and their captions."""
    layers = values["layers"]
    shown = [version["name"] for version in values["versions"] if version["name"] != "dense"]
    names = {
        key: name
        for key, name in zip(("before", "after"), shown, strict=False)
        if any(layer[key] is not None for layer in layers)
    }
    if not names:
        return []
    return [
        (
            strip(layers, names, values["collapsed_ratio"]),
            "Variance of every channel, relative to the dense network. On the solid line it is the same as in the "
            "dense network; left of the dotted line the channel counts as collapsed.",
        ),
        (
            heat_map(layers, names),
            "The same ratios as colours: white is the same as in the dense network, red weaker, blue stronger, grey "
            "where the layer does not vary at all. The channels of each layer are sorted.",
        ),
    ]


def _text(value: Any) -> str:
    """A value as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
