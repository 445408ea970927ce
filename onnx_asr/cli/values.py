"""Values of options, read from the text that was given; cyclopts names the option in a ValueError."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from cyclopts import Parameter, Token, convert

from onnx_asr.errors import OptionError

Paths = str | list[str]
"""Where samples are: one path or several."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def byte_count(text: str) -> int:
    """Bytes from a number with an optional unit: 4GiB, 500MB, 4G, 1000000.

    Raises:
        ValueError: When it is not a size, or not above 0.
    """
    number = text.strip().rstrip("KMGTIBkmgtib ")
    unit = text.strip()[len(number) :].strip().upper().removesuffix("B")
    try:
        size = float(number) * _UNITS[unit]
        if not 0 < size < 2**63:
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(f"'{text}' is not a size: give a number above 0 with a unit, such as 4GiB") from None
    return int(size)


def share_or_bytes(text: str) -> float:
    """A number up to 1 without a unit, which is a share, or bytes as :func:`byte_count` reads them.

    Raises:
        ValueError: When it is neither.
    """
    try:
        share = float(text)
    except ValueError:
        return byte_count(text)
    return share if share <= 1 else byte_count(text)


def image_size(text: str) -> int | tuple[int, int] | Literal["model"]:
    """A side, a width and height, or the size of the model's input: 416, 640x480, model.

    Raises:
        ValueError: When it is none of them.
    """
    if text.strip() == "model":
        return "model"
    sides = text.strip().lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdecimal() for side in sides):
        raise ValueError(
            f"'{text}' is not a size: give a whole number of pixels, such as 416, a width and height, such as 640x480, "
            "or 'model' for those of the model's input"
        )
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def input_shape(text: str) -> tuple[str, list[int]]:
    """An input's name and shape from ``name:1,3,224,224``; the name may have colons of its own.

    Raises:
        OptionError: When it is not of this form.
    """
    name, _, sizes = text.rpartition(":")
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        name = ""
    if not name:
        raise OptionError(f"--input-shapes '{text}' is not the shape of an input: give name:1,3,224,224")
    return name, shape


def separated(kind: Any, tokens: Sequence[Token]) -> Any:
    """Values from one text with commas between them; the last text counts."""
    parts = [part.strip() for part in tokens[-1].value.split(",") if part.strip()]
    return convert(kind, [tokens[-1].evolve(value=part) for part in parts])


def one_or_several(kind: Any, tokens: Sequence[Token]) -> Paths:
    """The text of an option, or all of them where it is repeated."""
    texts = [token.value for token in tokens]
    return texts[0] if len(texts) == 1 else texts


def read_by(read: Callable[[str], Any]) -> Parameter:
    """An option whose value a function makes of its text; the last text counts."""
    return Parameter(converter=lambda kind, tokens: read(tokens[-1].value), n_tokens=1)


ONE_OR_SEVERAL = Parameter(converter=one_or_several, n_tokens=1)
SEPARATED = Parameter(converter=separated, n_tokens=1, allow_leading_hyphen=True)
