"""The experiment of the ASR paper with this tool: its four architectures, its grid on CIFAR-10, its tables.

    python -m tools.paper.reproduce train  --work W     # needs torch: pip install -r tools/paper/requirements.txt
    python -m tools.paper.reproduce repair --work W     # the package's public API alone, no torch
    python -m tools.paper.reproduce table  --work W     # docs/data/paper.json, and the tables of docs/paper.md from it

By default, `train` trains at full size on a GPU, for 30 epochs in mixed precision; `--nets resnet50` trains one net.
`repair` prunes every net in W to 50, 70, 90% and 2:4, and repairs each with

    none                                 pruning alone
    bn, layerwise, raw, asr              gains from 64 images; BatchNormalization re-estimated by a moving average
                                         (momentum 0.1) of b batches of 128 images, and exactly
    paired, refit, auto                  what this tool does instead; at 90% paired with --reliability-power, too
    the same on scaled nets              the functions as they were, median running variance 1
    asr with other priors, no shift      the paper's ablation, on scaled nets, at 90% and b = 20

and scores the results on test images; `bn` also runs on the unpruned net. `--jobs 16` computes 16 cells at a time, each
in its own process (up to 9 GiB for DenseNet-121). On a CPU, at reduced width:

    python -m tools.paper.reproduce train  --work W --device cpu --width 0.25 --epochs 3 --batch 128
    python -m tools.paper.reproduce repair --work W --images 1024 --score-images 1000

W keeps everything: the images as arrays, a trained net as NET.onnx with NET.json (which also say all that `repair` asks
of a net from elsewhere), a finished cell of the grid as cells/NET/CELL.json. Files are written beside and renamed, so a
run may be killed at any moment; started again it does what is missing or was made with other settings. The JSON keeps
what it has of nets that W does not have, so that nets can be measured one after another and on different hosts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import onnx_asr
from tools.arguments import script_parser
from tools.paper import grid, tables
from tools.paper.work import NETS, Work, done_before, read_json, write, write_json
from tools.paths import ASSETS, ROOT

ARCHIVE = ASSETS / "data" / "cifar10_jpeg.tar.xz"
PRESET = "cifar10"


def train(arguments: argparse.Namespace) -> None:
    """Train and export the nets that are missing."""
    from tools.paper import nets  # both need torch
    from tools.train.exporting import exported

    if arguments.images < arguments.batch:
        raise SystemExit(f"{arguments.images} images do not fill a batch of {arguments.batch}: give more, or a --batch")
    work = Work(arguments.work)
    recipe = nets.Recipe(
        arguments.width,
        arguments.epochs,
        arguments.batch,
        arguments.seed,
        arguments.device,
        arguments.bf16,
        arguments.float16,
    )
    preprocessing = onnx_asr.PRESETS[PRESET]
    normalize = nets.Normalization(preprocessing.mean, preprocessing.std)
    nets.prepare(arguments.device, arguments.threads)
    for name in arguments.nets:
        settings = {"images": arguments.images, **asdict(recipe)}
        if done_before(work.record(name), settings):
            print(f"{name}: trained before", flush=True)
            continue
        images = work.images("train", arguments.archive).head(arguments.images)
        test = work.images("test", arguments.archive)
        started = time.perf_counter()
        net = nets.train(name, images.pixels, images.labels, normalize, recipe)
        seconds = time.perf_counter() - started
        top1 = nets.top1(net, test.pixels, test.labels, normalize)
        work.record(name).unlink(missing_ok=True)  # the net that it describes is about to be replaced
        write(work.net(name), exported(net, (3, nets.SIZE, nets.SIZE)))
        record = {
            "settings": settings,
            "preset": PRESET,
            "parameters": sum(value.numel() for value in net.parameters()),
            "top1": top1,
            "test_images": len(test.labels),
            "seconds": round(seconds, 1),
        }
        write_json(work.record(name), record)
        print(f"{name}: {record['parameters']} parameters, top-1 {top1:.4f}, {seconds:.0f} s", flush=True)


def repair(arguments: argparse.Namespace) -> None:
    """Compute the cells that are missing."""
    work = Work(arguments.work)
    names = arguments.nets or work.nets() or NETS
    if missing := [name for name in names if name not in work.nets()]:
        raise SystemExit(f"{work.net(missing[0])} with its .json is missing: train it first")
    calibration = work.images("train", arguments.archive).pixels
    scored = work.images("test", arguments.archive).head(arguments.score_images)
    needed = max(arguments.images + grid.HELD_OUT, grid.BATCH * max(arguments.batches))
    if needed > len(calibration):
        raise SystemExit(f"{needed} calibration images are needed, and there are {len(calibration)}: ask for fewer")
    limit = None if arguments.memory_limit is None else round(arguments.memory_limit * 2**30)
    threads = arguments.threads or max(1, (os.cpu_count() or 1) // arguments.jobs)
    execution = onnx_asr.Execution(onnx_asr.Runtime(threads=threads), limit)
    benches = {name: grid.Bench(work, name, calibration[:needed], scored, execution) for name in names}
    cells = list(grid.cells(arguments.sparsities, arguments.methods, arguments.batches, arguments.images))
    tasks = [(name, cell) for name in benches for cell in cells]
    os.environ.setdefault("OMP_NUM_THREADS", f"{threads}")  # for numpy in the worker processes
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, context, grid.start_worker, (benches,)) as pool:
        for line in pool.map(grid.finish, *zip(*tasks, strict=True)):
            if line is not None:
                print(line, flush=True)


def table(arguments: argparse.Namespace) -> None:
    """Write the JSON from the cells and the page's tables from the JSON. Nets without cells stay in the JSON."""
    page = arguments.page.read_text(encoding="utf-8")
    if arguments.work is not None:
        new = grid.collected(Work(arguments.work))
        if arguments.data.exists():
            new = grid.merged(read_json(arguments.data), new)
        write_json(arguments.data, new)
    write(arguments.page, tables.filled(page, read_json(arguments.data)).encode())


