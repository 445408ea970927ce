"""Scores of weights, from the weights alone or from activations of the dense network on calibration samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_asr.arrays import Floats
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
from onnx_asr.repairing.rows import dense_rows

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
        return _saliencies(dense, points, calibration, execution)
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


def input_factors(
    dense: Network, points: Sequence[LayerPoint], score: Score, calibration: Calibration, execution: Execution
) -> Values:
    """Factors of the magnitude in "activation" and "variance", in the shape of each point's weight.

    Raises:
        ModelError: When activations are not finite.
    """
    nodes = dense.index.nodes
    sources = [(nodes[point.node].input[point.layer.data_slot], point.layer.input_axis) for point in points]
    wanted = {*sources, *((point.tensor, point.channel_axis) for point in points)}
    names = sorted({name for name, _ in wanted})
    moments: Accumulator[tuple[str, int], Moments] = Accumulator()
    with Walk(calibration, execution) as walk:
        for (chunk,) in walk.step({walk.lane(Draft(dense.index), names): names}):
            for name, axis in wanted:
                moments.add((name, axis), Moments.of(chunk[name], axis))
    factors = []
    for point, read in zip(points, sources, strict=True):
        source, target = moments[read], moments[point.tensor, point.channel_axis]
        if not (source.is_finite and target.is_finite):
            raise overflow(point)
        if score == "variance":
            inputs = source.std / (float(np.sqrt(target.var.mean())) or 1.0)
        else:
            inputs = np.sqrt(source.var + np.square(source.mean))
        layout = point.layer.layout
        blocks = inputs.reshape(layout.groups, 1, layout.inputs, 1)
        shape = layout.groups, layout.outputs, layout.inputs, layout.taps
        factors.append(layout.from_blocks(np.broadcast_to(blocks, shape)))
    return factors


def _saliencies(dense: Network, points: Sequence[LayerPoint], calibration: Calibration, execution: Execution) -> Values:
    recipe = RefitRecipe(block_targets=False)
    scores = {}
    for sampler in dense_rows(dense, points, recipe, calibration, execution):
        point, layout = sampler.point, sampler.point.layer.layout
        rows = layout.to_patches(weight_of(dense.index, point)).reshape(layout.channels, -1)  # [C_out, k I]
        score = saliency(rows, Inputs(sampler.inputs).gram(), recipe.ridge)
        if not np.isfinite(score).all():
            raise overflow(point)
        scores[point.node] = layout.from_patches(score)
    return [scores[point.node] for point in points]
