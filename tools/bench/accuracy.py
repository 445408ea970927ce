"""Accuracy of every repair method on the nets and images of ../shared/assets (see MANIFEST.md there).

    python -m tools.bench.accuracy --nets resnet20 --sparsities 0.7 0.8 0.9 --methods bn paired --images 512
    python -m tools.bench.accuracy --methods paired:reliability_power=0.25 asr:bn=ema,prior=mean refit:relu_steps=0
    python -m tools.bench.accuracy --nets resnet20 --sparsities 0.9 2:4 --methods compress:rounds=5 --images 1024

A method is a name of onnx_asr.repairing.options.METHODS or "compress", with options after a colon. Pruning is by
global magnitude over all weights, or N:M. Nets come with BatchNormalization kept ("bn"), folded ("folded"),
or both; a pair is also compared under one mask: that of the bn graph, moved to the folded one by order of
the correction points ("folded, mask of bn"). Calibration takes the first images of the calibration part, unlabelled;
scores are of the other part: top-1 in percent, and the KL divergence dense || repaired in nats.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnx_asr
from onnx_asr.data import open_data
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import OptionError
from onnx_asr.graph.edit import EditPlan, apply
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.points import survey
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import Outputs, accuracy, collect_outputs, compare
from onnx_asr.networks.samples import input_specs
from onnx_asr.repairing.options import METHODS, RepairOptions
from tools.arguments import add_assets, add_threads, script_parser
from tools.bench.methods import method_options, parse_method, recipe_of
from tools.bench.nets import NETS, Images, Net, cifar10, imagenet

MASK_OF_BN = "folded, mask of bn"


@dataclass(frozen=True)
class Record:
    """One measured model."""

    net: str
    graph: str
    sparsity: str
    method: str
    chosen: str
    images: int
    top1: float
    kl: float
    agreement: float
    seconds: float


def with_mask_of(dense: onnx.ModelProto, pruned: onnx.ModelProto) -> onnx.ModelProto:
    """Zero the weights of the other graph where those of a pruned model are zero; points are matched by their order."""
    target, source = GraphIndex.of(dense), GraphIndex.of(pruned)
    plan = EditPlan()
    weights = [survey(index).layers for index in (target, source)]
    for mine, other in zip(*weights, strict=True):
        value = target.value(target.nodes[mine.node].input[mine.layer.weight_slot])
        mask = source.value(source.nodes[other.node].input[other.layer.weight_slot]) != 0
        plan.values[mine.weight] = np.where(mask, value, np.zeros((), value.dtype))
    return apply(target, plan)


def prune(model: onnx.ModelProto, sparsity: str) -> onnx.ModelProto:
    """Prune to a sparsity, or to a pattern such as 2:4."""
    if ":" in sparsity:
        return onnx_asr.prune(model, options=onnx_asr.PruneOptions(pattern=sparsity)).model
    return onnx_asr.prune(model, options=onnx_asr.PruneOptions(float(sparsity))).model


def variants(net: Net, assets: Path, sparsity: str) -> Iterator[tuple[str, onnx.ModelProto, onnx.ModelProto]]:
    """Name, dense and pruned model of every graph of a net."""
    dense = {name: onnx.load(assets / file) for name, file in net.graphs.items()}
    pruned = {name: prune(model, sparsity) for name, model in dense.items()}
    if len(dense) == 2:
        yield "bn", dense["bn"], pruned["bn"]
        yield MASK_OF_BN, dense["folded"], with_mask_of(dense["folded"], pruned["bn"])
        yield "folded", dense["folded"], pruned["folded"]
    else:
        for name, model in dense.items():
            yield name, model, pruned[name]


def repaired(
    method: str, sparsity: str, dense: onnx.ModelProto, pruned: onnx.ModelProto, **arguments: Any
) -> onnx_asr.RepairResult:
    """One repair, or one compression of the dense model."""
    count = len(arguments["data"]["images"])
    name, overrides = parse_method(method)
    if name == "compress":
        goal: dict[str, Any] = {"pattern": sparsity} if ":" in sparsity else {"sparsity": float(sparsity)}
        settings = RepairOptions(samples=count, verify_samples=0, refit=recipe_of(overrides))
        options = onnx_asr.CompressOptions(**goal, **overrides, repair=settings)
        return onnx_asr.compress(dense, options=options, **arguments).repair
    held_out = 256 if name == "auto" else 0  # auto splits off held-out images itself
    return onnx_asr.repair(
        pruned, dense=dense, options=method_options(method, samples=count, verify_samples=held_out), **arguments
    )


def measure(name: str, images: Images, sparsities: Sequence[str], arguments: argparse.Namespace) -> Iterator[Record]:
    """Dense, pruned and repaired models of one net."""
    net = NETS[name]
    calibration = images.calibration[: arguments.images]
    runtime = Runtime(threads=arguments.threads)

    def outputs(model: onnx.ModelProto) -> Outputs:
        specs = input_specs(GraphIndex.of(model))
        data = open_data({"images": images.scored}, specs, preprocessing=net.preprocessing)
        return collect_outputs(model, data, np.arange(len(images.scored)), runtime)

    def record(
        graph: str, sparsity: str, method: str, got: Outputs, dense: Outputs, seconds: float = 0.0, chosen: str = ""
    ) -> Record:
        fidelity = compare(dense, got)
        top1, _ = accuracy(got, images.labels, net.label_offset)
        kl, agreement = fidelity.kl, fidelity.agreement
        assert kl is not None
        assert agreement is not None
        return Record(name, graph, sparsity, method, chosen, len(calibration), top1, kl, agreement, seconds)

    reference: dict[str, Outputs] = {}
    for sparsity in sparsities:
        for graph, dense, pruned in variants(net, arguments.assets, sparsity):
            if arguments.graphs and graph not in arguments.graphs:
                continue
            if graph not in reference:
                reference[graph] = outputs(dense)
                yield record(graph, "0", "dense", reference[graph], reference[graph])
            yield record(graph, sparsity, "none", outputs(pruned), reference[graph])
            for method in arguments.methods:
                if graph == MASK_OF_BN and parse_method(method)[0] == "compress":
                    continue  # it chooses its masks itself
                started = time.perf_counter()
                try:
                    result = repaired(
                        method,
                        sparsity,
                        dense,
                        pruned,
                        data={"images": calibration},
                        preprocessing=net.preprocessing,
                        execution=Execution(runtime),
                    )
                except OptionError as error:  # such as bn on a folded graph
                    print(f"{name}, {graph}, {sparsity}, {method}: {error}", file=sys.stderr)
                    continue
                seconds = time.perf_counter() - started
                chosen = result.options.method if result.candidates else ""
                yield record(graph, sparsity, method, outputs(result.model), reference[graph], seconds, chosen)


def table(records: Sequence[Record], graph: str) -> str:
    """One row per method, one column per sparsity: top-1 in percent (KL), and what auto chose."""

    def cell(item: Record) -> str:
        return f"{100 * item.top1:.1f} ({item.kl:.3f})" + (f" {item.chosen}" if item.chosen else "")

    here = [item for item in records if item.graph == graph]
    dense = next(item for item in here if item.method == "dense")
    sparsities = sorted({item.sparsity for item in here if item.method != "dense"})
    methods = list(dict.fromkeys(item.method for item in here if item.method != "dense"))
    lines = [
        f"**{dense.net}, {graph}** (dense {100 * dense.top1:.1f}; {dense.images} calibration images; top-1 %, KL)",
        "",
        "| method | " + " | ".join(s if ":" in s else f"{100 * float(s):g}%" for s in sparsities) + " | seconds |",
        "|---" * (len(sparsities) + 2) + "|",
    ]
    for method in methods:
        row = {item.sparsity: item for item in here if item.method == method}
        cells = [cell(row[s]) if s in row else "-" for s in sparsities]
        seconds = f"{np.median([item.seconds for item in row.values()]):.1f}" if method != "none" else ""
        lines.append(f"| `{method}` | " + " | ".join(cells) + f" | {seconds} |")
    return "\n".join(lines)


def choices(records: Sequence[Record]) -> str:
    """List the cells in which another repair beats the one auto chose, and the cost; empty if auto did not run."""
    lines, costs = [], []
    for auto in (item for item in records if item.method == "auto"):
        cell = (auto.net, auto.graph, auto.sparsity)
        rivals = [
            item
            for item in records
            if (item.net, item.graph, item.sparsity) == cell and parse_method(item.method)[0] in METHODS
        ]
        best = max(rivals, key=lambda item: item.top1)
        costs.append(100 * (best.top1 - auto.top1))
        if best.top1 > auto.top1:
            lines.append(
                f"- {', '.join(cell)}: {auto.chosen} {100 * auto.top1:.1f}, `{best.method}` {100 * best.top1:.1f}"
            )
    if not costs:
        return ""
    head = f"`auto` is {np.mean(costs):.2f} points behind the best method by labels, on average"
    return "\n".join([head, "", *lines])


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--graphs", nargs="+", help='any of "bn", "folded", "folded, mask of bn"; default: all')
    parser.add_argument("--sparsities", nargs="+", help="sparsities, or N:M; default: by net")
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != "auto"])
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    add_threads(parser)
    add_assets(parser)
    parser.add_argument("--json", type=Path, help="file for all records")
    arguments = parser.parse_args()
    everything: list[Record] = []
    loaded: dict[str, Images] = {}
    for name in arguments.nets:
        net = NETS[name]
        if net.data not in loaded:
            loaded[net.data] = (cifar10 if net.data == "cifar10" else imagenet)(arguments.assets)
        records = list(measure(name, loaded[net.data], arguments.sparsities or net.sparsities, arguments))
        for graph in dict.fromkeys(item.graph for item in records):
            print(table(records, graph), end="\n\n", flush=True)
        print(choices(records), end="\n\n", flush=True)
        everything += records
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(item) for item in everything], indent=1) + "\n")


if __name__ == "__main__":
    main()
