"""Where a detector looks: Grad-CAM++ beside the detector's own evidence map, as Fig. 6 of Liang et al. 2024 has it.

Grad-CAM++ (Chattopadhay et al. 2018, arXiv:1710.11063) is computed by the package grad-cam, for the logit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.manifest import CalibrationSpec
from train.encoder import Encoder
from train.errors import ConfigError
from train.loading import prepared_loader
from train.markdown import decimal, markdown_table
from train.model import NTFDetector
from train.pictures import PictureRecord
from train.scoring import preprocess_spec

SALIENCY_FILE, SALIENCY_FIGURE_FILE = "saliency.json", "saliency.png"
LAST_MAP, LAST_BLOCK = "the last feature map", "blocks[-1].norm1"
Choice = Literal["right", "mistake"]
Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class SaliencyPicture:
    """One picture of the sheet.

    Attributes:
        id: its path in the collection.
        generator: its set.
        label: 0 real, 1 fake.
        choice: among the most confident right ones, or the worst mistakes: real pictures called fake, and fakes that
            are not called fake.
        verdict: from the run's thresholds.
        fake_probability: calibrated.
        gradcam: (h, w) Grad-CAM++ of each cell for the logit, scaled to 0..1 by the picture's own ends.
        evidence: (h, w) calibrated logit of each cell.
        correlation: Spearman's, of the two maps; None where one of them is the same everywhere.
    """

    id: str
    generator: str
    label: int
    choice: Choice
    verdict: str
    fake_probability: float
    gradcam: Grid
    evidence: Grid
    correlation: float | None


@dataclass(frozen=True)
class CorrelationOfSet:
    """Correlations of the two maps over some pictures, None where none is defined."""

    name: str
    pictures: int
    defined: int
    mean: float | None
    minimum: float | None
    maximum: float | None


@dataclass(frozen=True)
class SaliencyReport:
    """What a sheet shows, in figures.

    Attributes:
        layer: what Grad-CAM++ was taken from.
        pictures_per_class: at most so many of each class of each generator.
        sets: right and wrong pictures of each class, then all.
    """

    layer: str
    pictures_per_class: int
    sets: tuple[CorrelationOfSet, ...]


@dataclass(frozen=True)
class SaliencySheet:
    """A sheet with everything that its figure is drawn from, but for the crops."""

    report: SaliencyReport
    pictures: tuple[SaliencyPicture, ...]


class Chosen(NamedTuple):
    """A picture that goes onto the sheet."""

    row: int
    choice: Choice


class SaliencyMaps(NamedTuple):
    """What is seen in N pictures."""

    images: NDArray[np.uint8]  # (N, H, W, 3), the crops that the detector sees
    gradcam: NDArray[np.float32]  # (N, h, w), each scaled to 0..1
    evidence: NDArray[np.float32]  # (N, h, w), raw logit of each cell


def chosen_pictures(
    records: Sequence[PictureRecord], logits: NDArray[np.floating], calibration: CalibrationSpec, count: int
) -> list[Chosen]:
    """Pictures for the sheet: of each class of each generator the worst mistakes, up to half of them, and the most
    confident right ones.

    Args:
        records: pictures that were scored.
        logits: (N,) raw.
        calibration: of the run; its verdict `fake` decides what is right.
        count: pictures of each class of each generator.
    """
    labels = np.array([record.label for record in records])
    wrong = (calibration.verdicts(logits) == "fake") != (labels == 1)
    confidence = np.where(labels == 1, logits, -logits)  # in the picture's own class
    groups: dict[tuple[str, int], list[int]] = {}
    for row, record in enumerate(records):
        groups.setdefault((record.generator, record.label), []).append(row)
    chosen = []
    for key in sorted(groups):
        ranked = sorted(groups[key], key=lambda row: -confidence[row])
        right = [Chosen(row, "right") for row in ranked if not wrong[row]]
        mistakes = [Chosen(row, "mistake") for row in reversed(ranked) if wrong[row]]
        shown = max(min(count // 2, len(mistakes)), count - len(right))
        chosen += right[: count - shown] + mistakes[:shown]
    return chosen


def saliency_maps(
    detector: NTFDetector, records: Sequence[PictureRecord], *, batch_size: int = 32, workers: int = 0
) -> SaliencyMaps:
    """Crops, Grad-CAM++ and evidence of the records, in their order; the detector is left as it was.

    Args:
        detector: in any mode; frozen or not.
        records: at least one.
        batch_size: pictures in a pass.
        workers: processes that decode.

    Raises:
        ConfigError: the encoder has no layer that Grad-CAM++ can be taken from.
        PictureError: a picture cannot be decoded.
    """
    loader = prepared_loader(records, preprocess_spec(detector.encoder), batch_size=batch_size, workers=workers)
    batches = [(images.numpy(), *_maps_of_batch(detector, images)) for images in loader]
    return SaliencyMaps(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))


def saliency_pictures(
    chosen: Sequence[Chosen],
    records: Sequence[PictureRecord],
    ids: Sequence[str],
    logits: NDArray[np.floating],
    calibration: CalibrationSpec,
    maps: SaliencyMaps,
) -> tuple[SaliencyPicture, ...]:
    """What the sheet shows of each chosen picture.

    Args:
        chosen: the pictures.
        records: all that were scored.
        ids: what each of them is called.
        logits: of all of them, raw.
        calibration: of the run.
        maps: of the chosen ones.
    """
    evidence = calibration.calibrated(maps.evidence)
    probability, verdicts = calibration.fake_probability(logits), calibration.verdicts(logits)
    return tuple(
        SaliencyPicture(
            id=ids[row],
            generator=records[row].generator,
            label=records[row].label,
            choice=choice,
            verdict=str(verdicts[row]),
            fake_probability=float(probability[row]),
            gradcam=_grid(maps.gradcam[number]),
            evidence=_grid(evidence[number]),
            correlation=rank_correlation(maps.gradcam[number], evidence[number]),
        )
        for number, (row, choice) in enumerate(chosen)
    )


def rank_correlation(first: NDArray[np.floating], second: NDArray[np.floating]) -> float | None:
    """Spearman's correlation of two maps of one shape; None where one is the same everywhere."""
    from scipy.stats import spearmanr

    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first.ravel(), second.ravel()).statistic)


