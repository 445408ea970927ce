"""Repair pruned ONNX vision networks: no retraining, no labels, no PyTorch.

Names are imported when they are first used, so that the command line's help does not wait for onnxruntime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnx_asr.ownership import check_owner
from onnx_asr.version import __version__

if TYPE_CHECKING:
    from onnx_asr.data import PRESETS as PRESETS
    from onnx_asr.data import Dataset as Dataset
    from onnx_asr.data import Preprocessing as Preprocessing
    from onnx_asr.data import open_data as open_data
    from onnx_asr.engine.session import Runtime as Runtime
    from onnx_asr.errors import DataError as DataError
    from onnx_asr.errors import ModelError as ModelError
    from onnx_asr.errors import OnnxAsrError as OnnxAsrError
    from onnx_asr.errors import OptionError as OptionError
    from onnx_asr.errors import OutputError as OutputError
    from onnx_asr.errors import StructureError as StructureError
    from onnx_asr.graph.model_io import load as load
    from onnx_asr.graph.model_io import save as save
    from onnx_asr.graph.skips import Skip as Skip
    from onnx_asr.json_values import plain as plain
    from onnx_asr.measuring.evaluation import evaluate as evaluate
    from onnx_asr.measuring.inspection import Inspection as Inspection
    from onnx_asr.measuring.inspection import inspect as inspect
    from onnx_asr.networks.execution import Execution as Execution
    from onnx_asr.networks.fidelity import Fidelity as Fidelity
    from onnx_asr.networks.latency import Latency as Latency
    from onnx_asr.networks.latency import measure_latency as measure_latency
    from onnx_asr.pruning.channels import ChannelPruneResult as ChannelPruneResult
    from onnx_asr.pruning.channels import prune_channels as prune_channels
    from onnx_asr.pruning.compression import CompressResult as CompressResult
    from onnx_asr.pruning.compression import compress as compress
    from onnx_asr.pruning.options import ChannelPruneOptions as ChannelPruneOptions
    from onnx_asr.pruning.options import CompressOptions as CompressOptions
    from onnx_asr.pruning.options import PruneOptions as PruneOptions
    from onnx_asr.pruning.options import SensitivityOptions as SensitivityOptions
    from onnx_asr.pruning.sensitivity import SensitivityResult as SensitivityResult
    from onnx_asr.pruning.sensitivity import sensitivity as sensitivity
    from onnx_asr.pruning.shrinking import ShrinkResult as ShrinkResult
    from onnx_asr.pruning.shrinking import shrink as shrink
    from onnx_asr.pruning.zeros import PruneResult as PruneResult
    from onnx_asr.pruning.zeros import prune as prune
    from onnx_asr.repairing.options import RefitRecipe as RefitRecipe
    from onnx_asr.repairing.options import RepairOptions as RepairOptions
    from onnx_asr.repairing.pipeline import repair as repair
    from onnx_asr.repairing.point_report import PointReport as PointReport
    from onnx_asr.repairing.result import RepairResult as RepairResult
    from onnx_asr.repairing.result import Verification as Verification
    from onnx_asr.sweeping.grid import SweepGrid as SweepGrid
    from onnx_asr.sweeping.grid import SweepSettings as SweepSettings
    from onnx_asr.sweeping.pipeline import sweep as sweep
    from onnx_asr.sweeping.result import SweepResult as SweepResult

_NAMES = {
    "data": "PRESETS Dataset Preprocessing open_data",
    "engine.session": "Runtime",
    "errors": "DataError ModelError OnnxAsrError OptionError OutputError StructureError",
    "graph.model_io": "load save",
    "graph.skips": "Skip",
    "json_values": "plain",
    "measuring.evaluation": "evaluate",
    "measuring.inspection": "Inspection inspect",
    "networks.execution": "Execution",
    "networks.fidelity": "Fidelity",
    "networks.latency": "Latency measure_latency",
    "pruning.channels": "ChannelPruneResult prune_channels",
    "pruning.compression": "CompressResult compress",
    "pruning.options": "ChannelPruneOptions CompressOptions PruneOptions SensitivityOptions",
    "pruning.sensitivity": "SensitivityResult sensitivity",
    "pruning.shrinking": "ShrinkResult shrink",
    "pruning.zeros": "PruneResult prune",
    "repairing.options": "RefitRecipe RepairOptions",
    "repairing.pipeline": "repair",
    "repairing.point_report": "PointReport",
    "repairing.result": "RepairResult Verification",
    "sweeping.grid": "SweepGrid SweepSettings",
    "sweeping.pipeline": "sweep",
    "sweeping.result": "SweepResult",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    check_owner()
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
