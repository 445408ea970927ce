from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_asr.errors import ModelError
from onnx_asr.graph.index import GraphIndex, ancestors, captured, node_reads
from tests.graphs import index, net, run

CHAIN = """
chain (float[N,4] x) => (float[N,2] y) {
  stored = Constant <value = float[2,4] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}> ()
  same = Identity (stored)
  half = Cast <to=10> (same)
  whole = Cast <to=1> (half)
  wide = Transpose <perm=[1,0]> (whole)
  row = Reshape (wide, row_shape)
  square = Reshape (row, square_shape)
  y = MatMul (x, square)
}
"""

BRANCHES = """
branches (float[N,4] x, bool flag) => (float[N,4] y) {
  z = Relu (x)
  w = Neg (x)
  y = If (flag) <
    then_branch = then_graph () => (float[N,4] t) { t = Mul (z, scale) },
    else_branch = else_graph () => (float[N,4] e) { z2 = Neg (x) e = Add (z2, z2) }
  >
}
"""


def chain() -> onnx.ModelProto:
    return net(CHAIN, row_shape=np.array([8]), square_shape=np.array([4, 2]))


def test_constants_are_found_behind_every_kind_of_chain() -> None:
    model = chain()
    found = index(model)
    expected = np.arange(1.0, 9.0, dtype=np.float32).reshape(2, 4).T
    for name in ("stored", "same", "half", "whole", "wide", "row", "square"):
        assert found.is_constant(name), name
    assert not found.is_constant("x")
    assert not found.is_constant("y")
    np.testing.assert_array_equal(found.value("wide"), expected)
    np.testing.assert_array_equal(found.value("square"), expected.reshape(4, 2))
    assert found.value("half").dtype == np.float16
    # the value is what onnxruntime multiplies with
    np.testing.assert_array_equal(run(model, {"x": np.eye(4, dtype=np.float32)})["y"], found.value("square"))


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value_float = 2.5", np.float32(2.5)),
        ("value_floats = [1.0, 2.0]", np.array([1, 2], np.float32)),
        ("value_int = 3", np.int64(3)),
        ("value_ints = [3, 4]", np.array([3, 4])),
    ],
)
def test_every_form_of_constant_node(attribute: str, expected: np.ndarray) -> None:
    found = index(net(f"c (float[N] x) => (float[N] y) {{ c = Constant <{attribute}> () y = Identity (x) }}"))
    np.testing.assert_array_equal(found.value("c"), expected)
    assert found.value("c").dtype == expected.dtype


def test_element_type_comes_from_storage() -> None:
    found = index(chain())
    assert found.element_type("half") == TensorProto.FLOAT16
    assert found.element_type("square_shape") == TensorProto.INT64


def test_chains_that_depend_on_the_input_are_not_constant() -> None:
    found = index(
        net(
            """
            g (float[N,4] x) => (float[N,4] y, float[N,4] z) {
              t = Transpose (x)
              y = Transpose (t)
              w = Relu (c)
              z = Add (x, w)
            }
            """,
            c=np.ones(4, np.float32),
        )
    )
    assert not found.is_constant("t")
    assert not found.is_constant("w")  # an operator that is not folded
    with pytest.raises(KeyError):
        found.value("t")


def test_custom_domains_are_never_evaluated() -> None:
    model = net("g (float[N] x) => (float[N] y) { c = Identity (w)  y = Mul (x, c) }", w=np.ones(1, np.float32))
    assert index(model).is_constant("c")
    model.graph.node[0].domain = "com.example"
    assert not index(model).is_constant("c")


def test_initializers_that_are_graph_inputs_are_constants_not_inputs() -> None:
    model = net("g (float[N,2] x, float[2] b) => (float[N,2] y) { y = Add (x, b) }", ir=3, b=(2,))
    found = index(model)
    assert [value.name for value in found.inputs] == ["x"]
    assert found.is_constant("b")
    np.testing.assert_array_equal(found.value("b"), numpy_helper.to_array(model.graph.initializer[0]))


