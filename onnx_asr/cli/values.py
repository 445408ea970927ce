"""Values of options, read from the text that was given."""

from __future__ import annotations

from onnx_asr.errors import OptionError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def byte_count(text: str) -> int:
    """Bytes from a number with an optional unit: 4GiB, 500MB, 4G, 1000000.

    Raises:
        OptionError: When it is not a size, or not above 0.
    """
    number = text.strip().rstrip("KMGTIBkmgtib ")
    unit = text.strip()[len(number) :].strip().upper().removesuffix("B")
    try:
        size = float(number) * _UNITS[unit]
        if not 0 < size < 2**63:
            raise ValueError
    except (ValueError, KeyError):
        raise OptionError(f"'{text}' is not a size: give a number above 0 with a unit, such as 4GiB") from None
    return int(size)


def share_or_bytes(text: str) -> float:
    """A number up to 1 without a unit, which is a share, or bytes as :func:`byte_count` reads them.

    Raises:
        OptionError: When it is neither.
    """
    try:
        share = float(text)
    except ValueError:
        return byte_count(text)
    return share if share <= 1 else byte_count(text)


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
        raise OptionError(f"'{text}' is not the shape of an input: give name:1,3,224,224")
    return name, shape
