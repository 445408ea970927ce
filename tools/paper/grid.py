"""The grid of tools/paper/reproduce.py: prune, repair and score, with the package's public API only."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

import onnx_asr
from onnx_asr import RepairOptions
from tools.paper.work import NETS, Images, Work, read_json

SPARSITIES = ("0.5", "0.7", "0.9", "2:4")
BATCHES, MAIN_BATCHES = (10, 20, 30, 50), 20
BATCH, GAIN_SAMPLES, HELD_OUT = 128, 64, 256
PaperMethod = Literal["bn", "layerwise", "raw", "asr"]
OwnMethod = Literal["paired", "refit", "auto"]
PAPER_METHODS: tuple[PaperMethod, ...] = get_args(PaperMethod)
OWN_METHODS: tuple[OwnMethod, ...] = get_args(OwnMethod)
METHODS = ("none", *PAPER_METHODS, *OWN_METHODS)
ABLATION_SPARSITY = "0.9"
FIXED_PRIOR = 1.0
ABLATION: dict[str, dict[str, Any]] = {
    f"layerwise:{MAIN_BATCHES},no shift": {"bias_correction": False},
    f"raw:{MAIN_BATCHES},no shift": {"bias_correction": False},
    f"asr:{MAIN_BATCHES},no shift": {"bias_correction": False},
    f"asr:{MAIN_BATCHES},mean": {"prior": "mean"},
    f"asr:{MAIN_BATCHES},mean,no shift": {"prior": "mean", "bias_correction": False},
    f"asr:{MAIN_BATCHES},fixed": {"prior": FIXED_PRIOR},
    f"asr:{MAIN_BATCHES},fixed,no shift": {"prior": FIXED_PRIOR, "bias_correction": False},
}
"""Priors and bias correction of the paper's Table 2, except cells that the grid has already; all on scaled nets."""
RELIABILITY_POWERS = (0.25, 0.5, 1.0)
"""Powers for `paired`, besides its default of 0."""
DAMAGE_SAMPLES = 512
UNPRUNED = "0"


@dataclass(frozen=True)
class Repair:
    """How one cell is made.

    Attributes:
        options: Options of the repair; None for no repair.
        unit_variance: Whether both nets are scaled, which changes neither's function, so that the dense one's median
            running variance is 1; see `scaled`.
    """

    options: RepairOptions | None
    unit_variance: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """For the cell's record."""
        options = None if self.options is None else asdict(self.options)
        return {"options": options, "unit_variance": True} if self.unit_variance else {"options": options}


@dataclass(frozen=True)
class Cell:
    """One cell of a net: the score after `repair`, or, when `repair` is None, the damage that pruning did."""

    sparsity: str
    name: str
    repair: Repair | None = None


def repairs(sparsity: str, batches: Sequence[int], images: int) -> dict[str, Repair]:
    """The repairs of one pruned net, by name: METHOD, METHOD:BATCHES or METHOD:exact, and variants."""
    found = {"none": Repair(None)}
    for own in OWN_METHODS:  # auto splits off held-out images itself
        held_out = HELD_OUT if own == "auto" else 0
        found[own] = Repair(RepairOptions(method=own, samples=images, verify_samples=held_out))
    if sparsity == ABLATION_SPARSITY:
        for power in RELIABILITY_POWERS:
            options = RepairOptions(method="paired", samples=images, verify_samples=0, reliability_power=power)
            found[reliable(power)] = Repair(options)
    for method in PAPER_METHODS:
        runs = {f"{count}": moving_average(method, count) for count in batches}
        runs["exact"] = RepairOptions(method=method, samples=images, gain_samples=GAIN_SAMPLES, verify_samples=0)
        for run, options in runs.items():
            found[f"{method}:{run}"] = Repair(options)
            if sparsity == ABLATION_SPARSITY or run == f"{MAIN_BATCHES}":
                found[f"{method}:{run},scaled"] = Repair(options, True)
    if sparsity == ABLATION_SPARSITY and MAIN_BATCHES in batches:
        for name, others in ABLATION.items():
            found[f"{name},scaled"] = Repair(moving_average(name.split(":")[0], MAIN_BATCHES, **others), True)
    return found


def reliable(power: float) -> str:
    """Name of the `paired` cell with this reliability power."""
    return f"paired:{power:g}"


