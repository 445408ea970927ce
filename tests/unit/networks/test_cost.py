"""Parameters, operations and bytes of a network."""

from __future__ import annotations

from onnx_asr.networks.cost import cost
from onnx_asr.networks.operations import Probe
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
    found = cost(index(model), Probe())
    assert found.parameters == 6 * 2 * 9 + 6 + 6 * 3 * 4 + 21 + 35
    assert found.flops == 2 * (6 * 16 * 2 * 9 + 6 * 16 * 3 * 4 + 21 + 35)
    assert found.nonzeros == found.parameters - 6 * 9
    assert found.size == model.ByteSize()
    assert found.compressed < found.size


def test_a_stack_of_matrices_is_counted() -> None:
    text = "g (float[2,3,4] x) => (float[2,3,5] y, float[2,6,4] z) { y = MatMul (x, w)  z = MatMul (v, x) }"
    model = net(text, w=(2, 4, 5), v=(2, 6, 3))
    assert cost(index(model), Probe()).flops == 2 * (2 * 3 * 5 * 4 + 2 * 6 * 4 * 3)
