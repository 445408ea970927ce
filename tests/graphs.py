"""Small seeded graphs, and plain onnxruntime runs that serve as references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.points import LayerPoint, survey
from tools.paths import MODELS

BN_SLOTS = (1, 2, 3, 4)


def net(text: str, *, ir: int = 8, opset: int = 17, seed: int = 0, **weights: Any) -> onnx.ModelProto:
    """A model from the text of its graph; ``weights`` become initializers.

    A weight given as a shape is drawn at random: names that end in ``var`` from 0.5 to 2, scales of normalizations
    (``gamma``) around 1, everything else from a normal distribution.
    """
    model = parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}]> {text}')
    generator = np.random.default_rng(seed)
    for name, value in weights.items():
        if isinstance(value, tuple):
            if name.endswith("var"):
                value = generator.uniform(0.5, 2.0, value)
            elif "gamma" in name:
                value = generator.uniform(0.5, 1.5, value)
            else:
                fan = int(np.prod(value[1:])) if len(value) > 1 else 4
                value = generator.normal(0.0, fan**-0.5, value)
            value = value.astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return model


def bn(*prefixes: str, channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of BatchNormalization parameters named ``<prefix>_gamma``, ``_beta``, ``_mean`` and ``_var``."""
    return {f"{p}_{part}": (channels,) for p in prefixes for part in ("gamma", "beta", "mean", "var")}


def index(model: onnx.ModelProto) -> GraphIndex:
    return GraphIndex.of(model)


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], names: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """One plain full run without graph optimisations: the outputs, and any other tensors by name."""
    return run_each(model, [feeds], names)[0]


def run_each(
    model: onnx.ModelProto, parts: Iterable[Mapping[str, np.ndarray]], names: Iterable[str] = ()
) -> list[dict[str, np.ndarray]]:
    """The same for several feeds."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    present = {value.name for value in exposed.graph.output}
    for name in dict.fromkeys(names):
        if name not in present:
            exposed.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = [value.name for value in exposed.graph.output]
    return [dict(zip(wanted, session.run(wanted, dict(feeds)), strict=True)) for feeds in parts]


def first_output(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """The first output for a single input."""
    inputs = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    (name,) = inputs
    return run(model, {name: x})[model.graph.output[0].name]


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    """A constant tensor, evaluated by onnx's reference implementation."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return numpy_helper.to_array(tensor)
    for sparse in model.graph.sparse_initializer:
        if sparse.values.name == name:
            values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
            full = np.zeros(tuple(sparse.dims), values.dtype)
            for value, place in zip(values, places, strict=True):
                full[tuple(place) if places.ndim == 2 else np.unravel_index(place, full.shape)] = value
            return full
    needed, wanted = [], {name}
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            needed.insert(0, node)
            wanted |= set(node.input)
    graph = helper.make_graph(
        needed,
        "constant",
        [],
        [onnx.ValueInfoProto(name=name)],
        [tensor for tensor in model.graph.initializer if tensor.name in wanted],
    )
    scope = helper.make_model(graph, opset_imports=model.opset_import)
    return np.asarray(ReferenceEvaluator(scope).run([name], {})[0])


def parameter(model: onnx.ModelProto, node: int, slot: int) -> np.ndarray:
    """Value of a node's constant input."""
    return constant(model, model.graph.node[node].input[slot])


def set_parameter(model: onnx.ModelProto, node: int, slot: int, value: np.ndarray) -> None:
    """Give a node its own constant for one input, in place; nothing else changes."""
    target = model.graph.node[node]
    name = f"test::{node}:{slot}"
    for position, tensor in enumerate(model.graph.initializer):
        if tensor.name == name:
            del model.graph.initializer[position]
            break
    dtype = parameter(model, node, slot).dtype if slot < len(target.input) and target.input[slot] != name else "f4"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value).astype(dtype), name))
    while len(target.input) <= slot:
        target.input.append("")
    target.input[slot] = name


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def positions(model: onnx.ModelProto, *op_types: str) -> list[int]:
    """Positions of the nodes of these operators, in file order."""
    return [position for position, node in enumerate(model.graph.node) if node.op_type in op_types]


