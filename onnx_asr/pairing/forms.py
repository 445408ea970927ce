"""The form of one node: its parameters in one way, whatever opset or exporter wrote them, and what changes nothing.

Parameters such as a Clip's bounds are attributes in one opset and constant inputs in another, defaults may be written
out or not, and axes may come in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
from onnx import numpy_helper

from onnx_asr.graph.index import (
    FLOAT_TYPES,
    STANDARD_DOMAINS,
    GraphIndex,
    attribute,
    input_name,
    is_standard,
    subgraphs,
)

COMPUTED = "computed"  # at run time, where another tool may have folded a constant: equal to any value
COERCED = "coerced axis"  # of a Softmax over all axes from this one on, as before opset 13
_NEUTRAL = {"strides": 1, "dilations": 1, "pads": 0, "output_padding": 0}
_REDUNDANT = {"momentum", "consumed_inputs", "storage_order", "is_test"}
_COMMUTATIVE = ("Add", "Mul", "Sum", "Max", "Min", "Mean")
_JOINS = ("Concat", "Sum", "Max", "Min", "Mean")
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1", "ReduceProd")
SOFTMAXES = ("Softmax", "LogSoftmax", "Hardmax")
_PARAMETER_INPUTS = {
    "Clip": {"min": 1, "max": 2},
    "Pad": {"pads": 1, "value": 2, "axes": 3},
    "Slice": {"starts": 1, "ends": 2, "axes": 3, "steps": 4},
    "Split": {"split": 1},
    "Tile": {"repeats": 1},
    "Expand": {"shape": 1},
    "Reshape": {"shape": 1},
    "TopK": {"k": 1},
    **{operator: {"axes": 1} for operator in (*_REDUCTIONS, "Squeeze", "Unsqueeze")},
}
_VECTORS = ("pads", "starts", "ends", "axes", "steps", "split", "repeats", "shape", "scales", "sizes")
_LARGEST = 2**31 - 1  # "to the end", whatever integer type an exporter wrote it in


@dataclass(frozen=True)
class Form:
    """One operation, however it was written.

    Attributes:
        operator: Domain and operator.
        parameters: Attributes, and constant inputs that act like attributes; None for one without effect.
        defaults: Values of the attributes that are not written out.
        inputs: Tensors to compare, in order, without shapes and optional biases; empty where one is left out.
        node: Position of the node that holds the weight.
        bias: Position of the node that holds the bias.
        commutative: Whether the order of the inputs does not matter.
        weight_shape: Shape of a fully connected weight, outputs first; None elsewhere.
    """

    operator: tuple[str, str]
    parameters: dict[str, Any]
    defaults: dict[str, Any]
    inputs: list[str]
    node: int
    bias: int
    commutative: bool = False
    weight_shape: tuple[int, ...] | None = None

    def differing(self, other: Form) -> str | None:
        """The first parameter in which two forms of one operator differ."""
        for name in sorted(set(self.parameters) | set(other.parameters)):
            mine, its = self.parameters.get(name), other.parameters.get(name)
            if mine == its or (mine is None and its == other.defaults.get(name)):
                continue
            if (its is None and mine == self.defaults.get(name)) or COMPUTED in (mine, its):
                continue
            return name
        return None

    @property
    def is_computed(self) -> bool:
        """Whether a parameter is only known at run time."""
        return COMPUTED in self.parameters.values()


def through(index: GraphIndex, name: str) -> str:
    """The tensor behind everything that changes no value.

    That is an Identity, a Dropout in inference, a Cast to a floating-point type, a Pad by nothing, a Transpose that
    moves nothing, or a Concat, sum or mean of one tensor.
    """
    while name in index.producer:
        node = index.nodes[index.producer[name]]
        if node.output[0] != name or not _changes_nothing(index, node):
            break
        name = node.input[0]
    return name


def _changes_nothing(index: GraphIndex, node: onnx.NodeProto) -> bool:
    if is_standard(node, "Identity"):
        return True
    if is_standard(node, "Cast"):
        return attribute(node, "to", None) in FLOAT_TYPES
    if is_standard(node, "Dropout"):
        training = input_name(node, 2)
        return not training or (index.is_constant(training) and not index.value(training).any())
    if is_standard(node, *_JOINS):
        return len(node.input) == 1
    if is_standard(node, "Transpose"):
        order = list(attribute(node, "perm", []))
        return bool(order) and order == sorted(order)
    if is_standard(node, "Pad"):
        pads = input_name(node, 1)
        given = index.value(pads).tolist() if index.is_constant(pads) else attribute(node, "pads", None)
        return given is not None and not any(given)
    return False


def plain_form(index: GraphIndex, position: int) -> Form:
    """The form of a node by itself, without what stands around it."""
    node = index.nodes[position]
    inputs = list(node.input)
    defaults = _defaults(index, node)
    parameters = defaults | {
        item.name: plain_value(item.name, onnx.helper.get_attribute_value(item))
        for item in node.attribute
        if item.name not in _REDUNDANT and item.type not in (onnx.AttributeProto.TENSOR, onnx.AttributeProto.GRAPH)
    }
    parameters |= {
        item.name: numpy_helper.to_array(item.t).tolist()
        for item in node.attribute
        if item.type == onnx.AttributeProto.TENSOR and not is_standard(node, "Constant")
    }
    if is_standard(node, *_PARAMETER_INPUTS):
        for name, slot in _PARAMETER_INPUTS[node.op_type].items():
            given = input_name(node, slot)
            if given:
                parameters[name], inputs[slot] = plain_value(name, constant_parameter(index, given, name)), ""
    while inputs and not inputs[-1]:
        inputs.pop()
    bodies = [_operators(graph) for graph in subgraphs(node)]
    if bodies:
        parameters["bodies"] = bodies
    _unify(index, node, parameters)
    commutative = is_standard(node, *_COMMUTATIVE)
    operator = _domain(node), "Add" if is_standard(node, "Sum") and len(inputs) == 2 else node.op_type
    return Form(operator, parameters, defaults, inputs, position, position, commutative)


def _unify(index: GraphIndex, node: onnx.NodeProto, parameters: dict[str, Any]) -> None:
    """Parameters that opsets state differently, in place."""
    if is_standard(node, *SOFTMAXES) and opset_of(index, "") < 13:
        parameters[COERCED] = parameters.pop("axis", 1)
    if is_standard(node, "Split"):
        parameters.pop("num_outputs", None)
        sizes = parameters.get("split")
        if isinstance(sizes, list) and len(set(sizes)) == 1 and len(sizes) == len(node.output):
            parameters["split"] = None
    pads, axes = parameters.get("pads"), parameters.get("axes")
    if is_standard(node, "Pad") and isinstance(pads, list) and axes != COMPUTED:
        half = len(pads) // 2
        amounts = zip(axes or range(half), pads[:half], pads[half:], strict=False)
        parameters["pads"] = {axis: (before, after) for axis, before, after in amounts if before or after}
        parameters.pop("axes", None)
    if is_standard(node, *_REDUCTIONS, "Squeeze", "Unsqueeze") and isinstance(parameters.get("axes"), list):
        parameters["axes"] = sorted(parameters["axes"])
    if parameters.get("auto_pad") == b"VALID":
        parameters["auto_pad"] = None


def _operators(graph: onnx.GraphProto) -> list[Any]:
    """What a subgraph computes, roughly: its operators in order."""
    return [
        (node.op_type, [_operators(inner) for inner in subgraphs(node)])
        for node in graph.node
        if not is_standard(node, "Constant", "Identity")
    ]


def _domain(item: onnx.NodeProto | onnx.OperatorSetIdProto) -> str:
    return "" if item.domain in STANDARD_DOMAINS else str(item.domain)


def opset_of(index: GraphIndex, domain: str) -> int:
    """Opset of a domain; 0 where the model does not import it."""
    return next((item.version for item in index.model.opset_import if _domain(item) == domain), 0)


def constant_parameter(index: GraphIndex, tensor: str, parameter: str) -> Any:
    """The value of an input that acts like an attribute: numbers or lists, or ``COMPUTED``."""
    if not index.is_constant(tensor):
        return COMPUTED
    value = index.value(tensor)
    if value.dtype.kind not in "iufb":
        return COMPUTED
    return value.ravel().tolist() if parameter in _VECTORS else value.tolist()


def _defaults(index: GraphIndex, node: onnx.NodeProto) -> dict[str, Any]:
    """Default values of attributes in the model's opset."""
    domain = _domain(node)
    version = opset_of(index, domain)
    if not version or not onnx.defs.has(node.op_type, version, domain):
        return {}
    schema = onnx.defs.get_schema(node.op_type, version, domain)
    return ({"value": 0.0} if (domain, node.op_type) == ("", "Pad") else {}) | {
        name: plain_value(name, onnx.helper.get_attribute_value(item.default_value))
        for name, item in schema.attributes.items()
        if item.default_value.type and name not in _REDUNDANT
    }


def plain_value(name: str, value: Any) -> Any:
    """A value that compares equal to others of the same meaning; None where it has no effect."""
    if isinstance(value, float):
        return round(value, 9)
    if isinstance(value, int):
        return min(value, _LARGEST)
    if isinstance(value, bytes):
        return None if (name, value) == ("auto_pad", b"NOTSET") else value
    if isinstance(value, list):
        if name in _NEUTRAL and all(item == _NEUTRAL[name] for item in value):
            return None
        return [plain_value("", item) for item in value]
    return value
