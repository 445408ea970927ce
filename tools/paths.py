"""Folders that several scripts read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""
MODELS = ROOT / "models"
"""The embedded nets."""
ASSETS = ROOT.parent / "shared" / "assets"
"""Larger nets and images. They are not part of the repository; scripts that need them look beside it."""
