"""Independent pieces of work on threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from onnx_asr.numerics.workers import Workers, one_thread_per_product

COUNTS = pytest.mark.parametrize("threads", [1, 2, 5])


@COUNTS
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    waits = [threading.Event() for _ in range(20)]

    def work(number: int) -> int:
        if threads > 1 and number % 2 == 0:  # the next one ends before it
            waits[number].wait(5)
        elif threads > 1:
            waits[number - 1].set()
        return number**2

    assert list(Workers(threads).map(work, range(20))) == [number**2 for number in range(20)]


@COUNTS
def test_few_items_are_taken_ahead(threads: int) -> None:
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    results = Workers(threads).map(lambda number: number, items())
    assert next(results) == 0
    assert len(taken) <= 2 * threads


@COUNTS
def test_an_error_reaches_the_caller(threads: int) -> None:
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("the third")
        return number

    with pytest.raises(ValueError, match="the third"):
        list(Workers(threads).map(work, range(10)))


@COUNTS
def test_numpy_keeps_its_error_state(threads: int) -> None:
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        list(Workers(threads).map(lambda value: np.float32(value) * np.float32(1e38), [1.0, 10.0]))
    with np.errstate(over="ignore"):
        assert list(Workers(threads).map(lambda value: np.float32(value) * np.float32(1e38), [10.0])) == [np.inf]


def blas_threads() -> set[int]:
    return {int(library["num_threads"]) for library in threadpool_info() if library["user_api"] == "blas"}


def test_products_take_one_thread_whatever_was_set_before() -> None:
    with threadpool_limits(2, user_api="blas"):
        if blas_threads() != {2}:
            pytest.skip("this BLAS takes one thread for products at all times")
        with one_thread_per_product():
            assert blas_threads() == {1}
        assert blas_threads() == {2}
