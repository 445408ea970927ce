"""Time and memory of `repair` and `compress` against plain onnxruntime inference of the dense net over the same images.

    python -m tools.bench.speed [--nets resnet18@32 resnet50@224 resnet20] [--methods paired bn] [--json FILE]
    python -m tools.bench.speed --threads 1 0 --methods paired refit auto compress:rounds=5 onnxsim torch-bn --no-linear

A is plain inference: one session with onnxruntime's defaults, made beforehand; B is one whole `repair` (or `compress`)
call (models in memory, images in an array), with A's threads and batch size. `auto` holds out a quarter more images to
choose by, the others none (`refit:verify_samples=256` does as well). What a user could do instead, on the same images:
`onnxsim` is its SparseGPT pruning of the dense net, `torch-bn` one pass of PyTorch over the dense net that re-estimates
BatchNormalization (momentum=None); a line says so where one is not installed.

A and B are run A B A B; "ratio" is the median ratio B / A of neighbouring runs in wall time, "CPU" the same in
processor time. "linear" is the time of B for twice the images over twice the time of B: 1 is linear, more is worse; "-"
with --no-linear. "where the time goes" comes from one more run under Python's profiler. "peak" is the largest resident
memory of a process that only loads two model files and a .npy file and repairs. --threads takes several numbers; with
one thread, a process keeps to one core. Nets: torchvision's ResNet-18 (CIFAR variant) and ResNet-50 with random
weights, and ResNet-20 of ../shared/assets if that exists; 90% pruned.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import json
import os
import pstats
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

import onnx_asr
from onnx_asr.engine.session import Runtime
from onnx_asr.graph.index import GraphIndex, attribute
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.samples import batch_size_for, input_specs
from tools.arguments import script_parser
from tools.bench.architectures import build
from tools.bench.methods import method_options, parse_method
from tools.paths import ASSETS, ROOT

SPARSITY = 0.9
RATIO_BARS = {
    ("resnet18@32", "paired"): 4.5,
    ("resnet50@224", "paired"): 4.5,
    ("resnet20", "refit"): 8.0,
    ("resnet50@224", "refit"): 15.0,
    ("resnet20", "compress"): 30.0,
}
PEAK_BARS = {"paired": 3.0, "refit": 6.0}  # GB, at 128 images of 224 x 224
PARTS = {  # of the profile: (end of the file's name, function)
    "onnxruntime": ("engine/session.py", "run"),
    "loading sessions": ("engine/session.py", "__init__"),
    "statistics": ("numerics/moments.py", "of"),
    "sampling rows": ("repairing/rows.py", "add"),
    "least squares": ("repairing/refit.py", "write_refit"),
}
IMAGES = {"resnet18@32": 512, "resnet50@224": 64, "resnet20": 1000}
PEAK_IMAGES = 128
PEAK_NET = "resnet50@224"
RIVALS = {"onnxsim": "onnxsim", "torch-bn": "torch"}  # with the module that each needs


@dataclass(frozen=True)
class Speed:
    """One method on one net."""

    net: str
    threads: int
    method: str
    images: int
    batch_size: int
    plain_seconds: float
    repair_seconds: float
    ratio: float
    cpu_ratio: float
    linearity: float | None
    shares: dict[str, float]


@dataclass(frozen=True)
class Peak:
    """Largest resident memory of one process, in bytes."""

    net: str
    threads: int
    method: str
    images: int
    peak: int


@cache
def network(name: str) -> onnx.ModelProto:
    if name == "resnet20":
        return onnx.load(ASSETS / "cifar10" / "resnet20_bn.onnx")
    return build("resnet18", 32) if name == "resnet18@32" else build("resnet50", 224)


def random_images(model: onnx.ModelProto, count: int) -> NDArray[np.float32]:
    (spec,) = input_specs(GraphIndex.of(model))
    shape = [size or 1 for size in spec.shape[1:]]
    return np.random.default_rng(0).standard_normal((count, *shape), np.float32)


def timed(function: Callable[[], None]) -> tuple[float, float]:
    """Wall seconds, processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


