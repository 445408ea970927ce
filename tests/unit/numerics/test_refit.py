"""Refit against independent oracles: lstsq, explicit normal equations, standard deviations taken from predictions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_asr.errors import OptionError
from onnx_asr.numerics import refit, rows, systems
from onnx_asr.numerics.refit import LayerRefit, RefitOptions, RefitSolution
from onnx_asr.numerics.rows import Memory, Resources, SolverLimits
from onnx_asr.numerics.systems import factors_are_cheaper
from onnx_asr.numerics.workers import Workers

LEAST_SQUARES = RefitOptions(ridge=0.0, relu_steps=0, gain_power=0.0)


class Layer:
    """Samples of a layer: ReLU-like inputs with shared parts, a target that no sparse weight meets exactly."""

    def __init__(self, groups=1, outputs=8, inputs=27, rows=2000, density=0.5, seed=0):
        rng = np.random.default_rng(seed)
        common = rng.standard_normal((rows, groups, 3)) @ rng.standard_normal((3, inputs))
        self.x = np.maximum(rng.standard_normal((rows, groups, inputs)) + common, 0.0).astype(np.float32)
        self.w0 = rng.standard_normal((groups, outputs, inputs))
        self.mask = rng.random(self.w0.shape) < density
        target = np.einsum("ngk,gmk->ngm", self.x, self.w0).reshape(rows, -1)
        noise = rng.standard_normal(target.shape) * 0.1 * target.std()
        self.target = (target - target.mean(0) + noise).astype(np.float32)

    def refit(self, options=LEAST_SQUARES, narrow=(), **settings) -> RefitSolution:
        fit = LayerRefit(self.x.copy(), self.target, self.w0, self.mask, options, **settings)
        for choose in narrow:
            fit.narrow(choose(fit.draft()))
        return fit.solve()

    def predict(self, weight, bias) -> np.ndarray:
        return np.einsum("ngk,gmk->ngm", self.x.astype(float), weight).reshape(len(self.x), -1) + bias


@pytest.fixture(params=["cholesky", "cg", "cg, preconditioned"])
def solver(request, monkeypatch) -> str:
    monkeypatch.setattr(refit, "factors_are_cheaper", lambda *_: request.param == "cholesky")
    if request.param == "cg, preconditioned":
        monkeypatch.setattr(systems, "_INPUTS_EACH", 4)
    return request.param.partition(",")[0]


SHAPES = {
    "dense": {},
    "grouped": {"groups": 4, "outputs": 5, "inputs": 18},
    "depthwise": {"groups": 30, "outputs": 1, "inputs": 9},
    "multiplier": {"groups": 16, "outputs": 2, "inputs": 9, "density": 0.3},
    "several chunks": {"inputs": 9, "rows": 9000},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_without_ridge_it_is_lstsq(shape, solver):
    layer = Layer(**shape)
    solution = layer.refit()
    assert solution.solver == solver
    groups, outputs, _ = layer.w0.shape
    for group in range(groups):
        for channel in range(outputs):
            row = group * outputs + channel
            kept = layer.mask[group, channel]
            design = np.column_stack([layer.x[:, group, kept].astype(float), np.ones(len(layer.x))])
            expected, *_ = np.linalg.lstsq(design, layer.target[:, row].astype(float), rcond=None)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(solution.weight[group, channel, kept], expected[:-1], atol=3e-5 * scale, rtol=0)
            np.testing.assert_allclose(solution.bias[row], expected[-1], atol=3e-5 * scale, rtol=0)


@pytest.mark.parametrize("ridge", [1e-3, 1e-2, 1.0])
def test_ridge_solves_the_normal_equations(ridge, solver):
    layer = Layer(groups=2, outputs=6, inputs=18)
    solution = layer.refit(replace(LEAST_SQUARES, ridge=ridge))
    for group in range(2):
        x = layer.x[:, group].astype(float)
        h = np.cov(x.T, bias=True)
        pull = ridge * np.diag(h).mean() + 1e-12
        for channel in range(6):
            kept = layer.mask[group, channel]
            target = layer.target[:, group * 6 + channel].astype(float)
            g = (x - x.mean(0)).T @ (target - target.mean()) / len(x)
            left = h[np.ix_(kept, kept)] + pull * np.eye(kept.sum())
            expected = np.linalg.solve(left, g[kept] + pull * layer.w0[group, channel, kept])
            np.testing.assert_allclose(solution.weight[group, channel, kept], expected, atol=3e-5)
            bias = target.mean() - expected @ x.mean(0)[kept]
            np.testing.assert_allclose(solution.bias[group * 6 + channel], bias, atol=3e-5 * len(expected))


def oracle(layer, options, negative=None, floor=0.0) -> RefitSolution:
    """The whole refit of a layer by normal equations in float64."""
    given = layer.target.astype(float)
    groups, outputs, _ = layer.w0.shape
    weight, bias = np.where(layer.mask, layer.w0, 0.0), np.zeros(groups * outputs)
    x = layer.x.astype(float)
    centred = x - x.mean(0)
    ridge = options.ridge * centred.var(0).mean(1) + 1e-12

    def met(prediction) -> np.ndarray:
        return given if negative is None else np.where(negative, np.minimum(prediction, floor), given)

    def relative(prediction) -> float:
        return float(np.sqrt(np.square(met(prediction) - prediction).mean(0).sum() / (given.var(0).sum() or 1.0)))

    before, target = (
        relative(layer.predict(weight, given.mean(0) - np.einsum("gmk,gk->gm", weight, x.mean(0)).ravel())),
        given,
    )
    for step in range(1 + (options.relu_steps if negative is not None else 0)):
        target = met(layer.predict(weight, bias)) if step else target
        for row, (group, channel) in enumerate(np.ndindex(groups, outputs)):
            kept = layer.mask[group, channel]
            rows, start = centred[:, group, kept], layer.w0[group, channel, kept]
            left = rows.T @ rows / len(x) + ridge[group] * np.eye(kept.sum())
            right = rows.T @ (target[:, row] - target[:, row].mean()) / len(x) + ridge[group] * start
            weight[group, channel, kept] = np.linalg.solve(left, right)
            bias[row] = target[:, row].mean() - weight[group, channel] @ x[:, group].mean(0)
    prediction = layer.predict(weight, bias)
    covariance = ((target - target.mean(0)) * (prediction - prediction.mean(0))).mean(0)
    wanted, reached = target.std(0), prediction.std(0)
    usable = (wanted > 0) & (reached > 1e-4) & (covariance >= options.min_correlation * wanted * reached)
    gain = np.divide(wanted, reached, out=np.ones_like(wanted), where=usable) ** options.gain_power
    weight *= gain.reshape(groups, outputs, 1)
    bias = target.mean(0) - np.einsum("gmk,gk->gm", weight, x.mean(0)).ravel()
    after = relative(layer.predict(weight, bias))
    return RefitSolution(weight, bias, gain, before, after, len(x), "cholesky", 0, True)


def check_close(actual, expected, near) -> None:
    for name in ("weight", "bias", "gain", "residual_before", "residual_after"):
        one, other = getattr(actual, name), getattr(expected, name)
        np.testing.assert_allclose(one, other, atol=near * (1 + np.abs(other).max()), rtol=0, err_msg=name)


WAYS = {"gram": "cholesky", "rows": "cg", "row space": "row space"}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    monkeypatch.setattr(refit, "cheapest_way", lambda *_: request.param)
    monkeypatch.setattr(refit, "factors_are_cheaper", lambda *_: True)
    return request.param


@given(
    rows=st.integers(3, 80),
    inputs=st.integers(1, 120),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 5),
    density=st.sampled_from([0.1, 0.5, 1.1]),
    ridge=st.sampled_from([0.03, 0.1, 1.0]),
    relu=st.sampled_from(["none", "plain", "floor"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_every_way_is_the_whole_refit_by_normal_equations(rows, inputs, groups, outputs, density, ridge, relu, seed):
    layer = Layer(groups, outputs, inputs, rows, density, seed)
    options = RefitOptions(ridge=ridge, min_correlation=0.0)
    negative, floor = None, None
    if relu != "none":
        floor = None if relu == "plain" else -np.abs(layer.target[::-1]).copy()
        negative = layer.target <= (0.0 if floor is None else floor)
    expected = oracle(layer, options, negative, 0.0 if floor is None else floor)
    for name, solver in WAYS.items():
        with pytest.MonkeyPatch.context() as context:
            context.setattr(refit, "cheapest_way", lambda *_, name=name: name)
            context.setattr(refit, "factors_are_cheaper", lambda *_: True)
            actual = layer.refit(options, dense_negative=negative, relu_floor=floor)
        assert actual.solver == solver
        # conjugate gradients solve drafts to 1e-3
        check_close(actual, expected, 5e-3 if solver == "cg" and relu != "none" else 5e-4)
        assert not actual.weight[~layer.mask].any()


@pytest.mark.parametrize("dead", [0, 10])
def test_few_rows_of_dead_inputs(dead, way):
    layer = Layer(groups=2, outputs=6, inputs=90, rows=40)
    layer.x[..., :dead] = 0.5
    solution = layer.refit(replace(LEAST_SQUARES, ridge=0.1))
    assert solution.solver == WAYS[way]
    check_close(solution, oracle(layer, replace(LEAST_SQUARES, ridge=0.1)), 5e-4)
    np.testing.assert_allclose(solution.weight[..., :dead], (layer.mask * layer.w0)[..., :dead])


def test_without_ridge_the_space_of_rows_meets_every_target(monkeypatch):
    monkeypatch.setattr(refit, "cheapest_way", lambda *_: "row space")
    layer = Layer(outputs=6, inputs=90, rows=20)
    layer.mask[0, 0] = False
    solution = layer.refit()
    error = layer.predict(solution.weight, solution.bias) - layer.target
    assert np.abs(error[:, 1:]).max() < 1e-4 * layer.target.std()
    step = (solution.weight - layer.w0)[0, 1, layer.mask[0, 1]]  # the smallest one that does
    kept = layer.x[:, 0, layer.mask[0, 1]].astype(float)
    kept -= kept.mean(0)
    wanted = (layer.target[:, 1] - layer.target[:, 1].mean()) - kept @ layer.w0[0, 1, layer.mask[0, 1]]
    np.testing.assert_allclose(step, np.linalg.pinv(kept) @ wanted, atol=1e-4 * np.abs(step).max())
    assert not solution.weight[0, 0].any()


def test_the_way_follows_rows_inputs_and_memory():
    def way(outputs, inputs, rows, density, gram_bytes=2**30) -> str:
        mask = np.random.default_rng(0).random((1, outputs, inputs)) < density
        return systems.cheapest_way(mask, rows, 90, gram_bytes)

    assert way(64, 25088, 64, 0.1) == way(64, 25088, 512, 0.5) == "row space"
    assert way(64, 576, 12000, 0.5) == way(512, 4608, 12000, 0.1) == way(512, 4608, 2000, 0.1) == "gram"
    assert way(512, 4608, 12000, 0.1, gram_bytes=2**20) == "rows"


class Taken:
    """Rows that are not held."""

    def __init__(self, x) -> None:
        self.x, self.shape, self.most = x, x.shape, 0

    def take(self, rows) -> np.ndarray:
        self.most = max(self.most, rows.stop - rows.start)
        return self.x[rows].copy()


@pytest.mark.parametrize("groups", [1, 3])
def test_rows_that_are_taken_anew_give_the_same(groups, way, monkeypatch):
    layer = Layer(groups, outputs=4, inputs=30, rows=300)
    held = layer.refit(RefitOptions(), dense_negative=layer.target <= 0)
    monkeypatch.setattr(rows, "_TAKEN_VALUES", 0)
    taken = Taken(layer.x)
    options = RefitOptions()
    actual = LayerRefit(taken, layer.target, layer.w0, layer.mask, options, dense_negative=layer.target <= 0).solve()
    assert taken.most == 64
    for name in ("weight", "bias", "gain"):
        near = 2e-3 if way == "rows" else 1e-4
        np.testing.assert_allclose(getattr(actual, name), getattr(held, name), atol=near, err_msg=name)


def test_leading_eigenvectors_save_steps(monkeypatch):
    monkeypatch.setattr(refit, "factors_are_cheaper", lambda *_: False)
    layer = Layer(outputs=80, inputs=256, rows=3000, density=0.9)
    plain, preconditioned = [], []
    for each, found in ((10**6, plain), (6, preconditioned)):
        monkeypatch.setattr(systems, "_INPUTS_EACH", each)
        found.append(layer.refit(replace(LEAST_SQUARES, ridge=1e-3)))
    assert preconditioned[0].steps < 0.8 * plain[0].steps
    check_close(preconditioned[0], oracle(layer, replace(LEAST_SQUARES, ridge=1e-3)), 1e-4)


def test_leading_eigenvectors_are_those_of_the_system():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    values = np.r_[
        20.0, 15.0, 10.0, np.full(57, 15 / 57) + np.linspace(-0.1, 0.1, 57)
    ]  # of sum 60, as for a diagonal of 1
    system = ((basis * values) @ basis.T).astype(np.float32)
    leading = systems._Leading(lambda p: p @ system, 60, 3)
    mask = np.ones((1, 60), bool)
    weights = leading.weights(mask)
    for number in range(3):  # the inverse, up to the factor that all share
        vector = basis[:, number].astype(np.float32)
        expected = vector * 15 / 57 / values[number]
        applied = leading.apply(vector[None], weights, mask.astype(np.float32))[0]
        assert np.linalg.norm(applied - expected) < 0.02
    other = basis[:, 9:10].T.astype(np.float32)
    assert np.linalg.norm(leading.apply(other, weights, mask.astype(np.float32)) - other) < 0.02


def test_both_solvers_agree(monkeypatch):
    layer = Layer(outputs=24, inputs=144, rows=3000, density=0.3)
    negative = layer.target <= 0
    solutions = []
    for cheaper in (True, False):
        monkeypatch.setattr(refit, "factors_are_cheaper", lambda *_, cheaper=cheaper: cheaper)
        solutions.append(layer.refit(RefitOptions(relu_steps=0), dense_negative=negative))
        solutions.append(layer.refit(RefitOptions(), dense_negative=negative))
    inverse, inverse_relu, cg, cg_relu = (layer.predict(s.weight, s.bias) for s in solutions)
    assert np.linalg.norm(cg - inverse) <= 1e-5 * np.linalg.norm(inverse)
    # What the ReLU hides is judged by drafts, each solved to 1e-3.
    assert np.linalg.norm(cg_relu - inverse_relu) <= 3e-3 * np.linalg.norm(inverse_relu)


def test_channels_are_solved_block_by_block(solver):
    layer = Layer(groups=2, outputs=5, inputs=18)
    negative, floor = layer.target <= 0, -np.abs(layer.target)
    whole = layer.refit(RefitOptions(), dense_negative=negative, relu_floor=floor)
    limits = SolverLimits(block_values=2 * 2 * 18)
    blocks = layer.refit(RefitOptions(), dense_negative=negative, relu_floor=floor, resources=Resources(limits=limits))
    for name in ("weight", "bias", "gain", "residual_before", "residual_after"):
        np.testing.assert_allclose(getattr(blocks, name), getattr(whole, name), rtol=2e-3, atol=2e-3)
    assert blocks.solver == whole.solver == solver


class Counting(Memory):
    """A store that keeps track of its buffers, and fills them with NaN first."""

    def __init__(self) -> None:
        self.given: dict[int, np.ndarray] = {}
        self.most = 0

    def allocate(self, shape, dtype) -> np.ndarray:
        array = np.full(shape, np.nan, dtype)
        self.given[array.ctypes.data] = array
        self.most = max(self.most, len(self.given))
        return array

    def release(self, array) -> None:
        del self.given[array.ctypes.data]


@pytest.mark.parametrize("classes", [False, True])
def test_gram_matrices_in_a_store_change_no_bit_and_go_back(classes, solver):
    layer = Layer(rows=300)
    expected = layer.refit(RefitOptions(), classes=classes)
    store = Counting()
    resources = Resources(store, limits=SolverLimits(piece_values=60))
    actual = layer.refit(RefitOptions(), classes=classes, resources=resources)
    for name in ("weight", "bias", "gain", "residual_before", "residual_after"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    assert store.most == 1
    assert not store.given


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("rows", [300, 12])
def test_conjugate_gradients_at_their_limit_are_reported(classes, rows, monkeypatch):
    monkeypatch.setattr(refit, "factors_are_cheaper", lambda *_: False)
    layer = Layer(groups=1 if classes else 2, rows=rows)
    options = RefitOptions(ridge=1e-4)
    enough = layer.refit(options, classes=classes)
    short = layer.refit(options, classes=classes, resources=Resources(limits=SolverLimits(cg_steps=2)))
    assert (enough.converged, short.converged) == (True, False)
    assert enough.steps > short.steps > 0
    check_finite(short, layer.mask)


def test_one_block_at_its_limit_is_enough_to_be_reported(monkeypatch):
    monkeypatch.setattr(refit, "factors_are_cheaper", lambda *_: False)
    layer = Layer(outputs=2)
    layer.mask[:, 1] = False  # the second channel has nothing to solve for
    limits = SolverLimits(block_values=layer.w0[:, 0].size, cg_steps=2)
    assert not layer.refit(resources=Resources(limits=limits)).converged
    layer.mask[:] = False
    assert layer.refit(resources=Resources(limits=limits)).converged


def test_a_solution_at_the_limit_is_not_forgotten_by_the_next():
    root, gram = np.ones((1, 1, 6)), np.cov(np.random.default_rng(0).standard_normal((6, 40)))[None]
    root[0, 0] = np.sqrt(np.diagonal(gram[0]))
    system = systems.GramSystem(gram, root, np.zeros_like(root), Resources(limits=SolverLimits(cg_steps=2)))
    solver = systems.ConjugateGradients(system, np.ones((1, 1, 6), bool), np.zeros((1, 1, 6)))
    for tolerance, steps in ((1e-6, 2), (1.0, 2)):
        solver.solve(np.arange(1.0, 7.0).reshape(1, 1, 6), tolerance)
        assert (solver.steps, solver.converged) == (steps, False)


def test_steps_on_the_divergence_are_counted(monkeypatch):
    monkeypatch.setattr(refit, "factors_are_cheaper", lambda *_: False)
    few, many = (Layer(rows=300).refit(RefitOptions(class_steps=count), classes=True) for count in (1, 5))
    assert many.steps > few.steps


def test_factors_take_no_steps(monkeypatch):
    monkeypatch.setattr(refit, "factors_are_cheaper", lambda *_: True)
    solution = Layer().refit(resources=Resources(limits=SolverLimits(cg_steps=1)))
    assert (solution.solver, solution.steps, solution.converged) == ("cholesky", 0, True)


def test_choice_of_solver_follows_size():
    assert factors_are_cheaper(np.ones((2000, 1, 9), np.bool_), 90)
    sparse = np.random.default_rng(0).random((1, 64, 576)) < 0.1
    assert factors_are_cheaper(sparse, 90)
    assert not factors_are_cheaper(sparse, 3)
    assert not factors_are_cheaper(np.random.default_rng(0).random((1, 256, 1152)) < 0.8, 90)


def largest(count):
    """Keep a number of entries over all groups."""
    return lambda weight: np.abs(weight) >= np.sort(np.abs(weight), axis=None)[-count]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("block", [None, 2])
def test_a_mask_is_narrowed_by_one_refit_after_another(shape, block, solver):
    layer = Layer(**shape)
    limits = SolverLimits() if block is None else SolverLimits(block_values=block * layer.w0[:, 0].size)
    counts = [int(layer.mask.sum() * share) for share in (0.8, 0.5)]
    steps = [largest(count) for count in counts]
    narrowed = layer.refit(narrow=steps, resources=Resources(limits=limits))
    mask = layer.mask
    for keep in steps:
        mask = keep(lstsq(layer, mask))
    np.testing.assert_array_equal(narrowed.weight != 0, mask)
    assert mask.sum() == counts[-1]
    np.testing.assert_allclose(narrowed.weight, lstsq(layer, mask), atol=1e-4)
    if shape == SHAPES["dense"]:  # at once, by the first refit, it would be another mask
        assert (largest(counts[-1])(lstsq(layer, layer.mask)) != mask).any()


def lstsq(layer, mask) -> np.ndarray:
    """The weights [G, M, K] under a mask."""
    weight = np.zeros(mask.shape)
    target = layer.target.reshape(len(layer.x), *mask.shape[:2]).astype(float)
    for group, channel in np.ndindex(mask.shape[:2]):
        x = layer.x[:, group, mask[group, channel]].astype(float)
        t = target[:, group, channel]
        weight[group, channel, mask[group, channel]] = np.linalg.lstsq(x - x.mean(0), t - t.mean(), rcond=None)[0]
    return weight


def test_choices_that_keep_everything_change_nothing_behind_a_relu(solver):
    layer = Layer()
    options, negative = RefitOptions(relu_steps=1), layer.target <= 0
    plain = layer.refit(options, dense_negative=negative)
    narrowed = layer.refit(options, dense_negative=negative, narrow=[lambda weight: np.ones_like(weight, bool)] * 2)
    np.testing.assert_allclose(narrowed.weight, plain.weight, atol=2e-5 * np.abs(plain.weight).max())
    np.testing.assert_allclose(narrowed.bias, plain.bias, atol=2e-5 * np.abs(plain.bias).max())


def test_choosing_without_a_branch_is_where():
    rng = np.random.default_rng(0)
    mask = rng.random((50, 2, 7)) < 0.5
    chosen, other = rng.standard_normal((2, 50, 2, 9)).astype(np.float32)
    chosen[0, 0, 1:4] = np.nan, np.inf, -0.0
    other[1, 0, 1:4] = np.nan, np.inf, -0.0
    chosen, other = chosen[..., 1:8].copy(), other[..., 1:8]
    expected = np.where(mask, chosen, other)
    np.testing.assert_array_equal(rows._where(mask, chosen, other).view(np.int32), expected.view(np.int32))


def through_relu(prediction, target, floor=0.0) -> float:
    return float(np.square(np.maximum(prediction, floor) - np.maximum(target, floor)).mean())


@pytest.mark.parametrize("with_floor", [False, True])
def test_relu_aware_steps_lower_the_error_behind_the_relu(with_floor, solver):
    layer = Layer(outputs=16, density=0.25)
    floor = None
    if with_floor:
        floor = (0.3 * layer.target.std() * np.random.default_rng(1).standard_normal(layer.target.shape)).astype("f4")
    theta = 0.0 if floor is None else floor
    options = replace(LEAST_SQUARES, ridge=1e-3)
    errors = []
    for steps in range(4):
        solution = layer.refit(
            replace(options, relu_steps=steps), dense_negative=layer.target <= theta, relu_floor=floor
        )
        errors.append(through_relu(layer.predict(solution.weight, solution.bias), layer.target, theta))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.95 * errors[0]


@pytest.mark.parametrize("size", [{"rows": 2000}, {"rows": 9000, "inputs": 9}], ids=["one chunk", "several chunks"])
def test_relu_steps_are_fits_of_the_met_target(size):
    layer = Layer(groups=2, outputs=3, **size)
    layer.target += np.linspace(-2, 2, 6, dtype=np.float32)
    negative = layer.target <= 0
    solution = layer.refit()
    for steps in (1, 2, 3):
        met = np.where(negative, np.minimum(layer.predict(solution.weight, solution.bias), 0), layer.target)
        solution = LayerRefit(layer.x.copy(), met.astype(np.float32), layer.w0, layer.mask, LEAST_SQUARES).solve()
        actual = layer.refit(replace(LEAST_SQUARES, relu_steps=steps), dense_negative=negative)
        np.testing.assert_allclose(actual.weight, solution.weight, atol=2e-4)  # of float32 products, by kernel
        np.testing.assert_allclose(actual.bias, solution.bias, atol=1e-4)
        gain = layer.refit(RefitOptions(ridge=0.0, relu_steps=steps), dense_negative=negative).gain
        prediction = layer.predict(solution.weight, solution.bias)
        np.testing.assert_allclose(gain, np.sqrt(met.std(0) / prediction.std(0)), rtol=1e-5)


def test_hidden_errors_do_not_count_as_residual():
    layer = Layer(outputs=4, density=2.0)
    layer.target = np.maximum(layer.predict(layer.w0, 0.0), 0.0).astype(np.float32)
    layer.target -= np.float32(1.0)  # the dense pre-activation is -1 wherever ReLU would have hidden it
    seen = layer.refit(replace(LEAST_SQUARES, relu_steps=30), dense_negative=layer.target <= 0)
    assert seen.residual_after < 0.7 * layer.refit().residual_after


def divergence(logits, target) -> np.ndarray:
    """KL(softmax(target) || softmax(logits)) of every row."""
    p, q = (np.exp(z - z.max(1, keepdims=True)) for z in (target.astype(float), logits))
    p, q = (z / z.sum(1, keepdims=True) for z in (p, q))
    return (p * np.log(p / q)).sum(1)


def descended(layer: Layer, weight: np.ndarray, bias: np.ndarray, pull: float) -> tuple[np.ndarray, np.ndarray]:
    """Minimum of mean KL + pull / 4 |w - weight|^2 over the mask, by Newton's method on all weights at once."""
    mask, classes, inputs = layer.mask[0], *layer.mask.shape[1:]
    free = np.flatnonzero(np.column_stack([mask, np.ones(classes, bool)]).ravel())
    design = np.column_stack([layer.x[:, 0].astype(float), np.ones(len(layer.x))])
    target = np.exp(layer.target - layer.target.max(1, keepdims=True)).astype(float)
    target /= target.sum(1, keepdims=True)
    start = np.column_stack([weight[0], bias])
    penalty = np.repeat(np.append(np.full(inputs, pull / 2), 1e-9)[None], classes, axis=0).ravel()
    values = start.copy()
    for _ in range(50):
        logits = design @ values.T
        q = np.exp(logits - logits.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
        slope = ((q - target).T @ design / len(design)).ravel() + penalty * (values - start).ravel()
        curvature = np.einsum("nc,cd->ncd", q, np.eye(classes)) - np.einsum("nc,nd->ncd", q, q)
        hessian = np.einsum("ncd,ni,nj->cidj", curvature, design, design, optimize=True) / len(design)
        hessian = hessian.reshape(slope.size, slope.size) + np.diag(penalty)
        step = np.zeros(slope.size)
        step[free] = np.linalg.solve(hessian[np.ix_(free, free)], slope[free])
        values -= step.reshape(values.shape)
    assert np.abs(slope[free]).max() < 1e-9
    return values[:, :-1], values[:, -1]


@pytest.mark.parametrize("pull", [0.01, 0.3])
def test_class_steps_go_to_the_minimum_of_the_divergence(pull, solver):
    layer = Layer(outputs=5, inputs=9, rows=400)
    layer.target *= np.float32(0.2)
    options = RefitOptions(class_steps=0, class_ridge=pull)
    start = layer.refit(options, classes=True)
    ridge = pull * layer.x.var(axis=0, dtype=float).mean() + 1e-12
    weight, bias = descended(layer, start.weight, start.bias, ridge)

    def total(solution: RefitSolution) -> float:
        distance = np.square(solution.weight - start.weight).sum()
        kl = divergence(layer.predict(solution.weight, solution.bias), layer.target).mean()
        return float(kl + ridge / 4 * distance)

    solutions = [layer.refit(replace(options, class_steps=count), classes=True) for count in (1, 5, 20, 3000)]
    totals = [total(start), *map(total, solutions)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < 0.9 * totals[0]
    near = 2e-3 if solver == "cholesky" else 1e-2  # conjugate gradients solve each step to 1e-3
    np.testing.assert_allclose(solutions[-1].weight[0], weight, atol=near)
    apart = layer.predict(solutions[-1].weight, solutions[-1].bias) - layer.predict(weight[None], bias)
    assert apart.std() < near
    for solution in solutions:
        assert not solution.weight[~layer.mask].any()


def test_class_steps_leave_the_dense_layer_as_it_is():
    layer = Layer(outputs=5, inputs=9, density=2.0)
    layer.target = layer.predict(layer.w0, 0.0).astype(np.float32)
    solution = layer.refit(RefitOptions(), classes=True)
    np.testing.assert_allclose(solution.weight, layer.w0, atol=1e-4)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_gain_is_the_ratio_of_standard_deviations(power, solver):
    layer = Layer(groups=2, outputs=6, density=0.3)
    options = replace(LEAST_SQUARES, ridge=0.1)
    plain = layer.refit(options)
    prediction = layer.predict(plain.weight, plain.bias)
    expected = (layer.target.std(0, dtype=float) / prediction.std(0)) ** power
    gained = layer.refit(replace(options, gain_power=power))
    np.testing.assert_allclose(gained.gain, expected, rtol=1e-5)
    np.testing.assert_allclose(
        gained.weight.reshape(12, -1), plain.weight.reshape(12, -1) * expected[:, None], rtol=1e-4
    )
    mean = layer.predict(gained.weight, gained.bias).mean(0)
    np.testing.assert_allclose(mean, layer.target.mean(0, dtype=float), atol=1e-4)


def test_gain_is_one_without_correlation():
    layer = Layer(outputs=2, inputs=6, density=2.0)
    layer.target[:, 0] = np.random.default_rng(5).standard_normal(len(layer.x))
    options = replace(LEAST_SQUARES, gain_power=0.5, min_correlation=0.2)
    gain = layer.refit(options).gain
    assert gain[0] == 1.0
    assert gain[1] > 1.0
    assert layer.refit(replace(options, min_correlation=0.0)).gain[0] > 1.0


def test_gain_is_one_where_the_prediction_is_rounding():
    layer = Layer(outputs=1, inputs=2, density=2.0)
    layer.x[..., 1] = layer.x[..., 0]
    layer.w0[:] = [1.0, -1.0]
    assert layer.refit(RefitOptions(ridge=1e4, min_correlation=0.0)).gain[0] == 1.0


def test_gradients_stop_at_directions_that_are_rounding():
    system = np.array([[1.0, 1.00001], [1.00001, 1.0]], np.float32)  # indefinite by rounding
    residual = np.array([[1.0, -1.0], [1.0, 1.0]], np.float32) / np.sqrt(np.float32(2.0))
    goal = np.full(2, 1e-6, np.float32)
    plain = systems._Leading(lambda p: p @ system, 2, 0)
    result, steps, converged = systems._descend(
        lambda p: p @ system, plain, np.ones((2, 2), np.bool_), residual.copy(), goal, limit=9
    )
    assert (steps < 9, converged) == (True, True)
    np.testing.assert_allclose(result, [[0.0, 0.0], residual[1] / 2], atol=1e-5)


def test_residuals_are_relative_errors():
    layer = Layer(groups=2, outputs=4)
    solution = layer.refit()
    spread = layer.target.var(0, dtype=float).sum()
    kept = np.where(layer.mask, layer.w0, 0.0)
    before = (layer.target - layer.predict(kept, 0.0)).var(0).sum()
    after = np.square(layer.target - layer.predict(solution.weight, solution.bias)).mean(0).sum()
    assert solution.residual_before == pytest.approx(np.sqrt(before / spread), rel=1e-4)
    assert solution.residual_after == pytest.approx(np.sqrt(after / spread), rel=1e-4)
    assert solution.rows == len(layer.x)


def check_finite(solution: RefitSolution, mask) -> None:
    for value in (solution.weight, solution.bias, solution.gain, solution.residual_before, solution.residual_after):
        assert np.isfinite(value).all()
    assert not solution.weight[~mask].any()


def test_empty_rows_keep_the_mean(solver):
    layer = Layer(groups=2, outputs=3)
    layer.mask[0, 1] = layer.mask[1] = False
    solution = layer.refit(RefitOptions())
    check_finite(solution, layer.mask)
    empty = [1, 3, 4, 5]
    np.testing.assert_allclose(solution.bias[empty], layer.target.mean(0, dtype=float)[empty], atol=1e-6)
    assert (solution.gain[empty] == 1.0).all()


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_dead_inputs_keep_their_weight(ridge, solver):
    layer = Layer(outputs=4)
    layer.x[:, :, :10] = 0.3
    solution = layer.refit(replace(LEAST_SQUARES, ridge=ridge))
    check_finite(solution, layer.mask)
    expected = np.where(layer.mask, layer.w0, 0.0)
    np.testing.assert_allclose(solution.weight[..., :10], expected[..., :10], rtol=1e-9)
    mean = layer.predict(solution.weight, solution.bias).mean(0)
    np.testing.assert_allclose(mean, layer.target.mean(0, dtype=float), atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 1e-9, 1e-2])
@pytest.mark.parametrize("trap", ["all dead", "few rows", "one row", "duplicates", "constant target"])
def test_singular_systems_stay_near_the_dense_weights(trap, ridge, solver):
    layer = Layer(outputs=4, density=0.8)
    if trap == "all dead":
        layer.x[:] = 2.0
    elif trap == "few rows":
        layer.x, layer.target = layer.x[:12], layer.target[:12]
    elif trap == "one row":
        layer.x, layer.target = layer.x[:1], layer.target[:1]
    elif trap == "duplicates":
        layer.x[..., 1::2] = layer.x[..., :-1:2]
    else:
        layer.target[:] = 0.7
    solution = layer.refit(RefitOptions(ridge=ridge), dense_negative=layer.target <= 0)
    check_finite(solution, layer.mask)
    assert np.abs(solution.weight).max() < 20 * np.abs(layer.w0).max()
    if trap in ("all dead", "one row"):
        np.testing.assert_allclose(solution.weight, np.where(layer.mask, layer.w0, 0.0), rtol=1e-6)
        assert (solution.gain == 1.0).all()


def test_duplicates_share_what_least_squares_leaves_open(solver):
    layer = Layer(outputs=4, inputs=10, density=2.0)
    layer.x[..., 5:] = layer.x[..., :5]
    solution = layer.refit()
    halves = solution.weight - layer.w0
    np.testing.assert_allclose(halves[..., 5:], halves[..., :5], atol=1e-3)  # no displacement along the null space
    x, w0, mask = layer.x[..., :5].copy(), layer.w0[..., :5], layer.mask[..., :5]
    merged = LayerRefit(x, layer.target, w0, mask, LEAST_SQUARES).solve()
    np.testing.assert_allclose(solution.weight[..., 5:] + solution.weight[..., :5], merged.weight, atol=1e-3)


def test_large_mean_does_not_cancel(solver):
    layer = Layer(outputs=4, inputs=9)
    expected = layer.refit().weight
    layer.x += np.float32(1000.0)
    np.testing.assert_allclose(layer.refit().weight, expected, atol=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "target", "w0", "relu_floor"])
