"""Rows for the refit of one point: sampled input patches and targets, collected chunk by chunk."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

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


_LEVELS_AHEAD, _BYTES_AHEAD = 4, 64 << 20
"""How far the dense network runs ahead of the pruned one: fewer passes, for sampled outputs that are held longer."""


class DenseRows:
    """Sampled outputs of the dense network at one point, chunk by chunk.

    Attributes:
        summed: Whether they have the shortcut added, to the whole map.
    """

    def __init__(self, chunks: int, store: BufferStore) -> None:
        self.summed = False
        self._values = _Rows(chunks, store)
        self._shapes: list[tuple[int, ...]] = []
        self._ends = [0]

    def __len__(self) -> int:
        return len(self._shapes)

    def add(self, shape: tuple[int, ...], values: Singles) -> None:
        """Take the next chunk's whole shape and its sampled values [rows, C]."""
        self._values.add(values)
        self._shapes.append(shape)
        self._ends.append(self._ends[-1] + len(values))

    def chunk(self, number: int) -> tuple[tuple[int, ...], Singles]:
        """A chunk's whole shape and its sampled values [rows, C]."""
        return self._shapes[number], self._values.array[self._ends[number] : self._ends[number + 1]]

    def set_aside(self) -> None:
        """Say that they are not used for a while."""
        self._values.set_aside()


class DenseCache:
    """Sampled outputs of the dense network at every point, kept for refits with the same recipe and samples.

    Args:
        store: Holds them.

    Attributes:
        rows: By node; empty before the dense network has run.
        attention: Where it is confident, if it is a detector.
    """

    def __init__(self, store: BufferStore = MEMORY) -> None:
        self.store = store
        self.rows: dict[int, DenseRows] = {}
        self.attention: Attention | None = None


class Watch(Protocol):
    """Sees whole tensors of the dense network while its rows are sampled."""

    def tensors(self, point: LayerPoint) -> Sequence[str]:
        """Those of a point."""

    def add(self, points: Sequence[LayerPoint], chunk: Chunk) -> None:
        """Take the next chunk of those of some points."""


