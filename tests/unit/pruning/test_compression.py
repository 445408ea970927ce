"""Mask rounds: nested masks, exact sparsity, valid patterns, and better than pruning at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_asr.errors import OptionError
from onnx_asr.json_values import plain
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.walk import Walk
from onnx_asr.pruning.compression import CompressOptions, compress
from onnx_asr.pruning.options import PruneOptions
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import RepairOptions
from onnx_asr.repairing.pipeline import repair
from onnx_asr.repairing.rows import RefitRecipe
from tests.graphs import digit_images, digits, folded, images, kl, net, parameter, positions, residual_net, run

module = importlib.import_module("onnx_asr.pruning.compression")
FAST = RefitRecipe(rows=4000, relu_steps=1)


def weights_of(model: onnx.ModelProto) -> list[np.ndarray]:
    return [parameter(model, p, 1) for p in positions(model, "Conv", "Gemm", "MatMul")]


def zeros(model: onnx.ModelProto) -> int:
    return sum(int((value == 0).sum()) for value in weights_of(model))


def size(model: onnx.ModelProto) -> int:
    return sum(value.size for value in weights_of(model))


def test_without_zeros_the_model_comes_back() -> None:
    model = residual_net()
    recipe = RepairOptions(samples=32, verify_samples=16, refit=FAST)
    result = compress(model, images(48, seed=1), CompressOptions(0.0, rounds=2, repair=recipe))
    check = result.repair.verification
    assert check is not None
    assert (check.verdict, check.before, result.repair.modified) == ("equal", check.after, False)
    assert result.model == result.masked
    assert all(np.array_equal(*pair) for pair in zip(weights_of(result.model), weights_of(model), strict=True))


class Rounds:
    """The model of every round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[onnx.ModelProto] = []
        apply, refit = module.apply_masks, module.repair_refit

        def last(*args: Any, **kwargs: Any) -> Any:
            model, layers = apply(*args, **kwargs)
            self.models.append(model)
            return model, layers

        def earlier(pair: Any, draft: Draft, *args: Any, **kwargs: Any) -> Any:
            self.models.append(draft.model())
            return refit(pair, draft, *args, **kwargs)

        monkeypatch.setattr(module, "apply_masks", last)
        monkeypatch.setattr(module, "repair_refit", earlier)


def settings(count: int, **rest: Any) -> RepairOptions:
    return RepairOptions(samples=count, verify_samples=0, refit=FAST, **rest)


@pytest.mark.parametrize("fold", [False, True])
def test_masks_are_nested_and_the_schedule_is_cubic(fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch)
    model = residual_net()
    if fold:
        model = folded(model)
    before = model.SerializeToString(deterministic=True)
    result = compress(model, images(48, seed=1), CompressOptions(0.8, rounds=4, repair=settings(48)))
    assert model.SerializeToString(deterministic=True) == before
    total = size(model)
    # between the first round and the last, each begins with the mask that the one before has ended with
    assert [zeros(item) for item in rounds.models] == [round(share * total) for share in (0.4625, 0.4625, 0.7, 0.8)]
    for earlier, later in zip(rounds.models[:-1], rounds.models[1:], strict=True):
        for old, new in zip(weights_of(earlier), weights_of(later), strict=True):
            assert not new[old == 0].any()
    # a round starts from the dense weights: what survives is unchanged until the refit
    for item in rounds.models:
        for dense, kept in zip(weights_of(model), weights_of(item), strict=True):
            np.testing.assert_array_equal(kept[kept != 0], dense[kept != 0])
    assert len(result.round_seconds) == 4
    assert zeros(result.model) == round(0.8 * total)
    assert result.repair.sparsity == pytest.approx(0.8, abs=1 / total)
    onnx.checker.check_model(result.model, full_check=True)


def test_one_round_is_pruning_then_refit() -> None:
    model, x = residual_net(), images(48, seed=1)
    at_once = compress(model, x, CompressOptions(0.7, rounds=1, repair=settings(48))).model
    damaged = prune(model, options=PruneOptions(0.7)).model
    options = RepairOptions(method="refit", samples=48, verify_samples=0, refit=replace(FAST, rows=2 * FAST.rows))
    by_hand = repair(damaged, x, options, dense=model).model
    np.testing.assert_array_equal(run(at_once, {"x": x})["logits"], run(by_hand, {"x": x})["logits"])


