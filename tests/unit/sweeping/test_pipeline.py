"""Sweeps: cells against single pipelines, resumption, failures, and the workers' settings."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import onnx_asr
from onnx_asr import SweepGrid, SweepResult, SweepSettings, sweep
from onnx_asr.data import PRESETS
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import DataError, OptionError, OutputError
from onnx_asr.json_values import plain
from onnx_asr.repairing.options import RefitRecipe, RepairOptions
from onnx_asr.repairing.verification import split_samples
from onnx_asr.report.data import Run
from onnx_asr.report.figures import svg
from onnx_asr.report.html import render
from onnx_asr.report.sweep_data import panels, sweep_data
from onnx_asr.report.sweep_figure import draw, write_plot
from onnx_asr.sweeping.grid import Cell, PruneGoal
from onnx_asr.sweeping.workspace import Workspace
from tests.graphs import copy, digit_images, digits, first_output, folded, images, kl, net, residual_net
from tools.paths import MODELS

FEW = RepairOptions(samples=48, verify_samples=40, refit=RefitRecipe(rows=500, relu_steps=1))
SETTINGS = SweepSettings(repair=FEW, rounds=2)
GRID = SweepGrid((0.6, 0.9), ("unstructured", "2:4"), ("none", "paired", "refit"))


DENSE, SAMPLES = residual_net(), {"x": images(96, seed=1), "labels": np.random.default_rng(0).integers(0, 5, 96)}


@pytest.fixture(scope="module")
def swept() -> SweepResult:
    methods = ("compress", "auto", "refit", "asr", "bn", "none")
    return sweep(DENSE, SAMPLES, SweepGrid((0.5,), ("unstructured", "channel"), methods), SETTINGS)


def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts prunings and scored cells from now on."""
    counted: Counter[str] = Counter()
    for name in ("pruned", "score"):
        original = getattr(Workspace, name)

        def counting(self: Workspace, *given: Any, name: str = name, original: Any = original) -> Any:
            counted[name] += 1
            return original(self, *given)

        monkeypatch.setattr(Workspace, name, counting)
    return counted


def test_a_grid_has_each_cell_once_in_order() -> None:
    grid = SweepGrid((0.9, 0.5, 0.9), ("2:4", "unstructured", "4x1"), ("refit", "none"))
    assert [str(cell) for cell in grid.cells] == [
        *("none at 50%", "refit at 50%", "none at 90%", "refit at 90%"),
        *("none at 4x1 50%", "refit at 4x1 50%", "none at 4x1 90%", "refit at 4x1 90%"),
        *("none at 2:4", "refit at 2:4"),
    ]
    assert len(SweepGrid().cells) == 15
    assert [cell.goal.share for cell in SweepGrid(patterns=("1:4",), methods=("none",)).cells] == [0.75]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0.5,), ("unstructured",), ("magic",)), "method 'magic' is unknown: give one of none, bn"),
        (((1.0,),), r"sparsity 1.0 is out of range"),
        (((math.nan,),), "out of range"),
        (((),), "a sweep without sparsities"),
        (((0.5,), ()), "a sweep without patterns"),
        (((0.5,), ("unstructured",), ()), "a sweep without methods"),
        (((0.5,), ("2:4",)), "pattern 2:4 sets the sparsity itself: drop --sparsities"),
        ((None, ("5:4",)), "pattern '5:4' is unknown"),
    ],
)
def test_grids_without_sense_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SweepGrid(*arguments)


def test_settings_without_sense_are_refused() -> None:
    with pytest.raises(OptionError, match="scope 'erc' is unknown: give one of global, "):
        SweepSettings(scope="erc")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="score 'norm' is unknown: give one of magnitude, "):
        SweepSettings(score="norm")  # type: ignore[arg-type]


