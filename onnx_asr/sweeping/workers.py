"""Cells on Dask workers: processes of this machine, or those of an existing cluster.

A plugin reads the models and the samples once per worker; Dask also gives it to workers that start later in place of
killed ones. Each pruned model is a task of its own, whose result the cells of its goal share.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast
from uuid import uuid4

import dask
import onnx
from dask.system import CPU_COUNT
from distributed import Client, Future, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker
from distributed import TimeoutError as DaskTimeout
from distributed.scheduler import KilledWorker
from distributed.utils import silence_logging_cmgr

from onnx_asr.blas import BLAS_THREADS
from onnx_asr.data import Dataset
from onnx_asr.errors import DataError, OnnxAsrError, OptionError
from onnx_asr.graph.tensors import is_self_contained
from onnx_asr.networks.execution import Execution, silent
from onnx_asr.sweeping.grid import Cell
from onnx_asr.sweeping.result import Outcome, outcome_of
from onnx_asr.sweeping.workspace import Setup, Workspace

T = TypeVar("T")

_MOST = 8  # local workers by default: each holds samples and activations of its own
_PATIENCE = 30  # seconds for a scheduler to answer, and for a first worker to appear


def on_workers(
    workspace: Workspace, cells: Sequence[Cell], workers: int | None, cluster: str | None, execution: Execution
) -> Generator[tuple[Cell, Outcome], None, None]:
    """Cells as they finish, in any order; see :func:`onnx_asr.sweep`.

    Raises:
        OptionError: A model that cannot be sent, or a cluster that cannot be reached.
        OnnxAsrError: When the cluster is lost during the sweep.
    """
    if not is_self_contained(workspace.dense):
        raise OptionError("a model over 2 GB cannot be sent between workers: give --workers 1")
    count = min(workers or min(CPU_COUNT, _MOST), len(cells))
    share = 1 if cluster is not None else max(1, CPU_COUNT // count)
    threads = execution.runtime.threads or share
    theirs = Execution(replace(execution.runtime, threads=threads), execution.memory_limit, silent)
    plugin = _WorkspacePlugin(_sendable(workspace), theirs, workspace.conditions, ours=cluster is None)
    execution.progress("starting the workers", 0.0)
    with _local(count, threads) if cluster is None else _remote(cluster) as client:
        client.register_plugin(plugin, name=plugin.name)
        futures: dict[Future[Outcome], Cell] = {}
        try:
            submit = partial(client.submit, _task, plugin.name, pure=False)
            pruned = {goal: submit(Workspace.pruned, goal) for goal in {cell.goal for cell in cells}}
            for cell in cells:
                needed = None if cell.method == "compress" else pruned[cell.goal]
                futures[submit(Workspace.score, cell, needed)] = cell
            del pruned, needed  # a pruned model is kept while cells wait for it
            for future in as_completed(futures):
                if future.cancelled():
                    raise OnnxAsrError(
                        "the workers are lost: the scheduler ended, or the cells were cancelled; run the sweep again "
                        "to continue"
                    )
                yield futures[future], outcome_of(partial(_result, future))
        finally:
            with suppress(OSError):  # the scheduler has ended
                client.cancel(list(futures), force=True)
                client.unregister_worker_plugin(plugin.name)


def _result(future: Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except KilledWorker as error:
        raise OnnxAsrError(
            f"its worker died {error.allowed_failures + 1} times; if memory is short, give fewer --workers or a "
            "--memory-limit"
        ) from error


@contextmanager
def _local(count: int, threads: int) -> Iterator[Client]:
    """Processes of this machine that end with the context; onnxruntime and BLAS use the same number of threads."""
    environment = {
        f"distributed.nanny.pre-spawn-environ.{name}": threads for name in ("OMP_NUM_THREADS", *BLAS_THREADS)
    }
    with (
        _environment_kept(),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        dask.config.set({**environment, "temporary-directory": folder}),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # HTTP is served anyway: not on a fixed port
            silence_logs=logging.CRITICAL,
            local_directory=folder,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Remove what Dask adds to the environment for its workers: the next ones may need something else."""
    names = set(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - names:
            del os.environ[name]


@contextmanager
def _remote(address: str) -> Iterator[Client]:
    """An existing cluster, which keeps running."""
    try:
        client = Client(address, timeout=_PATIENCE)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"no Dask scheduler answers at {address} ({error}): start one (dask scheduler), and give its address, such "
            "as tcp://host:8786"
        ) from error
    with silence_logging_cmgr(logging.CRITICAL), client:  # an error reports the loss of the scheduler
        try:
            client.wait_for_workers(1, timeout=_PATIENCE)
        except DaskTimeout:
            raise OptionError(
                f"the scheduler at {address} has no workers: start some (dask worker {address})"
            ) from None
        yield client


class _WorkspacePlugin(WorkerPlugin):
    """Makes a worker's workspace when the first cell asks for it, so that errors are reported like a cell's."""

    def __init__(self, setup: Setup, execution: Execution, conditions: Mapping[str, Any], ours: bool) -> None:
        self.name = f"onnx-resuscitate-sweep-{uuid4().hex}"
        self.execution = execution
        self._setup = setup
        self._conditions = conditions
        self._ours = ours
        self._folder = os.getcwd()

    def setup(self, worker: Worker) -> None:
        """Prepare for tasks in several threads; our own processes leave interrupts to the one that started them."""
        if self._ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._lock = threading.Lock()
        self._workspace: Workspace | None = None

    def workspace(self) -> Workspace:
        """The worker's workspace.

        Raises:
            DataError: When its conditions differ from those that the sweep was started with.
        """
        with self._lock:
            if self._workspace is None:
                if self._folder not in sys.path:
                    sys.path.insert(0, self._folder)  # where a metric may be
                workspace = Workspace(self._setup, self.execution)
                for name, value in self._conditions.items():
                    if workspace.conditions[name] != value:
                        raise DataError(
                            f"worker {get_worker().address} finds another {name} than the sweep was started with "
                            f"({workspace.conditions[name]}, not {value}): give paths that lead to the same files "
                            "everywhere, and install one version"
                        )
                self._workspace = workspace
            return self._workspace


def _task(plugin: str, method: Callable[..., T], *arguments: Any) -> T:
    """Call a method of the worker's workspace."""
    here = cast(_WorkspacePlugin, get_worker().plugins[plugin])
    return method(here.workspace(), *arguments, here.execution)


def _sendable(workspace: Workspace) -> Setup:
    """The setup with absolute paths, and everything else opened: a reader can be read only once."""
    setup = workspace.setup
    dense = _path_or(setup.dense, workspace.dense)
    data, test = _path_or(setup.data, workspace.calibration), _path_or(setup.test, workspace.scored)
    labels = None if setup.labels is None else os.path.abspath(setup.labels)
    return replace(setup, dense=dense, data=data, test=test, labels=labels)


def _path_or(source: Any, opened: Dataset | onnx.ModelProto) -> Any:
    if source is None:
        return None
    if isinstance(source, (list, tuple)) and all(isinstance(item, (str, os.PathLike)) for item in source):
        return [os.path.abspath(item) for item in source]
    return os.path.abspath(source) if isinstance(source, (str, os.PathLike)) else opened
