"""Options that only the command line has, and how those of the library appear on it.

Nothing heavy is imported here, so that help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from onnx_asr.cli.options import Declarations, Form, Given
from onnx_asr.cli.supervision import native_call
from onnx_asr.cli.values import byte_count, input_shape, share_or_bytes
from onnx_asr.data import PRESETS, Preprocessing
from onnx_asr.errors import OptionError

if TYPE_CHECKING:
    from onnx_asr.networks.execution import Execution, Progress
    from onnx_asr.networks.latency import Stopwatch

DECLARATIONS = Declarations(
    forms={
        "rows": Form(names=("--refit-rows",)),
        "sparsity": Form("S"),
        "sparsities": Form("S[,S]"),
        "pattern": Form("unstructured|N:M|Nx1"),
        "patterns": Form("NAME[,NAME]"),
        "methods": Form("NAME[,NAME]"),
        "target_latency": Form("SHARE"),
        "target_size": Form("SHARE|SIZE", read=share_or_bytes),
        "target_flops": Form("SHARE"),
        "round_samples": Form("SHARE"),
        "time_budget": Form("SECONDS"),
        "include": Form("RE"),
        "exclude": Form("RE"),
        "mean": Form("X[,X,X]"),
        "std": Form("X[,X,X]"),
    },
    panels={
        "RepairOptions": {
            "": "Method",
            **dict.fromkeys(("samples", "verify_samples", "batch_size", "seed", "skip_bad_images"), "Calibration"),
        },
        "RefitRecipe": {"": "Refit"},
        "PruneOptions": dict.fromkeys(("sparsity", "target_size", "target_flops"), "Goal (one of them)"),
        "ChannelPruneOptions": {"target_latency": "Goal (one of them)"},
        "Images": {"": "Images"},
        "Preprocessing": {"": "Images"},
        "Timing": {"": "Latency"},
        "Machine": {"": "Machine"},
        "Walk": {"": "Machine"},
        "Display": {"": "Display"},
    },
)

Model = Annotated[str, Form(help="The model, an .onnx file.", names=("MODEL",))]
DenseModel = Annotated[str, Form(help="The dense model, an .onnx file.", names=("DENSE",))]
Pruned = Annotated[str, Form(help="The pruned model, an .onnx file.", names=("PRUNED",))]
Output = Annotated[str, Form("FILE", "Where to write the result.", ("--output", "-o"))]
Dense = Annotated[str | None, Form("FILE", "The dense model that the given one was made from.")]
Data = Annotated[
    str,
    Form(
        "PATH",
        "A folder of images; an .npz with 'images' (uint8, N,H,W,C) and perhaps 'labels'; or an .npz or .npy of ready "
        "tensors named after the model's inputs.",
    ),
]
Labels = Annotated[
    str | None,
    Form(
        "TABLE",
        "For a folder of images: a TSV or CSV of file name and class index; by default its sub-folders are classes.",
    ),
]
LabelOffset = Annotated[
    int, Form(help="Number to add to a label to get the model's class; 1 where class 0 is the background.")
]
Report = Annotated[str | None, Form("FILE", "Write an HTML report too; needs the extra 'report'.")]
Plot = Annotated[str | None, Form("FILE", "Draw the table too: .svg or .png; needs the extra 'report'.")]
Force = Annotated[bool, Form(help="Write the result even if it is further from the dense model than its input.")]
Samples = Annotated[int | None, Form(help="Number of samples to draw from the data.")]
BatchSize = Annotated[int | None, Form(help="Samples per run; by default chosen by the size of the input.")]
Seed = Annotated[int, Form(help="Seed of every random choice.")]


@dataclass(frozen=True)
class Images:
    """How images become inputs of the model.

    Attributes:
        preset: Preprocessing by name.
        preprocess: Preprocessing from a TOML file whose keys are the options below.
        changes: Values that replace those of the preset or file.
    """

    preset: Annotated[str | None, Form("NAME", f"Preprocessing by name: {', '.join(PRESETS)}.")] = None
    preprocess: Annotated[str | None, Form("FILE")] = None
    changes: Annotated[dict[str, Any], Given({"": Preprocessing}, overriding=True)] = field(default_factory=dict)

    def preprocessing(self) -> Preprocessing | None:
        """The preprocessing, if any was given."""
        return Preprocessing.from_options(preset=self.preset, file=self.preprocess, **self.changes)


@dataclass(frozen=True)
class Machine:
    """How models are run.

    Attributes:
        providers: Execution providers of onnxruntime, in order of preference; the CPU by default.
        threads: Threads per operator; 0 for all cores.
        session_timeout: Seconds that onnxruntime may take to load a model or to run a batch; 0 for no limit.
    """

    providers: Annotated[tuple[str, ...] | None, Form("NAME[,NAME]")] = None
    threads: int = 0
    session_timeout: Annotated[float, Form("SECONDS")] = 300.0

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

    memory_limit: Annotated[int | None, Form("SIZE", read=byte_count)] = None

    def execution(self, verbose: bool, progress: Progress) -> Execution:
        """How to run."""
        return replace(super().execution(verbose, progress), memory_limit=self.memory_limit)


@dataclass(frozen=True)
class Timing:
    """Whether latency is measured, and on what.

    Attributes:
        measure_latency: Time the result against the given model in onnxruntime, in alternating runs.
        input_shapes: Shape of an input with open sizes, such as image:1,3,640,640, for runs and FLOPs; by default batch
            1 and sides of 224.
    """

    measure_latency: bool = False
    input_shapes: Annotated[tuple[tuple[str, list[int]], ...], Form("NAME:N,N,N,N", read=input_shape)] = ()

    def shapes(self) -> dict[str, list[int]]:
        """The shapes by input.

        Raises:
            OptionError: When an input comes twice.
        """
        shapes = dict(self.input_shapes)
        if len(shapes) < len(self.input_shapes):
            raise OptionError("input-shapes names an input twice: give each once, as name:1,3,224,224")
        return shapes

    def stopwatch(self, model: str, execution: Execution) -> Stopwatch | None:
        """A stopwatch that holds the given model, if latency is to be measured; made first, as it may be refused."""
        if not self.measure_latency:
            return None
        from onnx_asr.graph.index import GraphIndex
        from onnx_asr.graph.model_io import load
        from onnx_asr.networks.latency import Stopwatch

        return Stopwatch(GraphIndex.of(load(model)), execution.runtime, self.shapes())


@dataclass(frozen=True)
class Display:
    """What is printed.

    Attributes:
        json: Print one JSON object on stdout and nothing else.
        verbose: Show every layer, and the warnings of onnxruntime.
        quiet: Print errors and warnings only.
        debug: Show the traceback of an error.
    """

    json: bool = False
    verbose: Annotated[bool, Form(names=("--verbose", "-v"))] = False
    quiet: Annotated[bool, Form(names=("--quiet", "-q"))] = False
    debug: bool = False
