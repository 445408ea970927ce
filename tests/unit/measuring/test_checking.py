"""Bars are compared with what is measured; a bar that nothing was measured for is refused."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr.errors import OptionError
from onnx_asr.measuring.bars import measure_of
from onnx_asr.measuring.checking import Criterion
from onnx_asr.networks.fidelity import Fidelity
from tests.graphs import net, pruned, residual_net, weights

SCORED = Fidelity(
    100,
    top1=0.9,
    top5=0.99,
    agreement=0.95,
    kl=0.04,
    snr_db=20.0,
    detection_error=0.2,
    metric=-0.3,
    mean_ap=0.25,
    mean_ap50=0.4,
)


@pytest.mark.parametrize(
    ("name", "cleared", "missed"),
    [
        ("min_top1", 0.9, 0.91),
        ("min_top5", 0.99, 1.0),
        ("min_agreement", 0.95, 0.96),
        ("max_kl", 0.04, 0.039),
        ("min_snr_db", 20.0, 20.5),
        ("max_detection_error", 0.2, 0.19),
        ("max_metric", -0.3, -0.31),
        ("min_mean_ap", 0.25, 0.2501),
        ("min_mean_ap50", 0.4, 0.41),
    ],
)
def test_a_value_at_the_bar_clears_it(name: str, cleared: float, missed: float) -> None:
    model = residual_net()
    good = onnx_asr.check(model, onnx_asr.Bars(**{name: cleared}), SCORED)
    assert good.passed
    assert good.missed == ()
    bad = onnx_asr.check(model, onnx_asr.Bars(**{name: missed}), SCORED)
    assert not bad.passed
    (criterion,) = bad.missed
    assert (criterion.name, criterion.bar) == (name, missed)


def test_there_is_a_bar_for_everything_that_is_measured() -> None:
    measures = {measure_of(item.name) for item in fields(onnx_asr.Bars)}
    assert measures - {"sparsity", "size"} == {item.name for item in fields(Fidelity) if item.repr} - {"samples"}


def test_zeros_and_bytes_are_those_of_the_model(tmp_path: Path) -> None:
    model = pruned(residual_net(), 0.6)
    stored = weights(model).values()
    share = sum(int((value == 0).sum()) for value in stored) / sum(value.size for value in stored)
    bars = onnx_asr.Bars(min_sparsity=share + 1e-6, max_size=model.ByteSize())
    sparsity, size = onnx_asr.check(model, bars).criteria
    assert (sparsity.measured, sparsity.passed) == (pytest.approx(share, abs=1e-9), False)
    assert (size.measured, size.passed) == (model.ByteSize(), True)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    on_disk = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert (tmp_path / "weights").stat().st_size > 0
    assert onnx_asr.check(path, onnx_asr.Bars(max_size=on_disk)).passed
    assert not onnx_asr.check(path, onnx_asr.Bars(max_size=on_disk - 1)).passed


@pytest.mark.parametrize("name", ["min_agreement", "max_kl"])
def test_what_is_not_a_number_clears_no_bar(name: str) -> None:
    criterion = Criterion(name, 0.5, math.nan)
    assert not criterion.passed
    assert "does not clear" in str(criterion)
    assert str(Criterion(name, 0.5, math.inf)) != ""


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        ({}, "no bar to check: give at least one of min-top1, .*, max-size"),
        ({"min_agreement": 97.0}, "min-agreement 97 is out of range: give a share from 0 to 1"),
        ({"min_sparsity": -0.1}, "min-sparsity -0.1 is out of range"),
        ({"max_kl": math.nan}, "max-kl nan is out of range"),
        ({"max_kl": -1.0}, "max-kl -1 is out of range: give a number of 0 or more"),
        ({"min_snr_db": math.inf}, "min-snr-db inf is out of range"),
        ({"max_size": -5}, "max-size -5 is out of range"),
    ],
)
def test_bars_out_of_range(bars: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        onnx_asr.Bars(**bars)
    assert onnx_asr.Bars(min_snr_db=-3.0).given == {"min_snr_db": -3.0}


@pytest.mark.parametrize(
    ("bars", "fidelity", "message"),
    [
        ({"min_top1": 0.5}, None, "min-top1 does not apply: it is measured on samples"),
        ({"min_top1": 0.5}, replace(SCORED, top1=None), "the data have no labels"),
        ({"max_kl": 0.5}, Fidelity(9, top1=0.5), "the model was not compared with a dense one"),
        ({"max_kl": 0.5}, Fidelity(9, snr_db=3.0), "outputs of these models have no kl: give min-snr-db"),
        ({"max_kl": 0.5}, Fidelity(9, snr_db=3.0, detection_error=0.1), "min-snr-db or max-detection-error"),
        ({"max_metric": 0.5}, Fidelity(9, snr_db=3.0), "no metric was measured: give one with --metric"),
        ({"min_mean_ap": 0.5}, Fidelity(9, snr_db=3.0), "no boxes were given .* --annotations and --decode"),
        ({"min_snr_db": 0.5}, Fidelity(9, agreement=0.5), "have no snr db: give min-agreement"),
    ],
)
def test_measures_that_are_missing(bars: dict[str, Any], fidelity: Fidelity | None, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        onnx_asr.check(residual_net(), onnx_asr.Bars(**bars), fidelity)


@pytest.mark.parametrize(
    ("bars", "given", "message"),
    [
        ({"max_size": 5}, {"dense": True}, "no bar needs --dense: drop it, or give min-agreement or max-kl or "),
        ({"max_kl": 1}, {"dense": True, "metric": True}, "no bar needs --metric: drop it, or give max-metric"),
        ({"min_mean_ap": 1}, {"labels": True}, "no bar needs --labels: drop it, or give min-top1 or min-top5"),
        ({"min_top1": 1}, {"annotations": True}, "no bar needs --annotations: drop it, or give min-mean-ap or"),
    ],
)
def test_what_no_bar_needs_is_refused(bars: dict[str, Any], given: dict[str, bool], message: str) -> None:
    given = {"data": bars != {"max_size": 5}, "dense": False} | given
    with pytest.raises(OptionError, match=message):
        onnx_asr.Bars(**bars).check_measurable(**given)


def test_a_model_without_weights_has_no_sparsity() -> None:
    model = net("g (float[N,3] x) => (float[N,3] y) { y = Relu (x) }")
    assert onnx_asr.check(model, onnx_asr.Bars(max_size=10_000)).passed
    with pytest.raises(OptionError, match="has no layer with floating-point weights"):
        onnx_asr.check(model, onnx_asr.Bars(min_sparsity=0.0))


def test_a_model_beside_its_dense_one() -> None:
    dense = residual_net()
    x = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    bars = onnx_asr.Bars(min_agreement=1.0, max_kl=0.0)
    assert onnx_asr.check(dense, bars, onnx_asr.evaluate(dense, x, dense=dense)).passed
    sparse = pruned(dense, 0.9)
    assert len(onnx_asr.check(sparse, bars, onnx_asr.evaluate(sparse, x, dense=dense)).missed) == 2