def positive(text: str) -> int:
    """Parse a positive integer for argparse.

    Raises:
        ValueError: When it is not an integer.
        argparse.ArgumentTypeError: When it is below 1.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is needed, got {number}")
    return number


def sparsity(text: str) -> str:
    """Parse a sparsity for argparse, as `grid.prune` takes it.

    Raises:
        ValueError: When it does not begin with a number.
        argparse.ArgumentTypeError: When it is something else.
    """
    number, *scope = text.split()
    if not re.fullmatch(r"\d+:\d+", text) and not (0 < float(number) < 1 and scope in ([], ["layer"], ["erk"])):
        raise argparse.ArgumentTypeError(
            f"expected a share such as 0.9, '0.9 erk' or '0.9 layer', or N:M, got '{text}'"
        )
    return text


def main(command: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="train and export the nets that are missing")
    repairing = commands.add_parser("repair", help="prune, repair and score: the cells that are missing")
    tabling = commands.add_parser("table", help="write the JSON and the page's tables")
    for part in (training, repairing):
        part.add_argument("--work", type=Path, required=True, help="folder for nets and finished cells")
        part.add_argument("--archive", type=Path, default=ARCHIVE, help="CIFAR-10 as PART/CLASS/*.jpg")
    training.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    training.add_argument("--nets", nargs="+", default=NETS, choices=NETS)
    training.add_argument("--width", type=float, default=1.0, help="scales all numbers of channels")
    training.add_argument("--epochs", type=int, default=30)
    training.add_argument("--batch", type=int, default=512)
    training.add_argument("--images", type=int, default=50_000, help="training images")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="cuda")
    training.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="mixed precision")
    training.add_argument(
        "--float16", action="store_true", help="round the weights to float16, so that they compress well"
    )
    training.set_defaults(run=train)
    repairing.add_argument("--jobs", type=positive, default=1, help="cells computed at a time, each in its own process")
    repairing.add_argument("--threads", type=int, default=0, help="threads per job; 0: its share of the cores")
    repairing.add_argument("--nets", nargs="+", help="default: all trained nets")
    repairing.add_argument(
        "--sparsities",
        nargs="+",
        type=sparsity,
        default=grid.SPARSITIES,
        help="N:M or sparsities, by global magnitude or as in '0.9 erk'",
    )
    repairing.add_argument("--methods", nargs="+", default=grid.METHODS, choices=grid.METHODS)
    repairing.add_argument("--batches", nargs="+", type=int, default=grid.BATCHES, help="batches of the moving average")
    repairing.add_argument(
        "--images", type=int, default=2048, help="calibration images of methods without a moving average"
    )
    repairing.add_argument("--score-images", type=int, default=10_000)
    repairing.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="limit for the activations of a job; default: none"
    )
    repairing.set_defaults(run=repair)
    tabling.add_argument("--work", type=Path, help="default: write the page from the existing JSON")
    tabling.add_argument("--data", type=Path, default=ROOT / "docs" / "data" / "paper.json")
    tabling.add_argument("--page", type=Path, default=ROOT / "docs" / "paper.md")
    tabling.set_defaults(run=table)
    arguments = parser.parse_args(command)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
