"""A network, and the pair of a pruned network and the dense one that it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx

from onnx_asr.arrays import Array, Floats, Mask
from onnx_asr.channels.rules import trace
from onnx_asr.channels.units import KEPT_CHANNELS, Channels, missing_units, read_kept, read_shapes, remove
from onnx_asr.data import InputSpec
from onnx_asr.engine.lane import Chunk
from onnx_asr.errors import ModelError, StructureError
from onnx_asr.graph.fixed import fixed_by_own_weights, fixed_operator, without_fixed
from onnx_asr.graph.index import GraphIndex, ancestors
from onnx_asr.graph.layers import BN_SCALE, BN_VAR, Layer
from onnx_asr.graph.model_io import check_finite, inlined_functions
from onnx_asr.graph.points import LayerPoint, Point, Survey, skip, survey, weight_of, without_selected
from onnx_asr.graph.skips import Reason, Skip
from onnx_asr.networks.batching import sampled_inputs
from onnx_asr.networks.draft import Draft
from onnx_asr.numerics.gains import BatchNormParameters
from onnx_asr.pairing.comparison import differ
from onnx_asr.pairing.match import Pairing, match, refoldings
from onnx_asr.pairing.refolding import KeptChannels, refold
from onnx_asr.pairing.survivors import Survivors, survivors

_FAR = 0.1  # a deviation; weights that differ by a third, root mean square
_CLEARLY = 4.0  # so many times the deviation of another pair


@dataclass(frozen=True)
class Network:
    """A model with its correction points.

    Attributes:
        index: Its graph.
        survey: Its correction points.
        everything: The same with the fixed operators, and the points that cannot be compared with another version of
            the network.
    """

    index: GraphIndex
    survey: Survey
    everything: Survey

    @classmethod
    def of(cls, model: onnx.ModelProto, role: str, *, compared: bool) -> Network:
        """Index, survey and check a model, which messages call by its role: "pruned" or "dense".

        Where it is compared with another version of itself, place by place, points behind a NonMaxSuppression, which
        keeps other boxes in another version, are skipped.

        Raises:
            ModelError: When it is quantized, not finite, or has nothing to repair.
        """
        index = GraphIndex.of(model)
        check_finite(index, role)
        everything = survey(index)
        found = without_selected(index, everything) if compared else everything
        found = without_fixed(index, found, fixed_by_own_weights(index))
        if not found.points:
            reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in found.skips[:3])
            raise ModelError(
                "the model has no Conv, ConvTranspose, Gemm, MatMul or BatchNormalization that can be repaired"
                + (f" ({reasons})" if reasons else "; give a network with constant weights")
            )
        return cls(index, found, everything)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the model."""
        functions = inlined_functions(self.index.model)
        return () if functions is None else (f"model-local functions were inlined: {functions}",)

    @cached_property
    def inputs(self) -> list[InputSpec]:
        """The model's inputs, fed with samples along their first axes.

        Raises:
            ModelError: When the samples of one lie along another axis.
        """
        return sampled_inputs(self.index)

    @cached_property
    def first_layers(self) -> set[int]:
        """Nodes with weights that read the model's input directly, with no other weights in between."""
        sources = {
            point.node: self.index.nodes[point.node].input[point.layer.data_slot] for point in self.survey.layers
        }
        return {node for node, source in sources.items() if sources.keys().isdisjoint(ancestors(self.index, [source]))}

    def split(self, obstacle: Callable[[Point], Reason | None]) -> tuple[list[Point], list[Skip]]:
        """The points that a method corrects, and those that it skips for a reason."""
        reasons = [(point, obstacle(point)) for point in self.survey.points]
        skips = [skip(point, reason) for point, reason in reasons if reason is not None]
        return [point for point, reason in reasons if reason is None], skips