def saliency_report(pictures: Sequence[SaliencyPicture], *, layer: str, pictures_per_class: int) -> SaliencyReport:
    """The correlations of right and wrong pictures."""
    groups: dict[str, list[SaliencyPicture]] = {
        "real, not called fake": [p for p in pictures if p.label == 0 and p.choice == "right"],
        "real, called fake": [p for p in pictures if p.label == 0 and p.choice == "mistake"],
        "fake, called fake": [p for p in pictures if p.label == 1 and p.choice == "right"],
        "fake, not called fake": [p for p in pictures if p.label == 1 and p.choice == "mistake"],
        "all": list(pictures),
    }
    return SaliencyReport(layer, pictures_per_class, tuple(_correlation_of(n, m) for n, m in groups.items()))


def _correlation_of(name: str, pictures: Sequence[SaliencyPicture]) -> CorrelationOfSet:
    defined = [p.correlation for p in pictures if p.correlation is not None]
    if not defined:
        return CorrelationOfSet(name, len(pictures), 0, None, None, None)
    return CorrelationOfSet(name, len(pictures), len(defined), float(np.mean(defined)), min(defined), max(defined))


def _grid(values: NDArray[np.floating]) -> Grid:
    return tuple(tuple(float(value) for value in row) for row in values)


class _FakeLogit(nn.Module):
    """The logit (N, 1) of normalised pixels, by way of a layer that stands for the encoder's last map."""

    def __init__(self, detector: NTFDetector) -> None:
        super().__init__()
        self.detector = detector
        self.last_map = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        features, maps = self.detector.encoder.features(pixels)
        embeddings = torch.cat(self.detector.encoder.pooled_parts(self.last_map(features), maps), dim=1)
        return self.detector.classify(embeddings, self.detector.projection(embeddings))[:, None]


