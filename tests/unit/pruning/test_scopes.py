"""How zeros are shared out between layers: counts in proportion, and scopes that are tried."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_asr.errors import OptionError
from onnx_asr.networks.fidelity import Fidelity
from onnx_asr.numerics.scores import proportional_keep
from onnx_asr.pruning.allocation import ScopeTrial, chosen_scope
from onnx_asr.pruning.compression import CompressOptions, compress
from onnx_asr.pruning.options import PruneOptions
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import RefitRecipe, RepairOptions
from tests.graphs import bn, images, net, parameter, positions, run

SETTINGS = RepairOptions(samples=48, verify_samples=16, refit=RefitRecipe(rows=2000, relu_steps=1))


def lopsided() -> onnx.ModelProto:
    """A net whose second convolution has weights a hundred times smaller, which BatchNormalization makes up for."""
    model = net(
        """
        g (float[N,3,8,8] x) => (float[N,10] z) {
          a = Conv <pads=[1,1,1,1]> (x, a_w, a_b)
          ra = Relu (a)
          b = Conv <pads=[1,1,1,1]> (ra, b_w)
          nb = BatchNormalization (b, b_gamma, b_beta, b_mean, b_var)
          rb = Relu (nb)
          c = Conv <pads=[1,1,1,1]> (rb, c_w, c_b)
          rc = Relu (c)
          p = GlobalAveragePool (rc)
          f = Flatten (p)
          z = Gemm <transB=1> (f, d_w, d_b)
        }
        """,
        a_w=(8, 3, 3, 3),
        a_b=(8,),
        b_w=(8, 8, 3, 3),
        **bn("b", channels=8),
        c_w=(8, 8, 3, 3),
        c_b=(8,),
        d_w=(10, 8),
        d_b=(10,),
    )
    for item in model.graph.initializer:
        factor = {"b_w": 1e-2, "b_mean": 1e-2, "b_gamma": 1e2}.get(item.name, 1.0)
        value = onnx.numpy_helper.to_array(item) * np.float32(factor)
        item.CopyFrom(onnx.numpy_helper.from_array(value, item.name))
    return model


def kept(model: onnx.ModelProto) -> list[int]:
    return [np.count_nonzero(parameter(model, node, 1)) for node in positions(model, "Conv", "Gemm")]


@given(
    layers=st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 50)), min_size=1, max_size=6),
    share=st.floats(0, 1.2),
)
def test_counts_are_in_proportion_where_a_layer_has_room(layers: list[tuple[float, int]], share: float) -> None:
    shares, most = [each[0] for each in layers], [each[1] for each in layers]
    keep = round(share * sum(most))
    counts = proportional_keep(shares, most, keep)
    assert sum(counts) == min(keep, sum(most))
    assert all(0 <= count <= limit for count, limit in zip(counts, most, strict=True))
    open_ = [(count, part) for count, part, limit in zip(counts, shares, most, strict=True) if count < limit]
    for count, part in open_:  # no other layer, full or not, has more for its share but by rounding
        assert all((other - 1) / part_ <= (count + 1) / part for other, part_ in zip(counts, shares, strict=True))


def test_mixed_is_the_geometric_mean_of_global_and_erk() -> None:
    model = lopsided()
    counts = {scope: kept(prune(model, options=PruneOptions(0.7, scope=scope)).model) for scope in ("global", "erk")}
    mixed = kept(prune(model, options=PruneOptions(0.7, scope="mixed")).model)
    wanted = np.sqrt(np.maximum(counts["global"], 1) * np.array(counts["erk"], float))
    sizes = np.array(kept(model))
    free = np.array(mixed) < sizes
    factor = (sum(mixed) - sizes[~free].sum()) / wanted[free].sum()
    assert sum(mixed) == sum(counts["global"]) == sum(counts["erk"])
    assert np.abs(np.array(mixed)[free] - factor * wanted[free]).max() <= 1
    assert mixed[1] > 0 == counts["global"][1]


def test_auto_leaves_a_layer_alive_that_global_magnitude_empties() -> None:
    model, x = lopsided(), images(64, seed=1)
    results = {
        scope: compress(model, x, CompressOptions(0.6, scope=scope, rounds=2, repair=SETTINGS))
        for scope in ("auto", "global")
    }
    found = results["auto"]
    assert kept(results["global"].model)[1] == 0
    assert found.scope in ("erk", "mixed")
    assert [trial.scope for trial in found.scopes] == ["global", "erk", "mixed"]
    assert min(kept(found.model)) > 0
    others = {"x": images(32, seed=2)}
    dense = run(model, others)["z"]
    errors = {scope: np.square(run(each.model, others)["z"] - dense).mean() for scope, each in results.items()}
    assert errors["auto"] < 0.5 * errors["global"]
    assert found.scope in " ".join(found.repair.notes)
    assert sum(layer.zeros for layer in found.layers) == round(0.6 * sum(layer.size for layer in found.layers))


def test_prune_tries_the_same_scopes() -> None:
    result = prune(lopsided(), images(64, seed=1), PruneOptions(0.6, scope="auto", samples=48))
    assert result.scope in ("erk", "mixed")
    assert len(result.scopes) == 3
    fixed = prune(lopsided(), options=PruneOptions(0.6, scope=result.scope))
    assert result.model.graph == fixed.model.graph


def test_global_stays_unless_another_is_clearly_closer() -> None:
    def trials(*distances: float) -> list[ScopeTrial]:
        scopes = ("global", "erk", "mixed")
        return [
            ScopeTrial(scope, Fidelity(samples=1, kl=each, agreement=1.0), 1.0)
            for scope, each in zip(scopes, distances, strict=False)
        ]

    assert chosen_scope(trials(1.0, 0.95, 0.91)) == "global"
    assert chosen_scope(trials(1.0, 0.95, 0.85)) == "mixed"
    assert chosen_scope(trials(1.0)) == "global"
    assert chosen_scope(trials(-1.0, -1.05)) == "global"
    assert chosen_scope(trials(-1.0, -1.2)) == "erk"


def test_a_metric_is_compared_beyond_that_of_the_dense_network() -> None:
    def tried(*metrics: float) -> list[ScopeTrial]:
        pairs = zip(("global", "mixed"), metrics, strict=True)
        return [ScopeTrial(scope, Fidelity(1, metric=value), 1.0, floor=0.7) for scope, value in pairs]  # type: ignore[arg-type]

    assert chosen_scope(tried(0.80, 0.78)) == "mixed"
    assert chosen_scope(tried(0.80, 0.795)) == "global"


def test_without_held_out_samples_those_are_measured_on_that_are_not_refitted_on() -> None:
    unverified = RepairOptions(samples=48, verify_samples=0, batch_size=8, refit=SETTINGS.refit)
    result = compress(lopsided(), images(64, seed=1), CompressOptions(0.6, rounds=1, repair=unverified))
    assert result.repair.verification is None
    assert result.scope in ("erk", "mixed")
    assert {trial.fidelity.samples for trial in result.scopes} == {24}


def test_without_samples_or_time_nothing_is_tried() -> None:
    one = RepairOptions(samples=8, verify_samples=0, batch_size=8, refit=SETTINGS.refit)
    result = compress(lopsided(), images(64, seed=1), CompressOptions(0.6, rounds=1, repair=one))
    assert (result.scope, result.scopes) == ("global", ())
    assert "'global' was used, as one batch of samples is too few" in " ".join(result.repair.notes)
    hurried = CompressOptions(0.6, rounds=1, time_budget=0.0, repair=SETTINGS)
    assert len(compress(lopsided(), images(64, seed=1), hurried).scopes) == 1
    pattern = compress(lopsided(), images(64, seed=1), CompressOptions(pattern="2:4", rounds=1, repair=SETTINGS))
    assert (pattern.scope, pattern.scopes) == (None, ())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PruneOptions(pattern="2:4", scope="auto"), "pattern 2:4 sets the sparsity of every layer"),
        (lambda: PruneOptions(pattern="2:4", scope="erk"), "pattern 2:4 .*: drop --scope erk"),
        (lambda: CompressOptions(pattern="2:4", scope="mixed"), "pattern 2:4 .*: drop --scope mixed"),
        (lambda: PruneOptions(target_size=0.5, scope="auto"), "scope 'auto' tries one sparsity"),
        (lambda: CompressOptions(0.5, scope="layer"), "scope 'layer' is unknown"),  # type: ignore[arg-type]
    ],
)
def test_scopes_that_do_not_fit_are_refused(make: object, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        make()  # type: ignore[operator]


def test_prune_needs_data_for_it() -> None:
    with pytest.raises(OptionError, match="scope 'auto' needs calibration samples"):
        prune(lopsided(), options=PruneOptions(0.5, scope="auto"))
    with pytest.raises(OptionError, match="but there are 2, and 64 make a batch: give more samples"):
        prune(lopsided(), images(2, seed=1), PruneOptions(0.5, scope="auto"))
