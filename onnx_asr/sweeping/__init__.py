"""Sweeps: a grid of sparsities, patterns and methods, every cell pruned, repaired and scored on held-out samples."""

from onnx_asr.sweeping.grid import SweepGrid, SweepSettings
from onnx_asr.sweeping.pipeline import sweep
from onnx_asr.sweeping.result import SweepResult

__all__ = ["SweepGrid", "SweepResult", "SweepSettings", "sweep"]
