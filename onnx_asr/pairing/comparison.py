"""Whether two nodes are the same operation, and if not, what differs and why it may."""

from __future__ import annotations

from collections.abc import Callable
from operator import le
from typing import Any

import onnx

from onnx_asr.errors import StructureError
from onnx_asr.graph.index import GraphIndex, captured, is_standard
from onnx_asr.graph.layers import CONVOLUTIONS, NORMALIZATION
from onnx_asr.graph.points import is_quantizing
from onnx_asr.pairing.canonical import VIEW
from onnx_asr.pairing.forms import COMPUTED, Form
from onnx_asr.pairing.resolving import could_agree
from onnx_asr.pairing.sides import Side, operands

_OTHER_FILE = "give the dense file that the pruned one was made from, exported the same way"
_FOLDED = (
    "a tool seems to have folded BatchNormalization in only one of them, and not into the layer in front of it: fold "
    "it in both or in neither, or give the dense file that the pruned one was made from"
)
_EXCHANGED = (
    "the dense model is the smaller one: exchange the two files if you gave the one for the other, else give the dense "
    "file that the pruned one was made from"
)
_QUANTIZED = (
    "{node} is in the {role} model alone, so a tool has quantized this one and not the other: give the two as they "
    "were before that"
)
_OPTIMIZED = (
    "{node} is in the {role} model alone, an operator that onnxruntime makes when it optimizes a model: give the two "
    "as they were before that, or optimized no further than ORT_ENABLE_BASIC"
)


def differ(difference: str, advice: str = _OTHER_FILE) -> StructureError:
    """The error for two models that are not one network."""
    return StructureError(f"the dense and the pruned model are not the same network: {difference}; {advice}")


def compare(pruned: Side, position: int, dense: Side, counterpart: int) -> tuple[Form, Form]:
    """Compare two nodes, without what makes the tensors that they read, and return the forms in which they agree.

    Raises:
        StructureError: Naming what differs.
    """
    form, partner = pruned.form(position), dense.form(counterpart)
    here = f"{pruned.index.label(position)} ({pruned.index.nodes[position].op_type})"
    there = f"{dense.index.label(counterpart)} ({dense.index.nodes[counterpart].op_type})"
    if form.operator != partner.operator:
        form, partner = pruned.resolved(position), dense.resolved(counterpart)
    if form.operator != partner.operator:
        operators = form.operator + partner.operator
        raise differ(
            f"the pruned model has node {here} where the dense model has {there}",
            _suspected(pruned.index, dense.index, operators),
        )
    here, there = f"node {here}", f"{there} in the dense model"
    if [bool(name) for name in form.inputs] != [bool(name) for name in partner.inputs]:
        raise differ(f"{here} has {len(form.inputs)} inputs, {there} has {len(partner.inputs)}")
    if pruned.sized:
        name = _differing(pruned, position, dense, counterpart)
        if name is not None:
            value, other = (_shown(item.parameters.get(name)) for item in (form, partner))
            raise differ(f"{here} has {name}={value}, {there} has {other}")
    shapes = [(form.weight_shape or (), partner.weight_shape or ())]
    for read, other in operands(pruned, form, dense, partner):
        if read and pruned.index.is_constant(read) and dense.index.is_constant(other):
            shapes.append((pruned.index.shape(read), dense.index.shape(other)))
            if _is_another_index(pruned.index, read, dense.index, other) and pruned.sized:
                raise differ(f"{here} reads other integers in '{read}' than {there} in '{other}'")
    for shape, other_shape in map(_without_leading_ones, shapes):
        fits = shape == other_shape if pruned.sized else _lacks_channels(form, shape, other_shape)
        if not fits and max(len(shape), len(other_shape)) > 1:
            raise differ(
                f"{here} has a parameter of shape {shape}, {there} one of shape {other_shape}",
                _cause(shape, other_shape),
            )
    return form, partner


def _suspected(pruned: GraphIndex, dense: GraphIndex, operators: tuple[str, ...]) -> str:
    """What to do about two nodes of different operators, by the operators that the two models have."""
    for is_made, advice in ((is_quantizing, _QUANTIZED), (_is_optimized, _OPTIMIZED)):
        made = {role: _first(index, is_made) for role, index in (("pruned", pruned), ("dense", dense))}
        if sum(map(bool, made.values())) == 1:
            role, node = next((role, node) for role, node in made.items() if node)
            return advice.format(role=role, node=node)
    layers, norms = (
        [sum(is_standard(node, *kinds) for node in index.nodes) for index in (pruned, dense)]
        for kinds in (CONVOLUTIONS, (NORMALIZATION,))
    )
    if layers[0] != layers[1]:
        return (
            f"convolutions: {layers[0]} in the pruned model, {layers[1]} in the dense one, so they seem to be two "
            "networks; give the dense file that the pruned one was made from"
        )
    return _FOLDED if NORMALIZATION in operators and norms[0] != norms[1] else _OTHER_FILE


