"""The batch sizes that graphs take, declared or not, and samples that lie along another axis than the first."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr.data.datasets import TensorDataset
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import DataError, ModelError, OptionError
from onnx_asr.networks.batching import sampled_inputs, settled_inputs
from tests.graphs import index, net, pruned, residual_net, run, vision_transformer

FEW = onnx_asr.RepairOptions("paired", samples=24, verify_samples=11)


def samples(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def settled(model: onnx.ModelProto, x: np.ndarray, asked: int | None = None) -> list[Any]:
    specs = sampled_inputs(index(model))
    data = TensorDataset([{specs[0].name: x}], "the samples", specs)
    return [spec.shape[0] for spec in settled_inputs(index(model), data, Runtime(threads=1), asked)]


def reshaped(*shape: int, mixing: str = "") -> onnx.ModelProto:
    """A classifier with a Reshape between its layers; declared for any batch."""
    return net(
        f"""
        g (float[N,3,4,4] x) => (float[M,K] y) {{
          a = Conv <pads=[1,1,1,1]> (x, w)
          r = Relu (a)
          f = Reshape (r, shape)
          {mixing or "y = Gemm (f, v, b)"}
        }}
        """,
        w=(6, 3, 3, 3),
        v=(96, 5),
        b=(5,),
        shape=np.array(shape),
    )


X = samples(40, 3, 4, 4)


def test_models_for_any_batch_keep_an_open_one() -> None:
    assert settled(reshaped(-1, 96), X) == settled(reshaped(0, 96), X) == [None]
    assert settled(residual_net(), samples(4, 3, 8, 8)) == [None]
    assert settled(vision_transformer(), samples(4, 3, 32, 32)) == [None]


@pytest.mark.parametrize("size", [3, 4, 8])
def test_a_batch_size_in_a_reshape_is_found(size: int) -> None:
    assert settled(reshaped(size, 96), X) == [size]


def test_samples_that_a_reshape_joins_run_one_at_a_time() -> None:
    assert settled(reshaped(1, 96), X) == [1]
    joined = reshaped(1, -1, mixing="y = Relu (f)")  # runs on any batch, and makes one long row of it
    assert run(joined, {"x": X[:2]})["y"].shape == (1, 192)
    assert settled(joined, X) == [1]


def test_other_ways_to_write_a_batch_size() -> None:
    token = net(
        "g (float[N,5,4] x) => (float[N,6,3] y) { a = Concat <axis=1> (t, x)  y = MatMul (a, w) }",
        t=(4, 1, 4),
        w=(4, 3),
    )
    assert settled(token, samples(9, 5, 4)) == [4]
    recurrent = net(
        """
        g (float[N,5,4] x) => (float[T,N,3] y) {
          t = Transpose <perm=[1,0,2]> (x)
          s = LSTM <hidden_size=3> (t, w, r, , , h, c)
          y = Squeeze (s, axis)
        }
        """,
        w=(1, 12, 4),
        r=(1, 12, 3),
        h=(1, 2, 3),
        c=(1, 2, 3),
        axis=np.array([1]),
    )
    assert settled(recurrent, samples(9, 5, 4)) == [2]
    for name in ("h", "c"):
        position = next(i for i, tensor in enumerate(recurrent.graph.initializer) if tensor.name == name)
        del recurrent.graph.initializer[position]
        recurrent.graph.node[1].input[5 if name == "h" else 6] = ""
    assert settled(recurrent, samples(9, 5, 4)) == [None]  # the batch is the second axis of the output


def test_samples_that_are_summed_run_one_at_a_time() -> None:
    summed = reshaped(-1, 96, mixing="y = ReduceSum <keepdims=1> (f, axes)")
    summed.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "axes"))
    assert settled(summed, X) == [1]


def test_a_size_that_only_the_user_knows() -> None:
    parts = net("g (float[N,5] x) => (float[M,5] y) { a, b = Split <axis=0> (x, s)  y = Concat <axis=0> (b, a) }")
    parts.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 3]), "s"))
    assert settled(parts, samples(8, 5), asked=4) == [4]
    with pytest.raises(ModelError, match=r"cannot run the model 'g'.*tried were batches of 3, 1\)"):
        settled(parts, samples(8, 5))


@pytest.mark.parametrize("size", [1, 4])
def test_a_repair_in_batches_of_the_written_size_is_that_of_the_free_model(size: int) -> None:
    """24 samples fill six batches of 4, of the 11 to verify on 8 do."""
    fixed, free = reshaped(size, 96), reshaped(-1, 96)
    damaged, expected = (
        onnx_asr.repair(pruned(model, 0.6), X, FEW, dense=model, execution=onnx_asr.Execution(Runtime(threads=1)))
        for model in (fixed, free)
    )
    assert damaged.calibration_digest == expected.calibration_digest
    assert damaged.verification is not None
    assert damaged.verification.improved
    assert damaged.verification.after.samples == 11 - 11 % size
    for first, second in zip(damaged.model.graph.initializer, expected.model.graph.initializer, strict=True):
        if first.name != "shape":
            np.testing.assert_allclose(
                onnx.numpy_helper.to_array(first), onnx.numpy_helper.to_array(second), rtol=1e-4, atol=1e-5
            )
    left_out = any("takes 4 samples at once: 3 that do not fill a batch" in note for note in damaged.notes)
    assert left_out is (size == 4)


def test_every_command_takes_such_models() -> None:
    model = reshaped(4, 96)
    damaged = pruned(model, 0.6)
    assert onnx_asr.evaluate(damaged, X[:11], dense=model).samples == 8
    assert onnx_asr.inspect(damaged, X, dense=model, samples=10).samples == 8
    recipe = onnx_asr.RepairOptions(samples=24, verify_samples=8)
    options = onnx_asr.CompressOptions(0.5, rounds=2, repair=recipe)
    assert onnx_asr.compress(model, X, options).after.flops == 4 * 2 * (16 * 6 * 27 + 96 * 5)
    assert onnx_asr.prune(model, X, onnx_asr.PruneOptions(0.5, score="gram", samples=16)).modified
    assert onnx_asr.sensitivity(model, X, onnx_asr.SensitivityOptions((0.5,), repair=recipe)).samples == 8
    with pytest.raises(DataError, match="3 samples do not fill one batch: the model fixes batches of 4"):
        onnx_asr.evaluate(damaged, X[:3], dense=model)


def test_a_moving_average_needs_whole_batches() -> None:
    model = residual_net()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 6
    options = onnx_asr.RepairOptions("bn", bn="ema", ema_batch_size=16, samples=36, verify_samples=0)
    with pytest.raises(OptionError, match="ema-batch-size 16 is no multiple of 6"):
        onnx_asr.repair(model, samples(36, 3, 8, 8), options)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ("float[2,batch,128] x", "float[batch,128] y"),
        ("float[seq,batch_size,128] x", "float[seq,batch_size,128] y"),
        ("float[2,N,128] x", "float[N,128] y"),
        ("float[N,128] z, float[1,N,128] x", "float[N,128] y"),
    ],
)
def test_samples_along_another_axis_are_refused(inputs: str, outputs: str) -> None:
    model = net(f"g ({inputs}) => ({outputs}) {{ y = ReduceMean <axes=[0], keepdims=0> (x) }}")
    with pytest.raises(ModelError, match=r"input 'x' has shape \[.*128\], and axis 1 is that of the samples"):
        sampled_inputs(index(model))


def test_first_axes_of_different_fixed_sizes_are_not_all_of_samples() -> None:
    text = "g (float[2,1,16] state, float[1,1,16] x) => (float[2,1,16] y) { y = Add (state, x) }"
    with pytest.raises(ModelError, match=r"different fixed sizes \(2 of 'state', 1 of 'x'\)"):
        sampled_inputs(index(net(text)))


@pytest.mark.parametrize("inputs", ["float[1,3,height,width] x", "float[N,3,224,224] x", "float[1,3,N] x"])
def test_open_sizes_are_not_taken_for_samples(inputs: str) -> None:
    sampled_inputs(index(net(f"g ({inputs}) => (float[N,3] y) {{ y = Relu (x) }}")))


def test_an_axis_without_a_name_shows_in_the_outputs() -> None:
    """Two directions of a recurrent net side by side, as [2, samples, 128]."""
    model = net(
        "g (float[2,?,8] x) => (float[?,5] y) { a = ReduceMean <axes=[0], keepdims=0> (x)  y = MatMul (a, w) }",
        w=(8, 5),
    )
    for command in (onnx_asr.evaluate, onnx_asr.repair):
        with pytest.raises(
            ModelError, match=r"shape \[2, \?, 8\], and the outputs have one entry per place along axis 1"
        ):
            command(model, samples(8, 7, 8), dense=model)
