"""Networks and pairs: what corresponds to what."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from onnx_asr.errors import StructureError
from onnx_asr.networks.pair import Network, Pair
from onnx_asr.pairing.match import match
from tests.graphs import dense_net, folded, index, net, residual_net


@pytest.mark.parametrize("make", [residual_net, dense_net, lambda: folded(residual_net())])
def test_a_draft_has_the_graph_of_its_network(make: Callable[[], onnx.ModelProto]) -> None:
    """What is found by structure is what is assumed."""
    network = Network.of(make(), "dense", compared=True)
    pair, found = Pair.with_itself(network), match(network.index, index(make()))
    assert len(found.nodes) > 5
    assert found.nodes.items() <= pair.pairing.nodes.items()
    assert all(name == other for name, other in found.tensors.items())
    assert all(name == other for name, other in pair.pairing.tensors.items())
    assert network.index.producer.keys() <= pair.pairing.tensors.keys()


def test_the_dense_weights_are_read_with_what_follows_them_folded_in() -> None:
    model = residual_net()
    kept, plain = (Network.of(item, "dense", compared=True) for item in (model, folded(model)))
    layers = list(zip(kept.survey.layers, plain.survey.layers, strict=True))
    assert sum(point.batchnorm is not None for point, _ in layers) > 3
    for point, other in layers:
        rows = Pair.with_itself(kept).dense_rows(point)
        np.testing.assert_allclose(rows, Pair.with_itself(plain).dense_rows(other), atol=1e-5)


@pytest.mark.parametrize(("parameter", "shape"), [("w", (4, 3, 1, 1)), ("var", (4,)), ("scale", (4,))])
def test_parameters_that_only_the_dense_model_computes_are_refused(parameter: str, shape: tuple[int, ...]) -> None:
    """As in a network with weight normalisation, of which a tool folded one version."""
    text = (
        "g (float[N,3,4,4] x) => (float[N,4,4,4] y) {{ {} a = Conv (x, w)  r = Relu (a)"
        "  y = BatchNormalization (r, scale, bias, mean, var) }}"
    )
    weights = {"w": (4, 3, 1, 1), "scale": (4,), "bias": (4,), "mean": (4,), "var": np.ones(4, np.float32)}
    stored = net(text.format(""), **weights)
    del weights[parameter]
    weights |= {"parts": np.ones((*shape, 2), np.float32), "axes": np.array([len(shape)], np.int64)}
    computed = net(text.format(f"{parameter} = ReduceSum <keepdims = 0> (parts, axes)"), **weights)
    with pytest.raises(StructureError, match=f"stores the parameters of .*, the dense model computes '{parameter}'"):
        Pair.of(stored, computed)
