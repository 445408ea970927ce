"""Small networks with the structure of well-known families, with seeded random weights.

Each is built node by node as its exporter writes it, at a size that runs in milliseconds. Kernels are drawn so that
signals keep their size from layer to layer, and the statistics of BatchNormalization are those of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Kernel: TypeAlias = int | Sequence[int]
"""Sizes of a kernel, or that of all axes."""

FLOAT, FLOAT16, UINT8, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT64


class Builder:
    """A graph that grows node by node; a tensor is its name, and the number of its channels is known.

    Attributes:
        inputs: Shape without the batch, and element type, of every input.
        channels: Tensor to the size of its axis 1, or of its last axis behind a matrix.
    """

    def __init__(self, opset: int = 17, ir: int = 8, batch: int | str = "N") -> None:
        self.inputs: dict[str, tuple[tuple[int, ...], int]] = {}
        self.channels: dict[str, int] = {}
        self.opset, self.ir, self.batch = opset, ir, batch
        self._random = np.random.default_rng(0)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, *shape: int, element: int = FLOAT) -> str:
        """An input with a batch axis in front."""
        self.inputs[name] = shape, element
        self.channels[name] = shape[0]
        return name

    def output(self, *names: str, element: int = FLOAT) -> None:
        """Make tensors outputs of the graph."""
        self._outputs += [helper.make_tensor_value_info(name, element, None) for name in names]

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """An initializer."""
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def shape(self, *sizes: int) -> str:
        """An initializer of integers."""
        return self.constant(sizes, np.int64)

    def noise(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> str:
        """An initializer of random numbers."""
        return self.constant(self._random.normal(mean, scale, shape))

    def op(self, kind: str, *names: str, channels: int | None = None, outputs: int = 1, **attributes: Any) -> Any:
        """A node; its output, or the list of its outputs."""
        number = len(self._nodes)
        made = [f"{kind.lower()}{number}" + (f"_{item}" if item else "") for item in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(names), made, f"{kind}_{number}", **attributes))
        for name in made:
            known = next((self.channels[item] for item in names if item in self.channels), 0)
            self.channels[name] = known if channels is None else channels
        return made[0] if outputs == 1 else made

    # Layers

    def conv(
        self,
        x: str,
        out: int,
        k: Kernel = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = True,
        pads: Sequence[int] | None = None,
        axes: int = 2,
    ) -> str:
        """A convolution that keeps the size, but for its stride."""
        kernel = [k] * axes if isinstance(k, int) else list(k)
        inputs = self.channels[x] // groups
        weight = self.noise(out, inputs, *kernel, scale=(2 / (inputs * np.prod(kernel))) ** 0.5)
        same = [(size - 1) * dilation // 2 for size in kernel]
        attributes: dict[str, Any] = {
            "kernel_shape": kernel,
            "strides": [stride] * len(kernel),
            "dilations": [dilation] * len(kernel),
            "pads": [*same, *same] if pads is None else list(pads),
            "group": groups,
        }
        extra = [self.noise(out, scale=0.1)] if bias else []
        return str(self.op("Conv", x, weight, *extra, channels=out, **attributes))

    def up(self, x: str, out: int, k: int = 2, stride: int = 2, pad: int = 0) -> str:
        """A transposed convolution."""
        inputs = self.channels[x]
        weight = self.noise(inputs, out, k, k, scale=(2 * stride**2 / (inputs * k * k)) ** 0.5)
        bias = self.noise(out, scale=0.1)
        return str(self.op("ConvTranspose", x, weight, bias, channels=out, strides=[stride] * 2, pads=[pad] * 4))

    def norm(self, x: str) -> str:
        """A BatchNormalization."""
        c = self.channels[x]
        statistics = self.noise(c, scale=0.1), self.constant(self._random.uniform(0.5, 2, c))
        return str(
            self.op("BatchNormalization", x, self.noise(c, scale=0.1, mean=1), self.noise(c, scale=0.1), *statistics)
        )

    def block(self, x: str, out: int, k: Kernel = 3, stride: int = 1, act: str = "Relu", **options: Any) -> str:
        """Convolution, BatchNormalization, activation."""
        return str(self.op(act, self.norm(self.conv(x, out, k, stride, bias=False, **options))))

    def silu(self, x: str, out: int, k: int = 3, stride: int = 1, **options: Any) -> str:
        """Convolution with BatchNormalization folded, SiLU."""
        y = self.conv(x, out, k, stride, **options)
        return str(self.op("Mul", y, self.op("Sigmoid", y)))

    def gemm(self, x: str, out: int) -> str:
        """A fully connected layer on a matrix."""
        inputs = self.channels[x]
        weight = self.noise(out, inputs, scale=inputs**-0.5)
        return str(self.op("Gemm", x, weight, self.noise(out, scale=0.1), channels=out, transB=1))

    def matmul(self, x: str, out: int, bias: bool = True) -> str:
        """A fully connected layer on the last axis."""
        inputs = self.channels[x]
        y = self.op("MatMul", x, self.noise(inputs, out, scale=inputs**-0.5), channels=out)
        return str(self.op("Add", y, self.noise(out, scale=0.1)) if bias else y)

    def concat(self, *names: str, axis: int = 1) -> str:
        """Tensors side by side."""
        return str(self.op("Concat", *names, axis=axis, channels=sum(self.channels[name] for name in names)))

    def add(self, x: str, y: str) -> str:
        """A sum."""
        return str(self.op("Add", x, y))

    def pool(self, x: str, k: int = 2, stride: int = 2, pad: int = 0, kind: str = "MaxPool") -> str:
        """A pool."""
        return str(self.op(kind, x, kernel_shape=[k] * 2, strides=[stride] * 2, pads=[pad] * 4))

    def pool_rows(self, x: str, rows: int) -> str:
        """The average over all rows."""
        return str(self.op("AveragePool", x, kernel_shape=[rows, 1], strides=[rows, 1]))

    def to_half(self) -> None:
        """Make every number one of float16."""
        arrays = [(tensor.name, numpy_helper.to_array(tensor)) for tensor in self._weights]
        halves = [(name, v.astype(np.float16) if v.dtype == np.float32 else v) for name, v in arrays]
        self._weights = [numpy_helper.from_array(value, name) for name, value in halves]
        self.inputs = {name: (shape, FLOAT16) for name, (shape, _) in self.inputs.items()}
        for value in self._outputs:
            value.type.tensor_type.elem_type = FLOAT16

    def classify(self, x: str, classes: int = 10) -> str:
        """Global average, fully connected layer."""
        return self.gemm(self.op("Flatten", self.op("GlobalAveragePool", x)), classes)

    def resize(self, x: str, factor: float = 2, mode: str = "nearest") -> str:
        """Larger by a factor, as torch exports it."""
        where = "asymmetric" if mode == "nearest" else "half_pixel"
        attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": where}
        if mode == "nearest":
            attributes["nearest_mode"] = "floor"
        region = self.constant([]) if self.opset < 13 else ""
        return str(self.op("Resize", x, region, self.constant([1, 1, factor, factor]), **attributes))

    def layer_norm(self, x: str, *, parts: bool = False) -> str:
        """LayerNormalization of the last axis, as one node or in its parts."""
        c = self.channels[x]
        scale, shift = self.noise(c, scale=0.1, mean=1), self.noise(c, scale=0.1)
        if not parts:
            return str(self.op("LayerNormalization", x, scale, shift, axis=-1))
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1]))
        variance = self.op("ReduceMean", self.op("Pow", centred, self.constant(2)), axes=[-1])
        deviation = self.op("Sqrt", self.op("Add", variance, self.constant(1e-5)))
        return str(self.op("Add", self.op("Mul", self.op("Div", centred, deviation), scale), shift))

    def gelu(self, x: str) -> str:
        """Gelu in its parts."""
        erf = self.op("Add", self.op("Erf", self.op("Div", x, self.constant(2**0.5))), self.constant(1))
        return str(self.op("Mul", self.op("Mul", x, erf), self.constant(0.5)))

    def attention(self, x: str, tokens: int, heads: int, bias: str = "") -> str:
        """Attention over [N, tokens, C]; ``bias`` is added to the products."""
        width = self.channels[x]
        split, joined = self.shape(-1, tokens, heads, width // heads), self.shape(-1, tokens, width)
        parts = self.op("Split", self.matmul(x, 3 * width), axis=-1, outputs=3, channels=width)
        q, k, v = (self.op("Reshape", part, split) for part in parts)
        q, v = (self.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 3, 1]))
        scores = self.op("Mul", scores, self.constant((width // heads) ** -0.5))
        if bias:
            scores = self.op("Add", scores, bias)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        mixed = self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), joined, channels=width)
        return self.matmul(mixed, width)

    def mlp(self, x: str, factor: int = 2) -> str:
        """Two fully connected layers with a Gelu between them."""
        width = self.channels[x]
        return self.matmul(self.gelu(self.matmul(x, factor * width)), width)

    def gate(self, x: str, act: str = "Sigmoid") -> str:
        """Squeeze and excitation."""
        c = self.channels[x]
        squeezed = self.op("Relu", self.conv(self.op("GlobalAveragePool", x), max(4, c // 4), 1))
        return str(self.op("Mul", x, self.op(act, self.conv(squeezed, c, 1))))

    def model(self) -> onnx.ModelProto:
        """The graph as a model."""
        declared = [
            helper.make_tensor_value_info(name, element, [self.batch, *shape])
            for name, (shape, element) in self.inputs.items()
        ]
        if self.ir < 4:  # an initializer is an input, too
            declared += [helper.make_tensor_value_info(item.name, item.data_type, item.dims) for item in self._weights]
        graph = helper.make_graph(self._nodes, "twin", declared, self._outputs, self._weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=self.ir)


@dataclass(frozen=True)
class Twin:
    """A network and its inputs.

    Attributes:
        name: Its family.
        structure: What is special about it.
        model: The network.
        inputs: Shape without the batch, and element type, of every input.
    """

    name: str
    structure: str
    model: onnx.ModelProto
    inputs: dict[str, tuple[tuple[int, ...], int]]

    def samples(self, count: int, seed: int) -> dict[str, NDArray[Any]]:
        """Smooth random inputs; images of bytes where it reads bytes."""
        random = np.random.default_rng(seed)
        arrays = {}
        for name, (shape, element) in self.inputs.items():
            value = random.standard_normal((count, *shape))
            if len(shape) > 1:
                axis = 2 if len(shape) > 2 and shape[-1] > 4 else 1
                smooth = sum(np.roll(value, shift, axis=axis) for shift in range(4))
                value = np.asarray(smooth) / 2
            if element == UINT8:
                value = np.clip(128 + 50 * value, 0, 255)
            arrays[name] = value.astype(helper.tensor_dtype_to_np_dtype(element))
        return arrays


Recipe = Callable[[], Builder]
FAMILIES: dict[str, tuple[str, Recipe]] = {}


def family(name: str, structure: str) -> Callable[[Recipe], Recipe]:
    """Enter a recipe under its family."""

    def enter(recipe: Recipe) -> Recipe:
        FAMILIES[name] = structure, recipe
        return recipe

    return enter


def twin(name: str) -> Twin:
    """The network of a family, whose BatchNormalization holds the statistics of its samples."""
    structure, recipe = FAMILIES[name]
    built = recipe()
    result = Twin(name, structure, built.model(), built.inputs)
    samples = result.samples(1 if built.batch == 1 else 32, seed=2)
    values = {item.name: item for item in result.model.graph.initializer}
    for node in result.model.graph.node:
        if node.op_type == "BatchNormalization":
            x = _tensor(result.model, node.input[0], samples).astype(np.float64)
            axes = (0, *range(2, x.ndim))
            for slot, moment in ((3, x.mean(axis=axes)), (4, x.var(axis=axes))):
                stored = values[node.input[slot]]
                stored.CopyFrom(
                    numpy_helper.from_array(moment.astype(numpy_helper.to_array(stored).dtype), stored.name)
                )
    return result


def _tensor(model: onnx.ModelProto, name: str, samples: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """The value of any tensor."""
    exposed = onnx.ModelProto.FromString(model.SerializeToString())
    exposed.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([name], samples)[0])


# Detection


@family("YOLOv8", "C2f, SPPF, DFL (a fixed convolution), anchors and strides as constants")
def yolo() -> Builder:
    b, classes, bins = Builder(), 4, 16

    def c2f(x: str, out: int) -> str:
        first, second = b.op("Split", b.silu(x, out, 1), axis=1, outputs=2, channels=out // 2)
        third = b.add(second, b.silu(b.silu(second, out // 2), out // 2))
        return b.silu(b.concat(first, second, third), out, 1)

    fine = c2f(b.silu(b.silu(b.input("images", 3, 64, 64), 8, 3, 2), 16, 3, 2), 16)
    coarse = b.silu(c2f(b.silu(fine, 32, 3, 2), 32), 16, 1)
    pooled = [coarse]
    for _ in range(3):
        pooled.append(b.pool(pooled[-1], 5, 1, 2))
    coarse = b.silu(b.concat(*pooled), 32, 1)
    fine = c2f(b.concat(b.resize(coarse), fine), 32)
    parts = []
    for level, side in ((fine, 16), (coarse, 8)):
        both = b.concat(b.conv(b.silu(level, 16), 4 * bins, 1), b.conv(b.silu(level, 16), classes, 1))
        parts.append(b.op("Reshape", both, b.shape(0, 4 * bins + classes, side * side)))
    anchors = 16 * 16 + 8 * 8
    joined = b.op("Concat", *parts, axis=2)
    box, score = b.op("Split", joined, b.shape(4 * bins, classes), axis=1, outputs=2)
    spread = b.op("Transpose", b.op("Reshape", box, b.shape(0, 4, bins, anchors)), perm=[0, 2, 1, 3])
    mean = b.constant(np.arange(bins).reshape(1, bins, 1, 1))
    distances = b.op("Reshape", b.op("Conv", b.op("Softmax", spread, axis=1), mean), b.shape(0, 4, anchors))
    low, high = b.op("Split", distances, axis=1, outputs=2)
    points = b.constant(np.random.default_rng(1).uniform(0, 16, (1, 2, anchors)))
    begin, end = b.op("Sub", points, low), b.op("Add", points, high)
    centre = b.op("Div", b.op("Add", begin, end), b.constant(2))
    boxes = b.op("Concat", centre, b.op("Sub", end, begin), axis=1)
    strides = b.constant(np.r_[np.full(256, 4), np.full(64, 8)].reshape(1, 1, anchors))
    b.output(b.op("Concat", b.op("Mul", boxes, strides), b.op("Sigmoid", score), axis=1))
    return b


def ssd_heads(b: Builder, classes: int = 3) -> tuple[str, str]:
    """Boxes [N, anchors, 4] and scores [N, classes, anchors] of two levels."""
    fine = b.block(b.block(b.input("image", 3, 32, 32), 16, 3, 2), 24, 3, 2)
    boxes: list[str] = []
    scores: list[str] = []
    for level in (fine, b.block(fine, 32, 3, 2)):
        for found, size in ((boxes, 4), (scores, classes)):
            moved = b.op("Transpose", b.conv(level, 2 * size), perm=[0, 2, 3, 1])
            found.append(b.op("Reshape", moved, b.shape(0, -1, size)))
    offsets, logits = (b.op("Concat", *parts, axis=1) for parts in (boxes, scores))
    anchors = 2 * (8 * 8 + 4 * 4)
    priors = b.constant(np.random.default_rng(1).uniform(0, 0.8, (1, anchors, 4)))
    corners = b.op("Add", b.op("Mul", b.op("Tanh", offsets), b.constant(0.1)), priors)
    return corners, b.op("Transpose", b.op("Softmax", logits, axis=2), perm=[0, 2, 1])


@family("SSD", "boxes and NonMaxSuppression in the graph, two levels")
def ssd() -> Builder:
    b = Builder(opset=13, batch=1)
    boxes, scores = ssd_heads(b)
    limits = b.shape(20), b.constant([0.5]), b.constant([0.2])
    chosen = b.op("NonMaxSuppression", boxes, scores, *limits)
    where = b.op("Gather", chosen, b.constant(2, np.int64), axis=1)
    b.output(b.op("Gather", b.op("Squeeze", boxes, b.shape(0)), where, axis=0))
    return b


@family("SSD, If and Loop", "selection in control flow behind the heads")
def ssd_loop() -> Builder:
    b = Builder(opset=13, batch=1)
    boxes, scores = ssd_heads(b)
    best = b.op("ReduceMax", scores, axes=[1], keepdims=0)
    total = b.op("ReduceSum", best, keepdims=0)
    name = helper.make_tensor_value_info
    keep = helper.make_graph([helper.make_node("Identity", [boxes], ["kept"])], "keep", [], [name("kept", FLOAT, None)])
    drop = helper.make_graph([helper.make_node("Neg", [boxes], ["gone"])], "drop", [], [name("gone", FLOAT, None)])
    chosen = b.op("If", b.op("Greater", total, b.constant(0)), then_branch=keep, else_branch=drop)
    body = helper.make_graph(
        [
            helper.make_node("Add", ["sum", best], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [name("turn", INT64, []), name("go", TensorProto.BOOL, []), name("sum", FLOAT, None)],
        [name("on", TensorProto.BOOL, []), name("next", FLOAT, None)],
    )
    b.output(chosen, b.op("Loop", b.constant(3, np.int64), b.constant(True, np.bool_), best, body=body))
    return b


@family("RetinaFace", "shared heads on a pyramid, three outputs")
def retinaface() -> Builder:
    b = Builder(opset=11)
    first = b.block(b.input("image", 3, 32, 32), 16, 3, 2, "LeakyRelu")
    second = b.block(first, 24, 3, 2, "LeakyRelu")
    coarse = b.block(second, 16, 1)
    fine = b.block(b.add(b.block(first, 16, 1), b.resize(coarse)), 16)
    for size in (4, 2, 10):
        parts = []
        for level in (fine, coarse):
            moved = b.op("Transpose", b.conv(b.block(level, 16), 2 * size, 1), perm=[0, 2, 3, 1])
            parts.append(b.op("Reshape", moved, b.shape(0, -1, size)))
        joined = b.op("Concat", *parts, axis=1)
        b.output(b.op("Softmax", joined, axis=2) if size == 2 else joined)
    return b


# Text


@family("SVTR", "overlapping patches, mixing by convolution and attention, LayerNormalization in parts")
def svtr() -> Builder:
    b, tokens = Builder(opset=12), 4 * 16
    x = b.block(b.block(b.input("x", 3, 16, 64), 12, 3, 2), 24, 3, 2)
    x = b.op("Relu", b.add(x, b.norm(b.conv(x, 24, groups=6))))
    x = b.op("Transpose", b.op("Reshape", x, b.shape(0, 24, tokens)), perm=[0, 2, 1])
    y = b.layer_norm(x, parts=True)
    split = b.shape(0, tokens, 2, 12)
    q, k, v = (b.op("Transpose", b.op("Reshape", b.matmul(y, 24), split), perm=[0, 2, 1, 3]) for _ in range(3))
    scores = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    mixed = b.op("Transpose", b.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    x = b.add(x, b.matmul(b.op("Reshape", mixed, b.shape(0, tokens, 24), channels=24), 24))
    x = b.add(x, b.mlp(b.layer_norm(x, parts=True)))
    x = b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 1]), b.shape(0, 24, 4, 16))
    x = b.op("Squeeze", b.pool_rows(b.conv(x, 24, 1), 4), axes=[2])
    b.output(b.op("Softmax", b.matmul(b.op("Transpose", x, perm=[0, 2, 1]), 12), axis=2))
    return b


def crnn(kind: str) -> Builder:
    b = Builder(opset=14)
    x = b.block(b.block(b.input("line", 1, 16, 64), 16, 3, 2), 24, (3, 3), 2)
    x = b.block(b.op("Squeeze", b.pool_rows(x, 4), b.shape(2)), 24, (3,), axes=1)
    x = b.op("Transpose", x, perm=[2, 0, 1])
    gates, hidden = {"LSTM": 4, "GRU": 3}[kind], 12
    weights = b.noise(2, gates * hidden, 24, scale=0.2), b.noise(2, gates * hidden, hidden, scale=0.2)
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional"}
    if kind == "GRU":
        attributes["linear_before_reset"] = 1
    x = b.op(kind, x, *weights, b.noise(2, 2 * gates * hidden, scale=0.1), **attributes)
    x = b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 1, 3]), b.shape(0, 0, -1), channels=2 * hidden)
    b.output(b.op("Transpose", b.matmul(x, 11), perm=[1, 0, 2]))
    return b


FAMILIES["CRNN, LSTM"] = "convolutions, bidirectional LSTM, a classifier for each step", lambda: crnn("LSTM")
FAMILIES["CRNN, GRU"] = "the same with GRU", lambda: crnn("GRU")


# Image to image


def style(opset: int) -> Builder:
    b = Builder(opset=opset, ir=3 if opset < 9 else 4)

    def padded(x: str, out: int, k: int, stride: int = 1) -> str:
        side = k // 2
        around = b.op("Pad", x, mode="reflect", pads=[0, 0, side, side, 0, 0, side, side])
        y = b.conv(around, out, k, stride, pads=[0] * 4)
        return str(b.op("InstanceNormalization", y, b.noise(out, scale=0.1, mean=1), b.noise(out, scale=0.1)))

    x = b.op("Relu", padded(b.op("Relu", padded(b.input("image", 3, 32, 32), 8, 9)), 16, 3, 2))
    x = b.add(x, padded(b.op("Relu", padded(x, 16, 3)), 16, 3))
    if opset < 9:
        x = b.op("Upsample", x, mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])
    else:
        x = b.op("Upsample", x, b.constant([1, 1, 2, 2]), mode="nearest")
    b.output(padded(b.op("Relu", padded(x, 8, 3)), 3, 9))
    return b


FAMILIES["Style transfer, opset 8"] = "reflecting Pad, InstanceNormalization, Upsample; IR 3", lambda: style(8)
FAMILIES["Style transfer, opset 9"] = "the same with Upsample's scales as an input", lambda: style(9)


@family("Depth decoder", "three inputs: the features of an encoder; nearest Resize, Elu")
def depth() -> Builder:
    b = Builder(opset=11)
    fine, middle, coarse = b.input("f1", 8, 16, 16), b.input("f2", 16, 8, 8), b.input("f3", 24, 4, 4)
    x = b.op("Elu", b.conv(coarse, 16))
    x = b.op("Elu", b.conv(b.concat(b.resize(x), middle), 16))
    x = b.op("Elu", b.conv(b.concat(b.resize(x), fine), 8))
    b.output(b.op("Sigmoid", b.conv(x, 1)))
    return b


@family("U-Net", "ConvTranspose and skips by Concat")
def unet() -> Builder:
    b = Builder()
    first = b.block(b.block(b.input("image", 1, 32, 32), 8), 8)
    second = b.block(b.block(b.pool(first), 16), 16)
    third = b.block(b.pool(second), 24)
    x = b.block(b.concat(b.up(third, 16), second), 16)
    x = b.block(b.concat(b.up(x, 8), first), 8)
    b.output(b.conv(x, 2, 1))
    return b


@family("Super-resolution", "DepthToSpace, one output of the input's kind")
def superresolution() -> Builder:
    b = Builder(opset=11)
    x = b.op("Relu", b.conv(b.input("y", 1, 24, 24), 16, 5))
    for _ in range(2):
        x = b.op("Relu", b.conv(x, 16))
    b.output(b.op("DepthToSpace", b.conv(x, 4), blocksize=2, mode="CRD", channels=1))
    return b


@family("GAN generator", "a latent vector, ConvTranspose with BatchNormalization, Tanh")
def generator() -> Builder:
    b = Builder()
    x = b.op("Reshape", b.gemm(b.input("latent", 16), 24 * 16), b.shape(-1, 24, 4, 4), channels=24)
    x = b.op("Relu", b.norm(b.up(b.op("Relu", b.norm(x)), 16, 4, 2, 1)))
    b.output(b.op("Tanh", b.up(x, 3, 4, 2, 1)))
    return b


@family("DeepLab", "dilated convolutions, ASPP with a pooled branch, bilinear Resize, ArgMax")
def deeplab() -> Builder:
    b = Builder(opset=13)
    image = b.input("image", 3, 32, 32)
    x = b.block(b.block(b.block(image, 8, 3, 2), 16, 3, 2), 24, dilation=2)
    pooled = b.block(b.op("GlobalAveragePool", x), 8, 1)
    spread = b.op("Resize", pooled, "", b.constant([1, 1, 8, 8]), mode="linear")
    x = b.block(b.concat(b.block(x, 8, 1), b.block(x, 8, dilation=2), b.block(x, 8, dilation=4), spread), 16, 1)
    x = b.resize(b.conv(x, 4, 1), 4, "linear")
    b.output(b.op("ArgMax", x, axis=1, keepdims=0), element=INT64)
    return b


@family("Optical flow", "GridSample of the features of one frame by the flow, in three steps that share weights")
def flow() -> Builder:
    b = Builder(opset=16)
    frames = b.input("frames", 6, 24, 24)
    first, second = b.op("Split", frames, axis=1, outputs=2, channels=3)
    weight, bias = b.noise(8, 3, 3, 3, scale=0.25), b.noise(8, scale=0.1)
    shared: dict[str, Any] = {"pads": [1] * 4, "channels": 8}
    left, right = (b.op("Relu", b.op("Conv", frame, weight, bias, **shared)) for frame in (first, second))
    update = b.noise(2, 16, 3, 3, scale=0.03)
    grid = b.constant(np.stack(np.meshgrid(*[np.linspace(-1, 1, 24)] * 2), axis=-1)[None])
    zero = b.op("Mul", b.op("Slice", left, b.shape(0), b.shape(2), b.shape(1)), b.constant(0))
    moved = zero
    for _ in range(3):
        where = b.op("Add", b.op("Transpose", moved, perm=[0, 2, 3, 1]), grid)
        warped = b.op("GridSample", right, where, align_corners=1, channels=8)
        step = b.op("Conv", b.concat(left, warped), update, pads=[1] * 4, channels=2)
        moved = b.op("Add", moved, step)
    b.output(moved)
    return b


@family("OpenPose", "stages that read the maps of the one before, several outputs")
def openpose() -> Builder:
    b = Builder(opset=10)
    features = b.op("Relu", b.conv(b.pool(b.op("Relu", b.conv(b.input("image", 3, 32, 32), 12)), 2), 16))
    maps: list[str] = []
    for _ in range(3):
        x = b.concat(features, *maps) if maps else features
        maps = [b.conv(b.op("Relu", b.conv(x, 16)), size, 1) for size in (5, 8)]
        b.output(*maps)
    return b


# Transformers


@family("ViT", "class token, attention, LayerNormalization, Gelu")
def vit() -> Builder:
    b, width, tokens = Builder(), 24, 17
    x = b.conv(b.input("pixels", 3, 32, 32), width, 8, 8, pads=[0] * 4)
    x = b.op("Transpose", b.op("Reshape", x, b.shape(0, width, 16)), perm=[0, 2, 1])
    batch = b.op("Slice", b.op("Shape", x), b.shape(0), b.shape(1))
    size = b.op("Concat", batch, b.shape(1, width), axis=0)
    token = b.op("Expand", b.noise(1, 1, width), size)
    x = b.op("Add", b.op("Concat", token, x, axis=1, channels=width), b.noise(1, tokens, width, scale=0.1))
    for _ in range(2):
        x = b.add(x, b.attention(b.layer_norm(x), tokens, 3))
        x = b.add(x, b.mlp(b.layer_norm(x)))
    first = b.op("Gather", b.layer_norm(x), b.constant(0, np.int64), axis=1)
    b.output(b.gemm(first, 10))
    return b


@family("Swin", "windows by Reshape and Transpose, shifted by Slice and Concat, patch merging")
def swin() -> Builder:
    b, width, side, window = Builder(), 16, 8, 4
    x = b.op("Transpose", b.conv(b.input("pixels", 3, 32, 32), width, 4, 4, pads=[0] * 4), perm=[0, 2, 3, 1])
    b.channels[x] = width

    def rolled(x: str, by: int) -> str:
        for axis in (1, 2):
            cut = b.shape(by), b.shape(1 << 30), b.shape(axis)
            head = b.op("Slice", x, b.shape(0), b.shape(by), b.shape(axis))
            x = b.op("Concat", b.op("Slice", x, *cut), head, axis=axis, channels=width)
        return x

    for shift in (0, 2):
        y = b.layer_norm(x)
        y = rolled(y, shift) if shift else y
        count = side // window
        y = b.op("Reshape", y, b.shape(-1, count, window, count, window, width))
        y = b.op(
            "Reshape", b.op("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), b.shape(-1, window**2, width), channels=width
        )
        y = b.attention(y, window**2, 2, b.noise(1, 2, window**2, window**2, scale=0.1))
        y = b.op("Reshape", y, b.shape(-1, count, count, window, window, width))
        y = b.op(
            "Reshape", b.op("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), b.shape(-1, side, side, width), channels=width
        )
        x = b.add(x, rolled(y, side - shift) if shift else y)
        x = b.add(x, b.mlp(b.layer_norm(x)))
    corners = []
    for row, column in ((0, 0), (1, 0), (0, 1), (1, 1)):
        ends, steps = b.shape(1 << 30, 1 << 30), b.shape(2, 2)
        corners.append(b.op("Slice", x, b.shape(row, column), ends, b.shape(1, 2), steps))
    x = b.op("Concat", *corners, axis=-1, channels=4 * width)
    x = b.matmul(b.layer_norm(x), 2 * width, bias=False)
    b.output(b.gemm(b.op("ReduceMean", x, axes=[1, 2], keepdims=0, channels=2 * width), 10))
    return b


# Classifiers


def resnet(batch: int | str, opset: int = 17) -> Builder:
    b = Builder(opset=opset, batch=batch)
    x = b.block(b.input("image", 3, 32, 32), 16)
    for out, stride in ((16, 1), (24, 2)):
        y = b.norm(b.conv(b.block(x, out, 3, stride), out, bias=False))
        x = b.op("Relu", b.add(y, x if stride == 1 else b.norm(b.conv(x, out, 1, stride, bias=False))))
    if batch == 1:
        flat = b.op("Reshape", b.op("GlobalAveragePool", x), b.shape(1, 24))
        b.output(b.gemm(flat, 10))
    else:
        b.output(b.op("Softmax", b.classify(x), axis=1))
    return b


FAMILIES["ResNet"] = "residual sums, BatchNormalization, open batch", lambda: resnet("N")
FAMILIES["ResNet, batch 1"] = "a batch of one in the input and in a Reshape", lambda: resnet(1, 11)


@family("ResNet, blurred", "a blur in front of each stride, colours converted first")
def blurred() -> Builder:
    b = Builder()
    yuv = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    x = b.op("Conv", b.input("image", 3, 32, 32), b.constant(np.reshape(yuv, (3, 3, 1, 1))), channels=3)
    x = b.block(x, 16)
    kernel = b.constant(np.tile(np.outer([1, 2, 1], [1, 2, 1]) / 16, (16, 1, 1, 1)))
    x = b.op("Conv", x, kernel, group=16, strides=[2, 2], pads=[1] * 4, channels=16)
    b.output(b.classify(b.block(b.block(x, 16), 24)))
    return b


@family("DenseNet", "Concat of all earlier layers, BatchNormalization in front of convolutions")
def densenet() -> Builder:
    b = Builder(opset=12)
    x = b.conv(b.input("image", 3, 32, 32), 12, bias=False)
    for _ in range(2):
        for _ in range(3):
            inner = b.conv(b.op("Relu", b.norm(x)), 16, 1, bias=False)
            x = b.concat(x, b.conv(b.op("Relu", b.norm(inner)), 8, bias=False))
        x = b.pool(b.conv(b.op("Relu", b.norm(x)), 16, 1, bias=False), kind="AveragePool")
    b.output(b.classify(b.op("Relu", b.norm(x))))
    return b


@family("ShuffleNet", "grouped convolutions, channels shuffled by Reshape and Transpose")
def shufflenet() -> Builder:
    b = Builder()
    x = b.block(b.input("image", 3, 32, 32), 24, 3, 2)
    for _ in range(2):
        y = b.block(x, 24, 1, groups=3)
        y = b.op("Transpose", b.op("Reshape", y, b.shape(0, 3, 8, 16, 16)), perm=[0, 2, 1, 3, 4])
        y = b.norm(b.conv(b.op("Reshape", y, b.shape(0, 24, 16, 16)), 24, groups=24, bias=False))
        x = b.op("Relu", b.add(x, b.norm(b.conv(y, 24, 1, groups=3, bias=False))))
    left, right = b.op("Split", x, axis=1, outputs=2, channels=12)
    b.output(b.classify(b.block(b.concat(left, b.block(right, 12, 1)), 32, 1)))
    return b


@family("SqueezeNet", "fire modules, a convolution as classifier, Dropout")
def squeezenet() -> Builder:
    b = Builder(opset=9, ir=4)
    x = b.pool(b.op("Relu", b.conv(b.input("image", 3, 32, 32), 16, 3, 2)), 3, 2)
    for _ in range(2):
        y = b.op("Relu", b.conv(x, 8, 1))
        x = b.concat(b.op("Relu", b.conv(y, 12, 1)), b.op("Relu", b.conv(y, 12)))
    x = b.op("Relu", b.conv(b.op("Dropout", x), 10, 1))
    b.output(b.op("Softmax", b.op("Flatten", b.op("GlobalAveragePool", x)), axis=1))
    return b


@family("EfficientNet", "depthwise, squeeze and excitation, Swish")
def efficientnet() -> Builder:
    b = Builder(opset=12)
    x = b.silu(b.input("image", 3, 32, 32), 12, 3, 2)
    for _ in range(2):
        y = b.gate(b.silu(b.silu(x, 24, 1), 24, groups=24))
        x = b.add(x, b.conv(y, 12, 1))
    b.output(b.classify(b.silu(x, 32, 1)))
    return b


@family("MobileNetV3", "HardSwish and HardSigmoid")
def mobilenet() -> Builder:
    b = Builder(opset=14)
    x = b.block(b.input("image", 3, 32, 32), 12, 3, 2, "HardSwish")
    for _ in range(2):
        y = b.gate(b.block(b.block(x, 24, 1, act="HardSwish"), 24, groups=24, act="HardSwish"), "HardSigmoid")
        x = b.add(x, b.norm(b.conv(y, 12, 1, bias=False)))
    pooled = b.op("Flatten", b.op("GlobalAveragePool", b.block(x, 32, 1, act="HardSwish")))
    b.output(b.gemm(b.op("HardSwish", b.gemm(pooled, 32)), 10))
    return b


@family("AlexNet", "LRN, grouped convolutions, large fully connected layers; Caffe")
def alexnet() -> Builder:
    b = Builder(opset=8, ir=3)
    x = b.op("Relu", b.conv(b.input("data", 3, 32, 32), 16, 5, 2))
    x = b.pool(b.op("LRN", x, size=5, alpha=1e-4, beta=0.75), 3, 2)
    x = b.op("Relu", b.conv(b.op("LRN", b.op("Relu", b.conv(x, 24, 3, groups=2)), size=5), 24, 3, groups=2))
    x = b.op("Reshape", b.pool(x, 3, 2), b.shape(0, -1), channels=24 * 3 * 3)
    x = b.op("Dropout", b.op("Relu", b.gemm(x, 48)))
    b.output(b.op("Softmax", b.gemm(x, 10), axis=1))
    return b


@family("tf2onnx", "NHWC at both ends, Transposes inside, MatMul and Add")
def tensorflow() -> Builder:
    b = Builder(opset=13)
    x = b.op("Transpose", b.input("input:0", 32, 32, 3), perm=[0, 3, 1, 2], channels=3)
    x = b.op("Clip", b.conv(x, 16, 3, 2, pads=[0, 0, 1, 1]), b.constant(0), b.constant(6))
    x = b.op("Clip", b.norm(b.conv(x, 16, groups=16)), b.constant(0), b.constant(6))
    x = b.op("Transpose", b.conv(x, 24, 1), perm=[0, 2, 3, 1])
    x = b.op("ReduceMean", b.op("Relu", x), axes=[1, 2], keepdims=0, channels=24)
    b.output(b.op("Softmax", b.matmul(x, 10), axis=-1))
    return b


@family("Keras", "Pad in front of convolutions, a Squeeze of an average")
def keras() -> Builder:
    b = Builder(opset=11)
    x = b.input("input_1", 3, 32, 32)
    for out in (12, 16):
        padded = b.op("Pad", x, b.shape(0, 0, 0, 0, 0, 0, 1, 1))
        x = b.op("Relu", b.norm(b.conv(padded, out, 3, 2, pads=[0] * 4)))
    pooled = b.op("Squeeze", b.pool(b.block(x, 24), 8, 8, kind="AveragePool"), axes=[2, 3])
    b.output(b.op("Softmax", b.matmul(pooled, 10), axis=-1))
    return b


@family("GroupNormalization", "as torch exports it: InstanceNormalization between Reshapes")
def groupnorm() -> Builder:
    b = Builder()
    x = b.input("image", 3, 32, 32)
    for out, side in ((16, 16), (24, 8)):
        x = b.conv(x, out, 3, 2)
        grouped = b.op("Reshape", x, b.shape(0, 4, -1))
        ones, zeros = b.constant(np.ones(4)), b.constant(np.zeros(4))
        back = b.op("Reshape", b.op("InstanceNormalization", grouped, ones, zeros), b.shape(0, out, side, side))
        x = b.op("Relu", b.op("Add", b.op("Mul", back, b.noise(out, 1, 1, scale=0.1, mean=1)), b.noise(out, 1, 1)))
        b.channels[x] = out
    b.output(b.classify(x))
    return b


@family("GroupNormalization, opset 21", "as one node")
def groupnorm21() -> Builder:
    b = Builder(opset=21, ir=10)
    x = b.input("image", 3, 32, 32)
    for out in (16, 24):
        scale, shift = b.noise(out, scale=0.1, mean=1), b.noise(out, scale=0.1)
        x = b.op("Relu", b.op("GroupNormalization", b.conv(x, out, 3, 2), scale, shift, num_groups=4))
    b.output(b.classify(x))
    return b


# Other signals, types and shapes


@family("Audio", "1-D convolutions on a waveform, dilated and gated")
def audio() -> Builder:
    b = Builder(opset=13)
    x = b.block(b.input("wave", 1, 256), 16, (9,), 4, axes=1)
    for dilation in (1, 2):
        gate = b.op("Sigmoid", b.conv(x, 16, (3,), dilation=dilation))
        x = b.add(x, b.op("Mul", b.op("Tanh", b.conv(x, 16, (3,), dilation=dilation)), gate))
    b.output(b.matmul(b.op("ReduceMean", x, axes=[2], keepdims=0), 10))
    return b


@family("3-D", "convolutions over volumes")
def volume() -> Builder:
    b = Builder()
    x = b.block(b.input("volume", 1, 12, 12, 12), 8, (3, 3, 3))
    x = b.op("MaxPool", x, kernel_shape=[2] * 3, strides=[2] * 3)
    b.output(b.classify(b.block(b.block(x, 16, (3, 3, 3)), 24, (1, 1, 1)), 5))
    return b


@family("Bytes, Cast", "an input of uint8, cast, scaled and normalised in the graph")
def bytes_cast() -> Builder:
    b = Builder()
    x = b.op("Cast", b.input("image", 32, 32, 3, element=UINT8), to=FLOAT)
    x = b.op("Transpose", b.op("Div", x, b.constant(255)), perm=[0, 3, 1, 2], channels=3)
    scale = b.constant(1 / np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1, 1))
    x = b.op("Conv", x, scale, b.constant([-2.1, -2.0, -1.8]), group=3)
    b.output(b.classify(b.block(b.block(x, 16, 3, 2), 24, 3, 2)))
    return b


@family("Bytes, DequantizeLinear", "an input of uint8 that is dequantized, an output that is quantized")
def bytes_quantized() -> Builder:
    b = Builder(opset=13)
    scale, zero = b.constant(0.02), b.constant(128, np.uint8)
    x = b.op("DequantizeLinear", b.input("image", 3, 32, 32, element=UINT8), scale, zero)
    logits = b.classify(b.block(b.block(x, 16, 3, 2), 24, 3, 2))
    b.output(b.op("QuantizeLinear", logits, scale, zero), element=UINT8)
    return b


def half() -> Builder:
    b = resnet("N")
    b.to_half()
    return b


FAMILIES["ResNet, float16"] = "weights, activations and input of float16", half
