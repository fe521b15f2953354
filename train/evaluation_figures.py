"""The figures of an evaluation that take a second look at the pictures; each is made where it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.strict_json import to_jsonable
from train.checkpoint import load_config, load_train_generators, save_json
from train.embedding_map import MAP_FIGURE_FILE, MAP_FILE, EmbeddingMapReport, check_mappable, embedding_map
from train.embedding_map_figure import write_embedding_map
from train.encoder import Encoder
from train.errors import ConfigError
from train.evaluation_measures import ScoredPictures
from train.methods import METHODS
from train.model import NTFDetector
from train.pictures import PictureSet
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


def check_figures(config: FigureConfig) -> None:
    """Refuse values that do not make sense.

    Raises:
        ConfigError: naming the option.
    """
    if config.tsne_seed < 0:
        raise ConfigError("--tsne-seed", got=str(config.tsne_seed), wanted="0 or more", remedy="change this option")
    if config.gradcam_pictures < 1:
        got = str(config.gradcam_pictures)
        raise ConfigError("--gradcam-pictures", got=got, wanted="1 or more", remedy="change this option")


def check_pictures(config: FigureConfig, run: Path, pictures: PictureSet) -> None:
    """Refuse figures that cannot be made of these pictures or this run, before anything is scored.

    Raises:
        NTFError: naming the option.
    """
    if config.tsne:
        check_mappable(pictures.records, config.tsne_pictures)
    if config.gradcam:
        model = load_config(run).model
        saliency_layer(Encoder(model.encoder, **model.encoder_options()))


def make_embedding_map(
    config: FigureConfig,
    scored: ScoredPictures,
    detector: NTFDetector,
    *,
    run: Path,
    folder: Path,
    batch_size: int = 32,
    workers: int = 0,
) -> EmbeddingMapReport:
    """Writes the map, and the JSON file that it can be drawn from again.

    Args:
        config: how many pictures, and the seed.
        scored: pictures to draw from.
        detector: the run's.
        run: its folder, which says how it was trained.
        folder: where the files go.
        batch_size: pictures in a pass.
        workers: processes that decode.

    Raises:
        ReportError: too few pictures for a map.
    """
    made = embedding_map(
        detector,
        scored.pictures.records,
        scored.ids,
        natural_traces=METHODS[load_config(run).method].natural_traces,
        train_generators=load_train_generators(run),
        limit=config.tsne_pictures,
        seed=config.tsne_seed,
        batch_size=batch_size,
        workers=workers,
    )
    save_json(folder / MAP_FILE, to_jsonable(made, subject=MAP_FILE))
    write_embedding_map(folder / MAP_FIGURE_FILE, made)
    print(f"wrote {folder / MAP_FILE}, {folder / MAP_FIGURE_FILE}", flush=True)
    return made.report


def make_saliency_sheet(
    config: FigureConfig,
    scored: ScoredPictures,
    detector: NTFDetector,
    *,
    folder: Path,
    batch_size: int = 32,
    workers: int = 0,
) -> SaliencyReport:
    """Writes the sheet, and the JSON file that it can be drawn from again but for the crops.

    Args:
        config: how many pictures.
        scored: pictures to choose from.
        detector: the run's.
        folder: where the files go.
        batch_size: pictures in a pass.
        workers: processes that decode.

    Raises:
        ConfigError: the encoder has no layer that Grad-CAM++ can be taken from.
    """
    records, logits, calibration = scored.pictures.records, scored.logits, scored.calibration
    chosen = chosen_pictures(records, logits, calibration, config.gradcam_pictures)
    maps = saliency_maps(detector, [records[one.row] for one in chosen], batch_size=batch_size, workers=workers)
    shown = saliency_pictures(chosen, records, scored.ids, logits, calibration, maps)
    report = saliency_report(shown, layer=saliency_layer(detector.encoder), pictures_per_class=config.gradcam_pictures)
    save_json(folder / SALIENCY_FILE, to_jsonable(SaliencySheet(report, shown), subject=SALIENCY_FILE))
    write_sheet(folder / SALIENCY_FIGURE_FILE, shown, maps.images)
    print(f"wrote {folder / SALIENCY_FILE}, {folder / SALIENCY_FIGURE_FILE}", flush=True)
    return report
