"""The commands that write a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from onnx_asr.cli import show
from onnx_asr.cli.command import DONE, Page, verdict, written
from onnx_asr.cli.parameters import (
    CALIBRATION_AND_REFIT,
    WITHOUT_REPAIR,
    Data,
    Dense,
    DenseModel,
    Force,
    Images,
    Machine,
    Model,
    Output,
    Pruned,
    Pruning,
    Repair,
    Report,
    Timing,
    Walk,
)
from onnx_asr.cli.terminal import Terminal
from onnx_asr.errors import OptionError
from onnx_asr.graph.files import check_writable
from onnx_asr.json_values import plain
from onnx_asr.pruning.options import ChannelPruneOptions, CompressOptions, PruneOptions

_NOT_FOR_CHANNELS = "does not apply to --pattern channel: drop it"


def demo(
    *,
    output: Annotated[
        str, Parameter(name=("--output", "-o"), help="Where to write the pruned and the repaired model.")
    ] = "onnx-resuscitate-demo",
    model: Annotated[str, Parameter(help="Embedded net: resnet, vgg, mobilenet or densenet.")] = "resnet",
    sparsity: Annotated[float, Parameter(help="Share of weights to prune, 0 <= S < 1.")] = 0.95,
    terminal: Terminal = Terminal(),
) -> int:
    """Prune an embedded net until it collapses, repair it with every method, and compare the results."""
    from onnx_asr.cli.demo import run_demo

    with terminal.progress() as progress:
        execution = Machine().execution(terminal.verbose, progress)
        result = run_demo(Path(output), model, sparsity, execution)
    terminal.result(plain(result), *show.demo(result))
    return DONE


def prune(
    model: DenseModel,
    /,
    *,
    output: Output,
    data: Annotated[str | None, Parameter(help="Samples for the scores, or the scope, that need them.")] = None,
    report: Report = None,
    options: Pruning = Pruning(),
    timing: Timing = Timing(),
    images: Images = Images(),
    machine: Walk = Walk(),
    terminal: Terminal = Terminal(),
) -> int:
    """Zero the weights with the smallest scores, or remove the weakest channels."""
    target = check_writable(output)
    if options.pattern == ChannelPruneOptions.pattern:
        for name in (name for name, value in {"data": data, "report": report}.items() if value is not None):
            raise OptionError(f"--{name} {_NOT_FOR_CHANNELS}")
        channels = options.of(ChannelPruneOptions, _NOT_FOR_CHANNELS)
        return _remove_channels(model, target, channels, timing, machine, terminal)
    page, zeros = Page.of(terminal, report, target), options.of(PruneOptions, "needs --pattern channel")
    return _zero_weights(model, target, data, zeros, page, timing, images, machine, terminal)


def _zero_weights(
    model: str,
    target: Path,
    data: str | None,
    options: PruneOptions,
    page: Page,
    timing: Timing,
    images: Images,
    machine: Walk,
    terminal: Terminal,
) -> int:
    from onnx_asr.pruning.zeros import prune as run
    from onnx_asr.report.data import prune_data

    with terminal.progress() as progress:
        execution, shapes = machine.execution(terminal.verbose, progress), timing.shapes()
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
    model: str, target: Path, options: ChannelPruneOptions, timing: Timing, machine: Walk, terminal: Terminal
) -> int:
    from onnx_asr.pruning.channels import prune_channels as run

    with terminal.progress() as progress:
        execution = machine.execution(terminal.verbose, progress)
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


def repair(
    model: Pruned,
    /,
    *,
    output: Output,
    data: Data,
    dense: Dense = None,
    force: Force = False,
    report: Report = None,
    options: Repair = Repair(),
    images: Images = Images(),
    machine: Walk = Walk(),
    terminal: Terminal = Terminal(),
) -> int:
    """Give a pruned model its accuracy back, from unlabelled samples."""
    from onnx_asr.repairing.pipeline import repair as run
    from onnx_asr.report.data import repair_data

    target = check_writable(output)
    page, preprocessing = Page.of(terminal, report, target), images.preprocessing()
    with terminal.progress() as progress:
        execution = machine.execution(terminal.verbose, progress)
        result = run(model, data, options.settled(), dense=dense, preprocessing=preprocessing, execution=execution)
        path = written(result.model, target, model, wanted=result.improved or force)
        files = {"model": model, "dense": dense, "data": data, "output": path}
        page.write(lambda run: repair_data(run, result, model, dense, data, execution), files, preprocessing)
    terminal.result(
        {**files, "preprocessing": preprocessing, **plain(result)},
        *show.repair(result, path, terminal.verbose),
        report=page.path,
    )
    return verdict(result.improved, "repaired model", "the pruned one", target, force)


def compress(
    model: DenseModel,
    /,
    *,
    output: Output,
    data: Data,
    force: Force = False,
    report: Report = None,
    options: Annotated[CompressOptions | None, WITHOUT_REPAIR] = None,
    repair: Annotated[Repair, CALIBRATION_AND_REFIT] = Repair(),
    timing: Timing = Timing(),
    images: Images = Images(),
    machine: Walk = Walk(),
    terminal: Terminal = Terminal(),
) -> int:
    """Prune and repair jointly, in rounds: better than one after the other, and slower."""
    from onnx_asr.pruning.compression import compress as run
    from onnx_asr.report.data import compress_data

    target = check_writable(output)
    page, preprocessing = Page.of(terminal, report, target), images.preprocessing()
    with terminal.progress() as progress:
        execution, shapes = machine.execution(terminal.verbose, progress), timing.shapes()
        stopwatch = timing.stopwatch(model, execution)
        how = replace(options or CompressOptions(), repair=repair.settled())
        result = run(model, data, how, preprocessing=preprocessing, input_shapes=shapes, execution=execution)
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


def shrink(
    model: Model,
    /,
    *,
    output: Output,
    timing: Timing = Timing(),
    machine: Machine = Machine(),
    terminal: Terminal = Terminal(),
) -> int:
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
