"""Values of options, from the text that was given."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_asr.errors import OptionError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def numbers(name: str, text: str | None) -> Sequence[float] | None:
    """The numbers of an option that takes them with commas between.

    Raises:
        OptionError: When they are none.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--{name} {text} is no list of numbers: give them as 0.485,0.456,0.406") from None


def names(text: str) -> tuple[str, ...]:
    """The names of an option that takes them with commas between."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def number_or_name(text: str) -> float | str:
    """A number where the text is one, else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def byte_count(name: str, text: str | None) -> int | None:
    """Bytes from a number with an optional unit: 4GiB, 500MB, 4G, 1000000.

    Raises:
        OptionError: When it is no such size, or not above 0.
    """
    if text is None:
        return None
    number = text.strip().rstrip("KMGTIBkmgtib ")
    unit = text.strip()[len(number) :].strip().upper().removesuffix("B")
    try:
        size = float(number) * _UNITS[unit]
        if not 0 < size < 2**63:
            raise ValueError
    except (ValueError, KeyError):
        raise OptionError(f"--{name} {text} is no size: give a number above 0 with a unit, as 4GiB") from None
    return int(size)


def share_or_bytes(name: str, text: str | None) -> float | None:
    """A number without a unit up to 1, which is a share, or bytes as :func:`byte_count` reads them.

    Raises:
        OptionError: When it is neither.
    """
    if text is None:
        return None
    number = number_or_name(text)
    return number if isinstance(number, float) and number <= 1 else byte_count(name, text)


def input_shapes(texts: Sequence[str] | None) -> dict[str, list[int]]:
    """Shapes from ``name:1,3,224,224``; a name may have colons of its own.

    Raises:
        OptionError: When one is not of this form, or a name comes twice.
    """
    shapes: dict[str, list[int]] = {}
    for text in texts or ():
        name, colon, sizes = text.rpartition(":")
        try:
            shape = [int(size) for size in sizes.split(",")]
        except ValueError:
            colon = ""
        if not (colon and name) or name in shapes:
            raise OptionError(f"--input-shapes {text} is no shape of an input: give each once, as name:1,3,224,224")
        shapes[name] = shape
    return shapes
