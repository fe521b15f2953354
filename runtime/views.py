"""Which parts of a picture are looked at: its middle, or several parts whose logits are averaged."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

from runtime.errors import UsageError
from runtime.preprocess import PreprocessSpec

Views: TypeAlias = Literal["center", "five", "grid"]
VIEWS: tuple[Views, ...] = get_args(Views)


class Part(NamedTuple):
    """A rectangle of a picture that stands upright, in pixels."""

    top: int
    left: int
    height: int
    width: int


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
