"""Load, check and save models; the only place that touches model files.

A model is written beside its destination and then renamed over it, so that an existing file is either kept whole or
replaced whole. External data goes into a separate file whose name carries a digest: the old pair stays valid until the
rename, and the old data file goes after it if this package wrote it and nothing else refers to it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError

from onnx_asr.errors import ModelError, OutputError
from onnx_asr.files.outputs import Destination, beside, cannot_write, permissions, write_through
from onnx_asr.graph.edit import set_metadata
from onnx_asr.graph.external import data_files, read_external, refuse_pointer, remove_obsolete
from onnx_asr.graph.foreign import ForeignModel, exported
from onnx_asr.graph.index import FLOAT_TYPES, STANDARD_DOMAINS, GraphIndex, bodies, is_standard, subgraphs
from onnx_asr.graph.layers import LAYERS, NORMALIZATION
from onnx_asr.graph.order import topologically_sorted
from onnx_asr.graph.tensors import (
    content_of,
    detached,
    is_left,
    is_self_contained,
    location_of,
    point_to,
    stored_path,
)

ModelSource: TypeAlias = "onnx.ModelProto | str | os.PathLike[str] | ForeignModel"
"""Whatever an entry point takes as a model: a path, or a model of onnx, onnx-graphsurgeon or onnx-ir."""

_EXTERNAL_THRESHOLD = 1024
_INLINED = "onnx_asr.inlined_functions"
_WITH_SUBGRAPHS = frozenset({"If", "Loop", "Scan", "SequenceMap"})  # onnx checks their bodies only with the whole model
_ALIGNMENT = 4096  # of weights in a data file: they can be memory-mapped


def opened(source: ModelSource, *, external_links: bool = False) -> tuple[onnx.ModelProto, str]:
    """Load a model as :func:`onnx_asr.engine.loading.load` does, but without a judgement on operators unknown to onnx.

    Returns:
        The model; and what onnx's checker says of the first operator that it does not know, or no longer, in this
        operator set. Empty where it knows all.

    Raises:
        ModelError: There is no such file, it is not an ONNX model, or the object cannot be exported to one.
    """
    if isinstance(source, (str, os.PathLike)):
        model = _read(Path(source), external_links)
    else:
        model = source if isinstance(source, onnx.ModelProto) else exported(source)
        missing = [tensor.name for tensor in model.graph.initializer if is_left(tensor) and not location_of(tensor)[0]]
        if missing:
            raise ModelError(f"the value of '{missing[0]}' is external data that was not loaded; give the model's path")
    _check_whole(model, source)
    model = topologically_sorted(_inlined(model) if model.functions else model)
    return model, _check_valid(model, source)


def _check_whole(model: onnx.ModelProto, source: ModelSource) -> None:
    """Refuse a model without nodes, without a version of its format or operators, or with two values for one name."""
    if not model.graph.node:
        raise ModelError(
            f"{named(source)} is not an ONNX model, or an empty one: it has no nodes; give an exported network"
        )
    if not model.HasField("ir_version"):
        raise ModelError(
            f"{named(source)} has no ir_version, without which onnxruntime does not load it: export it again, or set "
            "the version of the ONNX format that it was made for"
        )
    imported = {entry.domain or "ai.onnx" for entry in model.opset_import}
    missing = [node for node in model.graph.node if (node.domain or "ai.onnx") not in imported]
    if missing or not imported:
        which = f" for the domain '{missing[0].domain or 'ai.onnx'}'" if missing and imported else ""
        raise ModelError(
            f"{named(source)} has no opset_import{which}, so the version of its operators is unknown: export it "
            "again, or add the version that it was made for"
        )
    for graph in (model.graph, *bodies(model.graph.node)):
        names = [tensor.name for tensor in graph.initializer]
        names += [tensor.values.name for tensor in graph.sparse_initializer]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ModelError(
                f"{named(source)} holds the tensor '{repeated[0]}' twice (initializers of one name), so its value is "
                "ambiguous: export it again, or remove one of the two"
            )


def _read(path: Path, external_links: bool) -> onnx.ModelProto:
    if not (path.is_file() or path.is_fifo()):
        what = "is a folder" if path.is_dir() else "is a device or socket" if path.exists() else "does not exist"
        raise ModelError(f"model file '{path}' {what}; give the path of an .onnx file")
    refuse_pointer(path)
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, TypeError) as error:
        raise ModelError(f"'{path}' is not an ONNX model ({error}); give a file written by an ONNX exporter") from error
    except OSError as error:
        raise ModelError(f"cannot read the model '{path}': {error}; check its permissions") from error
    try:
        read_external(model, path, external_links)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"the data files of '{path}' do not fit it ({error}): they are incomplete, or those of another version of "
            "the model; get all of them again, together"
        ) from error
    except (OSError, RuntimeError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"cannot read the model '{path}': {error}; weights outside the file must be plain files in its folder"
        ) from error
    return model


def inlined_functions(model: onnx.ModelProto) -> str | None:
    """Names of the model-local functions that were inlined when the model was loaded."""
    return next((entry.value for entry in model.metadata_props if entry.key == _INLINED), None)


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.inliner.inline_local_functions(model)
    domains = {function.domain for function in model.functions} - {node.domain for node in result.graph.node}
    for item in [item for item in result.opset_import if item.domain in domains - {"", "ai.onnx"}]:
        result.opset_import.remove(item)
    set_metadata(result, _INLINED, ", ".join(f"{item.domain}::{item.name}" for item in model.functions))
    return result


def _check_valid(model: onnx.ModelProto, source: ModelSource) -> str:
    """Have onnx check operators and tensors; the package relies on their inputs, attributes and sizes.

    Not the whole model: onnxruntime runs many that the checker refuses for a missing graph name or output type. Returns
    the first objection to an operator that onnx has no rules for.
    """
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for domain, version in versions.items():
        if not 0 < version < 2**31 or isinstance(domain, bytes):  # protobuf returns undecodable text as bytes
            raise ModelError(
                f"{named(source)} is not a valid ONNX model: it asks for version {version} of the operators of "
                f"domain {domain!r}; export it again"
            )
    context = onnx.checker.C.CheckerContext()
    context.ir_version = onnx.IR_VERSION
    context.opset_imports = {"": versions.get("ai.onnx", 1), "ai.onnx": versions.get("", 1), **versions}
    objection = ""
    try:
        for tensor in model.graph.initializer:
            if not is_left(tensor):
                onnx.checker.check_tensor(tensor, context)
        for node in model.graph.node:
            if node.domain in STANDARD_DOMAINS and not (node.op_type in _WITH_SUBGRAPHS and any(subgraphs(node))):
                try:
                    onnx.checker.check_node(node, context)
                except onnx.checker.ValidationError as error:
                    if _is_known(node, context.opset_imports[node.domain]):
                        raise
                    objection = objection or _one_line(error)
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:  # it may quote undecodable bytes
        raise ModelError(f"{named(source)} is not a valid ONNX model: {_one_line(error)}; export it again") from error
    return objection


def _is_known(node: onnx.NodeProto, opset: int) -> bool:
    """Whether the installed onnx knows an operator as of an operator set, and does not call it deprecated there.

    A name that is not text is known to be wrong.
    """
    if isinstance(node.op_type, bytes):
        return True
    if opset > onnx.defs.onnx_opset_version():
        return False
    try:
        return not onnx.defs.get_schema(node.op_type, opset).deprecated
    except onnx.defs.SchemaError:
        return False


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def named(source: ModelSource) -> str:
    """A model's path, for messages."""
    return f"'{source}'" if isinstance(source, (str, os.PathLike)) else "the model"


