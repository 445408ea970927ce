"""One canonical form for operations that exporters, simplifiers and opsets write in different ways.

A fully connected layer may be a Gemm, its weight transposed or not, or a MatMul with an Add; a flattening may be a
Flatten, a Reshape to two dimensions or a Squeeze of the spatial axes; a global average may be a pool or a ReduceMean;
Slices along several axes may be one node or a chain; parameters such as a Clip's bounds are attributes in one opset and
constant inputs in another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import onnx

from onnx_asr.graph.index import FLOAT_TYPES, STANDARD_DOMAINS, GraphIndex, attribute, input_name, is_standard
from onnx_asr.graph.layers import CONVOLUTIONS, Layer, is_channel_bias

_NEUTRAL = {"strides": 1, "dilations": 1, "pads": 0, "output_padding": 0}
_REDUNDANT = {"kernel_shape", "training_mode", "momentum", "spatial", "consumed_inputs", "storage_order"}
_COMMUTATIVE = ("Add", "Mul", "Sum", "Max", "Min")
_SHAPED = ("Reshape", "Resize", "Upsample", "Expand", "Tile")
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")
_PARAMETER_INPUTS = {
    "Clip": {"min": 1, "max": 2},
    "Pad": {"pads": 1, "value": 2},
    "Slice": {"starts": 1, "ends": 2, "axes": 3, "steps": 4},
    **{operator: {"axes": 1} for operator in (*_REDUCTIONS, "Squeeze", "Unsqueeze")},
}
_VECTORS = ("pads", "starts", "ends", "axes", "steps")
_COMPUTED = "computed"  # at run time, where another tool may have folded a constant: equal to any value
_LARGEST = 2**31 - 1  # "to the end", whatever integer type an exporter wrote it in


@dataclass(frozen=True)
class Form:
    """One operation, however it was written.

    Attributes:
        operator: Domain and operator.
        parameters: Attributes, and constant inputs that act like attributes.
        inputs: Tensors to compare, in order, without shapes and optional biases.
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
            if (its is None and mine == self.defaults.get(name)) or _COMPUTED in (mine, its):
                continue
            return name
        return None


def form_of(index: GraphIndex, position: int) -> Form:
    """The form of a node; that of the Add behind a MatMul covers both nodes."""
    node = index.nodes[position]
    linear = _linear(index, position)
    if linear is not None:
        return linear
    plain = _plain(index, position)
    data, axes = plain.inputs[:1], plain.parameters.get("axes")
    if _is_flattening(index, node, axes):
        return replace(plain, operator=("", "Flatten"), parameters={}, inputs=data)
    if is_standard(node, "ReduceMean") and attribute(node, "keepdims", 1) and _are_spatial(axes):
        return replace(plain, operator=("", "GlobalAveragePool"), parameters={}, inputs=data)
    if is_standard(node, *_SHAPED):
        return replace(plain, inputs=data)
    if is_standard(node, "Slice"):
        return _sliced(index, plain)
    if is_standard(node, *CONVOLUTIONS):
        return replace(plain, inputs=plain.inputs[:2])
    return plain


def through(index: GraphIndex, name: str) -> str:
    """The tensor behind any Identity, inference-time Dropout, or Cast to a floating-point type."""
    while name in index.producer:
        node = index.nodes[index.producer[name]]
        casts = is_standard(node, "Cast") and attribute(node, "to", None) in FLOAT_TYPES
        if node.output[0] != name or not (casts or is_standard(node, "Identity", "Dropout")):
            break
        name = node.input[0]
    return name


def _plain(index: GraphIndex, position: int) -> Form:
    node = index.nodes[position]
    inputs = list(node.input)
    defaults = _defaults(index, node)
    parameters = defaults | {
        item.name: _plain_value(item.name, onnx.helper.get_attribute_value(item))
        for item in node.attribute
        if item.name not in _REDUNDANT and item.type not in (onnx.AttributeProto.TENSOR, onnx.AttributeProto.GRAPH)
    }
    if is_standard(node, *_PARAMETER_INPUTS):
        for name, slot in _PARAMETER_INPUTS[node.op_type].items():
            given = input_name(node, slot)
            if given:
                parameters[name], inputs[slot] = _plain_value(name, _constant(index, given, name)), ""
    inputs = [name for name in inputs if name]
    commutative = is_standard(node, *_COMMUTATIVE)
    return Form((_domain(node), node.op_type), parameters, defaults, inputs, position, position, commutative)


