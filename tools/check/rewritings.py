"""Other spellings of the same function, and small changes to another one, of any model.

Each takes a generator and a model, changes the model in place, and says whether it found a place to do so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper, version_converter

from onnx_asr.graph.index import GraphIndex, attribute, is_standard
from onnx_asr.graph.shapes import typical_shapes
from onnx_asr.pairing.canonical import form_of
from onnx_asr.pairing.match import Refolding
from onnx_asr.pairing.refolding import refold
from onnx_asr.pairing.tails import Tail, tail_of

Rewriting: TypeAlias = Callable[[random.Random, onnx.ModelProto], bool]

_COMMUTATIVE = ("Add", "Mul", "Max", "Min", "Sum")
_ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "Softplus", "HardSwish", "Abs")
_AXIS = ("Concat", "Split", "Softmax", "LogSoftmax", "Gather", "ReduceMean", "ReduceMax")


def _fresh(model: onnx.ModelProto, stem: str) -> str:
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    taken.update(item.name for item in (*model.graph.input, *model.graph.output, *model.graph.initializer))
    return next(name for number in range(len(taken) + 1) if (name := f"{stem}_{number}") not in taken)


def _set_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _constant(model: onnx.ModelProto, stem: str, value: object, kind: type) -> str:
    name = _fresh(model, stem)
    model.graph.initializer.append(numpy_helper.from_array(np.array(value, kind), name))
    return name


def _nodes(rng: random.Random, model: onnx.ModelProto, *operators: str) -> Iterator[onnx.NodeProto]:
    """Nodes of some operators in random order."""
    found = [node for node in model.graph.node if is_standard(node, *operators)]
    yield from rng.sample(found, len(found))


def _set(node: onnx.NodeProto, name: str, value: object) -> None:
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def renamed(rng: random.Random, model: onnx.ModelProto) -> bool:
    """Rename every tensor and node but inputs and outputs."""
    ends = {item.name for item in (*model.graph.input, *model.graph.output)}
    stem = f"r{rng.randrange(1000)}_"
    for number, node in enumerate(model.graph.node):
        node.name = f"{stem}{number}"
        for names in (node.input, node.output):
            names[:] = [name if not name or name in ends else stem + name for name in names]
    for item in (*model.graph.initializer, *model.graph.value_info):
        item.name = item.name if item.name in ends else stem + item.name
    return True


def reordered(rng: random.Random, model: onnx.ModelProto) -> bool:
    """Another topological order."""
    known = {item.name for item in (*model.graph.input, *model.graph.initializer)} | {""}
    waiting, ordered = list(model.graph.node), []
    while waiting:
        node = rng.choice([item for item in waiting if known.issuperset(item.input)])
        waiting.remove(node)
        ordered.append(node)
        known.update(node.output)
    _set_nodes(model, ordered)
    return True


def stored_elsewhere(rng: random.Random, model: onnx.ModelProto) -> bool:
    """Some initializers as Constant nodes, behind an Identity or not."""
    constants, left = [], []
    for tensor in list(model.graph.initializer):
        if rng.random() < 0.5:
            left.append(tensor)
            continue
        name = tensor.name
        if rng.random() < 0.5:
            stored = f"{name}_stored"
            constants += [
                helper.make_node("Constant", [], [stored], value=tensor),
                helper.make_node("Identity", [stored], [name]),
            ]
        else:
            constants.append(helper.make_node("Constant", [], [name], value=tensor))
    del model.graph.initializer[:]
    model.graph.initializer.extend(left)
    _set_nodes(model, [*constants, *model.graph.node])
    return bool(constants)


def nothing_added(rng: random.Random, model: onnx.ModelProto) -> bool:
    """A node that changes nothing, between a tensor and one of its readers."""
    shapes = typical_shapes(GraphIndex.of(model))
    places = [
        (node, slot)
        for node in model.graph.node
        for slot, name in enumerate(node.input)
        if len(shapes.get(name, ())) == 4 and not is_standard(node, "Shape")
    ]
    if not places:
        return False
    node, slot = rng.choice(places)
    source, target = node.input[slot], _fresh(model, "nothing")
    kind = rng.choice(["Identity", "Dropout", "Transpose", "Cast", "Concat", "Reshape", "Pad"])
    reads = [source]
    settings: dict[str, object] = {}
    if kind == "Transpose":
        settings = {"perm": [0, 1, 2, 3]}
    elif kind == "Cast":
        settings = {"to": onnx.TensorProto.FLOAT}
    elif kind == "Concat":
        settings = {"axis": 1}
    elif kind == "Reshape":
        reads.append(_constant(model, "shape", rng.choice([[0, 0, 0, -1], shapes[source]]), np.int64))
    elif kind == "Pad":
        reads.append(_constant(model, "pads", [0] * 8, np.int64))
    node.input[slot] = target
    nodes = list(model.graph.node)
    place = nodes.index(node)
    nodes.insert(place, helper.make_node(kind, reads, [target], **settings))  # type: ignore[arg-type]
    _set_nodes(model, nodes)
    return True


def commuted(rng: random.Random, model: onnx.ModelProto) -> bool:
    """The operands of a sum or product in another order."""
    for node in _nodes(rng, model, *_COMMUTATIVE):
        if len(set(node.input)) > 1:
            names = list(node.input)
            rng.shuffle(names)
            node.input[:] = names
            return True
    return False


def axis_from_the_end(rng: random.Random, model: onnx.ModelProto) -> bool:
    """An axis counted from the other end."""
    shapes = typical_shapes(GraphIndex.of(model))
    for node in _nodes(rng, model, *_AXIS):
        axis, rank = attribute(node, "axis", None), len(shapes.get(node.input[0], ()))
        if axis is not None and rank:
            _set(node, "axis", axis - rank if axis >= 0 else axis + rank)
            return True
    return False


def defaults_written_out(rng: random.Random, model: onnx.ModelProto) -> bool:
    """Default attributes of a node stated."""
    opset = next(item.version for item in model.opset_import if not item.domain)
    found = False
    for node in _nodes(rng, model, "Conv", "Concat", "Softplus", "Transpose", "BatchNormalization", "Pad", "Gemm"):
        schema = onnx.defs.get_schema(node.op_type, opset)
        given = {item.name for item in node.attribute}
        for name, item in schema.attributes.items():
            if item.default_value.type and name not in given:
                node.attribute.append(item.default_value)
                found = True
    for node in _nodes(rng, model, "Conv"):
        given = {item.name for item in node.attribute}
        for name in {"strides", "dilations"} - given:
            node.attribute.append(helper.make_attribute(name, [1, 1]))
    return found


def activation_twice(rng: random.Random, model: onnx.ModelProto) -> bool:
    """A Relu of a Relu, or a Clip for one."""
    for node in _nodes(rng, model, "Relu"):
        if rng.random() < 0.5:
            node.op_type = "Clip"
            node.input.append(_constant(model, "low", 0, np.float32))
        else:
            inner = _fresh(model, "inner")
            nodes = list(model.graph.node)
            nodes.insert(nodes.index(node), helper.make_node("Relu", [node.input[0]], [inner]))
            node.input[0] = inner
            _set_nodes(model, nodes)
        return True
    return False


def computed_twice(rng: random.Random, model: onnx.ModelProto) -> bool:
    """A node without weights of its own for each of two readers of its output."""
    index, nodes = GraphIndex.of(model), list(model.graph.node)
    for node in _nodes(rng, model, *_ACTIVATIONS, "Add", "Mul", "Sub", "Concat", "GlobalAveragePool"):
        readers = [item for item in nodes if node.output[0] in item.input]
        if len(readers) < 2 or any(map(index.is_constant, node.input)):
            continue
        again = onnx.NodeProto()
        again.CopyFrom(node)
        again.name, again.output[0] = "", _fresh(model, "again")
        nodes.insert(nodes.index(node) + 1, again)
        reader = rng.choice(readers)
        reader.input[list(reader.input).index(node.output[0])] = again.output[0]
        _set_nodes(model, nodes)
        return True
    return False


def bias_apart(rng: random.Random, model: onnx.ModelProto) -> bool:
    """The bias of a convolution as an Add behind it."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    for node in _nodes(rng, model, "Conv", "ConvTranspose"):
        if len(node.input) < 3 or node.input[2] not in tensors:
            continue
        value = numpy_helper.to_array(tensors[node.input[2]])
        bias = _constant(model, "bias", value.reshape(-1, 1, 1), np.float32)
        output, plain = node.output[0], _fresh(model, "plain")
        del node.input[2:]
        node.output[0] = plain
        nodes.insert(nodes.index(node) + 1, helper.make_node("Add", [bias, plain], [output]))
        _set_nodes(model, nodes)
        return True
    return False


