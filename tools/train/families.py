"""The families of small nets in `models/`, in torch.

What the families have that matters to channel repair:

    resnet     conv-BN-ReLU x -> conv-BN -> (+ identity or conv-BN shortcut) -> ReLU
    vgg        conv-BN-ReLU chains with max pooling
    mobilenet  1x1 expand -> depthwise -> 1x1 project without activation, ReLU6, identity where shapes allow
    densenet   BN-ReLU-conv: the BatchNormalization reads a concatenation, no convolution directly precedes it
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(
    width_in: int, width_out: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    """Conv (same padding, no bias) -> BatchNorm [-> activation]."""
    conv = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width_out), *([] if act is None else [act]))


def head(width: int) -> nn.Sequential:
    """Global average pool -> Linear."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class BasicBlock(nn.Module):
    """ResNet block: two 3x3 convolutions around an identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, width_in: int, width_out: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(width_in, width_out, stride=stride, act=nn.ReLU()), conv_bn(width_out, width_out)
        )
        same = stride == 1 and width_in == width_out
        self.shortcut = nn.Identity() if same else conv_bn(width_in, width_out, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[N,in,H,W] -> [N,out,H/stride,W/stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """MobileNetV2 block: expand, filter depthwise, project without activation."""

    def __init__(self, width_in: int, width_out: int, stride: int = 1, expand: int = 6) -> None:
        super().__init__()
        hidden = width_in * expand
        self.body = nn.Sequential(
            conv_bn(width_in, hidden, kernel=1, act=nn.ReLU6()),
            conv_bn(hidden, hidden, stride=stride, groups=hidden, act=nn.ReLU6()),
            conv_bn(hidden, width_out, kernel=1),
        )
        self.identity = stride == 1 and width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        """[N,in,H,W] -> [N,out,H/stride,W/stride]."""
        y: Tensor = self.body(x)
        return x + y if self.identity else y


class DenseLayer(nn.Module):
    """DenseNet layer: BN-ReLU-1x1, BN-ReLU-3x3, result appended to the input's channels."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,C+growth,H,W]."""
        return torch.cat([x, self.body(x)], dim=1)


def resnet() -> nn.Module:
    """Residual net: two stages, four blocks, one of them with a convolution as its shortcut."""
    blocks = [BasicBlock(32, 32), BasicBlock(32, 32), BasicBlock(32, 64, stride=2), BasicBlock(64, 64)]
    return nn.Sequential(conv_bn(1, 32, act=nn.ReLU()), *blocks, head(64))


def vgg() -> nn.Module:
    """Plain net: three pairs of 3x3 convolutions, max pooling between."""
    layers: list[nn.Module] = []
    width_in = 1
    for i, width in enumerate((32, 32, 64, 64, 96, 96)):
        if i in (2, 4):
            layers.append(nn.MaxPool2d(2))
        layers.append(conv_bn(width_in, width, act=nn.ReLU()))
        width_in = width
    return nn.Sequential(*layers, head(width_in))


def mobilenet() -> nn.Module:
    """MobileNetV2-like net: six inverted residuals, three of them with an identity."""
    widths = ((24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 48, 2), (48, 48, 1))
    blocks = [InvertedResidual(24, 24, expand=2)] + [InvertedResidual(*w) for w in widths]
    return nn.Sequential(conv_bn(1, 24, act=nn.ReLU6()), *blocks, conv_bn(48, 160, kernel=1, act=nn.ReLU6()), head(160))


def densenet() -> nn.Module:
    """DenseNet-like net: two dense stages of five layers with a halving transition between."""
    growth, depth, width = 16, 5, 32
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1, bias=False)]
    for stage in range(2):
        for _ in range(depth):
            layers.append(DenseLayer(width, growth))
            width += growth
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        if stage == 0:
            layers += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*layers, head(width))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet": resnet,
    "vgg": vgg,
    "mobilenet": mobilenet,
    "densenet": densenet,
}