def _first(index: GraphIndex, is_meant: Callable[[onnx.NodeProto], bool]) -> str:
    """The first node of a kind, with its operator; empty where there is none."""
    nodes = enumerate(index.nodes)
    return next((f"node {index.label(position)} ({node.op_type})" for position, node in nodes if is_meant(node)), "")


def _is_optimized(node: onnx.NodeProto) -> bool:
    return node.domain.startswith("com.microsoft")


def _cause(shape: tuple[int, ...], other: tuple[int, ...]) -> str:
    """What to do about weights of two shapes, of which the dense one may lack channels (axes 0 and 1)."""
    lacks = len(shape) == len(other) and shape[2:] == other[2:] and all(map(le, other, shape))
    return _EXCHANGED if lacks else _OTHER_FILE


def _shown(value: Any) -> Any:
    return "the default" if value in (None, {}, float("inf"), -float("inf")) else value


def _without_leading_ones(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of one length, where the longer one only has ones more."""
    one, other = shapes
    excess = len(one) - len(other)
    if excess > 0 and set(one[:excess]) == {1} and min(len(one), len(other)):
        one = one[excess:]
    elif excess < 0 and set(other[:-excess]) == {1} and min(len(one), len(other)):
        other = other[-excess:]
    return one, other


def _is_another_index(pruned: GraphIndex, name: str, dense: GraphIndex, other: str) -> bool:
    """Whether two constants are integers, which are no weights, and not the same."""
    value, its = pruned.value(name), dense.value(other)
    return value.dtype.kind in "iub" and its.dtype.kind in "iub" and value.tolist() != its.tolist()


def _differing(pruned: Side, position: int, dense: Side, counterpart: int) -> str | None:
    """The parameter in which two nodes of one operator differ, also where shapes are known."""
    form, partner = pruned.form(position), dense.form(counterpart)
    computed = form.is_computed or partner.is_computed
    if not computed and form.operator == partner.operator and form.differing(partner) is None:
        return None
    agree = _shapes_agree(pruned, position, dense, counterpart)
    if form.operator == VIEW:
        if agree is None:
            agree = could_agree(form.parameters["shape"], partner.parameters["shape"])
        return None if agree else "shape"
    resolved, other = pruned.resolved(position), dense.resolved(counterpart)
    name = resolved.differing(other) if resolved.operator == other.operator else "axes"
    if name in ("scales", "sizes", "shape"):
        either = (form.parameters.get(name) is None) != (partner.parameters.get(name) is None)
        name = None if agree or (agree is None and either) else name
    if name is None and computed and agree is False:
        given = (*form.parameters.items(), *partner.parameters.items())
        name = next(key for key, value in given if value == COMPUTED)
    return name


def _shapes_agree(pruned: Side, position: int, dense: Side, counterpart: int) -> bool | None:
    """Whether two nodes that read tensors of one shape make tensors of one shape, except for the number of samples.

    None where that cannot be told.
    """
    shapes = []
    for side, place in ((pruned, position), (dense, counterpart)):
        form = side.form(place)
        shapes.append((side.shape(form.inputs[0]), side.shape(side.index.nodes[place].output[0])))
    (read, made), (other_read, other_made) = shapes
    if read is None or made is None or other_read is None or other_made is None:
        return None
    if made == other_made or not (made and other_made and read and other_read):
        return made == other_made
    return made[1:] == other_made[1:] and made[0] * other_read[0] == other_made[0] * read[0]


def _lacks_channels(form: Form, shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a parameter can be the dense one, or that without some channels."""
    smaller = len(shape) == len(other) and all(map(le, shape, other))
    return smaller and (form.operator[1] not in CONVOLUTIONS or shape[2:] == other[2:])


def captured_pairs(pruned: GraphIndex, position: int, dense: GraphIndex, counterpart: int) -> list[tuple[str, str]]:
    """The outer tensors that the subgraphs of two paired nodes read, pair by pair.

    Raises:
        StructureError: When they read different numbers of them.
    """
    names, dense_names = _captures(pruned.nodes[position]), _captures(dense.nodes[counterpart])
    if len(names) != len(dense_names):
        raise differ(
            f"the subgraphs of node {pruned.label(position)} read {len(names)} outer tensors, those of "
            f"{dense.label(counterpart)} in the dense model read {len(dense_names)}"
        )
    return list(zip(names, dense_names, strict=True))


def _captures(node: onnx.NodeProto) -> list[str]:
    """Outer tensors that a node's subgraphs read, in an order that does not depend on that of the attributes."""
    bodies = sorted((item for item in node.attribute if item.HasField("g")), key=lambda item: str(item.name))
    return [name for item in bodies for name in captured(item.g)]
