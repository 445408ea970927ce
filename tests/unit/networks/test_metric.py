"""The user's own measure: how it is found, what it is given, and what it decides."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_asr
from onnx_asr import CompressOptions, MetricSamples, RepairOptions, SensitivityOptions
from onnx_asr.errors import OptionError
from onnx_asr.networks.metric import Metric, NamedOutputs
from onnx_asr.repairing.options import RefitRecipe
from onnx_asr.repairing.pipeline import repair
from onnx_asr.report.data import Run
from onnx_asr.report.sweep_data import sweep_data
from onnx_asr.report.sweep_figure import draw
from tests.graphs import first_output, images, pruned, residual_net, run

DENSE, X = residual_net(), images(80, seed=3)
PRUNED = pruned(DENSE, 0.7)
FEW: dict[str, Any] = {"samples": 48, "verify_samples": 32, "refit": RefitRecipe(rows=500, relu_steps=1)}
LABELS = np.random.default_rng(0).integers(0, 10, 80)


def mean_error(samples: MetricSamples, dense: NamedOutputs, outputs: NamedOutputs) -> float:
    return float(np.abs(dense["logits"] - outputs["logits"]).mean())


def with_metric(metric: Any, method: Any = "paired", model: Any = PRUNED, dense: Any = DENSE) -> onnx_asr.RepairResult:
    return repair(model, X, RepairOptions(method, metric=metric, **FEW), dense=dense)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory; nothing that is imported from it stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_it_is_called_once_with_all_samples_and_both_outputs() -> None:
    calls: list[tuple[MetricSamples, NamedOutputs, NamedOutputs]] = []

    def metric(samples: MetricSamples, dense: NamedOutputs, outputs: NamedOutputs) -> float:
        calls.append((samples, dense, outputs))
        return mean_error(samples, dense, outputs)

    found = onnx_asr.evaluate(PRUNED, {"x": X, "labels": LABELS}, dense=DENSE, batch_size=7, metric=metric)
    ((samples, dense, outputs),) = calls
    wanted, got = first_output(DENSE, X), first_output(PRUNED, X)
    assert len(samples) == len(samples.names) == 80
    np.testing.assert_array_equal(samples[5]["x"], X[5])
    np.testing.assert_array_equal([sample["x"] for sample in samples[-2:]], X[-2:])
    np.testing.assert_array_equal(samples.labels, LABELS)
    np.testing.assert_allclose(dense["logits"], wanted, atol=1e-5)
    np.testing.assert_allclose(outputs["logits"], got, atol=1e-5)
    assert found.metric == pytest.approx(np.abs(wanted - got).mean(), rel=1e-4)
    assert found.kl is not None  # the usual figures stay
    assert found.top1 is not None


def test_it_is_given_the_samples_that_were_held_out() -> None:
    def metric(samples: MetricSamples, dense: NamedOutputs, outputs: NamedOutputs) -> float:
        inputs = np.stack([sample["x"] for sample in samples])
        np.testing.assert_allclose(first_output(DENSE, inputs), dense["logits"], atol=1e-5)
        return mean_error(samples, dense, outputs)

    result = with_metric(metric)
    assert result.verification is not None
    before, after = result.verification.before.metric, result.verification.after.metric
    assert before is not None
    assert after is not None
    assert 0 < after < before
    assert any(note.endswith("of the dense model itself: 0") for note in result.notes)


def test_outputs_of_other_names_come_under_those_of_the_dense_model() -> None:
    renamed = pruned(DENSE, 0.7)
    renamed.graph.node[-1].output[0] = renamed.graph.output[0].name = "scores"
    found = onnx_asr.evaluate(renamed, X, dense=DENSE, metric=mean_error)
    assert found.metric == onnx_asr.evaluate(PRUNED, X, dense=DENSE, metric=mean_error).metric


# --- decisions ---


def test_auto_takes_the_candidate_of_the_lowest_metric() -> None:
    usual = repair(PRUNED, X, RepairOptions(**FEW), dense=DENSE)
    distances = [item.fidelity.kl for item in usual.candidates]
    ranks: list[float] = [5.0, 3.0, 9.0, 4.0]  # paired, paired by rho, bn, refit
    left = iter([20.0, 0.0, 0.0, *ranks])  # the pruned model, then the dense one, twice
    assert usual.options.method == "refit"

    def metric(samples: MetricSamples, dense: NamedOutputs, outputs: NamedOutputs) -> float:
        return next(left, float(np.square(outputs["logits"] - dense["logits"]).mean()))

    result = with_metric(metric, "auto")
    assert [item.fidelity.metric for item in result.candidates] == ranks
    assert [item.fidelity.kl for item in result.candidates] == pytest.approx(distances)
    assert result.options.method == "paired"
    assert result.options.reliability_power > 0


def test_of_equal_metrics_the_smaller_divergence_decides() -> None:
    result = with_metric(lambda samples, dense, outputs: 1.0, "auto")
    best = min(result.candidates, key=lambda item: item.fidelity.divergence)
    assert result.options == best.options
    assert not result.modified  # the metric is the pruned model's too
    assert any("did not move the metric" in note for note in result.notes)


def test_the_verdict_is_the_metrics() -> None:
    def more_is_better(samples: MetricSamples, dense: NamedOutputs, outputs: NamedOutputs) -> float:
        return -mean_error(samples, dense, outputs)

    worse = with_metric(more_is_better)
    assert worse.verification is not None
    assert worse.verification.verdict == "further"
    assert not worse.improved
    assert worse.verification.after.kl is not None
    assert worse.verification.before.kl is not None
    assert worse.verification.after.kl < worse.verification.before.kl
    assert any("lower counts as better" in note for note in worse.notes)
    assert not any("lower counts as better" in note for note in with_metric(mean_error).notes)


def test_compress_sensitivity_and_sweep_are_measured_by_it() -> None:
    settings = RepairOptions(metric=mean_error, **FEW)
    compressed = onnx_asr.compress(DENSE, X, CompressOptions(0.5, rounds=2, repair=settings))
    check = compressed.repair.verification
    assert check is not None
    assert check.after.metric is not None
    assert check.before.metric is not None
    assert check.after.metric < check.before.metric
    layers = onnx_asr.sensitivity(DENSE, X, SensitivityOptions((0.5, 0.9), repair=settings))
    for tried in (item for layer in layers.layers for item in layer.tried):
        assert tried.distance == tried.fidelity.metric
    assert layers.distance_name.startswith("metric ")
    grid = onnx_asr.SweepGrid((0.7,), methods=("none", "paired", "auto"))
    swept = onnx_asr.sweep(DENSE, X, grid, onnx_asr.SweepSettings(repair=settings))
    assert swept.measure == "metric"
    assert swept.dense.metric == 0
    found = [outcome.fidelity.metric for outcome in swept.cells.values() if outcome.fidelity is not None]
    assert len(found) == 3
    assert found[0] == max(found)
    assert found[2] == min(found)
    assert swept.conditions["settings"]["repair"]["metric"].endswith(":mean_error")
    page = sweep_data(Run("sweep", "", {}, None), swept)
    best = [row["method"] for row in page["rows"] if row["cells"][0]["best"]]
    assert best == [cell.method for cell, outcome in swept.cells.items() if outcome.fidelity.metric == min(found)]
    assert draw(page["panels"], "metric", 0.0).axes[0].get_ylabel() == "metric, lower is better"


# --- by name ---


def test_a_function_of_a_file_in_the_current_directory(here: Path) -> None:
    (here / "mine.py").write_text("def score(samples, dense, outputs):\n    return len(samples)\n")
    (here / "inner").mkdir()
    (here / "inner" / "deep.py").write_text("class Scores:\n    @staticmethod\n    def of(*given):\n        return 2\n")
    found = Metric.of("mine:score")
    assert found.name == "mine:score"
    assert any(note.endswith("itself: 32") for note in with_metric("mine:score").notes)
    assert Metric.of("inner.deep:Scores.of").function() == 2  # type: ignore[call-arg]
    first = found.digest
    (here / "mine.py").write_text("def score(samples, dense, outputs):\n    return 0\n")
    assert Metric.of("mine:score").digest != first
    code = "def score(samples, dense, outputs):\n    return abs(dense['logits'] - outputs['logits']).mean()\n"
    (here / "errors.py").write_text(code)
    entries = {entry.key: entry.value for entry in with_metric("errors:score").model.metadata_props}
    assert json.loads(entries["onnx_asr.options"])["metric"] == "errors:score"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("mine", "not of the form module:function"),
        ("mine:", "not of the form module:function"),
        ("mine.py:score", "not of the form module:function"),
        ("./mine:score", "not of the form module:function"),
        ("nowhere:score", "no module 'nowhere'"),
        ("mine:other", "'mine' has no attribute 'other'"),
        ("mine:number", "is 3, not a function"),
        ("broken:score", "SyntaxError"),
        ("failing:score", "failing.py, line 2)"),
        ("leaving:score", "SystemExit: 4"),
        ("needs:score", "importing 'needs' failed: ModuleNotFoundError: No module named 'not_there'"),
        (3, "give a function"),
    ],
)
def test_what_is_no_function_is_one_error(here: Path, source: Any, words: str) -> None:
    (here / "mine.py").write_text("number = 3\n")
    (here / "broken.py").write_text("def score(:\n")
    (here / "failing.py").write_text("values = {}\nvalues['boxes']\n")
    (here / "leaving.py").write_text("raise SystemExit(4)\n")
    (here / "needs.py").write_text("import not_there\n")
    with pytest.raises(OptionError) as caught:
        Metric.of(source)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# --- failures ---


def raising(samples: MetricSamples, dense: NamedOutputs, outputs: NamedOutputs) -> float:
    return float(outputs["boxes"].mean())


def writing(samples: MetricSamples, dense: NamedOutputs, outputs: NamedOutputs) -> float:
    dense["logits"] *= 2
    return 0.0


def leaving(samples: MetricSamples, dense: NamedOutputs, outputs: NamedOutputs) -> float:
    sys.exit(5)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (raising, "raising' failed on 32 samples with outputs logits (32, 10): KeyError: 'boxes' ("),
        (writing, "writing' failed on 32 samples"),
        (leaving, "SystemExit: 5"),
        (lambda *given: math.nan, "returned nan"),
        (lambda *given: -math.inf, "returned -inf"),
        (lambda *given: math.inf, "of the dense model itself is infinite"),
        (lambda *given: None, "returned None"),
        (lambda *given: True, "returned True"),
        (lambda *given: np.zeros(3), "returned array"),
        (lambda given: 0.0, "TypeError"),
    ],
)
@pytest.mark.parametrize("command", ["repair", "compress", "sensitivity", "sweep"])
def test_a_metric_that_fails_is_one_error_before_the_work(
    metric: Any, words: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_asr.repairing.refit.repair_refit", None)
    settings = RepairOptions(metric=metric, **FEW)
    calls: dict[str, Any] = {
        "repair": lambda: repair(PRUNED, X, settings, dense=DENSE),
        "compress": lambda: onnx_asr.compress(DENSE, X, CompressOptions(0.5, repair=settings)),
        "sensitivity": lambda: onnx_asr.sensitivity(DENSE, X, SensitivityOptions(repair=settings)),
        "sweep": lambda: onnx_asr.sweep(DENSE, X, settings=onnx_asr.SweepSettings(repair=settings)),
    }
    with pytest.raises(OptionError) as caught:
        calls[command]()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    for value in (np.float32(0.5), np.array(0.5), np.int64(1), 1):
        found = onnx_asr.evaluate(PRUNED, X, dense=DENSE, metric=lambda *given, value=value: value)
        assert found.metric == float(value)


def test_outputs_that_are_not_finite_are_infinitely_far_without_a_call() -> None:
    broken = pruned(DENSE, 0.7)
    (bias,) = (tensor for tensor in broken.graph.initializer if tensor.name == "fc_b")
    bias.raw_data = np.full(10, np.nan, np.float32).tobytes()
    assert np.isnan(run(broken, {"x": X[:1]})["logits"]).any()
    assert onnx_asr.evaluate(broken, X, dense=DENSE, metric=raising).metric == math.inf


@pytest.mark.parametrize(("dense", "verify"), [(None, 32), (DENSE, 0)])
def test_without_anything_to_compare_with_it_is_refused(dense: Any, verify: int) -> None:
    options = RepairOptions("bn", metric=mean_error, samples=48, verify_samples=verify)
    with pytest.raises(OptionError, match="held-out samples"):
        repair(PRUNED, X, options, dense=dense)
    with pytest.raises(OptionError, match="--dense"):
        onnx_asr.evaluate(PRUNED, {"x": X, "labels": LABELS}, metric=mean_error)


def test_what_it_prints_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    def talking(samples: MetricSamples, dense: NamedOutputs, outputs: NamedOutputs) -> float:
        print("loading annotations")
        return 0.5

    onnx_asr.evaluate(PRUNED, X, dense=DENSE, metric=talking)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "loading annotations\n"
