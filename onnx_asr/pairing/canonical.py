"""One canonical form for operations that exporters, simplifiers and opsets write in different ways.

A fully connected layer may be a Gemm, its weight transposed or not, or a MatMul with an Add; a flattening may be a
Flatten, a Reshape to two dimensions or a Squeeze of the spatial axes; a global average may be a pool or a ReduceMean;
Slices, Transposes, Clips and reshapes may be one node or a chain. What one node says in several ways is unified in
:mod:`onnx_asr.pairing.forms`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from onnx_asr.graph.index import GraphIndex, attribute, input_name, is_standard
from onnx_asr.graph.layers import CONVOLUTIONS, LAYERS, NORMALIZATION, Layer, is_channel_bias
from onnx_asr.pairing.forms import (
    COERCED,
    COMPUTED,
    SOFTMAXES,
    Form,
    constant_parameter,
    opset_of,
    plain_form,
    plain_value,
    through,
)

VIEW = ("", "Reshape")
MEAN = ("", "GlobalAveragePool")
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_RESIZES = ("Resize", "Upsample")


def form_of(index: GraphIndex, position: int) -> Form:
    """The form of a node; that of the Add behind a MatMul covers both nodes."""
    node = index.nodes[position]
    linear = _linear(index, position)
    if linear is not None:
        return linear
    plain = plain_form(index, position)
    if is_standard(node, *_VIEWS):
        return _view(index, plain, node)
    if is_standard(node, "ReduceMean") and _are_spatial(plain.parameters.get("axes")):
        flat = () if plain.parameters.get("keepdims", 1) else ("flattened",)
        return replace(plain, operator=MEAN, parameters=dict.fromkeys(flat, 1))
    if is_standard(node, "Relu", "Clip"):
        return _clipped(index, plain)
    if is_standard(node, "Transpose"):
        return _transposed(index, plain)
    if is_standard(node, "Slice"):
        return _sliced(index, plain)
    if is_standard(node, "Mul"):
        return _scaled(index, _hard_swish(index, plain))
    if is_standard(node, *_RESIZES):
        return _resized(index, plain, node)
    if is_standard(node, *CONVOLUTIONS):
        parameters = {name: value for name, value in plain.parameters.items() if name != "kernel_shape"}
        inputs = [*plain.inputs[:2], *_computed_bias(index, node)]
        return _padded(index, replace(plain, parameters=parameters, inputs=inputs))
    return plain


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
    inputs = [data, *_computed_bias(index, index.nodes[position])]
    return Form(("", "Gemm"), factors, {}, inputs, position, bias, weight_shape=shape)


def _computed_bias(index: GraphIndex, node: onnx.NodeProto) -> list[str]:
    """The bias of a layer if it is no constant: then the graph goes on behind it."""
    return [name for name in node.input[2:] if name and not index.is_constant(name)]


def _view(index: GraphIndex, last: Form, node: onnx.NodeProto) -> Form:
    """A chain of reshapes of all kinds as one Reshape: the last decides the shape."""
    data = through(index, last.inputs[0])
    converted = _coerced_softmax(index, node, data)
    if converted is not None:
        return replace(last, operator=("", index.nodes[converted[0]].op_type), **converted[1])
    target = _target(index, node, last.parameters)
    chained = False
    while (inner := index.made_by(data, *_VIEWS)) is not None:
        data, chained = through(index, index.nodes[inner].input[0]), True
    if chained and target != [0, -1] and isinstance(target, list):
        target = [item or None for item in target]
    pool = index.made_by(data, "GlobalAveragePool", "ReduceMean")
    if pool is not None and target == [0, -1] and not chained:
        form = form_of(index, pool)
        if form.operator == MEAN and not form.parameters:
            return replace(form, parameters={"flattened": 1}, node=last.node, bias=last.bias)
    return replace(last, operator=VIEW, parameters={"shape": target}, inputs=[data])


def _target(index: GraphIndex, node: onnx.NodeProto, parameters: dict[str, Any]) -> Any:
    """The shape that a reshape leads to: 0 for "as before", -1 for "the rest", None for an unknown number."""
    if is_standard(node, "Flatten"):
        axis = attribute(node, "axis", 1)
        return [0, -1] if axis == 1 else COMPUTED
    if is_standard(node, "Squeeze"):
        return [0, -1] if _are_spatial(parameters.get("axes")) else COMPUTED
    if is_standard(node, "Unsqueeze"):
        return COMPUTED
    target = parameters.get("shape")
    if isinstance(target, list) and not attribute(node, "allowzero", 0):
        return [0, -1] if len(target) == 2 and target[0] >= 0 and target[1] == -1 else target
    producer = index.made_by(input_name(node, 1), "Concat")
    parts = [] if producer is None else index.nodes[producer].input
    ends = len(parts) == 2 and index.is_constant(parts[1]) and index.value(parts[1]).tolist() == [-1]
    return [0, -1] if ends else COMPUTED


def _coerced_softmax(index: GraphIndex, node: onnx.NodeProto, data: str) -> tuple[int, dict[str, Any]] | None:
    """A Softmax between a Flatten and a Reshape back: as onnx's converter writes one of an opset before 13."""
    inner = index.made_by(data, *SOFTMAXES)
    back = index.made_by(input_name(node, 1), "Shape")
    if inner is None or back is None or attribute(index.nodes[inner], "axis", -1) not in (-1, 1):
        return None
    flat = index.made_by(index.nodes[inner].input[0], "Flatten")
    if flat is None or index.nodes[flat].input[0] != index.nodes[back].input[0]:
        return None
    axis = attribute(index.nodes[flat], "axis", 1)
    return inner, {"parameters": {COERCED: axis}, "inputs": [index.nodes[flat].input[0]]}


