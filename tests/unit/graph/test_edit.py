from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_asr.errors import ModelError
from onnx_asr.graph.edit import EditPlan, apply, set_metadata, unique_name
from tests.graphs import bn, constant, copy, digits, first_output, index, net, residual_net, run

Edits = dict[tuple[int, int], np.ndarray]


def edited(model: onnx.ModelProto, values: Edits, **rest: Any) -> onnx.ModelProto:
    before = model.SerializeToString(deterministic=True)
    result = apply(index(model), EditPlan(values=values, **rest))
    assert model.SerializeToString(deterministic=True) == before, "the input model was changed"
    return result


def bytes_of(tensors: Any) -> dict[str, bytes]:
    return {tensor.name: tensor.SerializeToString(deterministic=True) for tensor in tensors}


def names(model: onnx.ModelProto) -> list[str]:
    return [tensor.name for tensor in model.graph.initializer]


def input_names(model: onnx.ModelProto) -> list[str]:
    return [value.name for value in model.graph.input]


def rest_of(model: onnx.ModelProto) -> bytes:
    """Everything but the initializers."""
    result = copy(model)
    del result.graph.initializer[:]
    return bytes(result.SerializeToString(deterministic=True))


def documented() -> onnx.ModelProto:
    """A net in which every field that an edit might lose is set."""
    model = digits("vgg")
    model.producer_name, model.producer_version = "someone", "7"
    model.doc_string, model.graph.doc_string = "model", "graph"
    model.domain, model.model_version = "example", 12
    set_metadata(model, "owner", "someone")
    for number, node in enumerate(model.graph.node):
        node.doc_string = f"node {number}"
    for tensor in model.graph.initializer:
        tensor.doc_string = f"tensor {tensor.name}"
    model.graph.value_info.append(helper.make_tensor_value_info(model.graph.node[0].output[0], 1, ["N", 32, 8, 8]))
    return model


def test_an_empty_plan_gives_the_same_bytes() -> None:
    model = documented()
    assert edited(model, {}).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_only_the_edited_value_changes() -> None:
    model = documented()
    position = next(p for p, node in enumerate(model.graph.node) if node.op_type == "Conv")
    name = model.graph.node[position].input[1]
    new = constant(model, name) * 3.0
    result = edited(model, {(position, 1): new})
    assert rest_of(result) == rest_of(model)
    before, after = bytes_of(model.graph.initializer), bytes_of(result.graph.initializer)
    assert list(before) == list(after)
    assert {key for key in before if before[key] != after[key]} == {name}
    np.testing.assert_array_equal(constant(result, name), new)
    (tensor,) = (tensor for tensor in result.graph.initializer if tensor.name == name)
    assert tensor.doc_string == f"tensor {name}"
    onnx.checker.check_model(result, full_check=True)


def test_a_constant_node_is_written_in_place() -> None:
    model = net(
        """
        g (float[N,2] x) => (float[N,2] y) {
          w = Constant <value = float[2,2] {1.0, 2.0, 3.0, 4.0}> ()
          y = MatMul (x, w)
        }
        """
    )
    new = np.array([[5, 6], [7, 8]], np.float32)
    result = edited(model, {(1, 1): new})
    assert [node.op_type for node in result.graph.node] == ["Constant", "MatMul"]
    assert names(result) == []
    np.testing.assert_array_equal(first_output(result, np.eye(2, dtype=np.float32)), new)


SHARED = """
shared (float[N,2] x) => (float[N,2] y) {
  a = MatMul (x, w)
  b = MatMul (a, w)
  y = Add (b, c)
}
"""


def test_a_shared_initializer_gets_a_private_copy() -> None:
    model = net(SHARED, w=(2, 2), c=(2,))
    old, new = constant(model, "w"), np.array([[5, 6], [7, 8]], np.float32)
    result = edited(model, {(1, 1): new})
    onnx.checker.check_model(result, full_check=True)
    assert result.graph.node[0].input[1] == "w"
    assert result.graph.node[1].input[1] != "w"
    assert bytes_of(result.graph.initializer)["w"] == bytes_of(model.graph.initializer)["w"]
    x = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    np.testing.assert_allclose(first_output(result, x), x @ old @ new + constant(model, "c"), rtol=1e-5)


