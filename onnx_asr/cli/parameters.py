"""Options that only the command line has, and how those of the library appear on it.

Name, type and default of an option are those of a field, and its help is in the docstring of the class. So the options
classes of the library serve as they are, and a class here derives from one of them where an option has a panel, name or
reader of its own. Nothing heavy is imported here, so that help is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass, replace
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter, default_name_transform

from onnx_asr.cli.supervision import native_call
from onnx_asr.cli.values import (
    ONE_OR_SEVERAL,
    SEPARATED,
    Paths,
    byte_count,
    image_size,
    input_shape,
    read_by,
    share_or_bytes,
)
from onnx_asr.data import PRESETS, Preprocessing
from onnx_asr.detectors.options import DetectorOptions
from onnx_asr.errors import OptionError
from onnx_asr.measuring.bars import Bars
from onnx_asr.pruning.options import SENSITIVITY_SPARSITIES, ChannelPruneOptions, PruneOptions, SensitivityOptions
from onnx_asr.repairing.options import RefitRecipe, RepairOptions
from onnx_asr.sweeping.grid import SweepGrid

if TYPE_CHECKING:
    from onnx_asr.graph.model_io import ModelSource
    from onnx_asr.networks.execution import Execution, Progress
    from onnx_asr.networks.latency import Stopwatch

T = TypeVar("T")
P = TypeVar("P", PruneOptions, ChannelPruneOptions)

_GOAL_TITLE, _CHANNEL_TITLE, _BAR_TITLE = "Goal (one of them)", "With --pattern channel", "Bars (at least one)"
_TITLES = (
    f"Arguments,Options,{_BAR_TITLE},{_GOAL_TITLE},{_CHANNEL_TITLE},"
    "Method,Calibration,Refit,Cost,Detector,Images,Machine,Display"
).split(",")
PANELS = {title: Group(title, sort_key=place) for place, title in enumerate(_TITLES)}
"""Headings of the help, in order."""


def panel(title: str, **settings: Any) -> Parameter:
    """Options of a class, under one heading."""
    return Parameter(name="*", group=PANELS[title], **settings)


WITHOUT_REPAIR = panel("Options", parse="^(?!repair$)")
"""Options but for those of a repair, which stand beside them."""
CALIBRATION_AND_REFIT = Parameter(
    parse="^(repair|samples|verify_samples|batch_size|seed|skip_bad_images|metric|refit)$"
)
"""Options of a repair whose method is fixed."""

_CALIBRATION = Parameter(group=PANELS["Calibration"])
_GOAL, _CHANNELS = (Parameter(group=PANELS[title]) for title in (_GOAL_TITLE, _CHANNEL_TITLE))


def _refit_flag(name: str) -> str:
    return "refit-rows" if name == "rows" else default_name_transform(name)


_REFIT = panel("Refit", parse="^(?!seed$)", name_transform=_refit_flag)  # its seed is that of the repair


def _shown(hint: Any, form: Parameter | None) -> Any:
    """The type that help shows: text where a reader makes values of several types of it."""
    several = get_origin(hint) in (Union, UnionType) and len(set(get_args(hint)) - {NoneType}) > 1
    return str if several and form is not None and form.converter is not None else hint


def given(*owners: type, **forms: Parameter) -> Callable[[type[T]], type[T]]:
    """Give a class the fields of options classes, each None where its option is not given; nothing is checked."""

    def filled(empty: type[T]) -> type[T]:
        hints = {name: hint for owner in reversed(owners) for name, hint in get_type_hints(owner).items()}
        names = dict.fromkeys(item.name for owner in owners for item in fields(owner))
        members: list[Any] = [
            (name, Annotated[_shown(hints[name], forms.get(name)) | None, forms.get(name, Parameter())], None)
            for name in names
        ]
        unchecked = {"__post_init__": lambda self: None, "__doc__": empty.__doc__, "__module__": empty.__module__}
        return make_dataclass(empty.__name__, members, bases=(empty, *owners), namespace=unchecked, frozen=True)

    return filled


def resolved(options: type[T]) -> type[T]:
    """Resolve the types of inherited fields, which cyclopts would look up in the module of the class itself."""
    vars(options)["__init__"].__annotations__ = get_type_hints(options, include_extras=True)
    return options


Model = Annotated[str, Parameter(name="MODEL", help="The model, an .onnx file.")]
Models = Annotated[tuple[str, ...], Parameter(name="MODEL", help="One or more .onnx files.")]
DenseModel = Annotated[str, Parameter(name="DENSE", help="The dense model, an .onnx file.")]
Pruned = Annotated[str, Parameter(name="PRUNED", help="The pruned model, an .onnx file.")]
OUTPUTS = ("--output", "-o", "--report", "--plot", "--junit")
Output = Annotated[str, Parameter(name=("--output", "-o"), help='Where to write the result; "-" for standard output.')]
Dense = Annotated[str | None, Parameter(help="The dense model that the given one was made from.")]
Data = Annotated[
    Paths,
    ONE_OR_SEVERAL,
    Parameter(
        help="A folder of images, also of COCO or VOC; a .txt with the path of an image per line; an .npz with "
        "'images' (uint8, N,H,W,C) and perhaps 'labels'; or an .npz or .npy of ready tensors named after the model's "
        "inputs. Repeatable."
    ),
]
Labels = Annotated[
    str | None,
    Parameter(
        help="For images in files: a TSV or CSV of file name and class index; by default the sub-folders of a folder "
        "are classes."
    ),
]
LabelOffset = Annotated[
    int,
    Parameter(
        help="Number to add to a label, or to the position of a detector's category, to get the model's class; 1 where "
        "class 0 is the background."
    ),
]
Report = Annotated[str | None, Parameter(help="Write an HTML report too; needs the extra 'report'.")]
Plot = Annotated[str | None, Parameter(help="Draw the table too: .svg or .png; needs the extra 'report'.")]
JUnit = Annotated[str | None, Parameter(help="Write a JUnit file too, with a test case per bar.")]
Force = Annotated[
    bool, Parameter(help="Write the result even if it is further from the dense model than its input.", negative="")
]
_EXCHANGED = "accept a dense model with more zeros than the other one"
ForceRepair = Annotated[
    bool,
    Parameter(
        help=f"Write the result even if it is further from the dense model than its input; {_EXCHANGED}.", negative=""
    ),
]
ForceOrder = Annotated[bool, Parameter(name="--force", help=f"{_EXCHANGED.capitalize()}.", negative="")]
Results = Annotated[
    str,
    Parameter(name=("--output", "-o"), help="A JSON file for the cells; finished ones that it holds are kept."),
]
ExternalLinks = Annotated[
    bool,
    Parameter(
        help="Read weights through symbolic links that lead into the folder where the model itself really is, as in "
        "the cache of Hugging Face.",
        negative="",
    ),
]
Samples = Annotated[int | None, Parameter(help="Number of samples to draw from the data.")]
BatchSize = Annotated[int | None, Parameter(help="Samples per run; by default chosen by the size of the input.")]
Seed = Annotated[int, Parameter(help="Seed of every random choice.")]
Metric = Annotated[
    str | None,
    Parameter(
        help='A measure of your own, lower is better: "module:function", found in the current directory or among the '
        "installed packages; needs --dense."
    ),
]


@panel("Options")
@given(
    PruneOptions,
    ChannelPruneOptions,
    sparsity=_GOAL,
    target_size=Parameter.combine(_GOAL, read_by(share_or_bytes)),
    target_flops=_GOAL,
    target_latency=_CHANNELS,
    multiple=Parameter.combine(_CHANNELS, Parameter(show_default=str(ChannelPruneOptions.multiple))),
    pattern=Parameter(
        help='"unstructured"; "N:M" keeps N of every M consecutive input channels, such as 2:4, and takes no '
        '--sparsity; "Nx1" prunes N consecutive output channels together at each input position, such as 4x1; '
        '"channel" removes whole channels, so that the model gets smaller and faster.',
        show_default=PruneOptions.pattern,
    ),
    score=Parameter(show_default=PruneOptions.score),
    samples=Parameter(show_default=str(PruneOptions.samples)),
    seed=Parameter(show_default=str(PruneOptions.seed)),
)
class Pruning:
    """Options of both ways to prune."""

    pattern: str | None

    def of(self, owner: type[P], otherwise: str) -> P:
        """The options of one way, which may have no use for the seed.

        Raises:
            OptionError: When one of the other way is given, ``otherwise`` saying what is wrong with that.
        """
        known: list[str] = [item.name for item in fields(owner)]
        values = {name: value for name, value in vars(self).items() if value is not None}
        for name in (name for name in values if name not in (*known, "pattern", "seed")):
            raise OptionError(f"--{name.replace('_', '-')} {otherwise}")
        return owner(**{name: value for name, value in values.items() if name in known})


@panel("Method")
@resolved
@dataclass(frozen=True)
class Calibrated(RepairOptions):
    """Options of a repair whose method and recipe are fixed."""

    samples: Annotated[int, _CALIBRATION] = RepairOptions.samples
    verify_samples: Annotated[int, _CALIBRATION] = RepairOptions.verify_samples
    batch_size: Annotated[int | None, _CALIBRATION] = RepairOptions.batch_size
    seed: Annotated[int, _CALIBRATION] = RepairOptions.seed
    refit: Annotated[RefitRecipe, Parameter(parse=False)] = field(default_factory=RefitRecipe)
    skip_bad_images: Annotated[bool, _CALIBRATION, Parameter(negative="")] = RepairOptions.skip_bad_images
    metric: Annotated[str | None, _CALIBRATION] = None

    def settled(self) -> RepairOptions:
        """The options of the library, with one seed for everything."""
        values = {item.name: getattr(self, item.name) for item in fields(RepairOptions)}
        return RepairOptions(**values | {"refit": replace(self.refit, seed=self.seed)})


@resolved
@dataclass(frozen=True)
class Repair(Calibrated):
    """Options of a repair."""

    refit: Annotated[RefitRecipe, _REFIT] = field(default_factory=RefitRecipe)


@WITHOUT_REPAIR
@resolved
@dataclass(frozen=True)
class Sensitivity(SensitivityOptions):
    """Options of sensitivity."""

    sparsities: Annotated[tuple[float, ...], SEPARATED] = SENSITIVITY_SPARSITIES


@panel("Options")
@resolved
@dataclass(frozen=True)
class Grid(SweepGrid):
    """Options of the cells of a sweep."""

    sparsities: Annotated[tuple[float, ...] | None, SEPARATED] = SweepGrid.sparsities
    patterns: Annotated[tuple[str, ...], SEPARATED] = SweepGrid.patterns
    methods: Annotated[tuple[str, ...], SEPARATED] = SweepGrid.methods


@Parameter(name="*")
@given(
    Preprocessing,
    resize=read_by(image_size),
    letterbox=read_by(image_size),
    pad=Parameter(show_default=Preprocessing.pad),
    pad_value=Parameter(show_default=f"{Preprocessing.pad_value:g}"),
    pad_normalized=Parameter(negative=""),
    interpolation=Parameter(show_default=Preprocessing.interpolation),
    mean=SEPARATED,
    std=SEPARATED,
    exif=Parameter(show_default="on"),
)
class Changes:
    """Attributes of a preprocessing to replace."""


@panel("Images")
@dataclass(frozen=True)
class Images:
    """How images become inputs of the model.

    Attributes:
        preset: Preprocessing by name.
        preprocess: Preprocessing from a TOML file whose keys are the options below.
        changes: Values that replace those of the preset or file.
    """

    preset: Annotated[str | None, Parameter(help=f"Preprocessing by name: {', '.join(PRESETS)}.")] = None
    preprocess: str | None = None
    changes: Changes = field(default_factory=Changes)

    def preprocessing(self) -> Preprocessing | None:
        """The preprocessing, if any was given."""
        return Preprocessing.from_options(preset=self.preset, file=self.preprocess, **vars(self.changes))


@panel(_BAR_TITLE)
@given(Bars, max_size=read_by(byte_count))
class Demands:
    """Bars that a model has to clear."""

    def bars(self) -> Bars:
        """The bars of the library.

        Raises:
            OptionError: No bar, or one out of range.
        """
        return Bars(**vars(self))


@panel("Detector", negative="")
@resolved
@dataclass(frozen=True)
class Detector(DetectorOptions):
    """How the boxes of a detector are read and compared."""

    annotations: str | None = None


@panel("Options")
@dataclass(frozen=True)
class Scoring:
    """What a model is scored on, besides the data, and how they are drawn."""

    force: ForceOrder = False
    labels: Labels = None
    label_offset: LabelOffset = 0
    samples: Samples = None
    batch_size: BatchSize = None
    seed: Seed = 0
    metric: Metric = None
    detector: Detector = Detector()


@panel("Machine")
@dataclass(frozen=True)
class Machine:
    """How models are run.

    Attributes:
        providers: Execution providers of onnxruntime, by preference, with commas between them; the CPU by default.
        threads: Threads of onnxruntime's operators, and of the refit's work between them; 0 for all cores.
        session_timeout: Seconds that onnxruntime may take to load a model or to run a batch; 0 for no limit.
    """

    providers: Annotated[tuple[str, ...] | None, SEPARATED] = None
    threads: int = 0
    session_timeout: float = 300.0

    def __post_init__(self) -> None:
        for name in ("threads", "session_timeout"):
            if not getattr(self, name) >= 0:
                raise OptionError(f"{name.replace('_', '-')} {getattr(self, name)} is out of range: give 0 or more")

    def execution(self, verbose: bool, progress: Progress) -> Execution:
        """How to run."""
        from onnx_asr.engine.session import Runtime
        from onnx_asr.networks.execution import Execution

        runtime = Runtime(threads=self.threads, verbose=verbose, guard=native_call)
        if self.providers is not None:
            runtime = replace(runtime, providers=self.providers)
        return Execution(runtime, progress=progress)


@dataclass(frozen=True)
class Walk(Machine):
    """How models are run over the whole calibration set.

    Attributes:
        memory_limit: Memory for samples, activations, and refit's patches and Gram matrices, such as 4GiB or 500MB;
            beyond it they go to temporary files. Models, sessions and the layer at work come on top.
    """

    memory_limit: Annotated[int | None, read_by(byte_count)] = None

    def execution(self, verbose: bool, progress: Progress) -> Execution:
        """How to run."""
        return replace(super().execution(verbose, progress), memory_limit=self.memory_limit)


@panel("Cost", negative="")
@dataclass(frozen=True)
class Shapes:
    """Shapes of inputs.

    Attributes:
        input_shapes: Shape of an input with open sizes, such as image:1,3,640,640, for runs and FLOPs; repeatable; by
            default batch 1 and sides of 224 (for FLOPs, those of a sample where there are any).
    """

    input_shapes: tuple[str, ...] = ()

    def shapes(self) -> dict[str, list[int]]:
        """The shapes by input.

        Raises:
            OptionError: When one is malformed, or an input comes twice.
        """
        shapes = dict(map(input_shape, self.input_shapes))
        if len(shapes) < len(self.input_shapes):
            raise OptionError("input-shapes names an input twice: give each once, as name:1,3,224,224")
        return shapes


@panel("Cost", negative="")
@dataclass(frozen=True)
class Timing(Shapes):
    """Whether latency is measured, and on what.

    Attributes:
        measure_latency: Time the result against the given model in onnxruntime, in alternating runs.
    """

    measure_latency: bool = False

    def stopwatch(self, model: ModelSource, execution: Execution) -> Stopwatch | None:
        """A stopwatch that holds the given model, if latency is to be measured; made first, as it may be refused."""
        if not self.measure_latency:
            return None
        from onnx_asr.engine.loading import load
        from onnx_asr.graph.index import GraphIndex
        from onnx_asr.networks.latency import Stopwatch

        return Stopwatch(GraphIndex.of(load(model)), execution.runtime, self.shapes())
