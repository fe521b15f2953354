"""Evaluate a trained detector: `python -m train.evaluate --run runs/NAME --data DIR_OR_LIST`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from runtime.errors import NTFError
from train.calibration import REAL_FLAGGED_RATES
from train.calibration_report import CALIBRATION_FIGURE_FILE, write_calibration_figure
from train.checkpoint import load_calibration, load_detector, make_folder, newest_run, save_json
from train.embedding_store import EmbeddingStore
from train.evaluation_config import ALL, EvaluationConfig, check_evaluation
from train.evaluation_figures import check_pictures, make_embedding_map, make_saliency_sheet
from train.evaluation_measures import ScoredPictures, evaluation_report, in_order
from train.feature_cache import weights_sha256
from train.integrity import CORRUPT_FILE, checked_split, corrupt_counts
from train.metrics import Array
from train.model import NTFDetector
from train.pictures import PictureRecord
from train.report import FIGURE_FILE, MARKDOWN_FILE, EvaluationReport, short_table
from train.report_figure import write_figure
from train.report_html import write_html
from train.report_markdown import write_report
from train.robustness import measure_robustness
from train.robustness_report import ROBUSTNESS_FIGURE_FILE, write_robustness_figure
from train.scoring import preprocess_spec, score_images, score_pictures
from train.validation_scores import load_validation_scores, require_validation_scores

Scorer = Callable[[Sequence[PictureRecord]], Array]  # raw logits, (N,), in the records' order


@dataclass(frozen=True)
class Options:
    """Metrics per generator and family, as JSON, Markdown, one HTML file and figures."""

    data: Path
    """Folder, tar shards, CSV file or JSON list with labelled pictures."""
    run: Path | None = None
    """Run folder; by default the newest below runs/."""
    out: Path | None = None
    """Folder of the report; by default RUN/report."""
    config: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = field(default_factory=EvaluationConfig)
    progress: bool = True
    """Show a progress bar."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        options = tyro.cli(Options, prog="python -m train.evaluate", args=arguments)
        run = options.run or newest_run()
        report = evaluate_run(run, options.data, options.config, out=options.out, progress=options.progress)
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}: correct it and start again", file=sys.stderr)
        return 2
    print(short_table(report))
    return 0


def evaluate_run(
    run: Path,
    data: Path,
    config: EvaluationConfig | None = None,
    *,
    out: Path | None = None,
    scorer: Scorer | None = None,
    trivial_auc: dict[str, float | None] | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Scores the pictures and writes the report.

    Args:
        run: finished run folder; its calibration.json gives every threshold.
        data: collection of labelled pictures.
        config: what is scored, measured and shown; by default what the command line does without options.
        out: folder of the report, `run/report` by default.
        scorer: what gives the logits, instead of the run's detector.
        trivial_auc: as an earlier report on the same pictures has it; computed where it is not given.
        progress: show a progress bar.

    Raises:
        NTFError: the run is not finished, or the data cannot be used.
    """
    config = config or EvaluationConfig()
    check_evaluation(config, has_detector=scorer is None)
    calibration = load_calibration(run)
    validation = load_validation_scores(run) if config.real_flagged_rates is None else require_validation_scores(run)
    pictures = checked_split(
        data,
        None if config.split == ALL else config.split,
        corrupt=config.corrupt,
        equalize=config.equalize,
        workers=config.workers,
        progress=progress,
    )
    print(pictures.describe(), config.equalize.describe(), sep="\n", flush=True)
    check_pictures(config.figures, run, pictures)
    folder = out or run / "report"
    make_folder(folder, option="--out")  # before the work, which may take hours

    detector = None
    if scorer is None:
        detector = _open_detector(run, config.cache_dir)
        logits = _detector_logits(detector, pictures.records, config, progress=progress)
    else:
        logits = scorer(pictures.records)
    scored = ScoredPictures(pictures, logits, calibration)
    report = evaluation_report(
        scored,
        run=str(run),
        data=str(data),
        split=config.split,
        validation=validation,
        rates=config.real_flagged_rates or REAL_FLAGGED_RATES,
        draws=config.draws,
        trivial_auc=trivial_auc,
    )
    if detector is not None:
        report = _with_second_look(report, scored, detector, config, run=run, folder=folder, progress=progress)
    _write(report, scored, folder, paper_tables=config.paper_tables)
    return report


def _open_detector(run: Path, cache_dir: Path | None) -> NTFDetector:
    detector = load_detector(run)
    if cache_dir is not None:
        detector.encoder.store = EmbeddingStore(cache_dir, weights_sha256(detector.encoder.net))
    return detector


def _detector_logits(
    detector: NTFDetector, records: Sequence[PictureRecord], config: EvaluationConfig, *, progress: bool
) -> Array:
    size, workers = config.batch_size, config.workers
    return score_pictures(detector, records, batch_size=size, workers=workers, progress=progress).logits


def _with_second_look(
    report: EvaluationReport,
    scored: ScoredPictures,
    detector: NTFDetector,
    config: EvaluationConfig,
    *,
    run: Path,
    folder: Path,
    progress: bool,
) -> EvaluationReport:
    """The report with what takes the detector a second look at the pictures, as far as it is asked for."""
    robustness = embedding_map = saliency = None
    if config.robustness.enabled:
        robustness = measure_robustness(
            scored.pictures.records,
            scored.logits,
            scored.calibration,
            config.robustness,
            generators=[entry.name for entry in report.generators],
            score=lambda images: score_images(detector, images).logits,
            spec=preprocess_spec(detector.encoder),
            batch_size=config.batch_size,
            workers=config.workers,
            progress=progress,
        )
    look = config.figures, scored, detector
    if config.figures.tsne:
        embedding_map = make_embedding_map(
            *look, run=run, folder=folder, batch_size=config.batch_size, workers=config.workers
        )
    if config.figures.gradcam:
        saliency = make_saliency_sheet(*look, folder=folder, batch_size=config.batch_size, workers=config.workers)
    return replace(report, robustness=robustness, embedding_map=embedding_map, saliency=saliency)


def _write(report: EvaluationReport, scored: ScoredPictures, folder: Path, *, paper_tables: bool) -> None:
    """Every file of the report but those of the second look, and says so."""
    written = [folder / FIGURE_FILE]
    rows = in_order(report.generators, scored.rows_by("generator"))
    write_figure(folder / FIGURE_FILE, scored.logits, scored.labels, rows)
    if report.calibration_report is not None:
        write_calibration_figure(folder / CALIBRATION_FIGURE_FILE, report.calibration_report)
        written.append(folder / CALIBRATION_FIGURE_FILE)
    if report.robustness is not None:
        write_robustness_figure(folder / ROBUSTNESS_FIGURE_FILE, report.robustness)
        written.append(folder / ROBUSTNESS_FIGURE_FILE)
    corrupt = scored.pictures.corrupt
    if corrupt:
        listed = {"counts": corrupt_counts(corrupt), "pictures": [asdict(picture) for picture in corrupt]}
        save_json(folder / CORRUPT_FILE, listed)
        written.append(folder / CORRUPT_FILE)
    written += write_report(report, folder, paper_tables=paper_tables)
    written.append(write_html(folder / MARKDOWN_FILE))  # last, since it holds every figure
    print("wrote " + ", ".join(map(str, written)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
