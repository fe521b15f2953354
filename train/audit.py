"""How well features that have nothing to do with synthesis tell real from fake: the first question to any data set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from train.data import PictureRecord, PictureSet

FEATURES = ("log_file_bytes", "width_px", "height_px", "format", "mode")


def trivial_auc(fitted_on: PictureSet, tested_on: PictureSet) -> dict[str, float]:
    """AUC of a logistic regression on file size, dimensions, format and mode, for each generator.

    Args:
        fitted_on: pictures of both classes that it learns from.
        tested_on: pictures of both classes; generators with one class only are left out.

    Returns:
        Around 0.5 where these features say nothing; far from it, on either side, a detector's figures on the set
        are in doubt.
    """
    codes: dict[str, int] = {}
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(_features(fitted_on.records, codes), [r.label for r in fitted_on.records])
    scores = model.decision_function(_features(tested_on.records, codes))
    labels = np.array([r.label for r in tested_on.records])
    generators = np.array([r.generator for r in tested_on.records])
    return {
        str(name): float(roc_auc_score(labels[generators == name], scores[generators == name]))
        for name in np.unique(generators)
        if len(np.unique(labels[generators == name])) == 2
    }


def _features(records: tuple[PictureRecord, ...], codes: dict[str, int]) -> NDArray[np.float64]:
    """(N, len(FEATURES)); formats and modes are numbered in `codes` as they appear."""
    rows = []
    for record in records:
        with Image.open(record.path) as picture:
            width, height = picture.size
            words = [codes.setdefault(str(word), len(codes)) for word in (picture.format, picture.mode)]
        rows.append([np.log(record.path.stat().st_size), width, height, *words])
    return np.array(rows, dtype=np.float64)
