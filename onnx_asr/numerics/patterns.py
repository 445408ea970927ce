"""Patterns: which sets of weights may survive, and what share of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from onnx_asr.errors import OptionError


@dataclass(frozen=True)
class Pattern:
    """Which sets of weights may survive.

    Attributes:
        n: Weights left of every ``m`` consecutive input channels; None where any may survive.
        m: See ``n``.
        height: Consecutive output channels of a group that share their zeros.
    """

    n: int | None = None
    m: int = 1
    height: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "unstructured", "N:M" or "Nx1".

        Raises:
            OptionError: When it is none of them.
        """
        if text == "unstructured":
            return cls()
        if text == "channel":
            raise OptionError(
                "whole channels are removed by 'prune --pattern channel' (onnx_asr.prune_channels); 'repair' restores "
                "the accuracy afterwards"
            )
        block = re.fullmatch(r"(\d+)x1", text)
        if block and int(block[1]) > 1:
            return cls(height=int(block[1]))
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise OptionError(
                f"pattern '{text}' is unknown: give 'unstructured', N:M with 0 < N < M, such as 2:4, or Nx1 with N "
                "above 1, such as 4x1"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def helps(self) -> str:
        """What the zeros are good for."""
        if (self.n, self.m) == (2, 4):
            return (
                "2:4 zeros save time on NVIDIA GPUs from Ampere on, with TensorRT; elsewhere they only make the file "
                "compress better"
            )
        if self.n is not None:
            return (
                f"{self} zeros save time only where kernels for this very pattern are at hand; elsewhere they make the "
                "file compress better (2:4 is what NVIDIA GPUs accelerate)"
            )
        if self.height > 1:
            return (
                "blocks of output channels save time in runtimes with sparse kernels for CPUs, as XNNPACK's for 1x1 "
                "convolutions (heights 2 and 4); onnxruntime has none, there they only make the file compress better"
            )
        return (
            "unstructured zeros make the file compress better; they save time only in runtimes with sparse kernels, "
            "and onnxruntime has none"
        )

    def __str__(self) -> str:
        if self.height > 1:
            return f"{self.height}x1"
        return "unstructured" if self.n is None else f"{self.n}:{self.m}"


def check_sparsity(sparsity: float | None, pattern: Pattern) -> None:
    """Refuse a sparsity outside [0, 1), a missing one, and one beside an N:M pattern, which sets its own.

    Raises:
        OptionError: Saying what was received.
    """
    if pattern.n is None:
        check_share(sparsity, "weights to zero")
    elif sparsity is not None:
        raise OptionError(f"pattern {pattern} sets the sparsity itself: leave --sparsity out")


def check_share(sparsity: float | None, what: str) -> float:
    """The sparsity, if it is one.

    Raises:
        OptionError: When it is missing or outside [0, 1).
    """
    if sparsity is None:
        raise OptionError(f"the sparsity is missing: give the share of {what}, 0 <= sparsity < 1")
    if not (math.isfinite(sparsity) and 0 <= sparsity < 1):
        raise OptionError(f"sparsity {sparsity} is out of range: give the share of {what}, 0 <= sparsity < 1")
    return sparsity
