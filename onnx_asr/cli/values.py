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
