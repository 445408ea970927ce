"""Pair the nodes of a dense and a pruned model by structure, never by name.

Both graphs are walked backward together from their outputs. Operators, attributes, the order of the inputs and the
shapes of the weights have to agree. Node names, node order, tensor names, where constants are stored, the order of a
sum's or product's operands and whatever ``canonical.py`` reduces to one form may differ, and one may lack a bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import le

import onnx

from onnx_asr.channels.units import KEPT_CHANNELS
from onnx_asr.errors import StructureError
from onnx_asr.graph.index import FLOAT_TYPES, GraphIndex, captured, is_standard
from onnx_asr.graph.layers import NORMALIZATION
from onnx_asr.graph.tensors import dtype_of
from onnx_asr.pairing.canonical import Form, form_of, through
from onnx_asr.pairing.tails import Tail, tail_of

_OTHER_FILE = "give the dense file that the pruned one was made from, exported the same way"
_FOLDED = (
    "a tool seems to have folded BatchNormalization in only one of them: fold it in both or in neither, or give the "
    "dense file that the pruned one was made from"
)
_UNRECORDED = (
    f"the pruned model is smaller but has no record of the channels it kept ('{KEPT_CHANNELS}' in metadata_props): "
    "if a tool dropped it after prune or shrink, copy that entry back; if another tool removed the channels, the two "
    "models cannot be paired; else give the dense file that the pruned one was made from"
)


@dataclass(frozen=True)
class Pairing:
    """The dense node and tensor that correspond to each pruned one."""

    nodes: dict[int, int]
    tensors: dict[str, str]


@dataclass(frozen=True)
class Refolding:
    """A layer with one tail in the pruned network and another in the dense one."""

    pruned: Tail
    dense: Tail


def match(pruned: GraphIndex, dense: GraphIndex) -> Pairing:
    """Pair two models that are the same network with different weights.

    Raises:
        StructureError: Naming the first difference, walking backward from the outputs.
    """
    shapes: dict[tuple[object, ...], int] = {}
    walk = _Walk(_Side(pruned, shapes), _Side(dense, shapes))
    walk.run()
    return Pairing(walk.nodes, walk.tensors)


def refoldings(pruned: GraphIndex, dense: GraphIndex) -> list[Refolding]:
    """The layers whose tails have to change in the dense model before the two are one network for :func:`match`.

    Raises:
        StructureError: Naming the first difference that is not one of tails, walking backward from the outputs.
    """
    shapes: dict[tuple[object, ...], int] = {}
    found: list[Refolding] = []
    _Walk(_Side(pruned, shapes, folded=True), _Side(dense, shapes, folded=True), found).run()
    return found


class _Walk:
    """The walk backward through both graphs; ``found``, unless None, collects tails that differ."""

    def __init__(self, pruned: _Side, dense: _Side, found: list[Refolding] | None = None) -> None:
        self.pruned, self.dense, self.found = pruned, dense, found
        self.nodes: dict[int, int] = {}
        self.tensors: dict[str, str] = {}
        self._visited: dict[int, int] = {}
        self._inputs = [{value.name: i for i, value in enumerate(side.index.inputs)} for side in (pruned, dense)]

    def run(self) -> None:
        """Pair everything that the outputs depend on."""
        pruned, dense = self.pruned.index, self.dense.index
        _compare_interfaces(pruned, dense)
        stack = list(zip(pruned.outputs, dense.outputs, strict=True))
        while stack:
            stack.extend(self._step(*stack.pop()))

    def _step(self, name: str, dense_name: str) -> list[tuple[str, str]]:
        """Pair two tensors and the nodes that make them; return the tensors that these read, pair by pair."""
        pruned, dense = self.pruned.index, self.dense.index
        source, dense_source = through(pruned, name), through(dense, dense_name)
        self.tensors[name], self.tensors[source] = dense_name, dense_source
        number, dense_number = self._inputs[0].get(source), self._inputs[1].get(dense_source)
        if number is not None or dense_number is not None:
            if number != dense_number:
                raise _differ(f"the pruned model has tensor '{source}' where the dense model has '{dense_source}'")
            return []
        if pruned.is_constant(source) or dense.is_constant(dense_source):
            if pruned.is_constant(source) != dense.is_constant(dense_source):
                raise _differ(f"'{source}' ('{dense_source}' in the dense model) is a constant in only one of them")
            return []
        if source not in pruned.producer or dense_source not in dense.producer:
            raise _differ(f"'{source}' ('{dense_source}' in the dense model) is produced in only one of them")
        return self._pair(pruned.producer[source], dense.producer[dense_source])

    def _pair(self, position: int, counterpart: int) -> list[tuple[str, str]]:
        if self.found is not None:
            position, counterpart = self._layers(position, counterpart)
        if position in self._visited:
            if self._visited[position] != counterpart:
                raise _differ(
                    f"node {self.pruned.index.label(position)} corresponds to both "
                    f"{self.dense.index.label(self._visited[position])} and {self.dense.index.label(counterpart)}"
                )
            return []
        self._visited[position] = counterpart
        form, partner = self.pruned.form(position), self.dense.form(counterpart)
        _compare(self.pruned, position, self.dense, counterpart)
        self._record(position, form, counterpart, partner)
        captured = _captured(self.pruned.index, position, self.dense.index, counterpart)
        return [*_operands(self.pruned, form, self.dense, partner), *captured]

    def _layers(self, position: int, counterpart: int) -> tuple[int, int]:
        """Where tails differ, the ends of their layers; else the nodes themselves."""
        assert self.found is not None
        if self.pruned.form(position).operator == self.dense.form(counterpart).operator:
            return position, counterpart
        tail, dense_tail = self.pruned.tail(position), self.dense.tail(counterpart)
        if tail is None or dense_tail is None:
            return position, counterpart
        if all(tail.end != other.pruned.end for other in self.found):
            self.found.append(Refolding(tail, dense_tail))
        return tail.form.bias, dense_tail.form.bias

    def _record(self, position: int, form: Form, counterpart: int, partner: Form) -> None:
        nodes, dense_nodes = self.pruned.index.nodes, self.dense.index.nodes
        self.nodes |= {position: counterpart, form.bias: partner.bias, form.node: partner.node}
        self.tensors.update(zip(nodes[position].output, dense_nodes[counterpart].output, strict=False))
        if form.node != position and partner.node != counterpart:
            self.tensors.update(zip(nodes[form.node].output, dense_nodes[partner.node].output, strict=True))


def _compare_interfaces(pruned: GraphIndex, dense: GraphIndex) -> None:
    """Numbers of inputs and outputs, and types of inputs, have to agree."""
    if len(pruned.outputs) != len(dense.outputs):
        raise _differ(f"the pruned model has {len(pruned.outputs)} outputs, the dense model {len(dense.outputs)}")
    if len(pruned.inputs) != len(dense.inputs):
        raise _differ(f"the pruned model has {len(pruned.inputs)} inputs, the dense model {len(dense.inputs)}")
    for value, other_value in zip(pruned.inputs, dense.inputs, strict=True):
        types = [item.type.tensor_type.elem_type for item in (value, other_value)]
        if types[0] != types[1] and not FLOAT_TYPES.issuperset(types):
            first, second = (dtype_of(item, f"input '{value.name}'").name for item in types)
            raise _differ(f"input '{value.name}' is {first}, '{other_value.name}' in the dense model is {second}")


@dataclass(frozen=True)
class _Side:
    """One of the two graphs.

    Attributes:
        shapes: Numbers of the structures met so far in both graphs.
        folded: Whether a tail's structure is that of its layer alone.
    """

    index: GraphIndex
    shapes: dict[tuple[object, ...], int]
    folded: bool = False
    _forms: dict[int, Form] = field(default_factory=dict)
    _structures: dict[str, int] = field(default_factory=dict)

    def form(self, position: int) -> Form:
        """A node's form."""
        if position not in self._forms:
            self._forms[position] = form_of(self.index, position)
        return self._forms[position]

    def tail(self, position: int) -> Tail | None:
        """The tail that ends with a node."""
        return tail_of(self.index, self.form, position)

    def structure(self, name: str) -> int:
        """A number that two tensors share when they are computed by the same operators with weights of equal shapes."""
        if not self._structures:
            self._structures.update((value.name, self._number("input", i)) for i, value in enumerate(self.index.inputs))
            for position, node in enumerate(self.index.nodes):
                number = self._node_number(position)
                self._structures.update((output, number) for output in node.output)
        return self._known(name)

    def _node_number(self, position: int) -> int:
        form, tail = self.form(position), self.tail(position) if self.folded else None
        if tail is not None and tail.nodes:
            return self._structures[tail.layer_end]
        operands = [self._known(operand) for operand in form.inputs]
        if form.commutative:
            operands.sort()
        return self._number(form.operator, form.weight_shape, *operands)

    def _known(self, name: str) -> int:
        name = through(self.index, name)
        if self.index.is_constant(name):
            shape = self.index.shape(name)
            return self._number("constant", shape if len(shape) > 1 else None)
        return self._structures.get(name, -1)

    def _number(self, *key: object) -> int:
        return self.shapes.setdefault(key, len(self.shapes))


