"""The pass: repair, compress or prune an ONNX model between other passes of Olive.

Source of the interface: Olive 0.13, ``olive/passes/olive_pass.py``.
"""

from __future__ import annotations

from pathlib import Path

from olive.common.config_utils import ParamCategory, validate_config
from olive.data.config import DataConfig
from olive.exception import OlivePassError
from olive.hardware import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.resource_path import LocalFile, LocalFolder

from onnx_asr.data.sources import DataSource
from onnx_asr.errors import OnnxAsrError, OptionError
from onnx_asr.graph.model_io import is_external, save
from onnx_asr.olive.work import Mode, WorseError, library_options, made


class ResuscitatePass(Pass):  # type: ignore[misc]
    """Repair a pruned model, or prune and repair a dense one, with calibration data of Olive or from a path.

    ``mode`` says what to do: "repair" (with ``dense``, the path of the dense model), "compress" or "prune". Besides the
    parameters below it takes the fields of :class:`onnx_asr.RepairOptions`, ``CompressOptions``, ``PruneOptions`` and
    ``ChannelPruneOptions``, under the same names, with the same defaults. A result that is further from the dense model
    than its input is an error, unless ``force`` is set.

    Bad options, models and data are a ``ValueError``, with which Olive ends. A worse result is an ``OlivePassError``:
    in a search Olive goes on with the next point, else it ends without an output model.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        field = "A field of the options class of the mode."
        options = {name: PassConfigParam(type_=kind, description=field) for name, kind in library_options().items()}
        return options | {
            "mode": PassConfigParam(type_=Mode, default_value="repair", description="What to do with the model."),
            "dense": PassConfigParam(
                type_=Path | str,
                category=ParamCategory.PATH,
                description="Path of the dense model that a pruned one is repaired towards.",
            ),
            "data_config": PassConfigParam(
                type_=DataConfig | dict, description="Data config of the calibration samples; no labels are needed."
            ),
            "data": PassConfigParam(
                type_=Path | str,
                category=ParamCategory.DATA,
                description="In its place: a folder of images, an .npz or an .npy, as on our command line.",
            ),
            "preset": PassConfigParam(type_=str, description="Preprocessing of images by name, such as imagenet."),
            "preprocessing": PassConfigParam(type_=dict, description="Fields of onnx_asr.Preprocessing to set."),
            "refit": PassConfigParam(type_=dict, description="Fields of onnx_asr.RefitRecipe to set."),
            "force": PassConfigParam(
                type_=bool,
                default_value=False,
                description="Keep a result that is further from the dense model than the input, and accept a dense "
                "model with more zeros than the pruned one.",
            ),
            "providers": PassConfigParam(
                type_=list, description="Execution providers of onnxruntime to calibrate with; the CPU by default."
            ),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        if not isinstance(model, ONNXModelHandler):
            what = type(model).__name__
            raise ValueError(f"ResuscitatePass got a {what}: put a pass that converts to ONNX before it")
        source, target = Path(model.model_path), Path(resolve_onnx_path(output_model_path))
        external = is_external(str(source))
        try:
            save(made(source, config.model_dump(), _samples(config)), target, external_data=external)
        except WorseError as error:
            raise OlivePassError(f"ResuscitatePass: {error}") from error
        except OnnxAsrError as error:
            raise ValueError(f"ResuscitatePass: {error}") from error
        if external:
            return ONNXModelHandler(LocalFolder({"path": target.parent}), onnx_file_name=target.name)
        return ONNXModelHandler(LocalFile({"path": target}))


def _samples(config: BasePassConfig) -> DataSource | None:
    """The samples: a path, or a loader that Olive makes."""
    if config.data_config is None:
        return None if config.data is None else str(config.data)
    if config.data is not None:
        raise OptionError("data_config and data both say where samples come from: give one of them")
    loader: DataSource = validate_config(config.data_config, DataConfig).to_data_container().create_dataloader()
    return loader
