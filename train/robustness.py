"""How far metrics and verdicts move when pictures are blurred, compressed, made noisy or scaled (Fig. 5 of the paper).

Each operation is done to the decoded picture, real or fake, before the detector's own crop: what a user sees who
re-encodes his file. A picture is decoded once for all operations and strengths. Noise is keyed by the picture's
content, so any number of workers gives the same figures.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import features

from runtime.manifest import CalibrationSpec
from runtime.preprocess import PreprocessSpec
from train.errors import ConfigError
from train.metrics import Array, Labels, detection_metrics
from train.perturbations import OPERATIONS, Operation
from train.pictures import PictureRecord
from train.variants import ImageScorer, VariantDataset, variant_logits


@dataclass(frozen=True)
class RobustnessConfig:
    """What is done to pictures to see whether verdicts hold."""

    enabled: Annotated[bool, tyro.conf.arg(name="robustness")] = False
    """Score the pictures blurred, compressed, noisy and scaled as well, and report how metrics and verdicts move."""
    operations: Annotated[tuple[Operation, ...], tyro.conf.arg(name="robustness-operations")] = (
        "blur",
        "jpeg",
        "noise",
        "scale",
        "webp",
        "thumbnail",
    )
    """Which operations."""
    pictures: Annotated[int, tyro.conf.arg(name="robustness-pictures")] = 0
    """At most so many pictures of each generator and class, chosen by content hash; 0 takes all."""
    seed: Annotated[int, tyro.conf.arg(name="robustness-seed")] = 0
    """Of noise and choice."""
    blur: Annotated[tuple[float, ...], tyro.conf.arg(name="robustness-blur")] = (0.5, 1.0, 2.0, 3.0)
    """Standard deviations in pixels."""
    jpeg: Annotated[tuple[int, ...], tyro.conf.arg(name="robustness-jpeg")] = (95, 90, 80, 70, 60, 50, 40, 30)
    """Qualities."""
    noise: Annotated[tuple[float, ...], tyro.conf.arg(name="robustness-noise")] = (2.0, 5.0, 10.0, 20.0)
    """Standard deviations in levels of 0..255."""
    scale: Annotated[tuple[float, ...], tyro.conf.arg(name="robustness-scale")] = (0.2, 0.5, 0.75, 1.25, 1.5, 2.0)
    """Factors of both sides; the result is cropped, or padded, as any picture is."""
    webp: Annotated[tuple[int, ...], tyro.conf.arg(name="robustness-webp")] = (95, 80, 60, 40)
    """Qualities."""
    thumbnail: Annotated[tuple[int, ...], tyro.conf.arg(name="robustness-thumbnail")] = (256, 128)
    """Largest sides in pixels of a preview that is enlarged again."""

    def strengths(self, operation: Operation) -> tuple[float, ...]:
        """Strengths of an operation from the mildest on, without the identity and each once."""
        spec = OPERATIONS[operation]
        chosen = {float(strength) for strength in getattr(self, operation)} - {spec.identity}
        return tuple(sorted(chosen, reverse=not spec.rising))


@dataclass(frozen=True)
class RobustnessFigures:
    """One set of pictures under one operation and strength, or the mean over sets; None where undefined.

    Attributes:
        ap: average precision.
        auc: area under the ROC curve.
        accuracy_at_threshold: accuracy where only the verdict `fake` counts as fake.
        real_flagged_rate: share of real pictures with the verdict `fake`.
        fake_missed_rate: share of fakes without the verdict `fake`.
        logit_change: mean |change of the calibrated logit| against the untouched picture.
        real_flips: share of real pictures whose verdict is another than untouched.
        fake_flips: the same for fakes.
        real_opposite: share of real pictures whose verdict went from `real` to `fake` or back.
        fake_opposite: the same for fakes.
    """

    ap: float | None
    auc: float | None
    accuracy_at_threshold: float | None
    real_flagged_rate: float | None
    fake_missed_rate: float | None
    logit_change: float | None
    real_flips: float | None
    fake_flips: float | None
    real_opposite: float | None
    fake_opposite: float | None


@dataclass(frozen=True)
class RobustnessPoint:
    """One strength; None is the untouched picture.

    Attributes:
        strength: in the unit of the curve.
        mean: unweighted over the generators that have both classes; over all where none has.
        generators: each generator.
    """

    strength: float | None
    mean: RobustnessFigures
    generators: dict[str, RobustnessFigures]


@dataclass(frozen=True)
class RobustnessCurve:
    """One operation from its mildest strength on, with the untouched pictures where they belong."""

    operation: Operation
    points: tuple[RobustnessPoint, ...]


@dataclass(frozen=True)
class SampleCount:
    """Pictures of a generator that were taken, of those that were scored."""

    real: int
    real_of: int
    fake: int
    fake_of: int


@dataclass(frozen=True)
class RobustnessReport:
    """Curves of all operations.

    Attributes:
        curves: one for each operation.
        limit: at most so many pictures of each generator and class; 0 for all.
        seed: of noise and choice.
        sample: what was taken, by generator.
    """

    curves: tuple[RobustnessCurve, ...]
    limit: int
    seed: int
    sample: dict[str, SampleCount]


def check_robustness(config: RobustnessConfig) -> None:
    """Refuse values that do not make sense, and options without --robustness, which would do nothing.

    Raises:
        ConfigError: naming the option.
    """
    if not config.enabled:
        plain = RobustnessConfig()
        given = [f.name for f in fields(config) if getattr(config, f.name) != getattr(plain, f.name)]
        if given:
            raise _refusal(f"--robustness-{given[0]}", "no --robustness", "both", "pass --robustness as well")
        return
    if not config.operations:
        raise _refusal("--robustness-operations", "nothing", f"some of {', '.join(OPERATIONS)}")
    for name in ("pictures", "seed"):
        if getattr(config, name) < 0:
            raise _refusal(f"--robustness-{name}", str(getattr(config, name)), "0 or more")
    for operation in config.operations:
        _check_strengths(operation, config)
    if "webp" in config.operations and not features.check("webp"):
        remedy = "install Pillow's own wheel, or name the other operations"
        raise _refusal("--robustness-operations", "webp, which this Pillow cannot write", "a Pillow with WebP", remedy)


def measure_robustness(
    records: Sequence[PictureRecord],
    logits: Array,
    calibration: CalibrationSpec,
    config: RobustnessConfig,
    *,
    generators: Sequence[str],
    score: ImageScorer,
    spec: PreprocessSpec,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = True,
) -> RobustnessReport:
    """Curves of every operation that is asked for.

    Args:
        records: pictures that were scored as they are.
        logits: (N,) float, their raw logits: the untouched point of every curve.
        calibration: from validation pictures.
        config: operations, strengths and how many pictures.
        generators: their names in the report's order, in which means are summed up.
        score: gives the logits of prepared pictures.
        spec: how a picture is prepared.
        batch_size: pictures in a forward pass.
        workers: processes that decode and perturb.
        progress: show a progress bar.

    Raises:
        PictureError: a picture cannot be decoded.

    Note:
        Holds batch_size prepared pictures of every strength, and in each process one picture as it is stored.
    """
    rows = sample_rows(records, config.pictures, seed=config.seed)
    chosen = [records[row] for row in rows]
    variants = [(op, strength) for op in dict.fromkeys(config.operations) for strength in config.strengths(op)]
    dataset = VariantDataset(chosen, variants, spec, config.seed)
    start = time.perf_counter()
    changed = variant_logits(dataset, score, batch_size=batch_size, workers=workers, progress=progress)
    seconds = time.perf_counter() - start
    print(
        f"robustness: {len(chosen):,} of {len(records):,} pictures, {len(variants)} variants of each, "
        f"{changed.size / max(seconds, 1e-9):,.1f} variants a second",
        flush=True,
    )
    names = np.array([record.generator for record in chosen])
    groups = {name: np.nonzero(names == name)[0] for name in generators}
    untouched = logits[rows]
    labels = np.array([record.label for record in chosen], dtype=np.int64)

    def point(strength: float | None, values: Array) -> RobustnessPoint:
        by_name = {n: robustness_figures(values[i], untouched[i], labels[i], calibration) for n, i in groups.items()}
        return RobustnessPoint(strength, mean_figures(by_name), by_name)

    baseline = point(None, untouched)
    found = {variant: point(variant[1], values) for variant, values in zip(variants, changed, strict=True)}
    curves = tuple(
        _curve(op, baseline, [found[op, strength] for strength in config.strengths(op)])
        for op in dict.fromkeys(config.operations)
    )
    sample = {name: _sample(records, chosen, name) for name in generators}
    return RobustnessReport(curves, config.pictures, config.seed, sample)


def robustness_figures(
    logits: Array, untouched: Array, labels: Labels, calibration: CalibrationSpec
) -> RobustnessFigures:
    """Figures of one set of pictures.

    Args:
        logits: (N,) float, raw, of the changed pictures, N >= 1.
        untouched: (N,) float, raw, of the same pictures as they are.
        labels: (N,) int, 0 real, 1 fake.
        calibration: from validation pictures.
    """
    metrics = detection_metrics(logits, labels, calibration=calibration)
    before, after = calibration.verdicts(untouched), calibration.verdicts(logits)
    flipped = before != after
    opposite = flipped & (before != "uncertain") & (after != "uncertain")
    change = np.abs(calibration.calibrated(logits) - calibration.calibrated(untouched))
    real, fake = labels == 0, labels == 1
    return RobustnessFigures(
        ap=metrics.ap,
        auc=metrics.auc,
        accuracy_at_threshold=metrics.accuracy_at_threshold,
        real_flagged_rate=metrics.real_flagged_rate,
        fake_missed_rate=metrics.fake_missed_rate,
        logit_change=float(np.mean(change)),
        real_flips=_share(flipped[real]),
        fake_flips=_share(flipped[fake]),
        real_opposite=_share(opposite[real]),
        fake_opposite=_share(opposite[fake]),
    )


def mean_figures(sets: Mapping[str, RobustnessFigures]) -> RobustnessFigures:
    """Unweighted mean of each figure over the sets with both classes; over those that have it where no set has both."""
    chosen = [entry for entry in sets.values() if entry.ap is not None] or list(sets.values())

    def mean(name: str) -> float | None:
        values = [value for entry in chosen if (value := getattr(entry, name)) is not None]
        return float(np.mean(values)) if values else None

    return RobustnessFigures(**{f.name: mean(f.name) for f in fields(RobustnessFigures)})


def sample_rows(records: Sequence[PictureRecord], limit: int, *, seed: int = 0) -> NDArray[np.intp]:
    """Rising indices of at most `limit` records of each generator and class; of all for a limit of 0.

    The choice hangs on (seed, content) alone: it is the same in any order, layout and place of the collection.
    """
    if limit == 0:
        return np.arange(len(records))
    strata: dict[tuple[str, int], list[int]] = {}
    for row, record in enumerate(records):
        strata.setdefault((record.generator, record.label), []).append(row)

    def order(row: int) -> tuple[float, str]:
        digest = records[row].content_sha256()
        return float(np.random.default_rng([seed, int(digest, 16)]).random()), str(records[row].path)

    return np.array(sorted(row for rows in strata.values() for row in sorted(rows, key=order)[:limit]), dtype=np.intp)


def _curve(operation: Operation, baseline: RobustnessPoint, points: Sequence[RobustnessPoint]) -> RobustnessCurve:
    spec = OPERATIONS[operation]

    def place(point: RobustnessPoint) -> float:
        return spec.identity if point.strength is None else point.strength

    return RobustnessCurve(operation, tuple(sorted((baseline, *points), key=place, reverse=not spec.rising)))


def _sample(records: Sequence[PictureRecord], chosen: Sequence[PictureRecord], name: str) -> SampleCount:
    taken = Counter(record.label for record in chosen if record.generator == name)
    scored = Counter(record.label for record in records if record.generator == name)
    return SampleCount(real=taken[0], real_of=scored[0], fake=taken[1], fake_of=scored[1])


def _check_strengths(operation: Operation, config: RobustnessConfig) -> None:
    spec, given = OPERATIONS[operation], getattr(config, operation)
    if not config.strengths(operation) or not all(spec.lowest <= value <= spec.highest for value in given):
        kind = "whole numbers" if spec.whole else "numbers"
        raise _refusal(
            f"--robustness-{operation}",
            " ".join(f"{value:g}" for value in given) or "nothing",
            f"{kind} from {spec.lowest:g} to {spec.highest:g} ({spec.axis}), one at least that changes the picture",
        )


def _refusal(option: str, got: str, wanted: str, remedy: str = "change this option") -> ConfigError:
    return ConfigError(option, got=got, wanted=wanted, remedy=remedy)


def _share(flags: NDArray[np.bool_]) -> float | None:
    return float(np.mean(flags)) if len(flags) else None
