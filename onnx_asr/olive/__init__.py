"""A pass of Microsoft's Olive. Olive is imported when the pass is asked for, and not before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_asr.olive.resuscitation import ResuscitatePass as ResuscitatePass

__all__ = ["ResuscitatePass"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from onnx_asr.olive.resuscitation import ResuscitatePass

    return ResuscitatePass
