"""No network runs twice over the same samples: how many samples every convolution of a network sees, per command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr import CompressOptions, RepairOptions
from onnx_asr.engine.session import Session
from onnx_asr.measuring.damage import DAMAGE_SAMPLES
from onnx_asr.networks.execution import Execution
from onnx_asr.pruning.options import DATA_AWARE, SENSITIVITY_SPARSITIES, PruneOptions, SensitivityOptions
from onnx_asr.report.data import Run, compress_data, repair_data
from tests.graphs import digit_images, digits, pruned

DENSE = digits("resnet")
PRUNED = pruned(DENSE, 0.8)
X = digit_images()[0][:320]
CALIBRATION, HELD_OUT = 192, 96
PART = 64  # of the calibration, in whole batches, for the channel rules
TRIED = 128  # of the calibration, for each scope
NOISE = 64  # of the held-out samples, once more without optimisations
PROBE = 3  # samples that tell which batches a network takes
SAMPLES: dict[str, Any] = {"samples": CALIBRATION, "verify_samples": HELD_OUT}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Samples that went through every convolution, by the name of its output, whatever the network."""
    samples: Counter[str] = Counter()
    init, run = Session.__init__, Session.run
    inside = []  # a run that calls itself counts once

    def spy_init(self: Session, model: onnx.ModelProto, *args: Any, **kwargs: Any) -> None:
        init(self, model, *args, **kwargs)
        self.convolutions = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]  # type: ignore[attr-defined]

    def spy_run(self: Session, feeds: Mapping[str, np.ndarray], *args: Any, **kwargs: Any) -> Any:
        if not inside:
            for name in self.convolutions:  # type: ignore[attr-defined]
                samples[name] += len(next(iter(feeds.values())))
        inside.append(True)
        try:
            return run(self, feeds, *args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(Session, "__init__", spy_init)
    monkeypatch.setattr(Session, "run", spy_run)
    return samples


VERIFICATION = 3 * HELD_OUT + NOISE  # dense, pruned and repaired
FITTED = 2 * 64  # the dense and the refitted network, on a part of the calibration
EXPECTED = {
    "refit": 2 * CALIBRATION + VERIFICATION + FITTED,
    "paired": 2 * CALIBRATION + VERIFICATION,
    "bn": CALIBRATION + VERIFICATION,
    # the dense network and three channel rules on a part, then the refit; all are verified
    "auto": 4 * PART + 2 * CALIBRATION + VERIFICATION + FITTED + 3 * HELD_OUT,
}


@pytest.mark.parametrize("method", list(EXPECTED))
def test_a_repair_runs_each_network_once_over_its_samples(method: Any, seen: Counter[str]) -> None:
    result = onnx_asr.repair(PRUNED, X, RepairOptions(method, **SAMPLES), dense=DENSE)
    assert result.options.method == (method if method != "auto" else "refit")
    assert set(seen.values()) == {PROBE + EXPECTED[method]}


@pytest.mark.parametrize("method", ["auto", "refit", "paired"])
def test_what_is_intact_is_not_repaired(method: Any, seen: Counter[str]) -> None:
    result = onnx_asr.repair(DENSE, X, RepairOptions(method, **SAMPLES), dense=DENSE)
    assert any("nothing to repair" in note for note in result.notes)
    assert set(seen.values()) == {PROBE + 2 * HELD_OUT + NOISE}


def test_auto_keeps_the_channel_rule_that_it_tried_on_all_samples(seen: Counter[str]) -> None:
    options = RepairOptions(samples=PART, verify_samples=HELD_OUT, time_budget=0.0)
    result = onnx_asr.repair(PRUNED, X, options, dense=DENSE)
    assert {item.options.method for item in result.candidates} == {"paired", "bn"}
    assert set(seen.values()) == {PROBE + 4 * PART + 2 * HELD_OUT + NOISE + 3 * HELD_OUT}


@pytest.mark.parametrize("memory_limit", [None, 1 << 20])
@pytest.mark.parametrize(("scope", "trials"), [("global", 0), ("auto", 4 * TRIED + 3 * HELD_OUT)])
def test_the_rounds_of_compress_share_a_run_of_the_dense_network(
    scope: Any, trials: int, memory_limit: int | None, seen: Counter[str]
) -> None:
    options = CompressOptions(0.8, scope=scope, rounds=4, round_samples=1.0, repair=RepairOptions(**SAMPLES))
    onnx_asr.compress(DENSE, X, options, execution=Execution(memory_limit=memory_limit))
    rounds = CALIBRATION + 3 * CALIBRATION  # the dense network, and three rounds
    assert set(seen.values()) == {PROBE + trials + rounds + 2 * CALIBRATION + VERIFICATION + FITTED}


@pytest.mark.parametrize("command", ["repair", "compress"])
def test_a_report_runs_the_networks_for_the_damage_alone(command: str, tmp_path: Path, seen: Counter[str]) -> None:
    data, settings = tmp_path / "labelled.npz", RepairOptions("refit", **SAMPLES)
    np.savez(data, input=X, labels=digit_images()[1][: len(X)])
    if command == "repair":
        report = partial(repair_data, result=onnx_asr.repair(PRUNED, data, settings, dense=DENSE), pruned=PRUNED)
    else:
        options = CompressOptions(0.8, scope="global", rounds=1, repair=settings)
        report = partial(compress_data, result=onnx_asr.compress(DENSE, data, options))
    seen.clear()
    values = report(Run(command, "line", {}), dense=DENSE, data=data, execution=Execution())
    assert all(version["fidelity"]["top1"] for version in values["versions"])
    assert set(seen.values()) == {PROBE + 3 * DAMAGE_SAMPLES}


def test_every_evaluation_and_inspection_runs_both_networks_once(seen: Counter[str]) -> None:
    onnx_asr.evaluate(PRUNED, X, dense=DENSE)
    assert set(seen.values()) == {2 * PROBE + 2 * len(X)}
    seen.clear()
    onnx_asr.inspect(PRUNED, X, dense=DENSE, samples=128)
    assert set(seen.values()) == {PROBE + 2 * 128}


@pytest.mark.parametrize("score", ["magnitude", *DATA_AWARE])
def test_the_sensitivity_runs_the_dense_network_once(score: Any, seen: Counter[str]) -> None:
    options = SensitivityOptions(sparsities=(0.5,), score=score, repair=RepairOptions(**SAMPLES))
    result = onnx_asr.sensitivity(DENSE, X, options)
    assert set(seen.values()) == {PROBE + CALIBRATION + HELD_OUT + len(result.layers) * HELD_OUT}


@pytest.mark.parametrize("score", ["magnitude", "variance"])
def test_so_does_the_scope_that_is_made_of_it(score: Any, seen: Counter[str]) -> None:
    options = PruneOptions(0.9, scope="sensitivity", score=score, samples=CALIBRATION)
    result = onnx_asr.prune(DENSE, X, options)
    held_out = len(X) - CALIBRATION
    shares = len(SENSITIVITY_SPARSITIES) + 1  # and one beyond the sparsity that was asked for
    assert set(seen.values()) == {PROBE + CALIBRATION + held_out + len(result.layers) * shares * held_out}
