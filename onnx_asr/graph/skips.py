"""Nodes that have parameters but are not changed, each with a stable code for programs and a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Reason:
    """Why a node is skipped: a stable code in kebab case, and a sentence that may have ``{fields}`` to fill in."""

    code: str
    text: str

    def format(self, **values: object) -> Reason:
        """The same reason with its fields filled in."""
        return replace(self, text=self.text.format(**values))


@dataclass(frozen=True)
class Skip:
    """A node that has parameters but is not changed, and why.

    Attributes:
        node: Its position.
        name: Its name in reports.
        reason: A sentence for people, which may change between versions.
        code: A name for programs, which does not.
    """

    node: int
    name: str
    op_type: str
    reason: str
    code: str