def check_finite(index: GraphIndex, what: str) -> None:
    """Refuse NaN anywhere, and infinite weights; other constants may be infinite (padding before a pool, masks).

    Raises:
        ModelError: Naming the first constant that is not finite.
    """
    layers = (node for node in index.nodes if is_standard(node, *LAYERS, NORMALIZATION))
    weights = {name for node in layers for name in node.input if name and index.is_constant(name)}
    stored = [output for node in index.nodes if is_standard(node, "Constant") for output in node.output]
    for name in dict.fromkeys([*index.initializers, *stored, *sorted(weights)]):
        if index.element_type(name) not in FLOAT_TYPES:
            continue
        value = index.value(name).astype(np.float32, copy=False)
        if np.isnan(value).any() or (name in weights and not np.isfinite(value).all()):
            raise ModelError(
                f"constant '{name}' of the {what} model holds NaN or infinite values; "
                "repair needs finite weights: check the training run or the tool that pruned it"
            )


def digest(model: onnx.ModelProto) -> str:
    """SHA-256 of a serialized model; of one over 2 GB, of the graph followed by its large weights."""
    light, large = (model, {}) if is_self_contained(model) else detached(model)
    sha = hashlib.sha256(light.SerializeToString(deterministic=True))
    for tensor in large.values():
        sha.update(content_of(tensor))
    return sha.hexdigest()


