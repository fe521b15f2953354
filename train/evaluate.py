"""Evaluate a trained detector: `python -m train.evaluate --run runs/NAME --data DIR_OR_LIST`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray

from runtime.errors import NTFError
from runtime.manifest import CalibrationSpec
from train.bootstrap import METRICS, Draws, OriginalsBootstrap, interval
from train.calibration import REAL_FLAGGED_RATES, check_rates, measure_calibration
from train.calibration_report import CALIBRATION_FIGURE_FILE, write_calibration_figure
from train.checkpoint import load_calibration, load_detector, newest_run, save_json
from train.embedding_store import EmbeddingStore
from train.equalize import EqualizeConfig, check_equalize
from train.errors import ConfigError
from train.evaluation_figures import FigureConfig, check_figures, make_figures
from train.feature_cache import weights_sha256
from train.integrity import CORRUPT_FILE, checked_split, corrupt_counts
from train.metrics import Array, detection_metrics
from train.paper_tables import paper_sections
from train.pictures import CorruptPolicy, PictureRecord, PictureSet
from train.provenance import environment
from train.report import FIGURE_FILE, MARKDOWN_FILE, EvaluationReport, SetReport, Spread, short_table, write_report
from train.report_figure import write_figure
from train.report_html import write_html
from train.robustness import RobustnessConfig, check_robustness, measure_robustness
from train.robustness_report import ROBUSTNESS_FIGURE_FILE, write_robustness_figure
from train.scoring import preprocess_spec, score_images, score_pictures
from train.trivial_features import generator_aucs
from train.validation_scores import load_validation_scores, require_validation_scores

ALL = "all"
Scorer = Callable[[Sequence[PictureRecord]], Array]  # raw logits, (N,), in the records' order


@dataclass(frozen=True)
class Options:
    """Metrics per generator and family, as JSON, Markdown, one HTML file and figures."""

    data: Path
    """Folder, tar shards, CSV file or JSON list with labelled pictures."""
    run: Path | None = None
    """Run folder; by default the newest below runs/."""
    split: str = "test"
    """Split to score; "all" for a collection without splits."""
    out: Path | None = None
    """Folder of the report; by default RUN/report."""
    corrupt: CorruptPolicy = "refuse"
    """Pictures that cannot be decoded: refuse to evaluate, or leave them out and list them in the report."""
    equalize: Annotated[EqualizeConfig, tyro.conf.arg(name="")] = field(default_factory=EqualizeConfig)
    cache_dir: Path | None = None
    """Folder in which training runs keep the embeddings of this encoder (train.run --cache-dir)."""
    real_flagged_rates: tuple[float, ...] | None = None
    """Wanted shares of real pictures flagged in the table of thresholds; by default 0.1 % to 10 %."""
    robustness: Annotated[RobustnessConfig, tyro.conf.arg(name="")] = field(default_factory=RobustnessConfig)
    figures: Annotated[FigureConfig, tyro.conf.arg(name="")] = field(default_factory=FigureConfig)
    batch_size: int = 32
    """Pictures in a forward pass."""
    workers: int = 0
    """Processes that decode."""
    draws: int = 1000
    """Bootstrap resamplings."""
    paper_tables: bool = False
    """Add tables in the form of the paper's Tables 2 to 5 also where no generator is one of the paper's."""
    progress: bool = True
    """Show a progress bar."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        options = tyro.cli(Options, prog="python -m train.evaluate", args=arguments)
        report = evaluate_run(
            options.run or newest_run(),
            options.data,
            split=options.split,
            out=options.out,
            corrupt=options.corrupt,
            equalize=options.equalize,
            cache_dir=options.cache_dir,
            real_flagged_rates=options.real_flagged_rates,
            robustness=options.robustness,
            figures=options.figures,
            batch_size=options.batch_size,
            workers=options.workers,
            draws=options.draws,
            paper_tables=options.paper_tables,
            progress=options.progress,
        )
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
    *,
    split: str = "test",
    out: Path | None = None,
    corrupt: CorruptPolicy = "refuse",
    equalize: EqualizeConfig | None = None,
    cache_dir: Path | None = None,
    real_flagged_rates: Sequence[float] | None = None,
    robustness: RobustnessConfig | None = None,
    figures: FigureConfig | None = None,
    batch_size: int = 32,
    workers: int = 0,
    draws: int = 1000,
    paper_tables: bool = False,
    progress: bool = True,
    scorer: Scorer | None = None,
) -> EvaluationReport:
    """Scores the pictures and writes the report.

    Args:
        run: finished run folder; its calibration.json gives every threshold.
        data: collection of labelled pictures.
        split: split to score, or "all".
        out: folder of the report, `run/report` by default.
        corrupt: what to do where pictures cannot be decoded.
        equalize: treatment of both classes before they are scored.
        cache_dir: folder of embeddings that were computed before, or None.
        real_flagged_rates: rates of the table of thresholds; where they are given, the run must have validation scores.
        robustness: what is done to the pictures to see whether verdicts hold; nothing by default.
        figures: those besides ROC and reliability, which the run's own detector is asked for; none by default.
        batch_size: pictures in a forward pass.
        workers: processes that decode.
        draws: bootstrap resamplings.
        paper_tables: add tables in the paper's form also where no generator is one of the paper's.
        progress: show a progress bar.
        scorer: what gives the logits, instead of the run's detector.

    Raises:
        NTFError: the run is not finished, or the data cannot be used.
    """
    equalize, robustness = equalize or EqualizeConfig(), robustness or RobustnessConfig()
    figures = figures or FigureConfig()
    check_equalize(equalize)
    check_robustness(robustness)
    check_rates(rates := REAL_FLAGGED_RATES if real_flagged_rates is None else real_flagged_rates)
    if robustness.enabled and scorer is not None:
        raise ConfigError("robustness", got="a scorer", wanted="the run's own detector", remedy="leave one of them out")
    calibration = load_calibration(run)
    validation = load_validation_scores(run) if real_flagged_rates is None else require_validation_scores(run)
    wanted = None if split == ALL else split
    pictures = checked_split(data, wanted, corrupt=corrupt, equalize=equalize, workers=workers, progress=progress)
    print(pictures.describe(), equalize.describe(), sep="\n", flush=True)
    check_figures(figures, run, pictures)
    folder = out or run / "report"
    folder.mkdir(parents=True, exist_ok=True)  # before the work, which may take hours
    if scorer is None:
        detector = load_detector(run)
        if cache_dir is not None:
            detector.encoder.store = EmbeddingStore(cache_dir, weights_sha256(detector.encoder.net))

        def scorer(records: Sequence[PictureRecord]) -> Array:
            return score_pictures(detector, records, batch_size=batch_size, workers=workers, progress=progress).logits

    logits, labels = scorer(pictures.records), _labels(pictures)
    report = evaluation_report(pictures, logits, calibration, run=str(run), data=str(data), split=split, draws=draws)
    by_name = _rows_by(pictures, "generator")
    rows = {entry.name: by_name[entry.name] for entry in report.generators}
    calibrated = measure_calibration(logits, labels, rows, calibration, validation=validation, rates=rates)
    report = replace(report, calibration_report=calibrated)
    if robustness.enabled:
        measured = measure_robustness(
            pictures.records,
            logits,
            calibration,
            robustness,
            generators=tuple(rows),
            score=lambda images: score_images(detector, images).logits,
            spec=preprocess_spec(detector.encoder),
            batch_size=batch_size,
            workers=workers,
            progress=progress,
        )
        report = replace(report, robustness=measured)
    shown = make_figures(figures, run, pictures, logits, calibration, folder, batch_size=batch_size, workers=workers)
    report = replace(report, embedding_map=shown.embedding_map, saliency=shown.saliency)
    written = [*write_report(report, folder, paper_sections(report, wanted=paper_tables)), *shown.files]
    if pictures.corrupt:
        listed = {"counts": corrupt_counts(pictures.corrupt), "pictures": [asdict(p) for p in pictures.corrupt]}
        save_json(folder / CORRUPT_FILE, listed)
        written.append(folder / CORRUPT_FILE)
    written += _write_figures(folder, report, logits, labels, rows)
    written.append(write_html(folder / MARKDOWN_FILE))  # last, since it holds every figure
    print("wrote " + ", ".join(map(str, written)), flush=True)
    return report