def per_channel(tensor: np.ndarray, axis: int = 1) -> np.ndarray:
    """[C, everything else] in float64."""
    return np.moveaxis(tensor.astype(np.float64), axis, 0).reshape(tensor.shape[axis], -1)


def weights(model: onnx.ModelProto) -> dict[int, np.ndarray]:
    """Weight of every Conv, ConvTranspose and Gemm, by node position."""
    return {p: parameter(model, p, 1) for p in positions(model, "Conv", "ConvTranspose", "Gemm")}


def magnitude_masks(model: onnx.ModelProto, sparsity: float) -> dict[int, np.ndarray]:
    """Masks of a plain global magnitude pruning."""
    found = weights(model)
    magnitudes = np.concatenate([np.abs(value).ravel() for value in found.values()])
    threshold = np.quantile(magnitudes, sparsity)
    return {position: np.abs(value) > threshold for position, value in found.items()}


def masked(model: onnx.ModelProto, masks: Mapping[int, np.ndarray]) -> onnx.ModelProto:
    """A copy with zeros where the masks say so."""
    result = copy(model)
    for position, mask in masks.items():
        set_parameter(result, position, 1, parameter(model, position, 1) * mask)
    return result


def pruned(model: onnx.ModelProto, sparsity: float) -> onnx.ModelProto:
    """A copy after plain global magnitude pruning."""
    return masked(model, magnitude_masks(model, sparsity))


