"""What the pass does with a configuration, apart from Olive."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

import onnx

from onnx_asr.data import Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import OnnxAsrError, OptionError
from onnx_asr.networks.execution import Execution
from onnx_asr.pruning.channels import prune_channels
from onnx_asr.pruning.compression import compress
from onnx_asr.pruning.options import ChannelPruneOptions, CompressOptions, PruneOptions
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import RefitRecipe, RepairOptions, check_choice
from onnx_asr.repairing.pipeline import repair
from onnx_asr.repairing.result import RepairResult

logger = logging.getLogger("olive.onnx_asr")  # Olive shows what loggers below its own say

Mode: TypeAlias = Literal["repair", "compress", "prune"]


class WorseError(OnnxAsrError):
    """A result that is further from the dense model than its input."""


_NESTED = ("repair", "refit")
_OWNERS = (RepairOptions, CompressOptions, PruneOptions, ChannelPruneOptions)


def library_options() -> dict[str, Any]:
    """The fields of the options classes of all modes and their types, nested ones aside."""
    found: dict[str, Any] = {}
    for owner in _OWNERS:
        hints = get_type_hints(owner)
        for name in (item.name for item in fields(owner) if item.name not in _NESTED):
            found[name] = found[name] | hints[name] if name in found else hints[name]
    return found


def made(source: Path, config: Mapping[str, Any], data: DataSource | None) -> onnx.ModelProto:
    """The model that a configuration makes of another one.

    Args:
        source: The model: a pruned one in mode "repair", else a dense one.
        config: ``mode``, ``dense``, ``preset``, ``preprocessing``, ``refit``, ``force`` and ``providers`` of the pass,
            and fields of the options classes; None, or left out, where the default holds.
        data: Calibration samples.

    Raises:
        WorseError: The result is further from the dense model than its input, and ``force`` is not set.
        OnnxAsrError: Bad options, models or data.
    """
    given = {name: value for name, value in config.items() if value is not None}
    mode = given.get("mode", "repair")
    check_choice("mode", mode, get_args(Mode))
    if mode != "repair" and "dense" in given:
        raise OptionError(f"dense does not apply to mode '{mode}', whose input is the dense model: drop it")
    if mode != "prune" and data is None:
        raise OptionError(f"mode '{mode}' needs calibration samples: give data_config, or a path as data")
    values = {name: given[name] for name in library_options() if name in given}
    steps = _preprocessing(given)
    execution = Execution(Runtime(providers=tuple(given["providers"]))) if given.get("providers") else Execution()
    if mode == "prune":
        return _pruned(source, values, given, data, steps, execution)
    assert data is not None
    recipe = _options(RefitRecipe, {"seed": values.get("seed", 0), **given.get("refit", {})}, "refit")
    force = given.get("force", False)
    if mode == "compress":
        own = {item.name for item in fields(CompressOptions)}
        rest = {name: value for name, value in values.items() if name not in own}
        if "method" in rest:
            raise OptionError("method does not apply to mode 'compress', which always refits: drop it")
        how = _options(CompressOptions, {name: values[name] for name in values.keys() & own}, mode)
        how = replace(how, repair=_options(RepairOptions, {**rest, "refit": recipe}, mode))
        result = compress(str(source), data, how, preprocessing=steps, execution=execution).repair
    else:
        options = _options(RepairOptions, {**values, "refit": recipe}, mode)
        dense = str(given["dense"]) if "dense" in given else None
        result = repair(str(source), data, options, dense=dense, force=force, preprocessing=steps, execution=execution)
    _check_verified(result, force)
    return result.model


def _pruned(
    source: Path,
    values: dict[str, Any],
    given: Mapping[str, Any],
    data: DataSource | None,
    steps: Preprocessing | None,
    execution: Execution,
) -> onnx.ModelProto:
    if "refit" in given:
        raise OptionError("refit does not apply to mode 'prune', which repairs nothing: drop it")
    if values.get("pattern") == ChannelPruneOptions.pattern:
        rest = {name: value for name, value in values.items() if name != "pattern"}
        return prune_channels(str(source), _options(ChannelPruneOptions, rest, "channels"), execution=execution).model
    zeros = _options(PruneOptions, values, "mode 'prune'")
    return prune(str(source), data, zeros, preprocessing=steps, execution=execution).model


def _preprocessing(given: Mapping[str, Any]) -> Preprocessing | None:
    changes = given.get("preprocessing", {})
    _check_known(Preprocessing, changes, "preprocessing")
    return Preprocessing.from_options(preset=given.get("preset"), **changes)


def _options(owner: type[Any], values: Mapping[str, Any], where: str) -> Any:
    _check_known(owner, values, where)
    return owner(**values)


def _check_known(owner: type[Any], values: Mapping[str, Any], where: str) -> None:
    known = [item.name for item in fields(owner) if item.name not in _NESTED]
    for name in (name for name in values if name not in known and name not in _NESTED):
        raise OptionError(f"'{name}' does not apply to {where}: drop it, or give one of {', '.join(known)}")


def _check_verified(result: RepairResult, force: bool) -> None:
    if result.verification is not None:
        before, after = result.verification.before, result.verification.after
        words = "distance from the dense model %.4g -> %.4g, on %d samples"
        logger.info(words, before.distance, after.distance, after.samples)
    if not result.improved and not force:
        raise WorseError(
            "the result is further from the dense model than the input: prune less, give more samples, or set force"
        )
