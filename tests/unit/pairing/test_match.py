from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_asr
from onnx_asr.errors import StructureError
from onnx_asr.graph.points import survey
from onnx_asr.networks.pair import Pair
from onnx_asr.pairing.match import counterparts, match
from tests.graphs import (
    constant,
    copy,
    dense_net,
    digits,
    images,
    index,
    net,
    parameter,
    positions,
    residual_net,
    run,
    set_parameter,
)
from tests.graphs import pruned as magnitude_pruned


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rename every node, tensor, input and output."""
    result = copy(model)
    for number, node in enumerate(result.graph.node):
        node.name = f"renamed{number}"
        node.input[:] = [f"r_{name}" if name else "" for name in node.input]
        node.output[:] = [f"r_{name}" if name else "" for name in node.output]
    for item in (*result.graph.input, *result.graph.output, *result.graph.initializer):
        item.name = f"r_{item.name}"
    return result


def reordered(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Change the topological order and the order of the initializers."""
    result = copy(model)
    generator = random.Random(seed)
    known = {value.name for value in result.graph.input} | {tensor.name for tensor in result.graph.initializer}
    waiting = list(result.graph.node)
    ordered = []
    while waiting:
        ready = [node for node in waiting if all(name in known for name in node.input)]
        node = generator.choice(ready)
        waiting.remove(node)
        ordered.append(node)
        known |= set(node.output)
    tensors = list(result.graph.initializer)
    generator.shuffle(tensors)
    del result.graph.node[:], result.graph.initializer[:]
    result.graph.node.extend(ordered)
    result.graph.initializer.extend(tensors)
    return result


def with_constant_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn every initializer into a Constant node, half of them behind an Identity."""
    result = copy(model)
    constants = []
    for number, tensor in enumerate(result.graph.initializer):
        stored = copy_of = tensor.name
        if number % 2:
            stored = f"{tensor.name}_stored"
        constants.append(helper.make_node("Constant", [], [stored], value=tensor))
        if stored != copy_of:
            constants.append(helper.make_node("Identity", [stored], [copy_of]))
    nodes = list(result.graph.node)
    del result.graph.node[:], result.graph.initializer[:]
    result.graph.node.extend([*constants, *nodes])
    return result


def with_identities(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put an Identity behind every Relu."""
    result = copy(model)
    nodes = list(result.graph.node)
    del result.graph.node[:]
    for node in nodes:
        result.graph.node.append(node)
        if node.op_type == "Relu":
            output = node.output[0]
            result.graph.node[-1].output[0] = f"{output}_raw"
            result.graph.node.append(helper.make_node("Identity", [f"{output}_raw"], [output]))
    return result


