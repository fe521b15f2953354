"""Logits of a run's validation pictures: what its calibration was fitted on, kept so that others can be fitted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.strict_json import from_jsonable, to_jsonable
from train.checkpoint import save_json
from train.errors import CheckpointError
from train.metrics import Array
from train.pictures import PictureSet, relative_path

SCORES_FILE = "validation_scores.json"


@dataclass(frozen=True)
class ValidationScores:
    """N validation pictures as the trained detector scored them.

    Attributes:
        pictures: path of each, relative to the root of its collection.
        labels: 0 real, 1 fake.
        logits: raw, exactly the float32 values that the calibration was fitted on.
    """

    pictures: tuple[str, ...]
    labels: tuple[int, ...]
    logits: tuple[float, ...]

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Logits and labels, (N,) each."""
        return np.array(self.logits, dtype=np.float32), np.array(self.labels, dtype=np.int64)


def validation_scores(pictures: PictureSet, logits: Array) -> ValidationScores:
    """Scores of a validation set, `logits` (N,) in the order of its records."""
    return ValidationScores(
        pictures=tuple(relative_path(record.path, pictures.root) for record in pictures.records),
        labels=tuple(record.label for record in pictures.records),
        logits=tuple(map(float, logits)),
    )


def save_validation_scores(run: Path, scores: ValidationScores) -> None:
    """Write them into a run folder, atomically."""
    save_json(run / SCORES_FILE, to_jsonable(scores, subject="validation scores"))


def load_validation_scores(run: Path) -> ValidationScores | None:
    """What training left in a run folder; None in a run from before it was kept.

    Raises:
        CheckpointError: the file is damaged.
        BundleError: it holds other fields or types.
    """
    path = run / SCORES_FILE
    if not path.is_file():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(run, f"text that is not JSON ({error})") from error
    scores = from_jsonable(ValidationScores, plain, subject=str(path))
    sizes = {len(scores.pictures), len(scores.labels), len(scores.logits)}
    if len(sizes) != 1 or not set(scores.labels) <= {0, 1}:
        raise _damaged(run, f"{len(scores.labels)} labels, {len(scores.logits)} logits")
    return scores


def require_validation_scores(run: Path) -> ValidationScores:
    """What training left in a run folder.

    Raises:
        CheckpointError: there is nothing, or it is damaged.
        BundleError: it holds other fields or types.
    """
    scores = load_validation_scores(run)
    if scores is None:
        raise CheckpointError(
            str(run),
            got=f"a run without {SCORES_FILE}",
            wanted="the logits of its validation pictures, to fit further thresholds on",
            remedy=f"let python -m train.run --resume {run} write it, which changes nothing else in a finished run",
        )
    return scores


def _damaged(run: Path, got: str) -> CheckpointError:
    return CheckpointError(
        str(run / SCORES_FILE),
        got=got,
        wanted="one label, 0 or 1, and one logit for each picture",
        remedy=f"write it again with python -m train.run --resume {run}",
    )
