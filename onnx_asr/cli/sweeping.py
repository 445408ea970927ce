"""The command that tries many models and keeps their scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from onnx_asr.cli import show
from onnx_asr.cli.command import BAD_INPUT, DONE, Page
from onnx_asr.cli.parameters import (
    WITHOUT_REPAIR,
    Data,
    DenseModel,
    Grid,
    Images,
    Labels,
    Plot,
    Repair,
    Report,
    Walk,
)
from onnx_asr.cli.terminal import Terminal, say
from onnx_asr.errors import OptionError
from onnx_asr.graph.files import check_writable
from onnx_asr.json_values import plain
from onnx_asr.sweeping.grid import SweepSettings


def sweep(
    model: DenseModel,
    /,
    *,
    output: Annotated[
        str,
        Parameter(name=("--output", "-o"), help="A JSON file for the cells; finished ones that it holds are kept."),
    ],
    data: Data,
    grid: Grid = Grid(),
    settings: Annotated[SweepSettings, WITHOUT_REPAIR] = SweepSettings(),
    test: Annotated[
        str | None,
        Parameter(help="Samples to score on, all of them; by default --verify-samples are held out of --data."),
    ] = None,
    labels: Labels = None,
    workers: Annotated[
        int | None,
        Parameter(
            help="Processes to run cells in, which share the cores; by default one per core, at most 8. More than one "
            "needs the extra 'distributed'."
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        Parameter(
            help="Run cells on the workers of a Dask scheduler instead, such as tcp://host:8786; they read the same "
            "paths."
        ),
    ] = None,
    plot: Plot = None,
    report: Report = None,
    repair: Annotated[Repair, Parameter(parse="^(?!method$)")] = Repair(),
    images: Images = Images(),
    machine: Walk = Walk(),
    terminal: Terminal = Terminal(),
) -> int:
    """Prune at several sparsities, repair with several methods, score every model; continues an earlier run."""
    from onnx_asr.report import check_plot
    from onnx_asr.report.sweep_data import sweep_data
    from onnx_asr.sweeping.pipeline import sweep as run

    target = check_writable(output)
    page, preprocessing = Page.of(terminal, report, target), images.preprocessing()
    drawing = None if plot is None else check_plot(plot, target, page.path)
    if workers is not None and cluster is not None:
        raise OptionError("--workers counts processes of this machine, --cluster names other ones: give one of them")
    with terminal.progress() as progress:
        result = run(
            model,
            data,
            grid,
            replace(settings, repair=repair.settled()),
            preprocessing=preprocessing,
            test=test,
            labels=labels,
            results=target,
            workers=workers,
            cluster=cluster,
            execution=machine.execution(terminal.verbose, progress),
        )
    files = {"model": model, "data": data, "test": test, "output": str(target)}
    if drawing is not None:
        from onnx_asr.report.sweep_figure import write_plot

        write_plot(result, drawing)
    page.write(lambda run: sweep_data(run, result), files, preprocessing)
    terminal.result(
        {**files, "preprocessing": preprocessing, **plain(result)},
        *show.sweep(result, str(target)),
        plot=drawing,
        report=page.path,
    )
    failed = sum(map(len, result.failures.values()))
    if failed:
        say("warning", f"{failed} of {len(result.cells)} cells failed, for: {'; '.join(result.failures)}")
    return BAD_INPUT if failed == len(result.cells) else DONE
