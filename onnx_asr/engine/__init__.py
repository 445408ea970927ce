"""Execution: the only part of the package that imports onnxruntime."""

from __future__ import annotations

from onnx_asr.errors import OnnxAsrError

try:
    import onnxruntime as _onnxruntime  # noqa: F401
except ImportError as error:
    raise OnnxAsrError(
        f"onnxruntime cannot be imported ({error}); install one of its builds: pip install 'onnx-resuscitate[cpu]' "
        "(or [gpu] for onnxruntime-gpu)"
    ) from error
