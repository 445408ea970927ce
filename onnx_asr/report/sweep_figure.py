"""The curves of a sweep: the score of every method against the share pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from onnx_asr.report.figures import SMALL, TEXT, WIDTH, write_figure
from onnx_asr.report.sweep_data import MEASURES, PATTERNS, panels
from onnx_asr.sweeping.result import SweepResult

_NARROW, _HEIGHT = 2.2, 3.7  # inches, of a panel
_STYLES = {
    "none": ("#c2410c", "o", "no repair"),
    "bn": ("#a16207", "v", "bn"),
    "raw": ("#db2777", "<", "raw"),
    "layerwise": ("#0891b2", ">", "layerwise"),
    "asr": ("#7c3aed", "^", "asr"),
    "paired": ("#60a5fa", "s", "paired"),
    "refit": ("#1d4ed8", "D", "refit"),
    "auto": ("#1c1917", "x", "auto"),
    "compress": ("#15803d", "P", "compress"),
}
_DENSE = "0.35"
_SHARES, _WITH_DENSE = ("top1", "agreement"), ("top1", "metric")
_APART = 0.08  # between the methods at one N:M pattern


def write_plot(result: SweepResult, path: Path) -> Path:
    """Write the figure as SVG or PNG, by the suffix of the file.

    Raises:
        OutputError: When it cannot be written.
    """
    return write_figure(draw(panels(result), result.measure, getattr(result.dense, result.measure)), path)


def draw(shown: Sequence[Mapping[str, Any]], measure: str, dense: float | None) -> Figure:
    """Panels side by side on one scale."""
    widths = [_NARROW if panel["title"] == PATTERNS and len(shown) > 1 else WIDTH for panel in shown]
    figure = Figure(figsize=(sum(widths), _HEIGHT), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axis, panel in zip(axes, shown, strict=True):
        _panel(axis, panel, measure, dense, titled=len(shown) > 1)
    axes[0].set_ylabel(MEASURES[measure], fontsize=TEXT)
    methods = [name for name in _STYLES if any(name in panel["curves"] for panel in shown)]
    handles = [_handle(name) for name in methods]
    if measure in _WITH_DENSE:
        handles.insert(0, Line2D([], [], color=_DENSE, linestyle="--", linewidth=1.2, label="dense"))
    columns = min(len(handles), max(3, 3 * len(shown)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=TEXT)
    return figure


def _panel(axis: Axes, panel: Mapping[str, Any], measure: str, dense: float | None, titled: bool) -> None:
    scale = 100.0 if measure in _SHARES else 1.0
    fixed = panel["title"] == PATTERNS
    if measure in _WITH_DENSE and dense is not None:
        axis.axhline(scale * dense, color=_DENSE, linestyle="--", linewidth=1.2)
    line, step = ("none", _APART) if fixed else ("-", 0.0)
    middle = (len(panel["curves"]) - 1) / 2
    for number, (method, values) in enumerate(panel["curves"].items()):
        shift = step * (number - middle)
        known = [(x + shift, scale * y) for x, y in zip(panel["x"], values, strict=True) if y is not None]
        colour, marker, _ = _STYLES[method]
        axis.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.6, linestyle=line)
    axis.set_xticks(panel["x"], panel["labels"])
    axis.set_xlabel("pattern" if fixed else "pruned (log scale of what is left)", fontsize=TEXT)
    if fixed:
        axis.set_xlim(-0.6, len(panel["x"]) - 0.4)
    if measure in _SHARES:
        axis.set_ylim(0, 104)
        axis.yaxis.set_major_formatter("{x:.0f}%")
    if titled and not fixed:
        axis.set_title(panel["title"], fontsize=TEXT)
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=SMALL, length=2)
    axis.spines[["top", "right"]].set_visible(False)


def _handle(method: str) -> Line2D:
    colour, marker, label = _STYLES[method]
    return Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.6, label=label)
