"""Channel pruning of ResNet-18 by hand in PyTorch, to compare `tools.bench.pruning channels --net resnet18` with.

    python -m tools.bench.channels_by_torch [--goals 0.2 0.3 0.5 flops:0.5] [--importance magnitude group bn]

The weights of the ONNX file go into torchvision's resnet18, whose outputs have to agree with onnxruntime's; then
Torch-Pruning's dependency graph removes a fraction of the channels of every layer but the classifier, or the smallest
fraction that meets a budget of FLOPs, and BatchNormalization is re-estimated as a cumulative average over the images
that `tools.bench.pruning` repairs from. There is no fine-tuning. "no repair" is before the re-estimation. Needs
torch, torchvision and torch-pruning, which nothing else of this project does.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
import torch_pruning
from numpy.typing import NDArray
from onnx import numpy_helper
from torch.nn.functional import log_softmax
from torchvision.models import resnet18

from onnx_asr.data import open_data
from onnx_asr.graph.index import GraphIndex
from onnx_asr.networks.samples import input_specs
from tools.arguments import add_assets, add_threads, script_parser
from tools.bench.nets import NETS, imagenet

BATCH = 50
MAX_DIFFERENCE = 1e-4
IMPORTANCES = {
    "magnitude": lambda: torch_pruning.importance.MagnitudeImportance(p=2),
    "group": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),
    "bn": torch_pruning.importance.BNScaleImportance,
    "fpgm": lambda: torch_pruning.importance.FPGMImportance(p=2),
}


def from_onnx(model: onnx.ModelProto) -> torch.nn.Module:
    """Load the weights into torchvision's resnet18, which uses the same names."""
    weights = {item.name: torch.tensor(numpy_helper.to_array(item)) for item in model.graph.initializer}
    network = resnet18()
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise SystemExit(f"not resnet18 of torchvision: missing {missing}, unexpected {unexpected}")
    return network.eval()


@torch.no_grad()
def outputs(network: torch.nn.Module, images: NDArray[np.float32]) -> torch.Tensor:
    network.eval()
    return torch.cat([network(torch.tensor(part)) for part in np.split(images, range(BATCH, len(images), BATCH))])


def check_agreement(model: onnx.ModelProto, network: torch.nn.Module, images: NDArray[np.float32]) -> None:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {session.get_inputs()[0].name: images})[0]
    difference = np.abs(outputs(network, images).numpy() - expected).max() / np.abs(expected).max()
    print(f"torch and onnxruntime: largest difference {difference:.1e} of the largest logit")
    if difference > MAX_DIFFERENCE:
        raise SystemExit("the two do not compute the same: nothing to compare")


def pruned(model: onnx.ModelProto, share: float, importance: str) -> torch.nn.Module:
    """Remove a fraction of the channels of every layer."""
    network = from_onnx(model)
    example = torch.zeros(1, 3, 224, 224)
    pruner = torch_pruning.pruner.BasePruner(
        network,
        example,
        importance=IMPORTANCES[importance](),
        pruning_ratio=share,
        ignored_layers=[network.fc],
    )
    pruner.step()
    return network


def macs(network: torch.nn.Module) -> float:
    return float(torch_pruning.utils.count_ops_and_params(network, torch.zeros(1, 3, 224, 224))[0])


def share_for(model: onnx.ModelProto, goal: str, importance: str) -> float:
    """The fraction that a goal asks for; for a budget of FLOPs, to one hundredth."""
    _, colon, limit = goal.partition(":")
    if not colon:
        return float(goal)
    whole = macs(from_onnx(model))
    shares = (percent / 100 for percent in range(1, 100))
    return next(share for share in shares if macs(pruned(model, share, importance)) <= float(limit) * whole)


@torch.no_grad()
def reestimate(network: torch.nn.Module, images: NDArray[np.float32]) -> None:
    """Re-estimate BatchNormalization's statistics as the average over all batches."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    network.train()
    for part in np.split(images, range(BATCH, len(images), BATCH)):
        network(torch.tensor(part))


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--goals", nargs="+", default=["0.2", "0.3", "0.5", "flops:0.5"])
    parser.add_argument("--importance", nargs="+", default=["magnitude", "group"], choices=IMPORTANCES)
    add_threads(parser, 2)
    add_assets(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    net, pixels = NETS["resnet18"], imagenet(arguments.assets)
    model = onnx.load(arguments.assets / net.graphs["bn"])

    def prepared(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        data = open_data({"images": images}, input_specs(GraphIndex.of(model)), preprocessing=net.preprocessing)
        return data.batch(np.arange(len(images)))["input"]

    calibration, scored, labels = prepared(pixels.calibration), prepared(pixels.scored), pixels.labels
    dense = from_onnx(model)
    check_agreement(model, dense, scored[:BATCH])
    reference = log_softmax(outputs(dense, scored), 1)

    def score(network: torch.nn.Module) -> str:
        got = log_softmax(outputs(network, scored), 1)
        kl = (reference.exp() * (reference - got)).sum(1).mean()
        return f"{100 * float(np.mean(got.argmax(1).numpy() == labels)):.1f} | {float(kl):.3f}"

    print(f"dense: {score(dense).split(' |')[0]}; {len(calibration)} calibration images, {len(scored)} scored\n")
    print("| removed | importance | parameters | FLOPs | no repair | KL | BN re-estimated | KL |\n" + "|---" * 8 + "|")
    whole = macs(dense), sum(item.numel() for item in dense.parameters())
    for goal in arguments.goals:
        for importance in arguments.importance:
            share = share_for(model, goal, importance)
            network = pruned(model, share, importance)
            flops = macs(network) / whole[0]
            parameters = sum(item.numel() for item in network.parameters()) / whole[1]
            before = score(network)
            reestimate(network, calibration)
            row = f"{100 * share:g}% | {importance} | {100 * parameters:.0f}% | {100 * flops:.0f}% | {before}"
            print(f"| {row} | {score(network)} |", flush=True)


if __name__ == "__main__":
    main()
