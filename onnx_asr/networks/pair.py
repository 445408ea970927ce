"""The networks of one repair, paired and surveyed, and how the walks over them are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_asr.channels.rules import trace
from onnx_asr.channels.units import missing_units, read_kept, remove
from onnx_asr.engine.lane import Chunk
from onnx_asr.errors import ModelError
from onnx_asr.graph.index import GraphIndex, ancestors
from onnx_asr.graph.layers import Layer
from onnx_asr.graph.match import Pairing, match
from onnx_asr.graph.model_io import check_finite
from onnx_asr.graph.points import LayerPoint, Point, Survey, survey, weight_of, without_selected
from onnx_asr.networks.sparsity import LayerSparsity


@dataclass(frozen=True)
class Networks:
    """A pruned network, its correction points, and the dense one it came from, if there is one.

    Attributes:
        pruned: The pruned network.
        survey: Its correction points.
        dense: The dense network's parameters; where channels were removed, those of the channels that are left.
        pairing: What corresponds to what in ``pruned`` and ``dense``.
        whole: The dense network that is run: ``dense`` before any channel was removed.
        kept: Tensor of ``whole`` to its channel axis and the channels that are left, where some are missing.
    """

    pruned: GraphIndex
    survey: Survey
    dense: GraphIndex | None
    pairing: Pairing | None
    whole: GraphIndex | None
    kept: dict[str, tuple[int, NDArray[np.int64]]]

    @classmethod
    def of(cls, pruned: onnx.ModelProto, dense: onnx.ModelProto | None) -> Networks:
        """Index, check, survey and pair.

        Raises:
            ModelError: When a model is quantized, not finite, or has nothing to repair.
            StructureError: When the two are not the same network.
        """
        index = GraphIndex.of(pruned)
        found = survey(index) if dense is None else without_selected(index, survey(index))
        if not found.points:
            reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in found.skips[:3])
            raise ModelError(
                "the model has no Conv, ConvTranspose, Gemm, MatMul or BatchNormalization that can be repaired"
                + (f" ({reasons})" if reasons else "; give a network with constant weights")
            )
        check_finite(index, "pruned")
        if dense is None:
            return cls(index, found, None, None, None, {})
        whole = GraphIndex.of(dense)
        check_finite(whole, "dense")
        kept = read_kept(pruned)
        if kept == read_kept(dense):
            return cls(index, found, whole, match(index, whole), whole, {})
        channels = trace(whole)
        drop = missing_units(whole, channels, kept)
        left = GraphIndex.of(remove(whole, channels, drop))
        return cls(index, found, left, match(index, left), whole, channels.kept(drop))

    def dense_tensor(self, name: str) -> str:
        """The dense network's counterpart of a tensor."""
        assert self.pairing is not None
        return self.pairing.tensors[name]

    def dense_point(self, point: LayerPoint) -> LayerPoint:
        """The dense network's counterpart of a point with weights; its bias is not looked for."""
        assert self.dense is not None
        assert self.pairing is not None
        nodes = self.pairing.nodes
        layer = Layer.of(self.dense, nodes[point.node])
        assert isinstance(layer, Layer), "paired weights have the same shape"
        return replace(
            point,
            layer=layer,
            node=nodes[point.node],
            tensor=self.dense_tensor(point.tensor),
            bias=None,
            batchnorm=None if point.batchnorm is None else nodes[point.batchnorm],
        )

    @cached_property
    def sparsities(self) -> tuple[LayerSparsity, ...]:
        """Zeros in the weights of all points; those of before are the dense network's, or none where there is none."""
        found = []
        for point in self.survey.layers:
            after = weight_of(self.pruned, point)
            before = np.ones_like(after) if self.dense is None else weight_of(self.dense, self.dense_point(point))
            found.append(LayerSparsity.of(point, before, after))
        return tuple(found)

    def first_layers(self) -> set[int]:
        """Nodes with weights that no other node with weights stands before: their input is the raw data."""
        sources = {
            point.node: self.pruned.nodes[point.node].input[point.layer.data_slot] for point in self.survey.layers
        }
        return {node for node, source in sources.items() if sources.keys().isdisjoint(ancestors(self.pruned, [source]))}

    def dense_value(self, chunk: Chunk, name: str) -> NDArray[Any]:
        """A tensor of the dense lane, of the channels that are left in the pruned network."""
        if name not in self.kept:
            return chunk[name]
        axis, positions = self.kept[name]
        return chunk[name].take(positions, axis)


def overflow(point: Point) -> ModelError:
    """What to raise where the activations around a point are not finite."""
    return ModelError(
        f"activations at {point.name} are infinite, NaN or beyond 1e19 on the calibration samples: check the samples, "
        "or repair a float32 version of the model (float16 ends at 65504)"
    )


def unequal(point: Point) -> ModelError:
    """What to raise where the two networks give different numbers of results for the same samples."""
    return ModelError(
        f"the dense and the pruned model give tensors of different shapes at {point.name}: what comes before it "
        "selects by value, so the two cannot be compared place by place; use --method paired or bn"
    )


def by_level(points: Sequence[Point]) -> list[list[Point]]:
    """Points of one level, which do not depend on each other, together; lowest level first."""
    levels = sorted({point.level for point in points})
    return [[point for point in points if point.level == level] for level in levels]
