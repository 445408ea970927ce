"""The commands that write a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from onnx_asr.cli import show
from onnx_asr.cli.command import DONE, Page, command, plain, timed, verdict
from onnx_asr.cli.parameters import (
    Calibration,
    Data,
    Dense,
    DenseArgument,
    Display,
    Exclude,
    Force,
    Goal,
    Images,
    Include,
    Machine,
    Method,
    MethodSettings,
    Model,
    Output,
    Pattern,
    Pruned,
    Refit,
    Report,
    Rounds,
    Samples,
    Scope,
    Score,
    Seed,
    Sparsity,
    Timing,
    Walk,
    repair_options,
)
from onnx_asr.cli.terminal import Terminal
from onnx_asr.errors import OptionError


@command("demo")
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
    from onnx_asr.cli.demo import MODEL, SPARSITY, run_demo
    from onnx_asr.networks.execution import Execution

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


@command("prune")
def prune(
    context: typer.Context,
    model: DenseArgument,
    output: Output,
    goal: Goal,
    timing: Timing,
    images: Images,
    walk: Walk,
    display: Display,
    pattern: Annotated[
        str,
        typer.Option(
            metavar="unstructured|N:M|Nx1|channel",
            help="N:M keeps N of every M consecutive input channels, as 2:4, and leaves --sparsity out; Nx1 prunes N "
            "consecutive output channels together at each input position, as 4x1; channel removes a "
            "share of the channels, so that the net gets smaller and faster.",
        ),
    ] = "unstructured",
    scope: Scope = None,
    score: Score = None,
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
    from onnx_asr.graph.files import check_writable
    from onnx_asr.graph.model_io import is_external, save
    from onnx_asr.pruning.channels import prune_channels
    from onnx_asr.pruning.options import ChannelPruneOptions, PruneOptions
    from onnx_asr.pruning.zeros import prune as run
    from onnx_asr.report.data import prune_data

    target = check_writable(output)
    if multiple is not None and pattern != "channel":
        raise OptionError(f"--multiple counts channels: give it with --pattern channel, not with {pattern}")
    for_weights = {"--score": score, "--data": data, "--samples": samples, "--report": report}
    wrong = [name for name, value in for_weights.items() if value is not None]
    if pattern == "channel" and wrong:
        raise OptionError(f"{wrong[0]} is about single weights: leave it out with --pattern channel")
    page = Page.of(context, report, target)
    given = {"scope": scope, "multiple": multiple, "score": score, "samples": samples}
    choice: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    choice |= {"include": tuple(include or ()), "exclude": tuple(exclude or ()), **goal.given(pattern == "channel")}
    paths = {"model": model, "data": data, "output": str(target)}
    shapes, terminal = timing.shapes(), Terminal(display)
    stopwatch = timing.stopwatch(model, walk.runtime(display.verbose))
    with terminal.progress() as progress:
        execution = walk.execution(display.verbose, progress)
        if pattern == "channel":
            cut = prune_channels(model, ChannelPruneOptions(**choice), input_shapes=shapes, execution=execution)
            latency = cut.latency or (stopwatch.time(cut.model) if stopwatch else None)
            save(cut.model, target, external_data=is_external(model))
            values, shown = cut.to_dict(), show.prune_channels(cut, str(target), display.verbose, latency)
        else:
            preprocessing, options = images.preprocessing(), PruneOptions(pattern=pattern, seed=seed, **choice)
            result = run(model, data, options, preprocessing=preprocessing, input_shapes=shapes, execution=execution)
            latency = stopwatch.time(result.model) if stopwatch else None
            save(result.model, target, external_data=is_external(model))
            page.write(lambda run: prune_data(run, result, model), paths)
            values, shown = result.to_dict(), show.prune(result, str(target), display.verbose, latency)
    values = {"command": "prune", **paths, "report": page.name, **values, **timed(latency)}
    terminal.result(values, *shown, *show.report(page.path))
    return DONE


@command("repair")
def repair(
    context: typer.Context,
    model: Pruned,
    output: Output,
    data: Data,
    settings: MethodSettings,
    refit: Refit,
    calibration: Calibration,
    images: Images,
    walk: Walk,
    display: Display,
    method: Method = None,
    dense: Dense = None,
    force: Force = False,
    report: Report = None,
) -> int:
    """Give a pruned model its accuracy back, from unlabelled samples."""
    from onnx_asr.graph.files import check_writable
    from onnx_asr.graph.model_io import is_external, save
    from onnx_asr.repairing.pipeline import repair as run
    from onnx_asr.report.data import repair_data

    target = check_writable(output)
    page = Page.of(context, report, target)
    options, preprocessing = repair_options(calibration, refit, settings, method), images.preprocessing()
    terminal = Terminal(display)
    with terminal.progress() as progress:
        execution = walk.execution(display.verbose, progress)
        result = run(model, data, options, dense=dense, preprocessing=preprocessing, execution=execution)
        written = str(target) if result.improved or force else None
        if written is not None:
            save(result.model, target, external_data=is_external(model))
        files = {"model": model, "dense": dense, "data": data, "output": written}
        page.write(lambda run: repair_data(run, result, model, dense, data, execution), files, preprocessing)
    values = {
        "command": "repair",
        "model": model,
        "dense": dense,
        "data": data,
        "preprocessing": plain(preprocessing),
        "output": written,
        "report": page.name,
        **result.to_dict(),
    }
    terminal.result(values, *show.repair(result, written, display.verbose), *show.report(page.path))
    return verdict(result.improved, "repaired model", "the pruned one", target, force)


@command("compress")
def compress(
    context: typer.Context,
    model: DenseArgument,
    output: Output,
    data: Data,
    refit: Refit,
    calibration: Calibration,
    timing: Timing,
    images: Images,
    walk: Walk,
    display: Display,
    sparsity: Sparsity = None,
    pattern: Pattern = "unstructured",
    rounds: Rounds = 5,
    round_samples: Annotated[
        float, typer.Option(metavar="SHARE", help="Samples of every round but the last, as a share of all.")
    ] = 0.5,
    include: Include = None,
    exclude: Exclude = None,
    force: Force = False,
    report: Report = None,
) -> int:
    """Prune and repair jointly, in rounds: better than one after the other, and slower."""
    from onnx_asr.graph.files import check_writable
    from onnx_asr.graph.model_io import is_external, save
    from onnx_asr.pruning.compression import compress as run
    from onnx_asr.pruning.options import CompressOptions
    from onnx_asr.report.data import compress_data

    target = check_writable(output)
    page = Page.of(context, report, target)
    names, settings = (tuple(include or ()), tuple(exclude or ())), repair_options(calibration, refit)
    options = CompressOptions(sparsity, pattern, rounds, round_samples, *names, repair=settings)
    preprocessing = images.preprocessing()
    stopwatch = timing.stopwatch(model, walk.runtime(display.verbose))
    terminal = Terminal(display)
    with terminal.progress() as progress:
        execution = walk.execution(display.verbose, progress)
        result = run(
            model,
            data,
            options,
            preprocessing=preprocessing,
            input_shapes=timing.shapes(),
            execution=execution,
        )
        latency = stopwatch.time(result.model) if stopwatch else None
        improved = result.repair.improved
        written = str(target) if improved or force else None
        if written is not None:
            save(result.model, target, external_data=is_external(model))
        files = {"model": model, "data": data, "output": written}
        page.write(lambda run: compress_data(run, result, model, data, execution), files, preprocessing)
    values = {
        "command": "compress",
        "model": model,
        "data": data,
        "preprocessing": plain(preprocessing),
        "output": written,
        "report": page.name,
        **result.to_dict(),
        **timed(latency),
    }
    terminal.result(values, *show.compress(result, written, display.verbose, latency), *show.report(page.path))
    return verdict(improved, "compressed model", "its last mask without repair", target, force)


@command("shrink")
def shrink(model: Model, output: Output, timing: Timing, machine: Machine, display: Display) -> int:
    """Remove channels that are dead or that nobody reads; the model computes what it did, in less time."""
    from onnx_asr.graph.files import check_writable
    from onnx_asr.graph.model_io import is_external, save
    from onnx_asr.networks.execution import Execution
    from onnx_asr.pruning.shrinking import shrink as run

    target = check_writable(output)
    runtime, terminal = machine.runtime(display.verbose), Terminal(display)
    stopwatch = timing.stopwatch(model, runtime)
    with terminal.progress() as progress:
        execution = Execution(runtime, progress=progress)
        result = run(model, input_shapes=timing.shapes(), execution=execution)
        latency = stopwatch.time(result.model) if stopwatch else None
    save(result.model, target, external_data=is_external(model))
    values = {"command": "shrink", "model": model, "output": str(target), **result.to_dict(), **timed(latency)}
    terminal.result(values, *show.shrink(result, str(target), display.verbose, latency))
    return DONE
