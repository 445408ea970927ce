"""The commands and the way out of them."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Protocol, cast, runtime_checkable

import typer

from onnx_asr.cli import show
from onnx_asr.cli.parameters import (
    BatchSize,
    Calibration,
    Command,
    Data,
    Dense,
    Display,
    Exclude,
    Images,
    Include,
    Machine,
    Method,
    Output,
    Pattern,
    Refit,
    Report,
    Samples,
    Seed,
    Sparsity,
    Walk,
    numbers,
    repair_options,
    spread,
)
from onnx_asr.cli.terminal import Terminal, drop_stdout, say, say_traceback
from onnx_asr.errors import OnnxAsrError, OptionError
from onnx_asr.ownership import DISTRIBUTION, check_owner
from onnx_asr.version import __version__

if TYPE_CHECKING:
    from onnx_asr.data import Preprocessing
    from onnx_asr.options import Score
    from onnx_asr.report.data import Run

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name=DISTRIBUTION,
    help="Give a pruned ONNX vision network its accuracy back: no retraining, no labels, no PyTorch.",
    epilog="Exit codes: 0 done; 1 done, but the result is further from the dense model than its input; 2 bad usage or "
    "bad input; 130 interrupted.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model, an .onnx file.")]
DenseArgument = Annotated[str, typer.Argument(metavar="DENSE", help="The dense model, an .onnx file.")]
Pruned = Annotated[str, typer.Argument(metavar="PRUNED", help="The pruned model, an .onnx file.")]
Force = Annotated[
    bool, typer.Option("--force", help="Write the result even if it is further from the dense model than its input.")
]


def _command(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command whose parameters may be groups of options."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        app.command(name, cls=Command, no_args_is_help=False)(spread(function))
        return function

    return register


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{DISTRIBUTION} {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="As after the command.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="As after the command.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    given = {"verbose": verbose, "quiet": quiet, "debug": debug}
    if context.invoked_subcommand is not None:
        context.default_map = {context.invoked_subcommand: {name: True for name, value in given.items() if value}}


@_command("demo")
def demo(
    display: Display,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="Where the pruned and the repaired file go.")
    ] = "onnx-resuscitate-demo",
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Embedded net: resnet, vgg, mobilenet or densenet.")
    ] = None,
    sparsity: Sparsity = None,
) -> int:
    """Prune an embedded net until it collapses, repair it with every method, show what each gives back."""
    from onnx_asr.demo import MODEL, SPARSITY, run_demo
    from onnx_asr.networks import Execution

    terminal = Terminal(display)
    with terminal.progress() as progress:
        result = run_demo(
            output,
            model=MODEL if model is None else model,
            sparsity=SPARSITY if sparsity is None else sparsity,
            execution=Execution(Machine().runtime(display.verbose), progress=progress),
        )
    terminal.result({"command": "demo", **result.to_dict()}, *show.demo(result))
    return DONE


@_command("prune")
def prune(
    context: typer.Context,
    model: DenseArgument,
    output: Output,
    images: Images,
    walk: Walk,
    display: Display,
    sparsity: Sparsity = None,
    pattern: Annotated[
        str,
        typer.Option(
            metavar="unstructured|N:M|Nx1|channel",
            help="N:M keeps N of every M consecutive input channels, as 2:4, and leaves --sparsity out; Nx1 prunes N "
            "consecutive output channels together at each input position, as 4x1; channel removes a "
            "share of the channels, so that the net gets smaller and faster.",
        ),
    ] = "unstructured",
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="global|layer|erk|sensitivity",
            help="Rank over the whole net (the default for weights), or in each layer (for channels); erk spares small "
            "layers; sensitivity tries every layer on --data.",
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What a weight is worth: {scores}; magnitude if not given. The last three look at --data; 'row' and "
            "'variance' suit nets whose BatchNormalization was folded.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Samples for the scores, or the scope, that need them.")
    ] = None,
    samples: Samples = None,
    seed: Seed = 0,
    multiple: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="--pattern channel: leave multiples of N channels; kernels are fastest at 8 or 16."
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    report: Report = None,
) -> int:
    """Zero the weights of smallest score, or remove the weakest channels."""
    from onnx_asr.model_io import check_writable, is_external, save

    target = check_writable(output)
    if multiple is not None and pattern != "channel":
        raise OptionError(f"--multiple counts channels: give it with --pattern channel, not with {pattern}")
    for_weights = {"--score": score, "--data": data, "--samples": samples, "--report": report}
    wrong = [name for name, value in for_weights.items() if value is not None]
    if pattern == "channel" and wrong:
        raise OptionError(f"{wrong[0]} is about single weights: leave it out with --pattern channel")
    page = None if report is None else _page(report, target)
    given = {"scope": scope, "multiple": multiple, "include": include, "exclude": exclude}
    given |= {"score": score, "data": data, "samples": samples}
    choice: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    paths = {"model": model, "data": data, "output": str(target)}
    terminal = Terminal(display)
    if pattern == "channel":
        from onnx_asr.channel_pruning import prune_channels

        cut = prune_channels(model, sparsity, **choice)
        save(cut.model, target, external_data=is_external(model))
        values, shown = cut.to_dict(), show.prune_channels(cut, str(target), display.verbose)
    else:
        from onnx_asr.pruning import prune as run

        with terminal.progress() as progress:
            result = run(
                model,
                sparsity,
                pattern=pattern,
                seed=seed,
                preprocessing=images.preprocessing(),
                execution=walk.execution(display.verbose, progress),
                **choice,
            )
        save(result.model, target, external_data=is_external(model))
        if page is not None:
            from onnx_asr.report.data import prune_data
            from onnx_asr.report.html import write_report

            write_report(prune_data(_run(context, paths), result, model), page)
        values, shown = result.to_dict(), show.prune(result, str(target), display.verbose)
    terminal.result({"command": "prune", **paths, "report": _path(page), **values}, *shown, *show.report(page))
    return DONE


@_command("repair")
def repair(
    context: typer.Context,
    model: Pruned,
    output: Output,
    data: Data,
    method: Method,
    refit: Refit,
    calibration: Calibration,
    images: Images,
    walk: Walk,
    display: Display,
    dense: Dense = None,
    force: Force = False,
    report: Report = None,
) -> int:
    """Give a pruned model its accuracy back, from unlabelled samples."""
    from onnx_asr.model_io import check_writable, is_external, save
    from onnx_asr.repairing import repair as run

    target = check_writable(output)
    page = None if report is None else _page(report, target)
    options, preprocessing = repair_options(calibration, refit, method), images.preprocessing()
    terminal = Terminal(display)
    with terminal.progress() as progress:
        execution = walk.execution(display.verbose, progress)
        result = run(model, data, dense=dense, options=options, preprocessing=preprocessing, execution=execution)
        written = str(target) if result.improved or force else None
        if written is not None:
            save(result.model, target, external_data=is_external(model))
        if page is not None:
            from onnx_asr.report.data import repair_data
            from onnx_asr.report.html import write_report

            files = {"model": model, "dense": dense, "data": data, "output": written}
            subject = _run(context, files, preprocessing)
            write_report(repair_data(subject, result, model, dense, data, execution), page)
    values = {
        "command": "repair",
        "model": model,
        "dense": dense,
        "data": data,
        "preprocessing": _plain(preprocessing),
        "output": written,
        "report": _path(page),
        **result.to_dict(),
    }
    terminal.result(values, *show.repair(result, written, display.verbose), *show.report(page))
    return _verdict(result.improved, "repaired model", "the pruned one", target, force)


@_command("compress")
def compress(
    context: typer.Context,
    model: DenseArgument,
    output: Output,
    data: Data,
    refit: Refit,
    calibration: Calibration,
    images: Images,
    walk: Walk,
    display: Display,
    sparsity: Sparsity = None,
    pattern: Pattern = "unstructured",
    rounds: Annotated[int, typer.Option(metavar="N", help="Mask rounds.")] = 5,
    round_samples: Annotated[
        float, typer.Option(metavar="SHARE", help="Samples of every round but the last, as a share of all.")
    ] = 0.5,
    include: Include = None,
    exclude: Exclude = None,
    force: Force = False,
    report: Report = None,
) -> int:
    """Prune and repair jointly, in rounds: better than one after the other, and slower."""
    from onnx_asr.compression import CompressOptions
    from onnx_asr.compression import compress as run
    from onnx_asr.model_io import check_writable, is_external, save

    target = check_writable(output)
    page = None if report is None else _page(report, target)
    options = CompressOptions(sparsity, pattern, rounds, round_samples, tuple(include or ()), tuple(exclude or ()))
    repairing, preprocessing = repair_options(calibration, refit), images.preprocessing()
    terminal = Terminal(display)
    with terminal.progress() as progress:
        execution = walk.execution(display.verbose, progress)
        result = run(model, data, options, repair_options=repairing, preprocessing=preprocessing, execution=execution)
        improved = result.repair.improved
        written = str(target) if improved or force else None
        if written is not None:
            save(result.model, target, external_data=is_external(model))
        if page is not None:
            from onnx_asr.report.data import compress_data
            from onnx_asr.report.html import write_report

            subject = _run(context, {"model": model, "data": data, "output": written}, preprocessing)
            write_report(compress_data(subject, result, model, data, execution), page)
    values = {
        "command": "compress",
        "model": model,
        "data": data,
        "preprocessing": _plain(preprocessing),
        "output": written,
        "report": _path(page),
        **result.to_dict(),
    }
    terminal.result(values, *show.compress(result, written, display.verbose), *show.report(page))
    return _verdict(improved, "compressed model", "its last mask without repair", target, force)


@_command("shrink")
def shrink(model: Model, output: Output, machine: Machine, display: Display) -> int:
    """Remove channels that are dead or that nobody reads; the model computes what it did, in less time."""
    from onnx_asr.model_io import check_writable, is_external, save
    from onnx_asr.shrinking import shrink as run

    target = check_writable(output)
    terminal = Terminal(display)
    with terminal.progress() as progress:
        result = run(model, runtime=machine.runtime(display.verbose), progress=progress)
    save(result.model, target, external_data=is_external(model))
    values = {"command": "shrink", "model": model, "output": str(target), **result.to_dict()}
    terminal.result(values, *show.shrink(result, str(target), display.verbose))
    return DONE


@_command("sensitivity")
def sensitivity(
    model: DenseArgument,
    data: Data,
    calibration: Calibration,
    images: Images,
    walk: Walk,
    display: Display,
    sparsities: Annotated[
        str | None, typer.Option(metavar="S[,S]", help="Sparsities to try every layer at: {sensitivity} if not given.")
    ] = None,
    score: Annotated[
        str, typer.Option(metavar="NAME", help="What a weight is worth, as in prune: {scores}.")
    ] = "magnitude",
    include: Include = None,
    exclude: Exclude = None,
) -> int:
    """Show how far the outputs move when one layer alone is pruned and repaired, at several sparsities."""
    from onnx_asr.layer_sensitivity import sensitivity as run
    from onnx_asr.options import SENSITIVITY_SPARSITIES

    shares = numbers("sparsities", sparsities)
    options, preprocessing = repair_options(calibration, Refit()), images.preprocessing()
    terminal = Terminal(display)
    with terminal.progress() as progress:
        result = run(
            model,
            data,
            sparsities=SENSITIVITY_SPARSITIES if shares is None else shares,
            score=cast("Score", score),
            include=include or (),
            exclude=exclude or (),
            options=options,
            preprocessing=preprocessing,
            execution=walk.execution(display.verbose, progress),
        )
    values = {
        "command": "sensitivity",
        "model": model,
        "data": data,
        "preprocessing": _plain(preprocessing),
        **result.to_dict(),
    }
    terminal.result(values, *show.sensitivity(result, display.verbose))
    return DONE


@_command("evaluate")
def evaluate(
    model: Model,
    data: Data,
    images: Images,
    machine: Machine,
    display: Display,
    dense: Dense = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="TABLE",
            help="For a folder of images: a TSV or CSV of file name and class index; else its sub-folders are classes.",
        ),
    ] = None,
    label_offset: Annotated[
        int,
        typer.Option(metavar="N", help="Added to a label to give the model's class: 1 where class 0 is background."),
    ] = 0,
    samples: Samples = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
) -> int:
    """Measure a model: top-1 and top-5 with labels, agreement, KL and SNR against a dense model."""
    from onnx_asr.evaluation import evaluate as run

    preprocessing = images.preprocessing()
    terminal = Terminal(display)
    with terminal.progress() as progress:
        fidelity = run(
            model,
            data,
            dense=dense,
            labels=labels,
            preprocessing=preprocessing,
            samples=samples,
            seed=seed,
            label_offset=label_offset,
            batch_size=batch_size,
            runtime=machine.runtime(display.verbose),
            progress=progress,
        )
    values = {
        "command": "evaluate",
        "model": model,
        "dense": dense,
        "data": data,
        "preprocessing": _plain(preprocessing),
        **fidelity.to_dict(),
    }
    terminal.result(values, *show.evaluation(fidelity, model))
    return DONE


@_command("inspect")
def inspect(
    context: typer.Context,
    model: Model,
    images: Images,
    walk: Walk,
    display: Display,
    dense: Dense = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Samples to measure the damage on, as for repair; with --dense.")
    ] = None,
    channels: Annotated[
        str | None, typer.Option(metavar="LAYER", help="Show every channel of this layer instead of all layers.")
    ] = None,
    samples: Samples = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    report: Report = None,
) -> int:
    """Show what is in a model and, with its dense model and data, what pruning did to every channel."""
    from onnx_asr.damage import DAMAGE_SAMPLES
    from onnx_asr.inspection import inspect as run

    page = None if report is None else _page(report, None)
    if channels is not None:
        run(model).layer(channels)  # an unknown name shows before the damage is measured
    preprocessing = images.preprocessing()
    terminal = Terminal(display)
    with terminal.progress() as progress:
        result = run(
            model,
            dense=dense,
            data=data,
            preprocessing=preprocessing,
            samples=DAMAGE_SAMPLES if samples is None else samples,
            seed=seed,
            batch_size=batch_size,
            execution=walk.execution(display.verbose, progress),
        )
    layer = None if channels is None else result.layer(channels)
    if page is not None:
        from onnx_asr.report.data import inspect_data
        from onnx_asr.report.html import write_report

        files = {"model": model, "dense": dense, "data": data}
        write_report(inspect_data(_run(context, files, preprocessing), result), page)
    values = {
        "command": "inspect",
        "model": model,
        "dense": dense,
        "data": data,
        "preprocessing": _plain(preprocessing),
        "report": _path(page),
        **result.to_dict(),
    }
    if layer is not None:
        values["channels"] = layer.channel_table()
    shown = show.inspection(result, display.verbose) if layer is None else show.channels(layer)
    terminal.result(values, *shown, *show.report(page))
    return DONE


@_command("view")
def view(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or more .onnx files.")],
    display: Display,
    port: Annotated[
        int | None,
        typer.Option(metavar="N", help="Port of the first file, the next have those after it; free ones if not given."),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the addresses in the browser.")] = True,
) -> int:
    """Show models in Netron until interrupted; needs the extra 'view'."""
    from onnx_asr.viewing import serving, wait_for_the_end

    terminal = Terminal(display)
    with serving(models, port=port, browse=browser) as addresses:
        pairs = list(zip(models, addresses, strict=True))
        values = {"command": "view", "models": [{"model": model, "address": address} for model, address in pairs]}
        terminal.result(values, *show.view(pairs))
        wait_for_the_end()


def _page(report: str, output: Path | None) -> Path:
    """Where the report goes; what is in the way shows before any work is done."""
    from onnx_asr.report import check_report

    return check_report(report, output)


def _run(context: typer.Context, files: dict[str, str | None], preprocessing: Preprocessing | None = None) -> Run:
    """What a report tells about the call."""
    from onnx_asr.report.data import Run

    line = shlex.join([DISTRIBUTION, *context.find_root().obj])
    return Run(str(context.info_name), line, files, preprocessing)


def _path(page: Path | None) -> str | None:
    return None if page is None else str(page)


def _verdict(improved: bool, what: str, before: str, target: Path, force: bool) -> int:
    if improved:
        return DONE
    kept = f"'{target}' was written because of --force" if force else f"'{target}' was not written (--force does)"
    say("warning", f"the {what} is further from the dense model than {before}; {kept}")
    return CHECK_FAILED


def _plain(preprocessing: Preprocessing | None) -> dict[str, Any] | None:
    return None if preprocessing is None else preprocessing.to_dict()


@runtime_checkable
class _UsageError(Protocol):
    """What click's exceptions look like; click itself may be vendored in Typer."""

    exit_code: int

    def format_message(self) -> str:
        """The message."""


