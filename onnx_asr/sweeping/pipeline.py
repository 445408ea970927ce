"""The sweep pipeline: computes the cells that are not finished, here or on workers, and stores each as it finishes."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec

import onnx

from onnx_asr.data import Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.errors import OptionError
from onnx_asr.graph.model_io import ModelSource
from onnx_asr.networks.execution import Execution
from onnx_asr.ownership import DISTRIBUTION
from onnx_asr.repairing.options import check_at_least
from onnx_asr.sweeping.grid import Cell, PruneGoal, SweepGrid, SweepSettings, in_order
from onnx_asr.sweeping.result import Outcome, SweepResult, outcome_of
from onnx_asr.sweeping.store import ResultsFile
from onnx_asr.sweeping.workspace import Setup, Workspace

Finished = Generator[tuple[Cell, Outcome], None, None]


def sweep(
    model: ModelSource,
    data: DataSource,
    grid: SweepGrid | None = None,
    settings: SweepSettings | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    test: DataSource | None = None,
    labels: str | os.PathLike[str] | None = None,
    results: str | os.PathLike[str] | None = None,
    workers: int | None = 1,
    cluster: str | None = None,
    execution: Execution | None = None,
) -> SweepResult:
    """Prune at every sparsity and pattern, repair with every method, score on samples that were held out.

    Each goal is pruned once for all methods. A cell that cannot run, such as ``bn`` where BatchNormalization was
    folded, is listed with the reason; the other cells go on.

    Args:
        model: The dense model: a path, or an object of onnx, onnx-graphsurgeon or onnx-ir, which is not changed.
        data: Calibration samples, no labels needed, as for :func:`onnx_asr.repair`.
        grid: Sparsities, patterns and methods.
        settings: Settings that all cells share; the defaults are those of the pipelines.
        test: Samples to score on, all of them; None for those that the repair options hold out of ``data``, which
            "auto" (and scope "sensitivity") use to choose.
        labels: A table of labels for the scored samples, where they are a folder of images.
        preprocessing: Of images.
        results: A JSON file that is rewritten after every cell. An existing file is continued: its finished cells are
            kept, those of another grid too, and failed ones are tried again. A device or pipe is written into once, at
            the end.
        workers: Processes to run cells in; 1 for this process, None for one per core, at most 8. More than one needs
            the extra "distributed", and in a script a guard ``if __name__ == "__main__"``.
        cluster: Address of a Dask scheduler to run cells on instead, as "tcp://host:8786". Its workers, and local ones,
            open models and data that are given as paths themselves, so the paths have to lead to the same files
            everywhere; otherwise they refuse to work. Objects are sent to them.
        execution: Execution providers, memory limit (of each worker), progress. Threads 0 means all cores in this
            process, an equal share of them in each local worker, and one on a cluster.

    Raises:
        OptionError: Options out of range, or the extra is missing.
        ModelError: A dense model that cannot be repaired or run.
        DataError: Missing, broken or unfitting data or labels.
        OutputError: A results file of another sweep, or one that cannot be written.
    """
    execution = execution or Execution()
    grid, settings = grid or SweepGrid(), settings or SweepSettings()
    _check_workers(workers, cluster)
    store = None if results is None else ResultsFile(results)
    setup = Setup(model, data, test, None if labels is None else os.fspath(labels), preprocessing, settings)
    execution.progress("reading the samples", 0.0)
    workspace = Workspace(setup, execution)
    cells = {} if store is None else store.finished(workspace.conditions)
    kept, wanted = len(cells), [cell for cell in grid.cells if cell not in cells]

    def progress(stage: str, fraction: float) -> None:
        done = len(cells) - kept
        execution.progress(f"cell {done + 1} of {len(wanted)}: {stage}", (done + fraction) / len(wanted))

    with closing(_run(workspace, wanted, workers, cluster, replace(execution, progress=progress))) as finished:
        for cell, outcome in finished:
            cells[cell] = outcome
            done = len(cells) - kept
            execution.progress(f"{done} of {len(wanted)} cells done, last: {cell}", done / len(wanted))
            if store is not None and store.keeps:
                store.write(_result(workspace, cells))
    if store is not None and not store.keeps:
        store.write(_result(workspace, cells))
    execution.progress("done", 1.0)
    return _result(workspace, cells)


def _check_workers(workers: int | None, cluster: str | None) -> None:
    if workers is not None:
        check_at_least("workers", workers, 1)
    if (cluster is not None or (workers or 1) > 1) and find_spec("distributed") is None:
        raise OptionError(
            f"--workers and --cluster need Dask, which is not installed: pip install '{DISTRIBUTION}[distributed]'"
        )


def _run(
    workspace: Workspace, cells: Sequence[Cell], workers: int | None, cluster: str | None, execution: Execution
) -> Finished:
    if workers is None and find_spec("distributed") is None:
        workers = 1
    if not cells or (cluster is None and (workers == 1 or len(cells) == 1)):
        return _in_process(workspace, cells, execution)
    from onnx_asr.sweeping.workers import on_workers

    return on_workers(workspace, cells, workers, cluster, execution)


def _in_process(workspace: Workspace, cells: Sequence[Cell], execution: Execution) -> Finished:
    """One cell after another."""

    @lru_cache(maxsize=1)
    def pruned(goal: PruneGoal) -> onnx.ModelProto:
        return workspace.pruned(goal, execution)

    def scored(cell: Cell) -> Outcome:
        return workspace.score(cell, None if cell.method == "compress" else pruned(cell.goal), execution)

    for cell in cells:
        execution.progress(str(cell), 0.0)
        yield cell, outcome_of(partial(scored, cell))


def _result(workspace: Workspace, cells: dict[Cell, Outcome]) -> SweepResult:
    ordered = {cell: cells[cell] for cell in in_order(cells)}
    return SweepResult(workspace.conditions, workspace.dense_score, ordered, workspace.notes)
