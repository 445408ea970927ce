from __future__ import annotations

import ast
import importlib
import re

from onnx_asr.graph.skips import Reason
from tests.layering import modules


def test_every_reason_has_a_code_of_its_own() -> None:
    declared: dict[str, Reason] = {}
    for name, tree in modules().items():
        if "Reason(" not in ast.unparse(tree):
            continue
        for value in vars(importlib.import_module(f"onnx_asr.{name}")).values():
            if isinstance(value, Reason):
                assert declared.setdefault(value.code, value) is value, value.code
                assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", value.code), value.code
    assert len(declared) > 25


def test_fields_are_filled_in_and_the_code_stays() -> None:
    reason = Reason("weight-not-2d", "{kind} weight is of rank {rank}").format(kind="Gemm", rank=3)
    assert reason == Reason("weight-not-2d", "Gemm weight is of rank 3")