def moving_average(method: Any, batches: int, **others: Any) -> RepairOptions:
    """Options of the paper's protocol."""
    return RepairOptions(
        method=method,
        bn="ema",
        momentum=0.1,
        ema_batches=batches,
        ema_batch_size=BATCH,
        samples=batches * BATCH,
        gain_samples=GAIN_SAMPLES,
        verify_samples=0,
        **others,
    )


def cells(sparsities: Iterable[str], methods: Collection[str], batches: Sequence[int], images: int) -> Iterator[Cell]:
    """The cells of one net; `bn` also runs on the unpruned net."""

    def repaired(sparsity: str, wanted: Collection[str]) -> Iterator[Cell]:
        for name, repair in repairs(sparsity, batches, images).items():
            if name.split(":")[0] in wanted:
                yield Cell(sparsity, name, repair)

    yield Cell(UNPRUNED, "dense", Repair(None))
    for sparsity in sparsities:
        yield Cell(sparsity, "damage")
        yield from repaired(sparsity, methods)
    yield from repaired(UNPRUNED, ["bn"])


@lru_cache(maxsize=1)  # cells of one sparsity follow one another
def prune(net: Path, sparsity: str) -> onnx.ModelProto:
    """Prune a net by magnitude to a sparsity, with a scope if one is named, or to N:M. Callers must not modify it."""
    if ":" in sparsity:
        return onnx_asr.prune(net, options=onnx_asr.PruneOptions(pattern=sparsity)).model
    share, _, scope = sparsity.partition(" ")
    chosen: Any = scope or "global"
    return onnx_asr.prune(net, options=onnx_asr.PruneOptions(float(share), scope=chosen)).model


