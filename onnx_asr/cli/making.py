"""The commands that write a model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from onnx_asr.cli import show
from onnx_asr.cli.command import DONE, Page, command, verdict, written
from onnx_asr.cli.options import Form, Given
from onnx_asr.cli.parameters import (
    Data,
    Dense,
    DenseModel,
    Force,
    Images,
    Machine,
    Model,
    Output,
    Pruned,
    Report,
    Timing,
    Walk,
)
from onnx_asr.cli.terminal import Terminal
from onnx_asr.errors import OptionError
from onnx_asr.graph.files import check_writable
from onnx_asr.json_values import plain
from onnx_asr.pruning.options import ChannelPruneOptions, CompressOptions, PruneOptions
from onnx_asr.repairing.options import RepairOptions


@command("demo")
def demo(
    terminal: Terminal,
    output: Annotated[str, Form("FOLDER", "Where to write the pruned and the repaired model.", ("--output", "-o"))] = (
        "onnx-resuscitate-demo"
    ),
    model: Annotated[str, Form("NAME", "Embedded net: resnet, vgg, mobilenet or densenet.")] = "resnet",
    sparsity: Annotated[float, Form("S", "Share of weights to prune, 0 <= S < 1.")] = 0.95,
) -> int:
    """Prune an embedded net until it collapses, repair it with every method, and compare the results."""
    from onnx_asr.cli.demo import run_demo

    with terminal.progress() as progress:
        execution = Machine().execution(terminal.verbose, progress)
        result = run_demo(Path(output), model, sparsity, execution)
    terminal.result(plain(result), *show.demo(result))
    return DONE


@command("prune")
def prune(
    terminal: Terminal,
    model: DenseModel,
    output: Output,
    options: Annotated[dict[str, Any], Given({"": PruneOptions, "--pattern channel: ": ChannelPruneOptions})],
    timing: Timing,
    images: Images,
    walk: Walk,
    pattern: Annotated[
        str,
        Form(
            "unstructured|N:M|Nx1|channel",
            "N:M keeps N of every M consecutive input channels, such as 2:4, and takes no --sparsity; Nx1 prunes N "
            "consecutive output channels together at each input position, such as 4x1; channel removes whole channels, "
            "so that the model gets smaller and faster.",
        ),
    ] = PruneOptions.pattern,
    data: Annotated[str | None, Form("PATH", "Samples for the scores, or the scope, that need them.")] = None,
    report: Report = None,
) -> int:
    """Zero the weights with the smallest scores, or remove the weakest channels."""
    target = check_writable(output)
    if pattern == ChannelPruneOptions.pattern:
        options.pop("seed", None)
        given = {"data": data, "report": report, **options}
        _check_offered(ChannelPruneOptions, given, "does not apply to --pattern channel: drop it")
        return _remove_channels(terminal, model, target, ChannelPruneOptions(**options), timing, walk)
    _check_offered(PruneOptions, options, f"needs --pattern channel, not {pattern}")
    page, zeros = Page.of(terminal, report, target), PruneOptions(pattern=pattern, **options)
    return _zero_weights(terminal, model, target, zeros, timing, images, walk, data, page)


def _check_offered(owner: type[PruneOptions | ChannelPruneOptions], given: dict[str, Any], otherwise: str) -> None:
    known = {field.name for field in fields(owner)}
    for name, value in given.items():
        if value is not None and name not in known:
            raise OptionError(f"--{name.replace('_', '-')} {otherwise}")


def _zero_weights(
    terminal: Terminal,
    model: str,
    target: Path,
    options: PruneOptions,
    timing: Timing,
    images: Images,
    walk: Walk,
    data: str | None,
    page: Page,
) -> int:
    from onnx_asr.pruning.zeros import prune as run
    from onnx_asr.report.data import prune_data

    with terminal.progress() as progress:
        execution, shapes = walk.execution(terminal.verbose, progress), timing.shapes()
        stopwatch = timing.stopwatch(model, execution)
        preprocessing = images.preprocessing()
        result = run(model, data, options, preprocessing=preprocessing, input_shapes=shapes, execution=execution)
        latency = stopwatch.time(result.model) if stopwatch else None
        files = {"model": model, "data": data, "output": written(result.model, target, model)}
        page.write(lambda run: prune_data(run, result, model), files)
    terminal.result(
        {**files, **plain(result), "latency": latency},
        *show.prune(result, str(target), terminal.verbose, latency),
        report=page.path,
    )
    return DONE


def _remove_channels(
    terminal: Terminal, model: str, target: Path, options: ChannelPruneOptions, timing: Timing, walk: Walk
) -> int:
    from onnx_asr.pruning.channels import prune_channels as run

    with terminal.progress() as progress:
        execution = walk.execution(terminal.verbose, progress)
        stopwatch = timing.stopwatch(model, execution)
        result = run(model, options, input_shapes=timing.shapes(), execution=execution)
        latency = result.latency or (stopwatch.time(result.model) if stopwatch else None)
        path = written(result.model, target, model)
    terminal.result(
        {"model": model, "data": None, "output": path, **plain(result), "latency": latency},
        *show.prune_channels(result, str(target), terminal.verbose, latency),
        report=None,
    )
    return DONE


@command("repair")
def repair(
    terminal: Terminal,
    model: Pruned,
    output: Output,
    data: Data,
    options: RepairOptions,
    images: Images,
    walk: Walk,
    dense: Dense = None,
    force: Force = False,
    report: Report = None,
) -> int:
    """Give a pruned model its accuracy back, from unlabelled samples."""
    from onnx_asr.repairing.pipeline import repair as run
    from onnx_asr.report.data import repair_data

    target = check_writable(output)
    page, preprocessing = Page.of(terminal, report, target), images.preprocessing()
    with terminal.progress() as progress:
        execution = walk.execution(terminal.verbose, progress)
        result = run(model, data, options, dense=dense, preprocessing=preprocessing, execution=execution)
        path = written(result.model, target, model, wanted=result.improved or force)
        files = {"model": model, "dense": dense, "data": data, "output": path}
        page.write(lambda run: repair_data(run, result, model, dense, data, execution), files, preprocessing)
    terminal.result(
        {**files, "preprocessing": preprocessing, **plain(result)},
        *show.repair(result, path, terminal.verbose),
        report=page.path,
    )
    return verdict(result.improved, "repaired model", "the pruned one", target, force)


@command("compress", without=("Method",))
def compress(
    terminal: Terminal,
    model: DenseModel,
    output: Output,
    data: Data,
    options: CompressOptions,
    timing: Timing,
    images: Images,
    walk: Walk,
    force: Force = False,
    report: Report = None,
) -> int:
    """Prune and repair jointly, in rounds: better than one after the other, and slower."""
    from onnx_asr.pruning.compression import compress as run
    from onnx_asr.report.data import compress_data

    target = check_writable(output)
    page, preprocessing = Page.of(terminal, report, target), images.preprocessing()
    with terminal.progress() as progress:
        execution, shapes = walk.execution(terminal.verbose, progress), timing.shapes()
        stopwatch = timing.stopwatch(model, execution)
        result = run(model, data, options, preprocessing=preprocessing, input_shapes=shapes, execution=execution)
        latency = stopwatch.time(result.model) if stopwatch else None
        improved = result.repair.improved
        path = written(result.model, target, model, wanted=improved or force)
        files = {"model": model, "data": data, "output": path}
        page.write(lambda run: compress_data(run, result, model, data, execution), files, preprocessing)
    terminal.result(
        {**files, "preprocessing": preprocessing, **plain(result), "latency": latency},
        *show.compress(result, path, terminal.verbose, latency),
        report=page.path,
    )
    return verdict(improved, "compressed model", "its last mask without repair", target, force)


@command("shrink")
def shrink(terminal: Terminal, model: Model, output: Output, timing: Timing, machine: Machine) -> int:
    """Remove channels that are dead or unused; the model computes the same, in less time."""
    from onnx_asr.pruning.shrinking import shrink as run

    target = check_writable(output)
    with terminal.progress() as progress:
        execution = machine.execution(terminal.verbose, progress)
        stopwatch = timing.stopwatch(model, execution)
        result = run(model, input_shapes=timing.shapes(), execution=execution)
        latency = stopwatch.time(result.model) if stopwatch else None
        path = written(result.model, target, model)
    terminal.result(
        {"model": model, "output": path, **plain(result), "latency": latency},
        *show.shrink(result, str(target), terminal.verbose, latency),
    )
    return DONE
