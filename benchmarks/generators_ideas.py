"""What was tried to do better on unseen generators, each with what the held-out ones say of it: for docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.markdown import percent


@dataclass(frozen=True)
class Idea:
    """One thing that was tried.

    Attributes:
        title: of its paragraph.
        text: what it is.
        variants: those of each recipe that try it.
        beside: the variant of each recipe that has everything else alike.
    """

    title: str
    text: str
    variants: Mapping[str, tuple[str, ...]]
    beside: Mapping[str, str]


IDEAS = (
    Idea(
        "Less of the contrastive loss",
        "Eq. (5) with less weight (`--scl-weight`): the method, nearer to its control without that loss.",
        {"server": ("depths+eta=0.02+scl=0.1",)},
        {"server": "depths+eta=0.02"},
    ),
    Idea(
        "Less of it, or of the traces in it, with the classifier on both",
        "As above, or with a smaller `--eta`, where the classifier reads the embedding beside z.",
        {"server": ("depths+eta=0.005+both", "depths+eta=0.02+both+scl=0.1", "depths+eta=0.02+both+scl=0.3")},
        {"server": "depths+eta=0.02+both"},
    ),
    Idea(
        "High-frequency residual",
        "The frozen encoder reads each pixel without the mean of the 3 x 3 around it (`--encoder-input residual`), or "
        "that and the picture (`both`, here rgb-residual), since traces of synthesis are of high frequency. What it "
        "gains here was not found again on the unseen generators of the test split (depths+eta=0.02 beside it there).",
        {"edge": ("depths+eta=0.02+residual", "depths+eta=0.02+rgb-residual")},
        {"edge": "depths+eta=0.02"},
    ),
)
UNMEASURED = """## What is not in the tables

**Several crops of a picture.** The pictures have the encoder's own 224 px, so that a crop of that size is the whole
picture: without augmentation both training views are equal, and the runtime's `--views five`, which is for larger
pictures, gives the verdict of one view.

**Statistics over 32 px patches.** They have no option of their own. Every variant with depths reads the mean and the
standard deviation of the first stages' maps, whose cells see 7, 19 and 67 px in lite0; rows of Eq. (5) from random
crops of 32 px are those of ntf-paper.

**Not tried here.** Blocks of the encoder that stage 2 trains as well, augmented views of a frozen encoder, `bce` at
224 px or for more epochs than the four at 112 px above, `bce` with the rebuilt photographs, which double its training
time, and, without these, the control without the contrastive loss on picture and residual (rgb-residual+no-scl)."""


def ideas_section(recipe: str, choice: Mapping[str, Any]) -> str:
    """A paragraph for each idea that this recipe has tried; nothing where it has tried none.

    Args:
        recipe: its name.
        choice: what `choose` found.
    """
    paragraphs = []
    for idea in IDEAS:
        tried = [name for name in idea.variants.get(recipe, ()) if name in choice["variants"]]
        if tried:
            paragraphs.append(
                f"**{idea.title}.** {idea.text} {_outcome(tried, idea.beside[recipe], choice['variants'])}"
            )
    return "\n\n".join(paragraphs)


def _outcome(tried: list[str], beside: str, variants: Mapping[str, Mapping[str, Any]]) -> str:
    """Mean AP of the variants and of the one beside them, and how far the best of them is from it."""
    means = {name: variants[name]["mean"] for name in (*tried, beside)}
    shown = ", ".join(f"{name} {'failed' if means[name] is None else percent(means[name])}" for name in tried)
    found = {name: means[name] for name in tried if means[name] is not None}
    text = f"Mean AP on the held-out generators: {shown}; {beside} {percent(means[beside])}."
    if not found or means[beside] is None:
        return text
    best = max(found, key=lambda name: found[name])
    points = 100 * (found[best] - means[beside])
    return f"{text} It {'gains' if points > 0 else 'loses'} {abs(points):.2f} points at best, with {best}."
