"""Repair pruned ONNX vision networks: no retraining, no labels, no PyTorch.

Names are imported when they are asked for, so that the command line's help does not wait for onnxruntime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnx_asr.ownership import check_owner
from onnx_asr.version import __version__

if TYPE_CHECKING:
    from onnx_asr.data import Preprocessing
    from onnx_asr.engine.session import Runtime
    from onnx_asr.graph.model_io import save
    from onnx_asr.measuring.evaluation import evaluate
    from onnx_asr.measuring.inspection import Inspection, inspect
    from onnx_asr.networks.execution import Execution
    from onnx_asr.networks.latency import Latency, measure_latency
    from onnx_asr.pruning.budget import Budget
    from onnx_asr.pruning.channels import ChannelPruneResult, prune_channels
    from onnx_asr.pruning.compression import CompressOptions, CompressResult, compress
    from onnx_asr.pruning.sensitivity import SensitivityResult, sensitivity
    from onnx_asr.pruning.shrinking import ShrinkResult, shrink
    from onnx_asr.pruning.zeros import PruneResult, prune
    from onnx_asr.repairing.options import RefitRecipe, RepairOptions
    from onnx_asr.repairing.pipeline import repair
    from onnx_asr.repairing.result import RepairResult
    from onnx_asr.sweeping import SweepGrid, SweepResult, SweepSettings, sweep

_HOME = {
    "Budget": "pruning.budget",
    "ChannelPruneResult": "pruning.channels",
    "CompressOptions": "pruning.compression",
    "CompressResult": "pruning.compression",
    "Execution": "networks.execution",
    "Inspection": "measuring.inspection",
    "Latency": "networks.latency",
    "Preprocessing": "data",
    "PruneResult": "pruning.zeros",
    "RefitRecipe": "repairing.options",
    "RepairOptions": "repairing.options",
    "RepairResult": "repairing.result",
    "Runtime": "engine.session",
    "SensitivityResult": "pruning.sensitivity",
    "ShrinkResult": "pruning.shrinking",
    "SweepGrid": "sweeping",
    "SweepResult": "sweeping",
    "SweepSettings": "sweeping",
    "compress": "pruning.compression",
    "evaluate": "measuring.evaluation",
    "inspect": "measuring.inspection",
    "measure_latency": "networks.latency",
    "prune": "pruning.zeros",
    "prune_channels": "pruning.channels",
    "repair": "repairing.pipeline",
    "save": "graph.model_io",
    "sensitivity": "pruning.sensitivity",
    "shrink": "pruning.shrinking",
    "sweep": "sweeping",
}

__all__ = [
    "Budget",
    "ChannelPruneResult",
    "CompressOptions",
    "CompressResult",
    "Execution",
    "Inspection",
    "Latency",
    "Preprocessing",
    "PruneResult",
    "RefitRecipe",
    "RepairOptions",
    "RepairResult",
    "Runtime",
    "SensitivityResult",
    "ShrinkResult",
    "SweepGrid",
    "SweepResult",
    "SweepSettings",
    "__version__",
    "compress",
    "evaluate",
    "inspect",
    "measure_latency",
    "prune",
    "prune_channels",
    "repair",
    "save",
    "sensitivity",
    "shrink",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    check_owner()
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
