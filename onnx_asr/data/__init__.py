"""Calibration and evaluation data: images, arrays and feeds, prepared for a model's inputs.

Names that need numpy and Pillow are imported on first use: the options of the preprocessing do not need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx_asr.data.preprocessing import PRESETS, InputSpec, Preprocessing

if TYPE_CHECKING:
    from onnx_asr.data.datasets import Dataset as Dataset
    from onnx_asr.data.datasets import sample_indices as sample_indices
    from onnx_asr.data.sources import open_data as open_data

__all__ = ["PRESETS", "Dataset", "InputSpec", "Preprocessing", "open_data", "sample_indices"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from onnx_asr.data import datasets, sources

    return getattr(sources if name == "open_data" else datasets, name)