@contextmanager
def on_cores(threads: int) -> Iterator[None]:
    """Keep this thread, and those that it begins, to as many cores; 0 for all."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(cores)[:threads]) if threads else cores)
    yield
    os.sched_setaffinity(0, cores)


def unavailable(method: str) -> str | None:
    """Why a method cannot be measured here, if it cannot."""
    module = RIVALS.get(method)
    return f"{module} is not installed" if module and importlib.util.find_spec(module) is None else None


def held_out(method: str, count: int) -> int:
    """How many images beside the calibration images a method takes."""
    name, overrides = parse_method(method)
    return int(overrides.get("verify_samples", count // 4 if name == "auto" else 0))


def whole(
    method: str, dense: onnx.ModelProto, pruned: onnx.ModelProto, images: NDArray[np.float32], threads: int
) -> object:
    """Call `repair`, `compress` or a rival on images, of which some are held out where the method needs any."""
    if method == "onnxsim":
        return sparsegpt(dense, images)
    if method == "torch-bn":
        return recalibrated(dense, images, threads)
    execution = Execution(Runtime(threads=threads))
    name, overrides = parse_method(method)
    held = held_out(method, len(images) * 4 // 5 if name == "auto" else len(images))
    if name == "compress":
        settings = onnx_asr.RepairOptions(samples=len(images), verify_samples=0)
        goal = onnx_asr.CompressOptions(SPARSITY, **overrides, repair=settings)
        return onnx_asr.compress(dense, images, goal, execution=execution)
    options = method_options(method, samples=len(images) - held, verify_samples=held)
    return onnx_asr.repair(pruned, images, options, dense=dense, execution=execution)


def batches(images: NDArray[np.float32], size: int) -> Iterator[NDArray[np.float32]]:
    return (images[start : start + size] for start in range(0, len(images), size))


def sparsegpt(dense: onnx.ModelProto, images: NDArray[np.float32]) -> object:
    """SparseGPT pruning by onnxsim."""
    import onnxsim

    (spec,) = input_specs(GraphIndex.of(dense))
    model = onnx.ModelProto()
    model.CopyFrom(dense)
    feeds = [{spec.name: batch} for batch in batches(images, batch_size_for([spec]))]
    return onnxsim.apply_sparsegpt_pruning(model, feeds, sparsity=SPARSITY)


def recalibrated(dense: onnx.ModelProto, images: NDArray[np.float32], threads: int) -> object:
    """The BatchNormalization layers of a net, re-estimated by PyTorch as cumulative averages in one pass."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    index = GraphIndex.of(dense)
    constants = {
        name: torch.tensor(index.value(name).copy())
        for node in dense.graph.node
        for name in node.input
        if index.is_constant(name)
    }
    norms = {}
    for node in dense.graph.node:
        if node.op_type == "BatchNormalization":
            scale, bias = (torch.nn.Parameter(constants[name]) for name in node.input[1:3])
            norm = torch.nn.BatchNorm2d(len(scale), attribute(node, "epsilon", 1e-5), momentum=None)
            norm.weight, norm.bias = scale, bias
            norms[node.output[0]] = norm

    def computed(node: onnx.NodeProto, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        kind = node.op_type
        if kind == "Conv":
            strides, pads = attribute(node, "strides", [1, 1]), attribute(node, "pads", [0, 0])
            return functional.conv2d(x, rest[0], rest[1] if len(rest) > 1 else None, strides, pads[:2])
        if kind == "BatchNormalization":
            return norms[node.output[0]](x)
        if kind == "MaxPool":
            return functional.max_pool2d(
                x, *(attribute(node, key, None)[:2] for key in ("kernel_shape", "strides", "pads"))
            )
        if kind == "Slice":
            begins, ends, axes, strides = (item.tolist() for item in rest)
            for begin, end, axis, stride in zip(begins, ends, axes, strides, strict=True):
                x = x[(slice(None),) * axis + (slice(begin, end, stride),)]
            return x
        if kind == "Pad":
            before, after = rest[0].reshape(2, -1).tolist()
            return functional.pad(x, [size for pair in zip(before[::-1], after[::-1], strict=True) for size in pair])
        if kind == "Gemm":
            return functional.linear(x, rest[0], rest[1])
        simple = {
            "Relu": functional.relu,
            "Add": torch.add,
            "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
            "Flatten": lambda x: x.flatten(1),
        }
        return simple[kind](x, *rest)

    (spec,) = input_specs(index)
    with torch.no_grad():
        for batch in batches(images, batch_size_for([spec])):
            values = {spec.name: torch.from_numpy(batch)}
            for position, node in enumerate(index.nodes):
                if index.is_constant(node.output[0]):
                    continue
                read = [values[name] if name in values else constants[name] for name in node.input if name]
                values[node.output[0]] = computed(node, *read)
                for name in node.input:
                    if name in values and index.consumers[name][-1] == position:
                        del values[name]
    return norms


def profile(function: Callable[[], Any]) -> dict[str, float]:
    """Fraction of the wall time that each of PARTS takes, including calls."""
    profiler = cProfile.Profile()
    profiler.runcall(function)
    stats = pstats.Stats(profiler).get_stats_profile()
    seconds = dict.fromkeys(PARTS, 0.0)
    for (file, _, name), (_, _, _, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        for part, (ending, wanted) in PARTS.items():
            if name == wanted and file.endswith(ending):
                seconds[part] += cumulative
    return {part: value / stats.total_tt for part, value in seconds.items()}


def compare(net: str, method: str, count: int, repeats: int, threads: int, linear: bool) -> Speed:
    dense = network(net)
    pruned = onnx_asr.prune(dense, options=onnx_asr.PruneOptions(SPARSITY)).model
    images = random_images(dense, 2 * count + held_out(method, 2 * count))
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

    def repair(samples: int) -> None:
        whole(method, dense, pruned, images[: samples + held_out(method, samples)], threads)

    plain()
    repair(min(count, batch_size))
    rows = [(timed(plain), timed(lambda: repair(count))) for _ in range(repeats)]
    twice = [timed(lambda: repair(2 * count))[0] for _ in range(repeats if linear else 0)]

    def median(pick: Callable[[Any, Any], float]) -> float:
        return statistics.median(pick(*row) for row in rows)

    seconds = median(lambda a, b: float(b[0]))
    return Speed(
        net,
        threads,
        method,
        count,
        batch_size,
        median(lambda a, b: float(a[0])),
        seconds,
        median(lambda a, b: b[0] / a[0]),
        median(lambda a, b: b[1] / a[1]),
        statistics.median(twice) / (2 * seconds) if linear else None,
        profile(lambda: repair(count)),
    )


def peak_memory(net: str, method: str, count: int, threads: int) -> Peak:
    with tempfile.TemporaryDirectory() as folder:
        dense = network(net)
        onnx.save(dense, Path(folder) / "dense.onnx")
        onnx.save(onnx_asr.prune(dense, options=onnx_asr.PruneOptions(SPARSITY)).model, Path(folder) / "pruned.onnx")
        np.save(Path(folder) / "images.npy", random_images(dense, count + held_out(method, count)))
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            "--probe",
            folder,
            "--methods",
            method,
            "--threads",
            str(threads),
        ]
        probe = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return Peak(net, threads, method, count, int(probe.stdout.split()[-1]))


def probe(folder: Path, method: str, threads: int) -> int:
    """Repair the model in a folder; return the process's peak resident memory in bytes."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    whole(method, onnx.load(folder / "dense.onnx"), onnx.load(folder / "pruned.onnx"), images, threads)
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, without the memory that the parent process held when it forked
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _bar(value: float, bar: float | None) -> str:
    return "" if bar is None else f" (<= {bar:g}: {'ok' if value <= bar else 'MISSED'})"


def show(item: Speed) -> None:
    shares = ", ".join(f"{part} {100 * share:.0f}%" for part, share in item.shares.items() if share >= 0.005)
    bar = _bar(item.ratio, RATIO_BARS.get((item.net, parse_method(item.method)[0])))
    linear = "-" if item.linearity is None else f"{item.linearity:.2f}"
    print(
        f"| {item.net} | {item.threads or 'all'} | `{item.method}` "
        f"| {item.images} x {item.batch_size} | {item.plain_seconds:.2f} "
        f"| {item.repair_seconds:.2f} | {item.ratio:.2f}{bar} | {item.cpu_ratio:.2f} | {linear} | {shares} |",
        flush=True,
    )


def main() -> None:
    parser = script_parser(__doc__)
    default = [name for name in IMAGES if name != "resnet20" or ASSETS.exists()]
    parser.add_argument("--nets", nargs="*", default=default, choices=list(IMAGES))
    parser.add_argument("--methods", nargs="+", default=["paired", "bn"], help="name or name:option=value,...")
    parser.add_argument("--images", type=int, help="images per run; default: by net")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[0], help="threads per operator, in turn; 0: all cores"
    )
    parser.add_argument("--no-linear", action="store_true", help="skip the runs over twice the images")
    parser.add_argument("--no-peak", action="store_true", help="skip the memory measurement")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        print(probe(arguments.probe, arguments.methods[0], arguments.threads[0]))
        return
    speeds, peaks = [], []
    print(
        "| net | threads | method | images x batch | plain s | repair s | ratio | CPU | linear | where the time goes |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for net in arguments.nets:
        count = arguments.images or IMAGES[net]
        for threads in arguments.threads:
            for method in arguments.methods:
                reason = unavailable(method)
                if reason is not None:
                    print(f"| {net} | {threads or 'all'} | `{method}` | {reason} |", flush=True)
                    continue
                with on_cores(threads):
                    speed = compare(net, method, count, arguments.repeats, threads, not arguments.no_linear)
                speeds.append(speed)
                show(speed)
    peak_net = PEAK_NET if PEAK_NET in arguments.nets or not arguments.nets else arguments.nets[0]
    peak_images = PEAK_IMAGES if peak_net == PEAK_NET else arguments.images or IMAGES[peak_net]
    for method in [] if arguments.no_peak else arguments.methods:
        if unavailable(method) is not None:
            continue
        peaks.append(peak_memory(peak_net, method, peak_images, arguments.threads[0]))
        gigabytes = peaks[-1].peak / 1e9
        bar = _bar(gigabytes, PEAK_BARS.get(parse_method(method)[0])) if peak_net == PEAK_NET else ""
        print(f"peak memory, {peak_net}, {peak_images} images, `{method}`: {gigabytes:.2f} GB{bar}", flush=True)
    if arguments.json:
        text = json.dumps({"speed": list(map(asdict, speeds)), "peak": list(map(asdict, peaks))}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
