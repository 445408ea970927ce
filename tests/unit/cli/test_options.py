"""Options as the command line reads them: the library's classes, their docstrings as help, one line for a mistake."""

from __future__ import annotations

from typing import Any

import pytest

from onnx_asr.cli.app import COMMANDS, PROGRAM, run
from onnx_asr.cli.values import byte_count, input_shape, share_or_bytes
from onnx_asr.data import PRESETS, Preprocessing
from onnx_asr.errors import OptionError
from onnx_asr.pruning.options import ChannelPruneOptions, CompressOptions, PruneOptions, SensitivityOptions
from onnx_asr.repairing.options import RefitRecipe, RepairOptions
from onnx_asr.sweeping.grid import SweepGrid, SweepSettings

FILES = {
    "prune": "dense.onnx -o out.onnx",
    "repair": "pruned.onnx -o out.onnx --data data.npz",
    "compress": "dense.onnx -o out.onnx --data data.npz",
    "sensitivity": "dense.onnx --data data.npz",
    "sweep": "dense.onnx -o cells.json --data data.npz",
    "inspect": "model.onnx",
}


def read(line: str) -> dict[str, Any]:
    """What a command is called with; "..." stands for its files."""
    name, _, options = line.partition(" ")
    _, bound, _ = PROGRAM.parse_args(f"{name} {FILES[name]} {options}")
    bound.apply_defaults()
    return bound.arguments


def same(options: Any, library: Any) -> bool:
    """Whether options have the values of an object of the library."""
    return all(getattr(options, name) == value for name, value in vars(library).items() if name != "repair")


def test_what_is_not_given_is_left_to_the_classes() -> None:
    assert read("repair")["options"].settled() == RepairOptions()
    assert read("prune --sparsity 0.5")["options"].of(PruneOptions, "") == PruneOptions(0.5)
    assert read("prune --sparsity 0.5")["options"].of(ChannelPruneOptions, "") == ChannelPruneOptions(0.5)
    assert same(read("compress --sparsity 0.5")["options"], CompressOptions(0.5))
    assert same(read("sensitivity")["options"], SensitivityOptions())
    assert same(read("sweep")["grid"], SweepGrid())
    assert same(read("sweep")["settings"], SweepSettings())
    for name in ("compress", "sensitivity", "sweep"):
        options = "--sparsity 0.5" if name == "compress" else ""
        assert read(f"{name} {options}")["repair"].settled() == RepairOptions()
    assert read("inspect")["images"].preprocessing() is None


def test_values_are_read_by_type() -> None:
    line = "repair --prior 0.5 --method refit --gain-samples 7 --time-budget 1e3 --momentum=.25 --no-bias-correction"
    expected = RepairOptions(
        "refit", prior=0.5, gain_samples=7, time_budget=1000.0, momentum=0.25, bias_correction=False
    )
    assert read(line)["options"].settled() == expected
    assert read("repair --prior mean")["options"].prior == "mean"
    given = read("sweep --sparsities 0.5,.9 --patterns channel,2:4 --methods none --include a --include b,c")
    assert same(given["grid"], SweepGrid((0.5, 0.9), ("channel", "2:4"), ("none",)))
    assert given["settings"].include == ("a", "b,c")
    assert read("sensitivity --sparsities 0.25")["options"].sparsities == (0.25,)
    pruning = read("prune --target-size 2kB")["options"]
    assert pruning.of(PruneOptions, "") == PruneOptions(target_size=2000)
    machine = read("repair --memory-limit 1MiB --providers A,B --threads 2")["machine"]
    assert (machine.memory_limit, machine.providers, machine.threads) == (2**20, ("A", "B"), 2)
    shapes = read("prune --sparsity 0.5 --input-shapes a:1,3 --input-shapes b:c:2")["timing"].shapes()
    assert shapes == {"a": [1, 3], "b:c": [2]}


def test_the_last_of_several_values_counts() -> None:
    assert read("repair --samples 1 --samples 2")["options"].samples == 2
    assert read("sensitivity --sparsities 0.5 --sparsities 0.6,0.7")["options"].sparsities == (0.6, 0.7)


def test_one_seed_for_the_repair_and_its_recipe() -> None:
    for name in ("repair", "compress --sparsity 0.5", "sensitivity", "sweep"):
        given = read(f"{name} --seed 7")
        repair = given.get("repair", given.get("options")).settled()
        assert (type(repair), type(repair.refit), repair.seed, repair.refit.seed) == (RepairOptions, RefitRecipe, 7, 7)


