"""Pair the nodes of a dense and a pruned model by structure, never by name.

Both graphs are walked backward together from their outputs; operators, attributes, the order of the inputs and the
shapes of the weights have to agree. A bias may be missing in one; node names, node order, tensor names and the place
where constants are stored may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx

from onnx_asr.errors import StructureError
from onnx_asr.graph.index import GraphIndex, captured, is_standard

_TRANSPARENT = ("Identity", "Dropout")
_NEUTRAL = {"strides": 1, "dilations": 1, "pads": 0, "output_padding": 0, "group": 1}
_BIAS_OPTIONAL = ("Conv", "ConvTranspose", "Gemm")
_REDUNDANT = {"kernel_shape", "training_mode", "momentum", "spatial", "consumed_inputs", "storage_order"}


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
    if len(pruned.outputs) != len(dense.outputs):
        raise _differ(f"the pruned one has {len(pruned.outputs)} outputs, the dense one {len(dense.outputs)}")
    if len(pruned.inputs) != len(dense.inputs):
        raise _differ(f"the pruned one has {len(pruned.inputs)} inputs, the dense one {len(dense.inputs)}")
    pruned_inputs = {value.name: position for position, value in enumerate(pruned.inputs)}
    dense_inputs = {value.name: position for position, value in enumerate(dense.inputs)}
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
        if position in nodes:
            if nodes[position] != counterpart:
                raise _differ(
                    f"node {pruned.label(position)} corresponds to both {dense.label(nodes[position])} and "
                    f"{dense.label(counterpart)}"
                )
            continue
        _compare(pruned, position, dense, counterpart)
        nodes[position] = counterpart
        node, partner = pruned.nodes[position], dense.nodes[counterpart]
        tensors.update(zip(node.output, partner.output, strict=False))
        stack.extend((mine, its) for mine, its in zip(node.input, partner.input, strict=False) if mine)
        stack.extend(_captured(pruned, position, dense, counterpart))
    return Pairing(nodes, tensors)


def _differ(what: str) -> StructureError:
    return StructureError(
        f"the dense and the pruned model are not the same network: {what}; give the dense file that the pruned one "
        "was made from, exported the same way (both with BatchNormalization kept, or both folded)"
    )


def _through(index: GraphIndex, name: str) -> str:
    """The tensor behind any Identity or inference-time Dropout."""
    while name in index.producer and is_standard(index.nodes[index.producer[name]], *_TRANSPARENT):
        node = index.nodes[index.producer[name]]
        if node.output[0] != name:
            break
        name = node.input[0]
    return name


def _compare(pruned: GraphIndex, position: int, dense: GraphIndex, counterpart: int) -> None:
    node, partner = pruned.nodes[position], dense.nodes[counterpart]
    here = f"node {pruned.label(position)} ({node.op_type})"
    there = f"{dense.label(counterpart)} ({partner.op_type})"
    if (node.op_type, node.domain or "ai.onnx") != (partner.op_type, partner.domain or "ai.onnx"):
        raise _differ(f"{here} stands where the dense one has {there}")
    mine, its = _present(node), _present(partner)
    if is_standard(node, *_BIAS_OPTIONAL):
        mine, its = mine[:2], its[:2]
    if len(mine) != len(its):
        raise _differ(f"{here} has {len(mine)} inputs, {there} in the dense one has {len(its)}")
    own, other = _attributes(node), _attributes(partner)
    for name in sorted(set(own) | set(other)):
        if _significant(name, own.get(name)) != _significant(name, other.get(name)):
            raise _differ(f"{here} has {name}={own.get(name)}, {there} in the dense one {other.get(name)}")
    for slot in range(1, len(mine)):
        if pruned.is_constant(mine[slot]) and dense.is_constant(its[slot]):
            shape, twin = pruned.value(mine[slot]).shape, dense.value(its[slot]).shape
            if max(len(shape), len(twin)) > 1 and shape != twin:
                raise _differ(f"{here} has a parameter of shape {shape}, {there} in the dense one {twin}")


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


def _present(node: onnx.NodeProto) -> list[str]:
    inputs = list(node.input)
    while inputs and not inputs[-1]:
        inputs.pop()
    return inputs


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {
        item.name: onnx.helper.get_attribute_value(item)
        for item in node.attribute
        if item.name not in _REDUNDANT and item.type not in (onnx.AttributeProto.TENSOR, onnx.AttributeProto.GRAPH)
    }


def _significant(name: str, value: Any) -> Any:
    """An attribute's value with the operator's neutral default as None, so that stating it equals leaving it out."""
    if name in _NEUTRAL:
        values = value if isinstance(value, list) else [value]
        return None if all(item in (None, _NEUTRAL[name]) for item in values) else value
    if name == "auto_pad":
        return None if value == b"NOTSET" else value
    if isinstance(value, float):
        return round(value, 9)
    return value
