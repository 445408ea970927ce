"""Channels that Torch-Pruning removed; the whole table is that of `tools.check.torch_pruning`."""

from __future__ import annotations

from dataclasses import replace

import pytest


@pytest.mark.parametrize("name", ["digits_resnet", "digits_densenet", "digits_mobilenet"])
def test_they_are_told_by_the_weights(name: str) -> None:
    for library in ("torch", "torch_pruning"):
        pytest.importorskip(library)
    from tools.check.torch_pruning import check, digits

    rows = list(check(replace(digits(name), method="paired"), 0.4))
    assert len(rows) == 3
    assert all(agrees for agrees, _ in rows), rows
