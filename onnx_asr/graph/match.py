"""Pair the nodes of a dense and a pruned model by structure, never by name.

Both graphs are walked backward together from their outputs; operators, attributes, the order of the inputs and the
shapes of the weights have to agree. A bias may be missing in one; node names, node order, tensor names, the place where
constants are stored, the order of a sum's or product's operands, and what ``graph/forms.py`` sees as one form, may
differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx

from onnx_asr.errors import StructureError
from onnx_asr.graph.forms import Form, form_of
from onnx_asr.graph.index import FLOAT_TYPES, GraphIndex, attribute, captured, is_standard
from onnx_asr.graph.tensors import dtype_of

_TRANSPARENT = ("Identity", "Dropout")


@dataclass(frozen=True)
class Pairing:
    """Which dense node and tensor stand where a pruned one does."""

    nodes: dict[int, int]
    tensors: dict[str, str]


def match(pruned: GraphIndex, dense: GraphIndex) -> Pairing:
    """Pair two models that are the same network with other weights.

    Raises:
        StructureError: Naming the first difference, walking backward from the outputs.
    """
    _compare_interfaces(pruned, dense)
    pruned_inputs = {value.name: position for position, value in enumerate(pruned.inputs)}
    dense_inputs = {value.name: position for position, value in enumerate(dense.inputs)}
    shapes: dict[tuple[object, ...], int] = {}
    mine, its = _Side(pruned, shapes), _Side(dense, shapes)
    visited: dict[int, int] = {}
    nodes: dict[int, int] = {}
    tensors: dict[str, str] = {}
    stack = list(zip(pruned.outputs, dense.outputs, strict=True))
    while stack:
        name, other = stack.pop()
        source, twin = _through(pruned, name), _through(dense, other)
        tensors[name], tensors[source] = other, twin
        if source in pruned_inputs or twin in dense_inputs:
            if pruned_inputs.get(source) != dense_inputs.get(twin):
                raise _differ(f"tensor '{source}' of the pruned one stands where the dense one has '{twin}'")
            continue
        if pruned.is_constant(source) or dense.is_constant(twin):
            if pruned.is_constant(source) != dense.is_constant(twin):
                raise _differ(f"'{source}' ('{twin}' in the dense one) is a constant in only one of them")
            continue
        if source not in pruned.producer or twin not in dense.producer:
            raise _differ(f"'{source}' ('{twin}' in the dense one) is produced in only one of them")
        position, counterpart = pruned.producer[source], dense.producer[twin]
        if position in visited:
            if visited[position] != counterpart:
                raise _differ(
                    f"node {pruned.label(position)} corresponds to both {dense.label(visited[position])} and "
                    f"{dense.label(counterpart)}"
                )
            continue
        visited[position] = counterpart
        form, partner = mine.form(position), its.form(counterpart)
        _compare(mine, position, its, counterpart)
        nodes |= {position: counterpart, form.bias: partner.bias, form.node: partner.node}
        tensors.update(zip(pruned.nodes[position].output, dense.nodes[counterpart].output, strict=False))
        if form.node != position and partner.node != counterpart:
            tensors.update(zip(pruned.nodes[form.node].output, dense.nodes[partner.node].output, strict=True))
        stack.extend(_operands(mine, form, its, partner))
        stack.extend(_captured(pruned, position, dense, counterpart))
    return Pairing(nodes, tensors)


def _compare_interfaces(pruned: GraphIndex, dense: GraphIndex) -> None:
    """Numbers of inputs and outputs, and types of inputs, have to agree."""
    if len(pruned.outputs) != len(dense.outputs):
        raise _differ(f"the pruned one has {len(pruned.outputs)} outputs, the dense one {len(dense.outputs)}")
    if len(pruned.inputs) != len(dense.inputs):
        raise _differ(f"the pruned one has {len(pruned.inputs)} inputs, the dense one {len(dense.inputs)}")
    for value, other_value in zip(pruned.inputs, dense.inputs, strict=True):
        types = [item.type.tensor_type.elem_type for item in (value, other_value)]
        if types[0] != types[1] and not FLOAT_TYPES.issuperset(types):
            first, second = (dtype_of(item, f"input '{value.name}'").name for item in types)
            raise _differ(f"input '{value.name}' is of type {first}, '{other_value.name}' in the dense one {second}")


@dataclass(frozen=True)
class _Side:
    """One of the two graphs.

    Attributes:
        index: The graph.
        shapes: Numbers the structures met so far, in both graphs.
    """

    index: GraphIndex
    shapes: dict[tuple[object, ...], int]
    _forms: dict[int, Form] = field(default_factory=dict)
    _structures: dict[str, int] = field(default_factory=dict)

    def form(self, position: int) -> Form:
        """A node's form."""
        if position not in self._forms:
            self._forms[position] = form_of(self.index, position)
        return self._forms[position]

    def structure(self, name: str) -> int:
        """A number that two tensors share where operators and weight shapes on the way from the inputs are the same."""
        if not self._structures:
            self._structures.update((value.name, self._number("input", i)) for i, value in enumerate(self.index.inputs))
            for position, node in enumerate(self.index.nodes):
                form = self.form(position)
                operands = [self._known(operand) for operand in form.inputs]
                if form.commutative:
                    operands.sort()
                number = self._number(form.operator, form.weight_shape, *operands)
                self._structures.update((output, number) for output in node.output)
        return self._known(name)

    def _known(self, name: str) -> int:
        name = _through(self.index, name)
        if self.index.is_constant(name):
            shape = self.index.value(name).shape
            return self._number("constant", shape if len(shape) > 1 else None)
        return self._structures.get(name, -1)

    def _number(self, *key: object) -> int:
        return self.shapes.setdefault(key, len(self.shapes))