def test_values_that_are_not_finite_are_refused(where, value):
    layer = Layer()
    relu = {"relu_floor": np.zeros_like(layer.target), "dense_negative": layer.target <= 0}
    array = relu[where] if where == "relu_floor" else getattr(layer, where)
    array.flat[np.flatnonzero(layer.mask)[0] if where == "w0" else 7] = value
    with pytest.raises(ValueError, match=where):
        layer.refit(**relu)


def test_pruned_entries_of_w0_have_no_effect():
    layer = Layer()
    expected = layer.refit(RefitOptions())
    layer.w0[~layer.mask] = np.nan
    np.testing.assert_array_equal(layer.refit(RefitOptions()).weight, expected.weight)


@pytest.mark.parametrize("where", ["x", "target", "w0"])
def test_values_too_large_for_float32_are_refused(where):
    layer = Layer()
    array = getattr(layer, where)
    array *= array.dtype.type(1e25)
    with pytest.raises(ValueError, match="too large"):
        layer.refit()


def test_shapes_that_do_not_fit_are_refused():
    layer = Layer()
    x, target, w0, mask = layer.x, layer.target, layer.w0, layer.mask
    cases = [
        (x[:, 0], target, w0, mask, {}, "x has shape"),
        (x[:0], target[:0], w0, mask, {}, "x has shape"),
        (x, target, w0[:, :, :-1], mask, {}, "w0 is"),
        (x, target, w0, mask.astype(int), {}, "boolean"),
        (x, target[:, :-1], w0, mask, {}, "target has shape"),
        (x, target, w0, mask, {"dense_negative": target[1:] <= 0}, "dense_negative has shape"),
        (x, target, w0, mask, {"relu_floor": target}, "without dense_negative"),
    ]
    for *arrays, relu, message in cases:
        with pytest.raises(ValueError, match=message):
            LayerRefit(*arrays, RefitOptions(), **relu)


