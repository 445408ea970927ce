"""Masks of other pruners, alone and with our refit after them, on a net of ../shared/assets (see MANIFEST.md there).

    python -m tools.bench.pruners --sparsities 0.8 0.9 2:4 --images 1024

onnxsim prunes ONNX files: by magnitude over all layers, by Wanda (magnitude times the norm of the input, within every
output channel) and by SparseGPT, which also changes the weights that it keeps. Its calibration samples are the
first of those that the refit gets (--pruner-images). "onnx-resuscitate" is our own global magnitude, whose masks are
those of torch.nn.utils.prune.global_unstructured with L1Unstructured. Scores are top-1 in percent on the other images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnx_asr
from onnx_asr.data import open_data
from onnx_asr.engine.session import Runtime
from onnx_asr.graph.index import GraphIndex
from onnx_asr.networks.cost import leftovers
from onnx_asr.networks.samples import input_specs
from tools.arguments import add_assets, add_threads, script_parser
from tools.bench.accuracy import prune
from tools.bench.nets import NETS, Images, cifar10

BATCH = 64
Pruner = Callable[[onnx.ModelProto], onnx.ModelProto]


@dataclass(frozen=True)
class Record:
    """One pruner at one sparsity: top-1 of its model, and of the model with a refit; bytes, and those of leftovers."""

    net: str
    sparsity: str
    pruner: str
    measured_sparsity: float
    alone: float
    refit: float
    bytes: int
    leftovers: int


def pruners(sparsity: str, feeds: list[dict[str, Any]]) -> dict[str, Pruner]:
    """The pruners of onnxsim, and ours."""
    import onnxsim

    if ":" in sparsity:
        n, m = map(int, sparsity.split(":"))
        goal: dict[str, Any] = {"n": n, "m": m}
        everywhere: dict[str, Any] = goal
    else:
        goal = {"sparsity": float(sparsity)}
        everywhere = {**goal, "global_sparsity": True}
    return {
        "onnx-resuscitate magnitude": partial(prune, sparsity=sparsity),
        "onnxsim magnitude": partial(onnxsim.apply_magnitude_pruning, **everywhere),
        "onnxsim Wanda": partial(onnxsim.apply_wanda_pruning, calibration_data=feeds, **goal),
        "onnxsim SparseGPT": partial(onnxsim.apply_sparsegpt_pruning, calibration_data=feeds, **goal),
    }


def measure(name: str, graph: str, images: Images, arguments: argparse.Namespace) -> Iterator[Record]:
    """Every pruner at every sparsity."""
    net = NETS[name]
    dense = onnx.load(arguments.assets / net.graphs[graph])
    specs = input_specs(GraphIndex.of(dense))
    pixels = images.calibration[: arguments.images]
    prepared = open_data({"images": pixels}, specs, preprocessing=net.preprocessing)
    starts = range(0, arguments.pruner_images, BATCH)
    feeds = [prepared.batch(np.arange(start, min(start + BATCH, arguments.pruner_images))) for start in starts]
    execution = onnx_asr.Execution(Runtime(threads=arguments.threads))
    options = onnx_asr.RepairOptions("refit", samples=len(pixels), verify_samples=0)

    def top1(model: onnx.ModelProto) -> float:
        found = onnx_asr.evaluate(
            model,
            {"images": images.scored},
            labels=images.labels,
            preprocessing=net.preprocessing,
            execution=execution,
        )
        assert found.top1 is not None
        return found.top1

    for sparsity in arguments.sparsities:
        for label, pruner in pruners(sparsity, feeds).items():
            pruned = pruner(dense)
            repaired = onnx_asr.repair(
                pruned,
                {"images": pixels},
                options,
                dense=dense,
                preprocessing=net.preprocessing,
                execution=execution,
            ).model
            found = onnx_asr.inspect(pruned)
            scores = top1(pruned), top1(repaired)
            unread = sum(tensor.ByteSize() for tensor in leftovers(GraphIndex.of(pruned)).values())
            yield Record(name, sparsity, label, found.sparsity, *scores, found.file_bytes, unread)


def table(records: list[Record]) -> str:
    """One row per pruner, two columns per sparsity."""
    sparsities = list(dict.fromkeys(record.sparsity for record in records))
    lines = ["| pruner | " + " | ".join(f"{sparsity}, alone | + refit" for sparsity in sparsities) + " |"]
    lines.append("|---" * (1 + 2 * len(sparsities)) + "|")
    for pruner in dict.fromkeys(record.pruner for record in records):
        row = {record.sparsity: record for record in records if record.pruner == pruner}
        cells = (f"{100 * row[sparsity].alone:.1f} | {100 * row[sparsity].refit:.1f}" for sparsity in sparsities)
        lines.append(f"| {pruner} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = script_parser(__doc__)
    nets = [name for name, net in NETS.items() if net.data == "cifar10"]
    parser.add_argument("--net", choices=nets, default="resnet20")
    parser.add_argument("--graph", choices=["bn", "folded"], default="bn")
    parser.add_argument("--sparsities", nargs="+", default=["0.8", "0.9"])
    parser.add_argument("--images", type=int, default=1024, help="calibration images of the refit")
    parser.add_argument("--pruner-images", type=int, default=512, help="the first of them, which the pruners get")
    parser.add_argument("--json", type=Path, help="write the records to this file too")
    add_assets(parser)
    add_threads(parser)
    arguments = parser.parse_args()
    records = []
    for record in measure(arguments.net, arguments.graph, cifar10(arguments.assets), arguments):
        print(record, flush=True)
        records.append(record)
    print(f"\n{arguments.net}, {arguments.graph}; onnxsim {version('onnxsim')}; {arguments.images} images\n")
    print(table(records))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(record) for record in records], indent=2) + "\n")


if __name__ == "__main__":
    main()
