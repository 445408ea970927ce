"""A part of what ``python -m tools.check.operators`` tries: operator test cases of the onnx package."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper

import onnx_asr
from tests.graphs import net
from tools.check import operators
from tools.check.operators import FAULT, NOTHING, PASSED, REFUSED, Case, all_outcomes, between_layers, judged, run

SOME = [
    *("test_conv_with_strides", "convtranspose_pads", "gemm_default_vector", "matmul_4d", "batchnorm_epsilon"),
    *(
        "group_normalization_ex",
        "layer_normalization_2d_axis1",
        "thresholdedrelu_d",
        "dropout_default_mask",
        "clip_inb",
    ),
    *("transpose_all_permutations_2", "reduce_mean_default_axes_keepdims_r", "simple_rnn_reverse", "softmax_axis_1"),
    *("averagepool_2d_pads", "upsample_scales_cubic", "reflect_pad", "qlinearconv", "adagrad", "test_add", "test_relu"),
]


def test_what_onnxruntime_runs_is_accepted_and_stays_what_it_is() -> None:
    found = list(all_outcomes(SOME))
    assert [outcome for outcome in found if outcome.verdict == FAULT] == []
    counts = Counter((outcome.command, outcome.verdict) for outcome in found)
    assert {command for command, _ in counts} == {*operators.COMMANDS, "load in any opset"}
    for command, least in {"shrink": 90, "prune": 30, "prune --pattern channel": 10, "repair": 30}.items():
        assert counts[command, PASSED] >= least, command
    assert counts["load in any opset", REFUSED]
    assert counts["prune", NOTHING]


def wrong(case: Case) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(case.model)
    result.graph.node.append(helper.make_node("Neg", ["y"], ["z"]))
    result.graph.output[0].name = "z"
    return result


def refusing(case: Case) -> onnx.ModelProto:
    raise onnx_asr.ModelError("because")


def failing(case: Case) -> onnx.ModelProto:
    raise IndexError


def broken(case: Case) -> onnx.ModelProto:
    result = wrong(case)
    result.graph.node[-1].op_type = "Gnu"
    return result


@pytest.mark.parametrize("action", [wrong, refusing, failing, broken])
def test_faults_are_found(action: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = net("g (float[1,4] x) => (float[1,4] y) { y = Exp (x) }")
    case = Case("exp", model, {"x": np.ones((1, 4), np.float32)})
    monkeypatch.setitem(operators.COMMANDS, "load", (action, True))
    assert judged("load", case, run(case, model)).verdict == FAULT
    monkeypatch.setattr(operators, "cases", lambda: [case])
    monkeypatch.setattr(sys, "argv", ["operators"])
    with pytest.raises(SystemExit) as end:
        operators.main()
    assert end.value.code
    assert "load: exp" in capsys.readouterr().err


def test_the_channel_between_layers_is_dead() -> None:
    model = net("g (float[1,4,3,3] x) => (float[1,4,3,3] y) { y = Exp (x) }")
    case = between_layers(Case("exp", model, {"x": np.ones((1, 4, 3, 3), np.float32)}))
    assert case is not None
    assert [group.kept for group in onnx_asr.shrink(case.model).layers] == [3]
