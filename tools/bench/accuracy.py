"""Accuracy of every repair method on the nets and images of ../shared/assets (see MANIFEST.md there).

    python -m tools.bench.accuracy measure --work W --nets resnet20 --images 1024 --sparsities 0.9 0.95 --methods refit
    python -m tools.bench.accuracy measure --work W --methods paired:reliability_power=0.25 asr:bn=ema,prior=mean
    python -m tools.bench.accuracy table --work W    # docs/data/accuracy.json, and the tables of docs/accuracy.md
    python -m tools.bench.accuracy page --work W     # first every cell that the page shows and W does not have

A method is a name of onnx_asr.repairing.options.METHODS, "compress" or "none", with options after a colon. Pruning is
by global magnitude over all weights, or N:M. Nets come with BatchNormalization kept ("bn"), folded ("folded"), or both;
a pair is also compared under one mask: that of the bn graph, moved to the folded one by order of the correction points
("mask"). Calibration takes the first images of the calibration part, unlabelled; scores are of the other part: top-1 in
percent, and the KL divergence dense || repaired in nats.

W has a file per cell, NET GRAPH/IMAGES SPARSITY METHOD.json: a run may be killed at any moment, and started again it
computes what is missing or was made from another file. Where the page has <!-- table: NET GRAPH IMAGES --> with an
<!-- end -->, the table of these cells stands between them, and where it has <!-- summary -->, one of all nets; `table`
keeps what the JSON has of cells that W has not.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
from tools.paper.work import done_before, merged_cells, write, write_json
from tools.paths import ROOT

MASK_OF_BN = "mask"
GRAPHS = {
    "bn": "BatchNormalization kept",
    MASK_OF_BN: "BatchNormalization folded, the same mask",
    "folded": "BatchNormalization folded, pruned as it is",
}
USUAL = ("none", "bn", "paired", "refit", "auto", "compress")
MARK = re.compile(r"<!-- table: (\w+) (\w+) (\d+) -->\n.*?<!-- end -->", re.DOTALL)
SUMMARY_MARK = re.compile(r"<!-- summary -->\n.*?<!-- end -->", re.DOTALL)
Cell = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Cells of one net: every method at every sparsity."""

    net: str
    graphs: tuple[str, ...]
    images: int
    sparsities: tuple[str, ...]
    methods: tuple[str, ...] = USUAL


PAGE = (
    Plan("resnet20", ("bn", MASK_OF_BN, "folded"), 1024, ("0.7", "0.8", "0.9", "0.95", "0.98", "2:4")),
    Plan("resnet20", ("bn",), 1024, ("0.95",), ("compress:rounds=8",)),
    Plan("resnet56", ("bn",), 1024, ("0.9", "0.95", "0.98", "2:4"), USUAL),
    Plan("resnet8", ("bn",), 1024, ("0.8", "0.9", "2:4")),
    Plan("resnet18", ("bn",), 200, ("0.8", "0.9"), ("none", "bn", "paired", "refit", "compress")),
    Plan("resnet18", ("bn",), 850, ("0.9",), ("none", "bn", "paired", "refit", "compress")),
    Plan("mobilenetv2", ("folded",), 200, ("0.5", "0.7"), ("none", "paired", "refit", "compress")),
)
"""What docs/accuracy.md shows."""

TITLES = {
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "resnet8": "MLPerf Tiny ResNet-8",
    "resnet18": "ImageNet ResNet-18",
    "mobilenetv2": "ImageNet MobileNetV2",
}
SUMMARY = (
    ("resnet20", "bn", 1024, ("0.8", "0.9", "0.95", "2:4")),
    ("resnet56", "bn", 1024, ("0.95", "0.98")),
    ("resnet8", "bn", 1024, ("0.8", "0.9")),
    ("resnet18", "bn", 200, ("0.8", "0.9")),
    ("resnet18", "bn", 850, ("0.9",)),
    ("mobilenetv2", "folded", 200, ("0.5", "0.7")),
)
"""Cells of the summary: net, graph, calibration images, sparsities."""
SUMMARISED = ("none", "bn", "paired", "refit", "compress")


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