def test_different_values_for_all_readers_leave_no_original_behind() -> None:
    model = net(SHARED, w=(2, 2), c=(2,))
    first, second = np.full((2, 2), 2, np.float32), np.full((2, 2), 3, np.float32)
    result = edited(model, {(0, 1): first, (1, 1): second})
    onnx.checker.check_model(result, full_check=True)
    assert len(names(result)) == 3
    assert "w" not in names(result)
    x = np.ones((1, 2), np.float32)
    np.testing.assert_allclose(first_output(result, x), x @ first @ second + constant(model, "c"), rtol=1e-6)


def test_one_value_for_all_readers_keeps_them_tied() -> None:
    model = net(SHARED, w=(2, 2), c=(2,))
    new = np.full((2, 2), 2, np.float32)
    result = edited(model, {(0, 1): new, (1, 1): new})
    assert names(result) == names(model)
    assert rest_of(result) == rest_of(model)
    np.testing.assert_array_equal(constant(result, "w"), new)


def test_a_reader_outside_the_plan_keeps_its_value() -> None:
    """Also where the other reader is the same node, in another slot, or a subgraph, or where it is an output."""
    new = np.full(3, 9, np.float32)
    model = net(
        """
        g (float[N,3,2,2] x) => (float[N,3,2,2] y, float[3] shown) {
          y = BatchNormalization (x, ones, zeros, zeros, ones)
          shown = Identity (v)
        }
        """,
        ones=np.ones(3, np.float32),
        zeros=np.zeros(3, np.float32),
        v=(3,),
    )
    result = edited(model, {(0, 4): new})
    onnx.checker.check_model(result, full_check=True)
    np.testing.assert_array_equal(constant(result, result.graph.node[0].input[1]), np.ones(3))
    np.testing.assert_array_equal(constant(result, result.graph.node[0].input[4]), new)

    model = net(
        """
        g (float[N,3] x, bool flag) => (float[N,3] y) {
          z = MatMul (x, w)
          y = If (flag) < then_branch = t () => (float[N,3] p) { p = MatMul (z, w) },
                          else_branch = e () => (float[N,3] q) { q = Neg (z) } >
        }
        """,
        w=(3, 3),
    )
    result = edited(model, {(0, 1): np.zeros((3, 3), np.float32)})
    np.testing.assert_array_equal(constant(result, "w"), constant(model, "w"))

    model = net("g (float[N,2] x) => (float[N,2] y, float[2,2] w) { y = MatMul (x, w) }", w=(2, 2))
    result = edited(model, {(0, 1): np.zeros((2, 2), np.float32)})
    out = run(result, {"x": np.ones((1, 2), np.float32)})
    np.testing.assert_array_equal(out["w"], constant(model, "w"))
    np.testing.assert_array_equal(out["y"], np.zeros((1, 2)))


def test_orphans_are_removed_with_all_that_only_fed_them() -> None:
    """``v`` behind two Identities goes with its chain; ``u`` stays, for the other end of the chain."""
    model = net(
        """
        g (float[N,2] x) => (float[N,2] y) {
          i1 = Identity (v)
          i2 = Identity (i1)
          t = Transpose (u)
          a = MatMul (x, i2)
          b = MatMul (a, t)
          y = MatMul (b, u)
        }
        """,
        v=(2, 2),
        u=(2, 2),
    )
    new_a, new_b = np.full((2, 2), 2, np.float32), np.full((2, 2), 3, np.float32)
    result = edited(model, {(3, 1): new_a, (4, 1): new_b})
    onnx.checker.check_model(result, full_check=True)
    assert [node.op_type for node in result.graph.node] == ["MatMul", "MatMul", "MatMul"]
    assert "v" not in names(result)
    assert "u" in names(result)
    x = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(first_output(result, x), new_a @ new_b @ constant(model, "u"), rtol=1e-6)


