"""Options as they are declared by dataclasses, read from arguments, and shown in the help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from onnx_asr.cli.command import COMMANDS
from onnx_asr.cli.options import Declarations, Form, Given
from onnx_asr.cli.parser import Parser, asks_for_help
from onnx_asr.cli.values import byte_count, input_shape, share_or_bytes
from onnx_asr.errors import OptionError


@dataclass(frozen=True)
class Inner:
    """Parts.

    Attributes:
        strength: How strongly
            it pulls.
        seed: Of the parts.
    """

    strength: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Outer:
    """All.

    Attributes:
        count: How many; ``0`` for 100% of them.
        mode: Which one.
        limit: At most.
        names: Some names.
        shares: Some shares.
        exact: Exactly or not.
        quick: Quickly or not.
        seed: Of everything.
        inner: Parts.
    """

    count: int = 3
    mode: Literal["a", "b"] | float = "a"
    limit: float | None = None
    names: tuple[str, ...] = ()
    shares: tuple[float, ...] = (0.5, 0.9)
    exact: bool = True
    quick: bool = False
    seed: int = 0
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class One:
    """One.

    Attributes:
        count: A count.
        mode: Which one.
        share: A share.
    """

    count: int = 3
    mode: str = "a"
    share: float = 0.5


@dataclass(frozen=True)
class Other:
    """Another.

    Attributes:
        count: Another count.
        share: Another share.
        extra: Only here.
    """

    count: int = 4
    share: float = 0.5
    extra: int = 1


def work(
    path: Annotated[str, Form(help="The file.", names=("FILE",))],
    options: Outer,
    output: Annotated[str, Form("FILE", "Where to.", ("--output", "-o"))] = "out",
) -> tuple[str, Outer, str]:
    """Work."""
    return path, options, output


def loosely(options: Annotated[dict[str, Any], Given({"": One, "other: ": Other})], mode: str = "a") -> dict[str, Any]:
    """Work."""
    return options | {"mode": mode}


PANELS = {"Inner": {"": "Parts"}, "Outer": {"count": "Numbers"}}


def run(function: Any, *arguments: str, forms: Mapping[str, Form] | None = None, without: tuple[str, ...] = ()) -> Any:
    group = Declarations(forms or {}, PANELS, without).group_of(function)
    return group.made(Parser("program", "Does it.", list(group.options())).values(arguments), {})


def shown(function: Any, without: tuple[str, ...] = ()) -> str:
    group = Declarations({}, PANELS, without).group_of(function)
    return Parser("program", "Does it.", list(group.options())).format_help()


def test_what_is_not_given_is_left_to_the_classes() -> None:
    assert run(work, "a") == ("a", Outer(), "out")


def test_values_are_read_by_type() -> None:
    given = ["--count=-4", "--mode", "2", "--limit", "1e3", "--names", "x,y", "--names", "z", "--shares", "1,-2"]
    given += ["--no-exact", "--quick", "--strength", ".25", "a", "-o", "b"]
    expected = Outer(-4, 2.0, 1000.0, ("x,y", "z"), (1.0, -2.0), False, True, 0, Inner(0.25))
    assert run(work, *given) == ("a", expected, "b")
    assert run(work, "a", "--mode", "b")[1].mode == "b"
    assert run(work, "a", "--shares", "-.5,1")[1].shares == (-0.5, 1.0)


def test_a_field_that_both_have_is_one_option() -> None:
    _, options, _ = run(work, "a", "--seed", "7")
    assert (options.seed, options.inner.seed) == (7, 7)


def test_the_last_of_several_values_counts() -> None:
    assert run(work, "a", "--count", "1", "--count", "2")[1].count == 2


def test_a_form_replaces_name_and_reader() -> None:
    forms = {"count": Form("SIZE", names=("--size",), read=byte_count)}
    assert run(work, "a", "--size", "2kB", forms=forms)[1].count == 2000
    with pytest.raises(OptionError, match="--count"):
        run(work, "a", "--count", "2", forms=forms)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "required: FILE"),
        (("a", "b"), "unrecognized arguments: b"),
        (("a", "--coun", "1"), "unrecognized arguments: --coun"),
        (("a", "--count"), "--count: expected one argument"),
        (("a", "--count", "1.5"), "--count: '1.5' is not a whole number"),
        (("a", "--limit", "much"), "--limit: 'much' is not a number"),
        (("a", "--shares", "1,b"), "--shares: 'b' is not a number"),
        (("a", "--no-quick"), "unrecognized arguments: --no-quick"),
    ],
)
def test_errors_name_the_option_and_the_help(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(OptionError) as error:
        run(work, *arguments)
    assert words in str(error.value)
    assert str(error.value).endswith("; see program --help")


@pytest.mark.parametrize("without", [("Parts",), ("strength",)])
def test_a_command_may_leave_options_out(without: tuple[str, ...]) -> None:
    assert "--strength" in shown(work)
    assert "--strength" not in shown(work, without)
    with pytest.raises(OptionError, match="--strength"):
        run(work, "a", "--strength", "1", without=without)


def test_only_what_is_given_goes_into_a_dictionary() -> None:
    assert run(loosely) == {"mode": "a"}
    assert run(loosely, "--extra", "2", "--count", "3", "--mode", "b") == {"extra": 2, "count": 3, "mode": "b"}


def test_the_help_comes_from_the_declarations() -> None:
    text = " ".join(shown(work).split())
    assert "usage: program FILE [options]" in text
    for part in (
        "FILE The file.",
        "-o, --output FILE Where to. [default: out]",
        "Numbers: --count N How many; 0 for 100% of them. [default: 3]",
        "Parts: --strength X How strongly it pulls. [default: 0.5]",
        "--mode a|b|X Which one. [default: a]",
        "--limit X At most. --",
        "--names TEXT Some names. [repeatable]",
        "--shares X[,X] Some shares. [default: 0.5,0.9]",
        "--exact, --no-exact Exactly or not. [default: on]",
        "--quick Quickly or not. --seed N Of everything. [default: 0]",
    ):
        assert part in text, part
    assert text.count("--seed") == 1


def test_defaults_on_which_classes_differ_are_not_shown() -> None:
    text = " ".join(shown(loosely).split())
    assert "--count N A count. --share X A share. [default: 0.5] --" in text
    assert "--extra N other: Only here. [default: 1]" in text


def test_help_is_asked_for_anywhere_but_behind_two_dashes() -> None:
    assert asks_for_help(["a", "-h"])
    assert asks_for_help(["--help", "--", "a"])
    assert not asks_for_help(["a", "--", "-h"])


@pytest.mark.parametrize("name", ["prune", "repair", "compress", "sensitivity", "sweep"])
def test_every_option_of_a_command_says_what_it_means(name: str) -> None:
    options = COMMANDS[name].options
    assert [option.key for option in options if not option.help] == []
    names = [key for option in options for key in option.names]
    assert len(names) == len(set(names)) > 20


def test_values() -> None:
    assert (byte_count("4GiB"), byte_count("500 MB"), byte_count("1000000")) == (2**32, 5 * 10**8, 10**6)
    assert (share_or_bytes("0.5"), share_or_bytes("2"), share_or_bytes("1kB")) == (0.5, 2, 1000)
    assert input_shape("a:b:1,3,8,8") == ("a:b", [1, 3, 8, 8])
    for read, text in ((byte_count, "4X"), (byte_count, "-1"), (share_or_bytes, "half"), (input_shape, ":1,3")):
        with pytest.raises(OptionError, match=f"'{text}' is not"):
            read(text)