def test_cells_are_what_the_single_pipelines_make(swept: SweepResult) -> None:
    """Computed independently: by public functions, and KL and top-1 of plain runs."""
    x, labels = SAMPLES["x"], SAMPLES["labels"]
    chosen, held = split_samples(len(x), FEW, verify=True)
    reference = first_output(DENSE, x[held])
    assert swept.dense.top1 == np.mean(reference.argmax(axis=1) == labels[held])
    pruned = {
        "unstructured": onnx_asr.prune(DENSE, options=onnx_asr.PruneOptions(0.5)).model,
        "channel": onnx_asr.prune_channels(DENSE, onnx_asr.ChannelPruneOptions(0.5)).model,
    }
    tried = 0
    for cell, outcome in swept.cells.items():
        if outcome.error is not None:
            continue
        if cell.method == "compress":
            options = replace(FEW, samples=len(chosen), verify_samples=0)
            goal = onnx_asr.CompressOptions(0.5, rounds=2)
            model = onnx_asr.compress(DENSE, x, replace(goal, repair=options)).model
        elif cell.method == "none":
            model = pruned[cell.goal.pattern]
        else:
            options = replace(FEW, method=cell.method)  # type: ignore[arg-type]
            model = onnx_asr.repair(pruned[cell.goal.pattern], x, options, dense=DENSE).model
        outputs = first_output(model, x[held])
        assert outcome.fidelity is not None
        assert outcome.fidelity.top1 == np.mean(outputs.argmax(axis=1) == labels[held])
        assert outcome.fidelity.kl == pytest.approx(kl(reference, outputs), rel=1e-4)
        assert outcome.fidelity.samples == len(held)
        tried += 1
    assert tried == 11
    assert swept.measure == "top1"


def test_what_auto_chose_and_how_much_is_gone(swept: SweepResult) -> None:
    single, channel = PruneGoal("unstructured", 0.5), PruneGoal("channel", 0.5)
    assert swept.cells[Cell(single, "auto")].chosen == "refit"
    assert swept.cells[Cell(single, "refit")].chosen is None
    for method in ("none", "refit", "compress"):
        assert swept.cells[Cell(single, method)].sparsity == pytest.approx(0.5, abs=0.01)
    assert swept.cells[Cell(channel, "none")].sparsity > 0.6  # type: ignore[operator]
    assert swept.cells[Cell(single, "none")].seconds == 0
    assert swept.cells[Cell(single, "compress")].seconds > 0  # type: ignore[operator]


def test_a_failing_cell_does_not_stop_the_sweep(swept: SweepResult) -> None:
    (reason,) = swept.failures
    assert "cannot remove channels" in reason
    assert swept.failures[reason] == [Cell(PruneGoal("channel", 0.5), "compress")]
    result = sweep(folded(residual_net()), images(96, seed=1), SweepGrid((0.5,), methods=("none", "bn", "paired")))
    (reason,) = result.failures
    assert "has none (it was folded" in reason
    assert [cell.method for cell, outcome in result.cells.items() if outcome.fidelity] == ["none", "paired"]


def test_unexpected_errors_are_failures_and_interrupts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_with(error: BaseException) -> SweepResult:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(Workspace, "pruned", fail)
        return sweep(residual_net(), images(96, seed=1), SweepGrid((0.5,), methods=("none",)), SETTINGS)

    assert list(run_with(ZeroDivisionError("x")).failures) == ["unexpected ZeroDivisionError: x"]
    disguised = RuntimeError("stopped")
    disguised.__cause__ = KeyboardInterrupt()
    for interrupt in (KeyboardInterrupt(), disguised):
        with pytest.raises(type(interrupt)):
            run_with(interrupt)


def test_a_goal_is_pruned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = calls(monkeypatch)
    sweep(residual_net(), images(128, seed=1), GRID, SETTINGS)
    assert counted == {"pruned": 3, "score": 9}


