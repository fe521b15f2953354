"""Whether a verdict holds when the picture is re-encoded and rescaled, as it is on its way through the world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.changes import Change


@dataclass(frozen=True)
class Stability:
    """How far the score of a picture moves when the picture is changed.

    Args:
        spread: largest minus smallest fake probability, 0 to 1.
        flips: whether the verdict on a changed picture is another one than on the picture as it is.
        verdict: on the picture as it is; where it flips, the detection says "uncertain".
        fake_probabilities: by the name of the change, "unchanged" among them.
    """

    spread: float
    flips: bool
    verdict: str
    fake_probabilities: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary with the same field names, ready for `json.dumps`."""
        return {
            "spread": self.spread,
            "flips": self.flips,
            "verdict": self.verdict,
            "fake_probabilities": dict(self.fake_probabilities),
        }


def stability_of(
    changes: Sequence[Change], probabilities: NDArray[np.float64], verdicts: NDArray[np.str_]
) -> Stability:
    """What the scores of a picture under some changes say together.

    Args:
        changes: N of them; the first leaves the picture as it is.
        probabilities: (N,) calibrated fake probabilities.
        verdicts: (N,) verdicts that belong to them.
    """
    return Stability(
        spread=float(np.ptp(probabilities)),
        flips=bool((verdicts != verdicts[0]).any()),
        verdict=str(verdicts[0]),
        fake_probabilities={change.name: float(p) for change, p in zip(changes, probabilities, strict=True)},
    )
