"""SHA-256 of every model that the commands write, to show that a change of the code left all results as they were.

    python -m tools.check.model_digests --tool .venv-test/bin/onnx-resuscitate -o after.json
    python -m tools.check.model_digests --tool ../before/.venv-test/bin/onnx-resuscitate -o before.json
    python -m tools.check.model_digests --compare before.json after.json

The four embedded nets, and the CIFAR nets of ../shared/assets where that folder exists, go through `prune`, `repair` by
every method, `compress`, `prune --pattern channel` with a `repair` after it, and `shrink`. `metadata_props` are set
aside; everything else in the file counts, doc strings of nodes included.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import onnx

from tools.arguments import script_parser
from tools.paths import ASSETS, MODELS

SHARED_NETS = {
    "resnet20": ("--scale", "0.00392156862745098", "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"),
    "resnet56_bn3_l1sparse": (
        *("--scale", "0.00392156862745098"),
        *("--mean", "0.4914,0.4822,0.4465", "--std", "0.2023,0.1994,0.2010"),
    ),
    "resnet8_mlperftiny_tf2onnx": ("--preset", "raw"),
}


@dataclass(frozen=True)
class Net:
    """A dense model, and the options that say which images it is fed with and how."""

    name: str
    path: Path
    images: tuple[str, ...]

    @property
    def data(self) -> tuple[str, ...]:
        """Options of commands that also verify."""
        return (*self.images, "--verify-samples", "64")

    @property
    def has_batchnorm(self) -> bool:
        """Return whether methods that re-estimate BatchNormalization can run."""
        return any(node.op_type == "BatchNormalization" for node in onnx.load(self.path).graph.node)


def nets() -> Iterator[Net]:
    """The embedded nets, then the shared ones."""
    samples = ("--samples", "128")
    embedded = ("--data", str(MODELS / "data/digits_calibration"), "--preset", "digits", *samples)
    for path in sorted(MODELS.glob("*.onnx")):
        yield Net(path.stem, path, embedded)
    if ASSETS.exists():
        images = ("--data", str(ASSETS / "data/cifar10_train4k_lossless.npz"), *samples)
        for name, preprocessing in SHARED_NETS.items():
            for graph in ("bn", "folded"):
                yield Net(f"{name}_{graph}", ASSETS / f"cifar10/{name}_{graph}.onnx", (*images, *preprocessing))


def repairs(net: Net) -> dict[str, tuple[str, ...]]:
    """Options of every repair, by name."""
    methods = {"auto": (), "refit": (), "paired": (), "paired-rho": ("--reliability-power", "0.25")}
    if net.has_batchnorm:
        methods |= {"asr": (), "layerwise": (), "raw": (), "bn": ()}
        methods |= {"asr-ema": ("--bn", "ema", "--ema-batches", "4", "--ema-batch-size", "32")}
    return {name: ("--method", name.split("-")[0], *more) for name, more in methods.items()}


def digests(tool: str, net: Net, folder: Path) -> dict[str, str]:
    """Digest of the model that each command writes for a net, by the command's name; "refused" if it writes none."""
    found: dict[str, str] = {}

    def made(name: str, *arguments: str) -> Path:
        path = folder / f"{net.name}.{name}.onnx"
        result = subprocess.run(
            [tool, *arguments, "-o", str(path), "--quiet", "--threads", "1"], capture_output=True, text=True
        )
        if path.exists():
            model = onnx.load(path)
            del model.metadata_props[:]
            found[f"{net.name} {name}"] = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
        else:
            found[f"{net.name} {name}"] = "refused"
            print(f"{net.name} {name}: {result.stderr.strip()}", file=sys.stderr)
        return path

    dense = str(net.path)
    pair = ("--dense", dense, *net.data, "--force")
    pruned = made("prune", "prune", dense, "--sparsity", "0.8")
    for name, more in repairs(net).items():
        made(f"repair {name}", "repair", str(pruned), *pair, *more)
    for pattern in ("2:4", "4x1"):
        share = () if pattern == "2:4" else ("--sparsity", "0.5")
        path = made(f"prune {pattern}", "prune", dense, "--pattern", pattern, *share)
        made(f"repair {pattern}", "repair", str(path), *pair, "--method", "refit")
    made("prune gram", "prune", dense, "--sparsity", "0.7", "--score", "gram", "--scope", "erk", *net.images)
    made("compress", "compress", dense, *net.data, "--sparsity", "0.9", "--rounds", "3", "--force")
    made("compress 2:4", "compress", dense, *net.data, "--pattern", "2:4", "--force")
    smaller = made("prune channel", "prune", dense, "--pattern", "channel", "--sparsity", "0.3")
    for method in ("refit", "paired"):
        made(f"repair channel {method}", "repair", str(smaller), *pair, "--method", method)
    empty = made("prune rows", "prune", dense, "--pattern", "4x1", "--sparsity", "0.9")
    made("shrink", "shrink", str(empty))
    return found


def compare(first: Path, second: Path) -> int:
    """Print the differences; return the exit code."""
    before, after = (json.loads(path.read_text()) for path in (first, second))
    differing = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    written = sum(value != "refused" for value in before.values())
    print(f"{len(before)} models ({written} written), {len(differing)} differ")
    for name in differing:
        print(f"  {name}: {before.get(name, 'missing')[:12]} {after.get(name, 'missing')[:12]}")
    return int(bool(differing))


def main() -> int:
    """Write digests, or compare two files of them."""
    parser = script_parser(__doc__)
    parser.add_argument("--tool", default="onnx-resuscitate", help="the console script to run")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--nets", nargs="*", default=[], help="names of nets; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="nets processed at a time")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="compare two such files")
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare)
    if options.output is None:
        parser.error("give -o FILE, or --compare BEFORE AFTER")
    chosen = [net for net in nets() if not options.nets or net.name in options.nets]
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(lambda net: digests(options.tool, net, Path(folder)), chosen):
            found |= result
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} models, {sum(value == 'refused' for value in found.values())} refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
