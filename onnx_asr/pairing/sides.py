"""One of two graphs that are paired, and what is asked about its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations

import numpy as np

from onnx_asr.arrays import Array
from onnx_asr.errors import ModelError, OptionError
from onnx_asr.graph.index import GraphIndex, is_standard, subgraphs
from onnx_asr.graph.layers import CONVOLUTIONS, Layer
from onnx_asr.graph.shapes import Shape, typical_shapes
from onnx_asr.pairing.canonical import MEAN, VIEW, form_of
from onnx_asr.pairing.forms import Form, through
from onnx_asr.pairing.resolving import resolved
from onnx_asr.pairing.tails import Tail, tail_of

_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
_MOST_ORDERS = 4  # operands of one structure whose orders are all tried
_LAYERS_COMPARED = 12  # behind an operand, to tell it from another of the same structure


@dataclass(frozen=True)
class Side:
    """One of the two graphs.

    Attributes:
        index: The graph.
        numbers: Numbers of the structures met so far in both graphs.
        fed: Shapes of the inputs.
        folded: Whether a tail's structure is that of its layer alone.
        sized: Whether numbers of channels matter.
    """

    index: GraphIndex
    numbers: dict[tuple[object, ...], int]
    fed: Mapping[str, Sequence[int]]
    folded: bool = False
    sized: bool = True
    _forms: dict[int, Form] = field(default_factory=dict)
    _structures: dict[str, int] = field(default_factory=dict)
    _fixed: dict[str, bool] = field(default_factory=dict)

    def form(self, position: int) -> Form:
        """A node's form."""
        if position not in self._forms:
            self._forms[position] = form_of(self.index, position)
        return self._forms[position]

    def resolved(self, position: int) -> Form:
        """A node's form with nothing left to the shape of its data, where that is known."""
        form = self.form(position)
        shape = self.shape(form.inputs[0]) if form.inputs else None
        if shape is None:
            return form
        if form.operator == VIEW:
            return self._resolved_view(form, shape, position)
        weight = form.inputs[1] if len(form.inputs) > 1 and form.inputs[1] else ""
        kernel = self.index.shape(weight)[2:] if weight and self.index.is_constant(weight) else ()
        return resolved(form, shape, kernel)

    def _resolved_view(self, form: Form, shape: Shape, position: int) -> Form:
        """The mean over all places where only samples and channels are left of it."""
        pool = self.index.producer.get(form.inputs[0])
        if pool is None or len(shape) < 3 or self.shape(self.index.nodes[position].output[0]) != shape[:2]:
            return form
        mean = self.resolved(pool)
        if mean.operator != MEAN or mean.parameters:
            return form
        return replace(mean, parameters={"flattened": 1}, node=position, bias=position)

    def tail(self, position: int) -> Tail | None:
        """The tail that ends with a node."""
        return tail_of(self.index, self.form, position)

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor for a typical input; None where it cannot be inferred."""
        return self._shapes.get(name)

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        try:
            return typical_shapes(self.index, self.fed)
        except (ModelError, OptionError):
            return {}

    def place(self, name: str) -> int | None:
        """Which output of its node a tensor is."""
        position = self.index.producer.get(name)
        return None if position is None else list(self.index.nodes[position].output).index(name)

    def unchanged(self, name: str) -> str | None:
        """What a reshape reads that makes a tensor, where its data have that shape already; None for anything else."""
        position = self.index.producer.get(name)
        if position is None or self.form(position).operator != VIEW:
            return None
        read = self.form(position).inputs[0]
        return read if self.shape(read) is not None and self.shape(read) == self.shape(name) else None

    def _behind_unchanged(self, name: str) -> str:
        """The tensor behind all nodes that change neither its values nor its shape."""
        name = through(self.index, name)
        while (inner := self.unchanged(name)) is not None:
            name = through(self.index, inner)
        return name

    def is_fixed(self, name: str) -> bool:
        """Whether a tensor depends on nothing but constants and the shapes of others."""
        stack = [name]
        while stack:
            top = stack[-1]
            position = self.index.producer.get(top)
            if top in self._fixed:
                stack.pop()
            elif self.index.is_constant(top):
                self._fixed[top] = True
            elif position is None:
                self._fixed[top] = False
            else:
                node = self.index.nodes[position]
                reads = [] if is_standard(node, "Shape", "Size") else [item for item in node.input if item]
                if is_standard(node, *_RANDOM) or any(True for _ in subgraphs(node)):
                    self._fixed[top] = False
                elif all(read in self._fixed for read in reads):
                    self._fixed[top] = all(self._fixed[read] for read in reads)
                else:
                    stack.extend(read for read in reads if read not in self._fixed)
        return self._fixed[name]

    def same(self, position: int, other: int) -> bool:
        """Whether two nodes of this graph compute the same: simplifiers keep one of them."""
        stack = [(position, other)]
        compared = set()
        while stack:
            one, two = stack.pop()
            if one == two or (one, two) in compared:
                continue
            compared.add((one, two))
            form, partner = self.form(one), self.form(two)
            if form.operator != partner.operator or len(form.inputs) != len(partner.inputs):
                return False
            if not self._parameters_agree(one, two) or any(subgraphs(self.index.nodes[one])):
                return False
            reads, others = self._reads(form), self._reads(partner)
            if len(reads) != len(others):
                return False
            if form.commutative:
                reads, others = (sorted(names, key=self._rank) for names in (reads, others))
            for first, second in zip(reads, others, strict=True):
                left, right = self._behind_unchanged(first), self._behind_unchanged(second)
                if left == right:
                    continue
                if self.index.is_constant(left) and self.index.is_constant(right):
                    if not np.array_equal(self.index.value(left), self.index.value(right)):
                        return False
                elif (place := self.place(left)) is not None and place == self.place(right):
                    stack.append((self.index.producer[left], self.index.producer[right]))
                else:
                    return False
        return True

    def _parameters_agree(self, one: int, two: int) -> bool:
        """Whether two nodes of one operator have the same parameters, and reshapes lead to one shape."""
        form, partner = self.form(one), self.form(two)
        if form.operator == VIEW:
            shapes = [self.shape(self.index.nodes[place].output[0]) for place in (one, two)]
            return shapes[0] is not None and shapes[0] == shapes[1]
        if form.is_computed:
            return False
        return form.parameters == partner.parameters or self.resolved(one).parameters == self.resolved(two).parameters

    def _rank(self, name: str) -> tuple[int, str]:
        """Sorts the operands of a sum or product."""
        return self.structure(name), through(self.index, name)

    def _reads(self, form: Form) -> list[str]:
        """All inputs of a form, those of its layer with their parameters."""
        if form.node == form.bias and form.weight_shape is None and not self._is_convolution(form):
            return [name for name in form.inputs if name]
        positions = sorted({form.node, form.bias})
        made = {output for position in positions for output in self.index.nodes[position].output}
        names = [name for position in positions for name in self.index.nodes[position].input if name]
        return [name for name in names if name not in made]

    def _is_convolution(self, form: Form) -> bool:
        return is_standard(self.index.nodes[form.node], *CONVOLUTIONS)

    def structure(self, name: str) -> int:
        """A number that two tensors share when they are computed by the same operators with weights of equal shapes."""
        if not self._structures:
            self._structures.update((value.name, self._number("input", i)) for i, value in enumerate(self.index.inputs))
            for position, node in enumerate(self.index.nodes):
                number = self._node_number(position)
                for i, output in enumerate(node.output):
                    self._structures[output] = self._number("output", number, i) if i else number
        return self._known(name)

    def _node_number(self, position: int) -> int:
        form, tail = self.form(position), self.tail(position) if self.folded else None
        if tail is not None and tail.nodes:
            return self._structures[tail.layer_end]
        if form.operator == VIEW:  # which may be one that changes nothing
            return self._known(form.inputs[0])
        operands = [self._known(operand) for operand in form.inputs]
        if form.commutative:
            operands.sort()
        return self._number(form.operator, form.weight_shape if self.sized else None, *operands)

    def _known(self, name: str) -> int:
        name = through(self.index, name)
        if self.index.is_constant(name):
            shape = self.index.shape(name)
            if self.sized:
                plain = shape[next((axis for axis, size in enumerate(shape) if size != 1), len(shape)) :]
                return self._number("constant", plain if len(plain) > 1 else None)
            return self._number("constant", None if len(shape) < 2 else shape[2:] if len(shape) > 3 else len(shape))
        return self._structures.get(name, -1)

    def _number(self, *key: object) -> int:
        return self.numbers.setdefault(key, len(self.numbers))


def operands(pruned: Side, form: Form, dense: Side, partner: Form) -> list[tuple[str, str]]:
    """The inputs of two paired nodes, pair by pair; those of a sum or product by structure.

    Among inputs of one structure the order is the one in which their weights and parameters are most alike.
    """
    names, dense_names = form.inputs, partner.inputs
    if not form.commutative:
        return list(zip(names, dense_names, strict=True))
    left, right = sorted(names, key=pruned.structure), sorted(dense_names, key=dense.structure)
    numbers = [pruned.structure(name) for name in left]
    if numbers != [dense.structure(name) for name in right]:
        return list(zip(names, dense_names, strict=True))
    pairs: list[tuple[str, str]] = []
    for number in dict.fromkeys(numbers):
        alike = [name for name, own in zip(left, numbers, strict=True) if own == number]
        others = [name for name, own in zip(right, numbers, strict=True) if own == number]
        if 1 < len(alike) <= _MOST_ORDERS:
            orders = [list(order) for order in permutations(others)]
            others = max(orders, key=lambda order: _likeness(pruned, alike, dense, order))
        pairs.extend(zip(alike, others, strict=True))
    return pairs


def _likeness(pruned: Side, names: Sequence[str], dense: Side, others: Sequence[str]) -> float:
    """How alike the weights are that two groups of tensors are computed with, less the parameters that differ.

    In a wrong pairing the cosine between a pruned weight and the dense one is about 0.
    """
    return sum(_alike(pruned, name, dense, other) for name, other in zip(names, others, strict=True))


def _alike(pruned: Side, name: str, dense: Side, dense_name: str) -> float:
    score, weights = 0.0, 0
    queue, seen = [(name, dense_name)], set()
    while queue and weights < _LAYERS_COMPARED:
        one, two = queue.pop(0)
        source, dense_source = _behind_views(pruned, one), _behind_views(dense, two)
        if pruned.index.is_constant(source) and dense.index.is_constant(dense_source):
            weights += 1
            score += _cosine(pruned.index.value(source), dense.index.value(dense_source))
            continue
        position, counterpart = pruned.index.producer.get(source), dense.index.producer.get(dense_source)
        if position is None or counterpart is None or (position, counterpart) in seen:
            score -= source != dense_source and (position is None) != (counterpart is None)
            continue
        seen.add((position, counterpart))
        if pruned.folded:
            tail, dense_tail = pruned.tail(position), dense.tail(counterpart)
            if tail is not None and dense_tail is not None:
                position, counterpart = tail.form.bias, dense_tail.form.bias
        form, partner = pruned.form(position), dense.form(counterpart)
        if form.operator != partner.operator or len(form.inputs) != len(partner.inputs):
            score -= 1
            continue
        score -= form.differing(partner) is not None
        if form.weight_shape is not None:
            score += _cosine(_rows(pruned.index, form), _rows(dense.index, partner))
        queue.extend((read, other) for read, other in zip(form.inputs, partner.inputs, strict=True) if read and other)
    return score


def _behind_views(side: Side, name: str) -> str:
    """The tensor behind everything that changes no value, reshapes included."""
    name = through(side.index, name)
    while (inner := side.unchanged(name)) is not None:
        name = through(side.index, inner)
    return name


def _rows(index: GraphIndex, form: Form) -> Array:
    """The weight of a fully connected layer, outputs first."""
    layer = Layer.of(index, form.node)
    assert isinstance(layer, Layer), "it has a form with a weight"
    return layer.layout.to_rows(index.value(index.nodes[form.node].input[layer.weight_slot]))


def _cosine(one: Array, other: Array) -> float:
    """Cosine of the angle between two constants of one size; 0 for others, and whether they agree for integers."""
    if one.size != other.size:
        return 0.0
    if one.dtype.kind in "iub":
        return float(np.array_equal(one.ravel(), other.ravel()))
    left, right = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    norm = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / norm if norm else 0.0
