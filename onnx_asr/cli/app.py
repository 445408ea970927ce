"""The commands and the way out of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn, Protocol, runtime_checkable

import typer

from onnx_asr.cli import show
from onnx_asr.cli.parameters import (
    BatchSize,
    Command,
    Data,
    Dense,
    Display,
    Images,
    Machine,
    Method,
    Output,
    Samples,
    Seed,
    Walk,
    spread,
)
from onnx_asr.cli.terminal import Terminal, say, say_traceback
from onnx_asr.errors import OnnxAsrError
from onnx_asr.version import __version__

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_DISTRIBUTION, _PACKAGE = "onnx-resuscitate", "onnx_asr"

app = typer.Typer(
    name=_DISTRIBUTION,
    help="Give a pruned ONNX vision network its accuracy back: no retraining, no labels, no PyTorch.",
    epilog="Exit codes: 0 done; 1 done, but the repaired model is not better than its input; 2 bad usage or bad input; "
    "130 interrupted.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model, an .onnx file.")]
Pruned = Annotated[str, typer.Argument(metavar="PRUNED", help="The pruned model, an .onnx file.")]


def _command(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command whose parameters may be groups of options."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        app.command(name, cls=Command, no_args_is_help=False)(spread(function))
        return function

    return register


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{_DISTRIBUTION} {__version__}")
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
        str | None, typer.Option(metavar="NAME", help="Embedded net: {families}.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(metavar="S", help="Share of weights to zero, 0 <= S < 1.")] = None,
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
    model: Annotated[str, typer.Argument(metavar="DENSE", help="The dense model, an .onnx file.")],
    output: Output,
    sparsity: Annotated[float, typer.Option(metavar="S", help="Share of weights to zero, 0 <= S < 1.")],
    display: Display,
    scope: Annotated[
        str, typer.Option(metavar="global|layer", help="Compare magnitudes over the whole net, or in each layer.")
    ] = "global",
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="RE", help="Prune only nodes or weights whose name this finds; repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="RE", help="Spare nodes or weights whose name this finds; repeatable.")
    ] = None,
) -> int:
    """Zero the weights of smallest magnitude."""
    from onnx_asr.model_io import check_writable, is_external, save
    from onnx_asr.pruning import prune as run

    target = check_writable(output)
    # an unknown scope is the pipeline's to refuse
    result = run(model, sparsity, scope=scope, include=include or (), exclude=exclude or ())  # type: ignore[arg-type]
    save(result.model, target, external_data=is_external(model))
    terminal = Terminal(display)
    values = {"command": "prune", "model": model, "output": str(target), **result.to_dict()}
    terminal.result(values, *show.prune(result, str(target), display.verbose))
    return DONE


@_command("repair")
def repair(
    model: Pruned,
    output: Output,
    data: Data,
    method: Method,
    images: Images,
    walk: Walk,
    display: Display,
    dense: Dense = None,
    force: Annotated[bool, typer.Option("--force", help="Write the result even if it is no better than PRUNED.")] = False,
) -> int:
    """Give a pruned model its accuracy back, from unlabelled samples; exit code 1 if it came out no better."""
    from onnx_asr.model_io import check_writable, is_external, save
    from onnx_asr.repair import repair as run

    target = check_writable(output)
    options, preprocessing = method.options(), images.preprocessing()
    terminal = Terminal(display)
    with terminal.progress() as progress:
        execution = walk.execution(display.verbose, progress)
        result = run(model, data, dense=dense, options=options, preprocessing=preprocessing, execution=execution)
    written = str(target) if result.improved or force else None
    if written is not None:
        save(result.model, target, external_data=is_external(model))
    values = {
        "command": "repair",
        "model": model,
        "dense": dense,
        "data": data,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "output": written,
        **result.to_dict(),
    }
    terminal.result(values, *show.repair(result, written, display.verbose))
    if result.improved:
        return DONE
    kept = f"'{target}' was written because of --force" if force else f"'{target}' was not written (--force does)"
    say("warning", f"the repaired model is no closer to the dense one than its input; {kept}")
    return CHECK_FAILED


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
            help="For a folder of images: a TSV or CSV of file name and class index. Without it sub-folders are classes.",
        ),
    ] = None,
    label_offset: Annotated[
        int, typer.Option(metavar="N", help="Added to a label to give the model's class: 1 where class 0 is background.")
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
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        **fidelity.to_dict(),
    }
    terminal.result(values, *show.evaluation(fidelity, model))
    return DONE


@runtime_checkable
class _UsageError(Protocol):
    """What click's exceptions look like; click itself may be vendored in Typer."""

    exit_code: int

    def format_message(self) -> str:
        """The message."""


def main() -> NoReturn:
    """Run the command line and leave the process."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; every error becomes one line on stderr and an exit code."""
    try:
        code = app(list(arguments) or ["--help"], prog_name=_DISTRIBUTION, standalone_mode=False)
    except Exception as error:
        if "--debug" in arguments:
            say_traceback(error)
        say("error", _message(error))
        return BAD_INPUT
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        say("error", "interrupted")
    return int(code or DONE)