def padding_apart(rng: random.Random, model: onnx.ModelProto) -> bool:
    """The padding of a convolution by a Pad in front of it."""
    nodes = list(model.graph.node)
    for node in _nodes(rng, model, "Conv"):
        pads = list(attribute(node, "pads", []))
        if not any(pads):
            continue
        half = len(pads) // 2
        name = _constant(model, "pads", [0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
        padded = _fresh(model, "padded")
        nodes.insert(nodes.index(node), helper.make_node("Pad", [node.input[0], name], [padded]))
        node.input[0] = padded
        _set(node, "pads", [0] * len(pads))
        _set_nodes(model, nodes)
        return True
    return False


def tails_of(index: GraphIndex) -> list[Tail]:
    """The longest tails of a graph, those of length zero left out."""
    found = [tail_of(index, lambda place: form_of(index, place), position) for position in range(len(index.nodes))]
    tails = [tail for tail in found if tail is not None and tail.nodes]
    inner = {tail.nodes[:-1] for tail in tails}
    return [tail for tail in tails if tail.nodes not in inner]


def folded(rng: random.Random, model: onnx.ModelProto) -> bool:
    """Some scales and shifts folded into the layers in front of them."""
    index = GraphIndex.of(model)
    tails = [tail for tail in tails_of(index) if rng.random() < 0.7]
    if not tails:
        return False
    changed, _ = refold(index, [Refolding(replace(tail, nodes=()), tail) for tail in tails], {})
    model.CopyFrom(changed)
    return True


def another_opset(rng: random.Random, model: onnx.ModelProto) -> bool:
    """Converted to another opset by onnx."""
    opset = next(item.version for item in model.opset_import if not item.domain)
    wanted = rng.choice([number for number in (17, 18, 19, 21) if number > opset] or [opset])
    try:
        model.CopyFrom(version_converter.convert_version(model, wanted))
    except Exception:  # whatever the converter cannot do
        return False
    return bool(wanted != opset)


SPELLINGS: dict[str, Rewriting] = {
    "renamed": renamed,
    "reordered": reordered,
    "stored elsewhere": stored_elsewhere,
    "nothing added": nothing_added,
    "commuted": commuted,
    "axis from the end": axis_from_the_end,
    "defaults written out": defaults_written_out,
    "activation twice": activation_twice,
    "computed twice": computed_twice,
    "bias apart": bias_apart,
    "padding apart": padding_apart,
    "folded": folded,
    "another opset": another_opset,
}


def other_activation(rng: random.Random, model: onnx.ModelProto) -> bool:
    """Another activation function."""
    for node in _nodes(rng, model, *_ACTIVATIONS):
        node.op_type = rng.choice([name for name in _ACTIVATIONS if name != node.op_type])
        return True
    return False


def other_arithmetic(rng: random.Random, model: onnx.ModelProto) -> bool:
    """Another operation on two tensors."""
    kinds = ("Add", "Mul", "Sub", "Max", "Min")
    for node in _nodes(rng, model, *kinds):
        node.op_type = rng.choice([name for name in kinds if name != node.op_type])
        return True
    return False


def exchanged_operands(rng: random.Random, model: onnx.ModelProto) -> bool:
    """The operands of a Sub or Concat in another order."""
    for node in _nodes(rng, model, "Sub", "Concat", "Div"):
        if len(set(node.input)) > 1:
            node.input[:2] = [node.input[1], node.input[0]]
            return True
    return False


def shifted_pads(rng: random.Random, model: onnx.ModelProto) -> bool:
    """The padding of a convolution on the other sides."""
    for node in _nodes(rng, model, "Conv", "ConvTranspose", "MaxPool", "AveragePool"):
        pads = list(attribute(node, "pads", []))
        if any(pads):
            half = len(pads) // 2
            _set(
                node, "pads", [*(size - 1 if size else 0 for size in pads[:half]), *(size + 1 for size in pads[half:])]
            )
            return True
    return False


def dilated(rng: random.Random, model: onnx.ModelProto) -> bool:
    """A 3x3 convolution with dilation 2 and padding 2."""
    for node in _nodes(rng, model, "Conv"):
        if list(attribute(node, "pads", [])) == [1, 1, 1, 1]:
            _set(node, "pads", [2, 2, 2, 2])
            _set(node, "dilations", [2, 2])
            return True
    return False


def exchanged_outputs(rng: random.Random, model: onnx.ModelProto) -> bool:
    """The outputs of a Split exchanged."""
    for node in _nodes(rng, model, "Split"):
        node.output[:2] = [node.output[1], node.output[0]]
        return True
    return False


def shifted_integers(rng: random.Random, model: onnx.ModelProto) -> bool:
    """An integer constant, of a Slice, Pad, Gather, Split or Reshape, changed."""
    readers = ("Slice", "Pad", "Gather", "Split", "Reshape", "Transpose", "Tile")
    names = {name for node in model.graph.node if node.op_type in readers for name in node.input[1:]}
    tensors = [item for item in model.graph.initializer if item.name in names and item.data_type == 7]
    if not tensors:
        return False
    tensor = rng.choice(tensors)
    value = numpy_helper.to_array(tensor).copy()
    place = rng.randrange(value.size)
    if value.size > 1 and rng.random() < 0.5:
        value = np.roll(value, 1)
    else:
        value.flat[place] += rng.choice([-1, 1])
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return True


def other_epsilon(rng: random.Random, model: onnx.ModelProto) -> bool:
    """A thousand times the epsilon of a BatchNormalization."""
    for node in _nodes(rng, model, "BatchNormalization"):
        _set(node, "epsilon", 1000 * attribute(node, "epsilon", 1e-5))
        return True
    return False


def rewired(rng: random.Random, model: onnx.ModelProto) -> bool:
    """A node that reads another tensor of the same shape."""
    shapes = typical_shapes(GraphIndex.of(model))
    nodes = list(model.graph.node)
    for node in rng.sample(nodes, len(nodes)):
        before = {name for item in nodes[: nodes.index(node)] for name in item.output}
        for slot, name in enumerate(node.input):
            others = sorted(other for other in before if other != name and shapes.get(other) == shapes.get(name, ()))
            if others:
                node.input[slot] = rng.choice(others)
                return True
    return False


def left_out(rng: random.Random, model: onnx.ModelProto) -> bool:
    """An activation or normalization left out."""
    for node in _nodes(rng, model, *_ACTIVATIONS, "BatchNormalization"):
        source, output = node.input[0], node.output[0]
        if output in {item.name for item in model.graph.output}:
            continue
        model.graph.node.remove(node)
        for item in model.graph.node:
            item.input[:] = [source if name == output else name for name in item.input]
        return True
    return False


CHANGES: dict[str, Rewriting] = {
    "other activation": other_activation,
    "other arithmetic": other_arithmetic,
    "exchanged operands": exchanged_operands,
    "shifted pads": shifted_pads,
    "dilated": dilated,
    "exchanged outputs": exchanged_outputs,
    "shifted integers": shifted_integers,
    "other epsilon": other_epsilon,
    "rewired": rewired,
    "left out": left_out,
}