def test_recipes_have_options() -> None:
    line = "repair --refit-rows 9 --ridge 0.1 --relu-steps 0 --gain-power 1 --no-block-targets --no-classifier"
    expected = RefitRecipe(9, 0.1, 0, 1.0, False, False, 5)
    assert read(f"{line} --class-steps 5")["options"].settled().refit == expected


def test_attributes_replace_those_of_a_preset() -> None:
    images = read("inspect --preset digits --mean -1,0,1 --std 2 --channel-order BGR")["images"]
    digits = vars(PRESETS["digits"])
    assert images.preprocessing() == Preprocessing(
        **digits | {"mean": (-1.0, 0.0, 1.0), "std": (2.0,), "channel_order": "BGR"}
    )
    assert read("inspect --mean -1")["images"].preprocessing() == Preprocessing(mean=(-1.0,))


@pytest.mark.parametrize("option", ["--data d.npz", "--report r.html", "--score row", "--samples 9"])
def test_channels_take_options_of_their_own(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"prune {FILES['prune']} --pattern channel --sparsity 0.5 {option}"
    assert run(line.split()) == 2
    assert f"{option.split()[0]} does not apply to --pattern channel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prune", "DENSE"),
        ("prune a", "--output"),
        ("prune a b -o c", "b"),
        ("prune a -o c --sparsiti 0.5", "--sparsiti"),
        ("prune a -o c --spars 0.5", "--spars"),
        ("prune a -o c --sparsity", "--sparsity"),
        ("prune a -o c --sparsity 90%", '--sparsity: unable to convert "90%" into float'),
        ("prune a -o c --target-size lots", "--target-size: 'lots' is not a size: give a number"),
        ("prune a -o c --sparsity 0.5 --scope node", '"node" for --scope. Choose from: "global", '),
        ("repair a -o b --data c --samples 1.5", '--samples: unable to convert "1.5" into int'),
        ("repair a -o b --data c --mean 1,b", '--mean: unable to convert "b" into float'),
        ("repair a -o b --data c --no-force", "--no-force"),
        ("repair a -o b --data c --seed", "--seed"),
        ("sensitivity a --data c --ridge 1", "--ridge"),
        ("sensitivity a --data c --method refit", "--method"),
        ("compress a -o b --data c --sparsity 0.5 --bn ema", "--bn"),
        ("sweep a -o b --data c --method refit", "--method"),
        ("repair a -o b --data c --refit-seed 1", "--refit-seed"),
    ],
)
def test_errors_are_one_line_that_names_the_option_and_the_help(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert err.startswith("error: ")
    assert err.endswith(f" See onnx-resuscitate {line.split()[0]} --help\n")
    assert (out, err.count("\n")) == ("", 1)


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-v", "widen"]) == 2
    assert "'widen' is not a command: give one of demo, prune, repair," in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_means_and_has_names_of_its_own(name: str) -> None:
    options = PROGRAM[name].assemble_argument_collection(parse_docstring=True).filter_by(show=True)
    assert [option.name for option in options if not option.parameter.help] == []
    names = [key for option in options for key in option.names]
    assert len(names) == len(set(names)) >= 7


def test_the_help_comes_from_the_declarations(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["repair", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "Usage: onnx-resuscitate repair",
        "PRUNED The pruned model, an .onnx file. [required]",
        "Weight of a new batch in the moving average, 0 < m <= 1. [default: 0.1]",
        "[choices: median, mean] [default: median]",
        "Seed of every random choice. [default: 0]",
        "Refit Gemm and MatMul nodes too. [default: on]",
        "Print errors and warnings only. --debug",
    ):
        assert part in text, part
    assert text.count("--seed") == 1
    panels = ["Arguments", "Options", "Method", "Calibration", "Refit", "Images", "Machine", "Display"]
    places = [text.index(f"─ {panel} ─") for panel in panels]
    assert places == sorted(places)


def test_values() -> None:
    assert (byte_count("4GiB"), byte_count("500 MB"), byte_count("1000000")) == (2**32, 5 * 10**8, 10**6)
    assert (share_or_bytes("0.5"), share_or_bytes("2"), share_or_bytes("1kB")) == (0.5, 2, 1000)
    assert input_shape("a:b:1,3,8,8") == ("a:b", [1, 3, 8, 8])
    for value, text in ((byte_count, "4X"), (byte_count, "-1"), (share_or_bytes, "half"), (input_shape, ":1,3")):
        with pytest.raises((ValueError, OptionError), match=f"'{text}' is not"):
            value(text)