@pytest.mark.parametrize(
    "wrong", [{"ridge": -1.0}, {"ridge": np.nan}, {"relu_steps": -1}, {"gain_power": np.inf}, {"min_correlation": -0.1}]
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        RefitOptions(**wrong)


def test_inputs_are_not_modified():
    layer = Layer(groups=2)
    copies = [a.copy() for a in (layer.x, layer.target, layer.w0, layer.mask)]
    layer.refit(RefitOptions(), dense_negative=layer.target <= 0)
    for copy, array in zip(copies, (layer.x, layer.target, layer.w0, layer.mask), strict=True):
        np.testing.assert_array_equal(copy, array)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 4),
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 20),
    rows=st.integers(1, 60),
    density=st.floats(0.0, 1.2),
    dead=st.floats(0.0, 1.0),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    ridge=st.sampled_from([0.0, 1e-8, 1e-6]),
    cheaper=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_always_finite_masked_and_no_worse(groups, outputs, inputs, rows, density, dead, scale, ridge, cheaper, seed):
    layer = Layer(groups, outputs, inputs, rows, density, seed)
    layer.x[..., np.random.default_rng(seed).random(inputs) < dead] = 0.5
    layer.x *= np.float32(scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refit, "factors_are_cheaper", lambda *_: cheaper)
        solution = layer.refit(replace(LEAST_SQUARES, ridge=ridge))
        check_finite(solution, layer.mask)
        assert solution.residual_after <= solution.residual_before * (1 + 1e-5) + 1e-4
        check_finite(layer.refit(RefitOptions(ridge=ridge), dense_negative=layer.target <= 0), layer.mask)


