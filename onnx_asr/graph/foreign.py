"""Models held by onnx-graphsurgeon or onnx-ir, exported to a ModelProto.

Neither library is imported here: one that its user has not imported cannot have made the object in hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx

from onnx_asr.errors import ModelError

if TYPE_CHECKING:
    import onnx_graphsurgeon
    import onnx_ir

ForeignModel: TypeAlias = "onnx_graphsurgeon.Graph | onnx_ir.Model"


def exported(source: ForeignModel) -> onnx.ModelProto:
    """Export a model with its own library, and leave it as it was.

    Raises:
        ModelError: The object is not a model of these libraries, or its library cannot export it.
    """
    gs: Any = sys.modules.get("onnx_graphsurgeon")
    ir: Any = sys.modules.get("onnx_ir")
    export: Callable[[Any, Any], onnx.ModelProto]
    if gs is not None and isinstance(source, gs.Graph):
        library, export = gs, _from_graphsurgeon
    elif ir is not None and isinstance(source, ir.Model):
        library, export = ir, _from_ir
    else:
        raise ModelError(
            f"the model is of type {type(source).__module__}.{type(source).__qualname__}; give a path, an "
            "onnx.ModelProto, an onnx_graphsurgeon.Graph or an onnx_ir.Model"
        )
    try:
        return export(library, source)
    except Exception as error:  # neither library says what it raises for a broken graph
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise ModelError(
            f"{library.__name__} cannot export the graph ({reason}); fix the graph until its own library exports it"
        ) from error


def _from_graphsurgeon(gs: Any, graph: Any) -> onnx.ModelProto:
    if graph.import_domains is None and graph.opset is None:
        raise ValueError("it has no opset")
    before = [(owner, owner.import_domains) for owner in (graph, *graph.functions)]
    try:
        for owner, domains in before:
            owner.import_domains = None if domains is None else list(domains)  # an export adds to it
        exported: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    finally:
        for owner, domains in before:
            owner.import_domains = domains
    return exported


def _from_ir(ir: Any, model: Any) -> onnx.ModelProto:
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    if any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors):
        model = ir.external_data.load_to_model(model.clone())
    exported: onnx.ModelProto = ir.to_proto(model)
    return exported