class RowSampler:
    """Sampled rows of one point with weights.

    Args:
        pair: The networks.
        context: The point and what follows it.
        recipe: How to fit.
        calibration: The samples to come.
        number: Place among the points with weights; seeds the positions, alike in a graph and its folded version.
        resources: Keep input patches and Gram matrices, and process them.
        dense: The dense network's sampled outputs at the point: those known, or none yet.
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
        dense: DenseRows,
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
        self._drawn: tuple[tuple[int, ...], int] | None = None  # size of a map and number of maps, for the positions
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # of the maps that the table is for
        self._positions = self._table = np.empty((0, 0), np.int64)
        self._seen = 0  # chunks of the pruned network
        self._resources = resources
        self._dense = dense
        self._lasting = lasting
        self._attention = attention
        self._x: _Rows | _Unheld = _Rows(len(calibration.chunks), resources.store)
        self._target, self._floor, self._negative = (_Rows(len(calibration.chunks), MEMORY) for _ in range(3))
        self._threshold: tuple[Singles, Mask] | None = None

    def take(self, dense: Chunk) -> None:
        """Sample the dense network's next chunk."""
        output, *added = (self._pair.dense_value(dense, name) for name in self._outputs)
        rows = self._rows_of(output.shape, len(self._dense))
        values = self._picked(output, rows)
        if added and _broadcasts_to(added[0].shape, output.shape):
            values = values + self._picked(np.broadcast_to(added[0], output.shape), rows)
            self._dense.summed = True
        self._dense.add(output.shape, values)

    def add(self, pruned: Chunk) -> None:
        """Take rows from the pruned network's next chunk, which the dense network's has gone before."""
        source, *shortcut = (pruned[name] for name in self.pruned_targets)
        shape, values = self._dense.chunk(self._seen)
        rows = self._rows_of(shape, self._seen)
        chunk = self._chunk_rows(source, shape, rows)
        summed = self._dense.summed
        if self._seen == 0:
            self._threshold = self._find_threshold(summed)
            if self._lasting and 4 * math.prod(chunk.shape) * len(self._calibration.chunks) > MAX_ROW_BYTES:
                self._x = _Unheld(self._resources.store)
        self._x.sample(chunk, self._resources.workers)
        below = self._picked(np.broadcast_to(shortcut[0], shape), rows) if summed else None
        if self._threshold is not None:
            level, usable = self._threshold
            self._negative.add((values <= level) & usable)
            if below is not None:
                self._floor.add(level - below)
        self._target.add(values if below is None else values - below)
        self._dense.set_aside()
        self._seen += 1

    def _chunk_rows(self, source: Array, shape: tuple[int, ...], rows: Integers) -> ChunkRows:
        """Rows of a chunk by the layer's input, and the shape of the output."""
        layer = self.point.layer
        if not layer.is_convolution:
            if layer.input_axis == 0:
                source = source.T
            if source.size // source.shape[self.point.channel_axis] != math.prod(shape) // self.point.channels:
                raise unequal(self.point)
            return patches.MatrixRows(source, rows, transposed=self.point.channel_axis == -2)
        if len(source) != shape[0]:
            raise unequal(self.point)
        shapes = source.shape[2:], shape[2:]
        if self._shapes != shapes:
            geometry = conv_geometry(self._pair.pruned.index, self.point, *shapes)
            self._table = patches.input_positions(geometry, *shapes)
            self._shapes = shapes
        return patches.ConvRows(source, self._table, rows, layer.layout.groups)

    def _picked(self, output: Array, rows: Integers) -> Singles:
        """The given rows [R, C] of an output."""
        if self.point.layer.is_convolution:
            return patches.gather_outputs(output, rows)
        return patches.MatrixRows(output, rows, transposed=self.point.channel_axis == -2).of(output)

    def _rows_of(self, shape: tuple[int, ...], number: int) -> Integers:
        """Which rows to take of a chunk whose output has that shape: positions [N, P], or numbers [R]."""
        seen = number * self._calibration.batch_size
        samples = min(self._calibration.batch_size, self._calibration.count - seen)
        if not self.point.layer.is_convolution:
            return self._matrix_rows(math.prod(shape) // self.point.channels, seen, samples)
        # more than 1 where the model has cut its input into windows; rounded up where it mixes the samples of a batch
        images = -(-shape[0] // samples)
        maps = shape[2:], self._calibration.count * images
        if self._drawn != maps:
            count = self._recipe.rows
            if not self._lasting:
                count = min(count, max(1, MAX_ROW_BYTES // (4 * self._width)))
            if self._attention is not None and images == 1 and len(shape) == 4:
                shares = self._attention.shares(maps[1], (shape[2], shape[3]), self._recipe.detection_rows)
                self._positions = patches.weighted_positions(shares, count, self._seed)
            else:
                self._positions = patches.sample_positions(maps[1], math.prod(maps[0]), count, self._seed)
            self._drawn = maps
        first = min(seen * images, len(self._positions) - shape[0])
        return self._positions[first : first + shape[0]]

    @property
    def _width(self) -> int:
        """Values of a patch, over all groups."""
        layout = self.point.layer.layout
        return layout.groups * layout.inputs * layout.taps

    def _matrix_rows(self, height: int, seen: int, samples: int) -> Integers:
        """Which of a chunk's ``height`` rows to take: equally many per sample, where all samples have equally many."""
        size, rest = divmod(height, samples)
        if rest:
            return np.arange(height)
        table = patches.sample_positions(self._calibration.count, size, self._recipe.rows, self._seed)
        positions = table[seen : seen + samples] + size * np.arange(samples)[:, None]
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
        self.set_aside()

    def sample(self, chunk: ChunkRows, workers: Workers) -> None:
        """Take the input patches of the next chunk."""
        room = self._next(chunk.shape, np.dtype(np.float32))
        workers.run(lambda rows: chunk.take(rows, room[rows]), chunk.pieces())
        self.set_aside()

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

    def set_aside(self) -> None:
        """Say that they are not used for a while."""
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
    kept: DenseCache | None = None,
    watch: Watch | None = None,
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
        kept: Is filled, or used instead of running the dense network where it is filled already.
        watch: Sees the dense network on the way, where it is sampled alone.
    """
    items = contexts(pair.pruned.index, points)
    cache, known = kept or DenseCache(), kept is not None and bool(kept.rows)
    if draft is not None and recipe.detection_rows and not known:
        cache.attention = attention_of(pair.source, calibration, execution.sessions)
    with Walk(calibration, execution) as walk:
        samplers = {}
        for number, item in enumerate(items):
            rows = cache.rows[item.point.node] if known else DenseRows(len(calibration.chunks), cache.store)
            if kept is not None:
                cache.rows[item.point.node] = rows
            resources = walk.resources if draft is not None else replace(walk.resources, store=MEMORY)
            samplers[item] = RowSampler(
                pair,
                item,
                recipe,
                calibration,
                number,
                resources,
                rows,
                lasting=draft is not None,
                attention=cache.attention,
            )
            del rows
        schedule = [[samplers.pop(item) for item in group] for group in steps(pair.pruned.index, items)]
        own = [name for group in schedule for one in group for name in one.pruned_targets]
        sources = [one.source for group in schedule for one in group]  # once more, when they are no longer needed
        reference = [name for group in schedule for one in group for name in one.dense_targets]
        if draft is None:
            watched = [] if watch is None else [name for item in items for name in watch.tensors(item.point)]
            lane = walk.lane(Draft(pair.dense), own + reference + watched)
            while schedule:
                _sample_alone(walk, lane, schedule[0], watch)
                yield schedule.pop(0)
            return
        dense = None if known else walk.lane(Draft(pair.dense), reference)
        pruned = walk.lane(draft, own + sources)
        total, ahead = len(schedule), 0
        while schedule:
            execution.progress("refitting", 1 - len(schedule) / total)
            if dense is not None and not ahead:
                ahead = _levels_ahead(schedule, recipe)
                _sample_dense(walk, dense, [sampler for group in schedule[:ahead] for sampler in group])
            ahead -= 1
            group = schedule.pop(0)  # its rows are free once they were used
            _sample_pruned(walk, pruned, group)
            held, unheld = ([one.source for one in group if one.is_held is wanted] for wanted in (True, False))
            _let_go(walk, pruned, held)
            yield group
            _let_go(walk, pruned, unheld)


def _levels_ahead(schedule: Sequence[Sequence[RowSampler]], recipe: RefitRecipe) -> int:
    """How many of the next levels to sample in one pass of the dense network."""
    size = 0
    for number, group in enumerate(schedule[:_LEVELS_AHEAD]):
        size += sum(4 * recipe.rows * sampler.point.channels for sampler in group)
        if size > _BYTES_AHEAD and number:
            return number
    return min(_LEVELS_AHEAD, len(schedule))


def _sample_dense(walk: Walk, lane: Lane, samplers: Sequence[RowSampler]) -> None:
    for (chunk,) in walk.step({lane: [name for sampler in samplers for name in sampler.dense_targets]}):
        for sampler in samplers:
            sampler.take(chunk)


def _sample_pruned(walk: Walk, lane: Lane, samplers: Sequence[RowSampler]) -> None:
    for (chunk,) in walk.step({lane: [name for sampler in samplers for name in sampler.pruned_targets]}):
        for sampler in samplers:
            sampler.add(chunk)


def _sample_alone(walk: Walk, lane: Lane, group: Sequence[RowSampler], watch: Watch | None) -> None:
    """Rows of the dense network alone, which is the pruned one, too."""
    points = [sampler.point for sampler in group]
    names = [name for sampler in group for name in (*sampler.pruned_targets, *sampler.dense_targets)]
    names += [] if watch is None else [name for point in points for name in watch.tensors(point)]
    for (chunk,) in walk.step({lane: names}):
        for sampler in group:
            sampler.take(chunk)
            sampler.add(chunk)
        if watch is not None:
            watch.add(points, chunk)


def _let_go(walk: Walk, lane: Lane, sources: Sequence[str]) -> None:
    """Request tensors for the last time, which frees those that no later node reads."""
    for _ in walk.step({lane: sources}):
        pass


def dense_rows(
    dense: Network,
    points: Sequence[LayerPoint],
    recipe: RefitRecipe,
    calibration: Calibration,
    execution: Execution,
    watch: Watch | None = None,
) -> Iterator[RowSampler]:
    """Every point's sampler with the rows that the dense network gives it, upstream first, in one walk."""
    for group in sampled(Pair.with_itself(dense), points, None, recipe, calibration, execution.quiet, watch=watch):
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
