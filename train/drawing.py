"""What all figures of reports share: labels that are shown as names are written, and PNG files that are whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from train.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plain_label(name: str) -> str:
    """A name as matplotlib shows it: in one line, never read as a formula, and never left out of a legend."""
    label = " ".join(name.split()).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def write_png(path: Path, figure: Figure, *, dpi: int) -> None:
    """Writes the figure, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())