@dataclass(frozen=True)
class Bench:
    """One graph of a net, with its images.

    Attributes:
        name: Name of the net.
        graph: Which of its graphs.
        images: Images of its data set.
        count: Number of calibration images.
        assets: Folder of nets and images.
        threads: Threads per operator; 0 for every core.
    """

    name: str
    graph: str
    images: Images
    count: int
    assets: Path
    threads: int

    @property
    def net(self) -> Net:
        """The net."""
        return NETS[self.name]

    @property
    def settings(self) -> Cell:
        """What a cell depends on, besides its own name."""
        files = [self.assets / file for _, file in sorted(self.net.graphs.items())]
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        return {"dense": digests, "images": self.count, "scored": len(self.images.labels)}

    @cached_property
    def dense(self) -> onnx.ModelProto:
        """The dense model."""
        return self._load("folded" if self.graph == MASK_OF_BN else self.graph)

    @cached_property
    def reference(self) -> Outputs:
        """What the dense model puts out."""
        return self.outputs(self.dense)

    def _load(self, graph: str) -> onnx.ModelProto:
        return onnx.load(self.assets / self.net.graphs[graph])

    def outputs(self, model: onnx.ModelProto) -> Outputs:
        """What a model puts out for the scored images."""
        specs = input_specs(GraphIndex.of(model))
        data = open_data({"images": self.images.scored}, specs, preprocessing=self.net.preprocessing)
        return collect_outputs(model, data, np.arange(len(self.images.scored)), Runtime(threads=self.threads))

    def pruned(self, sparsity: str) -> onnx.ModelProto:
        """The net, pruned."""
        if self.graph == MASK_OF_BN:
            return with_mask_of(self.dense, prune(self._load("bn"), sparsity))
        return prune(self.dense, sparsity)

    def scored(self, model: onnx.ModelProto) -> Cell:
        """Top-1, KL divergence from the dense model, and agreement with it."""
        got = self.outputs(model)
        fidelity = compare(self.reference, got)
        return {
            "top1": accuracy(got, self.images.labels, self.net.label_offset)[0],
            "kl": fidelity.kl,
            "agreement": fidelity.agreement,
        }

    def cell(self, sparsity: str, method: str) -> Cell:
        """One measured cell; only the reason where the method does not apply."""
        if method == "dense":
            return self.scored(self.dense)
        pruned = self.pruned(sparsity)
        if method == "none":
            return self.scored(pruned)
        started = time.perf_counter()
        try:
            result = repaired(
                method,
                sparsity,
                self.dense,
                pruned,
                data={"images": self.images.calibration[: self.count]},
                preprocessing=self.net.preprocessing,
                execution=Execution(Runtime(threads=self.threads)),
            )
        except OptionError as error:  # such as bn on a folded graph
            return {"refused": str(error)}
        seconds = round(time.perf_counter() - started, 1)
        chosen = {"chosen": result.options.method} if result.candidates else {}
        scope = [note.split("'")[1] for note in result.notes if note.startswith("scope auto")]
        return {**self.scored(result.model), **chosen, **({"scope": scope[0]} if scope else {}), "seconds": seconds}

    def finish(self, work: Path, sparsity: str, method: str) -> None:
        """Compute a cell and store it, unless it is stored with the same settings."""
        name = f"{self.count} {sparsity} {method}.json".replace(":", "-")
        path = work / f"{self.name} {self.graph}" / name
        if done_before(path, self.settings):
            return
        cell = self.cell(sparsity, method)
        key = {"net": self.name, "graph": self.graph, "images": self.count, "sparsity": sparsity, "method": method}
        write_json(path, {**key, **cell, "settings": self.settings})
        print(f"{' '.join(map(str, key.values()))}: {cell}", flush=True)


def carry_out(plans: Sequence[Plan], arguments: argparse.Namespace) -> None:
    """Compute the cells that are missing."""
    loaded: dict[str, Images] = {}
    for plan in plans:
        data = NETS[plan.net].data
        if data not in loaded:
            loaded[data] = (cifar10 if data == "cifar10" else imagenet)(arguments.assets)
        for graph in plan.graphs:
            bench = Bench(plan.net, graph, loaded[data], plan.images, arguments.assets, arguments.threads)
            bench.finish(arguments.work, "0", "dense")
            for sparsity in plan.sparsities:
                for method in plan.methods:
                    if not (graph == MASK_OF_BN and parse_method(method)[0] == "compress"):  # it chooses its own masks
                        bench.finish(arguments.work, sparsity, method)


def measure(arguments: argparse.Namespace) -> None:
    """Compute the cells that are asked for."""
    plans = []
    for name in arguments.nets:
        own = NETS[name].graphs
        both = (*own, MASK_OF_BN) if len(own) == 2 else tuple(own)
        graphs = tuple(graph for graph in GRAPHS if graph in both and graph in (arguments.graphs or both))
        sparsities = tuple(arguments.sparsities or NETS[name].sparsities)
        plans.append(Plan(name, graphs, arguments.images, sparsities, tuple(arguments.methods)))
    carry_out(plans, arguments)


def page(arguments: argparse.Namespace) -> None:
    """Compute all cells of the page."""
    carry_out([plan for plan in PAGE if plan.net in arguments.nets], arguments)


def table(arguments: argparse.Namespace) -> None:
    """Write the JSON from the cells, and the tables of the page from the JSON."""
    known = merged_cells(arguments.data, arguments.work, key_of)
    text = arguments.page.read_text(encoding="utf-8")

    def filled(mark: re.Match[str]) -> str:
        net, graph, images = mark[1], mark[2], int(mark[3])
        key = {"net": net, "graph": graph, "images": images}
        cells = [cell for cell in known.values() if key.items() <= cell.items()]
        return f"<!-- table: {net} {graph} {images} -->\n{tabulated(cells)}\n<!-- end -->"

    text = MARK.sub(filled, text)
    summary = f"<!-- summary -->\n{summarised(known)}\n<!-- end -->"
    write(arguments.page, SUMMARY_MARK.sub(lambda found: summary, text).encode())


