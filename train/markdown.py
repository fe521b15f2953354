"""Text of Markdown reports: tables, shares, and names that are shown as they are written."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Underscores inside of a word, as in most generators' names, are no emphasis and stay readable in the source.
_MARKUP = re.compile(r"[\\`*<&|]|(?<=\])[\[(]|(?<!\w)_|_(?!\w)")


def percent(share: float | None) -> str:
    """A share in percent with one decimal, or n/a."""
    return "n/a" if share is None else f"{100 * share:.1f}"


def decimal(value: float | None) -> str:
    """A number with two decimals, or n/a."""
    return "n/a" if value is None else f"{value:.2f}"


def markdown_text(text: str) -> str:
    """Any text in one line, with a backslash before whatever Markdown would take for markup."""
    return _MARKUP.sub(lambda match: "\\" + match.group(), " ".join(text.split()))


def markdown_code(text: str) -> str:
    """Any text in one line as a code span, whose fence is longer than the backticks in it."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if "`" in line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column to the left and the others to the right; its cells are plain text."""
    lines = ["| " + " | ".join(map(markdown_text, head)) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(markdown_text, row)) + " |" for row in rows])
