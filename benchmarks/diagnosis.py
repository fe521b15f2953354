"""What a detector's rows and logits look like on pictures it was trained on and on a generator it has never seen.

Alignment and uniformity are those of Wang and Isola 2020 (arXiv:2005.10242) on the unit rows z: the mean squared
distance of two rows of one class, and the logarithm of the mean Gaussian potential of any two rows. A margin is the
difference between the mean logits of fakes and of real pictures, in standard deviations within a class.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.checkpoint import load_config, load_detector
from train.feature_cache import weights_sha256
from train.losses import spread_of
from train.methods import METHODS
from train.pictures import PictureRecord
from train.scoring import embedded_batches
from train.session import with_store

UNIFORMITY_T = 2.0  # the paper's


@torch.inference_mode()
def diagnose(
    run: Path, sets: dict[str, Sequence[PictureRecord]], known: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Figures of a finished run on each set of pictures.

    Args:
        run: run folder with its weights.
        sets: labelled pictures by name, both classes in each.
        known: what encoders gave of these sets, before it is standardised; new ones are added, so that runs on the
            same encoder look at each picture once.
    """
    config, detector = load_config(run), load_detector(run)
    with_store(detector.encoder, config)
    encoder = json.dumps([weights_sha256(detector.encoder.net), config.model.encoder_options()])
    found = {}
    for name, records in sets.items():
        key = f"{name} {encoder}"
        if key not in known:
            known[key] = torch.cat(list(embedded_batches(detector, records, standardized=False)))
        embeddings = detector.encoder.standardizer(known[key])
        rows = detector.projection(embeddings)
        labels = np.array([record.label for record in records])
        figures = {"margin": margin(detector.classify(embeddings, rows).numpy(), labels)}
        if METHODS[config.method].natural_traces:
            real = rows[torch.from_numpy(labels == 0)]
            fake = rows[torch.from_numpy(labels == 1)]
            figures |= {
                "alignment_real": alignment(real),
                "alignment_fake": alignment(fake),
                "uniformity": uniformity(rows),
                "trace_rank": spread_of(detector.head_hom(embeddings[torch.from_numpy(labels == 0)])).effective_rank,
                "similarity_real": float(detector.similarity_to_traces(real).mean()),
                "similarity_fake": float(detector.similarity_to_traces(fake).mean()),
            }
        found[name] = figures
    return found


def margin(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Difference of the classes' mean logits in standard deviations within a class."""
    real, fake = logits[labels == 0], logits[labels == 1]
    within = np.sqrt((real.var() + fake.var()) / 2)
    return float((fake.mean() - real.mean()) / max(within, 1e-12))


def alignment(rows: Tensor) -> float:
    """Mean squared distance of two of the unit rows (n, C), n at least 2; 0 where all are alike."""
    n = len(rows)
    return float(2 * (n - rows.sum(0).square().sum() / n) / (n - 1))


def uniformity(rows: Tensor) -> float:
    """Logarithm of the mean Gaussian potential of two different unit rows (n, C); lower is more even."""
    squared = torch.pdist(rows).square()
    return float((-UNIFORMITY_T * squared).exp().mean().log())