def _domain(item: onnx.NodeProto | onnx.OperatorSetIdProto) -> str:
    return "" if item.domain in STANDARD_DOMAINS else str(item.domain)


def _constant(index: GraphIndex, tensor: str, parameter: str) -> Any:
    if not index.is_constant(tensor):
        return _COMPUTED
    value = index.value(tensor)
    return value.ravel().tolist() if parameter in _VECTORS else value.tolist()


def _linear(index: GraphIndex, position: int) -> Form | None:
    """A fully connected layer: Gemm, MatMul with a constant matrix on its right, or that with a bias added."""
    node = index.nodes[position]
    if is_standard(node, "Gemm", "MatMul"):
        return _linear_form(index, position, position)
    if not is_standard(node, "Add"):
        return None
    for product, bias in (node.input, node.input[::-1]):
        inner = index.made_by(product, "MatMul")
        if inner is None or index.sole_consumer(product) != position:
            continue
        form = _linear_form(index, inner, position)
        if form is None or form.weight_shape is None or not index.is_constant(bias):
            continue
        if is_channel_bias(index.value(bias), form.weight_shape[0], -1):
            return form
    return None


def _linear_form(index: GraphIndex, position: int, bias: int) -> Form | None:
    layer = Layer.of(index, position)
    if not isinstance(layer, Layer) or layer.weight_slot != 1 or layer.input_axis == 0:
        return None
    factors, data = {"alpha": layer.alpha, "beta": layer.beta}, index.nodes[position].input[layer.data_slot]
    shape = layer.layout.outputs, layer.layout.inputs
    return Form(("", "Gemm"), factors, {}, [data], position, bias, weight_shape=shape)


def _sliced(index: GraphIndex, last: Form) -> Form:
    """A chain of Slices along different axes as one Slice."""
    cuts, form = _cuts(last), last
    while cuts is not None and (inner := index.made_by(form.inputs[0], "Slice")) is not None:
        previous = _plain(index, inner)
        more = _cuts(previous)
        if more is None or not cuts.keys().isdisjoint(more):
            break
        cuts, form = cuts | more, previous
    return replace(last, parameters={"slices": _COMPUTED if cuts is None else cuts}, inputs=form.inputs[:1])


def _cuts(form: Form) -> dict[int, tuple[int, int, int]] | None:
    """Start, end and step of a Slice by axis; None where they are computed, missing, or differ in number."""
    if _COMPUTED in form.parameters.values() or not {"starts", "ends"} <= form.parameters.keys():
        return None
    starts, ends = form.parameters["starts"], form.parameters["ends"]
    axes = form.parameters.get("axes") or list(range(len(starts)))
    steps = form.parameters.get("steps") or [1] * len(starts)
    if len({len(starts), len(ends), len(axes), len(steps)}) > 1:
        return None
    return dict(zip(axes, zip(starts, ends, steps, strict=True), strict=True))


def _are_spatial(axes: Any) -> bool:
    return isinstance(axes, list) and set(axes) in ({2, 3}, {-2, -1})


def _is_flattening(index: GraphIndex, node: onnx.NodeProto, axes: Any) -> bool:
    if is_standard(node, "Flatten"):
        return bool(attribute(node, "axis", 1) == 1)
    if is_standard(node, "Squeeze"):
        return _are_spatial(axes)
    if not is_standard(node, "Reshape"):
        return False
    target = node.input[1]
    if index.is_constant(target):
        return bool(index.value(target).size == 2)
    producer = index.made_by(target, "Concat")
    parts = [] if producer is None else index.nodes[producer].input
    return len(parts) == 2 and index.is_constant(parts[1]) and index.value(parts[1]).tolist() == [-1]


def _defaults(index: GraphIndex, node: onnx.NodeProto) -> dict[str, Any]:
    """Default values of attributes in the model's opset."""
    domain = _domain(node)
    version = {_domain(item): item.version for item in index.model.opset_import}.get(domain)
    if version is None or not onnx.defs.has(node.op_type, version, domain):
        return {}
    schema = onnx.defs.get_schema(node.op_type, version, domain)
    return ({"value": 0.0} if (domain, node.op_type) == ("", "Pad") else {}) | {
        name: _plain_value(name, onnx.helper.get_attribute_value(item.default_value))
        for name, item in schema.attributes.items()
        if item.default_value.type and name not in _REDUNDANT
    }


def _plain_value(name: str, value: Any) -> Any:
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
        return [_plain_value("", item) for item in value]
    return value
