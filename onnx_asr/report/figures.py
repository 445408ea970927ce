"""The figures of a report as SVG; layers are numbered as in the table, so that no name of the model appears."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from onnx_asr.arrays import Floats
from onnx_asr.files.outputs import write_bytes, write_text

_LOWEST, _HIGHEST = -4.0, 1.5  # log10 of the variance ratios shown; others are drawn at the edge
WIDTH, _ROW, _ROWS, _MARGIN = 4.6, 0.19, 8.0, 1.05  # inches: narrow enough for a phone, all rows on a printed page
_COLUMNS = 64  # of the heat map: channels sorted by ratio, resampled to this number
_COLOURS = {"before": "#c2410c", "after": "#1d4ed8"}
_RESOLUTION = 140
TEXT, SMALL = 10, 8.5  # points
_LAYERS_LABELLED = 42


def strip(layers: Sequence[Mapping[str, Any]], names: Mapping[str, str], collapsed: float) -> str:
    """Every channel's variance ratio as a dot, one row per layer, after the repair below before it."""
    figure, axes = _figure(len(layers), 1)
    axis = axes[0]
    generator = np.random.default_rng(0)
    offsets = {"before": -0.2, "after": 0.2} if len(names) > 1 else dict.fromkeys(names, 0.0)
    for key, name in names.items():
        label: str | None = name
        for row, layer in enumerate(layers):
            if layer[key] is not None:
                levels = _levels(layer[key]["ratios"])
                height = row + offsets[key] + generator.uniform(-0.16, 0.16, len(levels))
                axis.scatter(
                    levels, height, s=5, alpha=0.45, linewidths=0, color=_COLOURS[key], label=label, rasterized=True
                )
                label = None
    axis.axvline(0.0, color="0.3", linewidth=0.8)
    axis.axvline(np.log10(collapsed), color="0.3", linewidth=0.8, linestyle=":")
    axis.set_xlim(_LOWEST - 0.1, _HIGHEST + 0.1)
    ticks = np.arange(np.ceil(_LOWEST), _HIGHEST + 0.1)
    axis.set_xticks(ticks, ["≤ 0.0001", *(f"{10.0**tick:g}" for tick in ticks[1:])])
    axis.set_xlabel("variance / dense variance", fontsize=TEXT)
    axis.grid(axis="x", color="0.9", linewidth=0.5)
    axis.set_axisbelow(True)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, markerscale=3, fontsize=TEXT)
    return svg(figure)


def heat_map(layers: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """The same ratios as colours, the channels of each layer sorted from weakest to strongest."""
    figure, axes = _figure(len(layers), len(names))
    colours = matplotlib.colormaps["RdBu"].with_extremes(bad="0.75")
    for axis, (key, name) in zip(axes, names.items(), strict=True):
        rows = [np.full(_COLUMNS, np.nan) if layer[key] is None else _resampled(layer[key]) for layer in layers]
        scale = TwoSlopeNorm(0.0, -2.0, 2.0)
        axis.imshow(np.stack(rows), cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
        axis.set_title(name, fontsize=TEXT)
        axis.set_xticks([])
        axis.set_xlabel("channels, sorted", fontsize=TEXT)
    bar = figure.colorbar(axes[-1].images[0], ax=axes, shrink=0.7, pad=0.02)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ 0.01", "0.1", "1", "10", "≥ 100"])
    bar.ax.tick_params(labelsize=SMALL)
    return svg(figure)


def _figure(layers: int, panels: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side, one row per layer, the first at the top."""
    figure = Figure(figsize=(WIDTH, _MARGIN + min(_ROW * max(4, layers), _ROWS)), layout="constrained")
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    step = max(1, -(-layers // _LAYERS_LABELLED))
    for number, axis in enumerate(axes):
        ticks = range(0, layers, step)
        axis.set_yticks(list(ticks), [str(tick + 1) for tick in ticks] if number == 0 else [])
        axis.set_ylim(layers - 0.4, -0.6)
        axis.tick_params(labelsize=SMALL, length=2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("layer", fontsize=TEXT)
    return figure, axes


def _levels(ratios: Sequence[float | None]) -> Floats:
    """log10 of the defined ratios, clipped to the range shown."""
    values = np.array([value for value in ratios if value is not None], np.float64)
    return np.asarray(np.clip(np.log10(np.maximum(values, 10.0 ** (_LOWEST - 1))), _LOWEST, _HIGHEST))


def _resampled(damage: Mapping[str, Any]) -> Floats:
    levels = np.sort(_levels(damage["ratios"]))
    if not len(levels):
        return np.full(_COLUMNS, np.nan)
    return np.asarray(levels[np.arange(_COLUMNS) * len(levels) // _COLUMNS])


def svg(figure: Figure) -> str:
    """SVG that keeps text as text; equal figures give equal bytes."""
    settings = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "onnx-resuscitate"})
    with settings, io.StringIO() as buffer:
        figure.savefig(buffer, format="svg", dpi=_RESOLUTION, metadata={"Date": None, "Creator": None})
        return buffer.getvalue()


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG where the suffix of the path says so, else as SVG.

    Raises:
        OutputError: When it cannot be written.
    """
    if path.suffix != ".png":
        return write_text(svg(figure), path)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=_RESOLUTION)
        return write_bytes(buffer.getvalue(), path)
