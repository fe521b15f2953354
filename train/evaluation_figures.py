"""The figures of an evaluation that take a second look at the pictures; each is made where it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import CalibrationSpec
from runtime.strict_json import to_jsonable
from train.checkpoint import load_config, load_detector, load_train_generators, save_json
from train.embedding_map import MAP_FIGURE_FILE, MAP_FILE, EmbeddingMapReport, check_mappable, embedding_map
from train.embedding_map_figure import write_embedding_map
from train.encoder import Encoder
from train.errors import ConfigError
from train.methods import METHODS
from train.model import NTFDetector
from train.pictures import PictureSet, relative_path
from train.saliency import (
    SALIENCY_FIGURE_FILE,
    SALIENCY_FILE,
    SaliencyReport,
    SaliencySheet,
    chosen_pictures,
    saliency_layer,
    saliency_maps,
    saliency_pictures,
    saliency_report,
)
from train.saliency_sheet import write_sheet


@dataclass(frozen=True)
class FigureConfig:
    """Further figures of an evaluation."""

    tsne: bool = False
    """Map the embeddings with t-SNE, beside the natural traces."""
    tsne_pictures: int = 1000
    """Most pictures in the map; each class of each generator by its share."""
    tsne_seed: int = 0
    """Seed of the map's sample, and of what t-SNE draws."""
    gradcam: bool = False
    """Sheet of pictures with Grad-CAM++ and the detector's evidence."""
    gradcam_pictures: int = 3
    """Pictures of each class of each generator on the sheet: the worst mistakes and the most confident right ones."""


class FigureReports(NamedTuple):
    """What the figures show, None where they were not asked for, and the files that were written."""

    embedding_map: EmbeddingMapReport | None
    saliency: SaliencyReport | None
    files: tuple[Path, ...]


def check_figures(config: FigureConfig, run: Path, pictures: PictureSet) -> None:
    """Refuse what cannot be made, before anything is scored.

    Raises:
        NTFError: naming the option.
    """
    if config.tsne_seed < 0:
        raise ConfigError("--tsne-seed", got=str(config.tsne_seed), wanted="0 or more", remedy="change this option")
    if config.gradcam_pictures < 1:
        got = str(config.gradcam_pictures)
        raise ConfigError("--gradcam-pictures", got=got, wanted="1 or more", remedy="change this option")
    if config.tsne:
        check_mappable(pictures.records, config.tsne_pictures)
    if config.gradcam:
        saliency_layer(Encoder(load_config(run).model.encoder))


def make_figures(
    config: FigureConfig,
    run: Path,
    pictures: PictureSet,
    logits: NDArray[np.floating],
    calibration: CalibrationSpec,
    folder: Path,
    *,
    batch_size: int = 32,
    workers: int = 0,
) -> FigureReports:
    """Writes the figures that are asked for, each with the JSON file that it can be made from again.

    Args:
        config: which.
        run: finished run folder, whose detector looks at the pictures.
        pictures: what was scored.
        logits: (N,) raw logits in the order of its records.
        calibration: of the run.
        folder: where the files go.
        batch_size: pictures in a pass.
        workers: processes that decode.

    Raises:
        NTFError: the run is not finished, or a figure cannot be made of these pictures.
    """
    if not (config.tsne or config.gradcam):
        return FigureReports(None, None, ())
    detector = load_detector(run)
    ids = [relative_path(record.path, pictures.root) for record in pictures.records]
    mapped = saliency = None
    files: tuple[Path, ...] = ()
    if config.tsne:
        mapped = _embedding_map(config, run, detector, pictures, ids, folder, batch_size, workers)
        files += folder / MAP_FILE, folder / MAP_FIGURE_FILE
    if config.gradcam:
        saliency = _saliency(config, detector, pictures, ids, logits, calibration, folder, batch_size, workers)
        files += folder / SALIENCY_FILE, folder / SALIENCY_FIGURE_FILE
    return FigureReports(mapped, saliency, files)


def _embedding_map(
    config: FigureConfig,
    run: Path,
    detector: NTFDetector,
    pictures: PictureSet,
    ids: Sequence[str],
    folder: Path,
    batch_size: int,
    workers: int,
) -> EmbeddingMapReport:
    made = embedding_map(
        detector,
        pictures.records,
        ids,
        natural_traces=METHODS[load_config(run).method].natural_traces,
        train_generators=load_train_generators(run),
        limit=config.tsne_pictures,
        seed=config.tsne_seed,
        batch_size=batch_size,
        workers=workers,
    )
    save_json(folder / MAP_FILE, to_jsonable(made, subject=MAP_FILE))
    write_embedding_map(folder / MAP_FIGURE_FILE, made)
    return made.report


def _saliency(
    config: FigureConfig,
    detector: NTFDetector,
    pictures: PictureSet,
    ids: Sequence[str],
    logits: NDArray[np.floating],
    calibration: CalibrationSpec,
    folder: Path,
    batch_size: int,
    workers: int,
) -> SaliencyReport:
    chosen = chosen_pictures(pictures.records, logits, calibration, config.gradcam_pictures)
    records = [pictures.records[choice.row] for choice in chosen]
    maps = saliency_maps(detector, records, batch_size=batch_size, workers=workers)
    shown = saliency_pictures(chosen, pictures.records, ids, logits, calibration, maps)
    report = saliency_report(shown, layer=saliency_layer(detector.encoder), pictures_per_class=config.gradcam_pictures)
    save_json(folder / SALIENCY_FILE, to_jsonable(SaliencySheet(report, shown), subject=SALIENCY_FILE))
    write_sheet(folder / SALIENCY_FIGURE_FILE, shown, maps.images)
    return report
