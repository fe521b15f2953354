"""The picture of a saliency report: crops, Grad-CAM++ and evidence, generator by generator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import LABELS
from train.drawing import plain_label, write_png
from train.saliency import SaliencyPicture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PER_LINE = 3  # pictures side by side, each with its two maps
PANELS = ("crop", "Grad-CAM++", "evidence")
# In inches.
TILE, GAP, PICTURE_GAP, TITLE, NAME, MARGIN = 1.3, 0.04, 0.22, 0.24, 1.75, 0.15
HEAD, FOOT = 0.35, 0.75
EVIDENCE_COLOURS, GRADCAM_COLOURS = "RdBu_r", "inferno"
OVERLAY = 0.55
MAX_NAME = 20  # characters beside the pictures
SCALE_QUANTILE = 0.98  # one extreme cell would make all others white


class _Line(NamedTuple):
    """Pictures that stand side by side, by their number."""

    name: str
    numbers: Sequence[int]


def write_sheet(path: Path, pictures: Sequence[SaliencyPicture], images: NDArray[np.uint8]) -> None:
    """Writes the PNG, atomically.

    Args:
        path: file to write.
        pictures: those of one class of one generator one after the other.
        images: (N, H, W, 3) their crops.
    """
    # Figure without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    lines = _lines(pictures)
    width = NAME + PER_LINE * _picture_width() - PICTURE_GAP + MARGIN
    height = HEAD + len(lines) * (TILE + TITLE) + FOOT
    figure = Figure(figsize=(width, height))
    limit = evidence_limit(pictures)
    for number in range(PER_LINE * len(PANELS)):
        x = NAME + number // len(PANELS) * _picture_width() + (number % len(PANELS) + 0.5) * (TILE + GAP)
        figure.text(x / width, 1 - 0.6 * HEAD / height, PANELS[number % len(PANELS)], ha="center", fontsize=9)
    for row, line in enumerate(lines):
        bottom = height - HEAD - (row + 1) * (TILE + TITLE)
        middle = (bottom + TILE / 2) / height
        figure.text(MARGIN / width, middle, line.name, va="center", fontsize=9, linespacing=1.4)
        for column, number in enumerate(line.numbers):
            left = NAME + column * _picture_width()
            _draw(figure, (left, bottom), pictures[number], images[number], limit)
    _scales(figure, limit)
    write_png(path, figure, dpi=100)


def evidence_limit(pictures: Sequence[SaliencyPicture]) -> float:
    """Calibrated logit at either end of the sheet's one scale."""
    cells = np.abs(np.concatenate([np.ravel(picture.evidence) for picture in pictures]))
    return float(np.quantile(cells, SCALE_QUANTILE)) or 1.0


def _lines(pictures: Sequence[SaliencyPicture]) -> list[_Line]:
    groups: dict[tuple[str, int], list[int]] = {}
    for number, picture in enumerate(pictures):
        groups.setdefault((picture.generator, picture.label), []).append(number)
    return [
        _Line(f"{_short(generator)}\n{LABELS[label]}", numbers[start : start + PER_LINE])
        for (generator, label), numbers in groups.items()
        for start in range(0, len(numbers), PER_LINE)
    ]


def _short(generator: str) -> str:
    return plain_label(generator if len(generator) <= MAX_NAME else generator[: MAX_NAME - 1] + "…")


def _picture_width() -> float:
    return len(PANELS) * (TILE + GAP) - GAP + PICTURE_GAP


def _draw(
    figure: Figure, corner: tuple[float, float], picture: SaliencyPicture, image: NDArray[np.uint8], limit: float
) -> None:
    width, height = figure.get_size_inches()
    left, bottom = corner
    tiles = [
        figure.add_axes(
            ((left + panel * (TILE + GAP)) / width, bottom / height, TILE / width, TILE / height), xticks=[], yticks=[]
        )
        for panel in range(len(PANELS))
    ]
    rows, columns = image.shape[:2]
    extent = (0, columns, rows, 0)
    grey = image.mean(axis=2)
    tiles[0].imshow(image)
    tiles[1].imshow(grey, cmap="gray", vmin=0, vmax=255)
    tiles[1].imshow(
        picture.gradcam,
        cmap=GRADCAM_COLOURS,
        vmin=0,
        vmax=1,
        alpha=OVERLAY,
        extent=extent,
        interpolation="bilinear",
    )
    tiles[2].imshow(picture.evidence, cmap=EVIDENCE_COLOURS, vmin=-limit, vmax=limit, interpolation="nearest")
    colour = "firebrick" if picture.choice == "mistake" else "black"
    said = f"{picture.verdict} {picture.fake_probability:.2f}" + (", mistake" if picture.choice == "mistake" else "")
    tiles[1].set_title(said, fontsize=9, color=colour, pad=2.5)


def _scales(figure: Figure, limit: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width, height = figure.get_size_inches()
    bars = (
        (GRADCAM_COLOURS, (0.0, 1.0), "Grad-CAM++, each picture's own scale", "neither"),
        (EVIDENCE_COLOURS, (-limit, limit), "evidence: calibrated logit, below 0 real, above 0 fake", "both"),
    )
    for number, (colours, ends, label, extend) in enumerate(bars):
        place = ((NAME + number * 6.2) / width, (FOOT - 0.3) / height, 5.2 / width, 0.14 / height)
        bar = figure.colorbar(
            ScalarMappable(Normalize(*ends), colours),
            cax=figure.add_axes(place),
            orientation="horizontal",
            extend=extend,
        )
        bar.set_label(label, fontsize=9)
        bar.ax.tick_params(labelsize=8)
