from __future__ import annotations

import ast
import doctest
import importlib

import pytest

from tests.layering import modules

WITH_EXAMPLES = [name for name, tree in modules().items() if ">>> " in ast.unparse(tree)]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_in_docstrings_are_right(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"onnx_asr.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_layouts_of_weights_and_masks_have_examples() -> None:
    assert {"graph.layers", "numerics.masks", "numerics.scores"} <= set(WITH_EXAMPLES)
