"""The experiment of the ASR paper with this tool: its four architectures, its grid on CIFAR-10, its tables.

    python tools/reproduce_paper.py train  --work W     # needs torch: pip install -r tools/requirements-paper.txt
    python tools/reproduce_paper.py repair --work W     # the package's public API alone, no torch
    python tools/reproduce_paper.py table  --work W     # docs/data/paper.json, and the tables of docs/paper.md from it

`train` is at full size and on a GPU unless told otherwise: 30 epochs in mixed precision, each net a step of its own
(`--nets resnet50`). `repair` prunes every net of W to 50, 70, 90% and 2:4, and repairs each with

    none                                 pruning alone
    bn, layerwise, raw, asr              gains from 64 images; BatchNormalization re-estimated by a moving average
                                         (momentum 0.1) of b batches of 128 images, and exactly
    paired, refit, auto                  what this tool does instead
    asr with other priors, no shift      the paper's ablation: its net, its sparsity, b = 20

and scores the outcome on test images; `bn` goes over the unpruned net, too. On a CPU, at reduced width:

    python tools/reproduce_paper.py train  --work W --device cpu --width 0.25 --epochs 3 --batch 128
    python tools/reproduce_paper.py repair --work W --images 1024 --score-images 1000

W keeps everything: the images as arrays, a trained net as NET.onnx with NET.json (which also say all that `repair` asks
of a net from elsewhere), a finished cell of the grid as cells/NET/CELL.json. Files are written beside and renamed, so a
run may be killed at any moment; started again it does what is missing or was made with other settings.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import paper_tables
from numpy.typing import NDArray
from PIL import Image

import onnx_asr
from onnx_asr import RepairOptions

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT.parent / "shared" / "assets" / "data" / "cifar10_jpeg.tar.xz"
NETS = ("resnet18", "resnet50", "densenet121", "vgg16")
PRESET = "cifar10"
SPARSITIES = ("0.5", "0.7", "0.9", "2:4")
BATCHES = (10, 20, 30, 50)
BATCH, GAIN_SAMPLES, HELD_OUT = 128, 64, 256
PAPER_METHODS = ("bn", "layerwise", "raw", "asr")
OWN_METHODS = ("paired", "refit", "auto")
METHODS = ("none", *PAPER_METHODS, *OWN_METHODS)
DAMAGE_SAMPLES = 512
FIXED_PRIOR = 1.0


@dataclass(frozen=True)
class Images:
    """uint8 pixels [N, H, W, C] and classes [N], in an order that mixes the classes."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def head(self, count: int) -> Images:
        """The first ones.

        Raises:
            SystemExit: When there are not as many.
        """
        if count > len(self.labels):
            raise SystemExit(f"{count} images were asked for, and there are {len(self.labels)}: ask for fewer")
        return Images(self.pixels[:count], self.labels[:count])


@dataclass(frozen=True)
class Work:
    """The folder that keeps what is done."""

    folder: Path

    def net(self, name: str) -> Path:
        """A trained net."""
        return self.folder / f"{name}.onnx"

    def record(self, name: str) -> Path:
        """How it was trained, and to what accuracy."""
        return self.folder / f"{name}.json"

    def cell(self, net: str, sparsity: str, name: str) -> Path:
        """One cell of the grid."""
        return self.folder / "cells" / net / f"{sparsity} {name}.json".replace(":", "-")

    def nets(self) -> list[str]:
        """The nets that are there, the paper's in its order."""
        found = {path.stem for path in self.folder.glob("*.onnx")} & {path.stem for path in self.folder.glob("*.json")}
        return [name for name in NETS if name in found] + sorted(found - set(NETS))

    def images(self, part: str, archive: Path) -> Images:
        """One part of the images ("train", "test"); the archive is read the first time only."""
        path = self.folder / f"{part}.npz"
        if not path.exists():
            images = unpack(archive, part)
            content = io.BytesIO()
            np.savez(content, images=images.pixels, labels=images.labels)
            write(path, content.getvalue())
        with np.load(path) as arrays:
            return Images(arrays["images"], arrays["labels"])


