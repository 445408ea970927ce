"""Sensitivity: one layer at a time, against a repair of the model that is pruned there alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr.errors import OptionError
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.networks.pair import Network
from onnx_asr.pruning.options import PruneOptions
from onnx_asr.pruning.sensitivity import AtSparsity, LayerSensitivity, SensitivityResult
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import RefitRecipe, RepairOptions
from onnx_asr.repairing.verification import Samples, Verifier
from onnx_asr.report.sensitivity_figure import write_sensitivity
from tests.graphs import copy, dense_net, first_output, folded, images, net, parameter, positions, residual_net

FEW = RepairOptions(samples=32, verify_samples=16)


@pytest.mark.parametrize("make", [residual_net, dense_net, lambda: folded(residual_net())])
def test_the_refit_takes_part_of_the_damage_back(make: Callable[[], onnx.ModelProto]) -> None:
    model, x = make(), images(48, seed=1)
    result = onnx_asr.sensitivity(model, x, onnx_asr.SensitivityOptions(sparsities=[0.8, 0.4], repair=FEW))
    assert result.sparsities == (0.4, 0.8)
    assert [layer.name for layer in result.layers] == [
        layer.name for layer in prune(model, options=PruneOptions(0.5)).layers
    ]
    network = Network.of(model, "dense", compared=True)
    samples = Samples.of(x, network, FEW, None, onnx_asr.Execution(), verify=True)
    verifier = Verifier(model, samples, onnx_asr.Execution())
    alone = refitted = 0.0
    for layer in result.layers:
        for share, trial in zip(result.sparsities, layer.tried, strict=True):
            assert trial.sparsity == share
            pruned = prune(model, options=PruneOptions(share, include=(f"^{layer.name}$",), scope="layer")).model
            assert trial.fidelity.samples == 16
            alone += verifier.fidelity(pruned).distance
            refitted += trial.distance
    assert 0 < refitted < 0.9 * alone


def test_of_a_last_layer_it_is_exactly_a_repair() -> None:
    """Nothing can be refitted behind the last layer, so the two agree up to rounding."""
    model = net(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] z) { y = Conv <pads=[1,1,1,1]> (x, a)  z = Conv (y, b) }",
        a=(5, 3, 3, 3),
        b=(4, 5, 1, 1),
    )
    x = images(48, seed=1)
    options = replace(FEW, refit=RefitRecipe(rows=100_000))
    result = onnx_asr.sensitivity(model, x, onnx_asr.SensitivityOptions(sparsities=[0.5], repair=options))
    for number in (0, 1):
        weight = model.graph.node[number].input[1]
        pruned = prune(model, options=PruneOptions(0.5, include=(f"^{weight}$",), scope="layer")).model
        repaired = onnx_asr.repair(pruned, x, replace(options, method="refit"), dense=model)
        assert repaired.verification is not None
        expected = repaired.verification.after.distance
        got = result.layers[number].tried[0].distance
        if number == 1:
            assert got == pytest.approx(expected, rel=1e-3)
        else:
            assert expected <= got < repaired.verification.before.distance


def test_a_weight_that_two_layers_share_is_refitted_for_both() -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { a = MatMul (x, w)  y = MatMul (a, w) }", w=(4, 4))
    x = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    result = onnx_asr.sensitivity(model, x, onnx_asr.SensitivityOptions(sparsities=[0.25, 0.5, 0.75], repair=FEW))
    (layer,) = result.layers
    distances = [trial.distance for trial in layer.tried]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_layers_without_effect_are_insensitive_and_pruned_most() -> None:
    """The second branch is multiplied by almost zero: the allocation empties it first."""
    model = net(
        """
        g (float[N,3,8,8] x) => (float[N,4,8,8] z) {
          y = Conv (x, a)
          t = Conv (x, b)
          n = Mul (t, tiny)
          z = Add (y, n)
        }
        """,
        a=(4, 3, 1, 1),
        b=(4, 3, 1, 1),
        tiny=np.array(1e-4, np.float32),
    )
    x = images(48, seed=1)
    result = onnx_asr.sensitivity(model, x, onnx_asr.SensitivityOptions(sparsities=[0.5, 0.75], repair=FEW))
    loud, quiet = (layer.tried[1].distance for layer in result.layers)
    assert quiet < 1e-3 * loud
    pruned = prune(model, x, PruneOptions(0.25, scope="sensitivity", samples=32))
    assert [layer.zeros for layer in pruned.layers] == [0, 6]
    assert pruned.options.scope == "sensitivity"


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 0.99])
def test_scope_sensitivity_is_exact_and_takes_the_smallest_of_a_layer(sparsity: float) -> None:
    model, x = residual_net(), images(40, seed=1)
    result = prune(model, x, PruneOptions(sparsity, scope="sensitivity", samples=24))
    assert sum(layer.zeros for layer in result.layers) == round(sparsity * sum(layer.size for layer in result.layers))
    for position in positions(model, "Conv", "Gemm"):
        before, after = np.abs(parameter(model, position, 1)), parameter(result.model, position, 1)
        assert before[after == 0].max(initial=0) <= before[after != 0].min(initial=np.inf)
    onnx.checker.check_model(result.model, full_check=True)
    assert np.isfinite(first_output(result.model, x)).all()


def test_the_model_is_not_changed() -> None:
    model = residual_net()
    kept = copy(model)
    onnx_asr.sensitivity(
        model, images(40, seed=1), onnx_asr.SensitivityOptions(sparsities=[0.5], include=("fc|gemm|conv",), repair=FEW)
    )
    assert model == kept


def test_wrong_options() -> None:
    model, x = residual_net(), images(40, seed=1)
    for sparsities in ([], [0.0], [1.0], [0.5, float("nan")], [-0.1]):
        with pytest.raises(OptionError, match="sparsit"):
            onnx_asr.sensitivity(model, x, onnx_asr.SensitivityOptions(sparsities=sparsities, repair=FEW))
    with pytest.raises(OptionError, match="verify-samples 0"):
        onnx_asr.sensitivity(model, x, onnx_asr.SensitivityOptions(repair=RepairOptions(verify_samples=0)))
    with pytest.raises(OptionError, match="score 'best'"):
        onnx_asr.sensitivity(model, x, onnx_asr.SensitivityOptions(score="best"))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="scope 'sensitivity' needs calibration samples"):
        prune(model, options=PruneOptions(0.5, scope="sensitivity"))
    with pytest.raises(OptionError, match="drop --scope sensitivity"):
        prune(model, x, PruneOptions(pattern="2:4", scope="sensitivity"))


@pytest.mark.parametrize("highest", [0.5, math.inf, math.nan])
def test_the_table_is_drawn_whatever_the_distances(highest: float, tmp_path: Path) -> None:
    name = "$x_{" + 50 * "y" + "/a$b"
    tried = tuple(AtSparsity(0.5, Fidelity(samples=1, kl=kl, agreement=1.0)) for kl in (0.0, highest))
    layers = tuple(LayerSensitivity(name, "Conv", (4, 4), 16, tried) for _ in range(2))
    result = SensitivityResult(layers, (), (0.5, 0.9), "magnitude", 1, 1, (), 0.0)
    drawing = write_sensitivity(result, tmp_path / "s.svg").read_text()
    assert "/a$b" in drawing
    assert "KL divergence" in drawing
    assert write_sensitivity(result, tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
