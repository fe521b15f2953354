"""The six photographs of the demo data, who made them, and what their packages say about their licences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LICENCES_TITLE = "# Licences of the demo pictures"  # also how a folder of demo data is recognised


@dataclass(frozen=True)
class Photograph:
    """One photograph inside an installed package.

    Attributes:
        name: its name in the demo data.
        package: distribution that carries the file.
        author: as far as the package's statement names one.
        licence: what the statement grants.
        statement: where the statement stands.
        source: where the package says that the picture comes from.
        remark: what is unclear in the statement; empty where nothing is.
    """

    name: str
    package: str
    author: str
    licence: str
    statement: str
    source: str
    remark: str = ""


PHOTOGRAPHS = {
    p.name: p
    for p in (
        Photograph(
            "astronaut",
            "scikit-image",
            "NASA",
            "public domain",
            "docstring of skimage.data.astronaut",
            "https://flic.kr/p/r9qvLn",
            "The statement knows of no copyright restriction; it names no photographer.",
        ),
        Photograph(
            "chelsea",
            "scikit-image",
            "Stefan van der Walt",
            "CC0",
            "docstring of skimage.data.chelsea",
            "given by the photographer",
        ),
        Photograph(
            "coffee",
            "scikit-image",
            "Rachel Michetti, courtesy of Pikolo Espresso Bar",
            "CC0",
            "docstring of skimage.data.coffee",
            "given by the photographer",
        ),
        Photograph(
            "rocket",
            "scikit-image",
            "SpaceX",
            "public domain",
            "docstring of skimage.data.rocket",
            "https://www.flickr.com/photos/spacexphotos/16511594820/",
            "The statement rests on a news article of 2015 about the release into the public domain.",
        ),
        Photograph(
            "china",
            "scikit-learn",
            "danielbuechele (Flickr)",
            "CC BY 2.0",
            "sklearn/datasets/images/README.txt",
            "https://www.flickr.com/photos/danielbuechele/6061409035/",
        ),
        Photograph(
            "flower",
            "scikit-learn",
            "vultilion or danielbuechele (Flickr)",
            "CC BY 2.0",
            "sklearn/datasets/images/README.txt",
            "https://www.flickr.com/photos/vultilion/6056698931/",
            "Unclear: the statement names danielbuechele, but both of its links lead to vultilion; credit both.",
        ),
    )
}


def load_photograph(name: str) -> NDArray[np.uint8]:
    """The photograph as (H, W, 3) uint8, read from the installed package."""
    if PHOTOGRAPHS[name].package == "scikit-image":
        import skimage.data

        picture = getattr(skimage.data, name)()
    else:
        from sklearn.datasets import load_sample_image

        picture = load_sample_image(f"{name}.jpg")
    return np.ascontiguousarray(picture, dtype=np.uint8)


def licences_markdown(names: tuple[str, ...]) -> str:
    """The table of the named photographs, as it is laid beside pictures made from them."""
    lines = [
        LICENCES_TITLE,
        "",
        "Every picture here is a resized crop of one of these photographs, or such a crop rebuilt by a small neural",
        "network; all of them were then compressed as JPEG. The photographs come with installed Python packages.",
        "CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/) asks whoever passes them on to name the author,",
        "the licence and these changes.",
        "",
        "| photograph | package | author | licence | stated in | source | remark |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        p = PHOTOGRAPHS[name]
        cells = (p.name, p.package, p.author, p.licence, p.statement, p.source, p.remark)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
