"""Results as text and tables."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rich.table import Table

from onnx_asr.files.outputs import size_text
from onnx_asr.measuring.bars import measure_of

if TYPE_CHECKING:
    from onnx_asr.demo.pipeline import DemoResult, DemoRow
    from onnx_asr.graph.skips import Skip
    from onnx_asr.measuring.checking import CheckResult, Criterion
    from onnx_asr.measuring.inspection import Inspection, Layer
    from onnx_asr.networks.fidelity import Fidelity
    from onnx_asr.networks.latency import Latency
    from onnx_asr.networks.sparsity import LayerSparsity
    from onnx_asr.pruning.channels import ChannelGroup, ChannelPruneResult
    from onnx_asr.pruning.compression import CompressResult
    from onnx_asr.pruning.sensitivity import SensitivityResult
    from onnx_asr.pruning.shrinking import ShrinkResult
    from onnx_asr.pruning.zeros import PruneResult
    from onnx_asr.repairing.result import PointReport, RepairResult
    from onnx_asr.sweeping.result import SweepResult
    from onnx_asr.targets.packing import FileUse, Packed
    from onnx_asr.targets.usable import LayerUse, TargetUse

T = TypeVar("T")
Column = str | Callable[[T], str]
Shown = Iterator[str | Table]

_FEW = 5  # nodes named per reason without -v
_WIDE = 0.2  # spread of latency ratios that is worth a remark
_LAYER: dict[str, Column[Any]] = {
    "layer": "name",
    "operator": "op_type",
    "shape": lambda layer: " x ".join(map(str, layer.shape or ())),
}
_CONTENTS = _LAYER | {
    ">channels": "channels",
    ">empty": "empty_channels",
    ">sparsity": "sparsity:.1%",
    "pattern": "pattern",
    "repair writes": "writable",
}
_DAMAGE = {
    "layer": "name",
    ">channels": "channels",
    ">sparsity": "sparsity:.1%",
    ">collapsed": "damage.collapsed_share:.1%",
    ">dead": "damage.dead",
    ">median ratio": "damage.median_ratio:.3g",
    ">correlation": "damage.correlation:.2f",
    ">error": "damage.errors.none:.2f",
    ">per layer": "damage.errors.layer:.2f",
    ">per channel": "damage.errors.channel:.2f",
}
_POINTS: dict[str, Column[PointReport]] = {
    "point": "name",
    "operator": "op_type",
    "written": "written",
    ">channels": "channels",
    ">dead": "dead",
    ">gain": lambda point: "" if point.gain is None else f"{point.gain[0]:.3g} .. {point.gain[2]:.3g}",
    ">median": lambda point: "" if point.gain is None else f"{point.gain[1]:.3g}",
    ">output error": lambda point: "{:.3g} -> {:.3g}".format(*point.residual) if point.residual else "",
}
_SCORES = {
    "metric": ("metric, lower is better", "{:.4g}"),
    "top1": ("top-1", "{:.1%}"),
    "top5": ("top-5", "{:.1%}"),
    "agreement": ("agreement", "{:.1%}"),
    "kl": ("KL divergence", "{:.4g}"),
    "detection_error": ("detection error", "{:.3f}"),
    "snr_db": ("output SNR", "{:.1f} dB"),
    "mean_ap": ("mAP@[.5:.95]", "{:.1%}"),
    "mean_ap50": ("mAP@.5", "{:.1%}"),
}
_BARS = {
    **{name: (label, text.replace(".1%", ".2%")) for name, (label, text) in _SCORES.items()},
    "sparsity": ("sparsity", "{:.2%}"),
    "size": ("bytes", "{:,}"),
}


def prune(result: PruneResult | ChannelPruneResult, path: str, verbose: bool, latency: Latency | None) -> Shown:
    """Every layer or group of channels, the nodes skipped, and the cost before and after."""
    from onnx_asr.pruning.zeros import PruneResult

    yield _layers(result.layers) if isinstance(result, PruneResult) else _groups(result.groups, verbose)
    yield from _remarks(result.skips, result.notes, verbose)
    yield from _ending(result, path, latency)


def shrink(result: ShrinkResult, path: str, verbose: bool, latency: Latency | None) -> Shown:
    """Layers that lost channels, and the cost before and after."""
    yield _groups(result.layers, verbose) if result.layers else "no channel can be removed"
    yield from _remarks((), result.notes, verbose)
    yield f"outputs differ by {result.error:.4g} of their size on random input"
    yield from _ending(result, path, latency)


def repair(result: RepairResult, path: str | None, verbose: bool) -> Shown:
    """The candidates, the points rewritten and skipped, and the fidelity before and after."""
    if result.candidates:
        yield _candidates(result)
    yield from _repaired(result, "pruned", "repaired", verbose)
    yield _written(path)


def compress(result: CompressResult, path: str | None, verbose: bool, latency: Latency | None) -> Shown:
    """The zeros, the rounds, the repair, and the fidelity and cost before and after."""
    yield _layers(result.layers)
    seconds = ", ".join(f"{value:.1f}" for value in result.round_seconds)
    rounds = len(result.round_seconds)
    yield f"{rounds} mask {'round' if rounds == 1 else 'rounds'} in {seconds} s"
    yield from _remarks(result.left_dense, (), verbose)
    yield from _repaired(result.repair, "last mask, no repair", "compressed", verbose)
    yield from _ending(result, path, latency)


def inspection(result: Inspection, verbose: bool) -> Shown:
    """The layers and how a repair writes them, or their damage if it was measured; advice and metadata."""
    size, deflated = size_text(result.file_bytes), size_text(result.compressed_bytes)
    yield f"opset {result.opset}, {result.nodes} nodes, inputs {', '.join(result.inputs)}; {size}, deflated {deflated}"
    yield f"BatchNormalization: {result.batchnorm}; weights {result.sparsity:.1%} sparse"
    if result.samples:
        yield _table([layer for layer in result.layers if layer.damage is not None], _DAMAGE)
        collapsed = [layer.name for layer in result.layers if layer.damage and layer.damage.collapsed_share > 0.5]
        first = f", the first is {collapsed[0]}" if collapsed else ""
        yield f"{len(collapsed)} of {len(result.layers)} layers lost most of their channels{first}"
        yield (
            f"measured on {result.samples} samples; collapsed: under a hundredth of the dense variance; error: root "
            "mean square of log10 of the variance ratios, as it is, with one factor per layer, with one per channel"
        )
    elif result.target is None:
        yield _table(result.layers, _CONTENTS)
    if result.target is not None:
        from onnx_asr.targets.usable import TargetUse

        yield from _runtime(result.target) if isinstance(result.target, TargetUse) else _file(result.target)
    yield from _remarks(result.skips, result.notes, verbose)
    yield from result.advice
    for key, value in result.metadata.items():
        yield f"{key}: {value}"


def _runtime(use: TargetUse) -> Shown:
    """Every layer, whether a runtime makes use of its zeros, and why not; shares of FLOPs, conditions, sources."""
    columns: dict[str, Column[LayerUse]] = _LAYER | {
        ">sparsity": "sparsity:.1%",
        "zeros used": "use",
        "because of": lambda layer: ", ".join(obstacle.code for obstacle in layer.obstacles),
    }
    yield _table(use.layers, columns)
    numbers = {source: number for number, source in enumerate(use.sources, 1)}
    met = Counter(obstacle for layer in use.layers for obstacle in layer.obstacles)
    for obstacle, count in met.items():
        marks = "".join(f"[{numbers[source]}]" for source in obstacle.sources)
        yield f"{obstacle.code} ({count} {'layer' if count == 1 else 'layers'}): {obstacle.text} {marks}"
    if use.unknown is not None:
        yield f"note: FLOPs are unknown: {use.unknown}"
    else:
        cures = {obstacle.cure for obstacle in met if obstacle.cure is not None}
        ways = {"zeros": "with other zeros", "quantization": "quantized"}
        how = " and ".join(words for cure, words in ways.items() if cure in cures) or "at most"
        yes, perhaps, possible = (
            f"{share or 0:.1%}" for share in (use.shares["yes"], use.shares["perhaps"], use.possible_share)
        )
        yield (
            f"{yes} of the FLOPs are in layers whose zeros {use.title} makes use of, {perhaps} in those where it may; "
            f"{how} it could be {possible}"
        )
    yield f"{use.title} needs {'; '.join(use.needs)}"
    yield f"by: {use.checked}; nothing was run"
    for source, number in numbers.items():
        yield f"[{number}] {source.title}: {source.url}"


def _file(use: FileUse) -> Shown:
    """Every weight in each form that a file can have it in."""
    forms = ("stored", "gzip", *(("brotli",) if use.has_brotli else ()), "sparse")
    columns: dict[str, Column[Packed]] = {
        "weight": "name",
        "shape": lambda weight: " x ".join(map(str, weight.shape)),
        ">sparsity": "sparsity:.1%",
        **{f">{form}": f"{form}:," for form in forms},
        "smallest": "smallest",
    }
    table = _table(use.weights, columns)
    table.add_section()
    table.add_row("all", "", "", *(f"{getattr(use, form):,}" for form in forms), "")
    yield table
    yield (
        f"bytes; sparse: as a sparse initializer, 8 bytes more for each weight that is not zero; with those where they "
        f"are smaller, {use.sparse_where_smaller:,} bytes"
    )
    if not use.has_brotli:
        yield "for brotli, install the package 'brotli'"


def channels(layer: Layer) -> Shown:
    """One row per channel."""
    yield f"{layer.name} ({layer.op_type}), {layer.channels} channels of {layer.channel_weights} weights"
    columns: dict[str, Column[Any]] = {">channel": "channel", ">zeros": "zeros", ">norm": "norm:.4g"}
    if layer.damage is not None:
        columns |= {
            ">dense std": "dense_std:.4g",
            ">std": "std:.4g",
            ">variance ratio": "ratio:.4g",
            ">mean shift": "shift:.4g",
            ">correlation": "correlation:.4g",
            "": lambda row: "collapsed" if row["collapsed"] else "",
        }
    yield _table(layer.channel_table(), columns)


def sensitivity(result: SensitivityResult, verbose: bool) -> Shown:
    """One row per layer, one column per sparsity: the distance, and for classifiers the agreement."""
    table = _columns("layer", "operator", ">weights", *(f">{share:g}" for share in result.sparsities))
    for layer in result.layers:
        cells = (
            f"{trial.distance:.2g}" + (f" {trial.fidelity.agreement:.0%}" if result.shows_agreement else "")
            for trial in layer.tried
        )
        table.add_row(layer.name, layer.op_type, f"{layer.size:,}", *cells)
    yield table
    yield from _remarks(result.skips, result.notes, verbose)
    yield (
        f"{result.measure} against the dense model on {result.samples} held-out samples, each layer alone at each "
        f"sparsity, refitted on {result.calibration_samples} others; {result.seconds:.1f} s"
    )


def sweep(result: SweepResult, path: str) -> Shown:
    """One row per method, one column per goal; failed cells, and why."""
    from onnx_asr.sweeping.grid import Cell

    label, text = _SCORES[result.measure]
    table = _columns(f"{label} (KL)" if result.dense.kl is not None else label, *(f">{goal}" for goal in result.goals))
    for method in result.methods:
        row = []
        for outcome in (result.cells.get(Cell(goal, method)) for goal in result.goals):
            fidelity = None if outcome is None else outcome.fidelity
            kl = "" if fidelity is None or fidelity.kl is None else f" ({fidelity.kl:.2g})"
            failed = "" if outcome is None else "failed"
            row.append(failed if fidelity is None else text.format(getattr(fidelity, result.measure)) + kl)
        table.add_row(method, *row)
    yield table
    scored, calibration = (result.conditions[name]["samples"] for name in ("scored", "calibration"))
    known = result.measure in ("metric", "top1")
    dense = f"dense model: {text.format(getattr(result.dense, result.measure))}; " if known else ""
    yield f"{dense}scored on {scored} samples, calibrated on {calibration} others"
    yield from _remarks((), result.notes, verbose=True)
    for reason, cells in result.failures.items():
        yield f"failed: {', '.join(map(str, cells))}: {reason}"
    yield f"cells: {path}"


def evaluation(paths: Sequence[str], fidelities: Sequence[Fidelity]) -> Shown:
    """The scores, model by model."""
    names = [os.path.basename(path) for path in paths]
    columns = dict(zip(names if len(set(names)) == len(names) else paths, fidelities, strict=True))
    yield _fidelities(columns, f"{fidelities[0].samples} samples")


def check(result: CheckResult) -> Shown:
    """One row per bar."""
    columns: dict[str, Column[Criterion]] = {
        "measure": lambda item: _BARS[measure_of(item.name)][0],
        ">bar": lambda item: ("at least " if item.name.startswith("min_") else "at most ") + _bar_text(item, item.bar),
        ">measured": lambda item: _bar_text(item, item.measured),
        "verdict": lambda item: "passed" if item.passed else "MISSED",
    }
    yield _table(result.criteria, columns, bold=lambda item: not item.passed)
    if result.fidelity is not None:
        yield f"measured on {result.fidelity.samples} samples"


def _bar_text(criterion: Criterion, value: float) -> str:
    return _BARS[measure_of(criterion.name)][1].format(value)


def demo(result: DemoResult) -> Shown:
    """All versions of the net, and where the best one is."""
    yield (
        f"{result.model}, {result.sparsity:.1%} of its weights pruned; repaired from "
        f"{result.calibration_samples} unlabelled images, scored on {result.rows[0].fidelity.samples} others"
    )
    columns: dict[str, Column[DemoRow]] = {
        "model": lambda row: row.name if row.chosen is None else f"{row.name} (chose {row.chosen})",
        ">top-1": "fidelity.top1:.1%",
        ">agreement with dense": "fidelity.agreement:.1%",
        ">KL to dense": "fidelity.kl:.4g",
        ">seconds": "seconds:.2f",
    }
    yield _table(result.rows, columns, bold=lambda row: row.name == result.best)
    yield from _remarks((), result.notes, verbose=True)
    yield f"pruned:   {result.pruned}"
    yield f"repaired: {result.repaired} ({result.best}: the highest top-1 here)"
    yield (
        f"See what was done, node by node, in Netron: onnx-resuscitate view {result.repaired}\n"
        "or open the file on https://netron.app; the properties of a node show its gains."
    )


def _fidelities(columns: Mapping[str, Fidelity], title: str) -> Table:
    """One column per model, one row per score that any of them has."""
    table = _columns(title, *(f">{name}" for name in columns))
    for name, (label, text) in _SCORES.items():
        values = [getattr(fidelity, name) for fidelity in columns.values()]
        if any(value is not None for value in values):
            table.add_row(label, *("" if value is None else text.format(value) for value in values))
    return table


def _groups(groups: Sequence[ChannelGroup], verbose: bool) -> Table:
    columns: dict[str, Column[ChannelGroup]] = {
        "layers": lambda group: _named(group.layers, 2, verbose),
        ">channels": "channels",
        ">kept": "kept",
        ">removed": lambda group: f"{1 - group.kept / group.channels:.1%}",
    }
    return _table(groups, columns)


def _ending(
    result: PruneResult | ChannelPruneResult | ShrinkResult | CompressResult, path: str | None, latency: Latency | None
) -> Shown:
    """The cost before and after, what that is good for, and where the model is."""
    table = _columns("cost", ">before", ">after", ">share")
    for label, name in (
        ("parameters", "parameters"),
        ("of these not zero", "nonzeros"),
        ("FLOPs, zeros included", "flops"),
        ("FLOPs, without zeros", "nonzero_flops"),
        ("bytes", "size"),
        ("bytes after gzip", "compressed"),
    ):
        old, new = getattr(result.before, name), getattr(result.after, name)
        known = old is not None and new is not None
        share = f"{new / max(1, old):.1%}" if known else ""
        table.add_row(label, *("unknown" if count is None else f"{count:,}" for count in (old, new)), share)
    if latency is not None:
        old_ms, new_ms = (f"{1000 * seconds:.3g}" for seconds in (latency.seconds_before, latency.seconds_after))
        table.add_row("milliseconds per run", old_ms, new_ms, f"{latency.ratio:.1%}")
    yield table
    for reason in dict.fromkeys(filter(None, (result.before.unknown, result.after.unknown))):
        yield f"note: FLOPs are unknown: {reason}"
    if latency is not None:
        from onnx_asr.graph.shapes import shapes_text

        yield (
            f"timed in onnxruntime on {shapes_text(latency.shapes)}, {latency.pairs} pairs of alternating runs; the "
            f"middle half of their ratios lies between {latency.low:.1%} and {latency.high:.1%}"
        )
        if latency.high - latency.low > _WIDE:
            yield "note: that is a wide spread, as on a busy machine; measure again when it is idle"
    if result.before != result.after:
        yield result.helps
    yield _written(path)


def _layers(layers: Sequence[LayerSparsity]) -> Table:
    table = _table(layers, _LAYER | {">weights": "size:,", ">zeros": "zeros:,", ">sparsity": "sparsity:.1%"})
    size, zeros = (sum(getattr(layer, name) for layer in layers) for name in ("size", "zeros"))
    table.add_section()
    table.add_row("all", "", "", f"{size:,}", f"{zeros:,}", f"{zeros / max(1, size):.1%}")
    return table


def _candidates(result: RepairResult) -> Table:
    """The methods that auto tried, the chosen one marked."""
    first = result.candidates[0].fidelity
    scores = [name for name in ("metric", "detection_error") if getattr(first, name) is not None]
    scores += ["snr_db"] if first.kl is None and first.snr_db is not None else ["agreement"]
    scores += ["kl"] if first.kl is not None else []
    table = _columns("auto tried", *(f">{_SCORES[name][0]}" for name in scores), ">seconds", "")
    for item in result.candidates:
        values = (_SCORES[name][1].format(getattr(item.fidelity, name)) for name in scores)
        mark, style = ("chosen", "bold") if item.method == result.chosen else ("", None)
        table.add_row(item.method, *values, f"{item.seconds:.1f}", mark, style=style)
    return table


def _repaired(result: RepairResult, before: str, after: str, verbose: bool) -> Shown:
    """The points rewritten and skipped, and the fidelity of the model before and after, under these names."""
    points = result.points
    counts = Counter(point.written for point in points)
    parts = ", ".join(f"{count} {written}" for written, count in counts.items())
    line = f"{result.options.method}: {len(points)} points rewritten ({parts or 'none'})"
    gains = [point.gain for point in points if point.gain is not None]
    if gains:
        line += f", gains {min(gain[0] for gain in gains):.3g} to {max(gain[2] for gain in gains):.3g}"
    yield f"{line}, {sum(point.dead for point in points)} dead channels"
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    yield f"calibrated on {result.calibration_samples} samples, weights {result.sparsity:.1%} sparse; {stages}"
    if verbose and points:
        yield _table(points, _POINTS)
    yield from _remarks(result.skips, result.notes, verbose)
    check = result.verification
    if check is not None:
        where = "held-out samples" if check.held_out else "calibration samples"
        title = f"against the dense model, {check.after.samples} {where}"
        given_back = f"{before} (given back)"
        yield _fidelities({before: check.before, after if result.modified else given_back: check.after}, title)


def _written(path: str | None) -> str:
    if path is None:
        return "nothing was written"
    return f"written: {path} ({size_text(os.path.getsize(path))})" if os.path.isfile(path) else f"written into {path}"


def _remarks(skips: Sequence[Skip], notes: Sequence[str], verbose: bool) -> Iterator[str]:
    """One line per reason, with the nodes it applies to, and one per note."""
    reasons: dict[str, list[str]] = {}
    for skip in skips:
        reasons.setdefault(skip.reason, []).append(f"{skip.name} ({skip.op_type})")
    for reason, names in reasons.items():
        yield f"skipped: {_named(names, _FEW, verbose)}: {reason}"
    for note in notes:
        yield f"note: {note}"


def _named(names: Sequence[str], few: int, verbose: bool) -> str:
    """The first names and how many more there are, or all."""
    shown = names if verbose else names[:few]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{', '.join(shown)}{more}"


def _table(items: Iterable[T], columns: Mapping[str, Column[T]], bold: Callable[[T], bool] | None = None) -> Table:
    """One row per item.

    A column is a function, or an attribute and its format, as in "fidelity.top1:.1%", empty where that is None.
    """
    table = _columns(*columns)
    for item in items:
        cells = (column(item) if callable(column) else _cell(item, column) for column in columns.values())
        table.add_row(*cells, style="bold" if bold is not None and bold(item) else None)
    return table


def _cell(value: Any, column: str) -> str:
    path, _, form = column.partition(":")
    for name in path.split("."):
        if value is not None:
            value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return "" if value is None else format(value, form)


def _columns(*names: str) -> Table:
    """An empty table; a ">" before the name of a column aligns it to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        justify = "right" if name.startswith(">") else "left"
        table.add_column(name.removeprefix(">"), justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table