def test_an_identity_that_others_read_survives() -> None:
    model = net(
        "g (float[N,2] x) => (float[N,2] y) { i = Identity (v)  a = MatMul (x, i)  y = MatMul (a, i) }", v=(2, 2)
    )
    result = edited(model, {(1, 1): np.zeros((2, 2), np.float32)})
    assert [node.op_type for node in result.graph.node] == ["Identity", "MatMul", "MatMul"]
    assert "v" in names(result)


@pytest.mark.parametrize("private", [False, True])
def test_old_files_where_initializers_are_inputs(private: bool) -> None:
    """In IR 3 every initializer is also a graph input: private copies join both lists, orphans leave both."""
    text = "g (float[N,2] x, float[2,2] w, float[2] c) => (float[N,2] y) { a = MatMul (x, w) "
    text += "b = MatMul (a, w)  y = Add (b, c) }" if private else "y = Add (a, c) }"
    model = net(text, ir=3, w=(2, 2), c=(2,))
    new = np.full((2, 2), 2, np.float32)
    result = edited(model, {(0, 1): new, (1, 1): new + 1} if private else {(0, 1): new})
    onnx.checker.check_model(result, full_check=True)
    assert set(names(result)) == set(input_names(result)) - {"x"}
    assert ("w" in names(result)) is not private
    x = np.ones((1, 2), np.float32)
    expected = x @ new @ (new + 1) if private else x @ new
    np.testing.assert_allclose(first_output(result, x), expected + constant(model, "c"), rtol=1e-6)


def test_values_are_stored_in_the_type_and_shape_of_the_file() -> None:
    model = net(
        "g (float16[N,2] x) => (float16[N,2] y) { y = Gemm (x, w, c) }",
        w=np.ones((2, 2), np.float16),
        c=np.ones((1, 2), np.float16),
    )
    result = edited(model, {(0, 1): np.full((2, 2), 1 / 3), (0, 2): np.array([0.5, 0.25])})
    types = {tensor.name: tensor.data_type for tensor in result.graph.initializer}
    assert types == {"w": TensorProto.FLOAT16, "c": TensorProto.FLOAT16}
    np.testing.assert_array_equal(constant(result, "w"), np.full((2, 2), 1 / 3, np.float16))
    assert constant(result, "c").shape == (1, 2)


@pytest.mark.parametrize(
    ("dtype", "value"), [(np.float16, 7e4), (np.float32, 1e39), (np.float32, np.nan), (np.float16, -np.inf)]
)
def test_values_that_do_not_fit_the_type_are_refused(dtype: Any, value: float) -> None:
    element = {np.float16: "float16", np.float32: "float"}[dtype]
    text = f"g ({element}[N,2] x) => ({element}[N,2] y) {{ y = MatMul (x, w) }}"
    model = net(text, w=np.ones((2, 2), dtype))
    with pytest.raises(ModelError, match=r"input 1 of node MatMul:y .* not finite as float"):
        edited(model, {(0, 1): np.array([[1.0, 1.0], [1.0, value]])})
    with pytest.raises(ModelError, match="not finite as float"):
        edited(model, {}, added_bias={0: np.array([1.0, value])})


