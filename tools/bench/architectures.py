"""torchvision's ResNet-18 and ResNet-50 as ONNX graphs with random weights, built without torch, for benchmarks.

    stem:   conv 7x7 / 2 - BN - ReLU - max pool 3x3 / 2          (32x32 variant: conv 3x3 / 1 - BN - ReLU)
    stages: 4, of 64, 128, 256, 512 channels, the last three starting with stride 2
    block:  ResNet-18  3x3 - BN - ReLU - 3x3 - BN                      x 2, 2, 2, 2
            ResNet-50  1x1 - BN - ReLU - 3x3 - BN - ReLU - 1x1 - BN    x 3, 4, 6, 3, four times wider at its end
            then + shortcut (identity, or 1x1 conv - BN where the shape changes) - ReLU
    head:   global average pool - fully connected

Weights are He-normal from a seed. The BatchNormalization statistics are those to be expected for inputs of zero mean
and unit variance, so that activations neither grow nor vanish with depth.

    python -m tools.bench.architectures resnet50 resnet50.onnx
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tools.arguments import script_parser

Architecture = Literal["resnet18", "resnet50"]
BLOCKS: dict[Architecture, tuple[int, ...]] = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
OPSET = 17


class _Builder:
    """Nodes and initializers so far; every layer takes and returns (tensor, channels, mean square of its values)."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def node(self, op_type: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        output = f"/{name}/{op_type}_output_0"
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=f"/{name}/{op_type}", **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.initializers.append(numpy_helper.from_array(value.astype(np.float32), name))
        return name

    def conv_bn(
        self, name: str, source: tuple[str, int, float], channels: int, kernel: int, stride: int = 1
    ) -> tuple[str, int, float]:
        tensor, fan_in, square = source
        scale = np.sqrt(2 / (fan_in * kernel * kernel))
        weight = self.random.normal(0, scale, (channels, fan_in, kernel, kernel))
        convolved = self.node(
            "Conv",
            f"{name}/conv",
            [tensor, self.constant(f"{name}.weight", weight)],
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[kernel // 2] * 4,
            dilations=[1, 1],
            group=1,
        )
        spread = np.sqrt(2 * square)  # Var(w) fan_in E[x^2]
        parameters = {
            "scale": self.random.uniform(0.5, 1.5, channels),
            "bias": self.random.normal(0, 0.1, channels),
            "mean": self.random.normal(0, 0.1 * spread, channels),
            "var": spread**2 * self.random.uniform(0.8, 1.25, channels),
        }
        inputs = [convolved, *(self.constant(f"{name}.bn.{key}", value) for key, value in parameters.items())]
        return self.node("BatchNormalization", f"{name}/bn", inputs, epsilon=1e-5, momentum=0.9), channels, 1.1

    def relu(self, name: str, source: tuple[str, int, float]) -> tuple[str, int, float]:
        tensor, channels, square = source
        return self.node("Relu", f"{name}/relu", [tensor]), channels, square / 2

    def block(
        self, name: str, source: tuple[str, int, float], width: int, stride: int, bottleneck: bool
    ) -> tuple[str, int, float]:
        channels = 4 * width if bottleneck else width
        if bottleneck:
            inner = self.relu(f"{name}/1", self.conv_bn(f"{name}.conv1", source, width, 1))
            inner = self.relu(f"{name}/2", self.conv_bn(f"{name}.conv2", inner, width, 3, stride))
            last = self.conv_bn(f"{name}.conv3", inner, channels, 1)
        else:
            inner = self.relu(f"{name}/1", self.conv_bn(f"{name}.conv1", source, width, 3, stride))
            last = self.conv_bn(f"{name}.conv2", inner, channels, 3)
        shortcut = source
        if stride != 1 or source[1] != channels:
            shortcut = self.conv_bn(f"{name}.downsample", source, channels, 1, stride)
        total = self.node("Add", name, [last[0], shortcut[0]])
        tensor, _, _ = self.relu(name, (total, channels, 0.0))
        return tensor, channels, last[2] / 2 + shortcut[2]


def build(
    architecture: Architecture, size: Literal[32, 224] = 224, classes: int | None = None, seed: int = 0
) -> onnx.ModelProto:
    """One of the nets, with input "input" [N, 3, size, size] and output "logits" [N, classes] (10 at 32, else 1000)."""
    bottleneck = architecture == "resnet50"
    classes = classes or (10 if size == 32 else 1000)
    net = _Builder(seed)
    image = ("input", 3, 1.0)
    if size == 32:
        current = net.relu("stem", net.conv_bn("stem", image, 64, 3))
    else:
        tensor, channels, square = net.relu("stem", net.conv_bn("stem", image, 64, 7, 2))
        pooled = net.node("MaxPool", "stem", [tensor], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        current = (pooled, channels, square)
    for stage, count in enumerate(BLOCKS[architecture]):
        for number in range(count):
            stride = 2 if stage and not number else 1
            current = net.block(f"layer{stage + 1}.{number}", current, 64 << stage, stride, bottleneck)
    tensor, channels, _ = current
    flat = net.node("Flatten", "head", [net.node("GlobalAveragePool", "head", [tensor])], axis=1)
    weight = net.random.normal(0, 1 / np.sqrt(channels), (classes, channels))
    parameters = [net.constant("fc.weight", weight), net.constant("fc.bias", np.zeros(classes))]
    net.nodes.append(helper.make_node("Gemm", [flat, *parameters], ["logits"], name="/fc/Gemm", transB=1))
    graph = helper.make_graph(
        net.nodes,
        f"{architecture}_{size}",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
        net.initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="onnx-resuscitate"
    )
    onnx.checker.check_model(model)
    return model


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("architecture", choices=BLOCKS)
    parser.add_argument("output", help="file to write")
    parser.add_argument("--size", type=int, choices=(32, 224), default=224, help="side of the images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    onnx.save(build(arguments.architecture, arguments.size, seed=arguments.seed), arguments.output)


if __name__ == "__main__":
    main()
