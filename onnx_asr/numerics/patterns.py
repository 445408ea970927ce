"""Sparsity patterns, and checks of a sparsity."""

from __future__ import annotations

import re
from dataclasses import dataclass

from onnx_asr.errors import OptionError


@dataclass(frozen=True)
class Pattern:
    """Sets of weights that may survive together.

    Attributes:
        n: Weights left of every ``m`` consecutive input channels; None where any weight may survive.
        height: Number of consecutive output channels of a group that share their zeros.
    """

    n: int | None = None
    m: int = 1
    height: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "unstructured", "N:M" or "Nx1".

        Raises:
            OptionError: For any other text.
        """
        if text == "unstructured":
            return cls()
        if text == "channel":
            raise OptionError(
                "pattern 'channel' does not apply here: remove whole channels with 'prune --pattern channel' "
                "(onnx_asr.prune_channels), then restore the accuracy with 'repair'"
            )
        block = re.fullmatch(r"(\d+)x1", text)
        if block and int(block[1]) > 1:
            return cls(height=int(block[1]))
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise OptionError(
                f"pattern '{text}' is unknown: give 'unstructured', N:M with 0 < N < M, as 2:4, or Nx1 with N > 1, "
                "such as 4x1"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def helps(self) -> str:
        """The benefit of the zeros."""
        if (self.n, self.m) == (2, 4):
            return (
                "2:4 zeros save time on NVIDIA GPUs from Ampere on, with TensorRT; elsewhere they only make the file "
                "compress better"
            )
        if self.n is not None:
            return (
                f"{self} zeros save time only in runtimes with kernels for this pattern; elsewhere they make the file "
                "compress better (NVIDIA GPUs accelerate 2:4)"
            )
        if self.height > 1:
            return (
                "blocks of output channels save time in runtimes with sparse CPU kernels, such as XNNPACK's for 1x1 "
                "convolutions (heights 2 and 4); onnxruntime has none, so they only make the file compress better"
            )
        return (
            "unstructured zeros make the file compress better; they save time only in runtimes with sparse kernels, "
            "which onnxruntime does not have"
        )

    def __str__(self) -> str:
        if self.height > 1:
            return f"{self.height}x1"
        return "unstructured" if self.n is None else f"{self.n}:{self.m}"


def check_sparsity(sparsity: float | None, pattern: Pattern) -> None:
    """Check that there is a sparsity in [0, 1), or an N:M pattern without one.

    Raises:
        OptionError: Otherwise.
    """
    if pattern.n is None:
        check_share(sparsity, "weights to zero")
    elif sparsity is not None:
        raise OptionError(f"pattern {pattern} sets the sparsity itself: drop --sparsity")


def check_share(sparsity: float | None, what: str) -> float:
    """The sparsity, if it is in [0, 1).

    Raises:
        OptionError: Otherwise.
    """
    if sparsity is None or not 0 <= sparsity < 1:
        found = "is missing" if sparsity is None else f"{sparsity} is out of range"
        raise OptionError(f"sparsity {found}: give the share of {what}, 0 <= sparsity < 1")
    return sparsity
