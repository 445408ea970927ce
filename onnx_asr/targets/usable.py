"""Which layers' zeros a runtime makes use of, by the rules of :mod:`onnx_asr.targets.rules`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_asr.arrays import Array
from onnx_asr.graph.index import GraphIndex, attribute, is_standard
from onnx_asr.graph.layers import LAYERS, Layer
from onnx_asr.graph.skips import Reason
from onnx_asr.networks.operations import Operations, Probe
from onnx_asr.targets.rules import TARGETS, Cure, LayerForm, RuntimeName, Source, Target

_FOUR = 4

Use = Literal["yes", "perhaps", "no"]
"""Whether a runtime makes use of a layer's zeros; "perhaps" where its sources disagree, or a setting decides."""


@dataclass(frozen=True)
class Obstacle:
    """Why a runtime does not make use of a layer's zeros, or may not.

    Attributes:
        code: Name for programs.
        text: A sentence for people.
        certain: Whether it rules the layer out.
        cure: What would remove it; None where nothing does.
        sources: Who says so.
    """

    code: str
    text: str
    certain: bool
    cure: Cure | None
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class LayerUse:
    """One layer, and what a runtime makes of its zeros.

    Attributes:
        node: Position of its node in the file.
        shape: Of the weight as stored.
        sparsity: Share of its weights that are zero.
        flops: Its operations, zeros included; None where they are unknown.
        obstacles: What is wrong with it, the most certain first.
    """

    derived: ClassVar = ("use", "could_be")

    node: int
    name: str
    op_type: str
    shape: tuple[int, ...]
    sparsity: float
    flops: int | None
    obstacles: tuple[Obstacle, ...]

    @property
    def could_be(self) -> bool:
        """Whether zeros in the right places, or quantization, would be made use of, perhaps."""
        return all(obstacle.cure is not None or not obstacle.certain for obstacle in self.obstacles)

    @property
    def use(self) -> Use:
        """Whether the zeros are made use of."""
        if not self.obstacles:
            return "yes"
        return "no" if any(obstacle.certain for obstacle in self.obstacles) else "perhaps"


@dataclass(frozen=True)
class TargetUse:
    """What a runtime makes of the zeros of a model, by its documentation; nothing was run.

    Attributes:
        name: The runtime.
        title: Its name in sentences.
        checked: The versions that the rules were checked against.
        layers: Layers with constant weights, quantized ones included, in file order.
        flops: Operations of the whole model, zeros included; None where they are unknown.
        unknown: Why they are; None where they are not.
        needs: Conditions of hardware and settings.
        sources: Where all of this comes from.
    """

    derived: ClassVar = ("shares", "possible_share")

    name: RuntimeName
    title: str
    checked: str
    layers: tuple[LayerUse, ...]
    flops: int | None
    unknown: str | None
    needs: tuple[str, ...]
    sources: tuple[Source, ...]

    @property
    def shares(self) -> dict[Use, float | None]:
        """Share of the operations in layers whose zeros are made use of, perhaps, and not; None where unknown."""
        if not self.flops:
            return dict.fromkeys(("yes", "perhaps", "no"))
        counts: Counter[Use] = Counter()
        for layer in self.layers:
            counts[layer.use] += layer.flops or 0
        counts["no"] = self.flops - counts["yes"] - counts["perhaps"]
        return {use: counts[use] / self.flops for use in ("yes", "perhaps", "no")}

    @property
    def possible_share(self) -> float | None:
        """Share of the operations in layers where other zeros, or quantization, could be of use; None where unknown."""
        return sum(layer.flops or 0 for layer in self.layers if layer.could_be) / self.flops if self.flops else None


def zeros_in_use(index: GraphIndex, runtime: RuntimeName, probe: Probe) -> TargetUse:
    """Judge every layer of a network.

    Raises:
        OptionError: When a shape of the probe does not fit the network.
        ModelError: When shape inference fails.
    """
    target, operations = TARGETS[runtime], Operations.of(index, probe)
    readable, quantized = _with_integers(index)
    layers = []
    for position, node in enumerate(index.nodes):
        layer = Layer.of(readable, position) if is_standard(node, *LAYERS) else None
        if layer is None or isinstance(layer, Reason):
            continue
        stored = readable.value(readable.nodes[position].input[layer.weight_slot])
        form = form_of(index, position, layer, stored, position in quantized)
        count = operations.by_node.get(position) if operations.gap is None else None
        found = tuple(
            Obstacle(rule.code, rule.sentence, rule.certain, rule.cure, rule.sources)
            for rule in sorted(target.rules, key=lambda rule: not rule.certain)
            if rule.broken_by(form)
        )
        place = position, index.label(position), node.op_type, tuple(stored.shape)
        layers.append(LayerUse(*place, form.sparsity, count, found))
    sources = [source for layer in layers for obstacle in layer.obstacles for source in obstacle.sources]
    return TargetUse(
        name=runtime,
        title=target.title,
        checked=target.checked,
        layers=tuple(layers),
        flops=operations.total if operations.gap is None else None,
        unknown=operations.gap,
        needs=tuple(text for text, _ in target.needs),
        sources=tuple(dict.fromkeys([*sources, *(source for _, source in target.needs)])),
    )


