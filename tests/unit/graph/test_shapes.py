"""Shapes for a typical input."""

from __future__ import annotations

import numpy as np

from onnx_asr.graph.shapes import typical_shapes
from tests.graphs import index, net


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
