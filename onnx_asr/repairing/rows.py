"""Rows for the refit of one point: sampled input patches and targets, collected chunk by chunk."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

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
from onnx_asr.numerics.workers import Workers
from onnx_asr.repairing.attention import Attention, attention_of
from onnx_asr.repairing.options import FEW_ROWS, FEW_ROWS_RIDGE, RefitRecipe

MAX_ROW_BYTES = 256 << 20
"""Input patches of a layer that are held; of more rows, every pass gathers them anew from the layer's input."""

ChunkRows: TypeAlias = patches.ConvRows | patches.MatrixRows


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
        lasting: Whether the tensors that :meth:`add` is given last until the point is fitted; else patches are held,
            and no more rows taken than fit into ``MAX_ROW_BYTES``.
        attention: Where the dense network is confident, if it is a detector.

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
        lasting: bool,
        attention: Attention | None = None,
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
        self._lasting = lasting
        self._attention = attention
        self._x: _Rows | _Unheld = _Rows(len(calibration.chunks), resources.store)
        self._target, self._floor, self._negative = (_Rows(len(calibration.chunks), MEMORY) for _ in range(3))
        self._threshold: tuple[Singles, Mask] | None = None

    def add(self, dense: Chunk | None, pruned: Chunk) -> None:
        """Take rows from the next chunk; without the dense network's, those that were kept."""
        source, *shortcut = (pruned[name] for name in self.pruned_targets)
        if dense is None:
            assert self._kept is not None
            rows = self._kept[self._seen // self._calibration.batch_size]
            chunk = self._sample(source, rows.shape)
        else:
            output, *added = (self._pair.dense_value(dense, name) for name in self._outputs)
            chunk = self._sample(source, output.shape)
            summed = bool(added) and _broadcasts_to(added[0].shape, output.shape)
            values = chunk.of(output)
            if summed:
                values = values + chunk.of(np.broadcast_to(added[0], output.shape))
            rows = DenseRows(output.shape, values, summed)
            if self._kept is not None:
                self._kept.append(rows)
        if self._seen == 0:
            self._threshold = self._find_threshold(rows.summed)
            if self._lasting and 4 * math.prod(chunk.shape) * len(self._calibration.chunks) > MAX_ROW_BYTES:
                self._x = _Unheld(self._resources.store)
        self._x.sample(chunk, self._resources.workers)
        below = chunk.of(np.broadcast_to(shortcut[0], rows.shape)) if rows.summed else None
        if self._threshold is not None:
            level, usable = self._threshold
            self._negative.add((rows.values <= level) & usable)
            if below is not None:
                self._floor.add(level - below)
        self._target.add(rows.values if below is None else rows.values - below)
        self._seen += self._calibration.batch_size

    def _sample(self, source: Array, shape: tuple[int, ...]) -> ChunkRows:
        """The rows of the chunk whose output has that shape."""
        samples, layer = min(self._calibration.batch_size, self._calibration.count - self._seen), self.point.layer
        if not layer.is_convolution:
            if layer.input_axis == 0:
                source = source.T
            height = math.prod(shape) // self.point.channels
            if source.size // source.shape[self.point.channel_axis] != height:
                raise unequal(self.point)
            rows = self._matrix_positions(height, samples)
            return patches.MatrixRows(source, rows, transposed=self.point.channel_axis == -2)
        if len(source) != shape[0]:
            raise unequal(self.point)
        # more than 1 where the model has cut its input into windows; rounded up where it mixes the samples of a batch
        images = -(-len(source) // samples)
        shapes = source.shape[2:], shape[2:]
        if self._shapes != shapes:
            geometry = conv_geometry(self._pair.pruned.index, self.point, *shapes)
            count = self._recipe.rows
            if not self._lasting:
                width = source.shape[1] * math.prod(geometry.kernel)
                count = min(count, max(1, MAX_ROW_BYTES // (4 * width)))
            total = self._calibration.count * images
            if self._attention is not None and images == 1 and len(shape) == 4:
                weight = self._recipe.detection_rows
                shares = self._attention.shares(total, (shape[2], shape[3]), weight)
                self._positions = patches.weighted_positions(shares, count, self._seed)
            else:
                self._positions = patches.sample_positions(total, math.prod(shape[2:]), count, self._seed)
            self._table = patches.input_positions(geometry, *shapes)
            self._shapes = shapes
        first = min(self._seen * images, len(self._positions) - len(source))
        positions = self._positions[first : first + len(source)]
        return patches.ConvRows(source, self._table, positions, layer.layout.groups)

    def _matrix_positions(self, height: int, samples: int) -> Integers:
        """Which of a chunk's ``height`` rows to take: equally many per sample, where all samples have equally many."""
        size, rest = divmod(height, samples)
        if rest:
            return np.arange(height)
        table = patches.sample_positions(self._calibration.count, size, self._recipe.rows, self._seed)
        positions = table[self._seen : self._seen + samples] + size * np.arange(samples)[:, None]
        return positions.ravel()

    @property
    def source(self) -> str:
        """The tensor of the pruned network that the patches come from."""
        return self.pruned_targets[0]

    @property
    def is_held(self) -> bool:
        """Whether the patches are held, so that their source need not last."""
        return isinstance(self._x, _Rows)

    @property
    def inputs(self) -> Singles:
        """The input patches that are held, [rows, groups, taps * C / groups]."""
        assert isinstance(self._x, _Rows)
        return self._x.array

    def again(self) -> RowSampler:
        """The same with a copy of the rows, for one more solution: :meth:`refit` uses the rows up."""
        assert isinstance(self._x, _Rows)
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
        x, floor, negative = self._x.array if isinstance(self._x, _Rows) else self._x, None, None
        count, _, width = x.shape
        if self._threshold is not None:
            negative = self._negative.array
            level, _ = self._threshold
            floor = np.broadcast_to(level, negative.shape) if self._floor.is_empty else self._floor.array
        ridge = max(recipe.ridge, FEW_ROWS_RIDGE) if count < FEW_ROWS else recipe.ridge
        one_each = layout.groups == 1 and count == self._calibration.count
        return LayerRefit(
            x,
            self._target.array,
            layout.to_patches(layout.from_rows(self._pair.dense_rows(self.point))),  # held by nobody else
            layout.to_patches(draft.weight(self.point) != 0),
            RefitOptions(ridge, recipe.relu_steps, recipe.gain_power, class_steps=recipe.class_steps),
            relu_floor=floor,
            dense_negative=negative,
            classes=self._context.classes and one_each and count > width,  # fewer rows are met as they are
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
        """Take the rows of the next chunk."""
        self._next(part.shape, part.dtype)[...] = part
        self._added()

    def sample(self, chunk: ChunkRows, workers: Workers) -> None:
        """Take the input patches of the next chunk."""
        room = self._next(chunk.shape, np.dtype(np.float32))
        workers.run(lambda rows: chunk.take(rows, room[rows]), chunk.pieces())
        self._added()

    def _next(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Room for more rows; only where samples differ in size may there be more than in the first chunk."""
        begin, self._filled = self._filled, self._filled + shape[0]
        if self._all is None:
            self._all = self._store.allocate((self._chunks * shape[0], *shape[1:]), dtype)
        elif self._filled > len(self._all):
            larger = self._store.allocate((len(self._all) + self._filled, *shape[1:]), dtype)
            larger[:begin] = self._all[:begin]
            self.release()
            self._all = larger
        return self._all[begin : self._filled]

    def _added(self) -> None:
        assert self._all is not None
        self._store.set_aside(self._all)

    def copy(self) -> _Rows:
        """The same rows, to be changed."""
        other = copy(self)
        other._all = self._store.allocate(self.array.shape, self.array.dtype)
        other._all[...] = self.array
        return other

    def release(self) -> None:
        """Let go of them."""
        if self._all is not None:
            self._store.release(self._all)
            self._all = None


class _Unheld:
    """Input patches of all chunks that are gathered anew whenever they are taken."""

    def __init__(self, store: BufferStore) -> None:
        self._store = store
        self._chunks: list[ChunkRows] = []
        self._begins = [0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of all of them: [rows, groups, taps * C / groups]."""
        return self._begins[-1], *self._chunks[0].shape[1:]

    def sample(self, chunk: ChunkRows, workers: Workers) -> None:
        """Remember the next chunk."""
        self._chunks.append(chunk)
        self._begins.append(self._begins[-1] + chunk.shape[0])

    def take(self, rows: slice) -> Singles:
        """A new array with some of the rows."""
        result = np.empty((rows.stop - rows.start, *self.shape[1:]), np.float32)
        number, begin = bisect_right(self._begins, rows.start) - 1, rows.start
        while begin < rows.stop:
            chunk, first = self._chunks[number], self._begins[number]
            number += 1
            end = min(rows.stop, self._begins[number])
            chunk.take(slice(begin - first, end - first), result[begin - rows.start : end - rows.start])
            self._store.set_aside(chunk.source)
            begin = end
        return result

    def release(self) -> None:
        """Forget them."""
        self._chunks.clear()


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
    attention = None
    if draft is not None and recipe.detection_rows:
        attention = attention_of(pair.source, calibration, execution.sessions)
    with Walk(calibration, execution) as walk:
        samplers = {}
        for number, item in enumerate(items):
            rows = None if kept is None else kept.setdefault(item.point.node, [])
            resources = walk.resources if draft is not None else replace(walk.resources, store=MEMORY)
            samplers[item] = RowSampler(
                pair, item, recipe, calibration, number, resources, rows, lasting=draft is not None, attention=attention
            )
        schedule = [[samplers.pop(item) for item in group] for group in steps(pair.pruned.index, items)]
        own = [name for group in schedule for one in group for name in one.pruned_targets]
        sources = [one.source for group in schedule for one in group]  # once more, when they are no longer needed
        reference = [name for group in schedule for one in group for name in one.dense_targets]
        dense = None if known else walk.lane(Draft(pair.dense), reference if draft is not None else own + reference)
        pruned = dense if draft is None else walk.lane(draft, own + sources)
        assert pruned is not None
        for number in range(len(schedule)):
            execution.progress("refitting", number / len(schedule))
            group, schedule[number] = schedule[number], []  # its rows are free once they were used
            _take_rows(walk, group, pruned, dense)
            if draft is None:
                yield group
                continue
            held, unheld = ([one.source for one in group if one.is_held is wanted] for wanted in (True, False))
            _let_go(walk, pruned, held)
            yield group
            _let_go(walk, pruned, unheld)


def _let_go(walk: Walk, lane: Lane, sources: Sequence[str]) -> None:
    """Request tensors for the last time, which frees those that no later node reads."""
    for _ in walk.step({lane: sources}):
        pass


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
