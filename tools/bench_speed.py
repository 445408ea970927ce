"""Time and memory of `repair` against plain onnxruntime inference of the dense net over the same images.

    python tools/bench_speed.py [--nets resnet18@32 resnet50@224 resnet20] [--methods paired bn] [--json FILE]

A is plain inference: one session with onnxruntime's defaults, made beforehand; B is one whole `repair` call without
verification (models in memory, images in an array), with A's threads and batch size. They are run A B A B; "ratio" is
the median of the ratios B / A of neighbours in wall time, "CPU" the same in processor time. "linear" is the time of B
for twice the images, by half its time for 2 n: 1 is linear, more is worse. "peak" is the largest resident memory of a
process that does nothing but load two model files and a .npy file and repair. Nets: torchvision's ResNet-18 (CIFAR
variant) and ResNet-50 with random weights, ResNet-20 of ../shared/assets where it is there; 90% pruned.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from architectures import build
from bench_accuracy import ASSETS, method_options
from numpy.typing import NDArray

import onnx_asr
from onnx_asr.calibration import batch_size_for, input_specs
from onnx_asr.engine.session import Runtime
from onnx_asr.graph.index import GraphIndex
from onnx_asr.networks import Execution

SPARSITY = 0.9
RATIO_BARS = {"paired": 4.5}
PEAK_BARS = {"paired": 3.0}  # GB, at 128 images of 224 x 224
IMAGES = {"resnet18@32": 512, "resnet50@224": 64, "resnet20": 1000}
PEAK_IMAGES = 128
PEAK_NET = "resnet50@224"


@dataclass(frozen=True)
class Speed:
    """One method on one net."""

    net: str
    method: str
    images: int
    batch_size: int
    plain_seconds: float
    repair_seconds: float
    ratio: float
    cpu_ratio: float
    linearity: float
    stages: dict[str, float]


@dataclass(frozen=True)
class Peak:
    """Largest resident memory of one process, in bytes."""

    net: str
    method: str
    images: int
    peak: int


def network(name: str) -> onnx.ModelProto:
    if name == "resnet20":
        return onnx.load(ASSETS / "cifar10" / "resnet20_bn.onnx")
    return build("resnet18", 32) if name == "resnet18@32" else build("resnet50", 224)


def random_images(model: onnx.ModelProto, count: int) -> NDArray[np.float32]:
    (spec,) = input_specs(GraphIndex.of(model))
    shape = [size or 1 for size in spec.shape[1:]]
    return np.random.default_rng(0).standard_normal((count, *shape), np.float32)


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, processor seconds, result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - wall, time.process_time() - processor, result


def compare(net: str, method: str, count: int, repeats: int, threads: int) -> Speed:
    dense = network(net)
    pruned = onnx_asr.prune(dense, SPARSITY).model
    images = random_images(dense, 2 * count)
    batch_size = batch_size_for(input_specs(GraphIndex.of(dense)))
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        dense.SerializeToString(), session_options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def plain() -> None:
        for start in range(0, count, batch_size):
            session.run(None, {name: images[start : min(count, start + batch_size)]})

    def repair(samples: int) -> onnx_asr.RepairResult:
        options = method_options(method, samples=samples, verify_samples=0)
        execution = Execution(Runtime(threads=threads))
        return onnx_asr.repair(pruned, images[:samples], dense=dense, options=options, execution=execution)

    plain()
    repair(min(count, batch_size))
    rows = [(timed(plain), timed(lambda: repair(count)), timed(lambda: repair(2 * count))) for _ in range(repeats)]

    def median(pick: Callable[[Any, Any, Any], float]) -> float:
        return statistics.median(pick(*row) for row in rows)

    return Speed(
        net,
        method,
        count,
        batch_size,
        median(lambda a, b, c: float(a[0])),
        median(lambda a, b, c: float(b[0])),
        median(lambda a, b, c: b[0] / a[0]),
        median(lambda a, b, c: b[1] / a[1]),
        median(lambda a, b, c: c[0] / (2 * b[0])),
        rows[-1][1][2].seconds,
    )


def peak_memory(net: str, method: str, count: int, threads: int) -> Peak:
    with tempfile.TemporaryDirectory() as folder:
        dense = network(net)
        onnx.save(dense, Path(folder) / "dense.onnx")
        onnx.save(onnx_asr.prune(dense, SPARSITY).model, Path(folder) / "pruned.onnx")
        np.save(Path(folder) / "images.npy", random_images(dense, count))
        command = [sys.executable, __file__, "--probe", folder, "--methods", method, "--threads", str(threads)]
        probe = subprocess.run(command, check=True, capture_output=True, text=True)
    return Peak(net, method, count, int(probe.stdout))


def probe(folder: Path, method: str, threads: int) -> int:
    """Repair what lies in a folder; the process's peak of resident memory in bytes."""
    data = folder / "images.npy"
    samples = len(np.load(data, mmap_mode="r"))
    onnx_asr.repair(
        folder / "pruned.onnx",
        data,
        dense=folder / "dense.onnx",
        options=method_options(method, samples=samples, verify_samples=0),
        execution=Execution(Runtime(threads=threads)),
    )
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, free of what the parent process held when it forked
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _bar(value: float, method: str, bars: dict[str, float]) -> str:
    if method not in bars:
        return ""
    return f" (<= {bars[method]:g}: {'ok' if value <= bars[method] else 'MISSED'})"


def show(results: Sequence[Speed]) -> None:
    print("| net | method | images x batch | plain s | repair s | ratio | CPU | linear | stages |")
    print("|---|---|---|---|---|---|---|---|---|")
    for item in results:
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in item.stages.items() if seconds >= 0.005)
        print(
            f"| {item.net} | `{item.method}` | {item.images} x {item.batch_size} | {item.plain_seconds:.2f} "
            f"| {item.repair_seconds:.2f} | {item.ratio:.2f}{_bar(item.ratio, item.method, RATIO_BARS)} "
            f"| {item.cpu_ratio:.2f} | {item.linearity:.2f} | {stages} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in IMAGES if name != "resnet20" or ASSETS.exists()]
    parser.add_argument("--nets", nargs="*", default=default, choices=list(IMAGES))
    parser.add_argument("--methods", nargs="+", default=["paired", "bn"], help="name or name:option=value,...")
    parser.add_argument("--images", type=int, help="images a run; default: by net")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="threads within an operator; 0: every core")
    parser.add_argument("--no-peak", action="store_true", help="leave the memory measurement out")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        print(probe(arguments.probe, arguments.methods[0], arguments.threads))
        return
    speeds = [
        compare(net, method, arguments.images or IMAGES[net], arguments.repeats, arguments.threads)
        for net in arguments.nets
        for method in arguments.methods
    ]
    show(speeds)
    peaks = []
    for method in [] if arguments.no_peak else arguments.methods:
        peaks.append(peak_memory(PEAK_NET, method, PEAK_IMAGES, arguments.threads))
        gigabytes = peaks[-1].peak / 1e9
        bar = _bar(gigabytes, method, PEAK_BARS)
        print(f"peak memory, {PEAK_NET}, {PEAK_IMAGES} images, `{method}`: {gigabytes:.2f} GB{bar}", flush=True)
    if arguments.json:
        text = json.dumps({"speed": list(map(asdict, speeds)), "peak": list(map(asdict, peaks))}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
