"""Options that commands share, each declared once; groups become one argument of a command.

Nothing heavy is imported here, so that help is quick. An option whose default is None is left to the pipeline's own.
Names in braces in a help text (``{methods}``) are filled in when the help is shown, see :class:`Command`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from onnx_asr.errors import OptionError

if TYPE_CHECKING:
    from onnx_asr.data import Preprocessing
    from onnx_asr.engine.session import Runtime
    from onnx_asr.networks import Execution, Progress
    from onnx_asr.options import RepairOptions

T = TypeVar("T")

CALIBRATION, IMAGES, MACHINE = "Calibration", "Images", "Machine"
METHOD, REFIT, DISPLAY = "Method", "Refit", "Display"
_REFIT_PREFIX = "refit_"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}

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

    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Preprocessing by name: {presets}.", rich_help_panel=IMAGES)
    ] = None
    preprocess: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Preprocessing from a TOML file with the keys below.", rich_help_panel=IMAGES
        ),
    ] = None
    resize: Annotated[
        int | None, typer.Option(metavar="N", help="Short side after resizing.", rich_help_panel=IMAGES)
    ] = None
    crop: Annotated[
        int | None, typer.Option(metavar="N", help="Side of the square cut from the centre.", rich_help_panel=IMAGES)
    ] = None
    scale: Annotated[
        float | None,
        typer.Option(metavar="X", help="Factor on pixel values 0..255, as 0.00392157.", rich_help_panel=IMAGES),
    ] = None
    mean: Annotated[
        str | None,
        typer.Option(metavar="X[,X,X]", help="Subtracted after scaling; red,green,blue.", rich_help_panel=IMAGES),
    ] = None
    std: Annotated[
        str | None, typer.Option(metavar="X[,X,X]", help="Divided by after that.", rich_help_panel=IMAGES)
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="NCHW|NHWC", help="Where channels go; read from the model if not given.", rich_help_panel=IMAGES
        ),
    ] = None
    channel_order: Annotated[
        str | None,
        typer.Option(metavar="RGB|BGR", help="Order in which the model wants channels.", rich_help_panel=IMAGES),
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

    providers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="onnxruntime's execution providers, in order of preference; the CPU if not given.",
            rich_help_panel=MACHINE,
        ),
    ] = None
    threads: Annotated[
        int,
        typer.Option(metavar="N", help="Threads within an operator; 0 for all cores.", min=0, rich_help_panel=MACHINE),
    ] = 0

    def runtime(self, verbose: bool) -> Runtime:
        """How sessions run."""
        from onnx_asr.engine.session import Runtime

        if self.providers is None:
            return Runtime(threads=self.threads, verbose=verbose)
        names = tuple(name.strip() for name in self.providers.split(",") if name.strip())
        return Runtime(names, self.threads, verbose)


@dataclass(frozen=True)
class Walk(Machine):
    """What a walk over the whole calibration set runs on."""

    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for samples and activations, as 4GiB or 500MB; activations over it go to temporary files.",
            rich_help_panel=MACHINE,
        ),
    ] = None

    def execution(self, verbose: bool, progress: Progress) -> Execution:
        """How walks run."""
        from onnx_asr.networks import Execution

        return Execution(self.runtime(verbose), _bytes(self.memory_limit), progress)


@dataclass(frozen=True)
class Calibration:
    """Which samples are used for what; the fields are those of ``RepairOptions``."""

    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Calibration samples.", rich_help_panel=CALIBRATION)
    ] = None
    verify_samples: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Other samples, held out to verify the result; 0 skips that.", rich_help_panel=CALIBRATION
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Samples a run; chosen by the input's size if not given.", rich_help_panel=CALIBRATION
        ),
    ] = None
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Seed of every random choice.", rich_help_panel=CALIBRATION)
    ] = None
    skip_bad_images: Annotated[
        bool | None,
        typer.Option(
            "--skip-bad-images",
            help="Pass over images of a folder that cannot be read, and say how many.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None


@dataclass(frozen=True)
class Refit:
    """The parts of the refit; the fields are those of ``RefitRecipe``."""

    refit_rows: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Output positions a layer is fitted on.", rich_help_panel=REFIT),
    ] = None
    ridge: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Pull toward the dense weights.", rich_help_panel=REFIT)
    ] = None
    relu_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Steps that forgive errors a ReLU hides.", rich_help_panel=REFIT),
    ] = None
    gain_power: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, help="Exponent of the final gain; 0 for none.", rich_help_panel=REFIT),
    ] = None
    block_targets: Annotated[
        bool | None,
        typer.Option(
            "--block-targets/--no-block-targets", help="Match the sum behind a residual Add.", rich_help_panel=REFIT
        ),
    ] = None
    classifier: Annotated[
        bool | None,
        typer.Option("--classifier/--no-classifier", help="Refit Gemm and MatMul too.", rich_help_panel=REFIT),
    ] = None


@dataclass(frozen=True)
class Method:
    """How to repair; the fields are those of ``RepairOptions``."""

    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of {methods}; auto tries several and keeps the one closest to the dense model.",
            rich_help_panel=METHOD,
        ),
    ] = None
    time_budget: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="auto: what trying may take; no limit if not given.",
            rich_help_panel=METHOD,
        ),
    ] = None
    reliability_power: Annotated[
        float | None,
        typer.Option(
            metavar="K",
            min=0,
            help="paired: multiply gains by rho^K, rho the channel's correlation with the dense one.",
            rich_help_panel=METHOD,
        ),
    ] = None
    bn: Annotated[
        str | None,
        typer.Option(
            metavar="exact|ema",
            help="Re-estimate BatchNormalization over all samples, or as a moving average over batches.",
            rich_help_panel=METHOD,
        ),
    ] = None
    momentum: Annotated[
        float | None, typer.Option(metavar="X", help="--bn ema: weight of a new batch.", rich_help_panel=METHOD)
    ] = None
    ema_batches: Annotated[
        int | None, typer.Option(metavar="N", help="--bn ema: number of batches.", rich_help_panel=METHOD)
    ] = None
    ema_batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="--bn ema: samples a batch.", rich_help_panel=METHOD)
    ] = None
    prior: Annotated[
        str | None,
        typer.Option(metavar="median|mean|X", help="asr: what its gains shrink by.", rich_help_panel=METHOD),
    ] = None
    bias_correction: Annotated[
        bool | None,
        typer.Option(
            "--bias-correction/--no-bias-correction",
            help="asr, raw, layerwise: restore channel means too.",
            rich_help_panel=METHOD,
        ),
    ] = None
    gain_samples: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="asr, raw, layerwise: samples for the gains; all if not given.", rich_help_panel=METHOD
        ),
    ] = None


def repair_options(calibration: Calibration, refit: Refit, method: Method | None = None) -> RepairOptions:
    """What was given, the rest by default; the seed is that of the refit's positions too."""
    from onnx_asr.options import RepairOptions

    given = _given(calibration) | ({} if method is None else _given(method))
    if "prior" in given:
        given["prior"] = _number_or_name(given["prior"])
    recipe = {name.removeprefix(_REFIT_PREFIX): value for name, value in _given(refit).items()}
    defaults = RepairOptions()
    return replace(defaults, **given, refit=replace(defaults.refit, seed=given.get("seed", defaults.seed), **recipe))


