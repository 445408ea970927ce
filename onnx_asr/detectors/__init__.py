"""Detectors: outputs to boxes, boxes to average precision."""

from __future__ import annotations

from typing import Literal, get_args

DecodingName = Literal["yolox", "yolov5", "yolov8", "ssd", "nms", "nanodet", "fastestdet", "yolofastestv2"]
DECODINGS: tuple[DecodingName, ...] = get_args(DecodingName)
"""What the outputs of a detector can be read as; :mod:`onnx_asr.detectors.decoding` says how."""
