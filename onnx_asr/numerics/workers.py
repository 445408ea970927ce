"""Threads for independent pieces of matrix work.

Each product runs on one thread, and pieces run side by side. What is a piece depends on shapes only and results are
joined in order, so that they have the same bits for any number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from functools import cache
from typing import TypeVar

from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # pieces per thread that are begun before the first of them is taken


class Workers:
    """A number of threads; with one, pieces are computed where their results are taken."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "numerics") if threads > 1 else None

    @staticmethod
    @cache
    def of(threads: int) -> Workers:
        """The process's own; 0 threads mean one per core that it may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Workers(threads or cores)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result of every item, in their order, with few of them ahead of the one taken."""
        if self._pool is None:
            yield from map(function, items)
            return
        begun: deque[Future[Result]] = deque()
        try:
            for item in items:
                begun.append(self._pool.submit(copy_context().run, function, item))  # with numpy's errstate
                if len(begun) == _AHEAD * self._threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

    def run(self, function: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Call a function for every item, for its effects on separate parts of arrays."""
        for _ in self.map(function, items):
            pass


ALONE = Workers()


def one_thread_per_product() -> AbstractContextManager[object]:
    """Within it, BLAS takes one thread for a product, whatever the environment says."""
    limits: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return limits


@cache
def _controller() -> ThreadpoolController:
    """The BLAS libraries of this process: those of numpy and scipy, which are loaded with this package's numerics."""
    return ThreadpoolController()
