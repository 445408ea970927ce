"""Average precision of detectors that were pruned and repaired: the nets and COCO images of ../shared/assets.

    python -m tools.bench.detectors measure --work W    # every cell that W does not have
    python -m tools.bench.detectors table --work W      # docs/data/detectors.json, and the table of docs/accuracy.md
    python -m tools.bench.detectors measure --work W --nets fastestdet --sparsities 0.5 --methods none refit

Pruning is by global magnitude to a share of zeros, or N:M. Calibration and verification draw from the 128 images of
train2017, without their boxes; scores are mAP@[.5:.95] and mAP@.5 on the images of val2017, by pycocotools (extra
"coco"). W has a file per cell, NET/SPARSITY METHOD.json, written beside and renamed: a run may be killed at any moment,
and started again it computes what is missing or was made with other settings or from another file. `table` keeps
what the JSON has of cells that W does not have.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

import onnx_asr
from onnx_asr.detectors import DecodingName
from tools.arguments import add_assets, add_threads, script_parser
from tools.bench.methods import method_options, parse_method, recipe_of
from tools.paper.work import done_before, merged_cells, write, write_json
from tools.paths import ROOT

SPARSITIES = ("0.3", "0.5", "0.7", "0.8", "2:4")
METHODS = ("none", "bn", "paired", "refit", "compress")
MARKS = re.compile(r"<!-- table: detectors -->\n.*?<!-- end -->", re.DOTALL)
Cell = dict[str, Any]


@dataclass(frozen=True)
class Detector:
    """A net: its file, its name in the table, and the preset and decoding that it has the name of."""

    file: str
    title: str
    kind: DecodingName


NETS = {
    "yolov5n": Detector("coco/yolov5n_coco_bn_416.onnx", "YOLOv5n", "yolov5"),
    "fastestdet": Detector("coco/fastestdet_coco_bn.onnx", "FastestDet", "fastestdet"),
    "yolox_nano": Detector("graphs/yolox_nano_coco.onnx", "YOLOX-nano (BatchNormalization folded)", "yolox"),
}


@dataclass(frozen=True)
class Bench:
    """A net with its images.

    Attributes:
        net: The net.
        assets: Folder of nets and images.
        images: Number of calibration images.
        held_out: Number of images to verify on.
        score_images: Number of images to score on; None for all.
        threads: Threads per operator; 0 for every core.
    """

    net: Detector
    assets: Path
    images: int
    held_out: int
    score_images: int | None
    threads: int

    def settings(self) -> Cell:
        """What a cell depends on, besides its own name."""
        digest = hashlib.sha256((self.assets / self.net.file).read_bytes()).hexdigest()
        keys = {"images": self.images, "held_out": self.held_out, "score_images": self.score_images}
        return {"dense": digest, **keys, "version": onnx_asr.__version__}

    @property
    def execution(self) -> onnx_asr.Execution:
        """How models run."""
        return onnx_asr.Execution(onnx_asr.Runtime(threads=self.threads))

    def made(self, sparsity: str, method: str) -> onnx.ModelProto:
        """The net, pruned, and repaired by a method.

        Raises:
            OptionError: The method does not apply to this net.
        """
        dense = onnx.load(self.assets / self.net.file)
        goal: dict[str, Any] = {"pattern": sparsity} if ":" in sparsity else {"sparsity": float(sparsity)}
        data = self.assets / "coco" / "train2017"
        shared: dict[str, Any] = {"preprocessing": onnx_asr.PRESETS[self.net.kind], "execution": self.execution}
        counts: dict[str, Any] = {"samples": self.images, "verify_samples": self.held_out}
        name, overrides = parse_method(method)
        if name == "compress":
            repair = onnx_asr.RepairOptions(**counts, refit=recipe_of(overrides))
            return onnx_asr.compress(
                dense, data, onnx_asr.CompressOptions(**goal, **overrides, repair=repair), **shared
            ).repair.model
        pruned = onnx_asr.prune(dense, options=onnx_asr.PruneOptions(**goal)).model
        if name == "none":
            return pruned
        return onnx_asr.repair(pruned, data, method_options(method, **counts), dense=dense, **shared).model

    def scored(self, model: onnx.ModelProto) -> Cell:
        """Average precision of a model, in percent."""
        folder = self.assets / "coco"
        found = onnx_asr.evaluate(
            model,
            folder / "val2017",
            preprocessing=onnx_asr.PRESETS[self.net.kind],
            samples=self.score_images,
            detector=onnx_asr.DetectorOptions(folder / "instances_val2017_328.json", self.net.kind),
            execution=self.execution,
        )
        assert found.mean_ap is not None
        assert found.mean_ap50 is not None
        return {"mean_ap": 100 * found.mean_ap, "mean_ap50": 100 * found.mean_ap50, "scored": found.samples}

    def cell(self, sparsity: str, method: str) -> Cell:
        """One measured cell; without a precision where the method does not apply."""
        started = time.perf_counter()
        try:
            model = onnx.load(self.assets / self.net.file) if method == "dense" else self.made(sparsity, method)
        except onnx_asr.OptionError as error:  # such as bn on a folded net
            return {"mean_ap": None, "mean_ap50": None, "refused": str(error)}
        seconds = time.perf_counter() - started
        return {**self.scored(model), "seconds": round(seconds, 1)}


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Sparsity and method of every cell, the dense net first."""
    yield "0", "dense"
    yield from ((sparsity, method) for sparsity in arguments.sparsities for method in arguments.methods)


