"""Whether the import package is ours alone: the unrelated distribution onnx-asr has one of the same name."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import distributions

from onnx_asr.errors import OnnxAsrError

DISTRIBUTION, PACKAGE = "onnx-resuscitate", "onnx_asr"
_FILE = re.compile(rf"^{PACKAGE}/", re.MULTILINE)


@cache
def check_owner() -> None:
    """Refuse to run where another distribution has put files into the import package.

    Same result as ``importlib.metadata.packages_distributions()``, without parsing all metadata and lists of files.

    Raises:
        OnnxAsrError: Naming the other distribution, and how to install both apart.
    """
    others = set()
    for distribution in distributions():
        if _FILE.search(distribution.read_text("RECORD") or ""):
            others.add(distribution.metadata["Name"] or "")
    others = {name for name in others if re.sub(r"[-_.]+", "-", name).lower() != DISTRIBUTION}
    if others:
        names = ", ".join(sorted(others))
        raise OnnxAsrError(
            f"the import package '{PACKAGE}' of {DISTRIBUTION} is mixed with that of another distribution, {names}: "
            f"they cannot share an environment. Install {DISTRIBUTION} into a virtual environment of its own, or run: "
            f"pip uninstall {names.replace(',', '')} {DISTRIBUTION}; pip install {DISTRIBUTION}[cpu]"
        )
