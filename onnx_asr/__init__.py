"""Repair pruned ONNX vision networks: no retraining, no labels, no PyTorch."""

from onnx_asr.model_io import save
from onnx_asr.pruning import PruneResult, prune
from onnx_asr.repair import RepairOptions, RepairResult, repair
from onnx_asr.version import __version__

__all__ = ["PruneResult", "RepairOptions", "RepairResult", "__version__", "prune", "repair", "save"]