def measure(arguments: argparse.Namespace) -> None:
    """Compute the cells that are missing."""
    for name in arguments.nets:
        bench = Bench(
            NETS[name],
            arguments.assets,
            arguments.images,
            arguments.held_out,
            arguments.score_images,
            arguments.threads,
        )
        settings = bench.settings()
        for sparsity, method in cells(arguments):
            path = arguments.work / name / f"{sparsity} {method}.json".replace(":", "-")
            if done_before(path, settings):
                continue
            cell = bench.cell(sparsity, method)
            key = {"net": name, "sparsity": sparsity, "method": method}
            write_json(path, {**key, **cell, "settings": settings})
            print(f"{name} {sparsity} {method}: {cell}", flush=True)


def table(arguments: argparse.Namespace) -> None:
    """Write the JSON from the cells, and the table of the page from the JSON."""
    known = merged_cells(arguments.data, arguments.work, key_of)
    page = arguments.page.read_text(encoding="utf-8")
    if MARKS.search(page) is None:
        raise SystemExit(f"{arguments.page} has no '<!-- table: detectors -->' with an '<!-- end -->': add them")
    text = f"<!-- table: detectors -->\n{tabulated(list(known.values()))}\n<!-- end -->"
    write(arguments.page, MARKS.sub(lambda found: text, page).encode())


def key_of(cell: Cell) -> str:
    return f"{cell['net']} {cell['sparsity']} {cell['method']}"


def tabulated(found: Sequence[Cell]) -> str:
    """One row per net and method, one column per sparsity: mAP@[.5:.95] (mAP@.5) in percent."""
    by_key = {key_of(cell): cell for cell in found}
    sparsities = sorted({cell["sparsity"] for cell in found} - {"0"}, key=lambda text: (":" in text, text))
    heads = [text if ":" in text else f"{100 * float(text):g}%" for text in sparsities]
    lines = [f"| net (dense) | method | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]

    def shown(key: str) -> str:
        cell = by_key.get(key)
        if cell is None or cell["mean_ap"] is None:
            return "-"
        return f"{cell['mean_ap']:.1f} ({cell['mean_ap50']:.1f})"

    for name, net in NETS.items():
        measured = [cell["method"] for cell in found if cell["net"] == name and cell["mean_ap"] is not None]
        order = sorted(set(measured) - {"dense"}, key=lambda method: (METHODS.index(parse_method(method)[0]), method))
        for number, method in enumerate(order):
            title = f"{net.title}, {shown(f'{name} 0 dense')}" if number == 0 else ""
            row = (shown(f"{name} {sparsity} {method}") for sparsity in sparsities)
            lines.append(f"| {title} | {method if method == 'none' else f'`{method}`'} | {' | '.join(row)} |")
    return "\n".join(lines)


def main(command: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="prune, repair and score: the cells that are missing")
    measuring.add_argument("--work", type=Path, required=True, help="folder for the finished cells")
    measuring.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    measuring.add_argument("--sparsities", nargs="+", default=SPARSITIES, help="shares of zeros, or N:M")
    measuring.add_argument("--methods", nargs="+", default=METHODS, help="such as refit, or compress:rounds=8")
    measuring.add_argument("--images", type=int, default=96, help="calibration images")
    measuring.add_argument("--held-out", type=int, default=32, help="images to verify on")
    measuring.add_argument("--score-images", type=int, help="images to score on; default: all 328")
    add_assets(measuring)
    add_threads(measuring, default=1)
    measuring.set_defaults(run=measure)
    tabling = commands.add_parser("table", help="write the JSON and the page's table")
    tabling.add_argument("--work", type=Path, help="default: write the page from the existing JSON")
    tabling.add_argument("--data", type=Path, default=ROOT / "docs" / "data" / "detectors.json")
    tabling.add_argument("--page", type=Path, default=ROOT / "docs" / "accuracy.md")
    tabling.set_defaults(run=table)
    arguments = parser.parse_args(command)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
