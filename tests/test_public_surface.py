"""The names that `import onnx_asr` offers, and how its functions are called: a change of any of these is a decision."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import onnx_asr

NAMES = {
    *("Bars", "CheckResult", "check"),
    *("ChannelPruneOptions", "ChannelPruneResult", "CompressOptions", "CompressResult", "DataError", "Dataset"),
    *("DetectorOptions",),
    *("Execution", "Fidelity", "Inspection", "Latency", "ModelError", "OnnxAsrError", "OptionError", "OutputError"),
    *("PRESETS", "PointReport", "Preprocessing", "PruneOptions", "PruneResult", "RefitRecipe", "RepairOptions"),
    *("RepairResult", "Runtime", "SensitivityOptions", "SensitivityResult", "ShrinkResult", "Skip", "StructureError"),
    *("SweepGrid", "SweepResult", "SweepSettings", "Verification", "__version__", "compress", "evaluate", "inspect"),
    *("load", "measure_latency", "open_data", "plain", "prune", "prune_channels", "repair", "save", "sensitivity"),
    *("MetricSamples", "shrink", "sweep"),
}
SIGNATURES = {
    "check": "model, bars, fidelity=None",
    "compress": "model, data, options=None, *, preprocessing=None, input_shapes=None, execution=None",
    "evaluate": "model, data, *, dense=None, force=False, preprocessing=None, labels=None, label_offset=0, "
    "samples=None, seed=0, batch_size=None, metric=None, detector=None, execution=None",
    "inspect": "model, data=None, *, dense=None, target=None, force=False, preprocessing=None, samples=128, seed=0, "
    "batch_size=None, input_shapes=None, execution=None",
    "load": "source, *, external_links=False",
    "measure_latency": "dense, pruned, *, input_shapes=None, seconds=3.0, execution=None",
    "open_data": "source, inputs, *, preprocessing=None, labels=None, skip_bad_images=False, most=None",
    "plain": "value",
    "prune": "model, data=None, options=None, *, preprocessing=None, input_shapes=None, execution=None",
    "prune_channels": "model, options=None, *, input_shapes=None, execution=None",
    "repair": "model, data, options=None, *, dense=None, force=False, preprocessing=None, execution=None",
    "save": "model, path, *, external_data=False",
    "sensitivity": "model, data, options=None, *, preprocessing=None, execution=None",
    "shrink": "model, *, input_shapes=None, execution=None",
    "sweep": "model, data, grid=None, settings=None, *, preprocessing=None, test=None, labels=None, results=None, "
    "workers=1, cluster=None, execution=None",
}
STUB = Path(onnx_asr.__file__).with_suffix(".pyi").read_text(encoding="utf-8")


def run(code: str) -> str:
    """What a script prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_names() -> None:
    assert set(onnx_asr.__all__) == NAMES
    assert len(onnx_asr.__all__) == len(NAMES)
    assert set(dir(onnx_asr)) == NAMES
    for name in NAMES:
        assert getattr(onnx_asr, name) is not None
    with pytest.raises(AttributeError, match="'repairs'"):
        onnx_asr.repairs  # noqa: B018


def test_names_hide_no_module() -> None:
    """Whoever imports a module of such a name would replace the function."""
    package = Path(onnx_asr.__file__).parent
    assert NAMES.isdisjoint({path.stem for path in package.iterdir()})


def test_type_checkers_see_the_same() -> None:
    declared = {}
    for node in ast.parse(STUB).body[1:]:
        assert isinstance(node, ast.ImportFrom)
        for item in node.names:
            assert item.asname == item.name  # which makes it public
            declared[item.name] = str(node.module)
    assert declared.keys() == NAMES
    for name, home in declared.items():
        assert getattr(onnx_asr, name) is getattr(import_module(home), name)


def text(signature: inspect.Signature) -> str:
    """Names, order and defaults, without types."""
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


def test_signatures() -> None:
    functions = {name for name in NAMES if inspect.isfunction(getattr(onnx_asr, name))}
    assert {name: text(inspect.signature(getattr(onnx_asr, name))) for name in functions} == SIGNATURES


def test_options_of_every_function_have_defaults_or_say_what_is_missing() -> None:
    for options in (onnx_asr.PruneOptions, onnx_asr.ChannelPruneOptions, onnx_asr.CompressOptions):
        with pytest.raises(onnx_asr.OptionError, match="sparsity is missing: give the share"):
            options()
    for options in (onnx_asr.RepairOptions, onnx_asr.SensitivityOptions, onnx_asr.SweepGrid, onnx_asr.SweepSettings):
        assert options() == options()


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("prune", (0.5,), "the data are 0.5: give samples, or none, and options=PruneOptions"),
        ("prune", (onnx_asr.PruneOptions(0.5),), "the data are PruneOptions"),
        ("prune", (None, 0.5), "the options are 0.5: give options=PruneOptions"),
        ("prune_channels", (0.5,), "the options are 0.5: give options=ChannelPruneOptions"),
        ("compress", (0.5,), "the data are 0.5: give samples, or none, and options=CompressOptions"),
        ("sensitivity", (0.5,), "the data are 0.5: give samples, or none, and options=SensitivityOptions"),
        ("repair", (onnx_asr.RepairOptions(),), "the data are RepairOptions"),
        ("repair", ("images", "refit"), "the options are 'refit': give options=RepairOptions"),
    ],
)
def test_arguments_in_the_wrong_place_are_named(function: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(onnx_asr.OptionError, match=re.escape(message)):
        getattr(onnx_asr, function)("model.onnx", *arguments)


def test_errors_have_one_base() -> None:
    with pytest.raises(onnx_asr.OnnxAsrError):
        onnx_asr.prune("missing.onnx", options=onnx_asr.PruneOptions(0.5))
    for name in NAMES:
        if name.endswith("Error"):
            assert issubclass(getattr(onnx_asr, name), onnx_asr.OnnxAsrError)


@pytest.mark.parametrize(
    "code",
    [
        "import onnx_asr",
        "import onnx_asr; onnx_asr.OnnxAsrError, onnx_asr.plain",
        "import onnx_asr; onnx_asr.PruneOptions(0.5), onnx_asr.RepairOptions(), onnx_asr.SweepGrid()",
    ],
)
def test_names_and_options_are_there_without_heavy_libraries(code: str) -> None:
    heavy = "{'numpy', 'onnx', 'onnxruntime', 'PIL', 'matplotlib', 'dask'}"
    assert run(f"{code}\nimport sys\nprint(sorted({heavy} & sys.modules.keys()))") == "[]\n"
