"""Results as text and tables."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

from rich.table import Table

from onnx_asr.graph.files import size_text

if TYPE_CHECKING:
    from onnx_asr.cli.demo import DemoResult
    from onnx_asr.graph.skips import Skip
    from onnx_asr.measuring.inspection import Inspection, Layer
    from onnx_asr.networks.fidelity import Fidelity
    from onnx_asr.networks.latency import Latency
    from onnx_asr.networks.sparsity import LayerSparsity
    from onnx_asr.pruning.channels import ChannelGroup, ChannelPruneResult
    from onnx_asr.pruning.compression import CompressResult
    from onnx_asr.pruning.sensitivity import SensitivityResult
    from onnx_asr.pruning.shrinking import ShrinkResult
    from onnx_asr.pruning.zeros import PruneResult
    from onnx_asr.repairing.result import RepairResult, Verification
    from onnx_asr.sweeping.result import SweepResult

T = TypeVar("T")
Shown = Iterator[str | Table]

_FEW = 5  # nodes named per reason without -v
_WIDE = 0.2  # spread of latency ratios that is worth a remark
_SCORES = {
    "top1": ("top-1", "{:.1%}"),
    "top5": ("top-5", "{:.1%}"),
    "agreement": ("agreement", "{:.1%}"),
    "kl": ("KL divergence", "{:.4g}"),
    "snr_db": ("output SNR", "{:.1f} dB"),
}


def prune(result: PruneResult, path: str, verbose: bool, latency: Latency | None) -> Shown:
    """Every layer, the sum, what took no part, and the cost before and after."""
    yield _layers(result.layers)
    yield from _remarks(result.skips, result.notes, verbose)
    yield from _ending(result, path, latency)


def prune_channels(result: ChannelPruneResult, path: str, verbose: bool, latency: Latency | None) -> Shown:
    """Every group of channels, what took no part, and the cost before and after."""
    yield _groups(result.groups, verbose)
    yield from _remarks(result.skips, (), verbose)
    yield from _ending(result, path, latency)


def shrink(result: ShrinkResult, path: str, verbose: bool, latency: Latency | None) -> Shown:
    """Layers that lost channels, and the cost before and after."""
    yield _groups(result.layers, verbose) if result.layers else "no channel can be removed"
    yield from _remarks((), result.notes, verbose)
    yield f"outputs differ by {_number(result.error)} of their size on random input"
    yield from _ending(result, path, latency)


def repair(result: RepairResult, path: str | None, verbose: bool) -> Shown:
    """What was rewritten, what was not, and how much closer to the dense model it came."""
    if result.candidates:
        yield _candidates(result)
    yield from _rewritten(result, verbose)
    if result.verification is not None:
        yield _verification(result.verification, "pruned", "repaired")
    yield _written(path)


def compress(result: CompressResult, path: str | None, verbose: bool, latency: Latency | None) -> Shown:
    """Where the zeros are, and how close to the dense model the result came."""
    yield _layers(result.layers)
    seconds = ", ".join(f"{value:.1f}" for value in result.round_seconds)
    rounds = len(result.round_seconds)
    yield f"{rounds} mask {'round' if rounds == 1 else 'rounds'} in {seconds} s"
    yield from _rewritten(result.repair, verbose)
    if result.repair.verification is not None:
        yield _verification(result.repair.verification, "last mask, no repair", "compressed")
    yield from _ending(result, path, latency)


def inspection(result: Inspection, verbose: bool) -> Shown:
    """What is in the model and what a repair could do; the damage, if it was measured."""
    size, deflated = size_text(result.file_bytes), size_text(result.compressed_bytes)
    yield f"opset {result.opset}, {result.nodes} nodes, inputs {', '.join(result.inputs)}; {size}, deflated {deflated}"
    yield f"BatchNormalization: {result.batchnorm}; weights {_percent(result.sparsity)} sparse"
    if result.samples:
        yield _damages(result.layers)
        collapsed = [layer.name for layer in result.layers if layer.damage and layer.damage.collapsed_share > 0.5]
        first = f", the first is {collapsed[0]}" if collapsed else ""
        yield f"{len(collapsed)} of {len(result.layers)} layers lost most of their channels{first}"
        yield (
            f"measured on {result.samples} samples; collapsed: under a hundredth of the dense variance; error: root "
            "mean square of log10 of the variance ratios, as it is, with one factor per layer, with one per channel"
        )
    else:
        columns: dict[str, Callable[[Layer], str]] = {
            "layer": attrgetter("name"),
            "operator": attrgetter("op_type"),
            "shape": lambda layer: " x ".join(map(str, layer.shape or ())),
            ">channels": lambda layer: str(layer.channels),
            ">empty": lambda layer: str(layer.empty_channels),
            ">sparsity": lambda layer: _percent(layer.sparsity),
            "pattern": lambda layer: layer.pattern or "",
            "repair writes": attrgetter("writable"),
        }
        yield _table(result.layers, columns)
    yield from _remarks(result.skips, (), verbose)
    yield from result.advice
    for key, value in result.metadata.items():
        yield f"{key}: {value}"


def channels(layer: Layer) -> Shown:
    """One row per channel."""
    yield f"{layer.name} ({layer.op_type}), {layer.channels} channels of {layer.channel_weights} weights"
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        ">channel": lambda row: str(row["channel"]),
        ">zeros": lambda row: str(row["zeros"]),
        ">norm": lambda row: _number(row["norm"]),
    }
    if layer.damage is not None:
        columns |= {
            ">dense std": lambda row: _number(row["dense_std"]),
            ">std": lambda row: _number(row["std"]),
            ">variance ratio": lambda row: _number(row["ratio"]),
            ">mean shift": lambda row: _number(row["shift"]),
            ">correlation": lambda row: _number(row["correlation"]),
            "": lambda row: "collapsed" if row["collapsed"] else "",
        }
    yield _table(layer.channel_table(), columns)


def sensitivity(result: SensitivityResult, verbose: bool) -> Shown:
    """One row per layer, one column per sparsity: the distance, and for classifiers the agreement."""
    table = _columns("layer", "operator", ">weights", *(f">{share:g}" for share in result.sparsities))
    for layer in result.layers:
        cells = (
            f"{trial.distance:.2g}" + ("" if trial.fidelity.kl is None else f" {trial.fidelity.agreement:.0%}")
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
    dense = f"dense model: {_percent(result.dense.top1)}; " if result.dense.top1 is not None else ""
    yield f"{dense}scored on {scored} samples, calibrated on {calibration} others"
    yield from _remarks((), result.notes, verbose=True)
    for reason, cells in result.failures.items():
        yield f"failed: {', '.join(map(str, cells))}: {reason}"
    yield f"cells: {path}"


def view(addresses: Sequence[tuple[str, str]]) -> Shown:
    """Where the models are shown."""
    for model, address in addresses:
        yield f"{model}: {address}"
    yield "press Ctrl-C to stop"


def evaluation(fidelity: Fidelity, path: str) -> Shown:
    """The scores."""
    yield _fidelities({os.path.basename(path): fidelity}, f"{fidelity.samples} samples")


def demo(result: DemoResult) -> Shown:
    """All versions of the net, and where the best one is."""
    yield (
        f"{result.model}, {_percent(result.sparsity)} of its weights pruned; repaired from "
        f"{result.calibration_samples} unlabelled images, scored on {result.rows[0].fidelity.samples} others"
    )
    table = _columns("model", ">top-1", ">agreement with dense", ">KL to dense", ">seconds")
    for row in result.rows:
        name = row.name if row.chosen is None else f"{row.name} (chose {row.chosen})"
        seconds = "" if row.seconds is None else f"{row.seconds:.2f}"
        scores = _percent(row.fidelity.top1), _percent(row.fidelity.agreement), _number(row.fidelity.kl)
        table.add_row(name, *scores, seconds, style="bold" if row.name == result.best else None)
    yield table
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
    columns: dict[str, Callable[[ChannelGroup], str]] = {
        "layers": lambda group: _named(group.layers, 2, verbose),
        ">channels": lambda group: str(group.channels),
        ">kept": lambda group: str(group.kept),
        ">removed": lambda group: _percent(1 - group.kept / group.channels),
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
        table.add_row(label, f"{old:,}", f"{new:,}", _percent(new / max(1, old)))
    if latency is not None:
        old_ms, new_ms = (f"{1000 * seconds:.3g}" for seconds in (latency.seconds_before, latency.seconds_after))
        table.add_row("milliseconds per run", old_ms, new_ms, _percent(latency.ratio))
    yield table
    if latency is not None:
        fed = " ".join(f"{name}:{','.join(map(str, shape))}" for name, shape in latency.shapes.items())
        yield (
            f"timed in onnxruntime on {fed}, {latency.pairs} pairs of alternating runs; the middle half of their "
            f"ratios lies between {_percent(latency.low)} and {_percent(latency.high)}"
        )
        if latency.high - latency.low > _WIDE:
            yield "note: that is a wide spread, as on a busy machine; measure again when it is idle"
    if result.before != result.after:
        yield result.helps
    yield _written(path)


def _layers(layers: Sequence[LayerSparsity]) -> Table:
    columns: dict[str, Callable[[LayerSparsity], str]] = {
        "layer": attrgetter("name"),
        "operator": attrgetter("op_type"),
        "shape": lambda layer: " x ".join(map(str, layer.shape)),
        ">weights": lambda layer: f"{layer.size:,}",
        ">zeros": lambda layer: f"{layer.zeros:,}",
        ">sparsity": lambda layer: _percent(layer.sparsity),
    }
    table = _table(layers, columns)
    size, zeros = (sum(getattr(layer, name) for layer in layers) for name in ("size", "zeros"))
    table.add_section()
    table.add_row("all", "", "", f"{size:,}", f"{zeros:,}", _percent(zeros / max(1, size)))
    return table


def _damages(layers: Sequence[Layer]) -> Table:
    table = _columns(
        *("layer", ">channels", ">sparsity", ">collapsed", ">dead", ">median ratio", ">correlation"),
        *(">error", ">per layer", ">per channel"),
    )
    for layer in layers:
        damage = layer.damage
        if damage is None:
            continue
        errors = () if damage.errors is None else (damage.errors.none, damage.errors.layer, damage.errors.channel)
        table.add_row(
            layer.name,
            str(layer.channels),
            _percent(layer.sparsity),
            _percent(damage.collapsed_share),
            str(damage.dead),
            "" if damage.median_ratio is None else f"{damage.median_ratio:.3g}",
            f"{damage.correlation:.2f}",
            *(f"{value:.2f}" for value in errors),
        )
    return table


def _candidates(result: RepairResult) -> Table:
    """What auto tried, the chosen one marked."""
    classifier = all(item.fidelity.kl is not None for item in result.candidates)
    scores = ("agreement", "kl") if classifier else ("snr_db",)
    table = _columns("auto tried", *(f">{_SCORES[name][0]}" for name in scores), ">seconds", "")
    for item in result.candidates:
        values = (_SCORES[name][1].format(getattr(item.fidelity, name)) for name in scores)
        mark, style = ("chosen", "bold") if item.options == result.options else ("", None)
        table.add_row(item.method, *values, f"{item.seconds:.1f}", mark, style=style)
    return table


def _rewritten(result: RepairResult, verbose: bool) -> Shown:
    points = result.points
    counts = Counter(point.written for point in points)
    parts = ", ".join(f"{count} {written}" for written, count in counts.items())
    line = f"{result.options.method}: {len(points)} points rewritten ({parts or 'none'})"
    gains = [point.gain for point in points if point.gain is not None]
    if gains:
        line += f", gains {min(gain[0] for gain in gains):.3g} to {max(gain[2] for gain in gains):.3g}"
    yield f"{line}, {sum(point.dead for point in points)} dead channels"
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    yield f"calibrated on {result.calibration_samples} samples, weights {_percent(result.sparsity)} sparse; {stages}"
    if verbose and points:
        yield _points(result)
    yield from _remarks(result.skips, result.notes, verbose)


def _points(result: RepairResult) -> Table:
    table = _columns("point", "operator", "written", ">channels", ">dead", ">gain", ">median", ">output error")
    for point in result.points:
        gain = (
            ("", "") if point.gain is None else (f"{point.gain[0]:.3g} .. {point.gain[2]:.3g}", f"{point.gain[1]:.3g}")
        )
        error = "" if point.residual is None else f"{point.residual[0]:.3g} -> {point.residual[1]:.3g}"
        counts = str(point.channels), str(point.dead)
        table.add_row(point.name, point.op_type, point.written, *counts, *gain, error)
    return table


def _verification(check: Verification, before: str, after: str) -> Table:
    where = "held-out samples" if check.held_out else "calibration samples"
    title = f"against the dense model, {check.after.samples} {where}"
    return _fidelities({before: check.before, after: check.after}, title)


def _written(path: str | None) -> str:
    return "nothing was written" if path is None else f"written: {path} ({size_text(os.path.getsize(path))})"


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


def _table(items: Iterable[T], columns: Mapping[str, Callable[[T], str]]) -> Table:
    """One row per item."""
    table = _columns(*columns)
    for item in items:
        table.add_row(*(text(item) for text in columns.values()))
    return table


def _columns(*names: str) -> Table:
    """An empty table; a ">" before the name of a column aligns it to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        justify = "right" if name.startswith(">") else "left"
        table.add_column(name.removeprefix(">"), justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
