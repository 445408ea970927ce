"""Channels that Torch-Pruning removed, told by the weights, beside those that its history says it removed.

    pip install torch torchvision torch-pruning onnx onnxruntime pillow
    python -m tools.check.torch_pruning [--nets digits_resnet resnet18 ...] [--ratio 0.3]

The trained digits nets of `models/`, and torchvision's ResNet-18, DenseNet-121 and MobileNetV2 with random weights and
BatchNormalization of random scales, shifts and statistics, are pruned by magnitude, all layers but the last. Dense and
pruned net are exported with BatchNormalization kept ("BN") and folded. Each pair is repaired twice: as exported, and
with a record of the channels written from the history. Both have to give the same parameters, bit for bit. The exit
code is 1 if any channel or parameter differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import torch
import torch_pruning
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from onnx_asr import RepairOptions, evaluate, repair
from onnx_asr.channels.units import KEPT_CHANNELS
from onnx_asr.networks.pair import Pair
from onnx_asr.repairing.options import Method
from tools.arguments import add_threads, script_parser
from tools.paths import MODELS
from tools.train.exporting import exported
from tools.train.families import FAMILIES

DIGITS = "digits_"
FOLDED = {"BN, BN": (False, False), "folded, folded": (True, True), "BN, folded": (False, True)}
"""Whether the dense and the pruned file have BatchNormalization folded."""


@dataclass(frozen=True)
class Subject:
    """A net and what it is repaired with.

    Attributes:
        shape: Of one sample.
        images: To calibrate on.
        labelled: Images and labels to score on, if it was trained.
    """

    build: Callable[[], nn.Module]
    weights: dict[str, torch.Tensor]
    shape: tuple[int, ...]
    images: NDArray[np.float32]
    method: Method
    labelled: dict[str, NDArray[np.uint8]] | None = None

    def net(self) -> nn.Module:
        """The net in evaluation mode."""
        net = self.build()
        net.load_state_dict(self.weights, strict=False)
        return net.eval()

    @property
    def example(self) -> torch.Tensor:
        """An input."""
        return torch.zeros(2, *self.shape)


def digits(name: str) -> Subject:
    """A trained net of `models/`, whose file has the names of its torch module."""
    model = onnx.load(MODELS / f"{name}.onnx")
    weights = {item.name: torch.tensor(numpy_helper.to_array(item)) for item in model.graph.initializer}
    data = {part: dict(np.load(MODELS / "data" / f"digits_{part}.npz")) for part in ("calibration", "validation")}
    images = scaled(data["calibration"]["images"])
    return Subject(FAMILIES[name.removeprefix(DIGITS)], weights, (1, 8, 8), images, "refit", data["validation"])


def random(name: str) -> Subject:
    """A net of torchvision with random weights."""
    from torchvision import models  # type: ignore[import-untyped]

    torch.manual_seed(0)
    net = getattr(models, name)(num_classes=10)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    images = np.random.default_rng(0).normal(size=(16, 3, 64, 64)).astype(np.float32)
    return Subject(lambda: getattr(models, name)(num_classes=10), net.state_dict(), (3, 64, 64), images, "paired")


def layers(net: nn.Module, example: torch.Tensor) -> dict[str, nn.Conv2d | nn.Linear]:
    """Convolutions and linear layers by name, in the order in which they run."""
    found: dict[str, nn.Conv2d | nn.Linear] = {}
    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append(module.register_forward_pre_hook(lambda layer, _, name=name: found.update({name: layer})))
    with torch.no_grad():
        net(example)
    for hook in hooks:
        hook.remove()
    return found


def pruned(subject: Subject, ratio: float) -> tuple[nn.Module, list[NDArray[np.int64]]]:
    """A pruned net, and the channels that are left of every layer, by a replay on a net whose weights number them."""
    net = subject.net()
    *_, last = layers(net, subject.example).values()
    pruner = torch_pruning.pruner.BasePruner(
        net,
        subject.example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[last],
    )
    pruner.step()
    numbered = subject.net()
    for layer in layers(numbered, subject.example).values():
        shape = (-1, *[1] * (layer.weight.dim() - 1))
        layer.weight.data[:] = torch.arange(layer.weight.shape[0], dtype=torch.float32).reshape(shape)
    graph = torch_pruning.DependencyGraph().build_dependency(numbered, subject.example)
    graph.load_pruning_history(pruner.pruning_history())
    left = layers(numbered, subject.example).values()
    return net, [layer.weight.detach().flatten(1)[:, 0].numpy().astype(np.int64) for layer in left]


def record(dense: onnx.ModelProto, left: list[NDArray[np.int64]]) -> dict[str, list[int]]:
    """The channels that are left by the tensors of the dense file."""
    names = [node.output[0] for node in dense.graph.node if node.op_type in ("Conv", "Gemm")]
    return {name: positions.tolist() for name, positions in zip(names, left, strict=True)}


def with_record(model: onnx.ModelProto, kept: dict[str, list[int]]) -> onnx.ModelProto:
    """A copy with a record of the channels that it kept."""
    recorded = onnx.ModelProto()
    recorded.CopyFrom(model)
    recorded.metadata_props.add(key=KEPT_CHANNELS, value=json.dumps(kept))
    return recorded


def parameters(model: onnx.ModelProto) -> list[bytes]:
    """All parameters in the order in which nodes read them."""
    stored = {item.name: numpy_helper.to_array(item).tobytes() for item in model.graph.initializer}
    return [stored[name] for node in model.graph.node for name in node.input if name in stored]


def check(subject: Subject, ratio: float) -> Iterator[tuple[bool, str]]:
    """A row of the table for every way to export a pair, and whether everything agrees."""
    net, left = pruned(subject, ratio)
    dense = subject.net()
    sizes = [layer.weight.shape[0] for layer in layers(dense, subject.example).values()]
    for label, (dense_folded, folded) in FOLDED.items():
        whole = onnx.load_from_string(exported(dense, subject.shape, fold=dense_folded))
        small = onnx.load_from_string(exported(net, subject.shape, fold=folded))
        kept = record(whole, left)
        pair, wrong = Pair.of(small, whole), 0
        for (name, positions), size in zip(kept.items(), sizes, strict=True):
            _, told = pair.kept.get(name, (1, np.arange(size)))
            wrong += len(set(told.tolist()) ^ set(positions))
        options = RepairOptions(method=subject.method)
        results = [repair(item, subject.images, options, dense=whole) for item in (small, with_record(small, kept))]
        same = parameters(results[0].model) == parameters(results[1].model)
        cells = (
            label,
            f"{sum(map(len, left))} of {sum(sizes)}",
            str(wrong),
            "yes" if same else "no",
            *(top1(item, subject.labelled) for item in (small, results[0].model)),
        )
        yield same and not wrong, " | ".join(cells)


def top1(model: onnx.ModelProto, labelled: dict[str, NDArray[np.uint8]] | None) -> str:
    """Accuracy in percent, if there are labels."""
    if labelled is None:
        return "-"
    score = evaluate(model, scaled(labelled["images"]), labels=labelled["labels"]).top1
    assert score is not None
    return f"{100 * score:.1f}"


def scaled(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Digits as their nets read them."""
    return np.asarray(((images.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2), np.float32)


def main() -> None:
    nets = {f"{DIGITS}{family}": digits for family in ("resnet", "densenet", "mobilenet")}
    nets |= dict.fromkeys(("resnet18", "densenet121", "mobilenet_v2"), random)
    parser = script_parser(__doc__)
    parser.add_argument("--nets", nargs="+", default=list(nets), choices=nets)
    parser.add_argument("--ratio", type=float, default=0.3, help="share of the channels to remove; default: 0.3")
    add_threads(parser, 2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, torch-pruning {torch_pruning.__version__}\n")
    print("| net | dense, pruned | channels left | told wrongly | same repair | top-1 pruned | repaired |")
    print("|---" * 7 + "|")
    good = True
    for name in arguments.nets:
        for agrees, row in check(nets[name](name), arguments.ratio):
            print(f"| {name} | {row} |", flush=True)
            good &= agrees
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
