"""Torch nets as ONNX with their BatchNormalization nodes kept; needs torch."""

from __future__ import annotations

import io
import warnings

import onnx
import torch
from torch import nn

OPSET = 17


def exported(net: nn.Module, shape: tuple[int, ...], *, fold: bool = False) -> bytes:
    """The file of a net in evaluation mode, which goes to the CPU for it, for inputs [N, *shape] with any N.

    `TrainingMode.EVAL` folds BatchNormalization into the convolutions, if asked for; `PRESERVE` on a net in evaluation
    mode does not.

    Raises:
        SystemExit: When BatchNormalization was folded all the same, or stands there in training form.
    """
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter announces its deprecation
        torch.onnx.export(
            net.to("cpu", memory_format=torch.contiguous_format),  # type: ignore[call-overload]
            (torch.zeros(2, *shape),),
            content,
            opset_version=OPSET,
            dynamo=False,
            training=torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
        )
    model = onnx.load_from_string(content.getvalue())
    onnx.checker.check_model(model, full_check=True)
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    if not fold and len(norms) != sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        raise SystemExit("the exporter folded BatchNormalization nodes away: use another torch")
    if any(len(node.output) != 1 or any(a.name == "training_mode" and a.i for a in node.attribute) for node in norms):
        raise SystemExit("a BatchNormalization node was exported in training form: use another torch")
    return content.getvalue()
