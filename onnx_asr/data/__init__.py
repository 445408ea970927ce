"""Calibration and evaluation data: images, arrays and feeds, made ready for a model's inputs."""

from onnx_asr.data.datasets import Dataset, sample_indices
from onnx_asr.data.preprocessing import PRESETS, InputSpec, Preprocessing
from onnx_asr.data.sources import open_data

__all__ = ["PRESETS", "Dataset", "InputSpec", "Preprocessing", "open_data", "sample_indices"]