def _clipped(index: GraphIndex, last: Form) -> Form:
    """A chain of Relus and Clips with constant bounds as one Clip."""
    bounds, form = _bounds(last), last
    if bounds is None:
        return last
    low, high = bounds
    while (inner := index.made_by(through(index, form.inputs[0]), "Relu", "Clip")) is not None:
        previous = plain_form(index, inner)
        more = _bounds(previous)
        if more is None:
            break
        (low, high), form = (min(max(bound, low), high) for bound in more), previous
    parameters = {"min": low, "max": high}
    return replace(last, operator=("", "Clip"), parameters=parameters, defaults={}, inputs=form.inputs[:1])


def _bounds(form: Form) -> tuple[float, float] | None:
    if form.operator == ("", "Relu"):
        return 0.0, float("inf")
    low, high = form.parameters.get("min"), form.parameters.get("max")
    if COMPUTED in (low, high) or isinstance(low, list) or isinstance(high, list):
        return None
    low, high = (-float("inf") if low is None else low), (float("inf") if high is None else high)
    return (-float("inf") if low < -3e38 else low), (float("inf") if high > 3e38 else high)


def _transposed(index: GraphIndex, last: Form) -> Form:
    """A chain of Transposes as one."""
    order, form = last.parameters.get("perm"), last
    while order and (inner := index.made_by(through(index, form.inputs[0]), "Transpose")) is not None:
        previous = plain_form(index, inner)
        before = previous.parameters.get("perm")
        if before is None or not sorted(before) == sorted(order) == list(range(len(order))):
            break
        order, form = [before[axis] for axis in order], previous
    if order == list(range(len(order or ())))[::-1]:
        order = None
    return replace(last, parameters={"perm": order}, inputs=form.inputs)


def _sliced(index: GraphIndex, last: Form) -> Form:
    """A chain of Slices along different axes as one Slice."""
    cuts, form = _cuts(last), last
    while cuts is not None and (inner := index.made_by(through(index, form.inputs[0]), "Slice")) is not None:
        previous = plain_form(index, inner)
        more = _cuts(previous)
        if more is None or not cuts.keys().isdisjoint(more):
            break
        cuts, form = cuts | more, previous
    return replace(last, parameters={"slices": COMPUTED if cuts is None else cuts}, inputs=form.inputs[:1])


def _cuts(form: Form) -> dict[int, tuple[int, int, int]] | None:
    """Start, end and step of a Slice by axis; None where they are computed, missing, or differ in number."""
    if form.is_computed or not {"starts", "ends"} <= form.parameters.keys():
        return None
    starts, ends = form.parameters["starts"], form.parameters["ends"]
    axes = form.parameters.get("axes") or list(range(len(starts)))
    steps = form.parameters.get("steps") or [1] * len(starts)
    if len({len(starts), len(ends), len(axes), len(steps)}) > 1:
        return None
    return dict(zip(axes, zip(starts, ends, steps, strict=True), strict=True))


