"""Commands that measure models, or show them: parameters are options, docstrings are help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from onnx_asr.cli import show
from onnx_asr.cli.outcome import BAD_INPUT, CHECK_FAILED, DONE, Inputs, Outputs, given_model
from onnx_asr.cli.parameters import (
    CALIBRATION_AND_REFIT,
    WITHOUT_REPAIR,
    BatchSize,
    Calibrated,
    Data,
    Demands,
    Dense,
    DenseModel,
    ExternalLinks,
    ForceOrder,
    Grid,
    Images,
    JUnit,
    Labels,
    Machine,
    Model,
    Models,
    Plot,
    Repair,
    Report,
    Results,
    Samples,
    Scoring,
    Seed,
    Sensitivity,
    Shapes,
    Walk,
)
from onnx_asr.cli.terminal import Terminal, say
from onnx_asr.cli.values import ONE_OR_SEVERAL, Paths
from onnx_asr.errors import OptionError
from onnx_asr.json_values import plain
from onnx_asr.sweeping.grid import SweepSettings
from onnx_asr.targets.rules import TargetName

if TYPE_CHECKING:
    from onnx_asr.data import Preprocessing
    from onnx_asr.graph.model_io import ModelSource
    from onnx_asr.networks.fidelity import Fidelity


def sensitivity(
    model: DenseModel,
    /,
    *,
    data: Data,
    plot: Plot = None,
    external_links: ExternalLinks = False,
    options: Sensitivity = Sensitivity(),
    repair: Annotated[Calibrated, CALIBRATION_AND_REFIT] = Calibrated(),
    images: Images = Images(),
    machine: Walk = Walk(),
    terminal: Terminal = Terminal(),
) -> int:
    """Show how far the outputs move when one layer alone is pruned and repaired, at several sparsities."""
    from onnx_asr.pruning.sensitivity import sensitivity as run

    inputs = Inputs({"DENSE": model}, {"--data": data}, {"--preprocess": images.preprocess})
    outputs = Outputs.of(terminal, inputs, plot=plot)
    preprocessing, source, drawing = images.preprocessing(), given_model(model, external_links), outputs.path("--plot")
    with terminal.progress() as progress:
        execution = machine.execution(terminal.verbose, progress)
        how = replace(options, repair=repair.settled())
        result = run(source, data, how, preprocessing=preprocessing, execution=execution)
    if drawing is not None:
        from onnx_asr.report.sensitivity_figure import write_sensitivity

        write_sensitivity(result, drawing)
    values = {"model": model, "data": data, "preprocessing": preprocessing, **plain(result)}
    outputs.terminal.result(values, *show.sensitivity(result, terminal.verbose), plot=drawing)
    return DONE


def evaluate(
    models: Models,
    /,
    *,
    data: Data,
    dense: Dense = None,
    scoring: Scoring = Scoring(),
    external_links: ExternalLinks = False,
    images: Images = Images(),
    machine: Machine = Machine(),
    terminal: Terminal = Terminal(),
) -> int:
    """Measure models: top-1 and top-5 with labels; agreement, KL and SNR against a dense model; mAP of detectors."""
    preprocessing, networks = images.preprocessing(), [given_model(model, external_links) for model in models]
    reference = None if dense is None else given_model(dense, external_links)
    found = _scored(networks, data, reference, scoring, preprocessing, machine, terminal)
    results = [{"model": model, **plain(fidelity)} for model, fidelity in zip(models, found, strict=True)]
    values: dict[str, Any] = {"dense": dense, "data": data, "preprocessing": preprocessing}
    if scoring.detector.annotations is not None:
        values["detector"] = scoring.detector
    values |= results[0] if len(results) == 1 else {"models": results}
    terminal.result(values, *show.evaluation(models, found))
    return DONE


def check(
    model: Model,
    /,
    *,
    data: Annotated[
        Paths | None,
        ONE_OR_SEVERAL,
        Parameter(help="Samples to measure the outputs on, as for evaluate; size and sparsity need none."),
    ] = None,
    dense: Dense = None,
    demands: Demands = Demands(),
    scoring: Scoring = Scoring(),
    junit: JUnit = None,
    external_links: ExternalLinks = False,
    images: Images = Images(),
    machine: Machine = Machine(),
    terminal: Terminal = Terminal(),
) -> int:
    """Check a model against bars on accuracy, closeness to its dense model and size; exit code 1 if it misses one."""
    from onnx_asr.measuring.checking import check as run
    from onnx_asr.report.junit import write_junit

    bars, preprocessing = demands.bars(), images.preprocessing()
    bars.check_measurable(
        data=data is not None,
        dense=dense is not None,
        labels=scoring.labels is not None,
        metric=scoring.metric is not None,
        annotations=scoring.detector.annotations is not None,
    )
    tables = {
        "--labels": scoring.labels,
        "--annotations": scoring.detector.annotations,
        "--preprocess": images.preprocess,
    }
    outputs = Outputs.of(terminal, Inputs({"MODEL": model, "--dense": dense}, {"--data": data}, tables), junit=junit)
    network, fidelity = given_model(model, external_links), None
    if data is not None:
        reference = None if dense is None else given_model(dense, external_links)
        (fidelity,) = _scored([network], data, reference, scoring, preprocessing, machine, terminal)
    result, place = run(network, bars, fidelity), outputs.path("--junit")
    if place is not None:
        write_junit(result, model, place)
    values = {"model": model, "dense": dense, "data": data, "preprocessing": preprocessing, **plain(result)}
    outputs.terminal.result(values, *show.check(result), junit=place)
    if result.passed:
        return DONE
    say("warning", f"{len(result.missed)} of {len(result.criteria)} bars missed: {'; '.join(map(str, result.missed))}")
    return CHECK_FAILED


def _scored(
    models: Sequence[ModelSource],
    data: Paths,
    dense: ModelSource | None,
    scoring: Scoring,
    preprocessing: Preprocessing | None,
    machine: Machine,
    terminal: Terminal,
) -> list[Fidelity]:
    """What evaluate measures."""
    from onnx_asr.measuring.evaluation import Scoring as LibraryScoring
    from onnx_asr.measuring.evaluation import evaluate_all

    with terminal.progress() as progress:
        execution = machine.execution(terminal.verbose, progress)
        how = LibraryScoring(**vars(scoring))
        return evaluate_all(models, data, how, dense=dense, preprocessing=preprocessing, execution=execution)


def inspect(
    model: Model,
    /,
    *,
    dense: Dense = None,
    force: ForceOrder = False,
    data: Annotated[
        Paths | None,
        ONE_OR_SEVERAL,
        Parameter(help="Samples to measure the damage on, as for repair; needs --dense."),
    ] = None,
    channels: Annotated[str | None, Parameter(help="Show every channel of this layer instead of all layers.")] = None,
    target: Annotated[
        TargetName | None,
        Parameter(
            help="Show which layers' zeros this runtime makes use of, by its documentation, and why not the others'; "
            '"file" shows what they are worth in bytes.'
        ),
    ] = None,
    shapes: Shapes = Shapes(),
    samples: Samples = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    report: Report = None,
    external_links: ExternalLinks = False,
    images: Images = Images(),
    machine: Walk = Walk(),
    terminal: Terminal = Terminal(),
) -> int:
    """Show what is in a model and, with its dense model and data, what pruning did to every channel."""
    from onnx_asr.measuring.damage import DAMAGE_SAMPLES
    from onnx_asr.measuring.inspection import inspect as run
    from onnx_asr.report.data import inspect_data

    inputs = Inputs({"MODEL": model, "--dense": dense}, {"--data": data}, {"--preprocess": images.preprocess})
    outputs, preprocessing = Outputs.of(terminal, inputs, report=report), images.preprocessing()
    network = given_model(model, external_links)
    reference = None if dense is None else given_model(dense, external_links)
    if channels is not None and target is not None:
        raise OptionError("--channels shows one layer, --target all of them: give one of the two")
    if channels is not None:
        run(network).layer(channels)  # an unknown name is an error before the damage is measured
    with terminal.progress() as progress:
        result = run(
            network,
            data,
            dense=reference,
            target=target,
            force=force,
            preprocessing=preprocessing,
            samples=DAMAGE_SAMPLES if samples is None else samples,
            seed=seed,
            batch_size=batch_size,
            input_shapes=shapes.shapes(),
            execution=machine.execution(terminal.verbose, progress),
        )
    files = {"model": model, "dense": dense, "data": data}
    outputs.write_page(outputs.page(partial(inspect_data, inspection=result), files, preprocessing))
    values = {**files, "preprocessing": preprocessing, **plain(result)}
    shown = show.inspection(result, terminal.verbose)
    if channels is not None:
        layer = result.layer(channels)
        values["channels"], shown = layer.channel_table(), show.channels(layer)
    outputs.terminal.result(values, *shown, report=outputs.path("--report"))
    return DONE


def view(
    models: Models,
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
        shown = [{"model": model, "address": address} for model, address in zip(models, servers, strict=True)]
        lines = ["{model}: {address}".format(**item) for item in shown]
        terminal.result({"models": shown}, *lines, "press Ctrl-C to stop")
        wait_for_the_end(servers)


def sweep(
    model: DenseModel,
    /,
    *,
    output: Results,
    data: Data,
    grid: Grid = Grid(),
    settings: Annotated[SweepSettings, WITHOUT_REPAIR] = SweepSettings(),
    test: Annotated[
        Paths | None,
        ONE_OR_SEVERAL,
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
    external_links: ExternalLinks = False,
    repair: Annotated[Repair, Parameter(parse="^(?!method$)")] = Repair(),
    images: Images = Images(),
    machine: Walk = Walk(),
    terminal: Terminal = Terminal(),
) -> int:
    """Prune at several sparsities, repair with several methods, score every model; continues an earlier run."""
    from onnx_asr.report.sweep_data import sweep_data
    from onnx_asr.sweeping.pipeline import sweep as run

    tables = {"--labels": labels, "--preprocess": images.preprocess}
    inputs = Inputs({"DENSE": model}, {"--data": data, "--test": test}, tables)
    outputs = Outputs.of(terminal, inputs, table=output, report=report, plot=plot)
    preprocessing, drawing = images.preprocessing(), outputs.path("--plot")
    if workers is not None and cluster is not None:
        raise OptionError("--workers counts processes of this machine, --cluster names other ones: give one of them")
    source = given_model(model, external_links)
    with terminal.progress() as progress:
        result = run(
            source,
            data,
            grid,
            replace(settings, repair=repair.settled()),
            preprocessing=preprocessing,
            test=test,
            labels=labels,
            results=output,
            workers=workers,
            cluster=cluster,
            execution=machine.execution(terminal.verbose, progress),
        )
    files = {"model": model, "data": data, "test": test, "output": output}
    if drawing is not None:
        from onnx_asr.report.sweep_figure import write_plot

        write_plot(result, drawing)
    outputs.write_page(outputs.page(partial(sweep_data, result=result), files, preprocessing))
    values = {**files, "preprocessing": preprocessing, **plain(result)}
    outputs.terminal.result(values, *show.sweep(result, output), plot=drawing, report=outputs.path("--report"))
    failed = sum(map(len, result.failures.values()))
    if failed:
        say("warning", f"{failed} of {len(result.cells)} cells failed, for: {'; '.join(result.failures)}")
    return BAD_INPUT if failed == len(result.cells) else DONE
