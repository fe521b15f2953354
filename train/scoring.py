"""Scores of labelled pictures by the PyTorch model: what calibration, evaluation and verification compare with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from runtime.preprocess import PreprocessSpec
from train.encoder import Encoder
from train.loading import batch_count, prepared_loader
from train.model import EncodingModel, NTFDetector
from train.pictures import PictureRecord

# Pictures in a forward pass.
BATCH_SIZE = 32


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
    batch_size: int = BATCH_SIZE,
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
def embedded_batches(
    model: EncodingModel,
    records: Sequence[PictureRecord],
    *,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    standardized: bool = True,
) -> Iterator[torch.Tensor]:
    """Embeddings e of the records in batches (B, d) float32, in their order; the encoder is in eval mode.

    Args:
        model: whose encoder is frozen.
        records: pictures, as the exported model sees them.
        batch_size: pictures in a forward pass; the same as in `score_pictures` gives the same bits.
        workers: processes that decode.
        standardized: False for what the encoder gives before it is standardised.
    """
    device = next(model.parameters()).device
    embed = model.embed if standardized else model.pool
    for images in prepared_loader(records, preprocess_spec(model.encoder), batch_size=batch_size, workers=workers):
        yield embed(images.to(device)).float()


@torch.inference_mode()
def embed_pictures(
    model: EncodingModel,
    records: Sequence[PictureRecord],
    *,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    progress: bool = False,
) -> torch.Tensor:
    """What `embedded_batches` gives, (N, d) on the CPU; of one picture or more, with a progress bar if asked for."""
    batches = embedded_batches(model, records, batch_size=batch_size, workers=workers)
    total = batch_count(len(records), batch_size)
    return torch.cat([rows.cpu() for rows in track(batches, "embedding", total=total, disable=not progress)])


@torch.inference_mode()
def score_embeddings(detector: NTFDetector, embeddings: torch.Tensor, *, batch_size: int = BATCH_SIZE) -> Scores:
    """What `score_pictures` gives for the pictures of these embeddings (N, d)."""
    device = next(detector.parameters()).device
    logits, similarity = [], []
    for rows in embeddings.to(device).split(batch_size):
        projected = detector.projection(rows)
        logits.append(detector.classify(rows, projected).float().cpu())
        similarity.append(detector.similarity_to_traces(projected).float().cpu())
    return Scores(torch.cat(logits).numpy(), torch.cat(similarity).numpy())


def mean_natural_trace(
    model: EncodingModel, records: Sequence[PictureRecord], *, batch_size: int = BATCH_SIZE, workers: int = 0
) -> torch.Tensor:
    """Mean of the homogeneous features f_hom(E(x)) over real pictures, (C,), not normalised.

    Args:
        model: in eval mode.
        records: real pictures, at least one.
        batch_size: pictures in a forward pass.
        workers: processes that decode.
    """
    return _mean_trace(model, embedded_batches(model, records, batch_size=batch_size, workers=workers))


def mean_trace_of_embeddings(
    model: EncodingModel, embeddings: torch.Tensor, *, batch_size: int = BATCH_SIZE
) -> torch.Tensor:
    """What `mean_natural_trace` gives for the pictures of these embeddings (N, d)."""
    return _mean_trace(model, embeddings.split(batch_size))


@torch.inference_mode()
def _mean_trace(model: EncodingModel, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    device = next(model.parameters()).device
    total, pictures = torch.zeros((), dtype=torch.float64, device=device), 0
    for rows in batches:
        total = total + model.head_hom(rows.to(device)).double().sum(0)
        pictures += len(rows)
    return (total / pictures).float()
