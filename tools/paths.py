"""Folders that several scripts read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""
MODELS = ROOT / "models"
"""The embedded nets."""
ASSETS = ROOT.parent / "shared" / "assets"
"""Larger nets and images, which are not part of the repository: beside it, where they are there at all."""
