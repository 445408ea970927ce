"""Input specs and images for the tests of this room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from onnx_asr.data import PRESETS, InputSpec

FLOAT = np.dtype(np.float32)
RGB8 = InputSpec("input", FLOAT, (None, 3, 8, 8))
ANY = InputSpec("input", FLOAT, (None, 3, None, None))
VECTOR = InputSpec("x", FLOAT, (None, 4))
UNIT = PRESETS["unit"]


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
