from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from onnx_asr.errors import ModelError
from onnx_asr.graph.points import Survey, survey
from tests.graphs import LAYERS, bn, copy, first_output, index, layer, net, parameter, set_parameter


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_one_point_on_its_channels(name: str) -> None:
    _, point = layer(name)[1:]
    channels, axis = LAYERS[name][3:]
    assert (point.channels, point.channel_axis, point.level, point.batchnorm) == (channels, axis, 1, None)
    assert point.tensor == "y"  # behind the bias, where there is an Add
    has_bias = "b" in LAYERS[name][1]
    if point.kind == "MatMul":
        assert (point.bias is not None) == has_bias
    else:
        assert point.bias == (point.node, 2)


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_of_the_weight_feeds_its_channel_and_no_other(name: str) -> None:
    model, x, point = layer(name)
    layout = point.layer.layout
    weight = parameter(model, *point.weight)
    before = np.moveaxis(first_output(model, x), point.channel_axis, 0)
    rows = layout.to_rows(weight)
    assert rows.shape == (point.channels, weight.size // point.channels)
    for channel in range(point.channels):
        changed_rows = rows.copy()
        changed_rows[channel] *= 2.0
        changed = copy(model)
        value = layout.from_rows(changed_rows)
        assert value.shape == weight.shape
        set_parameter(changed, *point.weight, value)
        after = np.moveaxis(first_output(changed, x), point.channel_axis, 0)
        moved = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert moved == [i == channel for i in range(point.channels)]


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_every_weight_once_and_go_back_where_they_were(name: str) -> None:
    model, _, point = layer(name)
    layout = point.layer.layout
    shape = parameter(model, *point.weight).shape
    numbered = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    rows = layout.to_rows(numbered)
    assert sorted(rows.ravel()) == list(range(numbered.size))
    np.testing.assert_array_equal(layout.from_rows(rows), numbered)


def points_of(text: str, **weights: Any) -> Survey:
    return survey(index(net(text, **weights)))


def summary(found: Survey) -> list[tuple[str, str, int, int | None]]:
    return [(point.kind, point.tensor, point.level, point.batchnorm) for point in found.points]


def test_batchnorm_directly_behind_a_conv_belongs_to_it() -> None:
    found = points_of(
        """
        g (float[N,3,4,4] x) => (float[N,3,4,4] y) {
          z = Conv (x, w)
          n = BatchNormalization (z, n_gamma, n_beta, n_mean, n_var)
          y = Relu (n)
        }
        """,
        w=(3, 3, 1, 1),
        **bn("n", channels=3),
    )
    assert summary(found) == [("Conv", "z", 1, 1)]
    assert found.skips == ()


def test_batchnorm_behind_anything_else_is_a_point_of_its_own() -> None:
    """After an Add, before a Conv (pre-activation), on a Concat, on the graph input."""
    found = points_of(
        """
        g (float[N,3,4,4] x) => (float[N,3,4,4] y) {
          n0 = BatchNormalization (x, n0_gamma, n0_beta, n0_mean, n0_var)
          a = Conv (n0, a_w)
          s = Add (a, n0)
          n1 = BatchNormalization (s, n1_gamma, n1_beta, n1_mean, n1_var)
          r = Relu (n1)
          c = Concat <axis=1> (r, x)
          n2 = BatchNormalization (c, n2_gamma, n2_beta, n2_mean, n2_var)
          y = Conv (n2, b_w)
        }
        """,
        a_w=(3, 3, 1, 1),
        b_w=(3, 6, 1, 1),
        **bn("n0", "n1", channels=3),
        **bn("n2", channels=6),
    )
    assert summary(found) == [
        ("BatchNormalization", "x", 1, 0),
        ("Conv", "a", 2, None),
        ("BatchNormalization", "s", 3, 3),
        ("BatchNormalization", "c", 4, 6),
        ("Conv", "y", 5, None),
    ]
    assert [point.channels for point in found.points] == [3, 3, 3, 6, 3]


@pytest.mark.parametrize("second_reader", ["o = Neg (z)", "o = Identity (z)"])
def test_batchnorm_is_not_the_convs_where_others_read_the_tensor(second_reader: str) -> None:
    found = points_of(
        f"""
        g (float[N,3,4,4] x) => (float[N,3,4,4] y, float[N,3,4,4] o) {{
          z = Conv (x, w)
          y = BatchNormalization (z, n_gamma, n_beta, n_mean, n_var)
          {second_reader}
        }}
        """,
        w=(3, 3, 1, 1),
        **bn("n", channels=3),
    )
    assert summary(found) == [("Conv", "z", 1, None), ("BatchNormalization", "z", 2, 1)]


def test_batchnorm_is_not_the_convs_where_the_tensor_is_an_output() -> None:
    found = points_of(
        """
        g (float[N,3,4,4] x) => (float[N,3,4,4] y, float[N,3,4,4] z) {
          z = Conv (x, w)
          y = BatchNormalization (z, n_gamma, n_beta, n_mean, n_var)
        }
        """,
        w=(3, 3, 1, 1),
        **bn("n", channels=3),
    )
    assert summary(found) == [("Conv", "z", 1, None), ("BatchNormalization", "z", 2, 1)]


def test_batchnorms_may_share_parameters() -> None:
    found = points_of(
        """
        g (float[N,3,4,4] x) => (float[N,3,4,4] y) {
          a = Conv (x, w)
          n = BatchNormalization (a, n_gamma, n_beta, n_mean, n_var)
          b = Conv (n, w)
          y = BatchNormalization (b, n_gamma, n_beta, n_mean, n_var)
        }
        """,
        w=(3, 3, 1, 1),
        **bn("n", channels=3),
    )
    assert summary(found) == [("Conv", "a", 1, 1), ("Conv", "b", 2, 3)]


def test_levels_on_a_diamond() -> None:
    r"""``x - a -+- b - c -+- Add - f``, the shorter branch ``d`` on one level with ``b``."""
    found = points_of(
        """
        g (float[N,3,4,4] x) => (float[N,3,4,4] y) {
          a = Conv (x, w)
          ar = Relu (a)
          d = Conv (ar, w)
          b = Conv (ar, w)
          c = Conv (b, w)
          s = Add (c, d)
          y = Conv (s, w)
        }
        """,
        w=(3, 3, 1, 1),
    )
    assert [(point.tensor, point.level) for point in found.points] == [("a", 1), ("d", 2), ("b", 2), ("c", 3), ("y", 4)]


def test_levels_run_through_subgraphs() -> None:
    found = points_of(
        """
        g (float[N,3,4,4] x, bool flag) => (float[N,3,4,4] y) {
          a = Conv (x, w)
          c = If (flag) < then_branch = t () => (float[N,3,4,4] p) { p = Relu (a) },
                          else_branch = e () => (float[N,3,4,4] q) { q = Neg (a) } >
          y = Conv (c, w)
        }
        """,
        w=(3, 3, 1, 1),
    )
    assert [(point.tensor, point.level) for point in found.points] == [("a", 1), ("y", 2)]


def test_an_add_that_is_not_a_bias_stays_outside_the_point() -> None:
    for other, shape in (("x2", None), ("b", (4, 3)), ("b", (2, 1, 1))):
        weights = {"w": (4, 3)} | ({} if shape is None else {"b": shape})
        found = points_of(
            f"""
            g (float[N,4,4] x, float[N,4,3] x2) => (float[N,4,3] y) {{
              p = MatMul (x, w)
              y = Add (p, {other})
            }}
            """,
            **weights,
        )
        (point,) = found.points
        assert (point.tensor, point.bias) == ("p", None), (other, shape)


def test_matmul_bias_is_shared_by_nobody_else() -> None:
    (point,) = points_of(
        "g (float[N,4] x) => (float[N,3] y, float[N,3] o) { p = MatMul (x, w)  y = Add (p, b)  o = Neg (p) }",
        w=(4, 3),
        b=(3,),
    ).points
    assert (point.tensor, point.bias) == ("p", None)


def test_weights_in_constant_nodes_and_behind_identity_are_points() -> None:
    found = points_of(
        """
        g (float[N,1,4,4] x) => (float[N,2,4,4] y) {
          w = Constant <value = float[1,1,1,1] {2.0}> ()
          a = Conv (x, w)
          v0 = Identity (v)
          y = Conv (a, v0)
        }
        """,
        v=(2, 1, 1, 1),
    )
    assert [(point.tensor, point.channels) for point in found.points] == [("a", 1), ("y", 2)]


SKIPPED = {
    "run-time weight": (
        "g (float[N,3,4,4] x, float[5,3,1,1] w) => (float[N,5,4,4] y) { y = Conv (x, w) }",
        {},
        "weight is computed at run time",
        "weight-computed-at-run-time",
    ),
    "run-time bias": (
        "g (float[N,3,4,4] x, float[5] b) => (float[N,5,4,4] y) { y = Conv (x, w, b) }",
        {"w": (5, 3, 1, 1)},
        "bias is computed at run time",
        "bias-computed-at-run-time",
    ),
    "training": (
        """g (float[N,3,4,4] x) => (float[N,3,4,4] y) {
          y, m, v = BatchNormalization <training_mode=1> (x, n_gamma, n_beta, n_mean, n_var) }""",
        bn("n", channels=3),
        "training mode",
        "batchnorm-in-training-mode",
    ),
    "run-time statistics": (
        """g (float[N,3,4,4] x, float[3] n_mean) => (float[N,3,4,4] y) {
          y = BatchNormalization (x, n_gamma, n_beta, n_mean, n_var) }""",
        {"n_gamma": (3,), "n_beta": (3,), "n_var": (3,)},
        "computed at run time",
        "batchnorm-computed-at-run-time",
    ),
    "attention": (
        "g (float[N,4,4] x) => (float[N,4,4] y) { y = MatMul (x, x) }",
        {},
        "two activations",
        "no-constant-weight",
    ),
    "batched weight": (
        "g (float[N,4,4] x) => (float[N,4,4] y) { y = MatMul (x, w) }",
        {"w": (1, 4, 4)},
        "rank 3",
        "weight-not-2d",
    ),
    "integer weight": (
        "g (int32[N,4] x) => (int32[N,4] y) { y = MatMul (x, w) }",
        {"w": np.ones((4, 4), np.int32)},
        "not a floating-point",
        "weight-not-floating-point",
    ),
    "no effect": (
        "g (float[N,4] x) => (float[N,4] y) { y = Gemm <alpha=0.0> (x, w, b) }",
        {"w": (4, 4), "b": (4,)},
        "alpha or beta of zero",
        "factor-of-zero",
    ),
    "another operator": (
        'g (float[N,4] x) => (float[N,4] y) { y = Einsum <equation="ij,jk->ik"> (x, w) }',
        {"w": (4, 4)},
        "Einsum is not supported",
        "operator-not-supported",
    ),
    "an operator of a runtime": (
        "g (float[N,3,4] x) => (float[N,3,4] y) { y = com.microsoft.Attention <num_heads=2> (x, w, b) }",
        {"w": (4, 12), "b": (12,)},
        "Attention is not supported",
        "operator-not-supported",
    ),
    "bias per row": (
        "g (float[5,4] x) => (float[5,4] y) { y = Gemm (x, w, b) }",
        {"w": (4, 4), "b": (5, 1)},
        "not one value per channel",
        "bias-not-per-channel",
    ),
    "bias per element": (
        "g (float[4,4] x) => (float[4,4] y) { y = Gemm (x, w, b) }",
        {"w": (4, 4), "b": (4, 1)},
        "not one value per channel",
        "bias-not-per-channel",
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_cannot_be_repaired_is_skipped_with_a_reason(name: str) -> None:
    text, weights, reason, code = SKIPPED[name]
    found = points_of(text, **weights)
    assert found.points == ()
    (skip,) = found.skips
    assert reason in skip.reason
    assert skip.code == code


def test_a_training_batchnorm_behind_a_conv_is_skipped_and_the_conv_is_not() -> None:
    found = points_of(
        """
        g (float[N,3,4,4] x) => (float[N,3,4,4] y) {
          z = Conv (x, w)
          y, m, v = BatchNormalization <training_mode=1> (z, n_gamma, n_beta, n_mean, n_var)
        }
        """,
        w=(3, 3, 1, 1),
        **bn("n", channels=3),
    )
    assert summary(found) == [("Conv", "z", 1, None)]
    assert [(skip.node, skip.op_type) for skip in found.skips] == [(1, "BatchNormalization")]


def test_what_reaches_no_output_is_skipped() -> None:
    """Auxiliary heads that an exporter left behind have no effect on the outputs."""
    found = points_of(
        """
        g (float[N,3,4,4] x) => (float[N,3,4,4] y) {
          z = Conv (x, w)
          y = Relu (z)
          dangling = Conv (z, w)
        }
        """,
        w=(3, 3, 1, 1),
    )
    assert [point.tensor for point in found.points] == ["z"]
    (skip,) = found.skips
    assert "no output" in skip.reason


def test_convolutions_inside_subgraphs_are_reported() -> None:
    found = points_of(
        """
        g (float[N,3,4,4] x, bool flag) => (float[N,3,4,4] y) {
          y = If (flag) < then_branch = t () => (float[N,3,4,4] p) { p = Conv (x, w) },
                          else_branch = e () => (float[N,3,4,4] q) { q = Neg (x) } >
        }
        """,
        w=(3, 3, 1, 1),
    )
    assert found.points == ()
    (skip,) = found.skips
    assert "If" in skip.reason
    assert "subgraph" in skip.reason


QUANTIZED = {
    "dequantized": "d = DequantizeLinear (i, scale)  t = Transpose <perm=[1,0]> (d)  y = Gemm (x, t)",
    "quantized on the way": "q = QuantizeLinear (w, scale)  d = DequantizeLinear (q, scale)  y = MatMul (x, d)",
    "on the left": "d = DequantizeLinear (i, scale)  y = MatMul (d, x)",
    "integers": "a, s, o = DynamicQuantizeLinear (x)  m = MatMulInteger (a, i, o)  y = Cast <to=1> (m)",
    "linear": """a = QuantizeLinear (x, scale, zero)  m = QLinearMatMul (a, scale, zero, i, scale, zero8, scale, zero)
        y = DequantizeLinear (m, scale, zero)""",
}
CONSTANTS = {
    "w": (4, 4),
    "i": np.arange(16, dtype=np.int8).reshape(4, 4),
    "scale": np.float32(0.1),
    "zero": np.uint8(0),
    "zero8": np.int8(0),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_weight_is_skipped(name: str) -> None:
    text = f"g (float[4,4] x) => (float[4,4] z) {{ {QUANTIZED[name]}  z = MatMul (y, v) }}"
    found = points_of(text, v=(4, 4), **CONSTANTS)
    assert [point.name for point in found.points] == ["MatMul:z"]
    (skip,) = found.skips
    assert skip.code == "weight-quantized"


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_graph_whose_layers_are_all_quantized_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="already quantized"):
        points_of(f"g (float[4,4] x) => (float[4,4] y) {{ {QUANTIZED[name]} }}", **CONSTANTS)


def test_quantized_activations_are_no_obstacle() -> None:
    text = """g (float[N,4] x) => (uint8[N,N] y) {
        q = QuantizeLinear (x, scale, zero)  d = DequantizeLinear (q, scale, zero)  h = Gemm (d, w)
        p = QuantizeLinear (h, scale, zero)  e = DequantizeLinear (p, scale, zero)  t = Transpose <perm=[1,0]> (e)
        m = MatMul (e, t)  y = QuantizeLinear (m, scale, zero) }"""
    found = points_of(text, **CONSTANTS)
    assert [point.name for point in found.points] == ["Gemm:h"]
    assert [skip.code for skip in found.skips] == ["no-constant-weight"]


def test_quantized_parameters_of_a_batchnorm_are_skipped() -> None:
    text = """g (float[N,4,5] x) => (float[N,4,5] y) {
        g8 = QuantizeLinear (n_gamma, scale)  g = DequantizeLinear (g8, scale)  c = Conv (x, v)
        y = BatchNormalization (c, g, n_beta, n_mean, n_var) }"""
    found = points_of(text, scale=np.float32(0.1), v=(4, 4, 1), **bn("n", channels=4))
    assert [(point.name, point.batchnorm) for point in found.points] == [("Conv:c", None)]
    assert [skip.code for skip in found.skips] == ["weight-quantized"]


def test_same_names_in_other_domains_are_not_operators_of_the_standard() -> None:
    model = net("g (float[N,4] x) => (float[N,4] y) { y = Gemm (x, w) }", w=(4, 4))
    model.graph.node[0].domain = "com.microsoft"
    assert survey(index(model)).points == ()


def test_half_precision_weights_are_points() -> None:
    model = net("g (float16[N,4] x) => (float16[N,4] y) { y = Gemm (x, w) }", w=np.ones((4, 4), np.float16))
    assert numpy_helper.to_array(model.graph.initializer[0]).dtype == np.float16
    assert len(survey(index(model)).points) == 1
