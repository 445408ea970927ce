"""The paper's four architectures for 32x32 images, trained with torch and written as ONNX with BatchNormalization kept.

Only `train` of tools/paper/reproduce.py imports this, and only this needs torch (tools/paper/requirements.txt).

    resnet18, resnet50   torchvision's, stem conv 3x3 / 1 without the pooling behind it
    densenet121          the same stem, with its BatchNormalization; growth 32, transitions halve
    vgg16                thirteen convolutions with BatchNormalization and five poolings, one linear layer

`width` scales every number of channels; 1 is the full size. Crops, flips and normalization run where the training does,
on one uint8 tensor that holds all images. Mixed precision is bfloat16, which needs no loss scaling.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
SIZE, CROP_MARGIN = 32, 4
LEARNING_RATE, REFERENCE_BATCH = 0.1, 128
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.9, 5e-4, 0.1
SCORE_BATCH = 500
RESNET_WIDTHS = (64, 128, 256, 512)
DENSENET_BLOCKS, DENSENET_GROWTH = (6, 12, 24, 16), 32
VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
CHANNEL_MULTIPLE = 4


@dataclass(frozen=True)
class Recipe:
    """Size of a net and settings of its training."""

    width: float
    epochs: int
    batch: int
    seed: int
    device: str
    bf16: bool
    float16: bool


@dataclass(frozen=True)
class Normalization:
    """`(pixel / 255 - mean) / std`, one value per colour."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [N,H,W,C] -> float32 [N,C,H,W], channels last in memory."""
        mean, std = (torch.tensor(value, device=pixels.device) for value in (self.mean, self.std))
        return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def scaled(channels: int, width: float) -> int:
    """Scale a number of channels, to a multiple of four (so that 2:4 applies everywhere)."""
    return max(CHANNEL_MULTIPLE, round(channels * width / CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE)


def conv_bn(width_in: int, width_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Conv (same padding, no bias) -> BatchNorm."""
    conv = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(width_out)]


def conv_bn_relu(width_in: int, width_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Conv -> BatchNorm -> ReLU."""
    return [*conv_bn(width_in, width_out, kernel, stride), nn.ReLU()]


def bn_relu_conv(width_in: int, width_out: int, kernel: int) -> list[nn.Module]:
    """BatchNorm -> ReLU -> Conv."""
    conv = nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, bias=False)
    return [nn.BatchNorm2d(width_in), nn.ReLU(), conv]


def head(width: int) -> list[nn.Module]:
    """Global average pool -> Linear."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


class Residual(nn.Module):
    """A residual block around `body`: identity shortcut, or a 1x1 convolution where the shape changes."""

    def __init__(self, width_in: int, width_out: int, stride: int, body: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        same = stride == 1 and width_in == width_out
        self.shortcut = nn.Sequential(*([] if same else conv_bn(width_in, width_out, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        """[N,in,H,W] -> [N,out,H/stride,W/stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


def basic(width_in: int, width: int, stride: int) -> tuple[nn.Module, int]:
    """3x3 -> 3x3; also return the number of output channels."""
    body = [*conv_bn_relu(width_in, width, 3, stride), *conv_bn(width, width, 3)]
    return Residual(width_in, width, stride, body), width


def bottleneck(width_in: int, width: int, stride: int) -> tuple[nn.Module, int]:
    """1x1 -> 3x3 (strided) -> 1x1 to four times the width; also return the number of output channels."""
    body = [
        *conv_bn_relu(width_in, width, 1),
        *conv_bn_relu(width, width, 3, stride),
        *conv_bn(width, 4 * width, 1),
    ]
    return Residual(width_in, 4 * width, stride, body), 4 * width


Block = Callable[[int, int, int], tuple[nn.Module, int]]


def resnet(width: float, block: Block, depths: tuple[int, ...]) -> nn.Module:
    """Stem, four stages (the later three halve the resolution), head."""
    channels = scaled(RESNET_WIDTHS[0], width)
    layers = conv_bn_relu(3, channels, 3)
    for stage, depth in enumerate(depths):
        for position in range(depth):
            stride = 2 if stage > 0 and position == 0 else 1
            layer, channels = block(channels, scaled(RESNET_WIDTHS[stage], width), stride)
            layers.append(layer)
    return nn.Sequential(*layers, *head(channels))


class DenseLayer(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3; the result is appended to the input's channels."""

    def __init__(self, width_in: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*bn_relu_conv(width_in, 4 * growth, 1), *bn_relu_conv(4 * growth, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,C+growth,H,W]."""
        return torch.cat([x, self.body(x)], dim=1)


def densenet121(width: float) -> nn.Module:
    """Stem, four dense blocks with halving transitions between them, head."""
    growth = scaled(DENSENET_GROWTH, width)
    channels = 2 * growth
    layers = conv_bn_relu(3, channels, 3)
    for block, depth in enumerate(DENSENET_BLOCKS):
        if block:
            layers += [*bn_relu_conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            layers.append(DenseLayer(channels, growth))
            channels += growth
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), *head(channels))


def vgg16(width: float) -> nn.Module:
    """Five groups of 3x3 convolutions, each followed by pooling, and one linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for wanted, depth in VGG16:
        for _ in range(depth):
            layers += conv_bn_relu(channels, scaled(wanted, width), 3)
            channels = scaled(wanted, width)
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *head(channels))


NETS: dict[str, Callable[[float], nn.Module]] = {
    "resnet18": lambda width: resnet(width, basic, (2, 2, 2, 2)),
    "resnet50": lambda width: resnet(width, bottleneck, (3, 4, 6, 3)),
    "densenet121": densenet121,
    "vgg16": vgg16,
}


def prepare(device: str, threads: int) -> None:
    """Check that the device exists and set the number of threads per operator (0: torch's default).

    Raises:
        SystemExit: When it is not.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch sees no GPU for --device {device}: give --device cpu, and a width such as --width 0.25"
        )
    if threads:
        torch.set_num_threads(threads)


def build(name: str, recipe: Recipe) -> nn.Module:
    """A net with fresh weights: He's initialization for the convolutions."""
    torch.manual_seed(recipe.seed)
    net = NETS[name](recipe.width)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net.to(recipe.device)


def batches(images: Tensor, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of row numbers and pixels, cropped at random and flipped half of the time.

    `images` are uint8 [N, 32 + 8, 32 + 8, 3], padded with black; what comes back is uint8 [batch, 32, 32, 3]. Rows and
    corners are drawn on the images' device, so that no step waits for a copy.
    """
    device = images.device
    order = torch.randperm(len(images), generator=generator, device=device)
    for rows in order[: len(order) // batch * batch].split(batch):
        corner = torch.randint(2 * CROP_MARGIN + 1, (2, batch, 1), generator=generator, device=device)
        flipped = torch.rand(batch, 1, generator=generator, device=device) < 0.5
        y, x = corner + torch.arange(SIZE, device=device)  # [batch, 32] each
        x = torch.where(flipped, x.flip(1), x)
        yield rows, images[rows[:, None, None], y[:, :, None], x[:, None, :]]


def train(
    name: str, images: NDArray[np.uint8], labels: NDArray[np.int64], normalize: Normalization, recipe: Recipe
) -> nn.Module:
    """Train by SGD with a one-cycle schedule; return the net in evaluation mode, on the recipe's device."""
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    generator = torch.Generator(recipe.device).manual_seed(recipe.seed)
    margin = (CROP_MARGIN, CROP_MARGIN)
    padded = torch.from_numpy(np.pad(images, ((0, 0), margin, margin, (0, 0)))).to(recipe.device)
    targets = torch.from_numpy(labels).to(recipe.device)
    net = build(name, recipe).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    rate = LEARNING_RATE * math.sqrt(recipe.batch / REFERENCE_BATCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    steps = recipe.epochs * (len(images) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    started = time.perf_counter()
    for epoch in range(recipe.epochs):
        total = torch.zeros((), device=recipe.device)
        for rows, pixels in batches(padded, recipe.batch, generator):
            with torch.autocast(torch.device(recipe.device).type, torch.bfloat16, enabled=recipe.bf16):
                loss = F.cross_entropy(net(normalize(pixels)), targets[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.detach()
        mean = total.item() / (len(images) // recipe.batch)
        seconds = time.perf_counter() - started
        print(f"{name}: epoch {epoch + 1} of {recipe.epochs}, loss {mean:.3f}, {seconds:.0f} s", flush=True)
    if recipe.float16:
        round_weights(net)
    return net.eval()


def round_weights(net: nn.Module) -> None:
    """Round all weights to the nearest float16. They stay float32, but compress to half the size."""
    with torch.no_grad():
        for value in net.parameters():
            if value.dim() > 1:
                value.copy_(value.half())


def top1(net: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64], normalize: Normalization) -> float:
    """Fraction of images that the net, in evaluation mode, classifies correctly."""
    device = next(net.parameters()).device
    right = 0
    with torch.no_grad():
        for start in range(0, len(images), SCORE_BATCH):
            part: Any = slice(start, start + SCORE_BATCH)
            scores = net(normalize(torch.from_numpy(images[part]).to(device)))
            right += int((scores.argmax(dim=1).cpu().numpy() == labels[part]).sum())
    return right / len(images)
