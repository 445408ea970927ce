"""Accuracy and latency after pruning, on the nets and images of ../shared/assets (see MANIFEST.md there).

    python -m tools.bench.pruning channels [--graph folded] [--goals 0.3 0.5] [--methods none paired refit]
    python -m tools.bench.pruning channels --net resnet18 --goals 0.2 0.3 0.5 flops:0.5
    python -m tools.bench.pruning latency [--goals flops:0.5 latency:0.6] [--multiple 16]
    python -m tools.bench.pruning scopes [--graph folded] [--goals 0.8 0.9] [--scopes global:variance sensitivity]
    python -m tools.bench.pruning patterns [--nets resnet20 resnet56 resnet18] [--goals 2:4] [--scores magnitude]

"channels" removes a fraction of the channels, or as many as a budget of FLOPs asks for (flops:0.5): of ResNet-20 those
between the two convolutions of a block, which no residual Add couples; of ResNet-18 all but the classes, including the
residual stages. "scopes" zeroes single weights by scope and score (SCOPE or SCOPE:SCORE, magnitude by default) and
repairs with "refit". "patterns" prunes to N:M by score. All of these repair from the first calibration images and print
top-1 in percent and the KL divergence dense || repaired on the scored images. "latency" removes channels of ResNet-18
within a budget and runs the dense and the smaller net in turns, one image per run. "ok" and "MISSED" compare with the
goals in this file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

import onnx_asr
from onnx_asr.data import open_data
from onnx_asr.engine.session import Runtime
from onnx_asr.graph.index import GraphIndex
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import Outputs, accuracy, collect_outputs, compare
from onnx_asr.networks.samples import input_specs
from tools.arguments import add_assets, add_threads, script_parser
from tools.bench.methods import method_options
from tools.bench.nets import NETS, cifar10, imagenet

INNER: dict[str, tuple[str, ...]] = {"resnet20": (r"layer\d.*conv1",)}
"""Layers whose channels are removed, by net; for other nets, all layers."""
TOP1_GOALS = {("resnet20", "0.3", "refit"): 90.0, ("resnet20", "0.5", "refit"): 82.5}
MOST_LOST = {"resnet20": 1.0, "resnet56": 1.0, "resnet18": 4.0}
"""Points of top-1 that 2:4 may cost after `refit`."""
LATENCY_GOALS = {"flops:0.5": 0.65}
DEFAULT_GOALS = {"channels": ["0.3", "0.5"], "latency": ["flops:0.5"], "scopes": ["0.8", "0.9"], "patterns": ["2:4"]}


def verdict(good: bool) -> str:
    return "ok" if good else "MISSED"


def goal(text: str) -> dict[str, Any]:
    """Options of pruning for a sparsity, or for a target such as flops:0.5."""
    measure, colon, limit = text.partition(":")
    return {f"target_{measure}": float(limit)} if colon else {"sparsity": float(text)}


class Bench:
    """One net with its images: some to repair from, others to score on."""

    def __init__(self, name: str, graph: str, arguments: argparse.Namespace) -> None:
        net = NETS[name]
        self.name = name
        self.dense = onnx.load(arguments.assets / net.graphs[graph])
        self._images = (cifar10 if net.data == "cifar10" else imagenet)(arguments.assets)
        self.calibration = {"images": self._images.calibration[: arguments.images]}
        self.count = len(self.calibration["images"])
        self.shared: dict[str, Any] = {
            "preprocessing": net.preprocessing,
            "execution": Execution(Runtime(threads=arguments.threads)),
        }
        self._label_offset = net.label_offset
        self._reference = self._outputs(self.dense)
        self.dense_top1 = self.score(self.dense)[0]
        print(f"{name} ({graph}, dense {self.dense_top1:.1f}), {self.count} calibration images\n")

    def _outputs(self, model: onnx.ModelProto) -> Outputs:
        images, specs = self._images.scored, input_specs(GraphIndex.of(model))
        data = open_data({"images": images}, specs, preprocessing=self.shared["preprocessing"])
        return collect_outputs(model, data, np.arange(len(images)), self.shared["execution"].runtime)

    def score(self, model: onnx.ModelProto) -> tuple[float, float]:
        """Top-1 in percent, to one decimal; KL divergence from the dense net."""
        got = self._outputs(model)
        kl = compare(self._reference, got).kl
        assert kl is not None
        return round(100 * accuracy(got, self._images.labels, self._label_offset)[0], 1), kl

    def repaired(self, pruned: onnx.ModelProto, method: str) -> onnx.ModelProto:
        """The model after a repair, or itself if the method is none."""
        if method == "none":
            return pruned
        options = method_options(method, samples=self.count, verify_samples=0)
        return onnx_asr.repair(pruned, self.calibration, options, dense=self.dense, **self.shared).model

    def prune(self, **options: Any) -> onnx_asr.PruneResult:
        """The dense net with zeros; from the images, where a score or a scope needs them."""
        asked = onnx_asr.PruneOptions(**options)
        data = None if asked.needs_data is None else self.calibration
        return onnx_asr.prune(self.dense, data, asked, **self.shared)


def share_text(result: onnx_asr.ChannelPruneResult, name: str) -> str:
    return f"{100 * getattr(result.after, name) / getattr(result.before, name):.0f}%"


def measure_channels(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments.net, arguments.graph, arguments)
    print("| removed | parameters | FLOPs | method | top-1 | KL | seconds | goal |\n|---|---|---|---|---|---|---|---|")
    for text in arguments.goals:
        options = onnx_asr.ChannelPruneOptions(
            **goal(text), include=INNER.get(bench.name, ()), multiple=arguments.multiple
        )
        cut = onnx_asr.prune_channels(bench.dense, options)
        left = " | ".join(share_text(cut, name) for name in ("parameters", "flops"))
        for method in arguments.methods:
            started = time.perf_counter()
            model = bench.repaired(cut.model, method)
            seconds = time.perf_counter() - started
            top1, kl = bench.score(model)
            least = TOP1_GOALS.get((bench.name, text, method)) if arguments.graph == "bn" else None
            bar = "" if least is None else f">= {least:g}: {verdict(top1 >= least)}"
            removed = f"{100 * cut.sparsity:.0f}%"
            print(f"| {removed} | {left} | `{method}` | {top1:.1f} | {kl:.3f} | {seconds:.0f} | {bar} |", flush=True)


def measure_scopes(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments.net, arguments.graph, arguments)
    print("| goal | scope | top-1, pruned | refitted | KL, refitted | seconds to prune |\n|---|---|---|---|---|---|")
    for text in arguments.goals:
        for name in arguments.scopes:
            scope, _, score = name.partition(":")
            started = time.perf_counter()
            pruned = bench.prune(**goal(text), scope=scope, score=score or "magnitude").model
            seconds = time.perf_counter() - started
            before, _ = bench.score(pruned)
            after, kl = bench.score(bench.repaired(pruned, "refit"))
            print(f"| {text} | {name} | {before:.1f} | {after:.1f} | {kl:.3f} | {seconds:.0f} |", flush=True)


def measure_patterns(arguments: argparse.Namespace) -> None:
    for name in arguments.nets:
        bench = Bench(name, arguments.graph, arguments)
        print("| pattern | score | stays dense | method | top-1 | KL | goal |\n|---|---|---|---|---|---|---|")
        for pattern in arguments.goals:
            for score in arguments.scores:
                found = bench.prune(pattern=pattern, score=score)
                narrow = ", ".join(skip.name for skip in found.skips) or "none"
                for method in arguments.methods:
                    top1, kl = bench.score(bench.repaired(found.model, method))
                    least = bench.dense_top1 - MOST_LOST[name]
                    goes_for = (pattern, method, arguments.graph) == ("2:4", "refit", "bn")
                    bar = f">= {least:.1f}: {verdict(top1 >= round(least, 1))}" if goes_for else ""
                    row = f"| {pattern} | {score} | {narrow} | `{method}` | {top1:.1f} | {kl:.3f} | {bar} |"
                    print(row, flush=True)
        print()


def measure_latency(arguments: argparse.Namespace) -> None:
    dense = onnx.load(arguments.assets / NETS[arguments.net].graphs[arguments.graph])
    execution = Execution(Runtime(threads=arguments.threads))
    print(f"{arguments.net} ({arguments.graph}), batch 1, to multiples of {arguments.multiple} channels\n")
    print("| goal | removed | parameters | FLOPs | ms, dense | cut | ratio (middle half) | pairs | goal |")
    print("|---|---|---|---|---|---|---|---|---|")
    for text in arguments.goals:
        options = onnx_asr.ChannelPruneOptions(**goal(text), multiple=arguments.multiple)
        cut = onnx_asr.prune_channels(dense, options, execution=execution)
        took = cut.latency or onnx_asr.measure_latency(dense, cut.model, seconds=arguments.seconds, execution=execution)
        most = LATENCY_GOALS.get(text)
        bar = "" if most is None else f"<= {most:g}: {verdict(took.ratio <= most)}"
        left = " | ".join(share_text(cut, name) for name in ("parameters", "flops"))
        print(
            f"| {text} | {100 * cut.sparsity:.1f}% | {left} | {1e3 * took.seconds_before:.1f} "
            f"| {1e3 * took.seconds_after:.1f} | {took.ratio:.3f} ({took.low:.3f} to {took.high:.3f}) | {took.pairs} "
            f"| {bar} |",
            flush=True,
        )


COMMANDS = {
    "channels": measure_channels,
    "latency": measure_latency,
    "scopes": measure_scopes,
    "patterns": measure_patterns,
}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--net", choices=NETS, help="default: resnet20; latency: resnet18")
    parser.add_argument("--nets", nargs="+", choices=MOST_LOST, default=list(MOST_LOST), help="nets for patterns")
    parser.add_argument("--goals", nargs="+", help="sparsities, budgets such as flops:0.5, or patterns such as 2:4")
    parser.add_argument("--scopes", nargs="+", default=["global", "erk", "sensitivity"], help="SCOPE or SCOPE:SCORE")
    parser.add_argument("--scores", nargs="+", default=["magnitude"], help="scores for patterns")
    parser.add_argument("--graph", default="bn", choices=["bn", "folded"], help="BatchNormalization kept or folded")
    parser.add_argument(
        "--methods", nargs="+", default=["none", "bn", "paired", "refit"], help="none, or a method of repair"
    )
    parser.add_argument("--images", type=int, default=1024, help="calibration images, at most")
    parser.add_argument("--multiple", type=int, default=1, help="keep a multiple of this number of channels")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of a latency measurement")
    add_threads(parser)
    add_assets(parser)
    found = parser.parse_args(arguments)
    found.goals = found.goals or DEFAULT_GOALS[found.what]
    found.net = found.net or ("resnet18" if found.what == "latency" else "resnet20")
    return found


def main() -> None:
    arguments = parsed()
    COMMANDS[arguments.what](arguments)


if __name__ == "__main__":
    main()