def test_finished_cells_are_kept_and_missing_ones_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, path = residual_net(), images(128, seed=1), tmp_path / "results.json"
    whole = sweep(model, x, GRID, SETTINGS)
    score = Workspace.score

    def interrupted(self: Workspace, *given: Any) -> Any:
        if counted["score"] == 4:
            raise KeyboardInterrupt
        return score(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "score", interrupted)
        counted = calls(patch)
        with pytest.raises(KeyboardInterrupt):
            sweep(model, x, GRID, SETTINGS, results=path)
    stored = json.loads(path.read_text())
    assert len(stored["cells"]) == 3
    with monkeypatch.context() as patch:
        counted = calls(patch)
        result = sweep(model, x, GRID, SETTINGS, results=path)
        assert counted == {"pruned": 2, "score": 6}
    assert {cell: outcome.fidelity for cell, outcome in result.cells.items()} == {
        cell: outcome.fidelity for cell, outcome in whole.cells.items()
    }
    assert json.loads(path.read_text())["cells"] == plain(result)["cells"]
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]
    with monkeypatch.context() as patch:  # another grid, the same conditions: cells of both
        counted = calls(patch)
        wider = sweep(model, x, SweepGrid((0.3,), methods=("none",)), SETTINGS, results=path)
        assert counted == {"pruned": 1, "score": 1}
    assert wider.cells.keys() == {*whole.cells, Cell(PruneGoal("unstructured", 0.3), "none")}


def test_failed_cells_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, grid = tmp_path / "results.json", SweepGrid((0.5,), methods=("none", "bn"))
    arguments = (folded(residual_net()), images(96, seed=1), grid)
    sweep(*arguments, settings=SETTINGS, results=path)
    counted = calls(monkeypatch)
    result = sweep(*arguments, settings=SETTINGS, results=path)
    assert counted["score"] == 1
    assert [cell.method for cell in next(iter(result.failures.values()))] == ["bn"]


CHANGES = [  # what makes a sweep another one, and what the error names
    ("dense_sha256", {"model": residual_net(seed=1)}),
    ("calibration.sha256", {"data": images(128, seed=2)}),
    ("scored.sha256", {"test": images(40, seed=3)}),
    ("settings.repair.samples", {"settings": SweepSettings(repair=RepairOptions(samples=32, verify_samples=48))}),
    ("settings.repair.seed", {"settings": SweepSettings(repair=RepairOptions(seed=1))}),
    ("settings.score", {"settings": SweepSettings(repair=FEW, rounds=2, score="row")}),
    ("settings.rounds", {"settings": SweepSettings(repair=FEW, rounds=3)}),
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "results.json"
    sweep(residual_net(), images(128, seed=1), SweepGrid((0.5,), methods=("none",)), SETTINGS, results=path)
    return path


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[name for name, _ in CHANGES])
def test_a_file_of_another_sweep_is_refused(name: str, change: dict[str, Any], stored: Path) -> None:
    before = stored.read_bytes()
    arguments: dict[str, Any] = {"model": residual_net(), "data": images(128, seed=1), "settings": SETTINGS} | change
    with pytest.raises(OutputError, match=rf"cells of another sweep \(.*({name} is|and \d more).*another file with"):
        sweep(grid=SweepGrid((0.5,), methods=("none",)), results=stored, **arguments)
    assert stored.read_bytes() == before


def test_labels_are_a_condition_too(tmp_path: Path) -> None:
    pixels, labels = digit_images()
    path, grid = tmp_path / "results.json", SweepGrid((0.5,), methods=("none",))
    sweep(digits("vgg"), {"input": pixels, "labels": labels}, grid, SETTINGS, results=path)
    with pytest.raises(OutputError, match=r"scored.labels_sha256 is [0-9a-f]{24}\.\.\. there, None now"):
        sweep(digits("vgg"), {"input": pixels}, grid, SETTINGS, results=path)


def test_the_orientation_of_images_is_a_condition_where_it_matters(tmp_path: Path) -> None:
    folder, grid = tmp_path / "images", SweepGrid((0.5,), methods=("none",))
    folder.mkdir()
    exif = Image.Exif()
    for tagged in (False, True):
        exif[0x0112] = 3 if tagged else 1
        for number, pixels in enumerate(np.load(MODELS / "data" / "digits_calibration.npz")["images"][:88]):
            Image.fromarray(pixels[..., 0]).save(folder / f"{number}.png", exif=exif)
        results = tmp_path / f"{tagged}.json"
        upright, stored = PRESETS["digits"], replace(PRESETS["digits"], exif=False)
        sweep(digits("vgg"), folder, grid, SETTINGS, preprocessing=upright, results=results)
        if tagged:
            with pytest.raises(OutputError, match=r"calibration\.sha256 is"):
                sweep(digits("vgg"), folder, grid, SETTINGS, preprocessing=stored, results=results)
        else:
            sweep(digits("vgg"), folder, grid, SETTINGS, preprocessing=stored, results=results)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kind": "onnx-resuscitate sweep"}', '{"a": 1}', "\xff", None])
