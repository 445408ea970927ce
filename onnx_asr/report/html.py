"""A report's values laid out as one HTML file that needs nothing else: styles and figures are in it."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from onnx_asr.graph.files import size_text, write_text
from onnx_asr.report.figures import heat_map, strip
from onnx_asr.report.sweep_figure import draw_svg

_FOLDER = Path(__file__).parent


def write_report(values: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a report, whole or not at all.

    Raises:
        OutputError: When it cannot be written.
    """
    return write_text(render(values), path)


def render(values: Mapping[str, Any]) -> str:
    """The page; every text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
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
    }
    template, figures = ("sweep", _curves) if values["command"] == "sweep" else ("report", _channels)
    return environment.get_template(f"{template}.html.j2").render(values, figures=figures(values))


def _curves(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures of a sweep: one a panel, so that each fits a phone."""
    measure = values["measure"]
    return [
        _figure(
            draw_svg([panel], measure["name"], values["dense"][measure["name"]]),
            f"{panel['title']}: {measure['label']}",
        )
        for panel in values["panels"]
    ]


def _channels(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures that the measured layers give."""
    layers = values["layers"]
    measured = [key for key in ("before", "after") if any(layer[key] is not None for layer in layers)]
    if not measured:
        return []
    shown = [version["name"] for version in values["versions"] if version["name"] != "dense"]
    names = dict(zip(("before", "after"), shown, strict=False))
    names = {key: names[key] for key in measured}
    drawn = [
        (
            strip(layers, names, values["collapsed_ratio"]),
            "Variance of every channel over its variance in the dense network. On the solid line the channel is as "
            "in the dense network; left of the dotted one it counts as collapsed.",
        ),
        (
            heat_map(layers, names),
            "The same ratios as colours: white as in the dense network, red weaker, blue stronger, grey where the "
            "layer does not vary at all. The channels of a layer are sorted.",
        ),
    ]
    return [_figure(svg, caption) for svg, caption in drawn]


def _figure(svg: str, caption: str) -> dict[str, str]:
    """A figure as a data URI."""
    return {"source": f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}", "caption": caption}


def _text(value: Any) -> str:
    """A plain value for a reader."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