def save(model: onnx.ModelProto, path: str | os.PathLike[str], *, external_data: bool = False) -> Path:
    """Write a model: a file whole or not at all, behind symbolic links where the path is one; into a device or pipe.

    External data is written on request, or where the model is over protobuf's 2 GB. Into a pipe, and through a link
    into another folder, the weights go with the model. A data file that an earlier call wrote for this path is removed
    if no model of the folder refers to it any more; one over 2 GB stays, as models in memory may read it later.

    Raises:
        OutputError: It cannot be written; an existing file is unchanged.
    """
    destination = Destination.of(path)
    if not destination.takes_data:
        check_embeddable(is_self_contained(model), destination)
        external_data = False
    if destination.file is None:
        destination.write(model.SerializeToString())
        return destination.path
    _save(model, destination.file, external_data or not is_self_contained(model))
    return destination.path


def check_embeddable(fits: bool, destination: Destination) -> None:
    """Refuse a destination beside which no data file can be, for a model that does not fit one file.

    Raises:
        OutputError: When the model needs a data file.
    """
    if not destination.takes_data and not fits:
        raise OutputError(
            f"'{destination.path}' is a pipe, a device or a link into another folder, and a model over 2 GB needs a "
            "second file beside it for its weights: give the path of a file"
        )


def _save(model: onnx.ModelProto, target: Path, external: bool) -> None:
    old = data_files(target, read_whole=True)
    new = beside(target, "onnx")
    leftovers = [new]  # listed before they exist: an interrupt may come at any time
    whole = False
    try:
        if external:
            data = target.with_name(f"{target.name}.{digest(model)[:12]}.data")
            part = beside(data, "tmp")
            leftovers.append(part)
            model = _write_data(model, part, stored_path(data.name))
            if not data.exists():
                leftovers.append(data)
            part.replace(data)
        onnx.save(model, new)
        write_through(new)
        new.chmod(permissions(target))
        whole = True
        new.replace(target)
    except BaseException as error:
        if not whole or new.exists():  # else it is in place and needs its data file
            for leftover in leftovers:
                leftover.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(target, error) from error
        if isinstance(error, (ValueError, onnx.checker.ValidationError)):
            raise OutputError(
                f"cannot write '{target}': {error}; keep large constants as initializers, which may be external data"
            ) from error
        raise
    if old:
        remove_obsolete(old - data_files(target), target)


def _write_data(model: onnx.ModelProto, path: Path, location: str) -> onnx.ModelProto:
    """Write weights into a data file; return a copy of the model that refers to them by the name ``location``."""
    light, large = detached(model, _EXTERNAL_THRESHOLD)
    with path.open("wb") as file:
        for position, tensor in large.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offset = file.tell()
            length = file.write(content_of(tensor))
            point_to(light.graph.initializer[position], {"location": location, "offset": offset, "length": length})
    write_through(path)
    return light


def is_external(path: str | os.PathLike[str]) -> bool:
    """Whether a model file keeps its weights in external data files."""
    return bool(data_files(Path(path)))