def test_a_file_that_is_not_a_sweep_result_is_not_overwritten(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(OutputError, match=r"another file with --output|is a folder"):
        sweep(residual_net(), images(96, seed=1), results=path)
    assert content is None or path.read_bytes() == content.encode("latin-1")


def test_samples_of_their_own_to_score_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, test = residual_net(), images(96, seed=1), images(40, seed=9)
    result = sweep(model, x, SweepGrid((0.7,), methods=("none",)), SETTINGS, test=test)
    (outcome,) = result.cells.values()
    outputs = first_output(onnx_asr.prune(model, options=onnx_asr.PruneOptions(0.7)).model, test)
    assert outcome.fidelity is not None
    assert outcome.fidelity.samples == 40
    assert outcome.fidelity.kl == pytest.approx(kl(first_output(model, test), outputs), rel=1e-4)
    settings = SweepSettings(repair=RepairOptions(verify_samples=0))
    with pytest.raises(OptionError, match="verify-samples 0 leaves no samples to score on"):
        sweep(model, x, settings=settings)


def test_labels_that_do_not_fit_are_refused_before_any_cell() -> None:
    x = images(96, seed=1)
    with pytest.raises(DataError, match="--label-offset"):
        sweep(residual_net(), {"x": x, "labels": np.full(96, 10)}, settings=SETTINGS)


def test_a_score_that_looks_at_data_and_a_pattern_of_blocks() -> None:
    model, x = residual_net(), images(96, seed=1)
    settings = SweepSettings(repair=FEW, score="variance", scope="erk", exclude=("gemm|fc",))
    result = sweep(model, x, SweepGrid((0.5,), ("unstructured", "4x1"), ("none",)), settings)
    chosen, held = split_samples(len(x), FEW, verify=True)
    for cell, outcome in result.cells.items():
        pruned = onnx_asr.prune(
            model,
            x,
            onnx_asr.PruneOptions(
                0.5, pattern=cell.goal.pattern, score="variance", scope="erk", exclude=("gemm|fc",), samples=len(chosen)
            ),
        ).model
        assert outcome.fidelity is not None
        expected = kl(first_output(model, x[held]), first_output(pruned, x[held]))
        assert outcome.fidelity.kl == pytest.approx(expected, rel=1e-4)


def test_a_scope_is_for_patterns_that_leave_it_open() -> None:
    grid = SweepGrid((0.5,), ("unstructured", "2:4"), ("none",))
    result = sweep(DENSE, SAMPLES, grid, replace(SETTINGS, scope="erk"))
    assert not result.failures
    alone = sweep(DENSE, SAMPLES, SweepGrid(patterns=("2:4",), methods=("none",)), SETTINGS)
    (cell,) = alone.cells
    assert result.cells[cell].fidelity == alone.cells[cell].fidelity


def test_workers_are_refused_where_dask_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_asr.sweeping.pipeline.find_spec", lambda name: None)
    arguments = (residual_net(), images(96, seed=1), SweepGrid((0.5,), methods=("none", "paired")))
    for given in ({"workers": 2}, {"cluster": "tcp://localhost:1"}):
        with pytest.raises(OptionError, match=r"pip install 'onnx-resuscitate\[distributed\]'"):
            sweep(*arguments, settings=SETTINGS, **given)  # type: ignore[arg-type]
    assert len(sweep(*arguments, settings=SETTINGS, workers=None).cells) == 2
    with pytest.raises(OptionError, match="workers 0 is out of range"):
        sweep(*arguments, workers=0)


def test_local_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = pytest.importorskip("onnx_asr.sweeping.workers")
    given = []

    @contextmanager
    def local(*arguments: int) -> Iterator[None]:
        given.append(arguments)
        raise OptionError("seen")
        yield

    monkeypatch.setattr(workers, "CPU_COUNT", 6)
    monkeypatch.setattr(workers, "_local", local)
    for asked, threads in ((2, 0), (4, 0), (None, 0), (2, 5)):
        execution = onnx_asr.Execution(Runtime(threads=threads))
        with pytest.raises(OptionError, match="seen"):
            sweep(DENSE, SAMPLES, SweepGrid((0.5, 0.9)), SETTINGS, workers=asked, execution=execution)
    assert given == [(2, 3), (4, 1), (6, 1), (2, 5)]


def test_local_workers_have_as_many_blas_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the environment sets their number."""
    workers = pytest.importorskip("onnx_asr.sweeping.workers")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with workers._local(2, 3) as client:
        (first, second) = client.run(lambda: (os.getpid(), os.environ["OMP_NUM_THREADS"])).values()
        assert first[0] != second[0] != os.getpid()
        assert first[1] == second[1] == "3"
    assert dict(os.environ) == before


def test_two_sweeps_at_a_time_do_not_want_the_same_port() -> None:
    workers = pytest.importorskip("onnx_asr.sweeping.workers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with workers._local(1, 1) as first, workers._local(1, 1) as second:
            assert first.submit(abs, -2).result() == second.submit(abs, 2).result() == 2


def test_the_curves_of_a_sweep(swept: SweepResult, tmp_path: Path) -> None:
    single, channel = panels(swept)
    assert (single["title"], channel["title"]) == ("unstructured", "channel")
    assert single["x"] == [1.0]
    assert single["labels"] == ["50%"]
    for method, (value,) in single["curves"].items():
        fidelity = swept.cells[Cell(PruneGoal("unstructured", 0.5), method)].fidelity
        assert fidelity is not None
        assert value == fidelity.top1
    assert "compress" in single["curves"]
    assert "compress" not in channel["curves"]
    path = write_plot(swept, tmp_path / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    text = write_plot(swept, tmp_path / "plot.svg").read_text()
    assert text == svg(draw([single, channel], "top1", swept.dense.top1))
    for words in ("no repair", "compress", "dense", "channel", "50%"):
        assert words in text


def test_the_page_of_a_sweep(swept: SweepResult) -> None:
    run = Run("sweep", "onnx-resuscitate sweep <b>", {"model": "<i>dense</i>.onnx", "output": "r.json"})
    values = json.loads(json.dumps(sweep_data(run, swept), allow_nan=False))
    page = render(values)
    assert "<i>dense" not in page
    assert page.count("<img") == 2
    for words in (
        "onnx-resuscitate sweep &lt;b&gt;",
        "failed",
        "cannot remove channels",
        "KL divergence",
        "weights gone",
    ):
        assert words in page, words
    best = max(row["cells"][0]["fidelity"]["top1"] for row in values["rows"])
    assert all(row["cells"][0]["best"] == (row["cells"][0]["fidelity"]["top1"] == best) for row in values["rows"])


def test_a_net_that_does_not_classify_is_judged_by_its_snr() -> None:
    model = net("g (float[N,3,8,8] x) => (float[N,4,8,8] y) { y = Conv (x, w) }", w=(4, 3, 1, 1))
    result = sweep(model, images(96, seed=1), SweepGrid((0.5,), ("2:4", "unstructured")), SETTINGS)
    assert result.measure == "snr_db"
    page = render(sweep_data(Run("sweep", "line", {"model": "m.onnx"}), result))
    assert "output SNR, dB" in page
    assert "KL divergence" not in page


def test_nothing_given_is_changed() -> None:
    model = residual_net()
    kept = copy(model)
    sweep(model, images(96, seed=1), SweepGrid((0.5,), methods=("none", "refit")), SETTINGS)
    assert model == kept


def test_data_by_path_and_opened() -> None:
    """The folder and the archive hold the same images in the same order."""
    dense, data = MODELS / "digits_mobilenet.onnx", MODELS / "data"
    grid = SweepGrid((0.5,), methods=("none",))
    results = [
        sweep(model, source, grid, SETTINGS, preprocessing=PRESETS["digits"])
        for model, source in (
            (str(dense), data / "digits_calibration"),
            (digits("mobilenet"), str(data / "digits_calibration.npz")),
        )
    ]
    assert results[0].conditions == results[1].conditions
    fidelities = [[outcome.fidelity for outcome in result.cells.values()] for result in results]
    assert fidelities[0] == fidelities[1]
