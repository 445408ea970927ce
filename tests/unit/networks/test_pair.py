"""Networks and pairs: what corresponds to what."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from onnx_asr.networks.pair import Network, Pair
from onnx_asr.pairing.match import match
from tests.graphs import dense_net, folded, index, residual_net


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
