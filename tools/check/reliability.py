"""The figures of docs/reliability.md: minutes to an hour, by what is asked for.

    python -m tools.check.reliability memory --images 1024 --limits 4GiB none
    python -m tools.check.reliability memory --images 64 --limits 100MB 1GiB --method refit
    python -m tools.check.reliability repeat
    python -m tools.check.reliability fuzz --count 2500
    python -m tools.check.reliability kills --count 60

memory   peak resident memory of a repair of ResNet-50 at 224x224 (random weights, random images) for each limit
repeat   whether a second run of every method writes the same bytes, with one thread, two, and a memory limit
fuzz     tools/check/fuzz.py: broken models and data by the thousand
kills    tests/end_to_end/test_interruption.py: commands that are stopped at random moments
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from PIL import Image

from onnx_asr.pruning.options import PruneOptions
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import METHODS
from tools.arguments import script_parser
from tools.bench.architectures import build
from tools.paths import MODELS, ROOT

SIZE: Literal[224] = 224


def repair(*arguments: object) -> tuple[int, float]:
    """Run the command in a process of its own; its peak resident memory in bytes, and its seconds.

    The system counts into that peak what this process holds, or has held, when it starts the other.
    """
    begun = time.perf_counter()
    command = [sys.executable, "-m", "onnx_asr", "repair", *map(str, arguments), "--force", "-q"]
    child = os.posix_spawn(sys.executable, command, os.environ | {"PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):  # 1: written, but not better than its input, which happens with random weights
        sys.exit(f"exit code {code}: {' '.join(command)}")
    return usage.ru_maxrss * 1024, time.perf_counter() - begun


def make(dense: Path, pruned: Path, data: Path, images: int) -> None:
    model = build("resnet50", SIZE)
    onnx.save(model, dense)
    onnx.save(prune(model, options=PruneOptions(0.5)).model, pruned)
    data.mkdir()
    generator = np.random.default_rng(0)
    for number in range(images):
        pixels = generator.integers(0, 256, (7, 7, 3), np.uint8)
        Image.fromarray(pixels).resize((SIZE, SIZE)).save(data / f"{number:05}.jpg")


def memory(images: int, limits: Sequence[str], method: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense, pruned, data = folder / "dense.onnx", folder / "pruned.onnx", folder / "images"
        held_out = 8
        maker = multiprocessing.Process(target=make, args=(dense, pruned, data, images + held_out))
        maker.start()  # elsewhere: see repair()
        maker.join()
        if maker.exitcode != 0:
            sys.exit("the models and images could not be made")
        print(f"ResNet-50 at {SIZE}, {images} images, method {method}")
        digests = set()
        for limit in limits:
            output = folder / "out.onnx"
            few = ("--samples", images, "--verify-samples", held_out, "--threads", 1, "--method", method)
            given = () if limit == "none" else ("--memory-limit", limit)
            common = ("--dense", dense, "--data", data, "--preset", "imagenet")
            peak, seconds = repair(pruned, "-o", output, *common, *few, *given)
            digests.add(hashlib.sha256(output.read_bytes()).hexdigest())
            print(f"limit {limit:>8}: peak {peak / 1e6:6.0f} MB, {seconds:5.0f} s", flush=True)
        print("the same file with every limit" if len(digests) == 1 else "DIFFERENT files")


def repeat() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for net in sorted(MODELS.glob("*.onnx")):
            pruned = folder / "pruned.onnx"
            onnx.save(prune(net, options=PruneOptions(0.8)).model, pruned)
            for method in METHODS:
                digests = []
                for extra in ((), (), ("--threads", 2), ("--memory-limit", "2MB")):
                    output = folder / "out.onnx"
                    data = ("--data", MODELS / "data" / "digits_calibration.npz", "--preset", "digits")
                    few = ("--samples", 128, "--verify-samples", 64, "--method", method)
                    repair(pruned, "-o", output, "--dense", net, *data, *few, *(extra or ("--threads", 1)))
                    digests.append(hashlib.sha256(output.read_bytes()).hexdigest())
                words = ["same" if digest == digests[0] else "DIFFERENT" for digest in digests[1:]]
                again, threads, limit = words
                print(f"{net.stem:17} {method:10} again: {again}, two threads: {threads}, limit: {limit}", flush=True)


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("what", choices=["memory", "repeat", "fuzz", "kills"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--limits", nargs="+", default=["100MB", "none"])
    parser.add_argument("--method", choices=METHODS, default="paired")
    parser.add_argument("--count", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.what == "memory":
        memory(arguments.images, arguments.limits, arguments.method)
        return 0
    if arguments.what == "repeat":
        repeat()
        return 0
    if arguments.what == "fuzz":
        return subprocess.call([sys.executable, "-m", "tools.check.fuzz", "--count", str(arguments.count)], cwd=ROOT)
    test = ROOT / "tests" / "end_to_end" / "test_interruption.py"
    environment = os.environ | {"KILLS": str(arguments.count)}
    return subprocess.call([sys.executable, "-m", "pytest", "-q", "-s", test], cwd=ROOT, env=environment)


if __name__ == "__main__":
    sys.exit(main())