def _operands(pruned: _Side, form: Form, dense: _Side, dense_form: Form) -> Iterator[tuple[str, str]]:
    """The inputs of two paired nodes, pair by pair; those of a sum or product by structure if that is unambiguous."""
    names, dense_names = form.inputs, dense_form.inputs
    if form.commutative:
        left, right = sorted(names, key=pruned.structure), sorted(dense_names, key=dense.structure)
        if [pruned.structure(name) for name in left] == [dense.structure(name) for name in right]:
            names, dense_names = left, right
    return zip(names, dense_names, strict=True)


def _differ(difference: str, advice: str = _OTHER_FILE) -> StructureError:
    return StructureError(f"the dense and the pruned model are not the same network: {difference}; {advice}")


def _compare(pruned: _Side, position: int, dense: _Side, counterpart: int) -> None:
    form, dense_form = pruned.form(position), dense.form(counterpart)
    here = f"{pruned.index.label(position)} ({pruned.index.nodes[position].op_type})"
    there = f"{dense.index.label(counterpart)} ({dense.index.nodes[counterpart].op_type})"
    if form.operator != dense_form.operator:
        counts = [sum(is_standard(node, NORMALIZATION) for node in side.index.nodes) for side in (pruned, dense)]
        folded = NORMALIZATION in form.operator + dense_form.operator and counts[0] != counts[1]
        raise _differ(
            f"the pruned model has node {here} where the dense model has {there}", _FOLDED if folded else _OTHER_FILE
        )
    here, there = f"node {here}", f"{there} in the dense model"
    if len(form.inputs) != len(dense_form.inputs):
        raise _differ(f"{here} has {len(form.inputs)} inputs, {there} has {len(dense_form.inputs)}")
    name = form.differing(dense_form)
    if name is not None:
        value, dense_value = (item.parameters.get(name) or "the default" for item in (form, dense_form))
        raise _differ(f"{here} has {name}={value}, {there} has {dense_value}")
    shapes = [(form.weight_shape or (), dense_form.weight_shape or ())]
    for read, dense_read in _operands(pruned, form, dense, dense_form):
        if pruned.index.is_constant(read) and dense.index.is_constant(dense_read):
            shapes.append((pruned.index.shape(read), dense.index.shape(dense_read)))
    for shape, dense_shape in shapes:
        if shape != dense_shape and max(len(shape), len(dense_shape)) > 1:
            raise _differ(
                f"{here} has a parameter of shape {shape}, {there} one of shape {dense_shape}",
                _UNRECORDED if _lost_channels(pruned.index, shape, dense_shape) else _OTHER_FILE,
            )


