"""Nodes that have parameters but are not changed, each with a stable code for programs and a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Reason:
    """Why a node is skipped.

    Attributes:
        code: Stable name in kebab case.
        text: The sentence, with ``{fields}`` for :meth:`format` where it depends on the node.
    """

    code: str
    text: str

    def format(self, **values: object) -> Reason:
        """The same reason with its fields filled in."""
        return replace(self, text=self.text.format(**values))


@dataclass(frozen=True)
class Skip:
    """A node that has parameters but is not changed, and why.

    Attributes:
        node: Position of the node.
        name: The node's name in reports.
        op_type: Its operator.
        reason: A sentence for people, which may change between versions.
        code: A name for programs, which does not.
    """

    node: int
    name: str
    op_type: str
    reason: str
    code: str