def _operands(mine: _Side, form: Form, its: _Side, partner: Form) -> Iterator[tuple[str, str]]:
    """The inputs of two paired nodes, pair by pair; those of a sum or product by structure where that tells them."""
    own, other = form.inputs, partner.inputs
    if form.commutative:
        left, right = sorted(own, key=mine.structure), sorted(other, key=its.structure)
        if [mine.structure(name) for name in left] == [its.structure(name) for name in right]:
            own, other = left, right
    return zip(own, other, strict=True)


def _differ(what: str) -> StructureError:
    return StructureError(
        f"the dense and the pruned model are not the same network: {what}; give the dense file that the pruned one "
        "was made from, exported the same way (both with BatchNormalization kept, or both folded)"
    )


def _through(index: GraphIndex, name: str) -> str:
    """The tensor behind any Identity, inference-time Dropout, or Cast to a floating-point type."""
    while name in index.producer:
        node = index.nodes[index.producer[name]]
        casts = is_standard(node, "Cast") and attribute(node, "to", None) in FLOAT_TYPES
        if node.output[0] != name or not (casts or is_standard(node, *_TRANSPARENT)):
            break
        name = node.input[0]
    return name


def _compare(mine: _Side, position: int, its: _Side, counterpart: int) -> None:
    pruned, dense = mine.index, its.index
    form, partner = mine.form(position), its.form(counterpart)
    here = f"node {pruned.label(position)} ({pruned.nodes[position].op_type})"
    there = f"{dense.label(counterpart)} ({dense.nodes[counterpart].op_type})"
    if form.operator != partner.operator:
        raise _differ(f"{here} stands where the dense one has {there}")
    if len(form.inputs) != len(partner.inputs):
        raise _differ(f"{here} has {len(form.inputs)} inputs, {there} in the dense one has {len(partner.inputs)}")
    name = form.differing(partner)
    if name is not None:
        own, other = (side.parameters.get(name) or "the default" for side in (form, partner))
        raise _differ(f"{here} has {name}={own}, {there} in the dense one {other}")
    shapes = [(form.weight_shape, partner.weight_shape)]
    for read, twin in _operands(mine, form, its, partner):
        if pruned.is_constant(read) and dense.is_constant(twin):
            shapes.append((pruned.value(read).shape, dense.value(twin).shape))
    for shape, other_shape in shapes:
        if shape != other_shape and max(len(shape or ()), len(other_shape or ())) > 1:
            raise _differ(
                f"{here} has a parameter of shape {shape}, {there} in the dense one {other_shape} (which channels are "
                "left is known only of models that prune or shrink made smaller)"
            )


def _captured(pruned: GraphIndex, position: int, dense: GraphIndex, counterpart: int) -> list[tuple[str, str]]:
    """What the control-flow bodies of two paired nodes read from outside themselves, pair by pair."""
    mine, its = _captures(pruned.nodes[position]), _captures(dense.nodes[counterpart])
    if len(mine) != len(its):
        raise _differ(
            f"the subgraphs of node {pruned.label(position)} read {len(mine)} outer tensors, those of "
            f"{dense.label(counterpart)} in the dense one {len(its)}"
        )
    return list(zip(mine, its, strict=True))


def _captures(node: onnx.NodeProto) -> list[str]:
    """Outer tensors that a node's subgraphs read, in an order that does not depend on that of the attributes."""
    bodies = sorted((item for item in node.attribute if item.HasField("g")), key=lambda item: str(item.name))
    return [name for item in bodies for name in captured(item.g)]