def test_the_last_round_samples_twice_as_many_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RefitRecipe] = []
    for place in (module, importlib.import_module("onnx_asr.repairing.pipeline")):
        original = place.repair_refit

        def spy(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append(args[4])
            return original(*args, **kwargs)

        monkeypatch.setattr(place, "repair_refit", spy)
    recipe = RefitRecipe(rows=300, relu_steps=3)
    options = RepairOptions(samples=48, verify_samples=0, refit=recipe)
    result = compress(residual_net(), images(48, seed=1), CompressOptions(0.7, rounds=3, repair=options))
    assert [(item.rows, item.relu_steps) for item in seen] == [(300, 1), (300, 1), (600, 3)]
    assert result.repair.options.refit == replace(recipe, rows=600)


def test_layers_choose_their_own_weights_step_by_step() -> None:
    """One layer and all samples in each round: numpy's least squares give the last mask."""
    rng = np.random.default_rng(3)
    model = net("g (float[N,24] x) => (float[N,10] y) { y = MatMul (x, w) }", w=(24, 10))
    x = rng.standard_normal((6000, 24)) @ rng.standard_normal((24, 24))
    x = (x / x.std(0)).astype(np.float32)  # without BatchNormalization, magnitudes count by their inputs' deviation
    w0 = parameter(model, 0, 1).astype(float)
    recipe = RefitRecipe(ridge=0.0, gain_power=0.0, class_steps=0)
    options = RepairOptions(samples=6000, verify_samples=0, refit=recipe)
    result = compress(model, x, CompressOptions(0.8, rounds=3, round_samples=1.0, repair=options))

    def kept(values: np.ndarray, count: int) -> np.ndarray:
        return np.asarray(np.abs(values) >= np.sort(np.abs(values), axis=None)[-count])

    def fit(mask: np.ndarray) -> np.ndarray:
        inputs = x.astype(float)
        centred, target, weight = inputs - inputs.mean(0), inputs @ w0, np.zeros_like(w0)
        for column in range(10):
            of = mask[:, column]
            weight[of, column] = np.linalg.lstsq(centred[:, of], target[:, column] - target[:, column].mean())[0]
        return weight

    first, second, third = (240 - round(240 * 0.8 * (1 - left**3)) for left in (2 / 3, 1 / 3, 0))
    mask = kept(w0, first)
    for count in (round((first * second) ** 0.5), second, third):
        mask = kept(fit(mask), count)
    np.testing.assert_array_equal(parameter(result.model, 0, 1) != 0, mask)
    np.testing.assert_allclose(parameter(result.model, 0, 1), fit(mask), rtol=1e-3, atol=1e-4)
    # not what each round's end would have told of the next
    by_rounds = kept(w0, first)
    for count in (second, third):
        by_rounds = kept(fit(by_rounds), count)
    assert (by_rounds != mask).any()


def test_a_narrowed_round_leaves_each_layer_what_the_ranking_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    goals: list[list[np.ndarray]] = []
    original = module.make_masks

    def spy(*args: Any, **kwargs: Any) -> Any:
        goals.append(original(*args, **kwargs))
        return goals[-1]

    monkeypatch.setattr(module, "make_masks", spy)
    rounds = Rounds(monkeypatch)
    options = replace(settings(48), refit=replace(FAST, classifier=False))  # the Gemm has no refit to choose by
    compress(residual_net(), images(48, seed=1), CompressOptions(0.8, rounds=4, repair=options))
    given = [value != 0 for value in weights_of(rounds.models[2])]  # the third round's, which the second has chosen
    assert [mask.sum() for mask in given] == [mask.sum() for mask in goals[1]]
    assert any((mask != goal).any() for mask, goal in zip(given, goals[1], strict=True))
    np.testing.assert_array_equal(given[-1], goals[1][-1])


def one_value_a_channel_added() -> onnx.ModelProto:
    """A feature map plus a pooled branch, which has one value per channel."""
    text = """g (float[N,3,8,8] x) => (float[N,4] y) {
        a = Conv <pads=[1,1,1,1]> (x, u)  p = GlobalAveragePool (a)  c = Conv (p, w)  b = Conv (a, v)  s = Add (c, b)
        r = Relu (s)  q = GlobalAveragePool (r)  f = Flatten (q)  y = Gemm (f, g_w) }"""
    return net(text, u=(8, 3, 3, 3), v=(8, 8, 1, 1), w=(8, 8, 1, 1), g_w=(8, 4))


@pytest.mark.parametrize("make", [residual_net, one_value_a_channel_added])
@pytest.mark.parametrize("recipe", [FAST, replace(FAST, rows=300), replace(FAST, block_targets=False)])
def test_the_dense_network_is_run_once_for_all_rounds_that_rank(
    make: Callable[[], onnx.ModelProto], recipe: RefitRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sampled outputs are kept, in files under a memory limit, with the same results."""
    runs: list[int] = []
    walks: list[Walk] = []

    class Counting(Walk):
        def lane(self, draft: Draft, targets: Any) -> Any:
            if self in walks:  # a second lane: both networks are run
                runs.append(self.calibration.count)
            walks.append(self)
            return super().lane(draft, targets)

    monkeypatch.setattr(importlib.import_module("onnx_asr.repairing.rows"), "Walk", Counting)
    options = RepairOptions(samples=50, verify_samples=0, refit=recipe, batch_size=9)
    models = [
        compress(
            make(),
            images(50, seed=1),
            CompressOptions(0.7, scope="global", rounds=4, repair=options),
            execution=Execution(memory_limit=limit),
        ).model.SerializeToString(deterministic=True)
        for limit in (None, 1 << 30)
    ]
    assert models[0] == models[1]
    assert runs == 2 * [27, 50]


def test_later_masks_rank_refitted_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds do not end in the mask that the dense magnitudes alone give."""
    rounds = Rounds(monkeypatch)
    model = residual_net()
    compress(model, images(48, seed=1), CompressOptions(0.7, rounds=2, repair=settings(48)))
    at_once = prune(model, options=PruneOptions(0.7)).model
    different = [
        (old != 0) != (new != 0) for old, new in zip(weights_of(at_once), weights_of(rounds.models[-1]), strict=True)
    ]
    assert sum(int(item.sum()) for item in different) > 0.02 * size(model)
    # the first mask is the dense magnitudes'
    first = prune(model, options=PruneOptions(0.7 * 7 / 8)).model
    for old, new in zip(weights_of(first), weights_of(rounds.models[0]), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(("pattern", "n", "rounds"), [("2:4", 2, 2), ("1:4", 1, 5)])
def test_patterns_are_valid_at_the_end_and_lose_one_weight_per_round(
    pattern: str, n: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Rounds(monkeypatch)
    model = residual_net()
    options = CompressOptions(pattern=pattern, rounds=rounds)
    result = compress(model, images(48, seed=1), replace(options, repair=settings(48)))
    steps = list(range(3, n - 1, -1))
    assert len(seen.models) == len(steps)
    for kept, item in zip(steps, [*seen.models[:-1], result.model], strict=True):
        for weight, dense in zip(weights_of(item), weights_of(model), strict=True):
            if dense.shape[1] < 4:
                assert np.count_nonzero(weight) == dense.size
                continue
            for start in range(0, dense.shape[1], 4):
                assert (np.count_nonzero(weight[:, start : start + 4], axis=1) == kept).all()


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_rounds_beat_pruning_at_once_on_images_never_seen(name: str) -> None:
    model = digits(name)
    x, fresh = digit_images()[0][:256], digit_images("validation")[0]
    (source,) = (value.name for value in model.graph.input)
    (output,) = (value.name for value in model.graph.output)
    reference = run(model, {source: fresh})[output]
    found = []
    for rounds in (1, 4):
        options = CompressOptions(0.95, scope="global", rounds=rounds)
        result = compress(model, x, replace(options, repair=settings(256))).model
        found.append(kl(reference, run(result, {source: fresh})[output]))
    assert found[1] < 0.9 * found[0]


def test_the_verification_is_of_the_last_mask_before_and_after() -> None:
    model, x = residual_net(), images(96, seed=1)
    options = RepairOptions(samples=64, verify_samples=32, refit=FAST)
    result = compress(model, x, CompressOptions(0.6, rounds=2, repair=options))
    verification = result.repair.verification
    assert verification is not None
    assert verification.held_out
    assert verification.after.kl is not None
    assert verification.before.kl is not None
    assert verification.after.kl < verification.before.kl
    values = plain(result)
    assert values["verification"]["after"]["kl"] == verification.after.kl
    assert values["before"]["nonzeros"] - values["after"]["nonzeros"] == pytest.approx(zeros(result.model), abs=64)
    assert values["after"]["compressed"] < values["before"]["compressed"]
    assert "onnxruntime" in values["helps"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "out of range"),
        ({}, "missing"),
        ({"sparsity": 0.5, "rounds": 0}, "rounds"),
        ({"sparsity": 0.5, "round_samples": 0.0}, "round-samples"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "sets the sparsity"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        CompressOptions(**options)


def test_rounds_of_blocks_are_nested_and_share_their_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch)
    x = images(48, seed=0)
    result = compress(residual_net(), x, CompressOptions(sparsity=0.75, pattern="4x1", rounds=3, repair=settings(48)))
    for earlier, later in zip(rounds.models, rounds.models[1:], strict=False):
        for before, after in zip(weights_of(earlier), weights_of(later), strict=True):
            assert not after[before == 0].any()
    for position in positions(result.model, "Conv"):
        weight = parameter(result.model, position, 1)
        if weight.shape[1] == 1:
            continue  # a depthwise convolution: one output channel a group
        for start in range(0, len(weight), 4):
            alive = weight[start : start + 4] != 0
            np.testing.assert_array_equal(alive.any(axis=0), alive.all(axis=0))


def test_layers_with_hardly_any_weights_left_are_noted() -> None:
    x, _ = digit_images()
    result = compress(digits("vgg"), x[:64], CompressOptions(0.999, rounds=1, repair=settings(64)))
    (note,) = (note for note in result.repair.notes if note.startswith("layer collapse"))
    assert f"in {sum(layer.is_collapsed for layer in result.layers)} of {len(result.layers)} layers" in note


def test_progress_goes_from_the_first_round_to_the_last() -> None:
    seen: list[tuple[str, float]] = []
    execution = Execution(progress=lambda stage, fraction: seen.append((stage, fraction)))
    settings = RepairOptions(samples=16, verify_samples=8)
    compress(residual_net(), images(24, seed=1), CompressOptions(0.5, rounds=3, repair=settings), execution=execution)
    rounds = [(stage, fraction) for stage, fraction in seen if stage.startswith("mask round")]
    assert list(dict(rounds)) == ["mask round 1 of 3", "mask round 2 of 3"]
    fractions = [fraction for _, fraction in rounds]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) > 4
    assert 0.5 < fractions[-1] < 2 / 3


@pytest.mark.parametrize(
    ("budget", "last_cost", "scope", "rounds"),
    [
        (0.0, module.LAST_COST, "global", 1),
        (1e6, module.LAST_COST, "auto", 4),
        (1e6, 1e12, "global", 2),  # what the last round will take, the first one tells
        (1e6, 1e12, "auto", 1),  # or a trial of a scope
    ],
)
def test_a_time_budget_leaves_rounds_out(
    budget: float, last_cost: float, scope: Any, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAST_COST", last_cost)
    settings = RepairOptions(samples=16, verify_samples=8)
    options = CompressOptions(0.5, rounds=4, scope=scope, time_budget=budget, repair=settings)
    result = compress(residual_net(), images(24, seed=1), options)
    assert len(result.round_seconds) == rounds
    done = f"{rounds} {'round' if rounds == 1 else 'rounds'} instead of 4, to keep within the time budget"
    assert [note for note in result.repair.notes if "time budget" in note] == ([] if rounds == 4 else [done])
    zeros, size = sum(layer.zeros for layer in result.layers), sum(layer.size for layer in result.layers)
    assert zeros == round(0.5 * size)


def test_a_time_budget_is_not_negative() -> None:
    with pytest.raises(OptionError, match=r"time-budget -1\.0 is out of range"):
        CompressOptions(0.5, time_budget=-1.0)


def test_layers_that_would_not_gain_stay_dense() -> None:
    model = net(
        """
        g (float[N,32,6,6] x) => (float[N,8] logits) {
          a = Conv (x, wide)  b = Relu (a)  c = GlobalAveragePool (b)  d = Flatten (c)
          logits = Gemm <transB=1> (d, narrow)
        }
        """,
        wide=(256, 32, 3, 3),
        narrow=(8, 256),
    )
    x = np.random.default_rng(1).standard_normal((32, 32, 6, 6)).astype(np.float32)
    options = CompressOptions(pattern="2:4", target="tensorrt", repair=settings(32))
    result = compress(model, x, options)
    wide, narrow = weights_of(result.model)
    assert (wide.reshape(256, 8, 4, 9) != 0).sum(axis=2).max() == 2
    assert np.count_nonzero(narrow) == narrow.size
    assert [layer.name for layer in result.layers] == ["Conv:a"]
    assert [(skip.name, skip.code) for skip in result.left_dense] == [("Gemm:logits", "no-gain-on-target")]
    assert plain(result)["left_dense"][0]["name"] == "Gemm:logits"