@dataclass(frozen=True)
class Pair:
    """A pruned network and the dense one that it was made from.

    Attributes:
        pruned: The pruned network.
        source: The dense model as given.
        dense: The dense network as it runs: with BatchNormalization folded where the pruned one has it folded.
        parameters: Parameters of the dense network; where channels were removed, of those that are left.
        pairing: For nodes and tensors of the pruned network, those of the dense one.
        kept: Tensor of the dense network to its channel axis and the channels that are left, where some were removed.
        survivors: Which channels are left, where the pruned model has no record of them that fits.
        changed: Layers that are fixed operators in the dense network, and not in the pruned one.
    """

    pruned: Network
    source: onnx.ModelProto
    dense: GraphIndex
    parameters: Draft
    pairing: Pairing
    kept: KeptChannels
    survivors: Survivors | None = None
    changed: tuple[str, ...] = ()

    @classmethod
    def of(cls, pruned: onnx.ModelProto, dense: onnx.ModelProto) -> Pair:
        """Index, survey, check and pair two models.

        Raises:
            ModelError: When a model is quantized, not finite, or has nothing to repair.
            StructureError: When the two are not the same network.
        """
        network, index = Network.of(pruned, "pruned", compared=True), GraphIndex.of(dense)
        check_finite(index, "dense")
        return cls.between(network, index)

    @classmethod
    def between(cls, pruned: Network, dense: GraphIndex) -> Pair:
        """Find what corresponds to what.

        The dense network's weights tell which layers are fixed operators, those of a pruned one may look like it. A
        fixed operator that was pruned is corrected as any layer.

        Raises:
            StructureError: When the two are not the same network.
        """
        try:
            recorded = cls._recorded(pruned, dense)
        except StructureError as error:
            unfit = error
        else:
            return recorded._unless_contradicted(pruned, dense) if recorded._deviation > _FAR else recorded
        try:
            found = survivors(pruned.index, dense)
        except StructureError:
            if not read_kept(pruned.index.model):
                raise
            found = None
        if found is None:
            raise unfit
        return cls._told(pruned, dense, found)

    @classmethod
    def _told(cls, pruned: Network, dense: GraphIndex, found: Survivors) -> Pair:
        return replace(cls._without(pruned, dense, found.channels, found.drop), survivors=found)

    def _unless_contradicted(self, pruned: Network, dense: GraphIndex) -> Pair:
        """This pair, or the one that the weights tell, where the record counts the channels of yet another model."""
        try:
            found = survivors(pruned.index, dense)
        except StructureError:
            return self
        if found is None:
            return self
        told = self._told(pruned, dense, found)
        return told if _CLEARLY * told._deviation < self._deviation else self

    @cached_property
    def _deviation(self) -> float:
        """The largest deviation of a layer's weights from the dense ones; 0 where no channels were removed."""
        own = Draft(self.pruned.index)
        layers = self.pruned.survey.layers if self.kept else ()
        found = (_deviation(own.rows(point), self.parameters.rows(self._dense_point(point))) for point in layers)
        return max(found, default=0.0)

    @classmethod
    def _recorded(cls, pruned: Network, dense: GraphIndex) -> Pair:
        """Pair with what the pruned model's record says is left of the dense network."""
        kept = read_kept(pruned.index.model)
        if kept == read_kept(dense.model):
            return cls._matched(pruned, dense, dense, {})
        channels = trace(dense, input_shapes=read_shapes(pruned.index.model))
        return cls._without(pruned, dense, channels, missing_units(dense, channels, kept))

    @classmethod
    def _without(cls, pruned: Network, dense: GraphIndex, channels: Channels, drop: Mask) -> Pair:
        left = GraphIndex.of(remove(dense, channels, drop))
        return cls._matched(pruned, dense, left, channels.kept(drop))

    @classmethod
    def _matched(cls, pruned: Network, dense: GraphIndex, left: GraphIndex, kept: KeptChannels) -> Pair:
        """Pair with what is left of the dense network, which gets the tails of the pruned one where they differ."""
        source = dense.model
        try:
            pairing = match(pruned.index, left)
        except StructureError:
            changes = refoldings(pruned.index, left)
            if not changes:
                raise
            is_whole = left is dense
            model, kept = refold(dense, changes, kept)
            dense = GraphIndex.of(model)
            left = dense if is_whole else GraphIndex.of(refold(left, changes, {})[0])
            pairing = match(pruned.index, left)
        _check_stored(pruned, left, pairing)
        return cls(pruned, source, dense, Draft(left), pairing, kept)._without_fixed()

    def _without_fixed(self) -> Pair:
        """The pair without the layers that are fixed operators in both networks."""
        index, changed = self.pruned.index, []

        def fixed(point: LayerPoint) -> Reason | None:
            dense = self.dense_weight(point)
            reason = fixed_operator(index, point, dense)
            if reason is None:
                return None
            own = weight_of(index, point)
            if np.array_equal(own, dense.astype(own.dtype)):
                return reason
            changed.append(point.name)
            return None

        found = without_fixed(index, without_selected(index, self.pruned.everything), fixed)
        return replace(self, pruned=replace(self.pruned, survey=found), changed=tuple(changed))

    @classmethod
    def with_itself(cls, dense: Network) -> Pair:
        """A dense network beside drafts of itself, which have its graph and other parameters."""
        index = dense.index
        names = [value.name for value in index.inputs] + [name for node in index.nodes for name in node.output]
        pairing = Pairing({position: position for position in range(len(index.nodes))}, {name: name for name in names})
        return cls(dense, index.model, index, Draft(index), pairing, {})

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about what was paired."""
        changed = (
            f"{', '.join(self.changed)}: never trained, and pruned all the same; repaired as any layer, but better "
            "left alone when the dense model is pruned",
        )
        return (changed if self.changed else ()) + (() if self.survivors is None else (self.survivors.note,))

    @property
    def missing_metadata(self) -> dict[str, str]:
        """The record of its channels that the pruned model lacks."""
        return {} if self.survivors is None else {KEPT_CHANNELS: json.dumps(read_kept(self.parameters.index.model))}

    def dense_tensor(self, name: str) -> str:
        """The dense network's counterpart of a tensor."""
        return self.pairing.tensors[name]

    def dense_tensors(self, points: Iterable[Point]) -> list[str]:
        """The dense network's counterparts of the tensors that are measured at points."""
        return [self.dense_tensor(point.tensor) for point in points]

    def dense_value(self, chunk: Chunk, name: str) -> Array:
        """The dense network's counterpart of a tensor, with the channels that are left in the pruned one."""
        name = self.dense_tensor(name)
        if name not in self.kept:
            return chunk[name]
        axis, positions = self.kept[name]
        return chunk[name].take(positions, axis)

    def dense_batchnorm(self, position: int) -> BatchNormParameters:
        """Parameters of the dense network's counterpart of a BatchNormalization."""
        return self.parameters.batchnorm(self.pairing.nodes[position])

    def dense_weight(self, point: LayerPoint) -> Array:
        """The dense network's weight at a point, as stored."""
        return self.parameters.weight(self._dense_point(point))

    def dense_rows(self, point: LayerPoint) -> Floats:
        """The dense network's weight at a point as :meth:`Draft.folded_rows`."""
        return self.parameters.folded_rows(self._dense_point(point))

    def _dense_point(self, point: LayerPoint) -> LayerPoint:
        """The dense network's counterpart of a point, without its bias."""
        nodes = self.pairing.nodes
        layer = Layer.of(self.parameters.index, nodes[point.node])
        assert isinstance(layer, Layer), "paired weights have the same shape"
        batchnorm = None if point.batchnorm is None else nodes[point.batchnorm]
        tensor = self.dense_tensor(point.tensor)
        return replace(point, layer=layer, node=nodes[point.node], tensor=tensor, bias=None, batchnorm=batchnorm)