def write(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_bytes(content)
    beside.replace(path)


def write_json(path: Path, value: Any) -> None:
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """What a file holds; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def done_before(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a record is there that was made with these settings."""
    record = read_json(path)
    return record is not None and record["settings"] == json.loads(json.dumps(settings))


def unpack(archive: Path, part: str) -> Images:
    """One part of an archive PART/CLASS/*.jpg, shuffled; classes are numbered by name."""
    if not archive.exists():
        raise SystemExit(f"{archive} is missing: name an archive of CIFAR-10 (PART/CLASS/*.jpg) with --archive")
    found: dict[tuple[str, str], NDArray[np.uint8]] = {}
    with tarfile.open(archive) as files:
        for member in files:
            name = Path(member.name)
            content = files.extractfile(member)
            if content is not None and name.parts[0] == part:
                found[name.parent.name, name.name] = np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB"))
    names = sorted(found)
    classes = sorted({label for label, _ in names})
    order = np.random.default_rng(0).permutation(len(names))
    pixels = np.stack([found[name] for name in names])
    return Images(pixels[order], np.array([classes.index(label) for label, _ in names])[order])


def train(arguments: argparse.Namespace) -> None:
    """Train and export the nets that are not there yet."""
    import paper_nets  # needs torch

    work = Work(arguments.work)
    recipe = paper_nets.Recipe(
        arguments.width, arguments.epochs, arguments.batch, arguments.seed, arguments.device, arguments.bf16
    )
    preprocessing = onnx_asr.Preprocessing.from_options(preset=PRESET)
    normalize = paper_nets.Normalization(preprocessing.mean, preprocessing.std)
    paper_nets.use_threads(arguments.threads)
    for name in arguments.nets:
        settings = {"images": arguments.images, **asdict(recipe)}
        if done_before(work.record(name), settings):
            print(f"{name}: trained before", flush=True)
            continue
        images = work.images("train", arguments.archive).head(arguments.images)
        test = work.images("test", arguments.archive)
        started = time.perf_counter()
        net = paper_nets.train(name, images.pixels, images.labels, normalize, recipe)
        seconds = time.perf_counter() - started
        top1 = paper_nets.top1(net, test.pixels, test.labels, normalize)
        work.record(name).unlink(missing_ok=True)  # the net that is there, if any, is about to go
        write(work.net(name), paper_nets.exported(net).SerializeToString())
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


def methods(net: str, sparsity: str, batches: Sequence[int], images: int) -> dict[str, RepairOptions | None]:
    """The repairs of one pruned net by name, METHOD:BATCHES or METHOD:exact or METHOD; None for no repair."""
    found: dict[str, RepairOptions | None] = {"none": None}

    def ema(method: Any, count: int, **others: Any) -> RepairOptions:
        return RepairOptions(
            method=method,
            bn="ema",
            ema_batches=count,
            ema_batch_size=BATCH,
            samples=count * BATCH,
            gain_samples=GAIN_SAMPLES,
            verify_samples=0,
            **others,
        )

    for method in OWN_METHODS:  # auto holds images out of those that it is given
        held_out = HELD_OUT if method == "auto" else 0
        found[method] = RepairOptions(method=method, samples=images, verify_samples=held_out)
    for method in PAPER_METHODS:
        found |= {f"{method}:{count}": ema(method, count) for count in batches}
        found[f"{method}:exact"] = RepairOptions(
            method=method, samples=images, gain_samples=GAIN_SAMPLES, verify_samples=0
        )
    if (net, sparsity) == paper_tables.ABLATION and paper_tables.MAIN_BATCHES in batches:
        for name, others in ablation().items():
            found[name] = ema(name.split(":")[0], paper_tables.MAIN_BATCHES, **others)
    return found


def ablation() -> dict[str, dict[str, Any]]:
    """Priors and bias correction of Table 2, but for those that the grid has anyway."""
    priors: dict[str, Any] = {"": "median", ",mean": "mean", ",fixed": FIXED_PRIOR}
    found: dict[str, dict[str, Any]] = {}
    for text, prior in priors.items():
        for end, correction in (("", True), (",no shift", False)):
            if (text, end) != ("", ""):
                found[f"asr:{paper_tables.MAIN_BATCHES}{text}{end}"] = {"prior": prior, "bias_correction": correction}
    for method in ("layerwise", "raw"):
        found[f"{method}:{paper_tables.MAIN_BATCHES},no shift"] = {"bias_correction": False}
    return found


@dataclass(frozen=True)
class Bench:
    """One net with all that its cells need."""

    work: Work
    name: str
    calibration: NDArray[np.uint8]
    scored: Images
    threads: int

    @cached_property
    def dense(self) -> onnx.ModelProto:
        """The net."""
        return onnx.load(self.work.net(self.name))

    @cached_property
    def digest(self) -> str:
        """Of the net's file: cells of a net that was trained anew are not those of the old one."""
        return hashlib.sha256(self.work.net(self.name).read_bytes()).hexdigest()

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What every repair is given."""
        preset = read_json(self.work.record(self.name))["preset"]
        return {"preprocessing": onnx_asr.Preprocessing.from_options(preset=preset)}

    @property
    def execution(self) -> onnx_asr.Execution:
        """How networks run."""
        return onnx_asr.Execution(onnx_asr.Runtime(threads=self.threads))

    def top1(self, model: onnx.ModelProto) -> float:
        """Share of the scored images that a model classifies rightly."""
        data, labels = {"images": self.scored.pixels}, self.scored.labels
        runtime = self.execution.runtime
        measured = onnx_asr.evaluate(model, data, labels=labels, runtime=runtime, **self.arguments)
        assert measured.top1 is not None
        return measured.top1

    def finish(self, sparsity: str, name: str, settings: dict[str, Any], compute: Any) -> None:
        """Compute a cell and keep it, unless that was done."""
        path = self.work.cell(self.name, sparsity, name)
        settings = {"dense": self.digest, **settings}
        if done_before(path, settings):
            return
        started = time.perf_counter()
        values = compute()
        seconds = round(time.perf_counter() - started, 2)
        write_json(
            path,
            {"net": self.name, "sparsity": sparsity, "name": name, **values, "seconds": seconds, "settings": settings},
        )
        print(f"{self.name} {sparsity} {name}: {values} {seconds:.0f} s", flush=True)

    def repaired(self, pruned: onnx.ModelProto, options: RepairOptions | None) -> dict[str, Any]:
        """Top-1 after a repair, and the method where `auto` chose it."""
        if options is None:
            return {"top1": self.top1(pruned)}
        count = options.samples + options.verify_samples
        result = onnx_asr.repair(
            pruned,
            {"images": self.calibration[:count]},
            dense=self.dense,
            options=options,
            execution=self.execution,
            **self.arguments,
        )
        chosen = {"chosen": result.options.method} if options.method == "auto" else {}
        return {"top1": self.top1(result.model), **chosen}

    def damage(self, pruned: onnx.ModelProto) -> dict[str, Any]:
        """What pruning did to the channels of all convolutions but the first, on average over the channels.

        `severity` is the share of the dense network's variance that is missing, 1 - min(1, v_p / v_d); `collapsed` of
        the channels have less than a hundredth of it.
        """
        data = {"images": self.calibration[:DAMAGE_SAMPLES]}
        found = onnx_asr.inspect(
            pruned, dense=self.dense, data=data, samples=DAMAGE_SAMPLES, execution=self.execution, **self.arguments
        )
        layers = [layer.damage for layer in found.layers if layer.op_type == "Conv" and layer.damage is not None][1:]
        ratios = np.concatenate([layer.ratio for layer in layers])
        correlations = np.concatenate([layer.correlation for layer in layers])
        known = ~np.isnan(ratios)  # NaN where the dense channel is constant
        return {
            "severity": float((1 - np.minimum(1, ratios[known])).mean()),
            "collapsed": float(np.concatenate([layer.collapsed for layer in layers])[known].mean()),
            "correlation": float(correlations[known].mean()),
        }


def prune(dense: onnx.ModelProto, sparsity: str) -> onnx.ModelProto:
    """Global magnitude pruning to a share of zeros, or N:M."""
    if ":" in sparsity:
        return onnx_asr.prune(dense, pattern=sparsity).model
    return onnx_asr.prune(dense, float(sparsity)).model


def repair(arguments: argparse.Namespace) -> None:
    """Compute the cells that are not there yet."""
    work = Work(arguments.work)
    names = arguments.nets or work.nets()
    if missing := [name for name in names if name not in work.nets()] or ([] if names else ["NET"]):
        raise SystemExit(f"{work.net(missing[0])} with its .json is missing: train it first")
    calibration = work.images("train", arguments.archive).pixels
    scored = work.images("test", arguments.archive).head(arguments.score_images)
    needed = max(arguments.images + HELD_OUT, BATCH * max(arguments.batches))
    if needed > len(calibration):
        raise SystemExit(f"{needed} calibration images are needed, and there are {len(calibration)}: ask for fewer")
    for name in names:
        bench = Bench(work, name, calibration, scored, arguments.threads)
        bench.finish("0", "dense", {"score_images": arguments.score_images}, lambda b=bench: {"top1": b.top1(b.dense)})
        for sparsity in arguments.sparsities:
            pruned = prune(bench.dense, sparsity)
            bench.finish(
                sparsity, "damage", {"samples": DAMAGE_SAMPLES}, lambda b=bench, pruned=pruned: b.damage(pruned)
            )
            fill(bench, sparsity, pruned, arguments.methods, arguments)
        fill(bench, "0", bench.dense, ["bn"], arguments)  # what re-estimation does to a net that needs none


def fill(
    bench: Bench, sparsity: str, pruned: onnx.ModelProto, wanted: Sequence[str], arguments: argparse.Namespace
) -> None:
    """All repairs of one net at one sparsity."""
    for name, options in methods(bench.name, sparsity, arguments.batches, arguments.images).items():
        if name.split(":")[0] in wanted:
            settings = {
                "score_images": arguments.score_images,
                "options": None if options is None else asdict(options),
            }
            bench.finish(sparsity, name, settings, lambda options=options: bench.repaired(pruned, options))


def cells(work: Work) -> Iterator[dict[str, Any]]:
    """All finished cells."""
    for path in sorted(work.folder.glob("cells/*/*.json")):
        yield read_json(path)


def running_variance(model: onnx.ModelProto) -> float:
    """Median over all channels of what the BatchNormalization nodes hold; the moving average begins at 1."""
    values = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    variances = [values[node.input[4]] for node in model.graph.node if node.op_type == "BatchNormalization"]
    return float(np.median(np.concatenate(variances)))


def collected(work: Work) -> dict[str, Any]:
    """Nets and cells in one object.

    Raises:
        SystemExit: When there are none, or they do not belong together.
    """
    found = list(cells(work))
    scored = {cell["settings"]["score_images"] for cell in found if "top1" in cell}
    images = {cell["settings"]["options"]["samples"] for cell in found if cell["name"] in OWN_METHODS}
    if max(len(scored), len(images)) != 1:
        raise SystemExit(
            f"the cells of {work.folder} were calibrated on {sorted(images)} and scored on {sorted(scored)} images: "
            "for one table run `repair` with one --images and one --score-images"
        )
    begun = {cell["net"] for cell in found if cell["name"] == "dense"}
    nets = {
        name: read_json(work.record(name)) | {"running_variance": running_variance(onnx.load(work.net(name)))}
        for name in work.nets()
        if name in begun
    }
    result: dict[str, Any] = {"images": images.pop(), "score_images": scored.pop(), "nets": nets, "cells": {}}
    for cell in found:
        values = {key: cell[key] for key in cell if key not in ("net", "sparsity", "name", "settings")}
        result["cells"].setdefault(cell["net"], {}).setdefault(cell["sparsity"], {})[cell["name"]] = values
    return result


def table(arguments: argparse.Namespace) -> None:
    """Write the JSON from the cells, and the tables of the page from the JSON."""
    page = arguments.page.read_text(encoding="utf-8")
    if arguments.work is not None:
        write_json(arguments.data, collected(Work(arguments.work)))
    write(arguments.page, paper_tables.filled(page, read_json(arguments.data)).encode())


def main(command: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="train and export the nets that are missing")
    repairing = commands.add_parser("repair", help="prune, repair and score: the cells that are missing")
    tabling = commands.add_parser("table", help="write the JSON and the page's tables")
    for part in (training, repairing):
        part.add_argument("--work", type=Path, required=True, help="folder that keeps what is done")
        part.add_argument("--archive", type=Path, default=ARCHIVE, help="CIFAR-10 as PART/CLASS/*.jpg")
        part.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    training.add_argument("--nets", nargs="+", default=NETS, choices=NETS)
    training.add_argument("--width", type=float, default=1.0, help="scales all numbers of channels")
    training.add_argument("--epochs", type=int, default=30)
    training.add_argument("--batch", type=int, default=512)
    training.add_argument("--images", type=int, default=50_000, help="training images")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="cuda")
    training.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="mixed precision")
    training.set_defaults(run=train)
    repairing.add_argument("--nets", nargs="+", help="default: all that were trained")
    repairing.add_argument("--sparsities", nargs="+", default=SPARSITIES, help="shares of zeros, or N:M")
    repairing.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    repairing.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="of the moving average")
    repairing.add_argument("--images", type=int, default=2048, help="calibration images where no batches are counted")
    repairing.add_argument("--score-images", type=int, default=10_000)
    repairing.set_defaults(run=repair)
    tabling.add_argument("--work", type=Path, help="default: write the page from the JSON that is there")
    tabling.add_argument("--data", type=Path, default=ROOT / "docs" / "data" / "paper.json")
    tabling.add_argument("--page", type=Path, default=ROOT / "docs" / "paper.md")
    tabling.set_defaults(run=table)
    arguments = parser.parse_args(command)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
