"""Both stages of the method: what each trains, on which views, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from cpp_ext import gathered_soft_contrastive_loss
from cpp_ext.ops import Implementation
from train.compute import autocast, compiled
from train.config import RunConfig
from train.feature_cache import StageCache
from train.loading import ViewBatch
from train.losses import cross_entropy, detector_loss, natural_trace_loss, spread_of
from train.methods import METHODS
from train.model import NTFDetector, TraceModel, freeze_natural_traces
from train.pictures import PictureRecord
from train.ranks import ALONE, Ranks
from train.scoring import BATCH_SIZE, embed_pictures, score_embeddings, score_pictures
from train.stage import (
    NO_REAL,
    ONE_CLASS,
    ONE_PICTURE,
    Batch,
    FeatureBatch,
    Stage,
    require_crop,
    stage1_plan,
    stage2_plan,
)

# Rows all over the sphere have a standard deviation of 1 / sqrt(C) a dimension. Eq. (2) pulls them together on purpose;
# at 3 % of it the mean squared distance of two rows is 0.002 of at most 4, and they say the same of every picture.
COLLAPSE_STD_SHARE = 0.03
# One direction has rank 1; below 2 the homogeneous features say the same of every picture.
COLLAPSE_RANK = 2.0
SPREAD_PICTURES = 256


class TraceStage(Stage):
    """Stage 1: natural traces from real pictures alone, Eqs. (1) to (4)."""

    number = 1

    def __init__(
        self,
        model: TraceModel,
        records: Sequence[PictureRecord],
        config: RunConfig,
        ranks: Ranks = ALONE,
        cache: StageCache | None = None,
    ) -> None:
        self.model: TraceModel = model
        self.records = [record for record in records if record.label == 0]
        self.config, self.ranks, self.cache = config, ranks, cache
        self.settings = config.stage1
        self.pool = compiled(model.pool, config.compute)
        require_crop(model.encoder, "--crop", config.augment.crop)
        self.plan = stage1_plan(config, model.encoder.input_size)

    def trainable(self) -> list[nn.Parameter]:
        self.model.encoder.requires_grad_(self.config.stage1.train_encoder)
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def set_train_mode(self) -> None:
        self.model.train()
        self.model.encoder.train(self.config.stage1.train_encoder)

    def encode(self, batch: ViewBatch) -> FeatureBatch:
        trained = self.config.stage1.train_encoder
        with torch.set_grad_enabled(trained), autocast(self.config.compute, self.device):
            first, second = self.pool(torch.cat((batch.first, batch.second))).chunk(2)
        return FeatureBatch(first, second, batch.labels)

    def losses(self, batch: Batch, pictures: int) -> dict[str, Tensor]:
        features = self.features(batch)
        with autocast(self.config.compute, self.device):
            embeddings = torch.cat((features.first, features.second))
            own = self.model.head_hom(embeddings), self.model.head_het(embeddings)
        z_hom, z_het = self._joint_rows(*own, pictures)
        loss = self.config.loss
        result = natural_trace_loss(
            z_hom,
            z_het,
            temperature=loss.temperature,
            lambda_het=loss.lambda_het,
            lambda_orth=loss.lambda_orth,
            hom_reduction=loss.hom_reduction,
            hom_topk=loss.hom_topk,
            orth=loss.orth,
        )
        return {
            "loss": result.total,
            "homogeneous": result.homogeneous,
            "heterogeneous": result.heterogeneous,
            "orthogonality": result.orthogonality,
            ONE_PICTURE: torch.tensor(pictures == 1),
        }

    def _joint_rows(self, z_hom: Tensor, z_het: Tensor, pictures: int) -> tuple[Tensor, Tensor]:
        """Rows of all processes, first views before second views, as one process has them."""
        own = torch.stack((z_hom, z_het), dim=1).unflatten(0, (2, -1)).transpose(0, 1)  # (b, views, heads, C)
        rows = self.ranks.joint(own, pictures).transpose(0, 1).flatten(0, 1)
        return rows[:, 0], rows[:, 1]

    @torch.inference_mode()
    def epoch_report(self) -> tuple[dict[str, float], list[str]]:
        """Spread of the homogeneous rows over up to 256 training pictures; Eq. (2) alone would collapse them."""
        self.model.eval()
        if not self.ranks.first:
            return {}, []
        if self.cache is None:
            seen = embed_pictures(self.model, self.records[:SPREAD_PICTURES])
        else:
            seen = self.cache.crops.embeddings(self.model, slice(SPREAD_PICTURES), workers=self.config.workers)
        rows = torch.cat([self.model.head_hom(part) for part in seen.to(self.device).split(BATCH_SIZE)])
        if len(rows) < 2:
            return {}, []
        spread = spread_of(rows)
        figures = {"hom_std": spread.std, "hom_effective_rank": spread.effective_rank}
        floor = COLLAPSE_STD_SHARE / math.sqrt(rows.shape[1])
        if spread.std >= floor and spread.effective_rank >= COLLAPSE_RANK:
            return figures, []
        return figures, [
            f"the homogeneous features are close to one constant vector (standard deviation {spread.std:.4f}, floor "
            f"{floor:.4f}; effective rank {spread.effective_rank:.1f}, floor {COLLAPSE_RANK}): train stage 1 for fewer "
            "epochs, lower its learning rate, or take --hom-reduction mean"
        ]


class DetectorStage(Stage):
    """Stage 2: real against fake on the frozen encoder, Eqs. (5) to (7).

    Args:
        model: the detector; its encoder and natural traces stay as they are.
        records: training pictures.
        config: of the run.
        validation: pictures to score after each epoch.
        loss_backend: implementation of Eq. (5).
        ranks: the processes that train it together.
        cache: embeddings that were computed before, or None.
        traces: what stage 1 left, where stage 2 trains blocks of the encoder; its own encoder stays.
    """

    number = 2

    def __init__(
        self,
        model: NTFDetector,
        records: Sequence[PictureRecord],
        config: RunConfig,
        validation: Sequence[PictureRecord],
        loss_backend: Implementation,
        ranks: Ranks = ALONE,
        cache: StageCache | None = None,
        traces: TraceModel | None = None,
    ) -> None:
        self.model: NTFDetector = model
        self.records = list(records)
        self.validation = validation
        self.config, self.ranks, self.cache = config, ranks, cache
        self.settings = config.stage2
        self.pool = compiled(model.pool, config.compute)
        self.loss_backend, self.traces = loss_backend, traces
        self.balance = [record.label for record in self.records] if config.stage2.class_balance else None
        require_crop(model.encoder, "--stage2.scl-crop", config.stage2.scl_crop)
        require_crop(model.encoder, "--crop", config.augment.crop)
        self.plan = stage2_plan(config, model.input_size)

    def trainable(self) -> list[nn.Parameter]:
        self._freeze()
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def parameter_groups(self) -> list[dict[str, Any]]:
        tuned = {id(parameter) for parameter in self._tuned()}
        groups: list[dict[str, Any]] = [{"params": [p for p in self.trainable() if id(p) not in tuned]}]
        if tuned:
            lr = self.settings.lr * self.config.stage2.encoder_lr_factor
            groups.append({"params": self._tuned(), "lr": lr})
        return groups

    def set_train_mode(self) -> None:
        self.model.train()
        self._freeze()

    def _freeze(self) -> None:
        """Freeze the encoder but for the blocks that are trained; all of it keeps its batch-norm statistics."""
        freeze_natural_traces(self.model)
        for parameter in self._tuned():
            parameter.requires_grad_(True)

    def _tuned(self) -> list[nn.Parameter]:
        """What is trained of the encoder."""
        blocks = self.config.stage2.train_encoder_blocks
        encoder = self.model.encoder
        return [encoder.get_parameter(name) for name in encoder.last_blocks(blocks)] if blocks else []

    def encode(self, batch: ViewBatch) -> FeatureBatch:
        """Embeddings of a batch, float32."""
        tuned = self.config.stage2.train_encoder_blocks > 0
        with torch.set_grad_enabled(tuned), autocast(self.config.compute, self.device):
            return FeatureBatch(self.pool(batch.first).float(), self.pool(batch.second).float(), batch.labels)

    @torch.no_grad()
    def natural_traces(self, batch: Batch, features: FeatureBatch, rows: int) -> Tensor:
        """h = f_hom(E(x)) of the real pictures among the first `rows`, (J, C), by the encoder as stage 1 left it."""
        first = self.config.stage2.trace_crop == "input"
        real = features.labels[:rows] == 0
        seen = (features.first if first else features.second)[:rows][real]
        with autocast(self.config.compute, self.device):
            if self.traces is not None and len(seen):
                assert isinstance(batch, ViewBatch)  # embeddings are not cached where the encoder is trained
                seen = self.traces.embed((batch.first if first else batch.second)[:rows][real]).float()
            return self.model.head_hom(seen)

    def losses(self, batch: Batch, pictures: int) -> dict[str, Tensor]:
        model, loss = self.model, self.config.loss
        rows = self.ranks.counts(pictures)[self.ranks.rank]
        features = self.features(batch)
        embeddings, crops, labels = (part[:rows] for part in features)
        with autocast(self.config.compute, self.device):
            z = model.projection(crops)
            own_logits = model.classify(embeddings, model.projection(embeddings)).float()
        contrastive = (
            self._contrastive(z, self.natural_traces(batch, features, rows), labels) if loss.scl_weight else None
        )
        logits = self.ranks.joint(own_logits, pictures)
        labels = self.ranks.joint(labels, pictures)
        result = detector_loss(
            contrastive, logits, labels, gamma=loss.gamma, scl_weight=loss.scl_weight, balanced=self.balance is not None
        )
        figures = {
            "loss": result.total,
            "classification": result.classification,
            ONE_CLASS: (labels == labels[0]).all(),
            "accuracy": ((logits > 0) == (labels == 1)).float().mean(),
        }
        if result.contrastive is not None:
            figures |= {"contrastive": result.contrastive, NO_REAL: (labels == 1).all()}
        return figures

    def _contrastive(self, z: Tensor, traces: Tensor, labels: Tensor) -> Tensor:
        """Eq. (5) over the rows of all processes; arguments are this process's."""
        loss = self.config.loss
        return gathered_soft_contrastive_loss(
            z,
            labels,
            traces,
            temperature=loss.temperature,
            eta=loss.eta,
            form=loss.scl_form,
            denominator=loss.scl_denominator,
            backend=self.loss_backend,
        )

    def epoch_report(self) -> tuple[dict[str, float], list[str]]:
        """AP and accuracy at 0.5 on the validation pictures; each process scores its part of them."""
        part = self.ranks.part(len(self.validation))
        own = self._validation_logits(part) if part.stop > part.start else np.empty(0, np.float32)
        logits = np.concatenate(self.ranks.gather_objects(own))
        labels = np.array([record.label for record in self.validation])
        return {
            "val_ap": float(average_precision_score(labels, logits)),
            "val_accuracy": float(np.mean((logits > 0) == (labels == 1))),
        }, []

    def _validation_logits(self, part: slice) -> NDArray[np.float32]:
        workers = self.config.workers
        if self.cache is None:
            return score_pictures(self.model, self.validation[part], progress=False, workers=workers).logits
        return score_embeddings(self.model, self.cache.crops.embeddings(self.model, part, workers=workers)).logits


