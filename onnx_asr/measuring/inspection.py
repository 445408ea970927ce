"""The inspection pipeline: contents of a model, methods that could repair it, damage against its dense model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_args

import numpy as np
import onnx

from onnx_asr.arrays import Floats, Integers
from onnx_asr.data import Preprocessing, open_data
from onnx_asr.data.sources import DataSource
from onnx_asr.engine.loading import load
from onnx_asr.errors import OptionError
from onnx_asr.graph.fixed import fixed_by_own_weights, without_fixed
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.layers import CONVOLUTIONS
from onnx_asr.graph.model_io import ModelSource, check_finite
from onnx_asr.graph.points import LayerPoint, Point, Survey, survey, weight_of
from onnx_asr.graph.shapes import InputShapes
from onnx_asr.graph.skips import Skip
from onnx_asr.json_values import key, plain
from onnx_asr.measuring.damage import DAMAGE_SAMPLES, PointDamage, draw_samples, measure_damage
from onnx_asr.networks.batching import settled_inputs
from onnx_asr.networks.cost import byte_size, compressed_size, leftover_note
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.operations import Probe
from onnx_asr.networks.pair import Pair, overflow
from onnx_asr.networks.samples import input_specs
from onnx_asr.networks.sparsity import check_order
from onnx_asr.numerics.masks import find_n_of_m
from onnx_asr.repairing.job import check_method
from onnx_asr.repairing.options import METHODS, check_at_least, check_choice
from onnx_asr.targets.packing import FileUse, file_use
from onnx_asr.targets.rules import TargetName
from onnx_asr.targets.usable import TargetUse, zeros_in_use


@dataclass(frozen=True)
class Layer:
    """One correction point.

    Attributes:
        node: Position of its node in the file.
        shape: Of the weight as stored; None for a BatchNormalization that follows no layer.
        channels: Number of output channels.
        batchnorm: Whether it has a BatchNormalization, or is one.
        channel_weights: Weights that feed one channel; 0 without a weight.
        channel_zeros: Number of zeros among them, [C].
        channel_norm: Euclidean norm of a channel's weights, [C].
        pattern: "dense", "unstructured", or N:M along the input channels; None without a weight.
        damage: Against the dense network; None where it was not measured.
    """

    derived: ClassVar = ("weights", "zeros", "sparsity", "empty_channels", "writable")

    node: int
    name: str
    op_type: str
    shape: tuple[int, ...] | None
    channels: int
    batchnorm: bool
    channel_weights: int = field(repr=False)
    channel_zeros: Integers = field(repr=False)
    channel_norm: Floats = field(repr=False)
    pattern: str | None
    damage: PointDamage | None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.channels * self.channel_weights

    @property
    def zeros(self) -> int:
        """Number of weights that are zero."""
        return int(self.channel_zeros.sum())

    @property
    def sparsity(self) -> float | None:
        """Share of zeros; None without a weight."""
        return self.zeros / self.weights if self.weights else None

    @property
    def empty_channels(self) -> int:
        """Channels that have lost all their weights."""
        return int((self.channel_zeros == self.channel_weights).sum()) if self.weights else 0

    @property
    def writable(self) -> str:
        """Where a repair can write a correction."""
        if self.shape is None:
            return "batchnorm"
        return "weights+batchnorm" if self.batchnorm else "weights"

    def channel_table(self) -> list[dict[str, Any]]:
        """One row per channel, with the damage where it was measured."""
        columns: dict[str, Any] = {
            "channel": range(self.channels),
            "weights": self.channels * [self.channel_weights],
            "zeros": self.channel_zeros,
            "norm": self.channel_norm,
        }
        if self.damage is not None:
            columns |= {
                "dense_std": self.damage.dense_std,
                "std": self.damage.std,
                "ratio": self.damage.ratios,
                "shift": self.damage.shift,
                "correlation": self.damage.correlations,
                "collapsed": self.damage.is_collapsed,
            }
        return [plain(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Inspection:
    """Contents of a model.

    Attributes:
        opset: Version of the standard operators.
        nodes: Number of nodes.
        inputs: Name, element type and shape of every input, as text.
        compressed_bytes: Size after deflate.
        layers: Its correction points, in file order.
        skips: Nodes with parameters that no repair can correct, and why.
        methods: With and without the dense model, by method of ``repair``: the reason why it cannot run, or None.
        metadata: Entries that this package wrote into the file earlier.
        samples: Number of samples that the damage was measured on; 0 where it was not.
        notes: Notes for the user.
        target: Which zeros a runtime makes use of, or what they are worth in the file; None where nobody asked.
    """

    derived: ClassVar = ("sparsity", "batchnorm")

    opset: int
    nodes: int
    inputs: tuple[str, ...]
    file_bytes: int = field(metadata=key("bytes"))
    compressed_bytes: int
    layers: tuple[Layer, ...]
    skips: tuple[Skip, ...] = field(metadata=key("skipped"))
    methods: dict[str, dict[str, str | None]] = field(metadata=key("repair"))
    metadata: dict[str, str]
    samples: int
    notes: tuple[str, ...]
    target: TargetUse | FileUse | None = None

    @property
    def sparsity(self) -> float:
        """Share of zeros over the weights of all layers."""
        return sum(layer.zeros for layer in self.layers) / max(1, sum(layer.weights for layer in self.layers))

    @property
    def batchnorm(self) -> str:
        """How many convolutions kept their BatchNormalization, and how many of these stand elsewhere."""
        convolutions = [layer for layer in self.layers if layer.op_type in CONVOLUTIONS]
        kept = sum(layer.batchnorm for layer in convolutions)
        elsewhere = sum(layer.batchnorm for layer in self.layers) - kept
        if not kept and not elsewhere:
            return "none: folded into the weights, or never there"
        return f"behind {kept} of {len(convolutions)} convolutions" + (f", {elsewhere} elsewhere" if elsewhere else "")

    @property
    def advice(self) -> tuple[str, ...]:
        """The methods that could run, one sentence with and one without the dense model."""
        sentences = []
        for name, obstacles in self.methods.items():
            possible = [method for method, obstacle in obstacles.items() if obstacle is None]
            sentences.append(f"repair {name.replace('_', ' --')}: {', '.join(possible) or 'nothing'}")
        return tuple(sentences)

    def layer(self, name: str) -> Layer:
        """A layer by name.

        Raises:
            OptionError: When there is none of that name; with similar names.
        """
        names = [layer.name for layer in self.layers]
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
            raise OptionError(
                f"there is no layer '{name}': give the name of one of the {len(names)} layers"
                + (f", such as {', '.join(map(repr, close))}" if close else "")
            )
        return self.layers[names.index(name)]


def inspect(
    model: ModelSource,
    data: DataSource | None = None,
    *,
    dense: ModelSource | None = None,
    target: TargetName | None = None,
    force: bool = False,
    preprocessing: Preprocessing | None = None,
    samples: int = DAMAGE_SAMPLES,
    seed: int = 0,
    batch_size: int | None = None,
    input_shapes: InputShapes | None = None,
    execution: Execution | None = None,
) -> Inspection:
    """Describe a model and, with its dense model and data, what pruning did to every channel.

    Args:
        model: A path, or an object of onnx, onnx-graphsurgeon or onnx-ir, which is not changed.
        data: Samples to measure the damage on; no labels needed.
        dense: The model that it was made from.
        target: Also tell which layers' zeros this runtime makes use of, "tensorrt" or "openvino", by its documentation;
            or what they are worth in the file, "file". With a target, models whose weights are all quantized are
            accepted.
        force: Accept a dense model with more zeros than the other one; as a rule the two were exchanged.
        preprocessing: Of images.
        samples: Number of samples, drawn by ``seed``.
        seed: Of the sample.
        batch_size: Samples per run; None chooses by the input's size.
        input_shapes: Shapes of inputs with open sizes, for the FLOPs of ``target``; by default a batch of 1 and other
            sizes of 224.
        execution: Execution providers, memory limit, progress.

    Raises:
        OptionError: One of ``dense`` and ``data`` without the other, a number out of range, or a dense model that seems
            to be the pruned one.
        ModelError: A model that cannot be read or run, is quantized, or has activations that are not finite.
        StructureError: ``dense`` and ``model`` are not the same network.
        DataError: Missing, broken or unfitting data.
    """
    check_at_least("seed", seed, 0)
    if batch_size is not None:
        check_at_least("batch-size", batch_size, 1)
    check_at_least("samples", samples, 1)
    if (dense is None) != (data is None):
        given, missing = ("--dense", "--data") if data is None else ("--data", "--dense")
        raise OptionError(f"{given} was given without {missing}: damage needs both, so give {missing} too")
    if target is not None:
        check_choice("target", target, get_args(TargetName))
    network, execution = load(model), execution or Execution()
    use = None if target is None else _use(network, target, Probe(input_shapes or {}, execution.runtime))
    if dense is None or data is None:
        return replace(describe(network, all_quantized=use is not None), target=use)
    reference = load(dense)
    if not force:
        check_order(GraphIndex.of(network), GraphIndex.of(reference))
    pair = Pair.of(network, reference)
    pruned = pair.pruned.index
    dataset = open_data(data, pair.pruned.inputs, preprocessing=preprocessing, most=samples)
    specs = settled_inputs(pruned, dataset, execution.sessions, batch_size)
    calibration = draw_samples(dataset, np.arange(len(dataset)), specs, samples, seed, batch_size)
    (damage,) = measure_damage(pair, [pruned], calibration, execution)
    for point in pair.pruned.survey.points:
        channels = damage[point.node]
        if not np.isfinite([channels.dense_std, channels.std]).all():
            raise overflow(point)
    execution.progress("done", 1.0)
    found = describe(network, damage, calibration.count)
    return replace(found, notes=(*found.notes, *pair.notes), target=use)


def _use(model: onnx.ModelProto, target: TargetName, probe: Probe) -> TargetUse | FileUse:
    index = GraphIndex.of(model)
    return file_use(index) if target == "file" else zeros_in_use(index, target, probe)


def describe(
    model: onnx.ModelProto,
    damage: Mapping[int, PointDamage] | None = None,
    samples: int = 0,
    *,
    all_quantized: bool = False,
) -> Inspection:
    """Contents of a model, with the damage by node position where it was measured.

    Raises:
        ModelError: When its weights are all quantized, unless that is accepted, or holds values that are not finite.
    """
    index = GraphIndex.of(model)
    check_finite(index, "given")
    found = without_fixed(index, survey(index, all_quantized=all_quantized), fixed_by_own_weights(index))
    return Inspection(
        opset=next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0),
        nodes=len(index.nodes),
        inputs=tuple(
            f"{spec.name}: {spec.dtype}[{','.join('?' if size is None else str(size) for size in spec.shape)}]"
            for spec in input_specs(index)
        ),
        file_bytes=byte_size(model),
        compressed_bytes=compressed_size(model),
        layers=tuple(_layer(index, point, (damage or {}).get(point.node)) for point in found.points),
        skips=found.skips,
        methods={"with_dense": _methods(found, dense=True), "without_dense": _methods(found, dense=False)},
        metadata={item.key: item.value for item in model.metadata_props if item.key.startswith("onnx_asr.")},
        samples=samples,
        notes=leftover_note(index),
    )


def _layer(index: GraphIndex, point: Point, damage: PointDamage | None) -> Layer:
    shape, pattern, weights = None, None, 0
    zeros, norm = np.zeros(point.channels, np.int64), np.zeros(point.channels)
    if isinstance(point, LayerPoint):
        value, layout = weight_of(index, point), point.layer.layout
        view = layout.to_blocks(value).reshape(layout.channels, layout.inputs, layout.taps)
        kept = view != 0
        shape, weights = tuple(value.shape), view[0].size
        zeros = np.asarray(weights - kept.sum(axis=(1, 2)), np.int64)
        norm = np.sqrt(np.square(view.astype(np.float64)).sum(axis=(1, 2)))
        found = find_n_of_m(kept)
        pattern = "dense" if kept.all() else "unstructured" if found is None else f"{found[0]}:{found[1]}"
    return Layer(
        node=point.node,
        name=point.name,
        op_type=point.kind,
        shape=shape,
        channels=point.channels,
        batchnorm=point.batchnorm is not None,
        channel_weights=weights,
        channel_zeros=zeros,
        channel_norm=norm,
        pattern=pattern,
        damage=damage,
    )


def _methods(found: Survey, dense: bool) -> dict[str, str | None]:
    """By method, the reason why it cannot run, or None."""
    if not found.points:
        return dict.fromkeys(METHODS, "nothing in the model can be corrected")
    reasons: dict[str, str | None] = {}
    for method in METHODS:
        reasons[method] = None
        try:
            check_method(method, dense=dense, batchnorm=found.has_batchnorm)
        except OptionError as error:
            reasons[method] = str(error)
    return reasons
