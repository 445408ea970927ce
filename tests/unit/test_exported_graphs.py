"""What exporters write: every graph of one table is pruned, repaired, and judged by plain full runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_asr.compression import CompressOptions, compress
from onnx_asr.errors import DataError, ModelError
from onnx_asr.graph.points import survey
from onnx_asr.options import RepairOptions
from onnx_asr.pruning import prune
from onnx_asr.repairing import repair
from onnx_asr.result import RepairResult
from tests.graphs import bn, copy, folded, images, index, net, parameter, positions, recalibrated, run

COUNT = 160
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
STAGE = "BatchNormalization ({0}, {0}_gamma, {0}_beta, {0}_mean, {0}_var)"
HEAD = """
  pooled = GlobalAveragePool ({0})
  flat = Flatten (pooled)
  y = Gemm <transB=1> (flat, fc_w, fc_b)
"""
FC = {"fc_w": (5, 8), "fc_b": (5,)}


@dataclass(frozen=True)
class Graph:
    """One graph of the table.

    Attributes:
        text: Body, inputs and outputs as the ONNX text format has them.
        weights: Initializers: values, or shapes to draw at random.
        inputs: Shape of every input, without the samples.
        ir: Version of the file format.
        recalibrate: Whether BatchNormalization gets the statistics of normal inputs.
    """

    text: str
    weights: dict[str, Any]
    inputs: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"x": (3, 8, 8)})
    ir: int = 8
    recalibrate: bool = True


def image_net(body: str, head: str = "r", **weights: Any) -> Graph:
    """From 3 x 8 x 8 to 5 classes by way of eight channels in the tensor called ``head``."""
    return Graph(f"g (float[N,3,8,8] x) => (float[N,5] y) {{ {body} {HEAD.format(head)} }}", {**weights, **FC})


def same(kernel: int = 3) -> str:
    return f"pads=[{', '.join([str(kernel // 2)] * 4)}]"


GRAPHS: dict[str, Graph] = {
    # --- points ---
    "conv": image_net(
        f"""a = Conv <{same()}> (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)
        b = Conv <{same()}, group=2> (ar, b_w, b_b)  bn = {STAGE.format("b")}  r = Relu (bn)""",
        a_w=(8, 3, 3, 3), b_w=(8, 4, 3, 3), b_b=(8,), **bn("a", "b", channels=8),
    ),
    "conv-1d": Graph(
        f"""g (float[N,3,16] x) => (float[N,5] y) {{
        a = Conv <pads=[1,1]> (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)
        b = Conv <pads=[2,2], dilations=[2], group=8> (ar, b_w)  bn = {STAGE.format("b")}  r = Relu (bn)
        {HEAD.format("r")} }}""",
        {"a_w": (8, 3, 3), "b_w": (8, 1, 3), **bn("a", "b", channels=8), **FC},
        {"x": (3, 16)},
    ),
    "conv-3d": Graph(
        f"""g (float[N,2,4,5,6] x) => (float[N,5] y) {{
        a = Conv (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)
        b = Conv <strides=[1,2,2], group=2> (ar, b_w)  bn = {STAGE.format("b")}  r = Relu (bn)
        {HEAD.format("r")} }}""",
        {"a_w": (8, 2, 2, 2, 2), "b_w": (8, 4, 2, 2, 2), **bn("a", "b", channels=8), **FC},
        {"x": (2, 4, 5, 6)},
    ),
    "transposed": image_net(
        f"""a = Conv <strides=[2,2]> (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)
        b = ConvTranspose <strides=[2,2], group=2> (ar, b_w)  bn = {STAGE.format("b")}  br = Relu (bn)
        c = ConvTranspose <{same()}, output_padding=[1,1], strides=[2,2]> (br, c_w, c_b)  r = Relu (c)""",
        a_w=(8, 3, 3, 3), b_w=(8, 3, 2, 2), c_w=(6, 8, 3, 3), c_b=(8,),
        **bn("a", channels=8), **bn("b", channels=6),
    ),
    "gemm": Graph(
        f"""g (float[N,12] x) => (float[N,5] y) {{
        a = Gemm <transB=1, alpha=0.5, beta=2.0> (x, a_w, a_b)  an = {STAGE.format("a")}  ar = Relu (an)
        t = Transpose (ar)
        b = Gemm <transA=1> (t, b_w)  bn = {STAGE.format("b")}  br = Relu (bn)
        y = Gemm <beta=0.5> (br, c_w, c_b) }}""",
        {"a_w": (10, 12), "a_b": (10,), "b_w": (10, 8), "c_w": (8, 5), "c_b": (1, 5),
         **bn("a", channels=10), **bn("b", channels=8)},
        {"x": (12,)},
    ),
    "gemm-without-bn": Graph(
        """g (float[N,12] x) => (float[N,5] y) {
        a = Gemm <transB=1, alpha=0.5, beta=2.0> (x, a_w, a_b)  ar = Relu (a)
        t = Transpose (ar)
        b = Gemm <transA=1> (t, b_w)  br = Relu (b)
        y = Gemm <beta=0.5> (br, c_w, c_b) }""",
        {"a_w": (10, 12), "a_b": (10,), "b_w": (10, 8), "c_w": (8, 5), "c_b": (1, 5)},
        {"x": (12,)},
    ),
    "matmul": Graph(
        f"""g (float[N,6,4] x) => (float[N,3,5] y) {{
        p = MatMul (x, a_w)  a = Add (a_b, p)  ar = Relu (a)
        q = MatMul (b_w, ar)  b = Add (q, b_b)  br = Relu (b)
        c = MatMul (br, c_w)  ct = Transpose <perm=[0,2,1]> (c)
        cn = BatchNormalization (ct, c_gamma, c_beta, c_mean, c_var)  cr = Relu (cn)
        cs = Transpose <perm=[0,2,1]> (cr)  y = MatMul (cs, d_w) }}""",
        {"a_w": (4, 8), "a_b": (8,), "b_w": (3, 6), "b_b": (3, 1), "c_w": (8, 7), "d_w": (7, 5), **bn("c", channels=7)},
        {"x": (6, 4)},
    ),
    "batchnorm-along-the-rows-of-a-matmul": Graph(
        f"""g (float[N,6,4] x) => (float[N,6,5] y) {{
        a = MatMul (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)  b = MatMul (ar, b_w)  y = Add (b, b_b) }}""",
        {"a_w": (4, 8), "b_w": (8, 5), "b_b": (5,), **bn("a", channels=6)},
        {"x": (6, 4)},
    ),
    "batchnorm-after-add": image_net(
        f"""a = Conv <{same()}> (x, a_w)  b = Conv (x, b_w, b_b)  s = Add (a, b)
        sn = {STAGE.format("s")}  sr = Relu (sn)  c = Conv <{same()}> (sr, c_w)  t = Add (c, s)
        tn = {STAGE.format("t")}  r = Relu (tn)""",
        a_w=(8, 3, 3, 3), b_w=(8, 3, 1, 1), b_b=(8,), c_w=(8, 8, 3, 3), **bn("s", "t", channels=8),
    ),
    "batchnorm-first": image_net(
        f"""xn = {STAGE.format("x")}  a = Conv <{same()}> (xn, a_w)  cat = Concat <axis=1> (a, xn)
        cn = BatchNormalization (cat, n_gamma, n_beta, n_mean, n_var)  cr = Relu (cn)  r = Conv (cr, b_w)""",
        a_w=(5, 3, 3, 3), b_w=(8, 8, 1, 1), **bn("x", channels=3), **bn("n", channels=8),
    ),
    "batchnorm-with-several-readers": image_net(
        f"""a = Conv <{same()}> (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)  as = Sigmoid (an)
        b = Conv <{same()}> (ar, b_w)  bn = {STAGE.format("b")}  s = Add (bn, as)  t = Mul (s, an)  r = Relu (t)""",
        a_w=(8, 3, 3, 3), b_w=(8, 8, 3, 3), **bn("a", "b", channels=8),
    ),
    "batchnorm-and-another-reader": image_net(
        f"""a = Conv <{same()}> (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)  as = Sigmoid (a)
        s = Mul (ar, as)  b = Conv <{same()}> (s, b_w)  bi = Identity (b)
        bn = BatchNormalization (bi, b_gamma, b_beta, b_mean, b_var)  r = Relu (bn)""",
        a_w=(8, 3, 3, 3), b_w=(8, 8, 3, 3), **bn("a", "b", channels=8),
    ),
    "batchnorms-share-parameters": image_net(
        f"""a = Conv <{same()}> (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)
        b = Conv <{same()}> (ar, b_w)  bn = BatchNormalization (b, a_gamma, a_beta, a_mean, a_var)  r = Relu (bn)""",
        a_w=(8, 3, 3, 3), b_w=(8, 8, 3, 3), a_gamma=(8,), a_beta=(8,), a_mean=np.zeros(8, np.float32),
        a_var=np.ones(8, np.float32),
    ),
    "squeeze-and-excitation": image_net(
        f"""a = Conv <{same()}> (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)
        e = GlobalAveragePool (ar)  f = Conv (e, f_w, f_b)  fr = Relu (f)  h = Conv (fr, h_w, h_b)  hs = HardSigmoid (h)
        m = Mul (ar, hs)  b = Conv <{same()}> (m, b_w)  bn = {STAGE.format("b")}  s = Add (bn, ar)  r = HardSwish (s)""",
        a_w=(8, 3, 3, 3), f_w=(4, 8, 1, 1), f_b=(4,), h_w=(8, 4, 1, 1), h_b=(8,), b_w=(8, 8, 3, 3),
        **bn("a", "b", channels=8),
    ),
    "constant-add-before-batchnorm": image_net(
        f"""a = Conv <{same()}> (x, a_w)  ab = Add (a, a_b)
        an = BatchNormalization (ab, a_gamma, a_beta, a_mean, a_var)  ar = Relu (an)
        b = Conv <auto_pad="SAME_UPPER", strides=[2,2]> (ar, b_w)  bn = {STAGE.format("b")}  r = Relu (bn)""",
        a_w=(8, 3, 3, 3), a_b=(1, 8, 1, 1), b_w=(8, 8, 2, 2), **bn("a", "b", channels=8),
    ),
    "context-added-to-a-map": image_net(
        f"""a = Conv <{same()}> (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)
        e = GlobalAveragePool (ar)  f = Conv (e, f_w, f_b)  s = Add (f, ar)  sr = Relu (s)
        h = Conv (e, h_w)  b = Conv <{same()}> (sr, b_w)  t = Add (h, b)  r = Relu (t)""",
        a_w=(8, 3, 3, 3), f_w=(8, 8, 1, 1), f_b=(8,), h_w=(8, 8, 1, 1), b_w=(8, 8, 3, 3), **bn("a", channels=8),
    ),
    "outputs-on-the-way": Graph(
        f"""g (float[N,3,8,8] x) => (float[N,8,8,8] a, float[N,8,8,8] bn, float[N,5] y, float[N,6] p) {{
        a = Conv <{same()}> (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)
        b = Conv <{same()}> (ar, b_w)  bn = {STAGE.format("b")}  r = Relu (bn)
        {HEAD.format("r")} p = MatMul (flat, p_w) }}""",
        {"a_w": (8, 3, 3, 3), "b_w": (8, 8, 3, 3), "p_w": (8, 6), **bn("a", "b", channels=8), **FC},
    ),
    # --- constants ---
    "weights-behind-chains": Graph(
        f"""g (float[N,3,8,8] x) => (float[N,5] y) {{
        af = Cast <to=1> (a_half)  ai = Identity (af)
        a = Conv <{same()}> (x, ai)  g0 = Identity (a_gamma)  bt = Cast <to=1> (a_beta16)
        an = BatchNormalization (a, g0, bt, a_mean, a_var)  ar = Relu (an)
        bt0 = Transpose <perm=[3,2,0,1]> (b_hwio)  b = Conv <{same()}> (ar, bt0)  br = Relu (b)
        c0 = Reshape (c_flat, c_shape)  c = Conv <pads=[1,1], group=4> (flat3, c0)
        flat4 = Constant <value_int=3> ()
        y0 = Relu (c) pooled = GlobalAveragePool (y0)  flat = Flatten (pooled)
        f0 = Transpose (fc_w)  fb0 = Unsqueeze (fc_b, zero)  y = Gemm (flat, f0, fb0)
        }}""".replace("flat3", "b3").replace("br = Relu (b)", "br = Relu (b)  b3 = Reshape (br, seq)")
        .replace("flat4 = Constant <value_int=3> ()", ""),
        {"a_half": np.random.default_rng(5).normal(0, 0.2, (8, 3, 3, 3)).astype(np.float16), "a_gamma": (8,),
         "a_beta16": np.linspace(-1, 1, 8).astype(np.float16), "a_mean": (8,), "a_var": (8,), "b_hwio": (3, 3, 8, 8),
         "seq": np.array([0, 8, 64]), "c_flat": (8 * 2 * 3,), "c_shape": np.array([8, 2, 3]),
         "zero": np.array([0]), **FC},
    ),
    "constant-nodes": Graph(
        f"""g (float[N,2,6,6] x) => (float[N,3] y) {{
        zeros = ConstantOfShape (four)  ones = ConstantOfShape <value = float[1] {{1.0}}> (four)
        a_w = Constant <value = float[4,2,1,1] {{1.0,-0.3,0.2,0.6,-0.1,0.9,-0.4,0.25}}> ()
        a = Conv (x, a_w, zeros)  an = BatchNormalization (a, ones, zeros, zeros, ones)  ar = Relu (an)
        b_w = Constant <value_floats=[0.5,0.1,-0.2,0.3,-0.6,0.05,0.7,-0.15]> ()
        b_shape = Constant <value_ints=[2,4,1,1]> ()  b_4 = Reshape (b_w, b_shape)
        b = Conv (ar, b_4)  br = Relu (b)
        pooled = GlobalAveragePool (br)  flat = Flatten (pooled)  one = Constant <value_float=0.5> ()
        fc = Constant <value = float[2,3] {{1.0,0.2,-0.3,0.1,-0.9,0.4}}> ()
        y = Gemm (flat, fc, one) }}""",
        {"four": np.array([4])}, {"x": (2, 6, 6)}, recalibrate=False,
    ),
    "tied-weights": Graph(
        """g (float[N,6,8] x) => (float[N,6,8] y) {
        w0 = Identity (w)  wt = Transpose (w0)
        a = MatMul (x, w0)  ar = Relu (a)  b = MatMul (ar, wt)  br = Relu (b)
        c = MatMul (br, w0)  cr = Relu (c)  y = MatMul (cr, wt) }""",
        {"w": (8, 12)}, {"x": (6, 8)},
    ),
    "double": Graph(
        f"""g (double[N,12] x) => (double[N,5] y) {{
        a = Gemm (x, a_w, a_b)  an = {STAGE.format("a")}  ar = Relu (an)
        p = MatMul (ar, b_w)  y = Add (p, b_b) }}""",
        {"a_w": (12, 10), "a_b": (10,), "b_w": (10, 5), "b_b": (5,), **bn("a", channels=10)}, {"x": (12,)},
    ),
    # --- shapes ---
    "batch-of-one": Graph(
        f"""g (float[1,3,8,8] x) => (float[1,5] y) {{
        a = Conv <{same()}> (x, a_w)  an = {STAGE.format("a")}  r = Relu (an)
        pooled = GlobalAveragePool (r)  flat = Reshape (pooled, whole)  y = Gemm <transB=1> (flat, fc_w, fc_b) }}""",
        {"a_w": (8, 3, 3, 3), "whole": np.array([1, 8]), **bn("a", channels=8), **FC}, recalibrate=False,
    ),
    "nhwc": Graph(
        f"""g (float[N,H,W,3] x) => (float[N,5] y) {{
        xt = Transpose <perm=[0,3,1,2]> (x)  a = Conv <{same()}, strides=[2,2]> (xt, a_w)  an = {STAGE.format("a")}
        r = Relu (an)  t = Transpose <perm=[0,2,3,1]> (r)  p = MatMul (t, p_w)  q = Add (p, p_b)  qr = Relu (q)
        m = ReduceMean <axes=[1,2], keepdims=0> (qr)  y = MatMul (m, fc_w) }}""",
        {"a_w": (8, 3, 3, 3), "p_w": (8, 8), "p_b": (8,), "fc_w": (8, 5), **bn("a", channels=8)},
        {"x": (8, 9, 3)},
    ),
    "uint8": Graph(
        f"""g (uint8[N,8,8,3] x) => (float[N,5] y) {{
        xf = Cast <to=1> (x)  xs = Mul (xf, scale)  xt = Transpose <perm=[0,3,1,2]> (xs)
        a = Conv <{same()}> (xt, a_w)  an = {STAGE.format("a")}  r = Relu (an) {HEAD.format("r")} }}""",
        {"scale": np.float32(1 / 255), "a_w": (8, 3, 3, 3), **bn("a", channels=8), **FC}, {"x": (8, 8, 3)},
    ),
    "two-inputs-two-outputs": Graph(
        f"""g (float[N,3,8,8] x, float[N,4] z) => (float[N,5] y, float[N,3] s) {{
        a = Conv <{same()}> (x, a_w)  an = {STAGE.format("a")}  ar = Relu (an)
        q = Gemm (z, z_w, z_b)  q4 = Unsqueeze (q, tail)  r = Mul (ar, q4)
        {HEAD.format("r")} o = Gemm (flat, s_w)  s = Softmax (o) }}""",
        {"a_w": (8, 3, 3, 3), "z_w": (4, 8), "z_b": (8,), "tail": np.array([2, 3]), "s_w": (8, 3),
         **bn("a", channels=8), **FC}, {"x": (3, 8, 8), "z": (4,)},
    ),
    "argmax": Graph(
        f"""g (float[N,3,8,8] x) => (int64[N,8,8] y) {{
        a = Conv <{same()}> (x, a_w)  an = {STAGE.format("a")}  r = Relu (an)
        o = Conv (r, o_w, o_b)  p = Softmax <axis=1> (o)  y = ArgMax <axis=1, keepdims=0> (p) }}""",
        {"a_w": (8, 3, 3, 3), "o_w": (6, 8, 1, 1), "o_b": (6,), **bn("a", channels=8)},
    ),
    "detection": Graph(
        f"""g (float[N,3,8,8] x) => (float[N,A,4] boxes, float[N,2,A] scores) {{
        a = Conv <{same()}, strides=[2,2]> (x, a_w)  an = {STAGE.format("a")}  r = Relu (an)
        b = Conv <{same()}, strides=[2,2]> (r, b_w, b_b)  br = LeakyRelu (b)
        l1 = Conv (r, l1_w, l1_b)  f1 = Reshape (l1, four)  l2 = Conv (br, l2_w, l2_b)  f2 = Reshape (l2, four)
        k1 = Conv (r, k1_w)  h1 = Reshape (k1, two)  k2 = Conv (br, k2_w)  h2 = Reshape (k2, two)
        f = Concat <axis=2> (f1, f2)  h = Concat <axis=2> (h1, h2)
        boxes = Transpose <perm=[0,2,1]> (f)  scores = Sigmoid (h) }}""",
        {"a_w": (8, 3, 3, 3), "b_w": (8, 8, 3, 3), "b_b": (8,), "l1_w": (8, 8, 1, 1), "l1_b": (8,),
         "l2_w": (8, 8, 1, 1), "l2_b": (8,), "k1_w": (4, 8, 1, 1), "k2_w": (4, 8, 1, 1),
         "four": np.array([0, 4, -1]), "two": np.array([0, 2, -1]), **bn("a", channels=8)},
    ),
}
# the same network in other clothes
GRAPHS["float16"] = GRAPHS["bfloat16"] = GRAPHS["initializers-as-inputs"] = GRAPHS["squeeze-and-excitation"]


CAST = {"float16": TensorProto.FLOAT16, "double": TensorProto.DOUBLE}


def sources(name: str, seed: int) -> dict[str, np.ndarray]:
    feeds = {item: images(COUNT, seed=seed, shape=shape) for item, shape in GRAPHS[name].inputs.items()}
    if name == "uint8":
        return {item: (40 * value + 128).clip(0, 255).astype(np.uint8) for item, value in feeds.items()}
    dtype = name if name in ("float16", "double") else "float32"
    return {item: value.astype(dtype) for item, value in feeds.items()}


@cache
def dense_of(name: str) -> onnx.ModelProto:
    graph = GRAPHS[name]
    model = net(graph.text, seed=1, **graph.weights)
    if name == "double":
        retype(model, TensorProto.DOUBLE)
    if graph.recalibrate:
        model = recalibrated(model, sources(name, seed=2) if name != "float16" else sources("squeeze-and-excitation", 2))
    if name == "float16":
        retype(model, TensorProto.FLOAT16)
    if name == "bfloat16":
        retype(model, TensorProto.BFLOAT16, cast=True)
    if name == "initializers-as-inputs":
        model.ir_version = 3
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def retype(model: onnx.ModelProto, element: int, cast: bool = False) -> None:
    """Store float weights in another type, in place; with the whole graph in it, or cast back where they are read."""
    dtype = helper.tensor_dtype_to_np_dtype(element)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            name = f"{tensor.name}_stored" if cast else tensor.name
            casts.append(helper.make_node("Cast", [name], [tensor.name], to=TensorProto.FLOAT))
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), name))
    if cast:
        nodes = [*casts, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        return
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = element


def outputs(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A full run, one sample at a time where the model fixes that."""
    if model.graph.input[0].type.tensor_type.shape.dim[0].dim_value != 1:
        return run(model, feeds)
    parts = [run(model, {name: value[i : i + 1] for name, value in feeds.items()}) for i in range(COUNT)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def error(model: onnx.ModelProto, dense: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> float:
    """Sum over the outputs of the relative squared error."""
    wanted, got = outputs(dense, feeds), outputs(model, feeds)
    total = 0.0
    for name, value in wanted.items():
        if value.dtype == np.int64:
            total += float((value != got[name]).mean())
            continue
        exact, other = value.astype(np.float64), got[name].astype(np.float64)
        assert np.isfinite(other).all()
        total += float(np.square(other - exact).sum() / np.square(exact).sum())
    return total


def layer_weights(model: onnx.ModelProto) -> dict[int, np.ndarray]:
    found = {}
    for position in positions(model, *LAYERS):
        node = model.graph.node[position]
        slot = 1
        if node.op_type == "MatMul":
            slot = 0 if node.input[0] in {tensor.name for tensor in model.graph.initializer} else 1
        found[position] = parameter(model, position, slot)
    return found


def repaired(method: str, damaged: onnx.ModelProto, dense: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> RepairResult:
    options = RepairOptions(method=method, samples=COUNT, verify_samples=0)
    result = repair(damaged, feeds, dense=dense, options=options)
    onnx.checker.check_model(result.model, full_check=True)
    return result


@pytest.mark.parametrize("method", ["paired", "refit"])
@pytest.mark.parametrize("name", GRAPHS)
def test_pruned_graphs_come_closer_to_the_dense_ones(name: str, method: str) -> None:
    dense, feeds = dense_of(name), sources(name, seed=3)
    damaged = prune(dense, 0.5).model
    result = repaired(method, damaged, dense, feeds)
    before, after = error(damaged, dense, feeds), error(result.model, dense, feeds)
    assert after < before
    zeros, kept = layer_weights(damaged), layer_weights(result.model)
    assert len(zeros) == len(kept)
    for was, now in zip(zeros.values(), kept.values(), strict=True):
        assert (now[was == 0] == 0).all()
    layers = {f"{node.op_type}:{node.output[0]}" for node in dense.graph.node if node.op_type in LAYERS}
    assert layers <= {report.name for report in result.points}
    assert {skip.op_type for skip in result.skips} <= ({"BatchNormalization"} if method == "refit" else set())


@pytest.mark.parametrize("method", ["paired", "refit"])
@pytest.mark.parametrize("name", GRAPHS)
def test_dense_graphs_repaired_by_themselves_are_unchanged(name: str, method: str) -> None:
    dense, feeds = dense_of(name), sources(name, seed=3)
    result = repaired(method, dense, dense, feeds)
    # between segments, float16 rounds what onnxruntime would carry on in float32
    assert error(result.model, dense, feeds) ** 0.5 < (1e-3 if name == "float16" else 1e-5)


@pytest.mark.parametrize("method", ["paired", "refit"])
@pytest.mark.parametrize(
    "name", ["conv", "conv-1d", "conv-3d", "transposed", "gemm", "squeeze-and-excitation"]
)
def test_folded_twins_are_repaired_to_the_same_function(name: str, method: str) -> None:
    dense, feeds = dense_of(name), sources(name, seed=3)
    damaged = prune(dense, 0.5).model
    twin = folded(dense)
    assert error(twin, dense, feeds) ** 0.5 < 1e-5
    kept = repaired(method, damaged, dense, feeds).model
    merged = repaired(method, folded(damaged), twin, feeds).model
    assert error(merged, kept, feeds) ** 0.5 < 1e-3


@pytest.mark.parametrize("name", GRAPHS)
def test_compressed_graphs_are_verified_as_closer(name: str) -> None:
    dense, feeds = dense_of(name), sources(name, seed=3)
    options = RepairOptions(samples=COUNT - 32, verify_samples=32)
    result = compress(dense, feeds, CompressOptions(sparsity=0.5, rounds=2), repair_options=options)
    onnx.checker.check_model(result.model, full_check=True)
    assert result.repair.improved
    assert np.isfinite(error(result.model, dense, feeds))


# --- samples of different sizes ---


@pytest.mark.parametrize("method", ["paired", "refit"])
def test_samples_of_different_sizes_go_one_by_one(method: str) -> None:
    dense = copy(dense_of("conv"))
    for axis in (2, 3):
        dense.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "HW"[axis - 2]
    sizes = [(8, 8), (6, 11), (12, 9)]
    feeds = [{"x": images(1, seed=i, shape=(3, *sizes[i % 3]))} for i in range(60)]
    damaged = prune(dense, 0.5).model
    options = RepairOptions(method=method, samples=48, verify_samples=12, batch_size=1)
    result = repair(damaged, feeds, dense=dense, options=options)
    assert result.improved
    before, after = (sum(error(model, dense, feed) for feed in feeds) for model in (damaged, result.model))
    assert after < 0.5 * before
    with pytest.raises(DataError, match="batches of one"):
        repair(damaged, feeds, dense=dense, options=RepairOptions(method=method))
