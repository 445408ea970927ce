"""Zeros in the weights of a network."""

from __future__ import annotations

import numpy as np

from onnx_asr.networks.sparsity import check_order
from onnx_asr.pruning.channels import prune_channels
from onnx_asr.pruning.options import ChannelPruneOptions
from tests.graphs import index, net


def test_a_weight_with_fewer_channels_that_another_node_reads_whole_is_no_sign_of_exchanged_models() -> None:
    text = (
        "g (float[N,3,4,4] x) => (float[N,4,4,4] y, float[1,1,1,1] norm)"
        " { a = Conv (x, v)  b = Conv (a, w)  norm = ReduceSumSquare (w)  y = Conv (b, u) }"
    )
    weights = {name: np.random.default_rng(0).normal(size=(8, 8, 1, 1)).astype(np.float32) for name in "vwu"}
    weights |= {"v": weights["v"][:, :3], "u": weights["u"][:4]}
    weights["v"][:4] = 0
    dense = net(text, **weights)
    pruned = prune_channels(dense, ChannelPruneOptions(0.25)).model
    check_order(index(pruned), index(dense))
