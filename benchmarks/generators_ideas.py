"""What was tried to do better on unseen generators, each with what the held-out ones say of it: for docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from train.markdown import percent


@dataclass(frozen=True)
class Idea:
    """One thing that was tried.

    Attributes:
        title: of its paragraph.
        text: what it is, or why it could not be tried.
        variants: those of each recipe that try it.
        beside: the variant of each recipe that has everything else alike.
    """

    title: str
    text: str
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)


IDEAS = (
    Idea(
        "Less of the contrastive loss",
        "Eq. (5) with less weight (`--scl-weight`): the method, nearer to its control without that loss.",
        {"edge": ("depths+eta=0.02+scl=0.1",), "server": ("depths+eta=0.02+scl=0.1",)},
        {"edge": "depths+eta=0.02", "server": "depths+eta=0.02"},
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
        "that and the picture (`both`, here rgb-residual), since traces of synthesis are of high frequency.",
        {"edge": ("depths+eta=0.02+residual", "depths+eta=0.02+rgb-residual")},
        {"edge": "depths+eta=0.02"},
    ),
    Idea(
        "32 px crops",
        "Rows of Eq. (5) from random crops of 32 px, as the paper has them, on the frozen encoder, instead of the "
        "classifier's own view. Statistics over small patches are in every variant with depths: the mean and the "
        "standard deviation of the first stages' maps, whose cells see 7, 19 and 67 px in lite0.",
        {"edge": ("depths+eta=0.02+32px",)},
        {"edge": "depths+eta=0.02"},
    ),
    Idea(
        "Augmented views",
        "Two stored views of each picture, real and fake alike, mirrored, rescaled, blurred and stored as JPEG "
        "(`--cached-views 2`). Without them both views of a picture are the picture itself, since it has the "
        "encoder's own 224 px, and Eq. (1) finds every pair of views equal.",
        {"edge": ("depths+eta=0.02+views",)},
        {"edge": "depths+eta=0.02"},
    ),
    Idea(
        "Several crops of a test picture",
        "Not measured: a picture of 224 px has one crop of 224 px, so that the runtime's `--views five`, which is for "
        "larger pictures, gives the verdict of that one.",
    ),
)


def ideas_section(recipe: str, choice: Mapping[str, Any]) -> str:
    """A paragraph for each idea that this recipe tries, or that no recipe could.

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
        elif not idea.variants:
            paragraphs.append(f"**{idea.title}.** {idea.text}")
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
    return f"{text} It {'gains' if points > 0 else 'loses'} {abs(points):.1f} points at best, with {best}."
