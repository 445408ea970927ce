"""Forms that can only be compared where shapes are known: axes counted from the end, padding chosen by size, views."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from onnx_asr.graph.shapes import Shape
from onnx_asr.pairing.canonical import MEAN
from onnx_asr.pairing.forms import COERCED, Form

_SAME = {b"SAME_UPPER": 0, b"SAME_LOWER": 1}


def resolved(form: Form, shape: Shape, kernel: tuple[int, ...]) -> Form:
    """A form in which nothing is left to the shape of the data.

    Args:
        form: Of a node that reads data.
        shape: Of the data.
        kernel: Of a convolution; empty elsewhere.
    """
    parameters = dict(form.parameters)
    rank = len(shape)
    if rank == 0:
        return form
    if isinstance(parameters.get(COERCED), int):
        first = parameters.pop(COERCED) % rank
        wide = [axis for axis in range(first, rank) if shape[axis] != 1]
        parameters |= {"axis": wide[0] if wide else first} if len(wide) < 2 else {COERCED: first}
    if isinstance(parameters.get("axis"), int) and form.operator[1] != "OneHot":
        parameters["axis"] %= max(rank, 1)
    if form.operator[1].startswith("Reduce"):
        parameters["axes"] = _axes(parameters, rank)
    if isinstance(parameters.get("slices"), dict):
        parameters["slices"] = _cuts(parameters["slices"], shape)
    if isinstance(parameters.get("pads"), dict):
        parameters["pads"] = {axis % rank: pads for axis, pads in parameters["pads"].items()}
    if parameters.get("auto_pad") in _SAME:
        parameters |= _pads(parameters, shape, kernel)
    if form.operator == ("", "ReduceMean") and parameters.get("axes") == list(range(2, rank)):
        flat = () if parameters.get("keepdims", 1) else ("flattened",)
        return replace(form, operator=MEAN, parameters=dict.fromkeys(flat, 1))
    return replace(form, parameters=parameters)


def _axes(parameters: dict[str, Any], rank: int) -> Any:
    axes = parameters.get("axes")
    if axes is None or axes == []:
        return [] if parameters.get("noop_with_empty_axes") else list(range(rank))
    return sorted(axis % rank for axis in axes) if isinstance(axes, list) else axes


def _cuts(slices: dict[int, tuple[int, int, int]], shape: Shape) -> dict[int, tuple[int, int, int]]:
    """Start, end and step by axis, within the size of the axis; without axes that are taken whole."""
    result = {}
    for axis, (start, end, step) in slices.items():
        size = shape[axis % len(shape)]
        if step > 0:
            start, end = (max(0, min(size, value + size * (value < 0))) for value in (start, end))
        if (start, end, step) != (0, size, 1):
            result[axis % len(shape)] = start, end, step
    return result


def _pads(parameters: dict[str, Any], shape: Shape, kernel: tuple[int, ...]) -> dict[str, Any]:
    """The padding that SAME_UPPER or SAME_LOWER choose (ONNX operator specification of Conv)."""
    kernel = kernel or tuple(parameters.get("kernel_shape") or ())
    axes = len(shape) - 2
    strides, dilations = ((parameters.get(name) or [1] * axes) for name in ("strides", "dilations"))
    if not len(kernel) == len(strides) == len(dilations) == axes or 0 in strides:
        return {}
    before, after = [], []
    for size, taps, stride, dilation in zip(shape[2:], kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (taps - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        before.append(more if _SAME[parameters["auto_pad"]] else less)
        after.append(less if _SAME[parameters["auto_pad"]] else more)
    pads = [*before, *after]
    return {"auto_pad": None, "pads": pads if any(pads) else None}


def could_agree(target: Any, other: Any) -> bool:
    """Whether two reshapes could lead to one shape, as far as their targets say."""
    if not isinstance(target, list) or not isinstance(other, list):
        return True
    known = zip(target[1:], other[1:], strict=False)  # the first may be a batch size
    return len(target) == len(other) and all(a == b or (a or -1) < 1 or (b or -1) < 1 for a, b in known)
