"""Models loaded: onnx's checker judges them, and onnxruntime where the checker does not know an operator."""

from __future__ import annotations

import onnx

from onnx_asr.engine.session import Runtime, Session
from onnx_asr.errors import ModelError
from onnx_asr.graph.model_io import ModelSource, named, opened


def load(source: ModelSource, *, external_links: bool = False) -> onnx.ModelProto:
    """Load a model, external data included, nodes in order; a ModelProto that is so already is returned as it is.

    Of a model over protobuf's 2 GB the large weights are left in their file (see ``graph/tensors.py``). Model-local
    functions are inlined, with a metadata entry that names them: only then do their nodes have weights. ``source`` is
    not modified. A pipe is read to its end.

    Operators that the installed onnx calls deprecated in the model's operator set, or has no rules for there, are
    accepted if onnxruntime loads the model: it runs many in sets that never had them, or have them no longer.

    Args:
        source: A path, or an object of onnx, onnx-graphsurgeon or onnx-ir.
        external_links: Read external data through symbolic links, too, as long as these lead into the folder where the
            model itself really is, as in the cache of Hugging Face.

    Raises:
        ModelError: There is no such file, it is not an ONNX model, or the object cannot be exported to one.
    """
    model, objection = opened(source, external_links=external_links)
    if objection:
        try:
            Session(model, Runtime(optimized=False), "it")
        except ModelError as error:
            raise ModelError(f"{named(source)} is not a valid ONNX model: {objection}; {error}") from error
    return model