def scaled(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """Multiply every convolution output by a factor, without changing the net's function (up to epsilon).

    All weights of Conv nodes are multiplied, and the statistics of all BatchNormalization nodes with them: the mean by
    the factor, the variance by its square. In the nets of this grid every BatchNormalization reads Conv outputs alone,
    directly or through a Concat or a pooling.
    """
    factors: dict[str, float] = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            factors |= dict.fromkeys(node.input[1:], factor)
        elif node.op_type == "BatchNormalization":
            factors |= {node.input[3]: factor, node.input[4]: factor**2}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for item in result.graph.initializer:
        value = onnx.numpy_helper.to_array(item)
        if item.name in factors:
            item.CopyFrom(onnx.numpy_helper.from_array(value * np.asarray(factors[item.name], value.dtype), item.name))
    return result


@dataclass(frozen=True)
class Bench:
    """One net and everything its cells need.

    Attributes:
        work: Folder of the cells.
        name: Name of the net.
        calibration: Images without labels.
        scored: Images that top-1 is measured on.
        execution: How networks run.
    """

    work: Work
    name: str
    calibration: NDArray[np.uint8]
    scored: Images
    execution: onnx_asr.Execution

    @cached_property
    def dense(self) -> onnx.ModelProto:
        """The dense net."""
        return onnx.load(self.work.net(self.name))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the net's file."""
        return self.work.digest(self.name)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings that every scored cell depends on."""
        return {"dense": self.digest, "score_images": len(self.scored.labels)}

    @cached_property
    def preprocessing(self) -> onnx_asr.Preprocessing:
        """The preprocessing that the net was trained with."""
        return onnx_asr.PRESETS[read_json(self.work.record(self.name))["preset"]]

    def finish(self, cell: Cell) -> str | None:
        """Compute a cell and describe it in a line; None if it is finished."""
        if cell.repair is None:
            settings: dict[str, Any] = {"dense": self.digest, "samples": DAMAGE_SAMPLES}
            compute = partial(self.damage, cell.sparsity)
        else:
            settings = self.settings | cell.repair.settings
            compute = partial(self.repaired, cell.sparsity, cell.repair)
        return self.work.finish(self.name, cell.sparsity, cell.name, settings, compute)

    def pruned(self, sparsity: str) -> onnx.ModelProto:
        """The net, pruned to a sparsity."""
        return self.dense if sparsity == UNPRUNED else prune(self.work.net(self.name), sparsity)

    def top1(self, model: onnx.ModelProto) -> float:
        """Fraction of the scored images that a model classifies correctly."""
        measured = onnx_asr.evaluate(
            model,
            {"images": self.scored.pixels},
            labels=self.scored.labels,
            preprocessing=self.preprocessing,
            execution=self.execution,
        )
        assert measured.top1 is not None
        return measured.top1

    def repaired(self, sparsity: str, repair: Repair) -> dict[str, Any]:
        """Top-1 after a repair, and the method if `auto` chose one."""
        pruned, options = self.pruned(sparsity), repair.options
        if options is None:
            return {"top1": self.top1(pruned)}
        factor = running_variance(self.dense) ** -0.5 if repair.unit_variance else 1.0
        result = onnx_asr.repair(
            scaled(pruned, factor),
            {"images": self.calibration[: options.samples + options.verify_samples]},
            options,
            dense=scaled(self.dense, factor),
            preprocessing=self.preprocessing,
            execution=self.execution,
        )
        chosen = {"chosen": result.options.method} if options.method == "auto" else {}
        return {"top1": self.top1(result.model), **chosen}

    def damage(self, sparsity: str) -> dict[str, float]:
        """Average damage to the channels of all convolutions but the first.

        `severity` is the share of the dense network's variance that is missing, 1 - min(1, v_p / v_d); `collapsed` of
        the channels have less than a hundredth of it; `correlation` is with the dense channels.
        """
        found = onnx_asr.inspect(
            self.pruned(sparsity),
            dense=self.dense,
            data={"images": self.calibration[:DAMAGE_SAMPLES]},
            preprocessing=self.preprocessing,
            samples=DAMAGE_SAMPLES,
            execution=self.execution,
        )
        layers = [layer.damage for layer in found.layers if layer.op_type == "Conv" and layer.damage is not None][1:]
        ratios = np.concatenate([layer.ratios for layer in layers])
        known = ~np.isnan(ratios)  # NaN where the dense channel is constant
        return {
            "severity": float((1 - np.minimum(1, ratios[known])).mean()),
            "collapsed": float(np.concatenate([layer.is_collapsed for layer in layers])[known].mean()),
            "correlation": float(np.concatenate([layer.correlations for layer in layers])[known].mean()),
        }


_benches: dict[str, Bench] = {}


def start_worker(benches: Mapping[str, Bench]) -> None:
    """Give a process of the pool its nets, and let it exit when its parent is killed."""
    _benches.update(benches)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def finish(net: str, cell: Cell) -> str | None:
    """Compute a cell in a process of the pool and describe it in a line; None if it is finished."""
    return _benches[net].finish(cell)


def collected(work: Work) -> dict[str, Any]:
    """Collect nets and cells in one object.

    Raises:
        SystemExit: When there are none, or they were not made with the same numbers of images.
    """
    found = list(work.cells())
    scored = {cell["settings"]["score_images"] for cell in found if "top1" in cell}
    images = {cell["settings"]["options"]["samples"] for cell in found if cell["name"] in OWN_METHODS}
    if {len(scored), len(images)} != {1}:
        raise SystemExit(
            f"the cells of {work.folder} were calibrated on {sorted(images)} and scored on {sorted(scored)} images: "
            "for one table run `repair` with one --images and one --score-images"
        )
    result: dict[str, Any] = {"images": images.pop(), "score_images": scored.pop(), "nets": {}, "cells": {}}
    for cell in found:
        name = cell["net"]
        if name not in result["nets"]:
            variance = running_variance(onnx.load(work.net(name)))
            result["nets"][name] = {**read_json(work.record(name)), "running_variance": variance}
        values = {key: cell[key] for key in cell if key not in ("net", "sparsity", "name", "settings")}
        result["cells"].setdefault(name, {}).setdefault(cell["sparsity"], {})[cell["name"]] = values
    return result


def merged(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge new nets and cells into earlier ones; nets that occur in both are replaced.

    Raises:
        SystemExit: When the two were not made with the same numbers of images.
    """
    for key in ("images", "score_images"):
        if before[key] != new[key]:
            raise SystemExit(
                f"the cells in the JSON have {key} {before[key]}, the new ones {new[key]}: one table has one number; "
                "run `repair` with that one, or remove the JSON and begin it anew"
            )
    result = dict(new)
    for part in ("nets", "cells"):
        found = before[part] | new[part]
        result[part] = {name: found[name] for name in (*NETS, *sorted(set(found) - set(NETS))) if name in found}
    return result


def running_variance(model: onnx.ModelProto) -> float:
    """Median running variance over all channels; the moving average starts at 1."""
    values = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    variances = [values[node.input[4]] for node in model.graph.node if node.op_type == "BatchNormalization"]
    return float(np.median(np.concatenate(variances)))
