"""One function, spelled in two ways: the two pair. Another function: they do not."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_asr.errors import StructureError
from onnx_asr.pairing.match import match
from tests.graphs import first_output, images, index, net, run


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@dataclass(frozen=True)
class Spelling:
    """What stands between a convolution, whose output ``c`` is [2, 4, 6, 6], and the output ``y``."""

    text: str
    opset: int = 17
    constants: dict[str, Any] = field(default_factory=dict)
    batch: str = "2"

    def model(self) -> onnx.ModelProto:
        text = f"g (float[{self.batch},4,6,6] x) => (float y) {{ c = Conv (x, w) {self.text} }}"
        return net(text, opset=self.opset, w=(4, 4, 1, 1), **self.constants)


def spelled(text: str, opset: int = 17, batch: str = "2", **constants: Any) -> Spelling:
    return Spelling(text, opset, constants, batch)


MATRIX = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3) ** 2
CHAIN = "p = GlobalAveragePool (c) f = Flatten (p)"
BRANCHES = (
    "t = Constant <value_int=1> () u = Cast <to=9> (t) y = If (u) <then_branch = a () => (float p) { p = f (c) }, "
    "else_branch = b () => (float q) { q = Neg (c) }>"
)
SAME: dict[str, tuple[Spelling, ...]] = {
    "negative axis": (
        spelled("y = Concat <axis=1> (c, c)"),
        spelled("y = Concat <axis=-3> (c, c)"),
    ),
    "negative axes of a reduction": (
        spelled("y = ReduceMax <axes=[1,2]> (c)"),
        spelled("y = ReduceMax <axes=[-2,-3], keepdims=1> (c)"),
        spelled("y = ReduceMax (c, a)", 18, a=ints(2, 1)),
    ),
    "all axes": (
        spelled("y = ReduceMean (c)"),
        spelled("y = ReduceMean <axes=[0,1,2,3]> (c)"),
        spelled("y = ReduceMean (c, a)", 18, a=ints(-1, -2, -3, -4)),
    ),
    "softmax of the last axis": (
        spelled("y = Softmax (c)"),
        spelled("y = Softmax <axis=3> (c)"),
        spelled("y = Softmax <axis=-1> (c)", 11),
        spelled("y = Softmax <axis=3> (c)", 12),
    ),
    "softmax of two axes": (
        spelled(f"{CHAIN} y = Softmax (f)"),
        spelled(f"{CHAIN} y = Softmax (f)", 11),
        spelled(f"{CHAIN} y = Softmax <axis=1> (f)", 9),
        spelled(f"{CHAIN} y = Softmax <axis=-1> (f)", 13),
    ),
    "softmax of a map of one place": (
        spelled("p = GlobalAveragePool (c) y = Softmax (p)", 11),
        spelled("p = GlobalAveragePool (c) y = Softmax <axis=1> (p)"),
    ),
    "softmax of everything": (
        spelled("y = LogSoftmax (c)", 11),
        spelled("y = LogSoftmax <axis=-3> (c)", 11),
        spelled("s = Shape (c) f = Flatten <axis=1> (c) l = LogSoftmax <axis=-1> (f) y = Reshape (l, s)"),
    ),
    "flattened": (
        spelled("y = Flatten (c)"),
        spelled("y = Flatten <axis=-3> (c)"),
        spelled("y = Reshape (c, s)", s=ints(0, -1)),
        spelled("y = Reshape (c, s)", s=ints(2, -1)),
        spelled("y = Reshape (c, s)", s=ints(-1, 144)),
        spelled("y = Reshape (c, s)", s=ints(2, 144)),
        spelled("y = Reshape (c, s)", 18, batch="N", s=ints(-1, 144)),
        spelled("r = Reshape (c, s) y = Flatten (r)", s=ints(0, 0, -1)),
        spelled("i = Identity (c) f = Flatten (i) y = Flatten (f)"),
        spelled("n = Shape <start=0, end=1> (c) s = Concat <axis=0> (n, m) y = Reshape (c, s)", m=ints(-1)),
    ),
    "mean of the places": (
        spelled("p = GlobalAveragePool (c) y = Flatten (p)"),
        spelled("p = GlobalAveragePool (c) y = Reshape (p, s)", s=ints(-1, 4)),
        spelled("p = GlobalAveragePool (c) y = Squeeze (p, a)", a=ints(2, 3)),
        spelled("p = GlobalAveragePool (c) y = Squeeze <axes=[2,3]> (p)", 11),
        spelled("p = GlobalAveragePool (c) q = Squeeze (p, a) y = Squeeze (q, b)", a=ints(3), b=ints(2)),
        spelled("p = ReduceMean <axes=[-1,-2]> (c) y = Flatten (p)"),
        spelled("y = ReduceMean <axes=[2,3], keepdims=0> (c)"),
        spelled("y = ReduceMean <keepdims=0> (c, a)", 18, a=ints(-2, -1)),
    ),
    "one more axis": (
        spelled("y = Unsqueeze <axes=[1]> (c)", 11),
        spelled("y = Unsqueeze (c, a)", a=ints(-4)),
        spelled("y = Reshape (c, s)", s=ints(0, 1, 4, 6, -1)),
    ),
    "no reshape": (
        spelled("y = Relu (c)"),
        spelled("r = Reshape (c, s) y = Relu (r)", s=ints(0, 4, 6, -1)),
        spelled("r = Relu (c) y = Reshape (r, s)", s=ints(2, 4, 6, 6)),
    ),
    "nothing": (
        spelled("y = Relu (c)"),
        spelled("i = Identity (c) r = Relu (i) y = Identity (r)"),
        spelled("d, k = Dropout <ratio=0.3> (c) y = Relu (d)", 11),
        spelled("d = Dropout (c, r, t) y = Relu (d)", r=np.float32(0.3), t=np.array(False)),
        spelled("p = Pad <pads=[0,0,0,0,0,0,0,0]> (c) y = Relu (p)", 10),
        spelled("p = Pad (c, n) y = Relu (p)", n=ints(*[0] * 8)),
        spelled("t = Transpose <perm=[0,1,2,3]> (c) y = Relu (t)"),
        spelled("t = Concat <axis=1> (c) u = Max (t) y = Relu (u)"),
        spelled("t = Cast <to=1> (c) y = Relu (t)"),
        spelled("r = Relu (c) y = Relu (r)"),
        spelled("y = Clip (c, z)", z=np.float32(0)),
        spelled("y = Clip <min=0.0> (c)", 10),
    ),
    "clipped": (
        spelled("y = Clip <min=0.0, max=0.5> (c)", 10),
        spelled("y = Clip (c, a, b)", a=np.float32(0), b=np.float32(0.5)),
        spelled("r = Relu (c) y = Clip (r, a, b)", a=np.float32(0), b=np.float32(0.5)),
        spelled('r = Relu (c) y = Clip (r, "", b)', b=np.float32(0.5)),
        spelled("a = Constant <value_float=0.0> () b = Constant <value_float=0.5> () y = Clip (c, a, b)"),
    ),
    "hard swish": (
        spelled("y = HardSwish (c)"),
        spelled("h = HardSigmoid <alpha=0.1666666716337204, beta=0.5> (c) y = Mul (c, h)", 13),
    ),
    "padded": (
        spelled("y = Pad <pads=[0,0,1,2,0,0,3,4]> (c)", 10),
        spelled('y = Pad <mode="constant"> (c, p)', p=ints(0, 0, 1, 2, 0, 0, 3, 4)),
        spelled("y = Pad (c, p, v)", p=ints(0, 0, 1, 2, 0, 0, 3, 4), v=np.float32(0)),
        spelled('y = Pad (c, p, "", a)', 18, p=ints(1, 2, 3, 4), a=ints(2, 3)),
        spelled('y = Pad (c, p, "", a)', 18, p=ints(2, 1, 4, 3), a=ints(-1, -2)),
    ),
    "split": (
        spelled("a, b = Split <axis=1> (c) y = Sub (b, a)", 11),
        spelled("a, b = Split <axis=-3, split=[2,2]> (c) y = Sub (b, a)", 11),
        spelled("a, b = Split <axis=1> (c, s) y = Sub (b, a)", s=ints(2, 2)),
        spelled("a, b = Split <axis=1, num_outputs=2> (c) y = Sub (b, a)", 18),
    ),
    "sliced": (
        spelled("y = Slice <starts=[1,0], ends=[3,5], axes=[1,3]> (c)", 9),
        spelled("y = Slice (c, s, e, a)", s=ints(1, 0), e=ints(3, 5), a=ints(-3, -1)),
        spelled("y = Slice (c, s, e, a)", s=ints(-3, 0), e=ints(-1, -1), a=ints(1, 3)),
        spelled("y = Slice (c, s, e)", s=ints(0, 1, 0, 0), e=ints(9, 3, 2**40, 5)),
        spelled(
            "r = Slice (c, s, e, s) y = Slice (r, z, f, m)", s=ints(1), e=ints(3), z=ints(0), f=ints(5), m=ints(-1)
        ),
    ),
    "transposed": (
        spelled("y = Transpose (c)"),
        spelled("y = Transpose <perm=[3,2,1,0]> (c)"),
        spelled("t = Transpose <perm=[0,2,3,1]> (c) y = Transpose <perm=[2,1,3,0]> (t)"),
    ),
    "enlarged": (
        spelled("y = Upsample <scales=[1.0,1.0,2.0,2.0]> (c)", 7),
        spelled('y = Upsample <mode="nearest"> (c, s)', 9, s=np.array([1, 1, 2, 2], np.float32)),
        spelled("y = Resize (c, s)", 10, s=np.array([1, 1, 2, 2], np.float32)),
        spelled('y = Resize (c, "", s)', 13, s=np.array([1, 1, 2, 2], np.float32)),
        spelled(
            'y = Resize <coordinate_transformation_mode="asymmetric", nearest_mode="floor"> (c, "", s)',
            s=np.array([1, 1, 2, 2], np.float32),
        ),
    ),
    "enlarged to a size": (
        spelled('y = Resize <mode="linear"> (c, "", s)', s=np.array([1, 1, 2, 2], np.float32)),
        spelled('y = Resize <mode="linear"> (c, "", "", s)', s=ints(2, 4, 12, 12)),
    ),
    "pooled": (
        spelled("y = MaxPool <kernel_shape=[2,2], strides=[2,2]> (c)", 8),
        spelled("y = MaxPool <kernel_shape=[2,2], strides=[2,2], pads=[0,0,0,0], dilations=[1,1], ceil_mode=0> (c)"),
        spelled('y = MaxPool <kernel_shape=[2,2], strides=[2,2], auto_pad="VALID"> (c)'),
        spelled('y = MaxPool <kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_UPPER"> (c)'),
    ),
    "padded convolution": (
        spelled("y = Conv <pads=[0,0,1,1], strides=[2,2]> (c, w3)", w3=(2, 4, 3, 3)),
        spelled('y = Conv <auto_pad="SAME_UPPER", strides=[2,2], kernel_shape=[3,3]> (c, w3)', w3=(2, 4, 3, 3)),
    ),
    "padding in front of a convolution": (
        spelled("y = Conv <pads=[1,2,1,0]> (c, w3)", w3=(2, 4, 3, 3)),
        spelled("p = Pad (c, n) y = Conv <pads=[0,1,1,0]> (p, w3)", w3=(2, 4, 3, 3), n=ints(0, 0, 1, 1, 0, 0, 0, 0)),
        spelled('p = Pad (c, n, "", a) y = Conv (p, w3)', 18, w3=(2, 4, 3, 3), n=ints(1, 2, 1, 0), a=ints(2, -1)),
    ),
    "two factors": (
        spelled("s = Sigmoid (c) t = Mul (s, k) y = Mul (v, t)", k=np.float32(0.1), v=MATRIX[None, :, :1, None]),
        spelled("s = Sigmoid (c) y = Mul (s, v)", v=np.float32(0.1) * MATRIX[None, :, :1, None]),
    ),
    "normalized": (
        spelled("y = BatchNormalization (c, g, b, m, v)", 8, g=(4,), b=(4,), m=(4,), v=(4,)),
        spelled(
            "y = BatchNormalization <epsilon=0.00001, momentum=0.5> (c, g, b, m, v)", 9, g=(4,), b=(4,), m=(4,), v=(4,)
        ),
        spelled("y = BatchNormalization <training_mode=0> (c, g, b, m, v)", 15, g=(4,), b=(4,), m=(4,), v=(4,)),
    ),
    "fully connected": (
        spelled(f"{CHAIN} y = Gemm (f, k, b)", k=MATRIX, b=(3,)),
        spelled(f"{CHAIN} y = Gemm <alpha=1.0, beta=1.0, transA=0, transB=1> (f, k, b)", 9, k=MATRIX.T, b=(3,)),
        spelled(f"{CHAIN} t = Transpose <perm=[1,0]> (k) m = MatMul (f, t) y = Add (b, m)", k=MATRIX.T, b=(3,)),
    ),
    "channel constants": (
        spelled("s = Sigmoid (c) y = Mul (s, k)", k=MATRIX[None, :, :1, None]),
        spelled("s = Sigmoid (c) y = Mul (k, s)", k=MATRIX[:, :1, None]),
    ),
    "sum": (
        spelled("s = Sigmoid (c) y = Add (s, c)"),
        spelled("s = Sigmoid (c) y = Sum (c, s)"),
    ),
    "one operation for two": (
        spelled("a = Relu (c) b = Relu (c) s = Sigmoid (a) y = Mul (s, b)"),
        spelled("a = Relu (c) s = Sigmoid (a) y = Mul (s, a)"),
    ),
    "a number from shapes": (
        spelled(
            "n = Shape (c) d = Gather (n, z) f = Cast <to=1> (d) r = Sqrt (f) y = Div (c, r)",
            z=np.array(1),
        ),
        spelled("y = Div (c, r)", r=np.float32(2)),
    ),
}
OTHER: dict[str, tuple[Spelling, Spelling]] = {
    "softmax over more": (spelled("y = Softmax <axis=1> (c)", 11), spelled("y = Softmax <axis=1> (c)", 13)),
    "softmax of another axis": (spelled("y = Softmax <axis=1> (c)"), spelled("y = Softmax (c)")),
    "concat of another axis": (spelled("y = Concat <axis=2> (c, c)"), spelled("y = Concat <axis=-1> (c, c)")),
    "concat in another order": (
        spelled("r = Relu (c) y = Concat <axis=1> (c, r)"),
        spelled("r = Relu (c) y = Concat <axis=1> (r, c)"),
    ),
    "difference in another order": (spelled("r = Relu (c) y = Sub (c, r)"), spelled("r = Relu (c) y = Sub (r, c)")),
    "reduction of another axis": (spelled("y = ReduceMean <axes=[1]> (c)"), spelled("y = ReduceMean <axes=[2]> (c)")),
    "reduction without its axis": (
        spelled("y = ReduceMax <axes=[1], keepdims=0> (c)"),
        spelled("y = ReduceMax <axes=[1]> (c)"),
    ),
    "kernel of a pool": (
        spelled("y = MaxPool <kernel_shape=[2,2]> (c)"),
        spelled("y = MaxPool <kernel_shape=[3,3], pads=[1,1,0,0]> (c)"),
    ),
    "stride of a pool": (
        spelled("y = MaxPool <kernel_shape=[2,2], strides=[2,2]> (c)"),
        spelled("y = MaxPool <kernel_shape=[2,2]> (c)"),
    ),
    "padding counted": (
        spelled("y = AveragePool <kernel_shape=[2,2], pads=[1,1,0,0]> (c)"),
        spelled("y = AveragePool <kernel_shape=[2,2], pads=[1,1,0,0], count_include_pad=1> (c)"),
    ),
    "padded with ones": (
        spelled("y = Conv <pads=[1,1,1,1]> (c, w3)", w3=(2, 4, 3, 3)),
        spelled("p = Pad (c, n, v) y = Conv (p, w3)", w3=(2, 4, 3, 3), n=ints(0, 0, 1, 1, 0, 0, 1, 1), v=np.float32(1)),
    ),
    "pads exchanged": (
        spelled("y = Pad (c, p)", p=ints(0, 0, 1, 0, 0, 0, 0, 1)),
        spelled("y = Pad (c, p)", p=ints(0, 0, 0, 1, 0, 0, 1, 0)),
    ),
    "padding chosen otherwise": (
        spelled('y = MaxPool <kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER"> (c)'),
        spelled('y = MaxPool <kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_LOWER"> (c)'),
    ),
    "other half": (
        spelled("a, b = Split <axis=1> (c, s) y = Relu (a)", s=ints(2, 2)),
        spelled("a, b = Split <axis=1> (c, s) y = Relu (b)", s=ints(2, 2)),
    ),
    "split elsewhere": (
        spelled("a, b = Split <axis=1> (c, s) d = Relu (a) e = Relu (b) y = Concat <axis=1> (e, d)", s=ints(1, 3)),
        spelled("a, b = Split <axis=1> (c, s) d = Relu (a) e = Relu (b) y = Concat <axis=1> (e, d)", s=ints(3, 1)),
    ),
    "other channels": (
        spelled("y = Gather <axis=1> (c, i)", i=ints(0, 1)),
        spelled("y = Gather <axis=1> (c, i)", i=ints(1, 0)),
    ),
    "sliced elsewhere": (
        spelled("y = Slice (c, s, e, a)", s=ints(0), e=ints(3), a=ints(2)),
        spelled("y = Slice (c, s, e, a)", s=ints(-4), e=ints(-1), a=ints(2)),
    ),
    "other shape": (
        spelled("y = Reshape (c, s)", s=ints(0, 8, -1)),
        spelled("y = Reshape (c, s)", s=ints(0, -1, 9)),
    ),
    "samples mixed": (spelled("y = Flatten (c)"), spelled("y = Reshape (c, s)", s=ints(-1, 36))),
    "other factor": (
        spelled('y = Resize (c, "", s)', s=np.array([1, 1, 2, 2], np.float32)),
        spelled('y = Resize (c, "", s)', s=np.array([1, 1, 3, 3], np.float32)),
    ),
    "other interpolation": (
        spelled('y = Resize <mode="linear"> (c, s)', 10, s=np.array([1, 1, 2, 2], np.float32)),
        spelled('y = Resize <mode="linear"> (c, "", s)', 13, s=np.array([1, 1, 2, 2], np.float32)),
    ),
    "transposed otherwise": (
        spelled("y = Transpose <perm=[0,2,1,3]> (c)"),
        spelled("y = Transpose <perm=[0,3,2,1]> (c)"),
    ),
    "bound": (spelled("y = Relu (c)"), spelled("y = Clip (c, a, b)", a=np.float32(0), b=np.float32(0.5))),
    "other slope": (spelled("y = LeakyRelu (c)"), spelled("y = LeakyRelu <alpha=0.2> (c)")),
    "not a hard swish": (
        spelled("y = HardSwish (c)"),
        spelled("h = HardSigmoid (c) y = Mul (c, h)"),
    ),
    "activation": (spelled("y = Sigmoid (c)"), spelled("y = Tanh (c)")),
    "dropout in training": (
        spelled("y = Relu (c)"),
        spelled("d = Dropout (c, r, t) y = Relu (d)", r=np.float32(0.9), t=np.array(True)),
    ),
    "another branch": (
        spelled("r = Relu (c) s = Sigmoid (c) y = Sub (r, s)"),
        spelled("r = Relu (c) s = Sigmoid (r) y = Sub (r, s)"),
    ),
    "repeated otherwise": (
        spelled("y = Tile (c, r)", r=ints(1, 2, 1, 1)),
        spelled("y = Tile (c, r)", r=ints(1, 1, 2, 1)),
    ),
    "other constant": (
        spelled("n = Shape (c) k = ConstantOfShape <value=float[1] {1.0}> (n) y = Sub (c, k)"),
        spelled("n = Shape (c) k = ConstantOfShape <value=float[1] {2.0}> (n) y = Sub (c, k)"),
    ),
    "branch taken": (spelled(BRANCHES.replace("f (c)", "Relu (c)")), spelled(BRANCHES.replace("f (c)", "Tanh (c)"))),
}


@pytest.mark.parametrize("name", SAME)
def test_two_spellings_of_one_function_pair(name: str) -> None:
    x = images(2, seed=1, shape=(4, 6, 6))
    models = [spelling.model() for spelling in SAME[name]]
    first = first_output(models[0], x)
    for model in models[1:]:
        np.testing.assert_allclose(first_output(model, x).ravel(), first.ravel(), atol=1e-5)
    for model in models:
        for other in models:
            tensors = match(index(model), index(other)).tensors
            assert tensors["c"] == "c"
            tensors = {mine: its for mine, its in tensors.items() if not index(model).is_constant(mine) and mine != "x"}
            values, others = run(model, {"x": x}, tensors), run(other, {"x": x}, tensors.values())
            for mine, its in tensors.items():
                np.testing.assert_allclose(
                    values[mine].ravel(), others[its].ravel(), atol=1e-5, err_msg=f"{mine}, {its}"
                )


@pytest.mark.parametrize("name", OTHER)
def test_another_function_is_refused(name: str) -> None:
    x = images(2, seed=1, shape=(4, 6, 6))
    models = [spelling.model() for spelling in OTHER[name]]
    outputs = [first_output(model, x) for model in models]
    assert outputs[0].shape != outputs[1].shape or not np.allclose(*outputs, atol=1e-3)
    for pair in (models, models[::-1]):
        with pytest.raises(StructureError, match="not the same network"):
            match(*map(index, pair))


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        ("s = ReduceMax <keepdims=0> (c) y = Slice (s, a, b, a)", {"a": ints(0), "b": ints(1)}),
        ('s = ReduceMax <keepdims=0> (c) y = Pad (s, a, "", b)', {"a": ints(1, 1), "b": ints(0)}),
        ("t = Transpose <perm=[0,1,2,7]> (c) y = Transpose <perm=[3,2,1,0]> (t)", {}),
        ("y = Reshape (c, s)", {"s": np.array(["2", "-1"], np.object_)}),
        ("y = Clip (c, s)", {"s": np.array("2", np.object_)}),
        ("y = Resize (c, s, s)", {"s": ints(2)}),
        ("p = Pad (c, n) y = Conv (p, v)", {"n": ints(1, 1), "v": (3,)}),
        ('y = MaxPool <kernel_shape=[2,2], strides=[0,0], auto_pad="SAME_UPPER"> (c)', {}),
        ("y = Softmax <axis=9> (c)", {}),
        ("y = Squeeze (c, a)", {"a": np.array([0.5])}),
    ],
)
def test_what_onnxruntime_refuses_is_left_to_it(text: str, constants: dict[str, Any]) -> None:
    broken, other = (Spelling(text, opset, constants).model() for opset in (18, 19))
    sound = Spelling("y = Relu (c)").model()
    for pair in ((broken, broken), (broken, other), (other, broken)):
        assert match(index(pair[0]), index(pair[1])).tensors["c"] == "c"
    for pair in ((broken, sound), (sound, broken)):
        with contextlib.suppress(StructureError):
            match(index(pair[0]), index(pair[1]))
