"""What pruning does, on the nets and images of ../shared/assets (see MANIFEST.md there).

    python tools/bench_pruning.py accuracy [--graph folded] [--shares 0.3 0.5] [--methods none paired refit]
    python tools/bench_pruning.py latency [--flops 0.5] [--repeats 30]
    python tools/bench_pruning.py scopes [--graph folded] [--shares 0.8 0.9] [--scopes global:variance sensitivity]

"scopes": single weights of ResNet-20 are zeroed, as many as the shares say, by scope and, behind a colon, score
(magnitude if there is none), then the net is repaired with "refit". "accuracy": shares of the inner channels of
ResNet-20's blocks are removed (those between the two convolutions of a block, which no residual Add couples), then
repaired. Both repair from the first calibration images, and give top-1 in percent and the KL divergence dense ||
repaired of the scored images. "latency": ResNet-18 is cut in all groups of channels alike, to multiples of 16 channels
and a share of its operations; A is onnxruntime on the dense net with one image a run, B on the cut one; they are run
A B A B, and the ratio is that of the medians. "ok" and "MISSED" compare with the goals in this file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_accuracy import ASSETS, NETS, cifar10, method_options

import onnx_asr
from onnx_asr.calibration import input_specs
from onnx_asr.data import open_data
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.fidelity import Outputs, accuracy, collect_outputs, compare
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.shapes import typical_shape
from onnx_asr.networks import Execution
from onnx_asr.options import DATA_AWARE

INNER = r"layer\d.*conv1"
TOP1_GOALS = {(0.3, "refit"): 90.0, (0.5, "refit"): 82.5}
LATENCY_GOAL = 0.65
MULTIPLE = 16


def verdict(good: bool) -> str:
    return "ok" if good else "MISSED"


def measure_accuracy(arguments: argparse.Namespace) -> None:
    net, images = NETS["resnet20"], cifar10(arguments.assets)
    dense = onnx.load(arguments.assets / net.graphs[arguments.graph])
    runtime = Runtime(threads=arguments.threads)
    calibration = {"images": images.calibration[: arguments.images]}

    def outputs(model: onnx.ModelProto) -> Outputs:
        data = open_data({"images": images.scored}, input_specs(GraphIndex.of(model)), preprocessing=net.preprocessing)
        return collect_outputs(model, data, range(len(images.scored)), runtime)

    reference = outputs(dense)
    top1 = 100 * accuracy(reference, images.labels)[0]
    print(f"ResNet-20 ({arguments.graph}, dense {top1:.1f}), inner channels, {arguments.images} calibration images\n")
    print("| removed | parameters | FLOPs | method | top-1 | KL | goal |\n|---|---|---|---|---|---|---|")
    for share in arguments.shares:
        cut = onnx_asr.prune_channels(dense, share, include=[INNER])
        left = [f"{100 * getattr(cut.after, n) / getattr(cut.before, n):.0f}%" for n in ("parameters", "flops")]
        for method in arguments.methods:
            model = cut.model
            if method != "none":
                options = method_options(method, samples=arguments.images, verify_samples=0)
                model = onnx_asr.repair(
                    cut.model,
                    calibration,
                    dense=dense,
                    options=options,
                    preprocessing=net.preprocessing,
                    execution=Execution(runtime),
                ).model
            got = outputs(model)
            top1 = 100 * accuracy(got, images.labels)[0]
            goal = TOP1_GOALS.get((share, method)) if arguments.graph == "bn" else None
            bar = "" if goal is None else f">= {goal:g}: {verdict(round(top1, 1) >= goal)}"
            kl = compare(reference, got).kl
            print(f"| {100 * share:g}% | {' | '.join(left)} | `{method}` | {top1:.1f} | {kl:.3f} | {bar} |", flush=True)


def measure_scopes(arguments: argparse.Namespace) -> None:
    net, images = NETS["resnet20"], cifar10(arguments.assets)
    dense = onnx.load(arguments.assets / net.graphs[arguments.graph])
    execution = Execution(Runtime(threads=arguments.threads))
    calibration = {"images": images.calibration[: arguments.images]}

    def outputs(model: onnx.ModelProto) -> Outputs:
        data = open_data({"images": images.scored}, input_specs(GraphIndex.of(model)), preprocessing=net.preprocessing)
        return collect_outputs(model, data, range(len(images.scored)), execution.runtime)

    reference = outputs(dense)
    print(f"ResNet-20 ({arguments.graph}), refit, {arguments.images} calibration images\n")
    print("| zeros | scope | top-1, pruned | refitted | KL, refitted | seconds to prune |\n|---|---|---|---|---|---|")
    options = method_options("refit", samples=arguments.images, verify_samples=0)
    shared: dict[str, Any] = {"preprocessing": net.preprocessing, "execution": execution}
    for share in arguments.shares:
        for name in arguments.scopes:
            scope, _, score = name.partition(":")
            score = score or "magnitude"
            looks = scope == "sensitivity" or score in DATA_AWARE
            started = time.perf_counter()
            data = {"data": calibration} if looks else {}
            pruned = onnx_asr.prune(dense, share, scope=scope, score=score, **data, **shared).model
            seconds = time.perf_counter() - started
            model = onnx_asr.repair(pruned, calibration, dense=dense, options=options, **shared).model
            before, after = outputs(pruned), outputs(model)
            top1 = " | ".join(f"{100 * accuracy(got, images.labels)[0]:.1f}" for got in (before, after))
            kl = compare(reference, after).kl
            print(f"| {100 * share:g}% | {name} | {top1} | {kl:.3f} | {seconds:.0f} |", flush=True)


def cut_to_flops(dense: onnx.ModelProto, share: float) -> onnx_asr.ChannelPruneResult:
    """The smallest cut of all groups alike, to a percent, that leaves at most a share of the operations."""
    for percent in range(100):
        result = onnx_asr.prune_channels(dense, percent / 100, multiple=MULTIPLE)
        if result.after.flops <= share * result.before.flops:
            return result
    raise SystemExit(f"no cut leaves only {share} of the operations")


def measure_latency(arguments: argparse.Namespace) -> None:
    dense = onnx.load(arguments.assets / NETS["resnet18"].graphs["bn"])
    cut = cut_to_flops(dense, arguments.flops)
    (value,) = GraphIndex.of(dense).inputs
    feeds = {value.name: np.random.default_rng(0).standard_normal(typical_shape(value), np.float32)}
    runtime = Runtime(threads=arguments.threads)
    sessions = [Session(model, runtime) for model in (dense, cut.model)]
    runs: list[Callable[[], object]] = [lambda session=session: session.run(feeds) for session in sessions]  # type: ignore[misc]
    seconds: list[list[float]] = [[], []]
    for number in range(arguments.repeats + 2):
        for run, kept in zip(runs, seconds, strict=True):
            started = time.perf_counter()
            run()
            if number >= 2:
                kept.append(time.perf_counter() - started)
    before, after = map(statistics.median, seconds)
    ratio = after / before
    flops, parameters = (getattr(cut.after, name) / getattr(cut.before, name) for name in ("flops", "parameters"))
    print(
        f"ResNet-18, {100 * cut.options['sparsity']:.0f}% of all channels removed, to multiples of {MULTIPLE}: "
        f"{flops:.3f} of the FLOPs, {parameters:.3f} of the parameters; batch 1: {1e3 * before:.1f} -> "
        f"{1e3 * after:.1f} ms, ratio {ratio:.3f} (<= {LATENCY_GOAL}: {verdict(ratio <= LATENCY_GOAL)})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "latency", "scopes"])
    parser.add_argument("--shares", nargs="+", type=float, help="of channels, or weights, to remove")
    parser.add_argument("--scopes", nargs="+", default=["global", "erk", "sensitivity"], help="SCOPE or SCOPE:SCORE")
    parser.add_argument("--graph", default="bn", choices=["bn", "folded"], help="BatchNormalization kept or folded")
    parser.add_argument("--methods", nargs="+", default=["none", "bn", "paired", "refit"], help="none, or as in repair")
    parser.add_argument("--images", type=int, default=1024, help="calibration images")
    parser.add_argument("--flops", type=float, default=0.5, help="share of the operations to leave")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    arguments = parser.parse_args()
    if arguments.shares is None:
        arguments.shares = [0.8, 0.9] if arguments.what == "scopes" else [0.3, 0.5]
    commands = {"accuracy": measure_accuracy, "latency": measure_latency, "scopes": measure_scopes}
    commands[arguments.what](arguments)


if __name__ == "__main__":
    main()
