"""Graphs as exporters write them: each is pruned, repaired, and compared by plain full runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_asr.errors import DataError, ModelError
from onnx_asr.measuring.evaluation import evaluate
from onnx_asr.pruning.compression import CompressOptions, compress
from onnx_asr.pruning.options import PruneOptions
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import RepairOptions
from onnx_asr.repairing.pipeline import repair
from onnx_asr.repairing.result import RepairResult
from tests.graphs import bn, copy, folded, images, index, net, parameter, positions, recalibrated, run, run_each

COUNT = 160
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
HEAD = "pooled = GlobalAveragePool (r)  flat = Flatten (pooled)  y = Gemm <transB=1> (flat, fc_w, fc_b)"
FC = {"fc_w": (5, 8), "fc_b": (5,)}


@dataclass(frozen=True)
class Graph:
    """One graph of the table.

    Attributes:
        text: The graph. ``BN (a)`` and ``BN (t, a)`` stand for a BatchNormalization of ``a`` or ``t`` with the
            parameters ``a_gamma`` and so on, ``PAD`` for one pixel of padding.
        weights: Initializers: values, or shapes to draw at random.
        inputs: Shape of one sample of every input.
        trained: Whether its BatchNormalization gets the statistics of normal inputs.
    """

    text: str
    weights: dict[str, Any]
    inputs: dict[str, tuple[int, ...]]
    trained: bool = True


def graph(text: str, trained: bool = True, inputs: dict[str, tuple[int, ...]] | None = None, **weights: Any) -> Graph:
    def written_out(found: re.Match[str]) -> str:
        prefix = found[2] or found[1]
        return f"BatchNormalization ({found[1]}, {prefix}_gamma, {prefix}_beta, {prefix}_mean, {prefix}_var)"

    text = re.sub(r"\bBN \((\w+)(?:, (\w+))?\)", written_out, text.replace("PAD", "pads=[1,1,1,1]"))
    return Graph(f"g {text}", weights, inputs or {"x": (3, 8, 8)}, trained)


def classifier(body: str, trained: bool = True, **weights: Any) -> Graph:
    """From 3 x 8 x 8 to 5 classes through a tensor ``r`` of eight channels."""
    return graph(f"(float[N,3,8,8] x) => (float[N,5] y) {{ {body} {HEAD} }}", trained, **weights, **FC)


GRAPHS: dict[str, Graph] = {
    # --- points ---
    "conv": classifier(
        """a = Conv <PAD> (x, a_w)  an = BN (a)  ar = Relu (an)
        b = Conv <PAD, group=2> (ar, b_w, b_b)  bn = BN (b)  r = Relu (bn)""",
        **{"a_w": (8, 3, 3, 3), "b_w": (8, 4, 3, 3), "b_b": (8,)},
        **bn("a", "b", channels=8),
    ),
    "conv-1d": graph(
        f"""(float[N,3,16] x) => (float[N,5] y) {{ a = Conv <pads=[1,1]> (x, a_w)  an = BN (a)  ar = Relu (an)
        b = Conv <pads=[2,2], dilations=[2], group=8> (ar, b_w)  bn = BN (b)  r = Relu (bn) {HEAD} }}""",
        inputs={"x": (3, 16)},
        **{"a_w": (8, 3, 3), "b_w": (8, 1, 3)},
        **bn("a", "b", channels=8),
        **FC,
    ),
    "conv-3d": graph(
        f"""(float[N,2,4,5,6] x) => (float[N,5] y) {{ a = Conv (x, a_w)  an = BN (a)  ar = Relu (an)
        b = Conv <strides=[1,2,2], group=2> (ar, b_w)  bn = BN (b)  r = Relu (bn) {HEAD} }}""",
        inputs={"x": (2, 4, 5, 6)},
        **{"a_w": (8, 2, 2, 2, 2), "b_w": (8, 4, 2, 2, 2)},
        **bn("a", "b", channels=8),
        **FC,
    ),
    "transposed": classifier(
        """a = Conv <strides=[2,2]> (x, a_w)  an = BN (a)  ar = Relu (an)
        b = ConvTranspose <strides=[2,2], group=2> (ar, b_w)  bn = BN (b)  br = Relu (bn)
        c = ConvTranspose <PAD, output_padding=[1,1], strides=[2,2]> (br, c_w, c_b)  r = Relu (c)""",
        **{"a_w": (8, 3, 3, 3), "b_w": (8, 3, 2, 2), "c_w": (6, 8, 3, 3), "c_b": (8,)},
        **bn("a", channels=8),
        **bn("b", channels=6),
    ),
    "gemm": graph(
        """(float[N,12] x) => (float[N,5] y) {
        a = Gemm <transB=1, alpha=0.5, beta=2.0> (x, a_w, a_b)  an = BN (a)  ar = Relu (an)  t = Transpose (ar)
        b = Gemm <transA=1> (t, b_w)  bn = BN (b)  br = Relu (bn)  y = Gemm <beta=0.5> (br, c_w, c_b) }""",
        inputs={"x": (12,)},
        **{"a_w": (10, 12), "a_b": (10,), "b_w": (10, 8), "c_w": (8, 5), "c_b": (1, 5)},
        **bn("a", channels=10),
        **bn("b", channels=8),
    ),
    "gemm-alone": graph(
        """(float[N,12] x) => (float[N,5] y) { a = Gemm <transB=1, alpha=0.5, beta=2.0> (x, a_w, a_b)  ar = Relu (a)
        t = Transpose (ar)  b = Gemm <transA=1> (t, b_w)  br = Relu (b)  y = Gemm <beta=0.5> (br, c_w, c_b) }""",
        inputs={"x": (12,)},
        **{"a_w": (10, 12), "a_b": (10,), "b_w": (10, 8), "c_w": (8, 5), "c_b": (1, 5)},
    ),
    "matmul": graph(
        """(float[N,6,4] x) => (float[N,3,5] y) { p = MatMul (x, a_w)  a = Add (a_b, p)  ar = Relu (a)
        q = MatMul (b_w, ar)  b = Add (q, b_b)  br = Relu (b)  c = MatMul (br, c_w)  ct = Transpose <perm=[0,2,1]> (c)
        cn = BN (ct, c)  cr = Relu (cn)  cs = Transpose <perm=[0,2,1]> (cr)  y = MatMul (cs, d_w) }""",
        inputs={"x": (6, 4)},
        **{"a_w": (4, 8), "a_b": (8,), "b_w": (3, 6), "b_b": (3, 1), "c_w": (8, 7), "d_w": (7, 5)},
        **bn("c", channels=7),
    ),
    "batchnorm-along-the-rows-of-a-matmul": graph(
        """(float[N,6,4] x) => (float[N,6,5] y) {
        a = MatMul (x, a_w)  an = BN (a)  ar = Relu (an)  b = MatMul (ar, b_w)  y = Add (b, b_b) }""",
        inputs={"x": (6, 4)},
        **{"a_w": (4, 8), "b_w": (8, 5), "b_b": (5,)},
        **bn("a", channels=6),
    ),
    "bias-that-adds-an-axis": graph(
        """(float[N,12] x) => (float[1,N,5] y) {
        a = MatMul (x, a_w)  ar = Relu (a)  b = MatMul (ar, b_w) y = Add (b, b_b) }""",
        inputs={"x": (12,)},
        **{"a_w": (12, 10), "b_w": (10, 5), "b_b": np.full((1, 1, 1), 0.5, np.float32)},
    ),
    "batchnorm-after-add": classifier(
        """a = Conv <PAD> (x, a_w)  b = Conv (x, b_w, b_b)  s = Add (a, b)  sn = BN (s)  sr = Relu (sn)
        c = Conv <PAD> (sr, c_w)  t = Add (c, s)  tn = BN (t)  r = Relu (tn)""",
        **{"a_w": (8, 3, 3, 3), "b_w": (8, 3, 1, 1), "b_b": (8,), "c_w": (8, 8, 3, 3)},
        **bn("s", "t", channels=8),
    ),
    "batchnorm-first": classifier(
        """xn = BN (x)  a = Conv <PAD> (xn, a_w)  c = Concat <axis=1> (a, xn)  cn = BN (c)  cr = Relu (cn)
        r = Conv (cr, b_w)""",
        **{"a_w": (5, 3, 3, 3), "b_w": (8, 8, 1, 1)},
        **bn("x", channels=3),
        **bn("c", channels=8),
    ),
    "batchnorm-with-several-readers": classifier(
        """a = Conv <PAD> (x, a_w)  an = BN (a)  ar = Relu (an)  as = Sigmoid (an)
        b = Conv <PAD> (ar, b_w)  bn = BN (b)  s = Add (bn, as)  t = Mul (s, an)  r = Relu (t)""",
        **{"a_w": (8, 3, 3, 3), "b_w": (8, 8, 3, 3)},
        **bn("a", "b", channels=8),
    ),
    "batchnorm-beside-another-reader": classifier(
        """a = Conv <PAD> (x, a_w)  an = BN (a)  ar = Relu (an)  as = Sigmoid (a)  s = Mul (ar, as)
        b = Conv <PAD> (s, b_w)  bi = Identity (b)  bn = BN (bi, b)  r = Relu (bn)""",
        **{"a_w": (8, 3, 3, 3), "b_w": (8, 8, 3, 3)},
        **bn("a", "b", channels=8),
    ),
    "batchnorms-share-parameters": classifier(
        "a = Conv <PAD> (x, a_w)  an = BN (a)  ar = Relu (an)  b = Conv <PAD> (ar, b_w)  bn = BN (b, a)  r = Relu (bn)",
        trained=False,
        **{"a_w": (8, 3, 3, 3), "b_w": (8, 8, 3, 3)},
        **bn("a", channels=8),
    ),
    "squeeze-and-excitation": classifier(
        """a = Conv <PAD> (x, a_w)  an = BN (a)  ar = Relu (an)
        e = GlobalAveragePool (ar)  f = Conv (e, f_w, f_b)  fr = Relu (f)  h = Conv (fr, h_w, h_b)  hs = HardSigmoid (h)
        m = Mul (ar, hs)  b = Conv <PAD> (m, b_w)  bn = BN (b)  s = Add (bn, ar)  r = HardSwish (s)""",
        **{
            "a_w": (8, 3, 3, 3),
            "f_w": (4, 8, 1, 1),
            "f_b": (4,),
            "h_w": (8, 4, 1, 1),
            "h_b": (8,),
            "b_w": (8, 8, 3, 3),
        },
        **bn("a", "b", channels=8),
    ),
    "vector-added-to-a-map": classifier(
        """a = Conv <PAD> (x, a_w)  an = BN (a)  ar = Relu (an)
        e = GlobalAveragePool (ar)  f = Conv (e, f_w, f_b)  s = Add (f, ar)  sr = Relu (s)
        h = Conv (e, h_w)  b = Conv <PAD> (sr, b_w)  t = Add (h, b)  r = Relu (t)""",
        **{"a_w": (8, 3, 3, 3), "f_w": (8, 8, 1, 1), "f_b": (8,), "h_w": (8, 8, 1, 1), "b_w": (8, 8, 3, 3)},
        **bn("a", channels=8),
    ),
    "constant-added-before-batchnorm": classifier(
        """a = Conv <PAD> (x, a_w)  ab = Add (a, a_b)  an = BN (ab, a)  ar = Relu (an)
        b = Conv <auto_pad="SAME_UPPER", strides=[2,2]> (ar, b_w)  bn = BN (b)  r = Relu (bn)""",
        **{"a_w": (8, 3, 3, 3), "a_b": (1, 8, 1, 1), "b_w": (8, 8, 2, 2)},
        **bn("a", "b", channels=8),
    ),
    "outputs-on-the-way": graph(
        f"""(float[N,3,8,8] x) => (float[N,8,8,8] a, float[N,8,8,8] bn, float[N,5] y, float[N,6] p) {{
        a = Conv <PAD> (x, a_w)  an = BN (a)  ar = Relu (an)  b = Conv <PAD> (ar, b_w)  bn = BN (b)  r = Relu (bn)
        {HEAD} p = MatMul (flat, p_w) }}""",
        **{"a_w": (8, 3, 3, 3), "b_w": (8, 8, 3, 3), "p_w": (8, 6)},
        **bn("a", "b", channels=8),
        **FC,
    ),
    # --- constants ---
    "behind-chains": graph(
        """(float[N,3,8,8] x) => (float[N,5] y) { a_cast = Cast <to=1> (a_half)  a_same = Identity (a_cast)
        beta = Cast <to=1> (a_beta)  a = Conv <PAD> (x, a_same)
        an = BatchNormalization (a, a_gamma, beta, a_mean, a_var)  ar = Relu (an)
        b_turned = Transpose <perm=[3,2,0,1]> (b_hwio)  b = Conv <PAD> (ar, b_turned)  br = Relu (b)
        bs = Reshape (br, rows)  c_kernel = Reshape (c_flat, c_shape)  c = Conv <pads=[1,1], group=4> (bs, c_kernel)
        cr = Relu (c)  pooled = GlobalAveragePool (cr)  flat = Flatten (pooled)
        d_turned = Transpose (fc_w)  d_row = Unsqueeze (fc_b, zero)  y = Gemm (flat, d_turned, d_row) }""",
        **{"a_half": np.random.default_rng(5).normal(0, 0.2, (8, 3, 3, 3)).astype(np.float16), "b_hwio": (3, 3, 8, 8)},
        **{"c_flat": (48,), "c_shape": np.array([8, 2, 3]), "rows": np.array([0, 8, 64]), "zero": np.array([0])},
        **{"a_gamma": (8,), "a_beta": np.linspace(-1, 1, 8).astype(np.float16), "a_mean": (8,), "a_var": (8,)},
        **FC,
    ),
    "constant-nodes": graph(
        """(float[N,2,6,6] x) => (float[N,3] y) {
        zeros = ConstantOfShape (four)  ones = ConstantOfShape <value = float[1] {1.0}> (four)
        a_w = Constant <value = float[4,2,1,1] {1.0, -0.3, 0.2, 0.6, -0.1, 0.9, -0.4, 0.25}> ()
        a = Conv (x, a_w, zeros)  an = BatchNormalization (a, ones, zeros, zeros, ones)  ar = Relu (an)
        b_flat = Constant <value_floats = [0.5, 0.1, -0.2, 0.3, -0.6, 0.05, 0.7, -0.15]> ()
        b_shape = Constant <value_ints = [2, 4, 1, 1]> ()  b_w = Reshape (b_flat, b_shape)
        b = Conv (ar, b_w)  br = Relu (b)  pooled = GlobalAveragePool (br)  flat = Flatten (pooled)
        c_w = Constant <value = float[2,3] {1.0, 0.2, -0.3, 0.1, -0.9, 0.4}> ()  c_b = Constant <value_float = 0.5> ()
        y = Gemm (flat, c_w, c_b) }""",
        trained=False,
        inputs={"x": (2, 6, 6)},
        four=np.array([4]),
    ),
    "tied": graph(
        """(float[N,6,8] x) => (float[N,6,8] y) { same = Identity (w)  turned = Transpose (same)
        a = MatMul (x, same)  ar = Relu (a)  b = MatMul (ar, turned)  br = Relu (b)
        c = MatMul (br, same)  cr = Relu (c)  y = MatMul (cr, turned) }""",
        inputs={"x": (6, 8)},
        w=(8, 12),
    ),
    "siamese": graph(
        """(float[N,3,8,8] x, float[N,3,8,8] z) => (float[N,8,8,8] y) { a = Conv <PAD> (x, a_w, a_b)  an = BN (a)
        ar = Relu (an)  b = Conv <PAD> (z, a_w, a_b)  bn = BN (b, a)  br = Relu (bn)  y = Mul (ar, br) }""",
        trained=False,
        inputs={"x": (3, 8, 8), "z": (3, 8, 8)},
        **{"a_w": (8, 3, 3, 3), "a_b": (8,)},
        **bn("a", channels=8),
    ),
    "double": graph(
        """(double[N,12] x) => (double[N,5] y) {
        a = Gemm (x, a_w, a_b)  an = BN (a)  ar = Relu (an)  p = MatMul (ar, b_w)  y = Add (p, b_b) }""",
        inputs={"x": (12,)},
        **{"a_w": (12, 10), "a_b": (10,), "b_w": (10, 5), "b_b": (5,)},
        **bn("a", channels=10),
    ),
    # --- shapes ---
    "batch-of-one": graph(
        """(float[1,3,8,8] x) => (float[1,5] y) { a = Conv <PAD> (x, a_w)  an = BN (a)  r = Relu (an)
        pooled = GlobalAveragePool (r)  flat = Reshape (pooled, whole)  y = Gemm <transB=1> (flat, fc_w, fc_b) }""",
        trained=False,
        **{"a_w": (8, 3, 3, 3), "whole": np.array([1, 8])},
        **bn("a", channels=8),
        **FC,
    ),
    "nhwc": graph(
        """(float[N,H,W,3] x) => (float[N,5] y) { xt = Transpose <perm=[0,3,1,2]> (x)
        a = Conv <PAD, strides=[2,2]> (xt, a_w)  an = BN (a)  r = Relu (an)  t = Transpose <perm=[0,2,3,1]> (r)
        p = MatMul (t, p_w)  q = Add (p, p_b)  qr = Relu (q)  m = ReduceMean <axes=[1,2], keepdims=0> (qr)
        y = MatMul (m, fc_w) }""",
        inputs={"x": (8, 9, 3)},
        **{"a_w": (8, 3, 3, 3), "p_w": (8, 8), "p_b": (8,), "fc_w": (8, 5)},
        **bn("a", channels=8),
    ),
    "uint8": graph(
        f"""(uint8[N,8,8,3] x) => (float[N,5] y) {{ xf = Cast <to=1> (x)  xs = Mul (xf, scale)
        xt = Transpose <perm=[0,3,1,2]> (xs)  a = Conv <PAD> (xt, a_w)  an = BN (a)  r = Relu (an) {HEAD} }}""",
        inputs={"x": (8, 8, 3)},
        **{"scale": np.float32(1 / 255), "a_w": (8, 3, 3, 3)},
        **bn("a", channels=8),
        **FC,
    ),
    "two-inputs-two-outputs": graph(
        f"""(float[N,3,8,8] x, float[N,4] z) => (float[N,5] y, float[N,3] s) {{ a = Conv <PAD> (x, a_w)  an = BN (a)
        ar = Relu (an)  q = Gemm (z, z_w, z_b)  map = Unsqueeze (q, tail)  r = Mul (ar, map)
        {HEAD} o = Gemm (flat, s_w)  s = Softmax (o) }}""",
        inputs={"x": (3, 8, 8), "z": (4,)},
        **{"a_w": (8, 3, 3, 3), "z_w": (4, 8), "z_b": (8,), "tail": np.array([2, 3]), "s_w": (8, 3)},
        **bn("a", channels=8),
        **FC,
    ),
    "argmax": graph(
        """(float[N,3,8,8] x) => (int64[N,8,8] y) { a = Conv <PAD> (x, a_w)  an = BN (a)  r = Relu (an)
        o = Conv (r, o_w, o_b)  p = Softmax <axis=1> (o)  y = ArgMax <axis=1, keepdims=0> (p) }""",
        **{"a_w": (8, 3, 3, 3), "o_w": (6, 8, 1, 1), "o_b": (6,)},
        **bn("a", channels=8),
    ),
    "detection": graph(
        """(float[N,3,8,8] x) => (float[N,A,4] boxes, float[N,2,A] scores) {
        a = Conv <PAD, strides=[2,2]> (x, a_w)  an = BN (a)  r = Relu (an)
        b = Conv <PAD, strides=[2,2]> (r, b_w, b_b)  br = LeakyRelu (b)
        box1 = Conv (r, box1_w, box1_b)  flat1 = Reshape (box1, four)
        box2 = Conv (br, box2_w, box2_b)  flat2 = Reshape (box2, four)
        class1 = Conv (r, class1_w)  row1 = Reshape (class1, two)  class2 = Conv (br, class2_w)
        row2 = Reshape (class2, two)  f = Concat <axis=2> (flat1, flat2)  h = Concat <axis=2> (row1, row2)
        boxes = Transpose <perm=[0,2,1]> (f)  scores = Sigmoid (h) }""",
        **{"a_w": (8, 3, 3, 3), "b_w": (8, 8, 3, 3), "b_b": (8,), "box1_w": (8, 8, 1, 1), "box1_b": (8,)},
        **{"box2_w": (8, 8, 1, 1), "box2_b": (8,), "class1_w": (4, 8, 1, 1), "class2_w": (4, 8, 1, 1)},
        **{"four": np.array([0, 4, -1]), "two": np.array([0, 2, -1])},
        **bn("a", channels=8),
    ),
}


def half(model: onnx.ModelProto) -> None:
    """All of it in float16."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16


