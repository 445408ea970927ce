"""A random graph spelled in two ways pairs, tensor by tensor; what pairs is the same function."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tools.check.pairs import FAULT, guarded


@settings(max_examples=60, deadline=None)
@given(number=st.integers(0, 10**6))
def test_pairs_are_the_same_function(number: int) -> None:
    outcome, words = guarded(number)
    assert outcome != FAULT, words