def _write_figures(
    folder: Path, report: EvaluationReport, logits: Array, labels: NDArray[np.int64], rows: dict[str, NDArray[np.intp]]
) -> list[Path]:
    """Every PNG that the report's Markdown shows."""
    written = [folder / FIGURE_FILE]
    write_figure(folder / FIGURE_FILE, logits, labels, rows, report.calibration)
    if report.calibration_report is not None:
        write_calibration_figure(folder / CALIBRATION_FIGURE_FILE, report.calibration_report)
        written.append(folder / CALIBRATION_FIGURE_FILE)
    if report.robustness is not None:
        write_robustness_figure(folder / ROBUSTNESS_FIGURE_FILE, report.robustness)
        written.append(folder / ROBUSTNESS_FIGURE_FILE)
    return written


def evaluation_report(
    pictures: PictureSet,
    logits: Array,
    calibration: CalibrationSpec,
    *,
    run: str,
    data: str,
    split: str,
    draws: int = 1000,
) -> EvaluationReport:
    """All figures of scored pictures.

    Args:
        pictures: what was scored.
        logits: (N,) raw logits in the order of its records.
        calibration: from validation pictures, never from these.
        run: named in the report.
        data: named in the report.
        split: named in the report.
        draws: bootstrap resamplings.
    """
    labels = _labels(pictures)
    bootstrap = OriginalsBootstrap([r.original_id for r in pictures.records], draws=draws)

    def entries(key: str) -> tuple[tuple[SetReport, ...], list[dict[str, Draws] | None]]:
        reports, resampled = [], []
        for name, rows in _rows_by(pictures, key).items():
            drawn = bootstrap.draws_of(logits, labels, rows, calibration)
            metrics = detection_metrics(logits[rows], labels[rows], calibration=calibration)
            intervals = {m: interval(drawn[m]) if drawn else None for m in METRICS}
            originals = len({pictures.records[row].original_id for row in rows})
            reports.append(SetReport(name, originals, metrics, intervals))
            resampled.append(drawn)
        return tuple(sorted(reports, key=_worst_first)), resampled

    generators, resampled = entries("generator")
    families, _ = entries("family")
    return EvaluationReport(
        run=run,
        data=data,
        split=split,
        data_sha256=pictures.content_sha256(),
        pictures=len(pictures),
        calibration=calibration,
        generators=generators,
        families=families,
        spread={name: _spread(name, generators, resampled) for name in METRICS},
        bootstrap_draws=draws,
        treatment=equalize_of(pictures).describe(),
        corrupt_left_out=len(pictures.corrupt),
        trivial_auc=generator_aucs(pictures.records),
        environment=environment(),
    )


