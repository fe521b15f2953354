"""The networks of both stages: an encoder with trace heads, and the detector that is shipped."""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.encoder import Encoder

ClassifierInput = Literal["projection", "encoder", "both"]


class DetectorOutput(NamedTuple):
    """What the detector says of N images; the exported graph has the same four outputs."""

    logits: Tensor  # (N,) float32, larger means more likely fake, not calibrated
    trace_similarity: Tensor  # (N,) float32 in [-1, 1], cosine of z with the mean natural trace
    embeddings: Tensor  # (N, C) float32, unit rows z
    evidence: Tensor  # (N, h, w) float32, the logit of each cell of the encoder's map


class ProjectionHead(nn.Sequential):
    """Linear(d, h) - ReLU - Linear(h, C); its L2-normalised output is a row on the unit sphere.

    Args:
        width: d.
        embedding_dim: C.
        hidden: h; 0 for d.
    """

    def __init__(self, width: int, embedding_dim: int, hidden: int = 0) -> None:
        hidden = hidden or width
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, embedding_dim))

    def forward(self, embeddings: Tensor) -> Tensor:
        rows = super().forward(embeddings)
        if torch.is_autocast_enabled(rows.device.type):
            rows = rows.float()  # unit length to float32's precision, which the losses rely on
        return F.normalize(rows, dim=-1)


class PixelNormalizer(nn.Module):
    """Raw pixels (N, H, W, 3) uint8 to normalised (N, 3, H, W) float32: the only place that knows mean and std."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        scale = 1.0 / (255.0 * torch.tensor(std))
        shift = -torch.tensor(mean) / torch.tensor(std)
        self.register_buffer("scale", scale.reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).permute(0, 3, 1, 2) * self.scale + self.shift


class EncodingModel(nn.Module):
    """What both stages' networks are built on: raw pixels in, embeddings out, and f_hom that reads them.

    Args:
        encoder: E.
    """

    head_hom: ProjectionHead

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalizer = PixelNormalizer(encoder.mean, encoder.std)

    def pool(self, images: Tensor) -> Tensor:
        """What the encoder gives, (N, d), before it is standardised; of raw images (N, H, W, 3) uint8.

        Without gradient, from the encoder's store where it has one.
        """
        store = self.encoder.store
        if store is not None and not torch.is_grad_enabled():
            return store.embed(self.encoder, self.normalizer, images)
        return self.encoder.pool(self.normalizer(images))

    def embed(self, images: Tensor) -> Tensor:
        """Encoder embeddings e, (N, d), of raw images (N, H, W, 3) uint8."""
        return self.encoder.standardizer(self.pool(images))


class TraceModel(EncodingModel):
    """Stage 1: an encoder with a homogeneous and a heterogeneous head (Sec. 4.1 of Liang et al. 2024).

    Args:
        encoder: E.
        embedding_dim: C, width of both heads' outputs.
        head_width: hidden width of both heads; 0 for the encoder's width.
    """

    def __init__(self, encoder: Encoder, embedding_dim: int, *, head_width: int = 0) -> None:
        super().__init__(encoder)
        self.head_width = head_width
        self.head_hom = ProjectionHead(encoder.width, embedding_dim, head_width)
        self.head_het = ProjectionHead(encoder.width, embedding_dim, head_width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Homogeneous and heterogeneous unit rows, each (N, C), of raw images (N, H, W, 3) uint8."""
        embedding = self.embed(images)
        return self.head_hom(embedding), self.head_het(embedding)