@pytest.mark.parametrize("element", ["float", "float16", "double"])
def test_a_bias_is_added_behind_a_matmul(element: str) -> None:
    dtype = {"float": np.float32, "float16": np.float16, "double": np.float64}[element]
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(3, 2)).astype(dtype)
    text = f"g ({element}[N,3] x) => ({element}[N,2] y, {element}[N,2] z) {{ z = MatMul (x, w)  y = Neg (z) }}"
    model = net(text, w=weight)
    bias = np.array([2.0, -3.0])
    result = edited(model, {(0, 1): weight * 2}, added_bias={0: bias})
    onnx.checker.check_model(result, full_check=True)
    x = generator.normal(size=(4, 3)).astype(dtype)
    out = run(result, {"x": x})
    tolerance = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(out["z"], x @ weight * 2 + bias, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(out["y"], -(x @ weight * 2 + bias), rtol=tolerance, atol=tolerance)
    assert [node.op_type for node in result.graph.node] == ["MatMul", "Add", "Neg"]


def test_a_missing_bias_slot_is_filled() -> None:
    model = net("g (float[N,2,3,3] x) => (float[N,2,3,3] y) { y = Conv (x, w) }", w=(2, 2, 1, 1))
    bias = np.array([1.0, -2.0])
    result = edited(model, {(0, 2): bias})
    onnx.checker.check_model(result, full_check=True)
    x = np.random.default_rng(0).normal(size=(2, 2, 3, 3)).astype(np.float32)
    np.testing.assert_allclose(first_output(result, x), first_output(model, x) + bias.reshape(-1, 1, 1), atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,2] x) => (float[N,2] y) { w_repaired = MatMul (x, w)  y = MatMul (w_repaired, w) }",
        "g (float[N,2] x) => (float[N,2] w_repaired) { a = MatMul (x, w)  w_repaired = MatMul (a, w) }",
        "g (float[N,2] x) => (float[N,2] y) { a = MatMul (x, w)  y = MatMul (a, w)  w_repaired = Relu (a) }",
        "g (float[N,2] x, float[N,2] w_repaired) => (float[N,2] y) { a = MatMul (x, w)  y = MatMul (a, w) }",
        "g (float[N,2] x) => (float[N,2] y) <float w_repaired = {1.0}> { a = MatMul (x, w)  y = MatMul (a, w) }",
    ],
    ids=["inner tensor", "graph output", "tensor that nobody reads", "graph input", "initializer that nobody reads"],
)
def test_a_new_name_is_not_one_that_is_there(text: str) -> None:
    model = net(text, w=(2, 2))
    result = edited(model, {(0, 1): np.zeros((2, 2), np.float32)})
    onnx.checker.check_model(result, full_check=True)
    assert list(result.graph.node[0].input) == ["x", "w_repaired_1"]
    every = [*(name for node in result.graph.node for name in node.output), *names(result), *input_names(result)]
    assert len(set(every)) == len(every)


def test_a_new_name_is_not_that_of_a_sparse_initializer() -> None:
    model = net("g (float[N,2] x) => (float[N,2] y) { a = MatMul (x, w)  y = MatMul (a, w) }", w=(2, 2))
    one = numpy_helper.from_array(np.ones(1, np.float32), "w_repaired")
    place = numpy_helper.from_array(np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(one, place, [2]))
    result = edited(model, {(0, 1): np.zeros((2, 2), np.float32)})
    assert list(result.graph.node[0].input) == ["x", "w_repaired_1"]


@pytest.mark.parametrize(
    ("inner", "sign"),
    [
        ("{ w_repaired = Neg (a)  p = Neg (w_repaired) }", 1),
        ("<float w_repaired = {-1.0}> { p = Mul (a, w_repaired) }", -1),
        (
            "{ t = Identity (flag)  p = If (t) < "
            "then_branch = g () => (float[N,2] w_repaired) { w_repaired = Neg (a) }, "
            "else_branch = h () => (float[N,2] r) { r = Neg (a) } > }",
            -1,
        ),
    ],
    ids=["made in a branch", "constant of a branch", "made in a branch of a branch"],
)
def test_a_new_name_is_not_that_of_a_tensor_within_a_subgraph(inner: str, sign: int) -> None:
    model = net(
        f"""g (float[N,2] x, bool flag) => (float[N,2] y) {{
          a = MatMul (x, w)
          c = If (flag) <
            then_branch = t () => (float[N,2] p) {inner},
            else_branch = e () => (float[N,2] q) {{ q = Relu (a) }}
          >
          y = MatMul (c, w) }}""",
        w=(2, 2),
    )
    result = edited(model, {(0, 1): np.eye(2, dtype=np.float32)})
    onnx.checker.check_model(result, full_check=True)
    x = np.ones((1, 2), np.float32)
    found = run(result, {"x": x, "flag": np.array(True)})["y"]
    np.testing.assert_allclose(found, sign * x @ constant(model, "w"), rtol=1e-6)