def stored_in_bfloat16(model: onnx.ModelProto) -> None:
    casts = []
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    for tensor in model.graph.initializer:
        name = f"{tensor.name}_stored"
        casts.append(helper.make_node("Cast", [name], [tensor.name], to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), name))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def stored_sparse(model: onnx.ModelProto) -> None:
    """One weight as a sparse initializer with coordinates, one in a Constant node with flat positions."""
    for name in ("b_w", "fc_w"):
        (tensor,) = (item for item in model.graph.initializer if item.name == name)
        value = numpy_helper.to_array(tensor)
        model.graph.initializer.remove(tensor)
        places = np.flatnonzero(value) if name == "fc_w" else np.argwhere(value)
        values = numpy_helper.from_array(value[value != 0], name)
        sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(places), value.shape)
        if name == "fc_w":
            model.graph.node.insert(0, helper.make_node("Constant", [], [name], sparse_value=sparse))
        else:
            model.graph.sparse_initializer.append(sparse)


def initializers_as_inputs(model: onnx.ModelProto) -> None:
    """As in every file before IR version 4."""
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


VARIANTS: dict[str, tuple[str, Callable[[onnx.ModelProto], None]]] = {
    "float16": ("squeeze-and-excitation", half),
    "bfloat16": ("squeeze-and-excitation", stored_in_bfloat16),
    "sparse": ("squeeze-and-excitation", stored_sparse),
    "initializers-as-inputs": ("squeeze-and-excitation", initializers_as_inputs),
}
NAMES = (*GRAPHS, *VARIANTS)


