"""Stage 2 of `--method nearest`: the training pictures' embeddings are kept, and nothing is trained.

One pass over the pictures, seen as the exported model sees them. A run that is stopped in it starts the pass again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence, Sized

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

from train.checkpoint import append_history
from train.compute import prepare_model
from train.config import RunConfig
from train.errors import ConfigError
from train.model import NearestNeighbours, NTFDetector
from train.pictures import PictureRecord
from train.scoring import embed_pictures, score_pictures
from train.session import Session

# A protobuf message, which an ONNX file is, holds less than this; the bank is in it beside the encoder.
LARGEST_ONNX_BYTES = 2**31


def keep_neighbours(session: Session) -> NTFDetector:
    """The detector whose classifier holds the embeddings of the training pictures.

    Raises:
        ConfigError: fewer pictures of a class than neighbours, or more than an exported model has room for.
    """
    config, model, ranks = session.config, session.config.model, session.ranks
    began = time.perf_counter()
    torch.manual_seed(config.seed + 1)
    encoder = session.encoder()
    records = session.data.train.records
    chosen = [bank_pictures(records, label, config) for label in (0, 1)]
    refuse_unfit_bank(config, chosen, encoder.width, sum(value.numel() for value in encoder.state_dict().values()))
    detector = NTFDetector(encoder, model.embedding_dim, model.classifier_input, head_width=model.head_width)
    detector.to(session.device).eval()
    detector.requires_grad_(False)
    prepare_model(detector, config.compute)
    if ranks.first and sum(map(len, chosen)) < len(records):
        kept = f"{len(chosen[0]):,} real and {len(chosen[1]):,} fake of {len(records):,} training pictures"
        print(f"neighbours: {kept}, drawn by seed {config.seed}", flush=True)
    real, fake = (_unit_columns(session, detector, part) for part in chosen)
    detector.classifier = NearestNeighbours(real, fake, config.nearest.nearest_k).to(session.device)
    if ranks.first:
        validation = session.data.validation.records
        logits = score_pictures(detector, validation, workers=config.workers, progress=False).logits
        labels = np.array([record.label for record in validation])
        figures: dict[str, float] = {
            "bank_real": real.shape[1],
            "bank_fake": fake.shape[1],
            "val_ap": float(average_precision_score(labels, logits)),
            "val_accuracy": float(np.mean((logits > 0) == (labels == 1))),
        }
        seconds = round(time.perf_counter() - began, 3)
        append_history(session.run, {"stage": 2, "epoch": 0, "seconds": seconds} | figures)
        print("stage 2  " + "  ".join(f"{name} {value:g}" for name, value in figures.items()) + f"  {seconds:.0f} s")
    return detector


def bank_pictures(records: Sequence[PictureRecord], label: int, config: RunConfig) -> list[PictureRecord]:
    """The pictures of a class to keep as neighbours, in their order; `--nearest-bank` of them, drawn by the seed."""
    own = [record for record in records if record.label == label]
    limit = config.nearest.nearest_bank
    if not limit or len(own) <= limit:
        return own
    drawn = np.random.default_rng([config.seed, 2, label]).choice(len(own), limit, replace=False)
    return [own[index] for index in sorted(drawn)]


def _unit_columns(session: Session, detector: NTFDetector, records: Sequence[PictureRecord]) -> Tensor:
    """Unit embeddings (d, n) of pictures, of which each process computes its part."""
    ranks = session.ranks
    mine = records[ranks.part(len(records))]
    rows = torch.empty(0, detector.encoder.width)
    if mine:
        rows = embed_pictures(detector, mine, workers=session.config.workers, progress=ranks.first)
    joint = np.concatenate(ranks.gather_objects(rows.numpy()))
    return F.normalize(torch.from_numpy(joint), dim=-1).T.contiguous()


def refuse_unfit_bank(config: RunConfig, chosen: Sequence[Sized], width: int, encoder_values: int) -> None:
    """Refuse a bank before its pictures are embedded.

    Args:
        config: of the run.
        chosen: real pictures and fake ones.
        width: of an embedding.
        encoder_values: numbers that the encoder has.

    Raises:
        ConfigError: fewer pictures of a class than neighbours, or more than an exported model has room for.
    """
    k, fewest = config.nearest.nearest_k, min(map(len, chosen))
    if fewest < k:
        raise ConfigError(
            "--nearest-k",
            got=f"{k} with {len(chosen[0]):,} real and {len(chosen[1]):,} fake training pictures",
            wanted=f"at most {fewest}",
            remedy="lower it, or add pictures",
        )
    size = 4 * (width * sum(map(len, chosen)) + encoder_values)
    if size >= LARGEST_ONNX_BYTES:
        room = (LARGEST_ONNX_BYTES // 4 - encoder_values) // (2 * width)
        raise ConfigError(
            f"--nearest-bank {config.nearest.nearest_bank}",
            got=f"{sum(map(len, chosen)):,} embeddings of {width} float32, {size / 1e9:.1f} GB with the encoder",
            wanted="less than 2.1 GB, the most that an ONNX file holds",
            remedy=f"pass --nearest-bank {room // 1000 * 1000}",
        )