def saliency_layer(encoder: Encoder) -> str:
    """What Grad-CAM++ is taken from, in words.

    Raises:
        ConfigError: a transformer whose last block has no first normalisation, or an encoder that reads a picture
            twice.
    """
    if encoder.reads == "both":
        raise ConfigError(
            "--gradcam with --encoder-input both",
            got="two last maps of each picture",
            wanted="one",
            remedy="leave --gradcam out",
        )
    if not hasattr(encoder.net, "num_prefix_tokens"):
        return LAST_MAP
    if not hasattr(encoder.net, "blocks") or not hasattr(encoder.net.blocks[-1], "norm1"):
        raise ConfigError(
            f"--gradcam with encoder {encoder.name}",
            got=f"a transformer without {LAST_BLOCK}",
            wanted="a convolutional network or a plain ViT",
            remedy="leave --gradcam out",
        )
    return LAST_BLOCK


def _maps_of_batch(detector: NTFDetector, images: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Grad-CAM++ and evidence, each (N, h, w), of raw images (N, H, W, 3) uint8."""
    device = next(detector.parameters()).device
    with _gradients_of_activations(detector):
        with torch.no_grad():
            evidence = detector(images.to(device)).evidence.float().cpu().numpy()
            pixels = detector.normalizer(images.to(device))
        return _gradcam(detector, pixels.requires_grad_(), evidence.shape[1:]), evidence


def _gradcam(detector: NTFDetector, pixels: Tensor, cells: tuple[int, int]) -> NDArray[np.float32]:
    # Imported here: it brings OpenCV and pyplot, which nothing else needs.
    from pytorch_grad_cam import GradCAMPlusPlus
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    class CellGradCAM(GradCAMPlusPlus):
        """Without the enlargement to the input's size: one value a cell, as the evidence has."""

        def get_target_width_height(self, input_tensor: Tensor) -> tuple[int, int]:
            return cells[1], cells[0]

    encoder, model = detector.encoder, _FakeLogit(detector)

    def map_of_tokens(tokens: Tensor) -> Tensor:
        patches = tokens[:, encoder.net.num_prefix_tokens :]
        return patches.transpose(1, 2).reshape(len(tokens), -1, *cells)

    if saliency_layer(encoder) == LAST_MAP:
        cam = CellGradCAM(model, [model.last_map])
    else:  # after its last block, a network that reads the class token looks at no patch any more
        cam = CellGradCAM(model, [encoder.net.blocks[-1].norm1], reshape_transform=map_of_tokens)
    try:  # not as a context manager, which would swallow an IndexError
        maps: NDArray[np.float32] = cam(pixels, [ClassifierOutputTarget(0)] * len(pixels))
    finally:
        cam.activations_and_grads.release()
    return maps


@contextmanager
def _gradients_of_activations(module: nn.Module) -> Iterator[None]:
    """Eval mode in which no parameter takes a gradient; modes, flags and gradients come back as they were."""
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    training = [part for part in module.modules() if part.training]
    module.requires_grad_(False).eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag, gradient in parameters:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for part in training:
            part.training = True


def saliency_section(report: SaliencyReport) -> str:
    """The report's section."""
    rows = [
        (s.name, f"{s.pictures:,}", f"{s.defined:,}", *map(decimal, (s.mean, s.minimum, s.maximum)))
        for s in report.sets
    ]
    return "\n\n".join(
        (
            f"![Crops, Grad-CAM++ and evidence]({SALIENCY_FIGURE_FILE})",
            "Three columns a picture: the crop that the detector sees; Grad-CAM++ for the logit of being fake "
            f"(taken from {report.layer}), scaled to each picture's own ends; the detector's evidence, the "
            "calibrated logit of each cell, white at 0, on one scale for the whole sheet. Above: the verdict, by the "
            "run's thresholds, and the probability of being fake. At most "
            f"{report.pictures_per_class} pictures of each class of each generator: the most confident right ones, "
            "and in red the worst mistakes (real called fake, fake not called fake), up to half of them.",
            "To be seen: whether the cells that speak for fake lie on something, and whether mistakes have a common "
            "cause. Grad-CAM++ shows what would raise the logit, even where it is low, and its scale does not say how "
            "much; cells see far beyond their own square. The pictures are extremes, chosen by score: they say "
            "nothing of the average picture.",
            "Correlation: Spearman's, of Grad-CAM++ and evidence over a picture's cells. Near 1 the two point at the "
            "same places, near 0 at least one of them is no explanation of the verdict. It is not defined where a map "
            "is the same everywhere.",
            markdown_table(("pictures", "shown", "defined", "mean", "min", "max"), rows),
        )
    )