def recalibrated(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Every BatchNormalization re-estimated naively: in file order, each by a full run with those before it set."""
    result = copy(model)
    for position in positions(model, "BatchNormalization"):
        source = result.graph.node[position].input[0]
        values = per_channel(run(result, feeds, [source])[source])
        set_parameter(result, position, 3, values.mean(axis=1))
        set_parameter(result, position, 4, values.var(axis=1))
    return result


def folded(model: onnx.ModelProto, every: int = 1) -> onnx.ModelProto:
    """The same function with every (second, third ...) BatchNormalization folded that follows a layer with weights."""
    result = copy(model)
    dead = []
    for position in positions(model, "BatchNormalization")[::every]:
        node = result.graph.node[position]
        layers = positions(result, "Conv", "ConvTranspose", "Gemm")
        producers = [p for p in layers if result.graph.node[p].output[0] == node.input[0]]
        readers = [item for item in result.graph.node if node.input[0] in item.input]
        if not producers or len(readers) > 1:
            continue
        layer = producers[0]
        gamma, beta, mean, var = (parameter(result, position, slot).astype(np.float64) for slot in BN_SLOTS)
        epsilon = next((item.f for item in node.attribute if item.name == "epsilon"), 1e-5)
        slope = gamma / np.sqrt(var + epsilon)
        target = result.graph.node[layer]
        options = {item.name: helper.get_attribute_value(item) for item in target.attribute}
        weight = parameter(result, layer, 1).astype(np.float64)
        if target.op_type == "ConvTranspose":
            by_group = weight.reshape(options.get("group", 1), -1, *weight.shape[1:])  # [G, I, O, *k]
            factor = slope.reshape(len(by_group), 1, weight.shape[1], *[1] * (weight.ndim - 2))
            scaled = (by_group * factor).reshape(weight.shape)
        elif target.op_type == "Gemm" and not options.get("transB", 0):
            scaled = weight * slope
        else:
            scaled = weight * slope.reshape(-1, *[1] * (weight.ndim - 1))
        has_bias = len(target.input) > 2
        share = options.get("beta", 1.0)
        bias = share * parameter(result, layer, 2).astype(np.float64) if has_bias else np.zeros(len(slope))
        set_parameter(result, layer, 1, scaled)
        set_parameter(result, layer, 2, (beta + slope * (bias - mean)) / share)
        target.output[0] = node.output[0]
        dead.append(position)
    for position in reversed(dead):
        del result.graph.node[position]
    return result


# The nets below are random, but their running statistics are those of normal images, so that they behave like
# trained ones: every BatchNormalization's output has about its own beta and gamma as mean and standard deviation.


def vision_transformer(depth: int = 1, seed: int = 0) -> onnx.ModelProto:
    """Patches of 8 x 8 pixels, a class token, blocks of attention with 3 heads, a classifier; 24 wide.

    The sizes for the heads are computed from those of the tensors, as exporters write it, so that shape inference stops
    before the first attention.
    """
    tokens, width, heads = 17, 24, 3
    blocks, weights = [], {"patch_w": (width, 3, 8, 8), "place": (1, tokens, width), "token": (1, 1, width)}
    for number in range(depth):
        b = f"b{number}"
        blocks.append(f"""
          {b}n = LayerNormalization ({b}in, {b}_n1_gamma, {b}_n1_beta)
          {b}all = MatMul ({b}n, {b}_all_w)
          {b}q, {b}k, {b}v = Split <axis=-1> ({b}all, thirds)
          {b}qs = Reshape ({b}q, split)
          {b}ks = Reshape ({b}k, split)
          {b}vs = Reshape ({b}v, split)
          {b}qh = Transpose <perm=[0,2,1,3]> ({b}qs)
          {b}kh = Transpose <perm=[0,2,3,1]> ({b}ks)
          {b}vh = Transpose <perm=[0,2,1,3]> ({b}vs)
          {b}scores = MatMul ({b}qh, {b}kh)
          {b}scaled = Mul ({b}scores, factor)
          {b}shares = Softmax <axis=-1> ({b}scaled)
          {b}mixed = MatMul ({b}shares, {b}vh)
          {b}back = Transpose <perm=[0,2,1,3]> ({b}mixed)
          {b}joined = Reshape ({b}back, join)
          {b}out = MatMul ({b}joined, {b}_out_w)
          {b}sum = Add ({b}in, {b}out)
          {b}n2 = LayerNormalization ({b}sum, {b}_n2_gamma, {b}_n2_beta)
          {b}up = MatMul ({b}n2, {b}_up_w)
          {b}upb = Add ({b}up, {b}_up_b)
          {b}r = Relu ({b}upb)
          {b}down = MatMul ({b}r, {b}_down_w)
          b{number + 1}in = Add ({b}sum, {b}down)""")
        weights |= {f"{b}_{name}": (width,) for name in ("n1_gamma", "n1_beta", "n2_gamma", "n2_beta")}
        weights |= {f"{b}_all_w": (width, 3 * width), f"{b}_out_w": (width, width), f"{b}_up_b": (4 * width,)}
        weights |= {f"{b}_up_w": (width, 4 * width), f"{b}_down_w": (4 * width, width)}
    text = f"""
        vit (float[N,3,32,32] x) => (float[N,10] logits) {{
          patch = Conv <strides=[8,8]> (x, patch_w)
          size = Shape (patch)
          batch = Slice (size, zero, one)
          flat_to = Concat <axis=0> (batch, wide, minus)
          flat = Reshape (patch, flat_to)
          turned = Transpose <perm=[0,2,1]> (flat)
          token_to = Concat <axis=0> (batch, one, wide)
          spread = Expand (token, token_to)
          all = Concat <axis=1> (spread, turned)
          b0in = Add (all, place)
          per_head = Div (wide, heads)
          split = Concat <axis=0> (batch, minus, heads, per_head)
          join = Concat <axis=0> (batch, minus, wide){"".join(blocks)}
          class = Gather <axis=1> (b{depth}in, first)
          logits = Gemm <transB=1> (class, head_w, head_b)
        }}
        """
    sizes = {name: np.array([value]) for name, value in {"zero": 0, "one": 1, "minus": -1, "wide": width}.items()}
    sizes |= {"heads": np.array([heads]), "thirds": np.array([width] * 3), "first": np.array(0)}
    factor = np.float32((width / heads) ** -0.5)
    return net(text, seed=seed, **weights, **sizes, factor=factor, head_w=(10, width), head_b=(10,))


def residual_net(seed: int = 0) -> onnx.ModelProto:
    r"""Identity and convolution shortcut, depthwise and strided convolutions, classifier.

    ``x - Conv - BN - Relu -+- Conv - BN - Relu - Conv(dw) - BN - Add - Relu -+- Conv/2 - BN - Add - Relu``
    ``                      +-----------------------------------/             +- Conv/2 - BN -/``, then pool - Gemm
    """
    names = ("stem", "a", "b", "c")
    shapes: dict[str, Any] = {
        "stem_w": (8, 3, 3, 3),
        "a_w": (8, 8, 3, 3),
        "b_w": (8, 1, 3, 3),
        "c_w": (12, 8, 3, 3),
        "short_w": (12, 8, 1, 1),
        "fc_w": (10, 12),
        "fc_b": (10,),
        **bn(*names[:3], channels=8),
        **bn("c", "short", channels=12),
    }
    model = net(
        """
        residual (float[N,3,8,8] x) => (float[N,10] logits) {
          stem = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (x, stem_w)
          stem_n = BatchNormalization (stem, stem_gamma, stem_beta, stem_mean, stem_var)
          stem_r = Relu (stem_n)
          a = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (stem_r, a_w)
          a_n = BatchNormalization (a, a_gamma, a_beta, a_mean, a_var)
          a_r = Relu (a_n)
          b = Conv <kernel_shape=[3,3], pads=[1,1,1,1], group=8> (a_r, b_w)
          b_n = BatchNormalization (b, b_gamma, b_beta, b_mean, b_var)
          sum1 = Add (b_n, stem_r)
          sum1_r = Relu (sum1)
          c = Conv <kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]> (sum1_r, c_w)
          c_n = BatchNormalization (c, c_gamma, c_beta, c_mean, c_var)
          short = Conv <kernel_shape=[1,1], strides=[2,2]> (sum1_r, short_w)
          short_n = BatchNormalization (short, short_gamma, short_beta, short_mean, short_var)
          sum2 = Add (c_n, short_n)
          sum2_r = Relu (sum2)
          pooled = GlobalAveragePool (sum2_r)
          flat = Flatten (pooled)
          logits = Gemm <transB=1> (flat, fc_w, fc_b)
        }
        """,
        seed=seed,
        **shapes,
    )
    return recalibrated(model, {"x": images(256, seed=1000 + seed)})


def dense_net(seed: int = 0) -> onnx.ModelProto:
    """BatchNormalization before Conv, on a Concat and after an Add; ConvTranspose with groups; MatMul with Add."""
    shapes: dict[str, Any] = {
        "stem_w": (6, 3, 3, 3),
        "stem_b": (6,),
        "a_w": (4, 6, 3, 3),
        "b_w": (10, 10, 1, 1),
        "up_w": (10, 3, 2, 2),
        "up_b": (6,),
        "fc_w": (6, 10),
        "fc_b": (10,),
        **bn("n1", channels=6),
        **bn("n2", "n3", channels=10),
        **bn("n4", channels=6),
    }
    model = net(
        """
        dense (float[N,3,8,8] x) => (float[N,10] logits) {
          stem = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (x, stem_w, stem_b)
          n1 = BatchNormalization (stem, n1_gamma, n1_beta, n1_mean, n1_var)
          r1 = Relu (n1)
          a = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (r1, a_w)
          cat = Concat <axis=1> (stem, a)
          n2 = BatchNormalization (cat, n2_gamma, n2_beta, n2_mean, n2_var)
          r2 = Relu (n2)
          b = Conv <kernel_shape=[1,1]> (r2, b_w)
          sum = Add (b, cat)
          n3 = BatchNormalization (sum, n3_gamma, n3_beta, n3_mean, n3_var)
          r3 = Relu (n3)
          up = ConvTranspose <kernel_shape=[2,2], strides=[2,2], group=2> (r3, up_w, up_b)
          n4 = BatchNormalization (up, n4_gamma, n4_beta, n4_mean, n4_var)
          r4 = Relu (n4)
          pooled = GlobalAveragePool (r4)
          flat = Flatten (pooled)
          product = MatMul (flat, fc_w)
          logits = Add (product, fc_b)
        }
        """,
        seed=seed,
        **shapes,
    )
    return recalibrated(model, {"x": images(256, seed=2000 + seed)})


def detector() -> onnx.ModelProto:
    """One place for every 8 x 8 pixels: box around its middle, objectness, three classes, as [N, 64, 8]."""
    rows, columns = np.mgrid[:8, :8]
    middles = np.stack([columns.ravel(), rows.ravel()], axis=1) * 8 + 4
    return net(
        """
        detector (float[N,3,64,64] image) => (float[N,64,8] boxes) {
          a = Conv <strides=[4,4]> (image, w1, b1)  b = Relu (a)
          c = Conv <pads=[1,1,1,1]> (b, w2, b2)  d = Relu (c)
          e = Conv <strides=[2,2]> (d, w3, b3)
          f = Reshape (e, shape)  g = Transpose <perm=[0,2,1]> (f)
          xy, wh, s = Split <axis=2> (g, parts)
          shift = Mul (xy, four)  middle = Add (shift, middles)
          u = Sigmoid (wh)  sides = Mul (u, size)
          p = Mul (s, steep)  q = Sigmoid (p)
          boxes = Concat <axis=2> (middle, sides, q)
        }
        """,
        **{"w1": (16, 3, 4, 4), "w2": (24, 16, 3, 3), "w3": (8, 24, 2, 2), "b1": (16,), "b2": (24,)},
        b3=np.array([0, 0, 0, 0, 0.2, 0, 0, 0], np.float32),
        shape=np.array([0, 8, 64]),
        parts=np.array([2, 2, 4]),
        middles=middles.astype(np.float32),
        four=np.float32(4),
        size=np.float32(24),
        steep=np.float32(4),
    )


def random_net(seed: int, steps: int = 12, side: int = 5) -> onnx.ModelProto:
    """A random graph from x [1,4,side,side] to y [1,3,side,side] of channel-wise operators, with types."""
    draw = np.random.default_rng(seed)
    lines: list[str] = []
    weights: dict[str, Any] = {}
    made: list[tuple[str, int]] = []

    def weight(*shape: int) -> str:
        name = f"w{len(weights)}"
        weights[name] = tuple(shape)
        return name

    def integers(*values: int) -> str:
        name = f"i{len(weights)}"
        weights[name] = np.array(values, np.int64)
        return name

    def emit(call: str, *channels: int) -> str:
        names = [f"t{len(lines)}_{number}" for number in range(len(channels))]
        lines.append(f"{', '.join(names)} = {call}")
        made.extend(zip(names, channels, strict=True))
        return names[0]

    def conv(source: str, inputs: int, outputs: int, kernel: int, groups: int = 1) -> str:
        bias = f", {weight(outputs)}" if draw.integers(2) else ""
        pads = ",".join([str(kernel // 2 * int(kernel > 1))] * 4)
        shape = weight(outputs, inputs // groups, kernel, kernel)
        return emit(f"Conv <group={groups}, pads=[{pads}]> ({source}, {shape}{bias})", outputs)

    conv("x", 4, 6, 3)
    conv("x", 4, 6, 1)
    for _ in range(steps):
        a, channels = made[draw.integers(len(made))]
        alike = [name for name, count in made if count == channels]
        b = alike[draw.integers(len(alike))]
        kind = draw.integers(16)
        if kind <= 1:
            conv(a, channels, int(draw.choice([3, 4, 6, 8])), int(draw.choice([1, 3])))
        elif kind == 2:
            conv(a, channels, channels * int(draw.choice([1, 2])), 3, groups=channels)
        elif kind == 3 and channels % 2 == 0:
            conv(a, channels, 6, 3, groups=2)
        elif kind == 4:
            shape = weight(channels, 5, 3, 3)
            emit(f"ConvTranspose <pads=[1,1,1,1]> ({a}, {shape})", 5)
        elif kind <= 6:
            emit(f"{draw.choice(['Relu', 'Sigmoid', 'Tanh', 'Softplus'])} ({a})", channels)
        elif kind <= 8:
            emit(f"{draw.choice(['Add', 'Mul', 'Sub', 'Max'])} ({a}, {b})", channels)
        elif kind == 9:
            other, more = made[draw.integers(len(made))]
            emit(f"Concat <axis=1> ({a}, {other})", channels + more)
        elif kind == 10 and channels > 2:
            first = int(draw.integers(1, channels))
            emit(f"Split <axis=1> ({a}, {integers(first, channels - first)})", first, channels - first)
        elif kind == 11 and channels > 3:
            start, stop = 1, channels - int(draw.integers(0, 2))
            emit(f"Slice ({a}, {integers(start)}, {integers(stop)}, {integers(1)})", stop - start)
        elif kind == 12:
            before, after = (int(value) for value in draw.integers(0, 3, 2))
            emit(f"Pad ({a}, {integers(0, before, 0, 0, 0, after, 0, 0)})", before + channels + after)
        elif kind == 13:
            gate = f"g{len(lines)}"
            lines.append(f"{gate}p = GlobalAveragePool ({a})")
            lines.append(f"{gate}c = Conv ({gate}p, {weight(channels, channels, 1, 1)})")
            lines.append(f"{gate} = HardSigmoid ({gate}c)")
            emit(f"Mul ({a}, {gate})", channels)
        elif kind == 14:
            parameters = ", ".join(f"n{len(weights)}_{part}" for part in ("gamma", "beta", "mean", "var"))
            weights.update(bn(f"n{len(weights)}", channels=channels))
            emit(f"BatchNormalization ({a}, {parameters})", channels)
        elif kind == 15:
            flat, last = f"f{len(lines)}", f"l{len(lines)}"
            lines.append(f"{flat} = Reshape ({a}, {integers(1, channels, side * side)})")
            lines.append(f"{last} = Transpose <perm=[0,2,1]> ({flat})")
            lines.append(f"{last}m = MatMul ({last}, {weight(channels, 6)})")
            lines.append(f"{last}t = Transpose <perm=[0,2,1]> ({last}m)")
            emit(f"Reshape ({last}t, {integers(0, 6, side, side)})", 6)
    read = {name for line in lines for name in line.partition("(")[2].rstrip(")").split(", ")}
    ends = [conv(name, channels, 3, 1) for name, channels in list(made) if name not in read]
    lines.append(f"y = Sum ({', '.join(ends)})")
    text = f"g (float[1,4,{side},{side}] x) => (float[1,3,{side},{side}] y) {{ {' '.join(lines)} }}"
    model = net(text, seed=seed, **weights)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def images(count: int, *, seed: int, shape: tuple[int, ...] = (3, 8, 8)) -> np.ndarray:
    """Smooth-ish normal inputs: neighbouring pixels are alike, channels differ in mean."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(count, *shape))
    noise = noise + np.roll(noise, 1, -1) + np.roll(noise, 1, -2)
    return (noise + np.linspace(-0.5, 0.5, shape[0]).reshape(-1, *[1] * (len(shape) - 1))).astype(np.float32)