class NearestNeighbours(nn.Module):
    """D without training: a picture is as fake as it is nearer to fake training pictures than to real ones.

    The classifier of Ojha et al. 2023 (arXiv:2302.10174), which takes the nearest picture by cosine distance, as a
    logit: the mean of the k largest cosines with fake pictures minus that with real ones, in [-2, 2].

    Args:
        real: (d, R) unit embeddings of real training pictures, R >= k.
        fake: (d, F) the same of fake ones.
        k: neighbours of each class.
    """

    def __init__(self, real: Tensor, fake: Tensor, k: int) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("real", real)
        self.register_buffer("fake", fake)
        self.real: Tensor
        self.fake: Tensor

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits (..., 1) of embeddings (..., d) of any length."""
        rows = F.normalize(embeddings, dim=-1)
        return self._likeness(rows @ self.fake) - self._likeness(rows @ self.real)

    def _likeness(self, cosines: Tensor) -> Tensor:
        if self.k == 1:
            return cosines.amax(-1, keepdim=True)
        return cosines.topk(self.k, dim=-1).values.mean(-1, keepdim=True)


class NTFDetector(EncodingModel):
    """Stage 2, and what is shipped: the frozen encoder, the projection g and the classifier D.

    The homogeneous head stays in the checkpoint because stage 2 needs the traces of each batch; `forward`, and
    with it the exported graph, uses only their mean.

    Args:
        encoder: E, frozen in stage 2.
        embedding_dim: C.
        classifier_input: what D reads: "projection" z, "encoder" e, or "both" side by side.
        classifier: D; by default a new linear layer.
        head_width: hidden width of the heads; 0 for the encoder's width.
    """

    def __init__(
        self,
        encoder: Encoder,
        embedding_dim: int,
        classifier_input: ClassifierInput,
        classifier: nn.Module | None = None,
        *,
        head_width: int = 0,
    ) -> None:
        super().__init__(encoder)
        self.encoder_name = encoder.name
        self.input_size = encoder.input_size
        self.mean, self.std = encoder.mean, encoder.std
        self.embedding_dim = embedding_dim
        self.classifier_input: ClassifierInput = classifier_input
        self.head_hom = ProjectionHead(encoder.width, embedding_dim, head_width)
        self.projection = ProjectionHead(encoder.width, embedding_dim, head_width)
        widths = {
            "projection": embedding_dim,
            "encoder": encoder.width,
            "both": embedding_dim + encoder.width,
        }
        self.classifier = classifier or nn.Linear(widths[classifier_input], 1)
        self.register_buffer("mean_trace", torch.zeros(embedding_dim))
        self.mean_trace: Tensor

    def classify(self, embeddings: Tensor, projected: Tensor) -> Tensor:
        """Logit of D for rows of e (..., d) and of z (..., C); shape (...)."""
        if self.classifier_input == "projection":
            read = projected
        elif self.classifier_input == "encoder":
            read = embeddings
        else:
            read = torch.cat((projected, embeddings), dim=-1)
        return self.classifier(read).squeeze(-1)

    def similarity_to_traces(self, projected: Tensor) -> Tensor:
        """Cosine of unit rows z (..., C) with the mean natural trace; shape (...)."""
        return projected @ F.normalize(self.mean_trace, dim=0)

    def forward(self, images: Tensor) -> DetectorOutput:
        """Scores of raw images (N, H, W, 3) uint8; the graph contract of the exported model."""
        encoded = self.encoder(self.normalizer(images))
        projected = self.projection(encoded.pooled)
        cells = encoded.cells
        return DetectorOutput(
            logits=self.classify(encoded.pooled, projected),
            trace_similarity=self.similarity_to_traces(projected),
            embeddings=projected,
            evidence=self.classify(cells, self.projection(cells)),
        )


def detector_from_traces(
    traces: TraceModel, embedding_dim: int, kind: ClassifierInput, *, own_encoder: bool = False
) -> NTFDetector:
    """Detector for stage 2: E and f_hom of stage 1, frozen; g and D new.

    Args:
        traces: the trained stage-1 model; its modules are taken over, not copied.
        embedding_dim: C of the new projection, and of the traces.
        kind: what the classifier reads.
        own_encoder: copy E, so that the detector's may be trained while the one of the traces stays.
    """
    encoder = copy.deepcopy(traces.encoder) if own_encoder else traces.encoder
    detector = NTFDetector(encoder, embedding_dim, kind, head_width=traces.head_width)
    detector.head_hom = traces.head_hom
    return freeze_natural_traces(detector)


def freeze_natural_traces(detector: NTFDetector) -> NTFDetector:
    """Freeze E and f_hom: no gradients, and batch-norm statistics as stage 1 left them."""
    for module in (detector.encoder, detector.head_hom):
        module.requires_grad_(False).eval()
    return detector
