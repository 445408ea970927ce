"""Repair pruned ONNX vision networks: no retraining, no labels, no PyTorch.

Names are imported when they are asked for, so that the command line's help does not wait for onnxruntime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnx_asr.ownership import check_owner
from onnx_asr.version import __version__

if TYPE_CHECKING:
    from onnx_asr.budget import Budget
    from onnx_asr.channel_pruning import ChannelPruneResult, prune_channels
    from onnx_asr.compression import CompressOptions, CompressResult, compress
    from onnx_asr.data import Preprocessing
    from onnx_asr.engine.latency import Latency
    from onnx_asr.engine.session import Runtime
    from onnx_asr.evaluation import evaluate
    from onnx_asr.inspection import Inspection, inspect
    from onnx_asr.latency import measure_latency
    from onnx_asr.layer_sensitivity import SensitivityResult, sensitivity
    from onnx_asr.model_io import save
    from onnx_asr.networks import Execution
    from onnx_asr.options import RefitRecipe, RepairOptions
    from onnx_asr.pruning import PruneResult, prune
    from onnx_asr.repairing import repair
    from onnx_asr.result import RepairResult
    from onnx_asr.shrinking import ShrinkResult, shrink
    from onnx_asr.sweeping import SweepGrid, SweepResult, SweepSettings, sweep

_HOME = {
    "Budget": "budget",
    "ChannelPruneResult": "channel_pruning",
    "CompressOptions": "compression",
    "CompressResult": "compression",
    "Execution": "networks",
    "Inspection": "inspection",
    "Latency": "engine.latency",
    "Preprocessing": "data",
    "PruneResult": "pruning",
    "RefitRecipe": "options",
    "RepairOptions": "options",
    "RepairResult": "result",
    "Runtime": "engine.session",
    "SensitivityResult": "layer_sensitivity",
    "ShrinkResult": "shrinking",
    "SweepGrid": "sweeping",
    "SweepResult": "sweeping",
    "SweepSettings": "sweeping",
    "compress": "compression",
    "evaluate": "evaluation",
    "inspect": "inspection",
    "measure_latency": "latency",
    "prune": "pruning",
    "prune_channels": "channel_pruning",
    "repair": "repairing",
    "save": "model_io",
    "sensitivity": "layer_sensitivity",
    "shrink": "shrinking",
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