def _padded(index: GraphIndex, layer: Form) -> Form:
    """A Conv that pads its data itself; zeros that a Pad puts around them may be in front of it."""
    inner = index.made_by(through(index, layer.inputs[0]), "Pad")
    if inner is None or layer.operator != ("", "Conv") or layer.parameters.get("auto_pad") is not None:
        return layer
    if not index.is_constant(layer.inputs[1]):
        return layer
    pad, axes = plain_form(index, inner), len(index.shape(layer.inputs[1])) - 2
    added, pads = pad.parameters.get("pads"), list(layer.parameters.get("pads") or [0] * 2 * axes)
    if not isinstance(added, dict) or len(pads) != 2 * axes or axes < 1:
        return layer
    if pad.parameters.get("mode") != b"constant" or pad.parameters.get("value") not in (None, 0.0):
        return layer
    for axis, amounts in added.items():
        place = axis % (axes + 2) - 2
        if place < 0 or min(amounts) < 0:
            return layer
        pads[place] += amounts[0]
        pads[place + axes] += amounts[1]
    return replace(layer, parameters=layer.parameters | {"pads": pads}, inputs=[pad.inputs[0], *layer.inputs[1:]])


def _scaled(index: GraphIndex, product: Form) -> Form:
    """A chain of products with constants as one; behind a layer each of them stands for itself, as it may be folded."""
    factors, data, form = [], "", product
    while (factor := _constant_operand(index, form)) is not None:
        factors.append(factor)
        data = next(name for name in form.inputs if name != factor)
        inner = index.made_by(through(index, data), "Mul")
        if inner is None:
            break
        form = plain_form(index, inner)
    if len(factors) < 2 or index.made_by(through(index, data), *LAYERS, NORMALIZATION, "Add") is not None:
        return product
    largest = max(factors, key=lambda name: math.prod(index.shape(name)))
    return replace(product, inputs=[data, largest])


def _constant_operand(index: GraphIndex, product: Form) -> str | None:
    """The one constant of two operands."""
    constants = [name for name in product.inputs if name and index.is_constant(name)]
    return constants[0] if len(constants) == 1 and len(set(product.inputs)) == 2 else None


def _hard_swish(index: GraphIndex, product: Form) -> Form:
    """``x * HardSigmoid(x)`` with a slope of 1/6 as a HardSwish."""
    for data, gate in (product.inputs, product.inputs[::-1]) if len(product.inputs) == 2 else ():
        inner = index.made_by(gate, "HardSigmoid")
        if inner is None or through(index, index.nodes[inner].input[0]) != through(index, data):
            continue
        factors = attribute(index.nodes[inner], "alpha", 0.2), attribute(index.nodes[inner], "beta", 0.5)
        if np.allclose(factors, (1 / 6, 0.5), rtol=0, atol=1e-6):
            return replace(product, operator=("", "HardSwish"), inputs=[data], commutative=False)
    return product


def _resized(index: GraphIndex, plain: Form, node: onnx.NodeProto) -> Form:
    """Upsample, and Resize of every opset; the nearest value at an integral factor is a repetition in all of them."""
    parameters = dict(plain.parameters)
    version = opset_of(index, "")
    slots = {"scales": 1} if version < 11 else {"scales": 2, "sizes": 3}
    for name, slot in slots.items():
        given = input_name(node, slot)
        value = constant_parameter(index, given, name) if given else None
        if value or given == "":
            parameters[name] = parameters.get(name) if value is None else plain_value(name, value)
    if version < 11:
        parameters |= {"coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"}
    scales, mode = parameters.get("scales"), parameters.get("mode")
    how = parameters.get("coordinate_transformation_mode"), parameters.get("nearest_mode")
    repeats = how == (b"asymmetric", b"floor") or (
        how[0] in (b"half_pixel", b"pytorch_half_pixel") and how[1] in (b"round_prefer_floor", b"round_prefer_ceil")
    )
    integral = isinstance(scales, list) and all(scale >= 1 and scale == int(scale) for scale in scales)
    if mode == b"nearest" and integral and repeats:
        parameters = {"scales": scales, "mode": mode}
    elif version < 11 and mode == b"nearest" and not integral:
        parameters["nearest_mode"] = b"simple"
    return replace(plain, operator=("", "Resize"), parameters=parameters, inputs=plain.inputs[:1])


def _are_spatial(axes: Any) -> bool:
    return isinstance(axes, list) and set(axes) in ({2, 3}, {-2, -1})
