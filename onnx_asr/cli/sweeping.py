"""The command that tries many models and keeps what they score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from onnx_asr.cli import show
from onnx_asr.cli.command import BAD_INPUT, DONE, Page, command, plain
from onnx_asr.cli.parameters import (
    Calibration,
    Data,
    DenseArgument,
    Display,
    Exclude,
    Images,
    Include,
    LabelOffset,
    Labels,
    MethodSettings,
    Refit,
    Report,
    Rounds,
    Scope,
    Score,
    Walk,
    repair_options,
)
from onnx_asr.cli.terminal import Terminal, say
from onnx_asr.cli.values import names, numbers
from onnx_asr.errors import OptionError

if TYPE_CHECKING:
    from onnx_asr.pruning.options import Scope as ScopeName
    from onnx_asr.pruning.options import Score as ScoreName


@command("sweep")
def sweep(
    context: typer.Context,
    model: DenseArgument,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FILE", help="A JSON file for the cells; finished ones that it holds are kept."
        ),
    ],
    data: Data,
    settings: MethodSettings,
    refit: Refit,
    calibration: Calibration,
    images: Images,
    walk: Walk,
    display: Display,
    sparsities: Annotated[
        str | None, typer.Option(metavar="S[,S]", help="Shares to prune: {sensitivity} if not given; N:M takes none.")
    ] = None,
    methods: Annotated[str, typer.Option(metavar="NAME[,NAME]", help="Any of {sweep_methods}.")] = "none,paired,refit",
    patterns: Annotated[
        str,
        typer.Option(metavar="NAME[,NAME]", help="Any of unstructured, N:M, Nx1 and channel, as in prune --pattern."),
    ] = "unstructured",
    scope: Scope = None,
    score: Score = None,
    include: Include = None,
    exclude: Exclude = None,
    rounds: Rounds = 5,
    test: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Samples to score on, all of them; if not given, --verify-samples are held out of --data.",
        ),
    ] = None,
    labels: Labels = None,
    label_offset: LabelOffset = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes to run cells in, which share the cores; one a core, at most 8, if not given; more than one "
            "needs the extra 'distributed'.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run cells on the workers of a Dask scheduler instead, as tcp://host:8786; they read the same paths.",
        ),
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the scores, too: .svg or .png; needs the extra 'report'.")
    ] = None,
    report: Report = None,
) -> int:
    """Prune at several sparsities, repair with several methods, score every model; go on where an earlier run ended."""
    from onnx_asr.graph.files import check_writable
    from onnx_asr.report import check_plot
    from onnx_asr.report.sweep_data import sweep_data
    from onnx_asr.sweeping.grid import SweepGrid, SweepSettings
    from onnx_asr.sweeping.pipeline import sweep as run

    target = check_writable(output)
    page = Page.of(context, report, target)
    drawing = None if plot is None else check_plot(plot, target, page.path)
    if workers is not None and cluster is not None:
        raise OptionError("--workers counts processes of this machine, --cluster names other ones: give one of them")
    shares = numbers("sparsities", sparsities)
    grid = SweepGrid(None if shares is None else tuple(shares), names(patterns), names(methods))
    common = SweepSettings(
        scope=cast("ScopeName", scope or SweepSettings.scope),
        score=cast("ScoreName", score or SweepSettings.score),
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        rounds=rounds,
        repair=repair_options(calibration, refit, settings),
        label_offset=label_offset,
    )
    preprocessing = images.preprocessing()
    terminal = Terminal(display)
    with terminal.progress() as progress:
        result = run(
            model,
            data,
            grid,
            common,
            test=test,
            labels=labels,
            preprocessing=preprocessing,
            results=target,
            workers=workers,
            cluster=cluster,
            execution=walk.execution(display.verbose, progress),
        )
    files = {"model": model, "data": data, "test": test, "output": str(target)}
    if drawing is not None:
        from onnx_asr.report.sweep_figure import write_plot

        write_plot(result, drawing)
    page.write(lambda run: sweep_data(run, result), files, preprocessing)
    values = {
        "command": "sweep",
        **files,
        "preprocessing": plain(preprocessing),
        "plot": None if drawing is None else str(drawing),
        "report": page.name,
        **result.to_dict(),
    }
    terminal.result(values, *show.sweep(result, str(target), drawing), *show.report(page.path))
    failed = sum(map(len, result.failures.values()))
    if failed:
        say("warning", f"{failed} of {len(result.cells)} cells failed, for: {'; '.join(result.failures)}")
    return BAD_INPUT if failed == len(result.cells) else DONE
