"""Operations of a network: all of them, or none and the reason."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

import onnx_asr
from onnx_asr.errors import ModelError, OptionError
from onnx_asr.networks.cost import cost
from onnx_asr.networks.latency import measure_latency
from onnx_asr.networks.operations import Operations, Probe
from tests.graphs import index, net, run, vision_transformer


def count(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> Operations:
    return Operations.of(index(model), Probe(shapes))


def test_a_vision_transformer_counts_its_attention() -> None:
    model = vision_transformer(depth=2)  # 32 x 32 pixels in patches of 8: 16 tokens and a class token of 24, 3 heads
    patches, tokens, width = 16 * 24 * 3 * 8 * 8, 17, 24
    linear = 3 * width * width + width * width + 2 * width * 4 * width
    attention = 2 * tokens * tokens * width
    found = count(model)
    assert found.gap is None
    assert found.total == 2 * (patches + 2 * (tokens * linear + attention) + width * 10)
    pruned = onnx_asr.prune(model, options=onnx_asr.PruneOptions(0.5, scope="layer"))
    weights = found.total - 2 * 2 * attention
    assert pruned.before.flops == pruned.after.flops == found.total
    assert pruned.after.nonzero_flops == pytest.approx(weights / 2 + 2 * 2 * attention, rel=1e-3)


def test_a_target_of_operations_includes_those_without_weights() -> None:
    model = vision_transformer(depth=1)
    result = onnx_asr.prune(model, options=onnx_asr.PruneOptions(target_flops=0.6))
    assert result.before.nonzero_flops is not None
    assert result.after.nonzero_flops is not None
    assert 0.59 < result.after.nonzero_flops / result.before.nonzero_flops <= 0.6


def test_recurrent_layers_and_einsum_are_counted() -> None:
    model = net(
        """
        g (float[6,2,8] x) => (float[5,2,3] z, float[] s) {
          y = LSTM <hidden_size=4> (x, w, r)
          f = Squeeze (y, axis)
          z = Einsum <equation="tbh,ho...t->o b ..."> (f, v)
          s = Einsum <equation="...->"> (f)
        }
        """,
        w=(1, 16, 8),
        r=(1, 16, 4),
        v=(4, 5, 3, 6),
        axis=np.array([1]),
    )
    found = count(model)
    assert found.gap is None
    assert list(found.by_node.values()) == [2 * 6 * 2 * (16 * 8 + 16 * 4), 2 * 6 * 2 * 4 * 5 * 3, 0]


def test_transposed_and_fused_products_are_counted() -> None:
    model = net(
        """
        g (float[4,6] x, float[5,4] b) => (float[6,5] y, float[6,7] z) {
          y = Gemm <transA=1, transB=1> (x, b)
          z = com.microsoft.FusedMatMul <transA=1> (x, w)
        }
        """,
        w=(4, 7),
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert list(count(model).by_node.values()) == [2 * 6 * 5 * 4, 2 * 6 * 7 * 4]


def behind(operator: str, **weights: object) -> onnx.ModelProto:
    """Two convolutions from x to m, an operator that shape inference does not know from m to b, and another one."""
    model = net(
        f"""
        g (float[N,3,H,W] x) => (float[N,5,H,W] y) {{
          a = Conv <pads=[1,1,1,1]> (x, wa)
          m = Conv (a, wm)
          {operator}
          y = Conv (b, wb)
        }}
        """,
        wa=(4, 3, 3, 3),
        wm=(4, 4, 1, 1),
        wb=(5, 4, 1, 1),
        **weights,
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def test_where_inference_stops_a_run_tells() -> None:
    model = behind("b = com.microsoft.Gelu (m)")
    assert count(model, x=(2, 3, 8, 6)).total == 2 * 2 * 48 * (4 * 27 + 4 * 4 + 5 * 4)
    assert cost(index(model), Probe({"x": (1, 3, 8, 8)})).flops == 2 * 64 * (4 * 27 + 4 * 4 + 5 * 4)


def test_a_run_that_fails_leaves_them_unknown() -> None:
    """Only images of 8 x 8 pixels fit, and nothing in the file says so."""
    model = behind("c = Reshape (m, shape)  b = com.microsoft.Gelu (c)", shape=np.array([0, 4, 8, 8]))
    found = count(model)
    assert found.gap is not None
    assert "node Conv:a" in found.gap
    assert "it was fed with x:1,3,224,224: give shapes that it takes (--input-shapes)" in found.gap
    assert cost(index(model), Probe()).flops is None
    with pytest.raises(ModelError, match=r"FLOPs are unknown: .*--input-shapes"):
        onnx_asr.prune(model, options=onnx_asr.PruneOptions(target_flops=0.5))
    with pytest.raises(ModelError, match=r"FLOPs are unknown: .*--input-shapes"):
        onnx_asr.prune_channels(model, onnx_asr.ChannelPruneOptions(target_flops=0.5))
    assert count(model, x=(1, 3, 8, 8)).total == 2 * 64 * (4 * 27 + 4 * 4 + 5 * 4)
    with pytest.raises(OptionError, match="cannot have shape"):
        count(model, x=(1, 4, 8, 8))


@pytest.mark.parametrize("shape", [(4, 96), (4, -1)])
def test_the_batch_is_one_that_is_written_into_the_graph(shape: tuple[int, ...]) -> None:
    """One sample for the convolution and four for the matrix product would be a count of nothing."""
    model = net(
        """
        g (float[N,3,4,4] x) => (float[M,5] y) {
          a = Conv <pads=[1,1,1,1]> (x, w)
          f = Reshape (a, shape)
          y = MatMul (f, v)
        }
        """,
        w=(6, 3, 3, 3),
        v=(96, 5),
        shape=np.array(shape),
    )
    assert count(model).total == 2 * 4 * (16 * 6 * 27 + 96 * 5)
    assert "fed with x:1,3,4,4: give shapes that it takes" in str(count(model, x=(1, 3, 4, 4)).gap)
    assert measure_latency(model, model, seconds=0).shapes == {"x": (4, 3, 4, 4)}


def test_sizes_that_a_matrix_product_contradicts_leave_them_unknown() -> None:
    model = net(
        "g (float[N,3,H,W] x) => (float[N,5] y) { a = Conv (x, w)  f = Flatten (a)  y = Gemm <transB=1> (f, v) }",
        w=(6, 3, 1, 1),
        v=(5, 96),
    )
    assert "fed with x:1,3,224,224: give shapes that it takes" in str(count(model).gap)
    assert count(model, x=(1, 3, 4, 4)).total == 2 * (16 * 6 * 3 + 96 * 5)


def test_samples_say_how_large_inputs_are() -> None:
    model = behind("b = com.microsoft.Gelu (m)")
    data = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    options = onnx_asr.PruneOptions(0.5, score="activation")
    assert onnx_asr.prune(model, data, options).before.flops == 2 * 64 * (4 * 27 + 4 * 4 + 5 * 4)
    recipe = onnx_asr.RepairOptions(samples=16, verify_samples=8)
    compressed = onnx_asr.compress(model, data, onnx_asr.CompressOptions(0.5, rounds=1, repair=recipe))
    assert compressed.before.flops == 2 * 64 * (4 * 27 + 4 * 4 + 5 * 4)


def test_what_is_not_counted_is_named() -> None:
    attention = net(
        """
        g (float[1,5,8] x) => (float[1,5,3] y) {
          a = com.microsoft.Attention <num_heads=2> (x, w, b)
          y = MatMul (a, v)
        }
        """,
        w=(8, 24),
        b=(24,),
        v=(8, 3),
    )
    attention.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert run(attention, {"x": np.zeros((1, 5, 8), np.float32)})["y"].shape == (1, 5, 3)
    assert count(attention).gap == "the operations of node Attention:a (Attention) are not counted"
    branch = net(
        """
        g (float[1,8] x, bool c) => (float[1,3] y) {
          y = If (c) <
            then_branch = t () => (float[1,3] z) { z = MatMul (x, w) },
            else_branch = e () => (float[1,3] z) { z = MatMul (x, v) }
          >
        }
        """,
        w=(8, 3),
        v=(8, 3),
    )
    assert count(branch).gap == "the operations of node MatMul:z (MatMul) in a subgraph of node If:y are not counted"
    assert cost(index(branch), Probe()).parameters == 2 * 24


@pytest.mark.parametrize("text", ['y = Einsum <equation="ab,bcd->ad"> (x, w)', 'y = Einsum <equation="ab->ab"> (x, w)'])
def test_operands_that_do_not_fit_are_named(text: str) -> None:
    found = count(net(f"g (float[2,8] x) => (float[2,3] y) {{ {text} }}", w=(8, 3)))
    assert found.gap is not None
    assert "Einsum:y" in found.gap
