from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data.samples import pixels, write_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three 8 x 8 images."""
    root = tmp_path / "images"
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        write_image(root / name, pixels(8, 8, 3, seed=seed))
    return root
