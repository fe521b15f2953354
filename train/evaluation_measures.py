"""What is measured of scored pictures: metrics of each generator and family, their spread, and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import CalibrationSpec
from train.bootstrap import METRICS, Draws, OriginalsBootstrap, interval
from train.calibration import REAL_FLAGGED_RATES, measure_calibration
from train.equalize import EqualizeConfig
from train.metrics import Array, detection_metrics
from train.pictures import PictureSet, relative_path
from train.provenance import environment
from train.report import EvaluationReport, SetReport, Spread
from train.trivial_features import generator_aucs
from train.validation_scores import ValidationScores


@dataclass(frozen=True)
class ScoredPictures:
    """Labelled pictures with their scores.

    Attributes:
        pictures: N of them.
        logits: (N,) float, raw, in the order of the records.
        calibration: from validation pictures, never from these.
    """

    pictures: PictureSet
    logits: Array
    calibration: CalibrationSpec

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """(N,) 0 real, 1 fake."""
        return np.array([r.label for r in self.pictures.records], dtype=np.int64)

    @cached_property
    def ids(self) -> list[str]:
        """Path of each picture in its collection."""
        return [relative_path(record.path, self.pictures.root) for record in self.pictures.records]

    def rows_by(self, key: str) -> dict[str, NDArray[np.intp]]:
        """Indices of the pictures by "generator" or "family"."""
        groups: dict[str, list[int]] = {}
        for row, record in enumerate(self.pictures.records):
            groups.setdefault(getattr(record, key), []).append(row)
        return {name: np.array(rows, dtype=np.intp) for name, rows in groups.items()}


def evaluation_report(
    scored: ScoredPictures,
    *,
    run: str,
    data: str,
    split: str,
    validation: ValidationScores | None = None,
    rates: Sequence[float] = REAL_FLAGGED_RATES,
    draws: int = 1000,
    trivial_auc: dict[str, float | None] | None = None,
) -> EvaluationReport:
    """Everything that logits and labels say.

    Args:
        scored: the pictures.
        run: named in the report.
        data: named in the report.
        split: named in the report.
        validation: the run's validation scores, which thresholds for other rates are fitted on; None without any.
        rates: wanted shares of real pictures flagged in the table of thresholds.
        draws: bootstrap resamplings.
        trivial_auc: of these pictures, where it is known.
    """
    pictures, calibration = scored.pictures, scored.calibration
    bootstrap = OriginalsBootstrap([r.original_id for r in pictures.records], draws=draws)
    generators, resampled = _set_reports(scored, "generator", bootstrap)
    families, _ = _set_reports(scored, "family", bootstrap)
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
        trivial_auc=generator_aucs(pictures.records) if trivial_auc is None else trivial_auc,
        environment=environment(),
        calibration_report=measure_calibration(
            scored.logits,
            scored.labels,
            in_order(generators, scored.rows_by("generator")),
            calibration,
            validation=validation,
            rates=rates,
        ),
    )


def in_order(entries: Sequence[SetReport], rows: dict[str, NDArray[np.intp]]) -> dict[str, NDArray[np.intp]]:
    """Indices by generator in the order of the report."""
    return {entry.name: rows[entry.name] for entry in entries}


def equalize_of(pictures: PictureSet) -> EqualizeConfig:
    """The treatment that the records carry."""
    return pictures.records[0].equalize or EqualizeConfig()


def _set_reports(
    scored: ScoredPictures, key: str, bootstrap: OriginalsBootstrap
) -> tuple[tuple[SetReport, ...], list[dict[str, Draws] | None]]:
    """Figures of each set, worst first, and what was drawn for each, where intervals can be given."""
    records, logits, labels = scored.pictures.records, scored.logits, scored.labels
    reports, resampled = [], []
    for name, rows in scored.rows_by(key).items():
        drawn = bootstrap.draws_of(logits, labels, rows, scored.calibration)
        metrics = detection_metrics(logits[rows], labels[rows], calibration=scored.calibration)
        intervals = {m: interval(drawn[m]) if drawn else None for m in METRICS}
        originals = len({records[row].original_id for row in rows})
        reports.append(SetReport(name, originals, metrics, intervals))
        resampled.append(drawn)
    return tuple(sorted(reports, key=_worst_first)), resampled


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
