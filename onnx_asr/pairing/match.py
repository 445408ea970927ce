"""Pair the nodes of a dense and a pruned model by structure, never by name.

Both graphs are walked backward together from their outputs. Operators, attributes, the order of the inputs and the
shapes of the weights have to agree. Node names, node order, tensor names, where constants are stored, the order of a
sum's or product's operands and whatever ``canonical.py`` reduces to one form may differ, one may lack a bias, and equal
nodes may be one node.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx_asr.graph.index import FLOAT_TYPES, GraphIndex
from onnx_asr.graph.shapes import BATCH, SIDE
from onnx_asr.graph.tensors import dtype_of
from onnx_asr.pairing.canonical import VIEW
from onnx_asr.pairing.comparison import captured_pairs, compare, differ
from onnx_asr.pairing.forms import Form, through
from onnx_asr.pairing.sides import Side, operands
from onnx_asr.pairing.tails import Tail


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
    walk = _Walk(*_sides(pruned, dense))
    walk.run()
    return Pairing(walk.nodes, walk.tensors)


def refoldings(pruned: GraphIndex, dense: GraphIndex) -> list[Refolding]:
    """The layers whose tails have to change in the dense model before the two are one network for :func:`match`.

    Raises:
        StructureError: Naming the first difference that is not one of tails, walking backward from the outputs.
    """
    found: list[Refolding] = []
    _Walk(*_sides(pruned, dense, folded=True), found).run()
    return found


def counterparts(pruned: GraphIndex, dense: GraphIndex) -> tuple[dict[int, int], list[Refolding]]:
    """Pair nodes as :func:`match` does where the pruned model may have fewer channels, and collect tails that differ.

    Raises:
        StructureError: Naming the first difference that is neither, walking backward from the outputs.
    """
    found: list[Refolding] = []
    walk = _Walk(*_sides(pruned, dense, folded=True, sized=False), found)
    walk.run()
    return walk.nodes, found


def _sides(pruned: GraphIndex, dense: GraphIndex, *, folded: bool = False, sized: bool = True) -> tuple[Side, Side]:
    """Both graphs, fed alike: a size that one of them leaves open is that of the other."""
    numbers: dict[tuple[object, ...], int] = {}
    sizes, other_sizes = _sizes(pruned), _sizes(dense)
    sides = (
        Side(index, numbers, {value.name: size for value, size in zip(index.inputs, fed, strict=True)}, folded, sized)
        for index, fed in ((pruned, _filled(sizes, other_sizes)), (dense, _filled(other_sizes, sizes)))
    )
    first, second = sides
    return first, second


def _sizes(index: GraphIndex) -> list[list[int]]:
    """The declared shape of every input, with 0 for what is left open."""
    return [[max(0, dim.dim_value) for dim in value.type.tensor_type.shape.dim] for value in index.inputs]


def _filled(sizes: list[list[int]], others: list[list[int]]) -> list[list[int]]:
    """Shapes whose open sizes are those of others, or usual ones."""
    result = []
    for number, own in enumerate(sizes):
        its = others[number] if number < len(others) and len(others[number]) == len(own) else [0] * len(own)
        usual = [BATCH, *[SIDE] * len(own)]
        result.append([a or b or c for a, b, c in zip(own, its, usual, strict=False)])
    return result


class _Walk:
    """The walk backward through both graphs; ``found``, unless None, collects tails that differ."""

    def __init__(self, pruned: Side, dense: Side, found: list[Refolding] | None = None) -> None:
        self.pruned, self.dense, self.found = pruned, dense, found
        self.nodes: dict[int, int] = {}
        self.tensors: dict[str, str] = {}
        self._visited: dict[int, int] = {}
        self._partners: dict[int, int] = {}
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
        if not name and not dense_name:  # an optional input that both leave out
            return []
        pruned, dense = self.pruned.index, self.dense.index
        source, dense_source = through(pruned, name), through(dense, dense_name)
        self.tensors[name], self.tensors[source] = dense_name, dense_source
        number, dense_number = self._inputs[0].get(source), self._inputs[1].get(dense_source)
        constants = [pruned.is_constant(source), dense.is_constant(dense_source)]
        if number is not None and number == dense_number:
            return []
        if any(constants):
            if not all(constants) and not (self.pruned.is_fixed(source) and self.dense.is_fixed(dense_source)):
                raise differ(f"'{source}' ('{dense_source}' in the dense model) is a constant in only one of them")
            return []
        for side, other, mine, its in (
            (self.pruned, self.dense, source, dense_source),
            (self.dense, self.pruned, dense_source, source),
        ):
            inner = side.unchanged(mine)
            if inner is not None and _operator(other, its) != VIEW:
                return [(inner, dense_name) if side is self.pruned else (name, inner)]
        if number is not None or dense_number is not None:
            raise differ(f"the pruned model has tensor '{source}' where the dense model has '{dense_source}'")
        if source not in pruned.producer or dense_source not in dense.producer:
            raise differ(f"'{source}' ('{dense_source}' in the dense model) is produced in only one of them")
        if self.pruned.place(source) != self.dense.place(dense_source):
            raise differ(f"the pruned model has tensor '{source}' where the dense model has '{dense_source}'")
        return self._pair(pruned.producer[source], dense.producer[dense_source])

    def _pair(self, position: int, counterpart: int) -> list[tuple[str, str]]:
        if self.found is not None:
            position, counterpart = self._layers(position, counterpart)
        if position in self._visited:
            self._check_same(self.dense, self._visited[position], counterpart, position)
            return []
        if counterpart in self._partners:
            self._check_same(self.pruned, self._partners[counterpart], position, counterpart)
        self._visited[position] = counterpart
        self._partners.setdefault(counterpart, position)
        form, partner = compare(self.pruned, position, self.dense, counterpart)
        self._record(position, form, counterpart, partner)
        captured = captured_pairs(self.pruned.index, position, self.dense.index, counterpart)
        return [*operands(self.pruned, form, self.dense, partner), *captured]

    def _check_same(self, side: Side, one: int, two: int, position: int) -> None:
        """Two nodes of one model can only correspond to one node of the other if they compute the same."""
        if one != two and not side.same(one, two):
            other = self.pruned if side is self.dense else self.dense
            where, there = ("the pruned", "the dense") if side is self.dense else ("the dense", "the pruned")
            raise differ(
                f"node {other.index.label(position)} of {where} model corresponds to both {side.index.label(one)} and "
                f"{side.index.label(two)} of {there} one"
            )

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


def _operator(side: Side, name: str) -> tuple[str, str] | None:
    position = side.index.producer.get(name)
    return None if position is None else side.form(position).operator


def _compare_interfaces(pruned: GraphIndex, dense: GraphIndex) -> None:
    """Numbers of inputs and outputs, and types of inputs, have to agree."""
    if len(pruned.outputs) != len(dense.outputs):
        raise differ(f"the pruned model has {len(pruned.outputs)} outputs, the dense model {len(dense.outputs)}")
    if len(pruned.inputs) != len(dense.inputs):
        raise differ(f"the pruned model has {len(pruned.inputs)} inputs, the dense model {len(dense.inputs)}")
    for value, other_value in zip(pruned.inputs, dense.inputs, strict=True):
        types = [item.type.tensor_type.elem_type for item in (value, other_value)]
        if types[0] != types[1] and not FLOAT_TYPES.issuperset(types):
            first, second = (dtype_of(item, f"input '{value.name}'").name for item in types)
            raise differ(f"input '{value.name}' is {first}, '{other_value.name}' in the dense model is {second}")
