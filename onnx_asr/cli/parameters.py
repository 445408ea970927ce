"""Options that commands share, each declared once; a group is one argument of a command, and one panel of its help.

Nothing heavy is imported here, so that help is quick. An option whose default is None is left to the pipeline's own.
Names in braces in a help text (``{methods}``) are filled in when the help is shown, see ``binding.Command``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from onnx_asr.cli.supervision import native_call
from onnx_asr.cli.values import byte_count, input_shapes, names, number_or_name, numbers, share_or_bytes
from onnx_asr.errors import OptionError

if TYPE_CHECKING:
    from onnx_asr.data import Preprocessing
    from onnx_asr.engine.session import Runtime
    from onnx_asr.networks.execution import Execution, Progress
    from onnx_asr.networks.latency import Stopwatch
    from onnx_asr.repairing.options import RepairOptions

_REFIT_PREFIX = "refit_"
METHOD_PANEL = "Method"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model, an .onnx file.")]
DenseArgument = Annotated[str, typer.Argument(metavar="DENSE", help="The dense model, an .onnx file.")]
Pruned = Annotated[str, typer.Argument(metavar="PRUNED", help="The pruned model, an .onnx file.")]
Output = Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Where to write the result.")]
Dense = Annotated[
    str | None, typer.Option(metavar="FILE", help="The dense model: what the pruned one is compared with.")
]
Data = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        help="A folder of images; an .npz with 'images' (uint8, N,H,W,C), perhaps 'labels'; or an .npz or .npy of "
        "ready tensors named after the model's inputs.",
    ),
]
Sparsity = Annotated[float | None, typer.Option(metavar="S", help="Share of weights to prune, 0 <= S < 1.")]
Pattern = Annotated[
    str,
    typer.Option(
        metavar="unstructured|N:M|Nx1",
        help="N:M keeps N of every M consecutive input channels, as 2:4, and leaves --sparsity out; Nx1 prunes N "
        "consecutive output channels together at each input position, as 4x1.",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="One of {methods}; auto tries several and keeps the one closest to the dense model.",
        rich_help_panel=METHOD_PANEL,
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(
        metavar="global|layer|erk|sensitivity",
        help="Rank over the whole net (the default for weights), or in each layer (for channels); erk spares small "
        "layers; sensitivity tries every layer on --data.",
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What a weight is worth: {scores}; magnitude if not given. The last three look at --data; 'row' and "
        "'variance' suit nets whose BatchNormalization was folded.",
    ),
]
Rounds = Annotated[int, typer.Option(metavar="N", help="Mask rounds of compress.")]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="TABLE",
        help="For a folder of images: a TSV or CSV of file name and class index; else its sub-folders are classes.",
    ),
]
LabelOffset = Annotated[
    int, typer.Option(metavar="N", help="Added to a label to give the model's class: 1 where class 0 is background.")
]
Include = Annotated[
    list[str] | None, typer.Option(metavar="RE", help="Prune only nodes or weights whose name this finds; repeatable.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="RE", help="Spare nodes or weights whose name this finds; repeatable.")
]
Report = Annotated[
    str | None,
    typer.Option("--report", metavar="FILE", help="Write an HTML report, too; needs the extra 'report'."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Write the result even if it is further from the dense model than its input.")
]
Samples = Annotated[int | None, typer.Option(metavar="N", help="Samples to draw from the data.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of every random choice.")]
BatchSize = Annotated[
    int | None, typer.Option(metavar="N", help="Samples a run; chosen by the input's size if not given.")
]


@dataclass(frozen=True)
class Images:
    """What to do to images before the model sees them."""

    panel: ClassVar[str] = "Images"

    preset: Annotated[str | None, typer.Option(metavar="NAME", help="Preprocessing by name: {presets}.")] = None
    preprocess: Annotated[
        str | None, typer.Option(metavar="FILE", help="Preprocessing from a TOML file with the keys below.")
    ] = None
    resize: Annotated[int | None, typer.Option(metavar="N", help="Short side after resizing.")] = None
    crop: Annotated[int | None, typer.Option(metavar="N", help="Side of the square cut from the centre.")] = None
    scale: Annotated[float | None, typer.Option(metavar="X", help="Factor on pixel values 0..255, as 0.00392157.")] = (
        None
    )
    mean: Annotated[str | None, typer.Option(metavar="X[,X,X]", help="Subtracted after scaling; red,green,blue.")] = (
        None
    )
    std: Annotated[str | None, typer.Option(metavar="X[,X,X]", help="Divided by after that.")] = None
    layout: Annotated[
        str | None, typer.Option(metavar="NCHW|NHWC", help="Where channels go; read from the model if not given.")
    ] = None
    channel_order: Annotated[
        str | None, typer.Option(metavar="RGB|BGR", help="Order in which the model wants channels.")
    ] = None

    def preprocessing(self) -> Preprocessing | None:
        """The preprocessing asked for, if any."""
        from onnx_asr.data import Preprocessing

        return Preprocessing.from_options(
            preset=self.preset,
            file=self.preprocess,
            resize=self.resize,
            crop=self.crop,
            scale=self.scale,
            mean=numbers("mean", self.mean),
            std=numbers("std", self.std),
            layout=self.layout,
            channel_order=self.channel_order,
        )


@dataclass(frozen=True)
class Machine:
    """What the work runs on."""

    panel: ClassVar[str] = "Machine"

    providers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="onnxruntime's execution providers, in order of preference; the CPU if not given.",
        ),
    ] = None
    threads: Annotated[int, typer.Option(metavar="N", help="Threads within an operator; 0 for all cores.", min=0)] = 0
    session_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="What onnxruntime may take to load a model or to run a batch; 0 for any time.",
        ),
    ] = 300.0

    def runtime(self, verbose: bool) -> Runtime:
        """How sessions run."""
        from onnx_asr.engine.session import Runtime

        runtime = Runtime(threads=self.threads, verbose=verbose, guard=native_call)
        if self.providers is None:
            return runtime
        return replace(runtime, providers=names(self.providers))


@dataclass(frozen=True)
class Walk(Machine):
    """What a walk over the whole calibration set runs on."""

    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for samples, activations and refit's patches and Gram matrices, as 4GiB or 500MB; what is "
            "over it goes to temporary files. Models, sessions and the layer at work come on top.",
        ),
    ] = None

    def execution(self, verbose: bool, progress: Progress) -> Execution:
        """How walks run."""
        from onnx_asr.networks.execution import Execution

        return Execution(self.runtime(verbose), byte_count("memory-limit", self.memory_limit), progress)


@dataclass(frozen=True)
class Calibration:
    """Which samples are used for what; the fields are those of ``RepairOptions``."""

    panel: ClassVar[str] = "Calibration"

    samples: Annotated[int | None, typer.Option(metavar="N", help="Calibration samples.")] = None
    verify_samples: Annotated[
        int | None, typer.Option(metavar="N", help="Other samples, held out to verify the result; 0 skips that.")
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Samples a run; chosen by the input's size if not given.")
    ] = None
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Seed of every random choice.")] = None
    skip_bad_images: Annotated[
        bool | None,
        typer.Option("--skip-bad-images", help="Pass over images of a folder that cannot be read, and say how many."),
    ] = None


@dataclass(frozen=True)
class Refit:
    """The parts of the refit; the fields are those of ``RefitRecipe``."""

    panel: ClassVar[str] = "Refit"

    refit_rows: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Output positions a layer is fitted on; compress's last round: twice."),
    ] = None
    ridge: Annotated[float | None, typer.Option(metavar="X", min=0, help="Pull toward the dense weights.")] = None
    relu_steps: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Steps that forgive errors a ReLU hides.")
    ] = None
    gain_power: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Exponent of the final gain; 0 for none.")
    ] = None
    block_targets: Annotated[
        bool | None, typer.Option("--block-targets/--no-block-targets", help="Match the sum behind a residual Add.")
    ] = None
    classifier: Annotated[
        bool | None, typer.Option("--classifier/--no-classifier", help="Refit Gemm and MatMul too.")
    ] = None
    class_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Steps on the KL divergence of a classifier's outputs; 0 for none."),
    ] = None


@dataclass(frozen=True)
class MethodSettings:
    """What the methods can be asked to do; the fields are those of ``RepairOptions``."""

    panel: ClassVar[str] = METHOD_PANEL

    time_budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="auto: what trying may take; no limit if not given.")
    ] = None
    reliability_power: Annotated[
        float | None,
        typer.Option(
            metavar="K",
            min=0,
            help="paired: multiply gains by rho^K, rho the channel's correlation with the dense one.",
        ),
    ] = None
    bn: Annotated[
        str | None,
        typer.Option(
            metavar="exact|ema",
            help="Re-estimate BatchNormalization over all samples, or as a moving average over batches.",
        ),
    ] = None
    momentum: Annotated[float | None, typer.Option(metavar="X", help="--bn ema: weight of a new batch.")] = None
    ema_batches: Annotated[int | None, typer.Option(metavar="N", help="--bn ema: number of batches.")] = None
    ema_batch_size: Annotated[int | None, typer.Option(metavar="N", help="--bn ema: samples a batch.")] = None
    prior: Annotated[str | None, typer.Option(metavar="median|mean|X", help="asr: what its gains shrink by.")] = None
    bias_correction: Annotated[
        bool | None,
        typer.Option("--bias-correction/--no-bias-correction", help="asr, raw, layerwise: restore channel means too."),
    ] = None
    gain_samples: Annotated[
        int | None, typer.Option(metavar="N", help="asr, raw, layerwise: samples for the gains; all if not given.")
    ] = None


@dataclass(frozen=True)
class Goal:
    """How much to prune."""

    panel: ClassVar[str] = "Goal (one of them)"

    sparsity: Sparsity = None
    target_latency: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="--pattern channel: prune until a run in onnxruntime takes this share of the dense model's time; "
            "measured.",
        ),
    ] = None
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|SIZE",
            help="Prune until the file has this share of the dense model's bytes, or so many, as 500kB; with a pattern "
            "of zeros, bytes after gzip.",
        ),
    ] = None
    target_flops: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Prune until this share of the dense model's FLOPs is left; with a pattern of zeros, of those with a "
            "weight other than zero.",
        ),
    ] = None

    def given(self, channels: bool) -> dict[str, float | None]:
        """The goal as options of pruning channels, or weights.

        Raises:
            OptionError: When it does not apply to weights.
        """
        size = share_or_bytes("target-size", self.target_size)
        goal = {"sparsity": self.sparsity, "target_size": size, "target_flops": self.target_flops}
        if channels:
            return goal | {"target_latency": self.target_latency}
        if self.target_latency is not None:
            raise OptionError("zeros make no model faster in onnxruntime: give target-latency with --pattern channel")
        return goal


@dataclass(frozen=True)
class Timing:
    """Whether latency is measured, and on what."""

    panel: ClassVar[str] = "Latency"

    measure_latency: Annotated[
        bool,
        typer.Option("--measure-latency", help="Time the result against the given model in onnxruntime, run in turns."),
    ] = False
    input_shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:N,N,N,N",
            help="Shape of an input that leaves sizes open, as image:1,3,640,640, for runs and FLOPs; repeatable. "
            "Batch 1 and sides of 224 if not given.",
        ),
    ] = None

    def shapes(self) -> dict[str, list[int]]:
        """The shapes asked for."""
        return input_shapes(self.input_shapes)

    def stopwatch(self, model: str, runtime: Runtime) -> Stopwatch | None:
        """What times results against a model, where that was asked for; what is in the way shows before any work."""
        if not self.measure_latency:
            return None
        from onnx_asr.graph.index import GraphIndex
        from onnx_asr.graph.model_io import load
        from onnx_asr.networks.latency import Stopwatch

        return Stopwatch(GraphIndex.of(load(model)), runtime, self.shapes())


@dataclass(frozen=True)
class Display:
    """What is said while and after the work is done."""

    panel: ClassVar[str] = "Display"

    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every layer, and onnxruntime's warnings.")] = (
        False
    )
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


def repair_options(
    calibration: Calibration, refit: Refit, settings: MethodSettings | None = None, method: str | None = None
) -> RepairOptions:
    """What was given, the rest by default; the seed is that of the refit's positions too."""
    from onnx_asr.repairing.options import RepairOptions

    given = _given(calibration) | ({} if settings is None else _given(settings))
    if method is not None:
        given["method"] = method
    if "prior" in given:
        given["prior"] = number_or_name(given["prior"])
    recipe = {name.removeprefix(_REFIT_PREFIX): value for name, value in _given(refit).items()}
    defaults = RepairOptions()
    return replace(defaults, **given, refit=replace(defaults.refit, seed=given.get("seed", defaults.seed), **recipe))


def shared_defaults() -> dict[str, Any]:
    """What the options that :func:`repair_options` takes are by default."""
    from onnx_asr.repairing.options import RepairOptions

    defaults = RepairOptions()
    found = {
        field.name: getattr(defaults, field.name) for group in (Calibration, MethodSettings) for field in fields(group)
    }
    found["method"] = defaults.method
    for field in fields(Refit):
        found[field.name] = getattr(defaults.refit, field.name.removeprefix(_REFIT_PREFIX))
    return found


def _given(group: Any) -> dict[str, Any]:
    values = {field.name: getattr(group, field.name) for field in fields(group)}
    return {name: value for name, value in values.items() if value is not None}