def sources(name: str, seed: int) -> dict[str, np.ndarray]:
    """Calibration samples for one graph of the table."""
    plan = GRAPHS[VARIANTS[name][0] if name in VARIANTS else name]
    feeds = {item: images(COUNT, seed=seed + n, shape=shape) for n, (item, shape) in enumerate(plan.inputs.items())}
    if name == "uint8":
        return {item: (40 * value + 128).clip(0, 255).astype(np.uint8) for item, value in feeds.items()}
    dtype = name if name in ("float16", "double") else "float32"
    return {item: value.astype(dtype) for item, value in feeds.items()}


@cache
def dense_of(name: str) -> onnx.ModelProto:
    if name in VARIANTS:
        original, change = VARIANTS[name]
        model = copy(dense_of(original))
        change(model)
        return model
    plan = GRAPHS[name]
    model = net(plan.text, seed=1, **plan.weights)
    if name == "double":
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    return recalibrated(model, sources(name, seed=20)) if plan.trained else model


def outputs(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A full run, one sample at a time if the model fixes the batch at 1."""
    if model.graph.input[0].type.tensor_type.shape.dim[0].dim_value != 1:
        return run(model, feeds)
    count = len(next(iter(feeds.values())))
    parts = run_each(model, ({name: value[i : i + 1] for name, value in feeds.items()} for i in range(count)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def error(model: onnx.ModelProto, dense: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> float:
    """Relative error, summed over the outputs; for integers, the fraction that differs."""
    wanted, got = outputs(dense, feeds), outputs(model, feeds)
    total = 0.0
    for name, value in wanted.items():
        assert got[name].shape == value.shape
        assert got[name].dtype == value.dtype
        exact, other = value.astype(np.float64), got[name].astype(np.float64)
        assert np.isfinite(other).all()
        total += float(np.linalg.norm(other - exact) / np.linalg.norm(exact))
    return total


def layer_weights(model: onnx.ModelProto) -> list[np.ndarray]:
    """The weight of every layer, in file order."""
    found = index(model)
    layers = [(p, model.graph.node[p]) for p in positions(model, *LAYERS)]
    return [parameter(model, p, 0 if found.is_constant(node.input[0]) else 1) for p, node in layers]


def repaired(
    method: str, damaged: onnx.ModelProto, dense: onnx.ModelProto, feeds: dict[str, np.ndarray]
) -> RepairResult:
    result = repair(damaged, feeds, RepairOptions(method=method, samples=COUNT, verify_samples=0), dense=dense)
    # onnx infers no shapes from sparse initializers
    onnx.checker.check_model(result.model, full_check=not result.model.graph.sparse_initializer)
    return result


@pytest.mark.parametrize("method", ["paired", "refit"])
@pytest.mark.parametrize("name", NAMES)
def test_pruned_graphs_come_closer_to_the_dense_ones(name: str, method: str) -> None:
    dense, feeds = dense_of(name), sources(name, seed=3)
    damaged = prune(dense, options=PruneOptions(0.5)).model
    result = repaired(method, damaged, dense, feeds)
    assert error(result.model, dense, feeds) < error(damaged, dense, feeds)
    for was, now in zip(layer_weights(damaged), layer_weights(result.model), strict=True):
        assert (now[was == 0] == 0).all()
    layers = {f"{node.op_type}:{node.output[0]}" for node in dense.graph.node if node.op_type in LAYERS}
    assert layers <= {report.name for report in result.points}
    assert {skip.op_type for skip in result.skips} <= ({"BatchNormalization"} if method == "refit" else set())


@pytest.mark.parametrize("method", ["paired", "refit"])
@pytest.mark.parametrize("name", NAMES)
def test_dense_graphs_repaired_by_themselves_are_unchanged(name: str, method: str) -> None:
    dense, feeds = dense_of(name), sources(name, seed=3)
    result = repaired(method, dense, dense, feeds)
    # float16 is rounded between segments, where onnxruntime would carry on in float32
    assert error(result.model, dense, feeds) < (1e-3 if name == "float16" else 1e-5)


@pytest.mark.parametrize("method", ["paired", "refit"])
@pytest.mark.parametrize("name", ["conv", "conv-1d", "conv-3d", "transposed", "gemm", "squeeze-and-excitation"])
def test_folded_graphs_are_repaired_to_the_same_function(name: str, method: str) -> None:
    dense, feeds = dense_of(name), sources(name, seed=3)
    damaged, dense_folded = prune(dense, options=PruneOptions(0.5)).model, folded(dense)
    assert error(dense_folded, dense, feeds) < 1e-5
    kept = repaired(method, damaged, dense, feeds).model
    assert error(repaired(method, folded(damaged), dense_folded, feeds).model, kept, feeds) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_compressed_graphs_are_closer_than_their_last_mask(name: str) -> None:
    dense, feeds = dense_of(name), sources(name, seed=3)
    options = RepairOptions(samples=COUNT - 32, verify_samples=32)
    result = compress(dense, feeds, CompressOptions(sparsity=0.5, rounds=2, repair=options))
    onnx.checker.check_model(result.model, full_check=not result.model.graph.sparse_initializer)
    found = result.repair.verification
    assert found is not None
    assert found.after.distance < found.before.distance
    assert found.after.samples == 32
    assert np.isfinite(error(result.model, dense, feeds))


def test_ranks_of_a_later_round_are_those_of_their_own_weights() -> None:
    """Pruning removes nodes that a weight went through, which shifts the positions of later nodes."""
    plain, chained = dense_of("squeeze-and-excitation"), dense_of("bfloat16")
    feeds = sources("conv", seed=3)
    options = RepairOptions(samples=COUNT, verify_samples=0)
    results = [
        compress(model, feeds, CompressOptions(0.7, scope="global", rounds=3, repair=options)).model
        for model in (plain, chained)
    ]
    pairs = list(zip(*(layer_weights(model) for model in results), strict=True))
    same = sum(int(((one == 0) == (other == 0)).sum()) for one, other in pairs)
    assert same > 0.97 * sum(one.size for one, _ in pairs)  # bfloat16 rounds, so that few weights change places


@pytest.mark.parametrize("name", ["tied", "siamese"])
def test_a_tied_weight_stays_tied_when_pruned(name: str) -> None:
    """One copy per way it is read: in one of the nets through an Identity and a Transpose."""
    tensors = prune(dense_of(name), options=PruneOptions(0.5)).model.graph.initializer
    assert [tensor.dims for tensor in tensors if len(tensor.dims) > 1] == (
        [[8, 12], [12, 8]] if name == "tied" else [[8, 3, 3, 3]]
    )


@pytest.mark.parametrize("method", ["paired", "refit"])
def test_samples_of_different_sizes_go_one_by_one(method: str) -> None:
    dense = copy(dense_of("conv"))
    for axis in (2, 3):
        dense.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
    sizes = [(8, 8), (6, 11), (12, 9)]
    feeds = [{"x": images(1, seed=i, shape=(3, *sizes[i % 3]))} for i in range(60)]
    damaged = prune(dense, options=PruneOptions(0.5)).model
    options = RepairOptions(method=method, samples=48, verify_samples=12, batch_size=1)
    result = repair(damaged, feeds, options, dense=dense)
    assert result.improved
    before, after = (sum(error(model, dense, feed) for feed in feeds) for model in (damaged, result.model))
    assert after < 0.5 * before
    with pytest.raises(DataError, match="batches of one"):
        repair(damaged, feeds, RepairOptions(method=method), dense=dense)


@pytest.mark.parametrize("method", ["paired", "refit"])
def test_matrices_of_different_sizes(method: str) -> None:
    text = "g (float[N,S,4] x) => (float[N,S,5] y) { a = MatMul (x, a_w)  r = Relu (a)  y = MatMul (r, b_w) }"
    dense = net(text, a_w=(4, 8), b_w=(8, 5))
    feeds = [{"x": images(1, seed=i, shape=(5 + 3 * i, 4))} for i in range(40)]
    damaged = prune(dense, options=PruneOptions(0.5)).model
    options = RepairOptions(method=method, samples=40, verify_samples=0, batch_size=1)
    result = repair(damaged, feeds, options, dense=dense).model
    assert sum(error(result, dense, feed) for feed in feeds) < sum(error(damaged, dense, feed) for feed in feeds)


def test_any_input_may_fix_the_batch() -> None:
    text = "g (float[N,4] x, float[2,4] z) => (float[N,3] y) { s = Add (x, z)  y = MatMul (s, w) }"
    dense = net(text, w=(4, 3))
    feeds = {name: images(75, seed=seed, shape=(4,)) for seed, name in enumerate("xz")}
    options = RepairOptions(method="refit", samples=41, verify_samples=31)
    result = repair(prune(dense, options=PruneOptions(0.5)).model, feeds, options, dense=dense)
    assert result.calibration_samples == 40
    assert result.verification is not None
    assert result.verification.after.samples == 30


def test_an_input_without_axes_is_refused() -> None:
    dense = net("g (float[N,4] x) => (float[N,3] y) { y = MatMul (x, w) }", w=(4, 3))
    dense.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match="'x' does not declare its axes"):
        repair(dense, images(8, seed=0, shape=(4,)), dense=dense)


@pytest.mark.parametrize("method", ["paired", "refit"])
def test_a_float16_model_may_come_from_a_float32_one(method: str) -> None:
    dense, feeds = dense_of("squeeze-and-excitation"), sources("squeeze-and-excitation", seed=3)
    damaged = prune(dense_of("float16"), options=PruneOptions(0.5)).model
    halves = {name: value.astype(np.float16) for name, value in feeds.items()}
    options = RepairOptions(method=method, samples=COUNT - 32, verify_samples=32)
    result = repair(damaged, halves, options, dense=dense)
    assert result.improved
    wanted = run(dense, feeds)["y"]
    before, after = (np.linalg.norm(run(model, halves)["y"] - wanted) for model in (damaged, result.model))
    assert after < 0.5 * before


# --- float16 near its end ---

LARGE = """
large (float16[N,3,8,8] x) => (float16[N,5,8,8] y) {
  a = Conv <pads=[1,1,1,1]> (x, a_w, a_b)  ar = Relu (a)
  b = Conv <pads=[1,1,1,1]> (ar, b_w, b_b)  br = Relu (b)
  y = Conv (br, c_w)
}
"""


def large_net(peak: float, x: np.ndarray) -> onnx.ModelProto:
    """Activations of both hidden layers reach ``peak``."""
    generator = np.random.default_rng(0)
    shapes = {"a_w": (8, 3, 3, 3), "a_b": (8,), "b_w": (8, 8, 3, 3), "b_b": (8,), "c_w": (5, 8, 1, 1)}
    values = {name: generator.normal(0.0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    found = run(net(LARGE.replace("float16", "float"), **values), {"x": x}, ["a", "b"])
    a, b = (peak / np.abs(found[name]).max() for name in "ab")
    factors = {"a_w": a, "a_b": a, "b_w": b / a, "b_b": b, "c_w": 1e-3}
    return net(LARGE, **{name: (value * factors[name]).astype(np.float16) for name, value in values.items()})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["paired", "refit", "raw", "layerwise"])
def test_float16_activations_may_be_large_but_not_infinite(method: str) -> None:
    x = images(64, seed=6)
    feeds = {"x": x.astype(np.float16)}
    dense = large_net(60_000, x)
    assert np.abs(run(dense, feeds, ["a"])["a"]).max() > 59_000
    damaged = prune(dense, options=PruneOptions(0.5, scope="layer")).model
    options = RepairOptions(method=method, samples=64, verify_samples=0)
    result = repair(damaged, feeds, options, dense=dense).model
    assert all(np.isfinite(weight).all() for weight in layer_weights(result))
    assert error(result, dense, feeds) < error(damaged, dense, feeds)
    with pytest.raises(ModelError, match="float16 ends at 65504"):
        repair(
            prune(large_net(150_000, x), options=PruneOptions(0.5)).model, feeds, options, dense=large_net(150_000, x)
        )


# --- detections ---

BOXES = """
boxes (float[1,3,8,8] x) => (float[M,4] found, float[M,2] refined) {
  a = Conv <pads=[1,1,1,1], strides=[2,2]> (x, a_w, a_b)  r = Relu (a)
  c = Conv (r, c_w, c_b)  rows = Reshape (c, two)  near = Transpose <perm=[0,2,1]> (rows)  far = Add (near, one)
  corners = Concat <axis=2> (near, far)
  s = Conv (r, s_w)  logits = Reshape (s, single)  scores = Sigmoid (logits)
  places = NonMaxSuppression (corners, scores, most, overlap, threshold)
  column = Gather <axis=1> (places, last)  kept = Squeeze (corners, zero)  found = Gather <axis=0> (kept, column)
  refined = Gemm (found, f_w)
}
"""


def test_detections_are_verified_on_what_they_are_selected_from() -> None:
    sizes = {"two": np.array([0, 2, -1]), "single": np.array([0, 1, -1]), "most": np.array([8])}
    limits = {"overlap": np.float32(0.5), "threshold": np.float32(0.55), "one": np.float32(1.0)}
    places = {"last": np.array(2), "zero": np.array([0])}
    shapes = {"a_w": (8, 3, 3, 3), "a_b": (8,), "c_w": (2, 8, 1, 1), "c_b": (2,), "s_w": (1, 8, 1, 1), "f_w": (4, 2)}
    dense = net(BOXES, seed=2, **shapes, **sizes, **limits, **places)
    x = images(COUNT, seed=9)
    damaged = prune(dense, options=PruneOptions(0.5)).model
    single = [{"x": x[i : i + 1]} for i in range(COUNT)]
    counts = [sum(len(one["found"]) for one in run_each(model, single[:32])) for model in (dense, damaged)]
    assert counts[0] != counts[1]
    options = RepairOptions(method="refit", samples=COUNT - 32, verify_samples=32)
    result = repair(damaged, x, options, dense=dense)
    assert result.improved
    assert [skip.code for skip in result.skips if skip.op_type == "Gemm"] == ["behind-non-max-suppression"]
    judged = evaluate(result.model, x, dense=dense)
    noise = signal = 0.0
    tensors = ["corners", "scores"]
    for wanted, got in zip(*(run_each(model, single, tensors) for model in (dense, result.model)), strict=True):
        for name in tensors:
            signal += float(np.square(wanted[name].astype(float)).sum())
            noise += float(np.square(wanted[name].astype(float) - got[name]).sum())
    assert judged.samples == COUNT
    assert judged.snr_db == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)


def test_networks_that_select_different_rows_are_refused() -> None:
    text = """
    g (float[N,3,8,8] x) => (float[M,5] y) {
      a = Conv <pads=[1,1,1,1]> (x, a_w)  s = ReduceSum <keepdims=0> (a, axes)  zero = Constant <value_float=0.0> ()
      p = Greater (s, zero)  pooled = GlobalAveragePool (a)  flat = Flatten (pooled)  kept = Compress <axis=0> (flat, p)
      y = Gemm (kept, fc_w)
    }
    """
    dense = net(text, a_w=(8, 3, 3, 3), axes=np.array([1, 2, 3]), fc_w=(8, 5))
    damaged = prune(dense, options=PruneOptions(0.5)).model
    x = images(64, seed=3)
    assert len(run(dense, {"x": x})["y"]) != len(run(damaged, {"x": x})["y"])
    for settings in ({"method": "refit"}, {"method": "paired", "reliability_power": 0.5}):
        with pytest.raises(ModelError, match="different shapes at Gemm:y"):
            repair(damaged, x, RepairOptions(**settings, samples=64, verify_samples=0), dense=dense)