def commuted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Exchange the operands of every Add."""
    result = copy(model)
    for node in result.graph.node:
        if node.op_type == "Add":
            node.input[:] = list(node.input)[::-1]
    return result


def other_classifier(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace Gemm by MatMul and Add, or the reverse."""
    result = copy(model)
    nodes = list(result.graph.node)
    if nodes[-1].op_type == "Gemm":
        weight = numpy_helper.from_array(np.ascontiguousarray(parameter(model, len(nodes) - 1, 1).T), "turned")
        result.graph.initializer.append(weight)
        x, _, bias = nodes[-1].input
        new = [
            helper.make_node("MatMul", [x, "turned"], ["product"]),
            helper.make_node("Add", [bias, "product"], [nodes[-1].output[0]]),
        ]
        nodes[-1:] = new
    else:
        (x, weight), bias = nodes[-2].input, nodes[-1].input[1]
        nodes[-2:] = [helper.make_node("Gemm", [x, weight, bias], [nodes[-1].output[0]])]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def otherwise_flattened(target: str) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Replace the global average by ReduceMean, and Flatten by Reshape (to a constant or computed shape) or Squeeze."""

    def change(model: onnx.ModelProto) -> onnx.ModelProto:
        result = copy(model)
        nodes = list(result.graph.node)
        (place,) = positions(result, "GlobalAveragePool")
        nodes[place] = helper.make_node("ReduceMean", nodes[place].input, nodes[place].output, axes=[3, 2], keepdims=1)
        (place,) = positions(result, "Flatten")
        (source,), (output,) = nodes[place].input, nodes[place].output
        for name, value in (("first", [0]), ("minus", [-1]), ("constant", [0, -1]), ("axes", [2, 3])):
            result.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"{name}_i"))
        new = {
            "constant": [helper.make_node("Reshape", [source, "constant_i"], [output])],
            "squeezed": [helper.make_node("Squeeze", [source, "axes_i"], [output])],
            "computed": [
                helper.make_node("Shape", [source], ["shape_t"]),
                helper.make_node("Gather", ["shape_t", "first_i"], ["count_t"]),
                helper.make_node("Concat", ["count_t", "minus_i"], ["target_t"], axis=0),
                helper.make_node("Reshape", [source, "target_t"], [output]),
            ],
        }
        nodes[place : place + 1] = new[target]
        del result.graph.node[:]
        result.graph.node.extend(nodes)
        return result

    return change


VARIANTS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "itself": copy,
    "renamed": renamed,
    "reordered": reordered,
    "constants": with_constant_nodes,
    "identities": with_identities,
    "commuted": commuted,
    "other classifier": other_classifier,
    "reshaped": otherwise_flattened("constant"),
    "squeezed": otherwise_flattened("squeezed"),
    "computed": otherwise_flattened("computed"),
    "all": lambda model: with_constant_nodes(
        renamed(reordered(with_identities(commuted(other_classifier(model))), seed=2))
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [residual_net, dense_net])
def test_the_same_network_matches_however_it_is_written(make: Callable[[], onnx.ModelProto], variant: str) -> None:
    """The pairing is right when paired tensors of the two files carry the same values."""
    model = make()
    other = VARIANTS[variant](model)
    x = images(2, seed=1)
    for pruned, dense in ((model, other), (other, model)):
        pairing = match(index(pruned), index(dense))
        weighted = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
        assert set(positions(pruned, *weighted)) <= set(pairing.nodes)
        pairs = {mine: its for mine, its in pairing.tensors.items() if not index(pruned).is_constant(mine)}
        assert {point.tensor for point in survey(index(pruned)).points} <= set(pairs)
        mine = run(pruned, {index(pruned).inputs[0].name: x}, [name for name in pairs if name != "x"])
        its = run(dense, {index(dense).inputs[0].name: x}, pairs.values())
        for name, other in pairs.items():
            if name in mine:
                np.testing.assert_allclose(mine[name], its[other], atol=1e-5, err_msg=f"{name} and {other}")


def test_pairing_of_trained_nets() -> None:
    for name in ("resnet", "vgg", "mobilenet", "densenet"):
        model = digits(name)
        pairing = match(index(model), index(with_constant_nodes(renamed(model))))
        assert all(its == f"r_{mine}" for mine, its in pairing.tensors.items() if not index(model).is_constant(mine))


def test_a_bias_may_be_missing_in_one() -> None:
    text = "g (float[N,3,4,4] x) => (float[N,3,4,4] y) {{ y = Conv ({}) }}"
    with_bias = net(text.format("x, w, b"), w=(3, 3, 1, 1), b=(3,))
    without = net(text.format("x, w"), w=(3, 3, 1, 1))
    assert match(index(with_bias), index(without)).nodes == {0: 0}
    assert match(index(without), index(with_bias)).nodes == {0: 0}


@pytest.mark.parametrize("layer", ["Gemm (x, w, r)", "Conv (x, w, r)"])
def test_a_bias_that_is_computed_is_followed(layer: str) -> None:
    shape, w = ("N,3", (3, 4)) if layer.startswith("Gemm") else ("N,3,1,1", (4, 3, 1, 1))
    text = f"g (float[{shape}] x, float[4] z) => (y) {{ a = Mul (z, s)  r = Relu (a)  y = {layer} }}"
    model = index(net(text, w=w, s=(4,)))
    assert match(model, model).nodes == {0: 0, 1: 1, 2: 2}
    other = index(net(text.replace("Relu", "Neg"), w=w, s=(4,)))
    with pytest.raises(StructureError, match="Relu"):
        match(model, other)


def test_inputs_that_are_left_out_are_left_out_in_both() -> None:
    text = "g (float[N,3] x) => (y) {{ a = Sigmoid (x) y = local.Any (a, {}, a) }}"
    models = [net(text.format(name)) for name in ('""', "x")]
    for model in models:
        model.opset_import.append(helper.make_opsetid("local", 1))
    models[0].graph.node[1].input[1] = ""
    left_out, given = map(index, models)
    assert match(left_out, left_out).nodes == {0: 0, 1: 1}
    with pytest.raises(StructureError):
        match(left_out, given)


def test_a_stated_default_equals_an_omitted_one() -> None:
    text = "g (float[N,4,4,4] x) => (float[N,4,4,4] y) {{ y = Conv {} (x, w) }}"
    plain = index(net(text.format(""), w=(4, 4, 1, 1)))
    stated = '<strides=[1,1], pads=[0,0,0,0], dilations=[1,1], group=1, kernel_shape=[1,1], auto_pad="NOTSET">'
    assert match(plain, index(net(text.format(stated), w=(4, 4, 1, 1)))).nodes == {0: 0}


def test_what_only_a_subgraph_reads_is_paired_too() -> None:
    model = net(
        """
        g (float[N,3,4,4] x, bool flag) => (float[N,3,4,4] y) {
          z = Conv (x, w)
          y = If (flag) < then_branch = t () => (float[N,3,4,4] p) { p = Relu (z) },
                          else_branch = e () => (float[N,3,4,4] q) { q = Neg (z) } >
        }
        """,
        w=(3, 3, 1, 1),
    )
    pairing = match(index(model), index(model))
    assert pairing.nodes[0] == 0
    assert pairing.tensors["z"] == "z"


def edited_attribute(model: onnx.ModelProto, tensor: str, name: str, value: object) -> onnx.ModelProto:
    result = copy(model)
    (node,) = (item for item in result.graph.node if item.output[0] == tensor)
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    return result


def other_operator(model: onnx.ModelProto) -> onnx.ModelProto:
    result = copy(model)
    (node,) = (item for item in result.graph.node if item.output[0] == "a_r")
    node.op_type = "Tanh"
    return result


def other_weight(model: onnx.ModelProto) -> onnx.ModelProto:
    result = copy(model)
    (position,) = (p for p, node in enumerate(result.graph.node) if node.output[0] == "c")
    set_parameter(result, position, 1, parameter(result, position, 1)[:, :4])
    return result


def other_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    result = copy(model)
    result.graph.output.append(onnx.ValueInfoProto(name="pooled"))
    return result


def other_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    result = copy(model)
    result.graph.input.append(helper.make_tensor_value_info("extra", 1, ["N"]))
    return result


def other_type(model: onnx.ModelProto) -> onnx.ModelProto:
    result = copy(model)
    result.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    return result


def constant_shortcut(model: onnx.ModelProto) -> onnx.ModelProto:
    result = copy(model)
    (node,) = (item for item in result.graph.node if item.output[0] == "sum1")
    result.graph.initializer.append(numpy_helper.from_array(np.ones((1, 8, 1, 1), np.float32), "ones"))
    node.input[1] = "ones"
    return result


def skipped_layer(model: onnx.ModelProto) -> onnx.ModelProto:
    """The residual branch starts one Relu earlier."""
    result = copy(model)
    (node,) = (item for item in result.graph.node if item.output[0] == "sum1")
    node.input[1] = "stem_n"
    return result


DIFFERENCES: dict[str, tuple[Callable[[onnx.ModelProto], onnx.ModelProto], list[str]]] = {
    "stride": (lambda model: edited_attribute(model, "c", "strides", [1, 1]), ["Conv:c", "strides", "the default"]),
    "group": (lambda model: edited_attribute(model, "b", "group", 4), ["Conv:b", "group"]),
    "epsilon": (lambda model: edited_attribute(model, "a_n", "epsilon", 1e-3), ["a_n", "epsilon"]),
    "operator": (other_operator, ["Tanh", "Relu", "a_r"]),
    "weight shape": (other_weight, ["Conv:c", "(12, 8, 3, 3)", "(12, 4, 3, 3)"]),
    "outputs": (other_outputs, ["outputs", "1", "2"]),
    "inputs": (other_inputs, ["inputs", "1", "2"]),
    "input type": (other_type, ["'x'", "uint8"]),
    "constant operand": (constant_shortcut, ["ones"]),
    "other source": (skipped_layer, ["stem_n"]),
}


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_first_difference_is_named(name: str, swapped: bool) -> None:
    change, words = DIFFERENCES[name]
    model = residual_net()
    pair = [index(model), index(change(model))]
    if swapped:
        pair.reverse()
    with pytest.raises(StructureError, match="not the same network") as caught:
        match(*pair)
    message = str(caught.value)
    if swapped:  # the counts come in the other order
        words = [word.replace("1 ", "2 ").replace("one 2", "one 1") for word in words]
    for word in words:
        assert word in message


def test_operands_of_one_structure_are_told_by_their_weights() -> None:
    text = "g (float[N,3,4,4] x) => (float[N,3,4,4] y) {{ a = Conv (x, v)  b = Conv (x, w)  y = Add ({}) }}"
    weights = {"v": (3, 3, 1, 1), "w": (3, 3, 1, 1)}
    straight, crossed = (net(text.format(order), **weights) for order in ("a, b", "b, a"))
    assert match(index(straight), index(crossed)).nodes == {0: 0, 1: 1, 2: 2}
    sparse = magnitude_pruned(straight, 0.7)
    assert match(index(sparse), index(crossed)).nodes == {0: 0, 1: 1, 2: 2}
    equal = {name: np.ones(shape, np.float32) for name, shape in weights.items()}
    assert match(index(net(text.format("a, b"), **equal)), index(crossed)).nodes == {0: 1, 1: 0, 2: 2}  # in order


def test_parameters_are_compared_whether_attribute_or_input() -> None:
    """A Clip of opset 6, where the bounds are attributes, and of opset 11, where they are inputs."""
    text = "g (float[N,4] x) => (float[N,4] y) {{ p = MatMul (x, w) y = Clip {} }}"
    attributes = index(net(text.format("<min=0.0, max=6.0> (p)"), opset=9, w=(4, 4)))
    bounds = {"low": np.float32(0), "high": np.float32(6)}
    inputs = index(net(text.format("(p, low, high)"), w=(4, 4), **bounds))
    assert match(attributes, inputs).nodes == match(inputs, attributes).nodes == {0: 0, 1: 1}
    other = index(net(text.format("(p, low, high)"), w=(4, 4), **bounds | {"high": np.float32(8)}))
    with pytest.raises(StructureError, match=r"max=6\.0.*8\.0"):
        match(attributes, other)
    with pytest.raises(StructureError, match=r"max=6\.0.*the default"):
        match(inputs, index(net(text.format("(p, low)"), w=(4, 4), low=np.float32(0))))


def test_a_parameter_may_be_folded_in_one() -> None:
    text = "g (float[N,3,4,4] x) => (float[N,M,4,4] y) {{ {} z = Pad (x, pads) y = Conv (z, w) }}"
    computed = "start = Constant <value_ints=[0,1,0,0]> () pads = Concat <axis=0> (start, start)"
    pads = np.array([0, 1, 0, 0, 0, 1, 0, 0], np.int64)
    folded = index(net(text.format(""), w=(3, 5, 1, 1), pads=pads))
    unfolded = index(net(text.format(computed), w=(3, 5, 1, 1)))
    assert match(folded, unfolded).nodes == {0: 2, 1: 3}
    assert match(unfolded, folded).nodes == {2: 0, 3: 1}
    stated = text.replace("pads)", "pads, fill)").format("")
    assert match(folded, index(net(stated, w=(3, 5, 1, 1), pads=pads, fill=np.float32(0)))).nodes == {0: 0, 1: 1}
    with pytest.raises(StructureError, match=r"value=1\.0"):
        match(index(net(stated, w=(3, 5, 1, 1), pads=pads, fill=np.float32(1))), folded)
    with pytest.raises(StructureError, match="has pads="):
        match(folded, index(net(text.format(""), w=(3, 5, 1, 1), pads=pads[::-1].copy())))


def test_slices_may_be_merged_in_one() -> None:
    """As simplifiers do, with attributes (opset 9) or inputs."""
    text = "g (float[N,3,8,8] x) => (float[N,3,3,4] y) {{ {} y = Conv (s, w) }}"
    numbers: dict[str, list[int]] = {"one": [1], "two": [2], "three": [3], "seven": [7]}
    numbers |= {"from": [1, 1], "to": [7, 7], "at": [2, 3], "step": [2, 1]}
    weights = {"w": (3, 3, 1, 1)} | {name: np.array(value) for name, value in numbers.items()}
    chain = "r = Slice (x, one, seven, two, two) s = Slice (r, one, seven, three)"
    two = index(net(text.format(chain), **weights))
    one = index(net(text.format("s = Slice (x, from, to, at, step)"), **weights))
    assert match(two, one).nodes == {1: 0, 2: 1}
    assert match(one, two).nodes == {0: 1, 1: 2}
    plain, old = "s = Slice (x, one, seven, three)", "s = Slice <starts=[1], ends=[7], axes=[3]> (x)"
    assert match(index(net(text.format(plain), **weights)), index(net(text.format(old), opset=9, **weights))).nodes
    with pytest.raises(StructureError, match="has slices="):
        match(two, index(net(text.format(plain), **weights)))


@pytest.mark.parametrize(
    ("starts", "axes"),
    [("scalar", "axes"), ("table", "axes"), ("starts", "scalar"), ("starts", "table"), ('""', "axes")],
)
def test_slices_that_onnxruntime_refuses_are_left_to_it(starts: str, axes: str) -> None:
    text = f"g (float[N,3,8,8] x) => (float[N,M,H,W] y) {{ s = Slice (x, {starts}, ends, {axes}) y = Conv (s, w) }}"
    values = {"scalar": np.array(2), "table": np.array([[2]]), "starts": [2], "axes": [2], "ends": [7]}
    model = index(net(text, w=(3, 3, 1, 1), **{name: np.array(value) for name, value in values.items()}))
    assert match(model, model).nodes == {0: 0, 1: 1}


def test_inputs_are_paired_by_position() -> None:
    text = "g (float[N,2] {0}, float[N,2] {1}) => (float[N,2] y) {{ d = Sub (a, b)  y = MatMul (d, w) }}"
    straight = index(net(text.format("a", "b"), w=(2, 2)))
    crossed = index(net(text.format("b", "a"), w=(2, 2)))
    assert match(straight, straight).tensors["d"] == "d"
    with pytest.raises(StructureError, match="'b'"):
        match(straight, crossed)


def test_one_layer_in_place_of_two_is_refused() -> None:
    """Two readers of one convolution are not two convolutions, which may have other weights."""
    text = "g (float[N,3,4,4] x) => (float[N,3,4,4] y) {{ a = Conv (x, w) {0} "
    text += "p = Relu (a)  q = Neg ({1})  y = Add (p, q) }}"
    one = index(net(text.format("", "a"), w=(3, 3, 1, 1)))
    two = index(net(text.format("b = Conv (x, v)", "b"), w=(3, 3, 1, 1), v=(3, 3, 1, 1)))
    with pytest.raises(StructureError, match="corresponds to both"):
        match(one, two)


def test_one_node_in_place_of_two_that_compute_the_same() -> None:
    """One of them behind a reshape that changes nothing."""
    text = "g (float[1,3,4,4] x) => (float[1,3,4,4] y) {{ a = Conv (x, w) g = Sigmoid (a) m = Mul (a, g) {0} "
    text += "p = Relu (m)  q = Neg ({1})  y = Add (p, q) }}"
    one = index(net(text.format("", "m"), w=(3, 3, 1, 1)))
    again = "r = Reshape (a, shape) n = Mul (g, r)"
    two = index(net(text.format(again, "n"), w=(3, 3, 1, 1), shape=np.array([1, 3, 4, 4])))
    for pruned, dense in ((one, two), (two, one)):
        assert match(pruned, dense).tensors["y"] == "y"
    square = again.replace("(g, r)", "(r, r)")
    other = index(net(text.format(square, "n"), w=(3, 3, 1, 1), shape=np.array([1, 3, 4, 4])))
    with pytest.raises(StructureError):
        match(one, other)


def test_folded_and_unfolded_do_not_match() -> None:
    text = "g (float[N,3,4,4] x) => (float[N,3,4,4] y) {{ {} }}"
    folded = net(text.format("y = Conv (x, w, b)"), w=(3, 3, 1, 1), b=(3,))
    shapes = {f"n_{part}": (3,) for part in ("gamma", "beta", "mean", "var")}
    kept = net(
        text.format("z = Conv (x, w)  y = BatchNormalization (z, n_gamma, n_beta, n_mean, n_var)"),
        w=(3, 3, 1, 1),
        **shapes,
    )
    for pair in ((folded, kept), (kept, folded)):
        with pytest.raises(StructureError, match="fold it in both or in neither"):
            match(*map(index, pair))


def test_two_networks_are_suspected_where_their_layers_differ_in_number() -> None:
    text = "g (float[N,3,4,4] x) => (float[N,3,4,4] y) {{ {} }}"
    weights = {"v": (3, 3, 1, 1), "w": (3, 3, 1, 1)}
    one = index(net(text.format("c = Conv (x, v)  y = Relu (c)"), **weights))
    two = index(net(text.format("c = Conv (x, v)  r = Relu (c)  y = Conv (r, w)"), **weights))
    with pytest.raises(
        StructureError, match="convolutions: 1 in the pruned model, 2 in the dense one, so they seem to be two"
    ):
        match(one, two)


@pytest.mark.parametrize(
    ("nodes", "cause"),
    [
        (
            "q = QuantizeLinear (c, scale, zero)  d = DequantizeLinear (q, scale, zero)  y = Relu (d)",
            r"\(QuantizeLinear\) is in the {} model alone, so a tool has quantized",
        ),
        ("y = com.microsoft.Gelu (c)", r"\(Gelu\) is in the {} model alone, an operator that onnxruntime makes"),
    ],
)
def test_what_a_tool_did_to_one_of_the_two_is_named(nodes: str, cause: str) -> None:
    text = "g (float[N,3,4,4] x) => (float[N,3,4,4] y) {{ c = Conv (x, w)  {} }}"
    weights = {"w": (3, 3, 1, 1), "scale": np.array(0.1, np.float32), "zero": np.array(0, np.uint8)}
    plain, changed = (index(net(text.format(part), **weights)) for part in ("y = Relu (c)", nodes))
    with pytest.raises(StructureError, match=cause.format("dense")):
        match(plain, changed)
    with pytest.raises(StructureError, match=cause.format("pruned")):
        match(changed, plain)


def test_batchnorm_is_only_suspected_where_one_of_the_two_has_less_of_it() -> None:
    text = "g (float[N,3,4,4] x) => (float[N,3,4,4] y) {{ {} }}"
    shapes = {f"n_{part}": (3,) for part in ("gamma", "beta", "mean", "var")}
    norm = "BatchNormalization ({}, n_gamma, n_beta, n_mean, n_var)"
    last = net(text.format(f"z = Conv (x, w)  y = {norm.format('z')}"), w=(3, 3, 1, 1), **shapes)
    first = net(text.format(f"z = {norm.format('x')}  y = Conv (z, w)"), w=(3, 3, 1, 1), **shapes)
    with pytest.raises(StructureError, match=r"has node .* where the dense model has .*; give the dense file that"):
        match(index(last), index(first))


EXCHANGED = "the dense model is the smaller one: exchange the two files"
OTHER = "in the dense model one of shape .*; give the dense file that the pruned one was made from"


def test_a_larger_model_cannot_come_from_a_smaller_one() -> None:
    dense = residual_net()
    cut = onnx_asr.prune_channels(dense, onnx_asr.ChannelPruneOptions(0.5)).model
    del cut.metadata_props[:]
    with pytest.raises(StructureError, match=EXCHANGED):
        Pair.of(dense, cut)


def test_numbers_of_channels_are_compared_only_where_they_matter() -> None:
    dense = residual_net()
    cut = index(onnx_asr.prune_channels(dense, onnx_asr.ChannelPruneOptions(0.5)).model)
    with pytest.raises(StructureError, match=OTHER):
        match(cut, index(dense))
    nodes, changes = counterparts(cut, index(dense))
    assert all(position == counterpart for position, counterpart in nodes.items())
    assert {point.node for point in survey(cut).layers} <= nodes.keys()
    assert not changes
    with pytest.raises(StructureError, match=EXCHANGED):
        counterparts(index(dense), cut)


def test_smaller_kernels_are_another_network() -> None:
    text = "g (float[N,3,4,4] x) => (float[N,3,H,W] y) { y = Conv (x, w) }"
    with pytest.raises(StructureError, match=OTHER):
        match(index(net(text, w=(3, 3, 1, 1))), index(net(text, w=(3, 3, 3, 3))))
    with pytest.raises(StructureError, match=OTHER):
        counterparts(index(net(text, w=(3, 3, 1, 1))), index(net(text, w=(3, 3, 3, 3))))


def test_the_variants_do_what_they_say() -> None:
    model = residual_net()
    x = images(1, seed=1)
    expected = run(model, {"x": x})["logits"]
    for name, variant in VARIANTS.items():
        other = variant(model)
        (output,) = run(other, {index(other).inputs[0].name: x}).values()
        np.testing.assert_allclose(output, expected, atol=1e-6, err_msg=name)
    assert constant(with_constant_nodes(model), "a_w").shape == (8, 8, 3, 3)
