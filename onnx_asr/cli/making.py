"""Commands that make models: parameters are options, docstrings are help, results are exit codes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from onnx_asr.cli import show
from onnx_asr.cli.outcome import DONE, Inputs, Outputs, given_model, verdict
from onnx_asr.cli.parameters import (
    CALIBRATION_AND_REFIT,
    WITHOUT_REPAIR,
    Data,
    Dense,
    DenseModel,
    ExternalLinks,
    Force,
    ForceRepair,
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
from onnx_asr.cli.values import ONE_OR_SEVERAL, Paths
from onnx_asr.errors import OptionError
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
    from onnx_asr.demo.pipeline import run_demo

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
    data: Annotated[
        Paths | None, ONE_OR_SEVERAL, Parameter(help="Samples for the scores, or the scope, that need them.")
    ] = None,
    report: Report = None,
    external_links: ExternalLinks = False,
    options: Pruning = Pruning(),
    timing: Timing = Timing(),
    images: Images = Images(),
    machine: Walk = Walk(),
    terminal: Terminal = Terminal(),
) -> int:
    """Zero the weights with the smallest scores, or remove the weakest channels."""
    from onnx_asr.pruning import channels, zeros
    from onnx_asr.report.data import prune_data

    tables = {"--preprocess": images.preprocess}
    inputs = Inputs(data={"--data": data}, tables=tables, edited=model)
    outputs = Outputs.of(terminal, inputs, model=output, report=report)
    how: PruneOptions | ChannelPruneOptions
    if options.pattern == ChannelPruneOptions.pattern:
        for name in (name for name, value in {"data": data, "report": report}.items() if value is not None):
            raise OptionError(f"--{name} {_NOT_FOR_CHANNELS}")
        how = options.of(ChannelPruneOptions, _NOT_FOR_CHANNELS)
    else:
        how = options.of(PruneOptions, "needs --pattern channel")
    source = given_model(model, external_links)
    result: zeros.PruneResult | channels.ChannelPruneResult
    with terminal.progress() as progress:
        execution, shapes = machine.execution(terminal.verbose, progress), timing.shapes()
        stopwatch = timing.stopwatch(source, execution)
        latency = None
        if isinstance(how, ChannelPruneOptions):
            result = channels.prune_channels(source, how, input_shapes=shapes, execution=execution)
            latency = result.latency
        else:
            given = images.preprocessing()
            result = zeros.prune(source, data, how, preprocessing=given, input_shapes=shapes, execution=execution)
        if stopwatch and latency is None:
            latency = stopwatch.time(result.model)
        files = {"model": model, "data": data, "output": output}
        page = None
        if isinstance(result, zeros.PruneResult):
            page = outputs.page(partial(prune_data, result=result, dense=source), files)
        path = outputs.write_model(result.model, model)
        outputs.write_page(page)
    values = {**files, **plain(result), "latency": latency}
    shown = show.prune(result, path, terminal.verbose, latency)
    outputs.terminal.result(values, *shown, report=outputs.path("--report"))
    return DONE


def repair(
    model: Pruned,
    /,
    *,
    output: Output,
    data: Data,
    dense: Dense = None,
    force: ForceRepair = False,
    report: Report = None,
    external_links: ExternalLinks = False,
    options: Repair = Repair(),
    images: Images = Images(),
    machine: Walk = Walk(),
    terminal: Terminal = Terminal(),
) -> int:
    """Give a pruned model its accuracy back, from unlabelled samples."""
    from onnx_asr.repairing.pipeline import repair as run
    from onnx_asr.report.data import repair_data

    tables = {"--preprocess": images.preprocess}
    inputs = Inputs({"--dense": dense}, {"--data": data}, tables, edited=model)
    outputs = Outputs.of(terminal, inputs, model=output, report=report)
    preprocessing = images.preprocessing()
    pruned = given_model(model, external_links)
    reference = None if dense is None else given_model(dense, external_links)
    with terminal.progress() as progress:
        execution = machine.execution(terminal.verbose, progress)
        result = run(
            pruned,
            data,
            options.settled(),
            dense=reference,
            force=force,
            preprocessing=preprocessing,
            execution=execution,
        )
        wanted = result.improved or force
        files = {"model": model, "dense": dense, "data": data, "output": output if wanted else None}
        values = partial(repair_data, result=result, pruned=pruned, dense=reference, data=data, execution=execution)
        page = outputs.page(values, files, preprocessing)
        path = outputs.write_model(result.model, model) if wanted else None
        outputs.write_page(page)
    printed = {**files, "preprocessing": preprocessing, **plain(result)}
    shown = show.repair(result, path, terminal.verbose)
    outputs.terminal.result(printed, *shown, report=outputs.path("--report"))
    return verdict(result, "repaired model", "the pruned one", Path(output), force)


def compress(
    model: DenseModel,
    /,
    *,
    output: Output,
    data: Data,
    force: Force = False,
    report: Report = None,
    external_links: ExternalLinks = False,
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

    tables = {"--preprocess": images.preprocess}
    inputs = Inputs(data={"--data": data}, tables=tables, edited=model)
    outputs = Outputs.of(terminal, inputs, model=output, report=report)
    preprocessing, source = images.preprocessing(), given_model(model, external_links)
    with terminal.progress() as progress:
        execution, shapes = machine.execution(terminal.verbose, progress), timing.shapes()
        stopwatch = timing.stopwatch(source, execution)
        how = replace(options or CompressOptions(), repair=repair.settled())
        result = run(source, data, how, preprocessing=preprocessing, input_shapes=shapes, execution=execution)
        latency = stopwatch.time(result.model) if stopwatch else None
        wanted = result.repair.improved or force
        files = {"model": model, "data": data, "output": output if wanted else None}
        values = partial(compress_data, result=result, dense=source, data=data, execution=execution)
        page = outputs.page(values, files, preprocessing)
        path = outputs.write_model(result.model, model) if wanted else None
        outputs.write_page(page)
    printed = {**files, "preprocessing": preprocessing, **plain(result), "latency": latency}
    shown = show.compress(result, path, terminal.verbose, latency)
    outputs.terminal.result(printed, *shown, report=outputs.path("--report"))
    return verdict(result.repair, "compressed model", "its last mask without repair", Path(output), force)


def shrink(
    model: Model,
    /,
    *,
    output: Output,
    external_links: ExternalLinks = False,
    timing: Timing = Timing(),
    machine: Machine = Machine(),
    terminal: Terminal = Terminal(),
) -> int:
    """Remove channels that are dead or unused; the model computes the same, in less time."""
    from onnx_asr.pruning.shrinking import shrink as run

    outputs = Outputs.of(terminal, Inputs(edited=model), model=output)
    source = given_model(model, external_links)
    with terminal.progress() as progress:
        execution = machine.execution(terminal.verbose, progress)
        stopwatch = timing.stopwatch(source, execution)
        result = run(source, input_shapes=timing.shapes(), execution=execution)
        latency = stopwatch.time(result.model) if stopwatch else None
        path = outputs.write_model(result.model, model)
    values = {"model": model, "output": path, **plain(result), "latency": latency}
    outputs.terminal.result(values, *show.shrink(result, path, terminal.verbose, latency))
    return DONE
