"""Shapes for a typical input, and what a network costs."""

from __future__ import annotations

import numpy as np

from onnx_asr.graph.shapes import cost, typical_shapes
from tests.graphs import index, net, parameter, set_parameter


def test_operations_and_parameters_are_counted() -> None:
    model = net(
        """
        g (float[N,4,8,8] x) => (float[N,5] y) {
          a = Conv <group=2, strides=[2,2], pads=[1,1,1,1]> (x, wa, ba)
          b = ConvTranspose <strides=[2,2]> (a, wb)
          c = GlobalAveragePool (b)
          d = Flatten (c)
          e = Gemm <transB=1> (d, we)
          y = MatMul (e, wy)
        }
        """,
        wa=(6, 2, 3, 3),
        ba=(6,),
        wb=(6, 3, 2, 2),
        we=(7, 3),
        wy=(7, 5),
    )
    weight = parameter(model, 0, 1).copy()
    weight[:, 0] = 0
    set_parameter(model, 0, 1, weight)
    found = cost(index(model))
    assert found.parameters == 6 * 2 * 9 + 6 + 6 * 3 * 4 + 21 + 35
    assert found.flops == 2 * (6 * 16 * 2 * 9 + 6 * 16 * 3 * 4 + 21 + 35)
    assert found.nonzeros == found.parameters - 6 * 9
    assert found.size == model.ByteSize()
    assert found.compressed < found.size


def test_open_dimensions_are_filled_in_and_computed_shapes_followed() -> None:
    model = net(
        """
        g (float[N,3,H,W] x) => (y) {
          s = Shape (x)
          n = Slice (s, zero, one)
          t = Concat <axis=0> (n, rest)
          y = Reshape (x, t)
        }
        """,
        zero=np.array([0]),
        one=np.array([1]),
        rest=np.array([-1]),
    )
    assert typical_shapes(index(model))["y"] == (1, 3 * 224 * 224)


def test_weights_behind_constant_arithmetic_are_known() -> None:
    """As in pads that an exporter computes from the shape of a constant."""
    model = net(
        """
        g (float[N,3,8,8] x) => (y) {
          s = Shape (given)
          m = Sub (four, s)
          zeros = ConstantOfShape <value = int64[1] {0}> (m)
          pads = Concat <axis=0> (given, zeros)
          y = Pad (x, pads)
        }
        """,
        given=np.array([0, 1, 0, 0, 0, 2]),
        four=np.array([8]),
    )
    assert typical_shapes(index(model))["y"] == (1, 6, 8, 8)
