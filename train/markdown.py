"""Figures and tables as the Markdown of reports shows them."""

from __future__ import annotations

from collections.abc import Sequence


def percent(share: float | None) -> str:
    """A share in percent with one decimal, or n/a."""
    return "n/a" if share is None else f"{100 * share:.1f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])