class CrossEntropyStage(DetectorStage):
    """Stage 2 without natural traces: the classifier on e with cross entropy alone, Eq. (6)."""

    @property
    def trains_encoder(self) -> bool:
        """Whether the encoder is trained as well."""
        return METHODS[self.config.method].trains_encoder

    def trainable(self) -> list[nn.Parameter]:
        self.model.requires_grad_(False)
        self.model.classifier.requires_grad_(True)
        self.model.encoder.requires_grad_(self.trains_encoder)
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def set_train_mode(self) -> None:
        self.model.eval()
        self.model.encoder.train(self.trains_encoder)

    def encode(self, batch: ViewBatch) -> FeatureBatch:
        """Embeddings of the classifier's views; there is no use for the others."""
        with torch.set_grad_enabled(self.trains_encoder), autocast(self.config.compute, self.device):
            embeddings = self.pool(batch.first).float()
        return FeatureBatch(embeddings, embeddings, batch.labels)

    def losses(self, batch: Batch, pictures: int) -> dict[str, Tensor]:
        rows = self.ranks.counts(pictures)[self.ranks.rank]
        features = self.features(batch)
        with autocast(self.config.compute, self.device):
            own_logits = self.model.classifier(features.first[:rows]).squeeze(-1).float()
        logits = self.ranks.joint(own_logits, pictures)
        labels = self.ranks.joint(features.labels[:rows], pictures)
        return {
            "loss": cross_entropy(logits, labels, balanced=self.balance is not None),
            ONE_CLASS: (labels == labels[0]).all(),
            "accuracy": ((logits > 0) == (labels == 1)).float().mean(),
        }