def equalize_of(pictures: PictureSet) -> EqualizeConfig:
    """The treatment that the records carry."""
    return pictures.records[0].equalize or EqualizeConfig()


def _spread(name: str, generators: Sequence[SetReport], resampled: Sequence[dict[str, Draws] | None]) -> Spread | None:
    """Unweighted over the generators that have both classes, so that every metric is of the same sets."""
    values = [getattr(g.metrics, name) for g in generators if g.metrics.ap is not None]
    if not values:
        return None
    usable = [drawn for drawn in resampled if drawn is not None]
    defined = [drawn[name] for drawn in usable if np.isfinite(drawn["ap"]).any()]
    joint = interval(np.mean(defined, axis=0)) if len(defined) == len(values) else None
    return Spread(
        mean=float(np.mean(values)),
        std=float(np.std(values)),
        minimum=min(values),
        maximum=max(values),
        generators=len(values),
        interval=joint,
    )


def _worst_first(entry: SetReport) -> tuple[bool, float, str]:
    return entry.metrics.ap is None, entry.metrics.ap or 0.0, entry.name


def _labels(pictures: PictureSet) -> NDArray[np.int64]:
    return np.array([r.label for r in pictures.records], dtype=np.int64)


def _rows_by(pictures: PictureSet, key: str) -> dict[str, NDArray[np.intp]]:
    """Indices of the records by generator or family."""
    groups: dict[str, list[int]] = {}
    for row, record in enumerate(pictures.records):
        groups.setdefault(getattr(record, key), []).append(row)
    return {name: np.array(rows, dtype=np.intp) for name, rows in groups.items()}


if __name__ == "__main__":
    sys.exit(main())
