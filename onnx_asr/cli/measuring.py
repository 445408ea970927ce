"""The commands that measure or show models and write none."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from onnx_asr.cli import show
from onnx_asr.cli.command import DONE, Page
from onnx_asr.cli.parameters import (
    CALIBRATION_AND_REFIT,
    BatchSize,
    Calibrated,
    Data,
    Dense,
    DenseModel,
    Images,
    LabelOffset,
    Labels,
    Machine,
    Model,
    Plot,
    Report,
    Samples,
    Seed,
    Sensitivity,
    Walk,
)
from onnx_asr.cli.terminal import Terminal
from onnx_asr.json_values import plain


def sensitivity(
    model: DenseModel,
    /,
    *,
    data: Data,
    plot: Plot = None,
    options: Sensitivity = Sensitivity(),
    repair: Annotated[Calibrated, CALIBRATION_AND_REFIT] = Calibrated(),
    images: Images = Images(),
    machine: Walk = Walk(),
    terminal: Terminal = Terminal(),
) -> int:
    """Show how far the outputs move when one layer alone is pruned and repaired, at several sparsities."""
    from onnx_asr.pruning.sensitivity import sensitivity as run
    from onnx_asr.report import check_plot

    drawing = None if plot is None else check_plot(plot)
    preprocessing = images.preprocessing()
    with terminal.progress() as progress:
        execution = machine.execution(terminal.verbose, progress)
        how = replace(options, repair=repair.settled())
        result = run(model, data, how, preprocessing=preprocessing, execution=execution)
    if drawing is not None:
        from onnx_asr.report.sensitivity_figure import write_sensitivity

        write_sensitivity(result, drawing)
    values = {"model": model, "data": data, "preprocessing": preprocessing, **plain(result)}
    terminal.result(values, *show.sensitivity(result, terminal.verbose), plot=drawing)
    return DONE


def evaluate(
    model: Model,
    /,
    *,
    data: Data,
    dense: Dense = None,
    labels: Labels = None,
    label_offset: LabelOffset = 0,
    samples: Samples = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    images: Images = Images(),
    machine: Machine = Machine(),
    terminal: Terminal = Terminal(),
) -> int:
    """Measure a model: top-1 and top-5 with labels; agreement, KL and SNR against a dense model."""
    from onnx_asr.measuring.evaluation import evaluate as run

    preprocessing = images.preprocessing()
    with terminal.progress() as progress:
        fidelity = run(
            model,
            data,
            dense=dense,
            preprocessing=preprocessing,
            labels=labels,
            label_offset=label_offset,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            execution=machine.execution(terminal.verbose, progress),
        )
    values = {"model": model, "dense": dense, "data": data, "preprocessing": preprocessing, **plain(fidelity)}
    terminal.result(values, *show.evaluation(fidelity, model))
    return DONE


def inspect(
    model: Model,
    /,
    *,
    dense: Dense = None,
    data: Annotated[
        str | None, Parameter(help="Samples to measure the damage on, as for repair; needs --dense.")
    ] = None,
    channels: Annotated[str | None, Parameter(help="Show every channel of this layer instead of all layers.")] = None,
    samples: Samples = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    report: Report = None,
    images: Images = Images(),
    machine: Walk = Walk(),
    terminal: Terminal = Terminal(),
) -> int:
    """Show what is in a model and, with its dense model and data, what pruning did to every channel."""
    from onnx_asr.measuring.damage import DAMAGE_SAMPLES
    from onnx_asr.measuring.inspection import inspect as run
    from onnx_asr.report.data import inspect_data

    page, preprocessing = Page.of(terminal, report, None), images.preprocessing()
    if channels is not None:
        run(model).layer(channels)  # an unknown name is an error before the damage is measured
    with terminal.progress() as progress:
        result = run(
            model,
            data,
            dense=dense,
            preprocessing=preprocessing,
            samples=DAMAGE_SAMPLES if samples is None else samples,
            seed=seed,
            batch_size=batch_size,
            execution=machine.execution(terminal.verbose, progress),
        )
    files = {"model": model, "dense": dense, "data": data}
    page.write(lambda run: inspect_data(run, result), files, preprocessing)
    values = {**files, "preprocessing": preprocessing, **plain(result)}
    shown = show.inspection(result, terminal.verbose)
    if channels is not None:
        layer = result.layer(channels)
        values["channels"], shown = layer.channel_table(), show.channels(layer)
    terminal.result(values, *shown, report=page.path)
    return DONE


def view(
    models: Annotated[tuple[str, ...], Parameter(name="MODEL", help="One or more .onnx files.")],
    /,
    *,
    port: Annotated[
        int | None, Parameter(help="Port of the first file; the others have the ones after it. By default free ones.")
    ] = None,
    browser: Annotated[bool, Parameter(help="Open the addresses in the browser.")] = True,
    terminal: Terminal = Terminal(),
) -> int:
    """Show models in Netron until interrupted; needs the extra 'view'."""
    from onnx_asr.cli.viewing import serving, wait_for_the_end

    with serving(models, port=port, browse=browser) as servers:
        pairs = list(zip(models, servers, strict=True))
        values = {"models": [{"model": model, "address": address} for model, address in pairs]}
        terminal.result(values, *show.view(pairs))
        wait_for_the_end(servers)