def digits(name: str) -> onnx.ModelProto:
    """One of the trained nets in models/."""
    return onnx.load(MODELS / f"digits_{name}.onnx")


def digit_images(split: str = "calibration") -> tuple[np.ndarray, np.ndarray]:
    """Preprocessed images for the digits nets, and labels."""
    with np.load(MODELS / "data" / f"digits_{split}.npz") as file:
        pixels, labels = file["images"], file["labels"]
    return ((pixels.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2), labels


# One layer of every kind. name: (graph, weights, input shape, channels, channel axis)
LAYERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int, int]] = {
    "conv": (
        "g (float[N,3,6,6] x) => (float[N,5,6,6] y) { y = Conv <pads=[1,1,1,1]> (x, w, b) }",
        {"w": (5, 3, 3, 3), "b": (5,)},
        (2, 3, 6, 6),
        5,
        1,
    ),
    "conv-1d": (
        "g (float[N,3,9] x) => (float[N,5,4] y) { y = Conv <strides=[2]> (x, w) }",
        {"w": (5, 3, 3)},
        (2, 3, 9),
        5,
        1,
    ),
    "conv-3d": (
        "g (float[N,2,4,4,4] x) => (float[N,3,3,3,3] y) { y = Conv (x, w) }",
        {"w": (3, 2, 2, 2, 2)},
        (2, 2, 4, 4, 4),
        3,
        1,
    ),
    "conv-grouped": (
        "g (float[N,4,5,5] x) => (float[N,6,3,3] y) { y = Conv <group=2, dilations=[2,2], pads=[1,1,1,1]> (x, w) }",
        {"w": (6, 2, 3, 3)},
        (2, 4, 5, 5),
        6,
        1,
    ),
    "conv-depthwise": (
        "g (float[N,4,5,5] x) => (float[N,8,3,3] y) { y = Conv <group=4> (x, w, b) }",
        {"w": (8, 1, 3, 3), "b": (8,)},
        (2, 4, 5, 5),
        8,
        1,
    ),
    "transposed": (
        "g (float[N,3,4,4] x) => (float[N,5,8,8] y) { y = ConvTranspose <strides=[2,2]> (x, w, b) }",
        {"w": (3, 5, 2, 2), "b": (5,)},
        (2, 3, 4, 4),
        5,
        1,
    ),
    "transposed-grouped": (
        "g (float[N,6,4,4] x) => (float[N,4,6,6] y) { y = ConvTranspose <group=2> (x, w) }",
        {"w": (6, 2, 3, 3)},
        (2, 6, 4, 4),
        4,
        1,
    ),
    "gemm": (
        "g (float[N,4] x) => (float[N,3] y) { y = Gemm (x, w, b) }",
        {"w": (4, 3), "b": (3,)},
        (5, 4),
        3,
        1,
    ),
    "gemm-square": (
        "g (float[N,4] x) => (float[N,4] y) { y = Gemm (x, w, b) }",
        {"w": (4, 4), "b": (1, 4)},
        (5, 4),
        4,
        1,
    ),
    "gemm-transB": (
        "g (float[N,4] x) => (float[N,4] y) { y = Gemm <transB=1, alpha=0.5, beta=2.0> (x, w, b) }",
        {"w": (4, 4), "b": (4,)},
        (5, 4),
        4,
        1,
    ),
    "gemm-transA": (
        "g (float[4,N] x) => (float[N,3] y) { y = Gemm <transA=1, transB=1> (x, w) }",
        {"w": (3, 4)},
        (4, 5),
        3,
        1,
    ),
    "matmul-right": (
        "g (float[N,6,4] x) => (float[N,6,4] y) { y = MatMul (x, w) }",
        {"w": (4, 4)},
        (2, 6, 4),
        4,
        -1,
    ),
    "matmul-right-add": (
        "g (float[N,6,4] x) => (float[N,6,3] y) { p = MatMul (x, w)  y = Add (b, p) }",
        {"w": (4, 3), "b": (3,)},
        (2, 6, 4),
        3,
        -1,
    ),
    "matmul-left": (
        "g (float[N,4,6] x) => (float[N,4,6] y) { y = MatMul (w, x) }",
        {"w": (4, 4)},
        (2, 4, 6),
        4,
        -2,
    ),
    "matmul-left-add": (
        "g (float[N,4,6] x) => (float[N,3,6] y) { p = MatMul (w, x)  y = Add (p, b) }",
        {"w": (3, 4), "b": (3, 1)},
        (2, 4, 6),
        3,
        -2,
    ),
}


def layer(name: str) -> tuple[onnx.ModelProto, np.ndarray, LayerPoint]:
    """One of ``LAYERS``, an input for it, and its correction point."""
    text, weights, shape, _, _ = LAYERS[name]
    model = net(text, seed=3, **weights)
    (point,) = survey(index(model)).layers
    return model, np.random.default_rng(4).normal(size=shape).astype(np.float32), point


def kl(dense: np.ndarray, other: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence, dense || other, of the softmax of [samples, classes] scores."""
    logs = []
    for scores in (dense.astype(np.float64), other.astype(np.float64)):
        top = scores - scores.max(axis=1, keepdims=True)
        logs.append(top - np.log(np.exp(top).sum(axis=1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).mean())
