"""The sections of docs/howto.md, and their blocks."""

from __future__ import annotations

import re

from tools.paths import ROOT

_SECTIONS = re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", (ROOT / "docs" / "howto.md").read_text(), re.MULTILINE)


def section(title: str) -> str:
    """The text under a heading."""
    return dict(_SECTIONS)[title]


def block(text: str, language: str) -> str:
    """The one block of a language."""
    (code,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return code