def main() -> NoReturn:
    """Run the command line and leave the process."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command line; every error becomes one line on stderr and an exit code."""
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of overflow: results are checked to be finite
    try:
        check_owner()
        code = app(list(arguments) or ["--help"], prog_name=DISTRIBUTION, standalone_mode=False, obj=list(arguments))
    except KeyboardInterrupt:
        code = INTERRUPTED
    except (SystemExit, BrokenPipeError):  # the reader of a help text has left; SystemExit is click's word for that
        drop_stdout()
        return DONE
    except Exception as error:
        if _is_interrupt(error):
            code = INTERRUPTED
        else:
            if "--debug" in arguments:
                say_traceback(error)
            say("error", _message(error))
            return BAD_INPUT
    if code == INTERRUPTED:
        say("error", "interrupted")
    return int(code or DONE)


def _is_interrupt(error: BaseException) -> bool:
    """Whether an error is click's name for an interrupt, or what a library made of one."""
    if type(error).__name__ == "Abort" or isinstance(error, KeyboardInterrupt):
        return True
    origin = error.__cause__ or error.__context__
    return origin is not None and _is_interrupt(origin)


def _message(error: Exception) -> str:
    """What a user can do something with."""
    if isinstance(error, OnnxAsrError):
        return str(error)
    if isinstance(error, _UsageError):
        path = getattr(getattr(error, "ctx", None), "command_path", DISTRIBUTION)
        return f"{error.format_message().rstrip('.')}; see {path} --help"
    if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
        return f"onnxruntime is missing: pip install '{DISTRIBUTION}[cpu]', or '{DISTRIBUTION}[gpu]' for CUDA"
    if isinstance(error, MemoryError):
        return "out of memory: lower --memory-limit, --samples or --batch-size"
    text = str(error).strip()
    first = f": {text.splitlines()[0]}" if text else ""
    return f"unexpected {type(error).__name__}{first}; run again with --debug for the whole story"
