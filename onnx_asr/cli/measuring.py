"""The commands that look at models and write none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from onnx_asr.cli import show
from onnx_asr.cli.command import DONE, Page, command, plain
from onnx_asr.cli.parameters import (
    BatchSize,
    Calibration,
    Data,
    Dense,
    DenseArgument,
    Display,
    Exclude,
    Images,
    Include,
    LabelOffset,
    Labels,
    Machine,
    Model,
    Refit,
    Report,
    Samples,
    Seed,
    Walk,
    repair_options,
)
from onnx_asr.cli.terminal import Terminal
from onnx_asr.cli.values import numbers

if TYPE_CHECKING:
    from onnx_asr.pruning.options import Score


@command("sensitivity")
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
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the table, too: .svg or .png; needs the extra 'report'.")
    ] = None,
) -> int:
    """Show how far the outputs move when one layer alone is pruned and repaired, at several sparsities."""
    from onnx_asr.pruning.options import SENSITIVITY_SPARSITIES, SensitivityOptions
    from onnx_asr.pruning.sensitivity import sensitivity as run
    from onnx_asr.report import check_plot

    drawing = None if plot is None else check_plot(plot)
    shares = numbers("sparsities", sparsities)
    options = SensitivityOptions(
        SENSITIVITY_SPARSITIES if shares is None else shares,
        cast("Score", score),
        tuple(include or ()),
        tuple(exclude or ()),
        repair_options(calibration, Refit()),
    )
    preprocessing = images.preprocessing()
    terminal = Terminal(display)
    with terminal.progress() as progress:
        result = run(
            model,
            data,
            options,
            preprocessing=preprocessing,
            execution=walk.execution(display.verbose, progress),
        )
    if drawing is not None:
        from onnx_asr.report.sensitivity_figure import write_sensitivity

        write_sensitivity(result, drawing)
    values = {
        "command": "sensitivity",
        "model": model,
        "data": data,
        "plot": None if drawing is None else str(drawing),
        "preprocessing": plain(preprocessing),
        **result.to_dict(),
    }
    terminal.result(values, *show.sensitivity(result, display.verbose), *show.plot(drawing))
    return DONE


@command("evaluate")
def evaluate(
    model: Model,
    data: Data,
    images: Images,
    machine: Machine,
    display: Display,
    dense: Dense = None,
    labels: Labels = None,
    label_offset: LabelOffset = 0,
    samples: Samples = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
) -> int:
    """Measure a model: top-1 and top-5 with labels, agreement, KL and SNR against a dense model."""
    from onnx_asr.measuring.evaluation import evaluate as run
    from onnx_asr.networks.execution import Execution

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
            execution=Execution(machine.runtime(display.verbose), progress=progress),
        )
    values = {
        "command": "evaluate",
        "model": model,
        "dense": dense,
        "data": data,
        "preprocessing": plain(preprocessing),
        **fidelity.to_dict(),
    }
    terminal.result(values, *show.evaluation(fidelity, model))
    return DONE


@command("inspect")
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
    from onnx_asr.measuring.damage import DAMAGE_SAMPLES
    from onnx_asr.measuring.inspection import inspect as run
    from onnx_asr.report.data import inspect_data

    page = Page.of(context, report, None)
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
    files = {"model": model, "dense": dense, "data": data}
    page.write(lambda run: inspect_data(run, result), files, preprocessing)
    values = {
        "command": "inspect",
        "model": model,
        "dense": dense,
        "data": data,
        "preprocessing": plain(preprocessing),
        "report": page.name,
        **result.to_dict(),
    }
    if layer is not None:
        values["channels"] = layer.channel_table()
    shown = show.inspection(result, display.verbose) if layer is None else show.channels(layer)
    terminal.result(values, *shown, *show.report(page.path))
    return DONE


@command("view")
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
    from onnx_asr.cli.viewing import serving, wait_for_the_end

    terminal = Terminal(display)
    with serving(models, port=port, browse=browser) as addresses:
        pairs = list(zip(models, addresses, strict=True))
        values = {"command": "view", "models": [{"model": model, "address": address} for model, address in pairs]}
        terminal.result(values, *show.view(pairs))
        wait_for_the_end()