def _lost_channels(pruned: GraphIndex, shape: tuple[int, ...], dense_shape: tuple[int, ...]) -> bool:
    """Whether a weight looks like the dense one without some channels (axes 0 and 1), and no record says which."""
    smaller = len(shape) == len(dense_shape) and shape[2:] == dense_shape[2:] and all(map(le, shape, dense_shape))
    return smaller and all(entry.key != KEPT_CHANNELS for entry in pruned.model.metadata_props)


def _captured(pruned: GraphIndex, position: int, dense: GraphIndex, counterpart: int) -> list[tuple[str, str]]:
    """The outer tensors that the subgraphs of two paired nodes read, pair by pair."""
    names, dense_names = _captures(pruned.nodes[position]), _captures(dense.nodes[counterpart])
    if len(names) != len(dense_names):
        raise _differ(
            f"the subgraphs of node {pruned.label(position)} read {len(names)} outer tensors, those of "
            f"{dense.label(counterpart)} in the dense model read {len(dense_names)}"
        )
    return list(zip(names, dense_names, strict=True))


def _captures(node: onnx.NodeProto) -> list[str]:
    """Outer tensors that a node's subgraphs read, in an order that does not depend on that of the attributes."""
    bodies = sorted((item for item in node.attribute if item.HasField("g")), key=lambda item: str(item.name))
    return [name for item in bodies for name in captured(item.g)]
