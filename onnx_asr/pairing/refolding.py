"""Give the dense model's layers the tails that they have in the pruned one: BatchNormalization folded, or kept.

With the dense layer ``z = W x + b`` and its tail ``t = S z + H``, and the pruned tail ``t = S' z + H'``:

    W' = S W / S'        b' = (S b + H - H') / S'

and the dense model gets a copy of the pruned tail, with the pruned model's parameters: it computes the same function as
before, up to rounding. (Jacob et al. 2018, section 3.2, fold with S' = 1, H' = 0.) A channel that the pruned tail
multiplies by almost nothing cannot be unfolded so; it gets a tail that changes nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_asr.arrays import Floats, Integers
from onnx_asr.graph.edit import EditPlan, apply, names_within, unique_name
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.layers import NORMALIZATION
from onnx_asr.pairing.canonical import form_of
from onnx_asr.pairing.match import Refolding
from onnx_asr.pairing.tails import Step, Tail, composed, tail_of

_SMALLEST = 1e-6  # of S': below, b' loses its digits, and z could leave the range of float16

KeptChannels = dict[str, tuple[int, Integers]]
"""Tensor of a dense network to its channel axis and the channels that are left in the pruned one."""


def refold(dense: GraphIndex, changes: Sequence[Refolding], kept: KeptChannels) -> tuple[onnx.ModelProto, KeptChannels]:
    """A copy of the dense model with the pruned model's tails; its tensors keep their names.

    The dense model may have more channels than the one in which the changes were found; ``kept`` tells which ones that
    has. Returned with an entry for every new tensor.

    Raises:
        ModelError: When a folded parameter is not finite in the type in which it is stored.
    """
    plan = EditPlan()
    targets = []
    for change in changes:
        tail = _same_tail(dense, change.dense)
        steps = change.pruned.steps
        if tail.layer_end in kept:
            steps = tuple(step.widened(kept[tail.layer_end][1], tail.layer.layout.channels) for step in steps)
        targets.append((tail, _plan(tail, steps, plan)))
    writer = _Writer(apply(dense, plan), kept)
    for tail, steps in targets:
        writer.replace(tail, steps)
    return writer.written(), writer.kept


def _same_tail(dense: GraphIndex, tail: Tail) -> Tail:
    """A tail found in a smaller version of the dense model."""
    found = tail_of(dense, lambda position: form_of(dense, position), dense.producer[tail.end])
    assert found is not None, "removing channels leaves the structure as it was"
    return found


def _plan(tail: Tail, steps: tuple[Step, ...], plan: EditPlan) -> tuple[Step, ...]:
    """Plan the layer's new parameters; return the steps, neutral in channels that they cannot be unfolded from."""
    layer, node = tail.layer, tail.form.node
    layout = layer.layout
    weight, own_bias = tail.index.value(tail.index.nodes[node].input[layer.weight_slot]), _bias(tail)
    scale, shift = composed(tail.steps, layout.channels)
    tiny = np.abs(composed(steps, layout.channels)[0]) < _SMALLEST
    steps = tuple(step.neutral(tiny) for step in steps)
    new_scale, new_shift = composed(steps, layout.channels)
    rows = layout.to_rows(weight.astype(np.float64)) * (scale / new_scale)[:, None]
    plan.values[node, layer.weight_slot] = layout.from_rows(rows)
    bias = (scale * own_bias + shift - new_shift) / new_scale / layer.beta
    if tail.bias is None:
        plan.added_bias[node] = bias
    else:
        plan.values[tail.bias] = bias
    return steps


def _bias(tail: Tail) -> Floats:
    """What the layer adds to its channels, [C]."""
    zeros = np.zeros(tail.layer.layout.channels)
    if tail.bias is None:
        return zeros
    node, slot = tail.bias
    inputs = tail.index.nodes[node].input
    if slot >= len(inputs) or not inputs[slot]:
        return zeros
    return zeros + tail.layer.beta * tail.index.value(inputs[slot]).reshape(-1).astype(np.float64)


class _Writer:
    """Replaces tails in a copy of an indexed model."""

    def __init__(self, model: onnx.ModelProto, kept: KeptChannels) -> None:
        self._model, self.kept = model, dict(kept)
        graph = model.graph
        self._nodes = list(graph.node)
        self._taken = {item.name for item in (*graph.input, *graph.initializer, *graph.value_info)}
        self._taken.update(item.values.name for item in graph.sparse_initializer)
        self._taken.update(name for node in graph.node for name in (*node.output, *names_within(node)))

    def replace(self, tail: Tail, steps: Sequence[Step]) -> None:
        """Put ``steps`` between a layer and the end of its tail."""
        old = {name for position in tail.nodes for name in tail.index.nodes[position].output}
        self._nodes = [node for node in self._nodes if old.isdisjoint(node.output)]
        place = next(i for i, node in enumerate(self._nodes) if tail.layer_end in node.output)
        tensor = tail.layer_end
        if steps and not tail.nodes:
            tensor = self._new_tensor(tail, "layer")
            self._nodes[place].output[0] = tensor
        new: list[onnx.NodeProto] = []
        for number, step in enumerate(steps, start=1):
            output = tail.end if number == len(steps) else self._new_tensor(tail, f"step{number}")
            new.extend(self._step(tail, step, tensor, output))
            tensor = output
        if tensor != tail.end:
            new.append(onnx.helper.make_node("Identity", [tensor], [tail.end]))
        self._nodes[place + 1 : place + 1] = new

    def written(self) -> onnx.ModelProto:
        """The model with what was replaced."""
        nodes = onnx.GraphProto(node=self._nodes).node
        self._model.graph.ClearField("node")
        self._model.graph.node.MergeFrom(nodes)
        return self._model

    def _new_tensor(self, tail: Tail, what: str) -> str:
        name = unique_name(self._taken, f"{tail.end}_{what}")
        if tail.layer_end in self.kept:
            self.kept[name] = self.kept[tail.layer_end]
        return name

    def _step(self, tail: Tail, step: Step, source: str, output: str) -> Iterator[onnx.NodeProto]:
        """The node of a step, behind the constants that it reads, in the type of the layer's weight."""
        weight = tail.index.nodes[tail.form.node].input[tail.layer.weight_slot]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tail.index.element_type(weight))
        names = []
        for number, value in enumerate(step.stored):
            names.append(unique_name(self._taken, f"{output}_parameter{number}"))
            tensor = numpy_helper.from_array(value.astype(dtype), names[-1])
            yield onnx.helper.make_node("Constant", [], [names[-1]], value=tensor)
        names.insert(step.slot, source)
        node = onnx.helper.make_node(step.operator, names, [output])
        if step.operator == NORMALIZATION:
            node.attribute.append(onnx.helper.make_attribute("epsilon", step.epsilon))
        yield node
