"""Pair random networks with other spellings of themselves, and with networks that are slightly different.

    python -m tools.check.pairs --count 2000
    python -m tools.check.pairs --first 123 --count 1

Every case is a function of its number: a random graph, in half of the cases with weights partly zero or changed, as the
pruned model, beside the graph as it was, as the dense one. The two are spelled differently in up to six ways, and in
half of the cases one operation is changed. Where the two are paired, the dense graph gets the pruned one's parameters,
node by node as they were paired, and must compute what the pruned model computes.

    paired    and the same function; with equal weights, every pair of tensors is equal
    refused   a StructureError, and an operation was changed
    FAULT     paired, but another function or another tensor; refused, but only spelled differently; any other exception
"""

from __future__ import annotations

import random
import sys
import traceback
from collections import Counter

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from onnx_asr.arrays import Array
from onnx_asr.errors import StructureError
from onnx_asr.graph.index import FLOAT_TYPES
from onnx_asr.graph.points import survey
from onnx_asr.networks.draft import Draft
from onnx_asr.networks.pair import Pair
from tests.graphs import random_net
from tools.arguments import script_parser
from tools.check.rewritings import CHANGES, SPELLINGS

PAIRED, REFUSED, FAULT = "paired", "refused", "FAULT"
MOST_SPELLINGS = 6


def transplanted(pair: Pair) -> onnx.ModelProto:
    """The dense network with the pruned one's parameters, node by node as they were paired."""
    pruned, dense = pair.pruned.index, pair.dense
    own, draft = Draft(pruned), Draft(dense)
    points = {point.node: point for point in survey(dense).layers}
    slots: dict[str, list[tuple[int, int]]] = {}
    for position, node in enumerate(dense.nodes):
        for slot, name in enumerate(node.input):
            slots.setdefault(name, []).append((position, slot))
    for mine, its in pair.pairing.tensors.items():
        if not pruned.is_constant(mine) or not dense.is_constant(its) or pruned.element_type(mine) not in FLOAT_TYPES:
            continue
        value = pruned.value(mine)
        for place in slots.get(its, []):
            shape = dense.shape(its)
            draft.plan.values[place] = value.reshape(shape) if value.size == np.prod(shape) else value
    for point in survey(pruned).layers:
        target = points[pair.pairing.nodes[point.node]]
        draft.set_rows(target, own.rows(point))
        draft.set_bias(target, own.bias(point))
    return draft.model()


def changed_weights(rng: random.Random, model: onnx.ModelProto) -> None:
    """Zero half of each weight, and scale what has one value per channel by up to a fifth."""
    draw = np.random.default_rng(rng.randrange(2**32))
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOAT_TYPES:
            value = numpy_helper.to_array(tensor)
            factor = draw.integers(0, 2, value.shape) if value.ndim > 1 else draw.uniform(0.8, 1.2, value.shape)
            tensor.CopyFrom(numpy_helper.from_array((value * factor).astype(value.dtype), tensor.name))


def values(model: onnx.ModelProto, x: Array, names: list[str]) -> list[Array]:
    """Tensors of a model, by onnxruntime without optimisation."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    present = {value.name for value in exposed.graph.output}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in present)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names, {exposed.graph.input[0].name: x})  # type: ignore[no-any-return]


def alike(one: Array, other: Array) -> bool:
    """Whether two tensors are equal up to rounding, and to the number of axes."""
    scale = float(np.abs(one).max(initial=1e-3))
    return one.size == other.size and np.allclose(one.ravel(), other.ravel(), rtol=1e-3, atol=1e-3 * scale)


def attempt(number: int) -> tuple[str, str]:
    """Pair one case; the outcome, and what was done to the models."""
    rng = random.Random(f"pairs {number}")
    model = random_net(rng.randrange(10**6), steps=rng.randrange(4, 16))
    x = np.random.default_rng(number).normal(size=(1, 4, 5, 5)).astype(np.float32)
    pruned, dense = onnx.ModelProto(), onnx.ModelProto()
    pruned.CopyFrom(model)
    dense.CopyFrom(model)
    equal = rng.random() < 0.5
    if not equal:
        changed_weights(rng, pruned)
    done = ["" if equal else "other weights"]
    expected = [values(item, x, ["y"])[0] for item in (pruned, dense)]
    for _ in range(rng.randint(1, MOST_SPELLINGS)):
        side, (name, rewriting) = rng.choice([pruned, dense]), rng.choice(sorted(SPELLINGS.items()))
        if rewriting(rng, side):
            done.append(f"{'pruned' if side is pruned else 'dense'} {name}")
    if not all(
        alike(*two) for two in zip(expected, (values(item, x, ["y"])[0] for item in (pruned, dense)), strict=True)
    ):
        return FAULT, f"the spelling is wrong: {done}"
    changed = False
    if rng.random() < 0.5:
        name, change = rng.choice(sorted(CHANGES.items()))
        side = rng.choice([pruned, dense])
        changed = change(rng, side)
        done.append(f"CHANGED {'pruned' if side is pruned else 'dense'} {name}" if changed else "")
        try:
            values(side, x, ["y"])
        except Exception:  # a graph that cannot run
            return REFUSED, "cannot run"
    words = ", ".join(filter(None, done))
    try:
        pair = Pair.of(pruned, dense)
    except StructureError as error:
        same = alike(values(pruned, x, ["y"])[0], values(dense, x, ["y"])[0]) if equal else not changed
        return (FAULT if same and not changed else REFUSED), f"{words}: {error}"
    (own,), (its,) = values(pruned, x, ["y"]), values(transplanted(pair), x, ["y"])
    if not alike(own, its):
        return FAULT, f"{words}: paired, and another function"
    if equal and not changed:
        tensors = {mine: its for mine, its in pair.pairing.tensors.items() if mine in pair.pruned.index.producer}
        tensors = {mine: its for mine, its in tensors.items() if not pair.pruned.index.is_constant(mine)}
        mine = values(pruned, x, list(tensors))
        for name, one, other in zip(tensors, mine, values(pair.dense.model, x, list(tensors.values())), strict=True):
            if not alike(one, other):
                return FAULT, f"{words}: {name} and {tensors[name]} are paired and differ"
    return PAIRED, words


def guarded(number: int) -> tuple[str, str]:
    """The same, with any other exception as a fault."""
    try:
        return attempt(number)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return FAULT, f"{place.filename}:{place.lineno} {type(error).__name__}: {error}"


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--count", type=int, default=2000, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--verbose", action="store_true", help="print every case, not only faults")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    for number in range(arguments.first, arguments.first + arguments.count):
        outcome, words = guarded(number)
        counts[outcome] += 1
        if outcome == FAULT or arguments.verbose:
            print(f"{number} {outcome} {words}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return int(counts[FAULT] > 0)


if __name__ == "__main__":
    sys.exit(main())