def test_what_a_subgraph_captures_is_read_by_its_node() -> None:
    model = net(BRANCHES, scale=(4,))
    found = index(model)
    assert found.consumers["z"] == [2]
    assert found.consumers["scale"] == [2]
    assert found.consumers["x"] == [0, 1, 2]
    assert set(node_reads(found.nodes[2])) == {"flag", "z", "scale", "x"}
    assert "z2" not in found.consumers
    assert found.sole_consumer("z") == 2
    assert found.sole_consumer("w") is None


def test_nested_subgraphs_capture_from_every_level_but_their_own() -> None:
    inner = helper.make_graph(
        [helper.make_node("Add", ["local", "outer"], ["s"]), helper.make_node("Mul", ["s", "own"], ["r"])],
        "inner",
        [],
        [onnx.ValueInfoProto(name="r")],
        [numpy_helper.from_array(np.ones(1, np.float32), "own")],
    )
    middle = helper.make_graph(
        [
            helper.make_node("Neg", ["far"], ["local"]),
            helper.make_node("If", ["flag"], ["q"], then_branch=inner, else_branch=inner),
        ],
        "middle",
        [],
        [onnx.ValueInfoProto(name="q"), onnx.ValueInfoProto(name="passed")],
    )
    assert set(captured(middle)) == {"far", "flag", "outer", "passed"}


def test_sole_consumer() -> None:
    found = index(
        net(
            """
            g (float[N,4] x) => (float[N,4] shown, float[N,4] y) {
              one = Relu (x)
              twice = Relu (one)
              shown = Neg (twice)
              square = Mul (shown, shown)
              y = Add (square, twice)
            }
            """
        )
    )
    assert found.sole_consumer("one") == 1
    assert found.sole_consumer("twice") is None  # two readers
    assert found.sole_consumer("shown") is None  # a graph output as well
    assert found.sole_consumer("square") == 4
    assert found.consumers["shown"] == [3]  # one node that reads it twice


def test_ancestors_stop_at_what_is_given() -> None:
    found = index(net(BRANCHES, scale=(4,)))
    assert ancestors(found, ["y"]) == {0, 2}
    assert ancestors(found, ["y"], stop=["z"]) == {2}
    assert ancestors(found, ["y"], stop=["y"]) == set()
    assert ancestors(found, ["w", "z"]) == {0, 1}


def test_a_node_that_reads_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ModelError, match="reads tensor 'ghost'"):
        index(net("g (float[N] x) => (float[N] y) { y = Add (x, ghost) }"))


def test_nodes_out_of_order_are_refused() -> None:
    model = net("g (float[N] x) => (float[N] y) { a = Relu (x)  y = Neg (a) }")
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    with pytest.raises(ModelError, match="reads tensor 'a'"):
        index(model)


def test_a_subgraph_that_captures_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ModelError, match="'scale'"):
        index(net(BRANCHES))


def test_a_tensor_produced_twice_is_refused() -> None:
    with pytest.raises(ModelError, match="produces tensor 'y', which already exists"):
        index(net("g (float[N] x) => (float[N] y) { y = Relu (x)  y = Neg (x) }"))


@pytest.mark.parametrize("taken", ["x", "w"])
def test_a_node_that_writes_over_an_input_or_initializer_is_refused(taken: str) -> None:
    text = f"g (float[N] x) => (float[N] y) {{ y = Mul (x, w)  {taken} = Relu (y) }}"
    with pytest.raises(ModelError, match=f"produces tensor '{taken}', which"):
        index(net(text, w=np.ones(1, np.float32)))


def test_an_output_that_nothing_produces_is_refused() -> None:
    with pytest.raises(ModelError, match="output 'ghost'"):
        index(net("g (float[N] x) => (float[N] y, float[N] ghost) { y = Relu (x) }"))


def test_the_model_is_not_changed() -> None:
    model = chain()
    before = model.SerializeToString(deterministic=True)
    found = GraphIndex.of(model)
    found.value("square")
    assert found.model is model
    assert model.SerializeToString(deterministic=True) == before


def test_labels_name_unnamed_nodes() -> None:
    model = net("g (float[N] x) => (float[N] y) { a = Relu (x)  y = Neg (a) }")
    model.graph.node[0].name = "first"
    assert [index(model).label(p) for p in (0, 1)] == ["first", "Neg:y"]
