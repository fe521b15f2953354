"""Which parts of a picture are looked at: its middle, or several parts whose logits are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal, NamedTuple, TypeAlias, get_args

from runtime.errors import UsageError
from runtime.preprocess import Part, PreprocessSpec

Views: TypeAlias = Literal["center", "five", "grid"]
VIEWS: tuple[Views, ...] = get_args(Views)

_Place: TypeAlias = Literal["middle", "start", "end"]
_PLACES: tuple[_Place, ...] = get_args(_Place)


class Anchor(NamedTuple):
    """Where a view lies, whatever the size of the picture: its place along the rows and along the columns."""

    row: _Place
    column: _Place


_MIDDLE = Anchor("middle", "middle")
_GRID = tuple(Anchor(row, column) for row, column in product(_PLACES, _PLACES))
_CORNERS = tuple(anchor for anchor in _GRID if "middle" not in anchor)
_ANCHORS: dict[Views, tuple[Anchor, ...]] = {"center": (_MIDDLE,), "five": (_MIDDLE, *_CORNERS), "grid": _GRID}


def view_anchors(height: int, width: int, spec: PreprocessSpec, views: Views) -> list[Anchor]:
    """The views of a picture, the middle first; those that would show the same pixels once.

    Args:
        height: of the picture.
        width: of the picture.
        spec: its height and width are a view's.
        views: "center" for the middle; "five" for the middle and the four corners; "grid" for three by three, from
            border to border, which the five are part of. Views overlap where the picture is less than three long.
    """
    seen: dict[Part, Anchor] = {}
    for anchor in _ANCHORS[views]:
        seen.setdefault(part_at(anchor, height, width, spec), anchor)
    return list(seen.values())


def most_views(views: Views) -> int:
    """Views of a picture that is large enough to have them all."""
    return len(_ANCHORS[views])


def part_at(anchor: Anchor, height: int, width: int, spec: PreprocessSpec) -> Part:
    """The part of a picture that a view shows; where the picture is smaller than a view, so is the part."""
    return Part(
        _start(anchor.row, height, spec.height),
        _start(anchor.column, width, spec.width),
        min(height, spec.height),
        min(width, spec.width),
    )


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


def _start(place: _Place, size: int, view: int) -> int:
    """Where a view begins along an axis; in the middle, an odd remainder is cut at the end, as `center_crop` does."""
    last = max(0, size - view)
    return {"middle": last // 2, "start": 0, "end": last}[place]
