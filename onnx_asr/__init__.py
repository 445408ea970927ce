"""Repair pruned ONNX vision networks: no retraining, no labels, no PyTorch."""

from onnx_asr.compression import CompressOptions, CompressResult, compress
from onnx_asr.data import Preprocessing
from onnx_asr.evaluation import evaluate
from onnx_asr.model_io import save
from onnx_asr.networks import Execution
from onnx_asr.options import RepairOptions
from onnx_asr.pruning import PruneResult, prune
from onnx_asr.repair import repair
from onnx_asr.result import RepairResult
from onnx_asr.version import __version__

__all__ = [
    "CompressOptions",
    "CompressResult",
    "Execution",
    "Preprocessing",
    "PruneResult",
    "RepairOptions",
    "RepairResult",
    "__version__",
    "compress",
    "evaluate",
    "prune",
    "repair",
    "save",
]
