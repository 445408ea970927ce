"""Scores of weights, from the weights alone or from activations of the dense network on calibration samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_asr.arrays import Floats
from onnx_asr.engine.lane import Chunk
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.points import LayerPoint, weight_of
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.pair import Network, overflow
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.walk import Walk
from onnx_asr.numerics.moments import Accumulator, Moments
from onnx_asr.numerics.rows import Inputs
from onnx_asr.numerics.scores import lamp, row_normalised, saliency
from onnx_asr.pruning.options import DATA_AWARE, Score
from onnx_asr.repairing.options import RefitRecipe
from onnx_asr.repairing.rows import RowSampler, dense_rows

Values = list[Floats]


def weight_scores(
    dense: Network,
    points: Sequence[LayerPoint],
    score: Score,
    calibration: Calibration,
    execution: Execution,
    seed: int,
) -> Values:
    """Scores of the points' weights, each in its stored shape; ``seed`` as for those without data.

    Beside those of :func:`data_free_scores`:

    * activation: ``|w| rms(x_j)`` (Wanda, arXiv 2306.11695)
    * variance: ``|w| std(x_j) / sqrt(mean_i var(y_i))``, the root of the share of the layer's output variance that goes
      through the weight
    * gram: ``w^2 / [(H + R I)^-1]_jj``, ``H`` the covariance of the layer's inputs (optimal brain surgeon)

    Raises:
        ModelError: When activations are not finite.
    """
    if score not in DATA_AWARE:
        return data_free_scores(dense.index, points, score, seed)
    execution.progress("measuring the dense network", 0.0)
    if score == "gram":
        recipe = RefitRecipe(block_targets=False)
        samplers = dense_rows(dense, points, recipe, calibration, execution)
        scores = {sampler.point.node: _saliencies(dense.index, sampler, recipe) for sampler in samplers}
        return [scores[point.node] for point in points]
    magnitudes = data_free_scores(dense.index, points, "magnitude", seed)
    factors = input_factors(dense, points, score, calibration, execution)
    return [value * factor for value, factor in zip(magnitudes, factors, strict=True)]


def data_free_scores(index: GraphIndex, points: Sequence[LayerPoint], score: Score, seed: int) -> Values:
    """Scores of the points' weights, each in its stored shape; ``seed`` orders equal weights where the score does.

    * magnitude: ``|w|``
    * row: ``|w| / rms`` of its output channel
    * lamp: ``w^2`` by the sum of all larger ones in its weight
    """
    values = [weight_of(index, point) for point in points]
    if score == "lamp":
        return [lamp(value, seed) for value in values]
    if score == "row":
        pairs = zip([point.layer.layout for point in points], values, strict=True)
        return [layout.from_rows(row_normalised(layout.to_rows(value))) for layout, value in pairs]
    return [np.abs(value.astype(np.float64)) for value in values]


class WalkedScores:
    """The scores of :func:`weight_scores`, in a walk of the dense network that samples its rows as well.

    Args:
        dense: The network.
        points: Points of its weights.
        score: Which score.
        recipe: That of the rows.
        seed: As for those without data.
    """

    def __init__(
        self, dense: Network, points: Sequence[LayerPoint], score: Score, recipe: RefitRecipe, seed: int
    ) -> None:
        self._index, self._score, self._recipe = dense.index, score, recipe
        self._moments = _LayerMoments(dense.index)
        free = score if score not in DATA_AWARE else "magnitude"
        values = data_free_scores(dense.index, points, free, seed)
        self._values = {point.node: value for point, value in zip(points, values, strict=True)}

    def tensors(self, point: LayerPoint) -> Sequence[str]:
        """Whole tensors that a point's score is made of."""
        has_moments = self._score in ("activation", "variance") and point.node in self._values
        return self._moments.tensors(point) if has_moments else ()

    def add(self, points: Sequence[LayerPoint], chunk: Chunk) -> None:
        """Take the next chunk of those of some points."""
        self._moments.add([point for point in points if self.tensors(point)], chunk)

    def of(self, sampler: RowSampler) -> Floats:
        """Scores of a weight whose rows, which stay as they are, were sampled in the walk.

        Raises:
            ModelError: When activations are not finite.
        """
        point = sampler.point
        if self._score == "gram":
            return _saliencies(self._index, sampler.again(), self._recipe)
        value = self._values[point.node]
        return value * self._moments.factor(point, self._score) if self.tensors(point) else value


def input_factors(
    dense: Network, points: Sequence[LayerPoint], score: Score, calibration: Calibration, execution: Execution
) -> Values:
    """Factors of the magnitude in "activation" and "variance", in the shape of each point's weight.

    Raises:
        ModelError: When activations are not finite.
    """
    moments = _LayerMoments(dense.index)
    names = sorted({name for point in points for name in moments.tensors(point)})
    with Walk(calibration, execution) as walk:
        for (chunk,) in walk.step({walk.lane(Draft(dense.index), names): names}):
            moments.add(points, chunk)
    return [moments.factor(point, score) for point in points]


class _LayerMoments:
    """Moments of the inputs and outputs of layers, channel by channel."""

    def __init__(self, index: GraphIndex) -> None:
        self._index = index
        self._found: Accumulator[tuple[int, str], Moments] = Accumulator()

    def tensors(self, point: LayerPoint) -> tuple[str, str]:
        """A layer's input and its output."""
        return self._index.nodes[point.node].input[point.layer.data_slot], point.tensor

    def add(self, points: Sequence[LayerPoint], chunk: Chunk) -> None:
        """Take the next chunk of some layers."""
        known: dict[tuple[str, int], Moments] = {}  # several layers may read one tensor
        for point in points:
            axes = point.layer.input_axis, point.channel_axis
            for name, axis in zip(self.tensors(point), axes, strict=True):
                if (name, axis) not in known:
                    known[name, axis] = Moments.of(chunk[name], axis)
                self._found.add((point.node, name), known[name, axis])

    def factor(self, point: LayerPoint, score: Score) -> Floats:
        """The factor of a layer's magnitudes.

        Raises:
            ModelError: When activations are not finite.
        """
        source, target = (self._found[point.node, name] for name in self.tensors(point))
        if not (source.is_finite and target.is_finite):
            raise overflow(point)
        if score == "variance":
            inputs = source.std / (float(np.sqrt(target.var.mean())) or 1.0)
        else:
            inputs = np.sqrt(source.var + np.square(source.mean))
        layout = point.layer.layout
        blocks = inputs.reshape(layout.groups, 1, layout.inputs, 1)
        shape = layout.groups, layout.outputs, layout.inputs, layout.taps
        return layout.from_blocks(np.broadcast_to(blocks, shape))


def _saliencies(index: GraphIndex, sampler: RowSampler, recipe: RefitRecipe) -> Floats:
    """Scores "gram" of one weight, whose rows are used up."""
    point, layout = sampler.point, sampler.point.layer.layout
    rows = layout.to_patches(weight_of(index, point)).reshape(layout.channels, -1)  # [C_out, k I]
    score = saliency(rows, Inputs(sampler.inputs).gram(), recipe.ridge)
    if not np.isfinite(score).all():
        raise overflow(point)
    return layout.from_patches(score)