def test_unique_names_are_counted_up_and_taken() -> None:
    taken = {"n", "n_1"}
    assert unique_name(taken, "n") == "n_2"
    assert unique_name(taken, "n") == "n_3"
    assert unique_name(taken, "m") == "m"
    assert taken == {"n", "n_1", "n_2", "n_3", "m"}


def test_notes_are_added_to_doc_strings_and_metadata_is_set() -> None:
    model = net(SHARED, w=(2, 2), c=(2,))
    model.graph.node[0].doc_string = "before"
    set_metadata(model, "kept", "yes")
    set_metadata(model, "changed", "old")
    plan = EditPlan(notes={0: "note", 1: "note"})
    result = apply(index(model), plan, {"changed": "new", "added": "1"})
    assert [node.doc_string for node in result.graph.node] == ["before\nnote", "note", ""]
    entries = {entry.key: entry.value for entry in result.metadata_props}
    assert entries == {"kept": "yes", "changed": "new", "added": "1"}
    assert len(result.metadata_props) == 3


def test_notes_find_their_nodes_when_others_go() -> None:
    model = net("g (float[N,2] x) => (float[N,2] y) { i = Identity (v)  a = Relu (x)  y = MatMul (a, i) }", v=(2, 2))
    plan = EditPlan({(2, 1): np.zeros((2, 2), np.float32)}, notes={2: "zeroed"}, added_bias={2: np.ones(2)})
    result = apply(index(model), plan)
    assert [(node.op_type, node.doc_string) for node in result.graph.node] == [
        ("Relu", ""),
        ("MatMul", "zeroed"),
        ("Add", ""),
    ]


def test_a_plan_reads_back_what_it_will_write() -> None:
    model = residual_net()
    found = index(model)
    plan = EditPlan()
    assert plan.current(found, 0, 2) is None  # no bias
    np.testing.assert_array_equal(plan.current(found, 0, 1), constant(model, "stem_w"))
    plan.values[0, 1] = np.zeros(1)
    assert plan.current(found, 0, 1) is not None
    assert float(plan.current(found, 0, 1)[0]) == 0.0  # type: ignore[index]
    assert [key for key, _ in plan.values_of(0)] == [(0, 1)]
    assert plan.values_of(1) == []


def test_shared_batchnorm_parameters_are_parted() -> None:
    """Two BatchNormalizations on the same four initializers, one of them recalibrated."""
    model = net(
        """
        g (float[N,3,2,2] x) => (float[N,3,2,2] y) {
          a = BatchNormalization (x, n_gamma, n_beta, n_mean, n_var)
          y = BatchNormalization (a, n_gamma, n_beta, n_mean, n_var)
        }
        """,
        **bn("n", channels=3),
    )
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 2)).astype(np.float32)
    result = edited(model, {(1, 3): np.full(3, 5.0), (1, 4): np.full(3, 2.0)})
    before, after = (run(item, {"x": x}, ["a"]) for item in (model, result))
    np.testing.assert_array_equal(before["a"], after["a"])
    gamma, beta = (constant(model, f"n_{part}").reshape(-1, 1, 1) for part in ("gamma", "beta"))
    np.testing.assert_allclose(after["y"], gamma * (before["a"] - 5) / np.sqrt(2 + 1e-5) + beta, rtol=1e-4, atol=1e-5)


def test_tensors_stored_as_typed_fields_are_replaced_whole() -> None:
    """``float_data`` instead of ``raw_data``: old exporters and the text format."""
    model = net("g (float[N,2] x) => (float[N,2] y) { y = MatMul (x, w) }")
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0]))
    new = np.full((2, 2), 7, np.float32)
    result = edited(model, {(0, 1): new})
    np.testing.assert_array_equal(numpy_helper.to_array(result.graph.initializer[0]), new)
    np.testing.assert_array_equal(first_output(result, np.eye(2, dtype=np.float32)), new)
