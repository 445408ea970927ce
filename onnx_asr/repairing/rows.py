"""Rows for the refit of one point: sampled input patches and targets, collected chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from onnx_asr.arrays import Array, Integers, Mask, Singles
from onnx_asr.engine.lane import Chunk, Lane
from onnx_asr.graph.context import Context, contexts, steps
from onnx_asr.graph.index import GraphIndex, attribute
from onnx_asr.graph.points import LayerPoint, Point
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import Network, Pair, unequal
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.walk import Walk
from onnx_asr.numerics import patches
from onnx_asr.numerics.refit import LayerRefit, RefitOptions
from onnx_asr.numerics.rows import MEMORY, BufferStore, Resources
from onnx_asr.repairing.options import FEW_ROWS, FEW_ROWS_RIDGE, RefitRecipe

MAX_ROW_BYTES = 256 << 20


@dataclass(frozen=True)
class DenseRows:
    """Sampled outputs of the dense network at one point, for one chunk of samples.

    Attributes:
        shape: Of the whole output.
        values: [rows, C], with the shortcut where one is added to the whole map.
        summed: Whether a shortcut was added.
    """

    shape: tuple[int, ...]
    values: Singles
    summed: bool


class RowSampler:
    """Sampled rows of one point with weights.

    Args:
        pair: The networks.
        context: The point and what follows it.
        recipe: How to fit.
        calibration: The samples to come.
        number: Place among the points with weights; seeds the positions, alike in a graph and its folded version.
        resources: Keep input patches and Gram matrices, and process them.
        kept: Cache of the dense network's sampled outputs: filled, or used by :meth:`add` without them; None for none.

    Attributes:
        point: The point.
        pruned_targets: Tensors of the pruned network that it reads.
        dense_targets: Tensors of the dense network that it reads.
    """

    def __init__(
        self,
        pair: Pair,
        context: Context,
        recipe: RefitRecipe,
        calibration: Calibration,
        number: int,
        resources: Resources,
        kept: list[DenseRows] | None,
    ) -> None:
        self.point = context.point
        shortcut = [context.shortcut] if context.shortcut is not None and recipe.block_targets else []
        self.pruned_targets = [context.source, *shortcut]
        self._outputs = [context.output, *shortcut]
        self.dense_targets = [pair.dense_tensor(name) for name in self._outputs]
        self._pair = pair
        self._context = context
        self._recipe = recipe
        self._calibration = calibration
        self._seed = recipe.seed, number
        self._seen = 0
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # of the maps that the next two are for
        self._positions = self._table = np.empty((0, 0), np.int64)
        self._resources = resources
        self._kept = kept
        self._x = _Rows(len(calibration.chunks), resources.store)
        self._target, self._floor, self._negative = (_Rows(len(calibration.chunks), MEMORY) for _ in range(3))
        self._threshold: tuple[Singles, Mask] | None = None

    def add(self, dense: Chunk | None, pruned: Chunk) -> None:
        """Take rows from the next chunk; without the dense network's, those that were kept."""
        source, *shortcut = (pruned[name] for name in self.pruned_targets)
        if dense is None:
            assert self._kept is not None
            rows = self._kept[self._seen // self._calibration.batch_size]
            x, pick = self._sample(source, rows.shape)
        else:
            output, *added = (self._pair.dense_value(dense, name) for name in self._outputs)
            x, pick = self._sample(source, output.shape)
            summed = bool(added) and _broadcasts_to(added[0].shape, output.shape)
            values = pick(output) + pick(np.broadcast_to(added[0], output.shape)) if summed else pick(output)
            rows = DenseRows(output.shape, values, summed)
            if self._kept is not None:
                self._kept.append(rows)
        if self._seen == 0:
            self._threshold = self._find_threshold(rows.summed)
        self._x.add(x)
        below = pick(np.broadcast_to(shortcut[0], rows.shape)) if rows.summed else None
        if self._threshold is not None:
            level, usable = self._threshold
            self._negative.add((rows.values <= level) & usable)
            if below is not None:
                self._floor.add(level - below)
        self._target.add(rows.values if below is None else rows.values - below)
        self._seen += self._calibration.batch_size

    def _sample(self, source: Array, shape: tuple[int, ...]) -> tuple[Singles, Callable[[Array], Singles]]:
        """The chunk's input patches [rows, groups, K], and what takes the same rows [rows, C] of an output."""
        samples, layer = min(self._calibration.batch_size, self._calibration.count - self._seen), self.point.layer
        if not layer.is_convolution:
            if layer.input_axis == 0:
                source = source.T
            height = math.prod(shape) // self.point.channels
            if source.size // source.shape[self.point.channel_axis] != height:
                raise unequal(self.point)
            rows = self._matrix_positions(height, samples)
            return self._matrix_rows(source, rows)[:, None, :], lambda tensor: self._matrix_rows(tensor, rows)
        if len(source) != shape[0]:
            raise unequal(self.point)
        # more than 1 where the model has cut its input into windows; rounded up where it mixes the samples of a batch
        images = -(-len(source) // samples)
        shapes = source.shape[2:], shape[2:]
        if self._shapes != shapes:
            geometry = conv_geometry(self._pair.pruned.index, self.point, *shapes)
            width = source.shape[1] * math.prod(geometry.kernel)
            count = min(self._recipe.rows, max(1, MAX_ROW_BYTES // (4 * width)))
            total = self._calibration.count * images
            self._positions = patches.sample_positions(total, math.prod(shape[2:]), count, self._seed)
            self._table = patches.input_positions(geometry, *shapes)
            self._shapes = shapes
        first = min(self._seen * images, len(self._positions) - len(source))
        positions = self._positions[first : first + len(source)]
        x = patches.gather_patches(source, self._table, positions, layer.layout.groups)
        return x, lambda tensor: patches.gather_outputs(tensor, positions)

    def _matrix_positions(self, height: int, samples: int) -> Integers:
        """Which of a chunk's ``height`` rows to take: equally many per sample, where all samples have equally many."""
        size, rest = divmod(height, samples)
        if rest:
            return np.arange(height)
        table = patches.sample_positions(self._calibration.count, size, self._recipe.rows, self._seed)
        positions = table[self._seen : self._seen + samples] + size * np.arange(samples)[:, None]
        return positions.ravel()

    def _matrix_rows(self, tensor: Array, rows: Integers) -> Singles:
        if self.point.channel_axis == -2:
            tensor = np.swapaxes(tensor, -1, -2)
        return tensor.reshape(-1, tensor.shape[-1])[rows].astype(np.float32, copy=False)

    @property
    def inputs(self) -> Singles:
        """The input patches collected, [rows, groups, taps * C / groups]."""
        return self._x.array

    def again(self) -> RowSampler:
        """The same with a copy of the rows, for one more solution: :meth:`refit` uses the rows up."""
        other = copy(self)
        other._x = self._x.copy()
        return other

    def refit(self, draft: Draft) -> LayerRefit:
        """The fit of the surviving weights, as patches [G, M, K], to the rows; these are used up.

        ``alpha`` and the BatchNormalization behind the point are folded into the weights.

        Args:
            draft: The network's parameters so far; zeros of the weights there stay zeros.

        Raises:
            NotFiniteError: Here or in the refit, when activations are not finite.
        """
        layout, recipe = self.point.layer.layout, self._recipe
        x, floor, negative = self._x.array, None, None
        if self._threshold is not None:
            negative = self._negative.array
            level, _ = self._threshold
            floor = np.broadcast_to(level, negative.shape) if self._floor.is_empty else self._floor.array
        ridge = max(recipe.ridge, FEW_ROWS_RIDGE) if len(x) < FEW_ROWS else recipe.ridge
        one_each = layout.groups == 1 and len(x) == self._calibration.count
        return LayerRefit(
            x,
            self._target.array,
            layout.to_patches(layout.from_rows(self._pair.dense_rows(self.point))),  # held by nobody else
            layout.to_patches(draft.weight(self.point) != 0),
            RefitOptions(ridge, recipe.relu_steps, recipe.gain_power, class_steps=recipe.class_steps),
            relu_floor=floor,
            dense_negative=negative,
            classes=self._context.classes and one_each and len(x) > x.shape[2],  # fewer rows are met as they are
            resources=self._resources,
        )

    def release(self) -> None:
        """Give the input patches back to the store."""
        self._x.release()

    def _find_threshold(self, summed: bool) -> tuple[Singles, Mask] | None:
        """Values [C] up to which the ReLU hides the dense pre-activation, and the channels [C] that have one.

        None where no ReLU hides anything. ``summed`` says whether the shortcut is added to the output place by place,
        as the first chunk shows. If the output is one value per channel, added to a whole map, then what follows the
        sum has no position for a row.
        """
        context = self._context
        if not (context.relu and self._recipe.relu_steps) or (len(self.pruned_targets) > 1 and not summed):
            return None
        threshold = np.zeros(self.point.channels)
        usable = np.ones(self.point.channels, bool)
        if context.batchnorm is not None:
            between = self._pair.dense_batchnorm(context.batchnorm)
            usable = between.slope > 0
            crossing = between.mean - between.bias / np.where(usable, between.slope, 1.0)
            threshold = np.where(usable, crossing, 0.0)
        return threshold.astype(np.float32), usable


class _Rows:
    """Rows of all chunks, in one array of the final size: joining parts at the end would need it twice."""

    def __init__(self, chunks: int, store: BufferStore) -> None:
        self._chunks = chunks
        self._store = store
        self._all: Array | None = None
        self._filled = 0

    @property
    def is_empty(self) -> bool:
        """Whether there are none."""
        return self._all is None

    @property
    def array(self) -> Array:
        """The rows so far."""
        assert self._all is not None
        return self._all[: self._filled]

    def add(self, part: Array) -> None:
        """Take the rows of the next chunk; only where samples differ in size may there be more than in the first."""
        needed = self._filled + len(part)
        if self._all is None:
            self._all = self._room(self._chunks * len(part), part)
        elif needed > len(self._all):
            larger = self._room(len(self._all) + needed, part)
            larger[: self._filled] = self.array
            self.release()
            self._all = larger
        self._all[self._filled : needed] = part
        self._store.set_aside(self._all)
        self._filled = needed

    def _room(self, rows: int, like: Array) -> Array:
        return self._store.allocate((rows, *like.shape[1:]), like.dtype)

    def copy(self) -> _Rows:
        """The same rows, to be changed."""
        other = copy(self)
        other._all = self._room(self._filled, self.array)
        other._all[...] = self.array
        return other

    def release(self) -> None:
        """Let go of them."""
        if self._all is not None:
            self._store.release(self._all)
            self._all = None


def _broadcasts_to(shape: tuple[int, ...], over: tuple[int, ...]) -> bool:
    """Whether broadcasting makes one shape the other; where the two cannot be added, onnxruntime says so at the sum."""
    try:
        return np.broadcast_shapes(shape, over) == over
    except ValueError:
        return False


def sampled(
    pair: Pair,
    points: Sequence[Point],
    draft: Draft | None,
    recipe: RefitRecipe,
    calibration: Calibration,
    execution: Execution,
    kept: dict[int, list[DenseRows]] | None = None,
) -> Iterator[list[RowSampler]]:
    """Every point's sampler with its rows, upstream first, in groups of points that do not depend on each other.

    Args:
        pair: The networks.
        points: Points; those without weights are ignored.
        draft: The pruned network's parameters: what is set in them counts from the next group on. None to sample the
            dense network alone, as it is.
        recipe: Number of rows, and whether shortcuts that are added to an output are sampled.
        calibration: The samples.
        execution: How to run.
        kept: The samplers' caches by node: empty = fill them; filled = use them and do not run the dense network.
    """
    items = contexts(pair.pruned.index, points)
    known = bool(kept)
    with Walk(calibration, execution) as walk:
        samplers = {}
        for number, item in enumerate(items):
            rows = None if kept is None else kept.setdefault(item.point.node, [])
            resources = walk.resources if draft is not None else replace(walk.resources, store=MEMORY)
            samplers[item] = RowSampler(pair, item, recipe, calibration, number, resources, rows)
        schedule = [[samplers.pop(item) for item in group] for group in steps(pair.pruned.index, items)]
        own = [name for group in schedule for one in group for name in one.pruned_targets]
        reference = [name for group in schedule for one in group for name in one.dense_targets]
        dense = None if known else walk.lane(Draft(pair.dense), reference if draft is not None else own + reference)
        pruned = dense if draft is None else walk.lane(draft, own)
        assert pruned is not None
        for number in range(len(schedule)):
            execution.progress("refitting", number / len(schedule))
            group, schedule[number] = schedule[number], []  # its rows are free once they were used
            _take_rows(walk, group, pruned, dense)
            yield group


def _take_rows(walk: Walk, group: Sequence[RowSampler], pruned: Lane, dense: Lane | None) -> None:
    targets: dict[Lane, list[str]] = {pruned: [name for sampler in group for name in sampler.pruned_targets]}
    if dense is not None:  # it may be the same lane
        targets.setdefault(dense, []).extend(name for sampler in group for name in sampler.dense_targets)
    for chunks in walk.step(targets):
        for sampler in group:
            sampler.add(None if dense is None else chunks[-1], chunks[0])


def dense_rows(
    dense: Network, points: Sequence[LayerPoint], recipe: RefitRecipe, calibration: Calibration, execution: Execution
) -> Iterator[RowSampler]:
    """Every point's sampler with the rows that the dense network gives it, upstream first, in one walk."""
    for group in sampled(Pair.with_itself(dense), points, None, recipe, calibration, execution.quiet):
        yield from group


def conv_geometry(
    index: GraphIndex, point: LayerPoint, input_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> patches.ConvGeometry:
    """Kernel, strides, dilations, groups and leading pads of a Conv or ConvTranspose (ONNX defaults filled in)."""
    node, layout, transposed = index.nodes[point.node], point.layer.layout, point.layer.is_transposed
    kernel = layout.shape[2:]
    axes = len(kernel)
    strides = tuple(attribute(node, "strides", [1] * axes))
    dilations = tuple(attribute(node, "dilations", [1] * axes))
    pads = tuple(attribute(node, "pads", [0] * (2 * axes)))[:axes]
    mode = attribute(node, "auto_pad", b"NOTSET").decode()
    if mode == "VALID":
        pads = (0,) * axes
    elif mode != "NOTSET" or (transposed and attribute(node, "output_shape", None)):
        small, large, extra, larger_first = output_shape, input_shape, [0] * axes, mode == "SAME_LOWER"
        if transposed:
            small, large, larger_first = input_shape, output_shape, mode != "SAME_UPPER"
            extra = attribute(node, "output_padding", extra)
        spans = [(small[a] - 1) * strides[a] + extra[a] + (kernel[a] - 1) * dilations[a] + 1 for a in range(axes)]
        totals = [max(span - size, 0) for span, size in zip(spans, large, strict=True)]
        pads = tuple(total - total // 2 if larger_first else total // 2 for total in totals)
    return patches.ConvGeometry(kernel, strides, dilations, pads, layout.groups, transposed)