@pytest.mark.parametrize(
    "size",
    [
        {"groups": 3, "outputs": 70, "inputs": 30, "rows": 500},
        {"outputs": 150, "inputs": 150, "rows": 400, "density": 0.2},
        {"outputs": 70, "inputs": 300, "rows": 100},  # no Gram matrix
    ],
    ids=["groups", "blocks", "few rows"],
)
@pytest.mark.parametrize("classes", [False, True])
def test_any_number_of_threads_gives_the_same_bits(size, classes, solver, monkeypatch):
    monkeypatch.setattr(rows, "_TILE", 64)
    layer = Layer(**size)
    negative = None if classes else layer.target <= 0
    limits = SolverLimits(block_values=64 * layer.w0[0, 0].size * len(layer.w0))
    solutions = [
        layer.refit(
            RefitOptions(),
            narrow=[] if classes else [lambda draft: np.abs(draft) > np.quantile(np.abs(draft), 0.7)],
            dense_negative=negative,
            classes=classes,
            resources=Resources(workers=Workers(threads), limits=limits),
        )
        for threads in (1, 2, 5)
    ]
    for other in solutions[1:]:
        for name in ("weight", "bias", "gain", "residual_before", "residual_after", "steps"):
            np.testing.assert_array_equal(getattr(other, name), getattr(solutions[0], name))
