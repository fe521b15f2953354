"""Whether a picture's score depends on its batch: alone, at each place of a batch, beside extreme pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Backend

BATCH = 64

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class InvarianceLimit:
    """How far a logit may move with its batch.

    Attributes:
        logit_diff_max: in units of evidence (see `parity.unit_of_evidence`).
        reason: why this figure.
    """

    logit_diff_max: float
    reason: str


LIMITS: Mapping[str, InvarianceLimit] = {
    "fp32": InvarianceLimit(1e-3, "another kernel for another batch size adds up in another order: the last bits move"),
    "fp16": InvarianceLimit(0.02, "the same in half precision; 0.02 moves no probability by more than half a point"),
    "int8": InvarianceLimit(
        0.02, "integers add up to the same in any order; ranges that are measured on the batch would show here"
    ),
}


@dataclass(frozen=True)
class BatchInvariance:
    """Logits of pictures in batches against those of the same pictures alone.

    Attributes:
        precision: of the graph.
        backend: that ran it.
        batch: pictures in a batch.
        logit_diff_max: largest difference of a raw logit.
        limit: what it may be at most.
        worst_picture: which picture moved most.
        worst_place: where in the batch, from 0.
    """

    precision: str
    backend: str
    batch: int
    logit_diff_max: float
    limit: float
    worst_picture: str
    worst_place: int

    def broken(self) -> list[str]:
        """What is wrong, in words; empty when the scores do not depend on the batch."""
        if self.logit_diff_max <= self.limit:  # NaN is wrong
            return []
        return [
            f"the logit of {self.worst_picture} moves by {self.logit_diff_max:.3g} at place {self.worst_place} of a "
            f"batch of {self.batch}, at most {self.limit:.3g}"
        ]


def extreme_pictures(height: int, width: int) -> dict[str, Picture]:
    """Pictures (H, W, 3) that drive activations as far as pictures can, by name."""
    rows, columns = np.mgrid[0:height, 0:width]
    checkerboard = ((rows + columns) % 2 * 255).astype(np.uint8)
    return {
        "black": np.zeros((height, width, 3), np.uint8),
        "white": np.full((height, width, 3), 255, np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8),
        "checkerboard": np.repeat(checkerboard[..., None], 3, axis=-1),
    }


def check_batch_invariance(
    backend: Backend, pictures: Mapping[str, Picture], *, precision: str, unit: float, batch: int = BATCH
) -> BatchInvariance:
    """Scores of every picture alone and in two batches, which hold the first picture at every place between them.

    Every other place holds one of the other pictures in turn, so that the first one always stands beside them; they
    are compared as well.

    Args:
        backend: a graph, opened.
        pictures: (H, W, 3) by name; the first is the one that goes through all places. At least two.
        precision: of the graph.
        unit: raw logit difference that counts as 1.
        batch: pictures in a batch.
    """
    names = list(pictures)
    alone = np.array([backend.infer(picture[None]).logits[0] for picture in pictures.values()], np.float64)
    differences = np.zeros((2, batch))
    placed = np.stack([_places(len(names), batch, turn) for turn in range(2)])
    for turn, indices in enumerate(placed):
        logits = backend.infer(np.stack([pictures[names[index]] for index in indices])).logits
        differences[turn] = np.abs(logits - alone[indices])
    worst_turn, worst_place = np.unravel_index(int(differences.argmax()), differences.shape)
    return BatchInvariance(
        precision,
        backend.name,
        batch,
        float(differences.max()),
        unit * LIMITS[precision].logit_diff_max,
        names[placed[worst_turn, worst_place]],
        int(worst_place),
    )


def _places(pictures: int, batch: int, turn: int) -> NDArray[np.int64]:
    """Index of the picture at each place (batch,): 0 at every second one, from `turn` on, the others in between."""
    places = np.arange(batch)
    return np.where(places % 2 == turn, 0, 1 + places // 2 % (pictures - 1))