def summarised(known: dict[str, Cell]) -> str:
    """One row per net and sparsity, one column per method: top-1 in percent."""

    def shown(*key: object) -> str:
        cell = known.get(" ".join(map(str, key)), {})
        return f"{100 * cell['top1']:.1f}" if "top1" in cell else "-"

    heads = " | ".join(method if method == "none" else f"`{method}`" for method in SUMMARISED)
    lines = [f"| net (dense), images | zeros | {heads} |", "|---" * (len(SUMMARISED) + 2) + "|"]
    for net, graph, images, sparsities in SUMMARY:
        title = f"{TITLES[net]} ({shown(net, graph, images, '0', 'dense')}), {images:,}"
        for number, sparsity in enumerate(sparsities):
            row = " | ".join(shown(net, graph, images, sparsity, method) for method in SUMMARISED)
            zeros = sparsity if ":" in sparsity else f"{100 * float(sparsity):g}%"
            lines.append(f"| {title if number == 0 else ''} | {zeros} | {row} |")
    return "\n".join(lines)


def key_of(cell: Cell) -> str:
    return " ".join(str(cell[part]) for part in ("net", "graph", "images", "sparsity", "method"))


def order_of(method: str) -> tuple[int, int, str]:
    """Place of a method in a table: that of its name, more rounds later."""
    name, overrides = parse_method(method)
    return USUAL.index(name) if name in USUAL else len(USUAL), overrides.get("rounds", 0), method


def tabulated(cells: Sequence[Cell]) -> str:
    """One row per method, one column per sparsity: top-1 in percent (KL), and what was chosen.

    Raises:
        SystemExit: There are none.
    """
    dense = next((cell for cell in cells if cell["method"] == "dense"), None)
    if dense is None:
        raise SystemExit("the page has a table without cells: measure them")
    measured = {(cell["method"], cell["sparsity"]): cell for cell in cells if "top1" in cell and cell is not dense}
    sparsities = sorted({sparsity for _, sparsity in measured}, key=lambda text: (":" in text, text))

    def shown(method: str, sparsity: str) -> str:
        cell = measured.get((method, sparsity))
        if cell is None:
            return "-"
        extra = cell.get("scope") if parse_method(method)[0] == "compress" else cell.get("chosen")
        return f"{100 * cell['top1']:.1f} ({cell['kl']:.3f})" + (f" {extra}" if extra else "")

    heads = [text if ":" in text else f"{100 * float(text):g}%" for text in sparsities]
    lines = [
        f"{GRAPHS[dense['graph']]}; dense {100 * dense['top1']:.1f}; {dense['images']} calibration images",
        "",
        f"| method | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for method in sorted({method for method, _ in measured}, key=order_of):
        row = " | ".join(shown(method, sparsity) for sparsity in sparsities)
        lines.append(f"| {method if method == 'none' else f'`{method}`'} | {row} |")
    if behind := behind_best(measured):
        lines += ["", f"`auto` is {np.mean(behind):.2f} points behind the best repair by labels, on average"]
    return "\n".join(lines)


def behind_best(measured: dict[tuple[str, str], Cell]) -> list[float]:
    """By how many points the best repair, judged by labels, is ahead of `auto` at every sparsity."""
    found = []
    for (method, sparsity), auto in measured.items():
        if method == "auto":
            rivals = (cell["top1"] for (name, at), cell in measured.items() if at == sparsity and is_repair(name))
            found.append(100 * (max(rivals) - auto["top1"]))
    return found


def is_repair(method: str) -> bool:
    return parse_method(method)[0] in METHODS


def main(command: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="cells of your choice that are missing")
    measuring.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    measuring.add_argument("--graphs", nargs="+", choices=list(GRAPHS), help="default: all that a net has")
    measuring.add_argument("--sparsities", nargs="+", help="sparsities, or N:M; default: by net")
    measuring.add_argument("--methods", nargs="+", default=USUAL)
    measuring.add_argument("--images", type=int, default=512, help="calibration images")
    measuring.set_defaults(run=measure)
    paging = commands.add_parser("page", help="the cells of docs/accuracy.md that are missing")
    paging.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    paging.set_defaults(run=page)
    for each in (measuring, paging):
        each.add_argument("--work", type=Path, required=True, help="folder for the finished cells")
        add_threads(each)
        add_assets(each)
    tabling = commands.add_parser("table", help="write the JSON and the page's tables")
    tabling.add_argument("--work", type=Path, help="default: write the page from the existing JSON")
    tabling.add_argument("--data", type=Path, default=ROOT / "docs" / "data" / "accuracy.json")
    tabling.add_argument("--page", type=Path, default=ROOT / "docs" / "accuracy.md")
    tabling.set_defaults(run=table)
    arguments = parser.parse_args(command)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
