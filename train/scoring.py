"""Scores of labelled pictures by the PyTorch model: what calibration, evaluation and verification compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from runtime.preprocess import PreprocessSpec
from train.encoder import Encoder
from train.loading import batch_count, prepared_loader
from train.model import NTFDetector
from train.pictures import PictureRecord


class Scores(NamedTuple):
    """The detector's two numbers for N pictures."""

    logits: NDArray[np.float32]  # (N,), not calibrated
    trace_similarity: NDArray[np.float32]  # (N,)


def preprocess_spec(encoder: Encoder) -> PreprocessSpec:
    """The preprocessing contract of an encoder, as it travels with the exported model."""
    height, width = encoder.input_size
    return PreprocessSpec(height=height, width=width, mean=encoder.mean, std=encoder.std)


@torch.inference_mode()
def score_pictures(
    detector: NTFDetector,
    records: Sequence[PictureRecord],
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = True,
) -> Scores:
    """Logits and trace similarities of the records, in their order.

    Args:
        detector: in any mode; it is put into eval mode for the call and back afterwards.
        records: pictures to score.
        batch_size: pictures in a forward pass.
        workers: processes that decode.
        progress: show a progress bar.

    Raises:
        PictureError: a picture cannot be decoded; nothing is left out.
    """
    loader = prepared_loader(records, preprocess_spec(detector.encoder), batch_size=batch_size, workers=workers)
    logits, similarity = [], []
    training = [module for module in detector.modules() if module.training]
    detector.eval()
    try:
        total = batch_count(len(records), batch_size)
        for images in track(loader, "scoring", total=total, disable=not progress):
            scores = score_images(detector, images)
            logits.append(scores.logits)
            similarity.append(scores.trace_similarity)
    finally:
        for module in training:
            module.training = True
    return Scores(np.concatenate(logits), np.concatenate(similarity))


@torch.inference_mode()
def score_images(detector: NTFDetector, images: torch.Tensor) -> Scores:
    """Logits and trace similarities of one batch.

    Args:
        detector: in eval mode.
        images: (N, H, W, 3) uint8, prepared.
    """
    embedding = detector.embed(images.to(next(detector.parameters()).device))
    projected = detector.projection(embedding)
    logits, similarity = detector.classify(embedding, projected), detector.similarity_to_traces(projected)
    return Scores(logits.float().cpu().numpy(), similarity.float().cpu().numpy())


@torch.inference_mode()
def embed_pictures(
    detector: NTFDetector, records: Sequence[PictureRecord], *, batch_size: int = 32, workers: int = 0
) -> torch.Tensor:
    """Embeddings e of the records, (N, d) float32 on the CPU, in their order; the encoder is in eval mode.

    Args:
        detector: whose encoder is frozen.
        records: at least one.
        batch_size: pictures in a forward pass; the same as in `score_pictures` gives the same bits.
        workers: processes that decode.
    """
    device = next(detector.parameters()).device
    loader = prepared_loader(records, preprocess_spec(detector.encoder), batch_size=batch_size, workers=workers)
    return torch.cat([detector.embed(images.to(device)).float().cpu() for images in loader])


@torch.inference_mode()
def score_embeddings(detector: NTFDetector, embeddings: torch.Tensor, *, batch_size: int = 32) -> Scores:
    """What `score_pictures` gives for the pictures of these embeddings (N, d)."""
    device = next(detector.parameters()).device
    logits, similarity = [], []
    for rows in embeddings.to(device).split(batch_size):
        projected = detector.projection(rows)
        logits.append(detector.classify(rows, projected).float().cpu())
        similarity.append(detector.similarity_to_traces(projected).float().cpu())
    return Scores(torch.cat(logits).numpy(), torch.cat(similarity).numpy())


@torch.inference_mode()
def mean_natural_trace(
    detector: NTFDetector, records: Sequence[PictureRecord], *, batch_size: int = 32, workers: int = 0
) -> torch.Tensor:
    """Mean of the homogeneous features f_hom(E(x)) over real pictures, (C,), not normalised.

    Args:
        detector: in eval mode.
        records: real pictures, at least one.
        batch_size: pictures in a forward pass.
        workers: processes that decode.
    """
    device = next(detector.parameters()).device
    total = torch.zeros(detector.embedding_dim, dtype=torch.float64, device=device)
    for images in prepared_loader(records, preprocess_spec(detector.encoder), batch_size=batch_size, workers=workers):
        total += detector.head_hom(detector.embed(images.to(device))).double().sum(0)
    return (total / len(records)).float()