def _given(group: Any) -> dict[str, Any]:
    values = {field.name: getattr(group, field.name) for field in fields(group)}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Display:
    """What is said while and after the work is done."""

    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.", rich_help_panel=DISPLAY)
    ] = False
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show every layer, and onnxruntime's warnings.", rich_help_panel=DISPLAY),
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.", rich_help_panel=DISPLAY)
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=DISPLAY)] = (
        False
    )


class Command(TyperCommand):
    """A command whose help states what the pipelines know: their methods, presets and defaults."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the help, filled in."""
        self.fill_in()
        super().format_help(ctx, formatter)

    def fill_in(self) -> None:
        """Put names and defaults into the help texts; only now the options' module is imported."""
        from onnx_asr.data.preprocessing import PRESETS
        from onnx_asr.options import METHODS, SCORES, SENSITIVITY_SPARSITIES, RepairOptions

        defaults = RepairOptions()
        known = {name: getattr(defaults, name) for group in (Calibration, Method) for name in _names(group)}
        known |= {name: getattr(defaults.refit, name.removeprefix(_REFIT_PREFIX)) for name in _names(Refit)}
        shared = any(parameter.name == "verify_samples" for parameter in self.params)
        for parameter in self.params:
            shown: Any = parameter  # options and arguments both have a help text
            if shared and shown.name in known:
                shown.default = known[shown.name]
            for name, values in (
                ("{methods}", METHODS),
                ("{presets}", PRESETS),
                ("{scores}", SCORES),
                ("{sensitivity}", map(str, SENSITIVITY_SPARSITIES)),
            ):
                shown.help = (shown.help or "").replace(name, ", ".join(values))


def _names(group: type) -> list[str]:
    return [field.name for field in fields(group)]


def spread(function: Callable[..., T]) -> Callable[..., T]:
    """Turn each parameter that is a dataclass into its fields, for Typer; the function still gets the dataclass."""
    hints = {name: _annotated(hint) for name, hint in get_type_hints(function, include_extras=True).items()}
    groups: dict[str, Any] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            inner = get_type_hints(hints[name], include_extras=True)
            for field in fields(groups[name]):
                default = inspect.Parameter.empty if field.default is MISSING else field.default
                flat.append(_keyword(field.name, default, inner[field.name]))
        else:
            flat.append(_keyword(name, parameter.default, hints[name]))

    @wraps(function)
    def call(**values: Any) -> T:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        return function(**built, **values)

    call.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    del call.__wrapped__
    return call


def _annotated(hint: Any) -> Any:
    """Python 3.10 hides the hint of a parameter with the default None in an Optional; take it out again."""
    return next((inner for inner in get_args(hint) if get_origin(inner) is Annotated), hint)


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def numbers(name: str, text: str | None) -> Sequence[float] | None:
    """The numbers of an option that takes them with commas between.

    Raises:
        OptionError: When they are none.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--{name} {text} is no list of numbers: give them as 0.485,0.456,0.406") from None


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _bytes(text: str | None) -> int | None:
    """Bytes from a number with an optional unit: 4GiB, 500MB, 4G, 1000000."""
    if text is None:
        return None
    number = text.strip().rstrip("KMGTIBkmgtib ")
    unit = text.strip()[len(number) :].strip().upper().removesuffix("B")
    try:
        size = float(number) * _UNITS[unit]
        if not 0 < size < 2**63:
            raise ValueError
    except (ValueError, KeyError):
        raise OptionError(f"--memory-limit {text} is no size: give a number above 0 with a unit, as 4GiB") from None
    return int(size)
