"""A drawing of the sensitivities: the effect on the outputs of pruning each layer alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation

from onnx_asr.pruning.sensitivity import SensitivityResult
from onnx_asr.report.figures import SMALL, TEXT, write_figure

_CELL_WIDTH, _CELL_HEIGHT, _MARGINS = 0.62, 0.24, (4.2, 1.1)  # inches
_LONGEST = 36  # characters of a layer's name, from its end
_LEAST = 1e-6  # of the distances that colours distinguish
_DARK = 0.55  # of the colour scale: white text from here on


def write_sensitivity(result: SensitivityResult, path: Path) -> Path:
    """Draw the table into a .svg or .png file.

    Raises:
        OutputError: When it cannot be written.
    """
    return write_figure(draw(result), path)


def draw(result: SensitivityResult) -> Figure:
    """One row per layer, one column per sparsity, the distance as colour and number; infinite ones stay white."""
    distances = np.array([[item.distance for item in layer.tried] for layer in result.layers])
    rows, columns = distances.shape
    finite = np.maximum(np.where(np.isfinite(distances), distances, np.nan), _LEAST)
    lowest = np.nanmin(finite, initial=1.0)
    scale = LogNorm(lowest, max(np.nanmax(finite, initial=lowest), 10 * lowest))
    size = _MARGINS[0] + _CELL_WIDTH * columns, _MARGINS[1] + _CELL_HEIGHT * rows
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(finite, cmap="YlOrRd", norm=scale, aspect="auto")
    for row, column in np.ndindex(rows, columns):
        dark = np.isfinite(finite[row, column]) and scale(finite[row, column]) > _DARK
        colour = "white" if dark else "black"
        text = f"{distances[row, column]:.2g}"
        axis.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=colour, parse_math=False)
    names = [layer.name if len(layer.name) <= _LONGEST else f"…{layer.name[1 - _LONGEST :]}" for layer in result.layers]
    axis.set_yticks(range(rows), names, fontsize=SMALL, parse_math=False)
    axis.set_xticks(range(columns), [f"{share:g}" for share in result.sparsities], fontsize=SMALL)
    axis.set_xlabel("sparsity of the layer", fontsize=TEXT)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, shrink=min(1.0, 20 / rows), format=LogFormatterSciNotation())
    bar.set_label(f"{result.distance_name}, each layer alone", fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    return figure