def form_of(index: GraphIndex, position: int, layer: Layer, stored: Array, quantized: bool = False) -> LayerForm:
    """What rules look at in a layer.

    Args:
        index: The graph.
        position: Of the layer's node.
        layer: How the node holds its parameters.
        stored: Its weight, or integers that are zero where it is.
        quantized: Whether the weight is stored as integers.
    """
    node, layout = index.nodes[position], layer.layout
    kept = layout.to_blocks(stored != 0).reshape(layout.channels, layout.inputs, layout.taps)
    spare = -layout.inputs % _FOUR
    fours = np.pad(kept, ((0, 0), (0, spare), (0, 0))).reshape(layout.channels, -1, _FOUR, layout.taps)
    reads_integers = index.made_by(node.input[layer.data_slot], "DequantizeLinear") is not None
    writes_integers = index.sole_consumer(node.output[0], "QuantizeLinear") is not None
    return LayerForm(
        kind=layer.kind,
        groups=layout.groups,
        inputs=layout.inputs,
        outputs=layout.channels,
        taps=layout.taps,
        sparsity=1 - float(kept.mean()),
        most_of_four=int(fours.sum(axis=2).max(initial=0)),
        weight_first=layer.kind == "MatMul" and layer.weight_slot == 0,
        quantized=quantized and reads_integers,
        beside_quantizer=quantized or reads_integers or writes_integers,
    )


def lost_cause(form: LayerForm, target: Target) -> str | None:
    """Why no zeros in a layer are of use, wherever they are, and quantized or not; None where some may be."""
    hard = (rule for rule in target.rules if rule.certain and rule.cure is None)
    return next((rule.sentence for rule in hard if rule.broken_by(form)), None)


def _with_integers(index: GraphIndex) -> tuple[GraphIndex, set[int]]:
    """The network with its quantized weights as integers that are zero where they are, and the nodes that read them."""
    found: dict[int, tuple[int, Array]] = {}
    for position, node in enumerate(index.nodes):
        for slot, name in enumerate(node.input[:2]) if is_standard(node, *LAYERS) else ():
            if name and not index.is_constant(name) and (value := _integers(index, name)) is not None:
                found[position] = slot, value
    if not found:
        return index, set()
    model = onnx.ModelProto()
    model.CopyFrom(index.model)
    for position, (slot, value) in found.items():
        tensor = numpy_helper.from_array(value, f"asr::integers:{position}")
        model.graph.initializer.append(tensor)
        model.graph.node[position].input[slot] = tensor.name
    return GraphIndex.of(model), set(found)


def _integers(index: GraphIndex, name: str) -> Array | None:
    """What DequantizeLinear makes of a constant, up to the scales; the float weight where QuantizeLinear makes that."""
    position = index.made_by(name, "DequantizeLinear")
    if position is None:
        return None
    node = index.nodes[position]
    quantizer = index.made_by(node.input[0], "QuantizeLinear")
    if quantizer is not None:
        source = index.nodes[quantizer].input[0]
        return index.value(source) if index.is_constant(source) else None
    if not index.is_constant(node.input[0]):
        return None
    stored = index.value(node.input[0]).astype(np.int32)
    zero = node.input[2] if len(node.input) > 2 else ""
    if not zero:
        return stored.astype(np.float32)
    if not index.is_constant(zero):
        return None
    offset, axis = index.value(zero).astype(np.int32), attribute(node, "axis", 1) % max(1, stored.ndim)
    if offset.ndim == 1 and offset.size > 1:
        offset = offset.reshape([-1 if place == axis else 1 for place in range(stored.ndim)])
    elif offset.ndim > 1 and (block := attribute(node, "block_size", 0)):  # the last block may be shorter
        offset = np.repeat(offset, block, axis)[tuple(map(slice, stored.shape))]
    sizes = zip(offset.shape, stored.shape, strict=False)  # of one for all values, or along every axis
    fits = offset.ndim <= stored.ndim and all(one in (1, size) for one, size in sizes)
    return np.asarray(stored - offset, np.float32) if fits else None
