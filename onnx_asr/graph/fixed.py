"""Fixed operators: layers whose weights are a formula that somebody wrote down, and that no training changed.

Exporters spell many of them as convolutions or matrix products. They are told from trained layers by equalities that
hold to the last bits, or to those of a rounded formula, and that trained weights do not meet by chance:

* an arithmetic progression behind a Softmax: the mean of a distribution (YOLOv8's DFL, soft-argmax)
* single ones: identity, permutation, unfolding
* one scale for each channel of the model's input: its normalisation
* the luma coefficients of a colour space, or the inverse of such a matrix
* filters of one channel each, the same for all channels, that equal their mirror image, or its negative, or are small
  multiples of one number: averages, Gaussian blur, bilinear upsampling, Sobel, Laplace, Haar
* a basis of the discrete cosine transform

Equal weights alone do not tell: binary networks have them everywhere, and so does a layer of constants that combines
channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_asr.arrays import Array, Floats, Integers
from onnx_asr.graph.index import GraphIndex, ancestors, is_standard
from onnx_asr.graph.points import LayerPoint, NormPoint, Point, Survey, skip, weight_of
from onnx_asr.graph.skips import Reason

FIXED = Reason("fixed-operator", "its weights are {what}, which no training changed")

_FEW = 4  # weights below which equalities may be a coincidence, in float16 at least
_LARGE = 1 << 16  # weights from which a look at the first channels comes first
_LARGEST_MULTIPLE = 64  # in a filter of whole numbers; a Gaussian of 5 x 5 has 41
_LARGEST_BASIS = 256
_IMAGE_CHANNELS = 4

_SHAPING = (
    "Identity", "Cast", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "Split", "Slice",
    "Concat", "QuantizeLinear", "DequantizeLinear",
)  # fmt: skip
_PREPARING = (*_SHAPING, "Add", "Sub", "Mul", "Div", "Clip", "Gather", "Pad", "Resize", "Constant")

_LUMA = np.array([
    [0.299, 0.587, 0.114],  # BT.601
    [66 / 220, 129 / 220, 25 / 220],  # the same in whole numbers
    [0.2126, 0.7152, 0.0722],  # BT.709
    [0.2627, 0.6780, 0.0593],  # BT.2020
    [0.25, 0.5, 0.25],  # YCoCg
    [1 / 3, 1 / 3, 1 / 3],
])  # fmt: skip
_LUMA_ROUNDING = 2e-3  # they are often written with three digits


def without_fixed(index: GraphIndex, found: Survey, fixed: Callable[[LayerPoint], Reason | None]) -> Survey:
    """A survey whose fixed operators are skips; a BatchNormalization behind one is a point of its own.

    Args:
        index: The graph.
        found: Its points.
        fixed: Why a layer is a fixed operator, or None where it is none.
    """
    points: list[Point] = []
    skips = list(found.skips)
    for point in found.points:
        reason = fixed(point) if isinstance(point, LayerPoint) else None
        if reason is None:
            points.append(point)
            continue
        skips.append(skip(point, reason))
        if (norm := point.batchnorm) is not None:
            place = {"node": norm, "name": index.label(norm), "tensor": index.nodes[norm].input[0]}
            points.append(NormPoint(**place, level=point.level, channels=point.channels))
    return Survey(tuple(points), tuple(sorted(skips, key=lambda item: item.node)))


def fixed_by_own_weights(index: GraphIndex) -> Callable[[LayerPoint], Reason | None]:
    """Tells fixed operators by the weights in their own graph, for :func:`without_fixed`."""
    return lambda point: fixed_operator(index, point, weight_of(index, point))


def fixed_operator(index: GraphIndex, point: LayerPoint, weight: Array) -> Reason | None:
    """Why a layer is a fixed operator, or None where training may have changed it.

    Args:
        index: The graph around it.
        point: The layer.
        weight: Its weight as stored, or that of its counterpart in the dense network.
    """
    if weight.size > _LARGE and not _may_be_links(weight):
        return None
    source = index.nodes[point.node].input[point.layer.data_slot]
    blocks, kernel = point.layer.layout.to_blocks(weight).astype(np.float64), weight.shape[2:]
    tolerance = 2e-3 if weight.dtype.itemsize == 2 else 1e-5
    groups, outputs, inputs, taps = blocks.shape
    if not np.isfinite(blocks).all():
        return None
    what = None
    if groups == 1 and taps == 1:
        matrix = blocks[0, :, :, 0]
        if inputs == 3 and _converts_colours(matrix) and (outputs == 3 or _reads_input(index, source)):
            what = "a conversion between colour spaces"
        elif all(_is_progression(row, tolerance) for row in matrix) and _follows_softmax(index, source):
            what = "equal steps behind a Softmax, the mean of a distribution"
        elif _is_cosine_basis(matrix, (inputs,)) or (outputs == inputs and _is_cosine_basis(matrix.T, (inputs,))):
            what = "a discrete cosine transform"
    links = _Links.of(blocks)
    if what is None and links is not None:
        if links.copies:
            what = "single ones, which copy what it reads"
        elif links.scales(_IMAGE_CHANNELS) and _reads_input(index, source):
            what = "a scale for each channel of the model's input"
        elif links.filters_alike(kernel):
            what = "filters made by a formula, the same for every channel"
    return None if what is None else FIXED.format(what=what)


def _may_be_links(weight: Array) -> bool:
    """Whether the first row or column of a weight as stored has no more than one kernel that is not zero."""
    lines = weight[0], weight[:, 0]
    return any(np.count_nonzero(line.reshape(len(line), -1).any(axis=1)) < 2 for line in lines)


@dataclass(frozen=True)
class _Links:
    """The kernels of a weight that are not zero, where each output has one input, or each input one output.

    Attributes:
        channel: The only input of each kernel's output, or the only output of its input, counted over all groups.
        other: The output, or the input.
        kernels: [links, taps], by ``channel``, then by ``other``.
        forward: Whether each output has one input.
    """

    channel: Integers
    other: Integers
    kernels: Floats
    forward: bool

    @classmethod
    def of(cls, blocks: Floats) -> _Links | None:
        _, outputs, inputs, _ = blocks.shape
        used = blocks.any(axis=3)
        group, output, entry = np.nonzero(used)
        kernels = blocks[used]
        made, read = group * outputs + output, group * inputs + entry
        forward = (used.sum(axis=2) == 1).all()
        if not forward and not (used.sum(axis=1) == 1).all():
            return None
        channel, other = (read, made) if forward else (made, read)
        order = np.lexsort((other, channel))
        return cls(channel[order], other[order], kernels[order], bool(forward))

    @property
    def copies(self) -> bool:
        """Whether every kernel is a single 1, and none adds to another."""
        single = ((self.kernels != 0).sum(axis=1) == 1) & (self.kernels.max(axis=1) == 1)
        places = np.column_stack([self.channel, self.kernels.argmax(axis=1)])
        return bool(single.all()) and (self.forward or len(np.unique(places, axis=0)) == len(places))

    def scales(self, channels: int) -> bool:
        """Whether it multiplies each of a few channels with a number."""
        return self.kernels.shape[1] == 1 and len(self.channel) <= channels and np.array_equal(self.channel, self.other)

    def filters_alike(self, shape: Sequence[int]) -> bool:
        """Whether all channels have the same kernels, of this shape, that are different and made by a formula."""
        _, counts = np.unique(self.channel, return_counts=True)
        if (counts != counts[0]).any() or self.kernels.size < _FEW:
            return False
        banks = self.kernels.reshape(len(counts), -1, *shape)
        bank, taps = banks[0], self.kernels.shape[1]
        if (banks != bank).any() or len(np.unique(bank, axis=0)) < len(bank):
            return False
        if taps == 1:
            return len(bank) == 1 and len(counts) >= _FEW
        if _is_cosine_basis(bank.reshape(len(bank), taps), shape):
            return True
        if len(counts) == 1:
            return taps >= _FEW and all(map(_is_mirrored, bank))
        return all(_is_mirrored(one) or _is_whole(one) for one in bank)


def _is_mirrored(kernel: Floats) -> bool:
    """Whether a kernel turned by half a turn is itself, or its negative."""
    turned = np.flip(kernel)
    return np.array_equal(turned, kernel) or np.array_equal(turned, -kernel)


def _is_whole(kernel: Floats) -> bool:
    """Whether a kernel is a small multiple of whole numbers."""
    multiples = kernel / np.abs(kernel[kernel != 0]).min()
    return bool(np.abs(multiples).max() <= _LARGEST_MULTIPLE and np.allclose(multiples, multiples.round(), atol=1e-5))


def _is_progression(row: Floats, tolerance: float) -> bool:
    """Whether numbers take equal steps; each may be repeated, and the whole as well (coordinates of a grid)."""
    close = tolerance * float(np.abs(row).max())
    repeats = int(np.argmax(np.abs(row - row[0]) > close)) or len(row)
    steps = row[::repeats]
    again = np.flatnonzero(np.abs(steps[1:] - steps[0]) <= close)
    period = int(again[0]) + 1 if again.size else len(steps)
    if period < _FEW or repeats * period * (len(steps) // period) != len(row):
        return False
    line = np.linspace(steps[0], steps[period - 1], period)
    return np.allclose(row, np.tile(np.repeat(line, repeats), len(steps) // period), rtol=0, atol=close)


def _converts_colours(matrix: Floats) -> bool:
    """Whether a matrix [3, 3] makes luma and two differences, or undoes that; or [1, 3] makes luma."""
    if len(matrix) == 1:
        return _is_luma(matrix[0])
    if len(matrix) != 3 or not np.linalg.cond(matrix) < 1e3:
        return False
    for candidate in (matrix, np.linalg.inv(matrix)):
        luma = [_is_luma(row) for row in candidate]
        others = candidate[np.logical_not(luma)]
        if sum(luma) == 1 and (np.abs(others.sum(axis=1)) <= 5e-3 * np.abs(others).max(axis=1)).all():
            return True
    return False


def _is_luma(row: Floats) -> bool:
    known = np.concatenate([_LUMA, _LUMA[:, ::-1]])
    return bool((np.abs(row - known * row.sum()).max(axis=1) <= _LUMA_ROUNDING * abs(row.sum())).any())


def _is_cosine_basis(rows: Floats, shape: Sequence[int]) -> bool:
    """Whether rows are different functions of the discrete cosine transform (DCT-II) on a grid of this shape."""
    taps = math.prod(shape)
    if not _FEW <= taps <= _LARGEST_BASIS or not 2 <= len(rows) <= taps:
        return False
    basis: Array = np.ones((1, 1))
    for size in shape:
        basis = np.kron(basis, _cosines(size))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not lengths.all():
        return False
    likeness = np.abs(rows / lengths @ basis.T)
    return bool((likeness.max(axis=1) > 1 - 1e-5).all()) and len(set(likeness.argmax(axis=1).tolist())) == len(rows)


def _cosines(count: int) -> Floats:
    """The functions of the discrete cosine transform of a length, as rows of norm 1."""
    steps = np.arange(count)
    rows = np.cos(np.pi * np.outer(steps, steps + 0.5) / count)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _follows_softmax(index: GraphIndex, name: str) -> bool:
    """Whether a tensor is a Softmax, perhaps in another shape."""
    while (position := index.made_by(name, *_SHAPING)) is not None:
        name = index.nodes[position].input[0]
    return index.made_by(name, "Softmax") is not None


def _reads_input(index: GraphIndex, name: str) -> bool:
    """Whether a tensor is an input of the graph, prepared by nothing but simple operations."""
    before = [index.nodes[position] for position in ancestors(index, [name])]
    inputs = {value.name for value in index.inputs}
    return all(is_standard(node, *_PREPARING) for node in before) and (
        name in inputs or any(not inputs.isdisjoint(node.input) for node in before)
    )
