"""The independent script that scores detectors on COCO, which is not part of the repository."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tools.paths import ASSETS

SCRIPT = ASSETS.parent / "tools" / "score_coco.py"


def scorer() -> ModuleType:
    """The script as a module; the test is skipped where it, or OpenCV, is missing."""
    if not SCRIPT.exists():
        pytest.skip("needs ../shared/tools/score_coco.py")
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    spec = importlib.util.spec_from_file_location("score_coco", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
