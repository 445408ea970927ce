"""What bounds `refit`: operations and bytes of every part of it, against the peaks of one core of this machine.

    python -m tools.bench.roofline [--nets resnet20 resnet50@224] [--images N] [--sparsity 0.9] [--markdown PAGE]

Every part is timed in processor seconds on one thread, without the parts within it. "GFLOP" counts additions and
multiplications as the shapes imply them, with two for each product of a matrix product; those of onnxruntime are the
convolutions and matrix products of the dense and of the pruned network. "GB" is what has to be moved at least: every
operand once per call. Peaks are the fastest of several products of two 2,048 x 2,048 float32 matrices, and of copies
of 256 MB. "at best" is the time at these peaks, the larger of the two; "bound" says which. --markdown replaces the
tables between the marks in a page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import onnx_asr
from onnx_asr.engine.session import Runtime, Session
from onnx_asr.graph.index import GraphIndex
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.operations import Operations, Probe
from onnx_asr.networks.samples import input_specs
from onnx_asr.numerics.few_rows import RowBlock
from onnx_asr.numerics.rows import Inputs, Targets
from onnx_asr.numerics.systems import Cholesky, ConjugateGradients, GramSystem
from onnx_asr.numerics.workers import one_thread_per_product
from onnx_asr.repairing.rows import RowSampler
from tools.arguments import script_parser
from tools.bench.speed import IMAGES, network, random_images

BEGIN, END = "<!-- roofline: written by `python -m tools.bench.roofline` -->", "<!-- end of roofline -->"
PARTS = (
    "onnxruntime",
    "loading sessions",
    "sampling rows",
    "Gram matrices",
    "factors",
    "solutions by factors",
    "conjugate gradients",
    "targets",
    "row space",
    "the rest",
)


@dataclass
class Part:
    """Processor seconds, operations and bytes of one part."""

    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass
class Meter:
    """Parts of the work, each without those within it."""

    parts: dict[str, Part] = field(default_factory=lambda: {name: Part() for name in PARTS})
    _open: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self, name: str) -> Iterator[Part]:
        """Add a block to a part."""
        begun = time.process_time()
        self._open.append(0.0)
        try:
            yield self.parts[name]
        finally:
            whole = time.process_time() - begun
            self.parts[name].seconds += whole - self._open.pop()
            if self._open:
                self._open[-1] += whole

    def watch(self, owner: type, method: str, name: str, count: Callable[..., tuple[float, float]] | None) -> Any:
        """Have every call of a method added to a part, with the operations and bytes that `count` gives after it."""
        original = getattr(owner, method)

        def watched(*args: Any, **options: Any) -> Any:
            with self.timed(name) as part:
                result = original(*args, **options)
            if count is not None:
                flops, moved = count(*args)
                part.flops += flops
                part.bytes += moved
            return result

        return patch.object(owner, method, watched)


def peaks() -> tuple[float, float]:
    """GFLOP/s of float32 products and GB/s of copies, on one core."""
    left, right = np.random.default_rng(0).standard_normal((2, 2048, 2048), np.float32)
    product, source = np.empty_like(left), np.ones(2**26, np.float32)
    target = np.empty_like(source)
    multiplied = copied = 0.0
    for _ in range(8):
        begun = time.process_time()
        np.matmul(left, right, out=product)
        middle = time.process_time()
        np.copyto(target, source)
        multiplied = max(multiplied, 2 * 2048**3 / (middle - begun) / 1e9)
        copied = max(copied, 2 * source.nbytes / (time.process_time() - middle) / 1e9)
    return multiplied, copied


def _centring(inputs: Inputs, *_: Any) -> tuple[float, float]:
    values = float(np.prod(inputs.shape))
    return 3 * values, 3 * 4 * values


def _gram(inputs: Inputs) -> tuple[float, float]:
    rows, groups, size = inputs.shape
    return groups * rows * size * (size + 1), groups * (4 * rows * size + 8 * size**2)


def _factors(solver: Cholesky, system: GramSystem, mask: Any, vectors: Any) -> tuple[float, float]:
    sizes = mask.sum(axis=-1, dtype=np.float64)
    return float((sizes**3 / 3 + 2 * sizes**2).sum()), float((8 * sizes**2).sum())


def _by_factors(solver: Cholesky, load: Any, tolerance: float) -> tuple[float, float]:
    sizes = np.array([len(factor.support) for piece in solver._pieces for factor in piece], np.float64)
    return float((2 * sizes**2).sum()), float((4 * sizes**2).sum())


def _fitting(targets: Targets, target_of: Any, shift: Any) -> tuple[float, float]:
    rows, _, size = targets.inputs.shape
    outputs = targets.target.shape[1] * targets.target.shape[2]
    return 2.0 * rows * size * outputs, 4.0 * rows * (targets.target.shape[1] * size + outputs)


def _predicting(targets: Targets, *_: Any) -> tuple[float, float]:
    flops, moved = _fitting(targets, None, None)
    return flops, moved - 4.0 * float(np.prod(targets.inputs.shape))  # the inputs are at hand


def _error(targets: Targets, *_: Any) -> tuple[float, float]:
    flops, moved = _fitting(targets, None, None)
    return flops / 8, moved / 8


def _row_space(block: RowBlock, space: Any, targets: Targets, start: Any, mask: Any) -> tuple[float, float]:
    rows, kept = space.columns.shape[-1], float(mask.sum(dtype=np.float64))
    outputs = mask.shape[0] * mask.shape[1]
    flops = rows**2 * kept + outputs * rows**3 / 3 + 6.0 * rows * mask.size
    return flops, 4 * (rows * kept + outputs * rows**2 + 3.0 * mask.size)


def _sampling(sampler: RowSampler, *_: Any) -> tuple[float, float]:
    if not sampler.is_held:
        return 0.0, 0.0
    return 0.0, 2 * sampler.inputs.nbytes / sampler._seen  # of one chunk among those so far


def measured(net: str, count: int, sparsity: float) -> tuple[Meter, float]:
    """One refit of a net on random images: its parts, and the operations of one plain pass."""
    dense = network(net)
    pruned = onnx_asr.prune(dense, options=onnx_asr.PruneOptions(sparsity)).model
    images = random_images(dense, count)
    index = GraphIndex.of(dense)
    (spec,) = input_specs(index)
    one = Operations.of(index, Probe({spec.name: (1, *images.shape[1:])}, Runtime(threads=1))).total
    meter = Meter()
    gradients = meter.parts["conjugate gradients"]
    single = GramSystem.single

    def counted(system: GramSystem, group: int) -> Callable[[Any], Any]:
        multiply = single(system, group)

        def product(vectors: Any) -> Any:
            gradients.flops += 2.0 * vectors.shape[0] * vectors.shape[1] ** 2
            gradients.bytes += 4.0 * (vectors.shape[1] ** 2 + 2 * vectors.size)
            return multiply(vectors)

        return product

    watched = [
        meter.watch(Session, "run", "onnxruntime", None),
        meter.watch(Session, "__init__", "loading sessions", None),
        meter.watch(RowSampler, "add", "sampling rows", _sampling),
        meter.watch(RowSampler, "take", "sampling rows", None),
        meter.watch(Inputs, "__init__", "Gram matrices", _centring),
        meter.watch(Inputs, "gram", "Gram matrices", _gram),
        meter.watch(Cholesky, "__init__", "factors", _factors),
        meter.watch(Cholesky, "solve", "solutions by factors", _by_factors),
        meter.watch(ConjugateGradients, "solve", "conjugate gradients", None),
        meter.watch(ConjugateGradients, "__init__", "conjugate gradients", None),
        meter.watch(Targets, "_fit", "targets", _fitting),
        meter.watch(Targets, "visible_fit", "targets", _predicting),
        meter.watch(Targets, "class_fit", "targets", _predicting),
        meter.watch(Targets, "error", "targets", _error),
        meter.watch(RowBlock, "__init__", "row space", _row_space),
        meter.watch(RowBlock, "fit", "row space", None),
        meter.watch(RowBlock, "seen", "row space", None),
        patch.object(GramSystem, "single", counted),
    ]
    options = onnx_asr.RepairOptions(method="refit", samples=count, verify_samples=0)
    execution = Execution(Runtime(threads=1))
    for item in watched:
        item.start()
    try:
        with meter.timed("the rest"):
            onnx_asr.repair(pruned, images, options, dense=dense, execution=execution)
    finally:
        for item in watched:
            item.stop()
    meter.parts["onnxruntime"].flops = 2.0 * one * count
    return meter, float(one * count)


def table(net: str, count: int, sparsity: float, peak: tuple[float, float]) -> list[str]:
    """The parts of one refit as a table."""
    meter, plain = measured(net, count, sparsity)
    total = sum(part.seconds for part in meter.parts.values())
    lines = [
        f"**{net}**, {count} images, {100 * sparsity:g}%: {total:.1f} s; one plain pass has {plain / 1e9:,.0f} GFLOP",
        "",
        "| part | s | share | GFLOP | GFLOP/s | of peak | GB | GB/s | at best s | bound |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    best = 0.0
    for name, part in meter.parts.items():
        if part.seconds < 0.005 * total:
            continue
        times = part.flops / peak[0] / 1e9, part.bytes / peak[1] / 1e9
        best += max(times) or part.seconds
        row = [name, f"{part.seconds:.2f}", f"{100 * part.seconds / total:.0f}%"]
        if part.flops:
            rate = part.flops / part.seconds / 1e9
            row += [f"{part.flops / 1e9:,.1f}", f"{rate:.0f}", f"{100 * rate / peak[0]:.0f}%"]
        else:
            row += ["-"] * 3
        row += [f"{part.bytes / 1e9:.1f}", f"{part.bytes / part.seconds / 1e9:.1f}"] if part.bytes else ["-"] * 2
        bound = "-" if not any(times) else "operations" if times[0] >= times[1] else "memory"
        lines.append(f"| {' | '.join([*row, f'{max(times):.2f}' if any(times) else '-', bound])} |")
    return [
        *lines,
        "",
        f"At the peaks these parts would take {best:.1f} s; those without figures count as they are.",
        "",
    ]


def page_with(text: str, lines: list[str]) -> str:
    """A page with other tables between the marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *lines, END]) + after


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--nets", nargs="+", default=["resnet20", "resnet50@224"], choices=list(IMAGES))
    parser.add_argument("--images", type=int, help="images per net; default: by net")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--markdown", type=Path, help="page whose tables are replaced")
    arguments = parser.parse_args()
    with one_thread_per_product():
        peak = peaks()
        lines = [f"Peaks of one core: {peak[0]:.0f} GFLOP/s (float32 products), {peak[1]:.1f} GB/s (copies).", ""]
        for net in arguments.nets:
            lines += table(net, arguments.images or IMAGES[net], arguments.sparsity, peak)
    print("\n".join(lines))
    if arguments.markdown:
        page: Path = arguments.markdown
        page.write_text(page_with(page.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main()