def _check_stored(pruned: Network, dense: GraphIndex, pairing: Pairing) -> None:
    """Refuse a dense network that computes parameters at run time which the pruned one stores."""
    for point in pruned.everything.points:
        nodes = [] if point.batchnorm is None else [pairing.nodes[point.batchnorm]]
        names = [name for node in nodes for name in dense.nodes[node].input[BN_SCALE : BN_VAR + 1]]
        if isinstance(point, LayerPoint):
            layer = Layer.of(dense, pairing.nodes[point.node])
            names += [] if isinstance(layer, Layer) else [dense.nodes[pairing.nodes[point.node]].input[1]]
        computed = next((name for name in names if not dense.is_constant(name)), None)
        if computed is not None:
            raise differ(
                f"the pruned model stores the parameters of {point.name}, the dense model computes '{computed}' at run "
                "time",
                "a tool seems to have folded constants in only one of them: fold them in both (onnxsim, onnxslim), or "
                "give the dense file that the pruned one was made from",
            )


def _deviation(rows: Floats, dense: Floats) -> float:
    """How far rows P are from dense ones D [C, K], up to a factor each.

    The mean of 1 - max(0, cos(P, D))^2 where P != 0, over the rows with several weights.
    """
    support = rows != 0
    several = support.sum(axis=1) > 1
    if not several.any():
        return 0.0
    own, other = rows[several], np.where(support, dense, 0.0)[several]
    lengths = np.square(own).sum(axis=1) * np.square(other).sum(axis=1)
    cosine = np.maximum((own * other).sum(axis=1), 0.0) / np.sqrt(np.maximum(lengths, np.finfo(np.float64).tiny))
    return float(1.0 - np.square(cosine).mean())


def overflow(point: Point) -> ModelError:
    """The error for activations that are not finite."""
    return ModelError(
        f"activations at {point.name} are infinite, NaN or beyond 1e19 on the calibration samples: check the samples, "
        "run both models on them in onnxruntime to see where NaN begins, or repair a float32 version of the model "
        "(float16 ends at 65504)"
    )


def unequal(point: Point) -> ModelError:
    """The error for two networks that give different numbers of results for the same samples."""
    return ModelError(
        f"the dense and the pruned model give tensors of different shapes at {point.name}: a node before it selects by "
        "value, so the two cannot be compared place by place; use --method paired or bn"
    )


def by_level(points: Sequence[Point]) -> list[list[Point]]:
    """Points grouped by level, lowest level first; points of one level do not depend on each other."""
    levels = sorted({point.level for point in points})
    return [[point for point in points if point.level == level] for level in levels]
