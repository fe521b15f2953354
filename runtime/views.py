"""Which parts of a picture are looked at: its middle, or several parts whose logits are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from runtime.decode import PictureSource, decode_part
from runtime.errors import UsageError
from runtime.preprocess import Part, PreprocessSpec, prepare

Views: TypeAlias = Literal["center", "five", "grid"]
VIEWS: tuple[Views, ...] = get_args(Views)


def view_parts(height: int, width: int, spec: PreprocessSpec, views: Views) -> list[Part]:
    """The parts that are looked at, the middle one first, each once.

    Args:
        height: of the picture.
        width: of the picture.
        spec: its height and width are a view's; a picture that is smaller along an axis has one view there, as long
            as the picture, which `prepare` pads.
        views: "center" for the middle; "five" for the middle and the four corners; "grid" for three by three, from
            border to border, which the five are part of. Views overlap where the picture is less than three long.
    """
    rows, columns = _positions(height, spec.height), _positions(width, spec.width)
    middle = [(rows[0], columns[0])]
    corners = [(row, column) for row in rows[1:] for column in columns[1:]]
    grid = [(row, column) for row in rows for column in columns]
    places = {"center": middle, "five": middle + corners, "grid": grid}[views]
    size = (min(height, spec.height), min(width, spec.width))
    return [Part(row, column, *size) for row, column in dict.fromkeys(places)]


def view_crops(
    source: PictureSource, spec: PreprocessSpec, views: Views, *, max_pixels: int
) -> list[NDArray[np.uint8]]:
    """Model inputs (H, W, 3) uint8, one for each view of a picture, the middle one first.

    Args:
        source: as for `runtime.decode.decode_picture`.
        spec: of the model.
        views: as for `view_parts`.
        max_pixels: largest picture that is accepted, height times width.

    Raises:
        PictureError: as for `runtime.decode.decode_picture`.
    """
    decoded = decode_part(
        source, lambda height, width: bounding_part(view_parts(height, width, spec, views)), max_pixels=max_pixels
    )
    parts = view_parts(decoded.height, decoded.width, spec, views)
    return [prepare(part.within(decoded.part).of(decoded.rgb), spec) for part in parts]


def bounding_part(parts: Sequence[Part]) -> Part:
    """The smallest part that holds all of these, one or more."""
    top, left = min(part.top for part in parts), min(part.left for part in parts)
    bottom, right = max(part.top + part.height for part in parts), max(part.left + part.width for part in parts)
    return Part(top, left, bottom - top, right - left)


def require_views(views: object) -> Views:
    """`views`, when it is one of VIEWS.

    Raises:
        UsageError: it is not.
    """
    for known in VIEWS:
        if views == known:
            return known
    raise UsageError("views", got=repr(views), wanted=f"one of {', '.join(VIEWS)}", remedy="choose one of these")


def _positions(size: int, view: int) -> tuple[int, int, int]:
    """Where views begin along an axis: in the middle, as `center_crop` has it, at the start, at the end."""
    last = max(0, size - view)
    return last // 2, 0, last
