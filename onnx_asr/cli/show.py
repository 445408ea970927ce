"""Results as text and tables for a reader."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import JustifyMethod, RenderableType
from rich.table import Table

if TYPE_CHECKING:
    from onnx_asr.cli.demo import DemoResult
    from onnx_asr.graph.skips import Skip
    from onnx_asr.measuring.inspection import Inspection, Layer
    from onnx_asr.networks.cost import Cost
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

_FEW = 5  # skipped nodes of one reason that are named without -v
_WIDE = 0.2  # spread of latency ratios that is worth a remark


def prune(result: PruneResult, path: str, verbose: bool, latency: Latency | None) -> Iterator[RenderableType]:
    """Every layer, the sum, what took no part, and the size before and after."""
    yield _layers(result.layers)
    yield from _skips(result.skips, verbose)
    for note in result.notes:
        yield f"note: {note}"
    yield from _costs(result.before, result.after, latency)
    yield result.helps
    yield _written(path)


def prune_channels(
    result: ChannelPruneResult, path: str, verbose: bool, latency: Latency | None
) -> Iterator[RenderableType]:
    """Every group of channels, what took no part, and the size before and after."""
    from onnx_asr.pruning.channels import CHANNELS_HELP

    yield _groups(result.groups, verbose)
    yield from _skips(result.skips, verbose)
    yield from _costs(result.before, result.after, latency)
    yield CHANNELS_HELP
    yield _written(path)


def shrink(result: ShrinkResult, path: str, verbose: bool, latency: Latency | None) -> Iterator[RenderableType]:
    """Layers that lost channels, what had to stay, and the size before and after."""
    from onnx_asr.pruning.channels import CHANNELS_HELP

    yield _groups(result.layers, verbose) if result.layers else "there is no channel to remove"
    for note in result.notes:
        yield f"note: {note}"
    yield f"outputs differ by {_number(result.error)} of their size on random input"
    yield from _costs(result.before, result.after, latency)
    if result.layers:
        yield CHANNELS_HELP
    yield _written(path)


def repair(result: RepairResult, path: str | None, verbose: bool) -> Iterator[RenderableType]:
    """How much closer to the dense model it came, what was rewritten and what was not."""
    if result.candidates:
        yield _candidates(result)
    yield from _rewritten(result, verbose)
    if result.verification is not None:
        yield from _verification(result.verification, "pruned", "repaired")
    yield _written(path)


def compress(
    result: CompressResult, path: str | None, verbose: bool, latency: Latency | None
) -> Iterator[RenderableType]:
    """Where the zeros are, and how close to the dense model what is left came."""
    yield _layers(result.layers)
    seconds = ", ".join(f"{value:.1f}" for value in result.round_seconds)
    rounds = len(result.round_seconds)
    yield f"{rounds} mask {'round' if rounds == 1 else 'rounds'} in {seconds} s"
    yield from _rewritten(result.repair, verbose)
    if result.repair.verification is not None:
        yield from _verification(result.repair.verification, "last mask, no repair", "compressed")
    yield from _costs(result.before, result.after, latency)
    yield result.helps
    yield _written(path)


def inspection(result: Inspection, verbose: bool) -> Iterator[RenderableType]:
    """What is in the model and what a repair could do; with the damage where it was measured."""
    from onnx_asr.graph.files import size_text

    measured = result.samples > 0
    size, deflated = size_text(result.file_bytes), size_text(result.compressed_bytes)
    yield f"opset {result.opset}, {result.nodes} nodes, inputs {', '.join(result.inputs)}; {size}, deflated {deflated}"
    yield f"BatchNormalization: {result.batchnorm}; weights {_percent(result.sparsity)} sparse"
    yield _damage_table(result) if measured else _inspected(result.layers)
    if measured:
        collapsed = [layer.name for layer in result.layers if layer.damage and layer.damage.collapsed_share > 0.5]
        yield (
            f"{len(collapsed)} of {len(result.layers)} layers lost most of their channels"
            + (f", the first is {collapsed[0]}" if collapsed else "")
        )
        yield (
            f"measured on {result.samples} samples; collapsed: under a hundredth of the dense variance; error: root "
            "mean square of log10 of the variance ratios, as it is, with one factor per layer, with one per channel"
        )
    yield from _skips(result.skips, verbose)
    yield from result.advice
    for key, value in result.metadata.items():
        yield f"{key}: {value}"


def channels(layer: Layer) -> Iterator[RenderableType]:
    """One row a channel."""
    yield f"{layer.name} ({layer.op_type}), {layer.channels} channels of {layer.channel_weights} weights"
    measured = layer.damage is not None
    more = (">dense std", ">std", ">variance ratio", ">mean shift", ">correlation", "") if measured else ()
    table = _table(">channel", ">zeros", ">norm", *more)
    for row in layer.channel_table():
        values = [str(row["channel"]), str(row["zeros"]), _number(row["norm"])]
        if measured:
            values += [_number(row[name]) for name in ("dense_std", "std", "ratio", "shift", "correlation")]
            values.append("collapsed" if row["collapsed"] else "")
        table.add_row(*values)
    yield table


def sensitivity(result: SensitivityResult, verbose: bool) -> Iterator[RenderableType]:
    """One row a layer, one column a sparsity: the distance, and for classifiers the agreement."""
    shares = [f">{share:g}" for share in result.sparsities]
    table = _table("layer", "operator", ">weights", *shares)
    for layer in result.layers:
        cells = [
            f"{item.distance:.2g}" + ("" if item.kl is None else f" {item.agreement:.0%}") for item in layer.fidelities
        ]
        table.add_row(layer.name, layer.op_type, f"{layer.size:,}", *cells)
    yield table
    yield from _skips(result.skips, verbose)
    for note in result.notes:
        yield f"note: {note}"
    yield (
        f"{result.measure} against the dense model on {result.samples} held-out samples, each layer alone at each "
        f"sparsity, refitted on {result.calibration_samples} others; {result.seconds:.1f} s"
    )


def sweep(result: SweepResult, path: str, plot: Path | None) -> Iterator[RenderableType]:
    """One row a method, one column a goal; what failed, and why."""
    from onnx_asr.sweeping.grid import Cell

    label, text = {
        "top1": ("top-1", _percent),
        "agreement": ("agreement", _percent),
        "snr_db": ("output SNR", _decibel),
    }[result.measure]
    kl = result.dense.kl is not None
    table = _table(f"{label} (KL)" if kl else label, *(f">{goal}" for goal in result.goals))
    for method in result.methods:
        row = []
        for goal in result.goals:
            outcome = result.cells.get(Cell(goal, method))
            if outcome is None:
                row.append("")
            elif outcome.fidelity is None:
                row.append("failed")
            else:
                value = text(getattr(outcome.fidelity, result.measure))
                row.append(f"{value} ({outcome.fidelity.kl:.2g})" if outcome.fidelity.kl is not None else value)
        table.add_row(method, *row)
    yield table
    scored, calibration = (result.conditions[name]["samples"] for name in ("scored", "calibration"))
    dense = f"dense model: {_percent(result.dense.top1)}; " if result.dense.top1 is not None else ""
    yield f"{dense}scored on {scored} samples, calibrated on {calibration} others"
    for note in result.notes:
        yield f"note: {note}"
    for reason, cells in result.failures.items():
        yield f"failed: {', '.join(map(str, cells))}: {reason}"
    yield f"cells: {path}"
    if plot is not None:
        yield f"plot: {plot}"


def report(path: Path | None) -> Iterator[RenderableType]:
    """Where the HTML report is, if there is one."""
    if path is not None:
        yield f"report: {path}"


def plot(path: Path | None) -> Iterator[RenderableType]:
    """Where the drawing is, if there is one."""
    if path is not None:
        yield f"plot: {path}"


def view(addresses: Sequence[tuple[str, str]]) -> Iterator[RenderableType]:
    """Where the models are shown."""
    for model, address in addresses:
        yield f"{model}: {address}"
    yield "Ctrl-C ends it"


def evaluation(fidelity: Fidelity, path: str) -> Iterator[RenderableType]:
    """The measures there are."""
    yield fidelities({os.path.basename(path): fidelity}, f"{fidelity.samples} samples")


def demo(result: DemoResult) -> Iterator[RenderableType]:
    """All versions of the net, and where to look at the best."""
    samples = result.rows[0].fidelity.samples
    yield (
        f"{result.model}, {_percent(result.sparsity)} of its weights pruned; repaired from "
        f"{result.calibration_samples} unlabelled images, scored on {samples} others"
    )
    table = _table("model", ">top-1", ">agreement with dense", ">KL to dense", ">seconds")
    for row in result.rows:
        values = row.fidelity
        table.add_row(
            row.name if row.chosen is None else f"{row.name} (chose {row.chosen})",
            _percent(values.top1),
            _percent(values.agreement),
            _number(values.kl),
            "" if row.seconds is None else f"{row.seconds:.2f}",
            style="bold" if row.name == result.best else None,
        )
    yield table
    for note in result.notes:
        yield f"note: {note}"
    yield f"pruned:   {result.pruned}"
    yield f"repaired: {result.repaired} ({result.best}: the highest top-1 here)"
    yield (
        f"See what was done, node by node, in Netron: onnx-resuscitate view {result.repaired}\n"
        "or open the file on https://netron.app; a node's properties tell its gains."
    )


def fidelities(columns: dict[str, Fidelity], title: str) -> Table:
    """One column a model, one row a measure that any of them has."""
    table = _table(title, *(f">{name}" for name in columns))
    for label, name, text in (
        ("top-1", "top1", _percent),
        ("top-5", "top5", _percent),
        ("agreement", "agreement", _percent),
        ("KL divergence", "kl", _number),
        ("output SNR", "snr_db", _decibel),
    ):
        values = [getattr(fidelity, name) for fidelity in columns.values()]
        if any(value is not None for value in values):
            table.add_row(label, *(text(value) for value in values))
    return table


def _groups(groups: Sequence[ChannelGroup], verbose: bool) -> Table:
    table = _table("layers", ">channels", ">kept", ">removed")
    for group in groups:
        share = _percent(1 - group.kept / group.channels)
        table.add_row(_named(group.layers, 2, verbose), str(group.channels), str(group.kept), share)
    return table


def _costs(before: Cost, after: Cost, latency: Latency | None) -> Iterator[RenderableType]:
    table = _table("cost", ">before", ">after", ">share")
    for label, name in (
        ("parameters", "parameters"),
        ("of these not zero", "nonzeros"),
        ("FLOPs, zeros included", "flops"),
        ("FLOPs, zeros left out", "nonzero_flops"),
        ("bytes", "size"),
        ("bytes after gzip", "compressed"),
    ):
        old, new = getattr(before, name), getattr(after, name)
        table.add_row(label, f"{old:,}", f"{new:,}", _percent(new / max(1, old)))
    if latency is not None:
        old_ms, new_ms = (f"{1000 * seconds:.3g}" for seconds in (latency.seconds_before, latency.seconds_after))
        table.add_row("milliseconds a run", old_ms, new_ms, _percent(latency.ratio))
    yield table
    if latency is not None:
        fed = " ".join(f"{name}:{','.join(map(str, shape))}" for name, shape in latency.shapes.items())
        yield (
            f"timed in onnxruntime on {fed}, {latency.pairs} pairs of runs in turns; the middle half of their ratios "
            f"lies between {_percent(latency.low)} and {_percent(latency.high)}"
        )
        if latency.high - latency.low > _WIDE:
            yield "note: that is a wide spread: other work kept the machine busy; measure again when it is idle"


def _layers(layers: Sequence[LayerSparsity]) -> Table:
    table = _table("layer", "operator", "shape", ">weights", ">zeros", ">sparsity")
    for layer in layers:
        shape = " x ".join(map(str, layer.shape))
        table.add_row(layer.name, layer.op_type, shape, f"{layer.size:,}", f"{layer.zeros:,}", _percent(layer.sparsity))
    size, zeros = (sum(getattr(layer, name) for layer in layers) for name in ("size", "zeros"))
    table.add_section()
    table.add_row("all", "", "", f"{size:,}", f"{zeros:,}", _percent(zeros / max(1, size)))
    return table


def _inspected(layers: Sequence[Layer]) -> Table:
    table = _table("layer", "operator", "shape", ">channels", ">empty", ">sparsity", "pattern", "repair writes")
    for layer in layers:
        shape = "" if layer.shape is None else " x ".join(map(str, layer.shape))
        counts = str(layer.channels), str(layer.empty)
        table.add_row(
            layer.name, layer.op_type, shape, *counts, _percent(layer.sparsity), layer.pattern or "", layer.writable
        )
    return table


def _damage_table(result: Inspection) -> Table:
    known = "layer", ">channels", ">sparsity", ">collapsed", ">dead", ">median ratio", ">correlation"
    table = _table(*known, ">error", ">per layer", ">per channel")
    for layer in result.layers:
        damage = layer.damage
        if damage is None:
            continue
        errors = [""] * 3
        if damage.errors is not None:
            errors = [f"{value:.2f}" for value in (damage.errors.none, damage.errors.layer, damage.errors.channel)]
        table.add_row(
            layer.name,
            str(layer.channels),
            _percent(layer.sparsity),
            _percent(damage.collapsed_share),
            str(damage.dead),
            "" if damage.median_ratio is None else f"{damage.median_ratio:.3g}",
            f"{damage.correlation.mean():.2f}",
            *errors,
        )
    return table


def _candidates(result: RepairResult) -> Table:
    """What auto tried, the chosen one marked."""
    classifier = all(item.fidelity.kl is not None for item in result.candidates)
    measures = (">agreement", ">KL divergence") if classifier else (">output SNR",)
    table = _table("auto tried", *measures, ">seconds", "")
    for item in result.candidates:
        fidelity, chosen = item.fidelity, item.options == result.options
        values = (_percent(fidelity.agreement), _number(fidelity.kl)) if classifier else (_decibel(fidelity.snr_db),)
        mark = "chosen" if chosen else ""
        table.add_row(item.label, *values, f"{item.seconds:.1f}", mark, style="bold" if chosen else None)
    return table


def _rewritten(result: RepairResult, verbose: bool) -> Iterator[RenderableType]:
    points = result.points
    counts = Counter(point.written for point in points)
    parts = ", ".join(f"{count} {written}" for written, count in counts.items())
    line = f"{result.options.method}: {len(points)} points rewritten ({parts or 'none'})"
    gains = [point.gain for point in points if point.gain is not None]
    if gains:
        line += f", gains {min(gain[0] for gain in gains):.3g} to {max(gain[2] for gain in gains):.3g}"
    yield f"{line}, {sum(point.dead for point in points)} dead channels"
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    yield (f"calibrated on {result.calibration_samples} samples, weights {_percent(result.sparsity)} sparse; {stages}")
    if verbose and points:
        yield _points(result)
    yield from _skips(result.skips, verbose)
    for note in result.notes:
        yield f"note: {note}"


def _verification(check: Verification, before: str, after: str) -> Iterator[RenderableType]:
    where = "held-out samples" if check.held_out else "calibration samples"
    yield fidelities(
        {before: check.before, after: check.after}, f"against the dense model, {check.after.samples} {where}"
    )


def _written(path: str | None) -> str:
    from onnx_asr.graph.files import size_text

    return "nothing was written" if path is None else f"written: {path} ({size_text(os.path.getsize(path))})"


def _points(result: RepairResult) -> Table:
    table = _table("point", "operator", "written", ">channels", ">dead", ">gain", ">median", ">output error")
    for point in result.points:
        spread, median = "", ""
        if point.gain is not None:
            spread, median = f"{point.gain[0]:.3g} .. {point.gain[2]:.3g}", f"{point.gain[1]:.3g}"
        residual = "" if point.residual is None else f"{point.residual[0]:.3g} -> {point.residual[1]:.3g}"
        table.add_row(
            point.name, point.op_type, point.written, str(point.channels), str(point.dead), spread, median, residual
        )
    return table


def _skips(skips: Sequence[Skip], verbose: bool) -> Iterator[str]:
    """One line a reason, with the nodes it applies to."""
    reasons: dict[str, list[str]] = {}
    for skip in skips:
        reasons.setdefault(skip.reason, []).append(f"{skip.name} ({skip.op_type})")
    for reason, names in reasons.items():
        yield f"left alone: {_named(names, _FEW, verbose)}: {reason}"


def _named(names: Sequence[str], few: int, verbose: bool) -> str:
    """The first names and how many more there are, or all."""
    shown = names if verbose else names[:few]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{', '.join(shown)}{more}"


def _table(*columns: str) -> Table:
    """A table; a ">" in front of a column's name aligns it to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        justify: JustifyMethod = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=justify, overflow="fold")  # names are there to be copied
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _decibel(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"
