"""How well features that have nothing to do with synthesis tell real from fake: the first question to any data set.

What a file says before its pixels are looked at: format and colour mode, picture size, JPEG tables, metadata, length.
A detector that is trained where these differ between the classes learns them, looks perfect, and fails elsewhere.
The classifier is a forest, because such biases are seldom monotonous: real pictures of many sizes around the one size
of the fakes cannot be told apart by a straight line.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from train.pictures import PictureRecord, PictureSet, equalized_bytes, pixels_of

# What the columns of a feature matrix are, in the groups that a verdict names.
GROUPS: dict[str, tuple[str, ...]] = {
    "file format": ("format", "mode"),
    "picture size": ("width_px", "height_px"),
    "JPEG tables": ("jpeg_quality", "jpeg_tables", "jpeg_subsampling", "jpeg_progressive"),
    "metadata": ("exif", "icc_profile"),
    "file length": ("log_file_bytes", "bytes_per_pixel"),
}
FEATURES = tuple(name for names in GROUPS.values() for name in names)
FOLDS = 5
# One division into folds moves the AUC of 200 pictures by up to 0.1.
REPEATS = 3
# With fewer of a class, an AUC says more about chance than about the set.
MIN_PER_CLASS = 10
# A forest on more pictures of one generator takes longer and says the same.
MAX_PICTURES = 4000
TREES = 30


@dataclass(frozen=True)
class Traits:
    """What a file says before its pixels are looked at.

    Attributes:
        format: Pillow's name.
        mode: Pillow's colour mode.
        width_px: columns.
        height_px: rows.
        file_bytes: its length.
        jpeg_quality: quality of the IJG tables that are nearest to the file's, 1 to 100; 0 for other formats.
        jpeg_tables: first 8 hex digits of the hash of its quantisation tables; empty for other formats.
        jpeg_subsampling: 0 for 4:4:4, 1 for 4:2:2, 2 for 4:2:0, -1 for others and other formats.
        jpeg_progressive: progressive JPEG.
        exif: it carries EXIF data.
        icc_profile: it carries a colour profile.
    """

    format: str
    mode: str
    width_px: int
    height_px: int
    file_bytes: int
    jpeg_quality: int
    jpeg_tables: str
    jpeg_subsampling: int
    jpeg_progressive: bool
    exif: bool
    icc_profile: bool


@dataclass(frozen=True)
class TrivialAUC:
    """What trivial features reach on one set of pictures.

    Attributes:
        auc: of all features together, cross-validated; 0.5 where they say nothing.
        low: lower end of its 95 % interval.
        by_group: AUC of each group of features alone.
        low_by_group: lower ends of their intervals.
    """

    auc: float
    low: float
    by_group: dict[str, float]
    low_by_group: dict[str, float]


def traits_of(data: bytes) -> Traits:
    """Traits of a picture file; its pixels are not decoded.

    Args:
        data: content of a file that Pillow can open.
    """
    with Image.open(io.BytesIO(data)) as picture:
        tables = getattr(picture, "quantization", None) or {}
        return Traits(
            format=str(picture.format),
            mode=picture.mode,
            width_px=picture.width,
            height_px=picture.height,
            file_bytes=len(data),
            jpeg_quality=estimated_quality(tables),
            jpeg_tables=_hash_of(tables),
            jpeg_subsampling=JpegImagePlugin.get_sampling(picture) if tables else -1,
            jpeg_progressive=bool(tables) and "progressive" in picture.info,
            exif=bool(picture.info.get("exif")),
            icc_profile=bool(picture.info.get("icc_profile")),
        )


def traits_of_record(record: PictureRecord) -> Traits:
    """Traits of a picture as training and evaluation meet it: after the treatment that the record carries.

    Raises:
        PictureError: it cannot be read or, where it is equalised, decoded.
    """
    data = record.read_bytes()
    if record.equalize is not None:
        data = equalized_bytes(record, data, pixels_of(record, data), record.equalize)
    return traits_of(data)


def estimated_quality(tables: Mapping[int, Sequence[int]]) -> int:
    """JPEG quality, 1 to 100, whose luminance table is nearest to the file's; 0 without tables.

    Args:
        tables: quantisation tables as Pillow gives them.
    """
    if 0 not in tables:
        return 0
    distances = np.abs(_luminance_tables() - np.array(tables[0], dtype=np.int64)).sum(axis=1)
    return int(np.argmin(distances)) + 1


@lru_cache(maxsize=1)
def _luminance_tables() -> NDArray[np.int64]:
    """(100, 64): the tables that libjpeg writes at the qualities 1 to 100, read off files that it wrote."""
    rows = []
    for quality in range(1, 101):
        buffer = io.BytesIO()
        Image.new("L", (8, 8)).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as written:
            assert isinstance(written, JpegImagePlugin.JpegImageFile)
            rows.append(written.quantization[0])
    return np.array(rows, dtype=np.int64)


def _hash_of(tables: Mapping[int, Sequence[int]]) -> str:
    if not tables:
        return ""
    text = repr([(number, list(tables[number])) for number in sorted(tables)])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def trivial_auc(fitted_on: PictureSet, tested_on: PictureSet) -> dict[str, float]:
    """AUC of trivial features that were learnt on other pictures, for each generator.

    Args:
        fitted_on: pictures of both classes that the classifier learns from.
        tested_on: pictures of both classes; generators with one class only are left out.

    Returns:
        Around 0.5 where these features say nothing; far from it, on either side, a detector's figures on the set
        are in doubt.
    """
    fitted, tested = ([traits_of_record(r) for r in s.records] for s in (fitted_on, tested_on))
    return transfer_aucs(fitted, _labels(fitted_on.records), tested, tested_on.records)


def transfer_aucs(
    fitted: Sequence[Traits],
    labels: NDArray[np.int64],
    tested: Sequence[Traits],
    records: Sequence[PictureRecord],
) -> dict[str, float]:
    """As `trivial_auc`, from traits.

    Args:
        fitted: traits to learn from.
        labels: (N,) of them, both classes.
        tested: traits to score.
        records: the pictures that they belong to.
    """
    table = feature_table([*fitted, *tested])
    chosen = _evenly(len(fitted), MAX_PICTURES)
    scores = _forest(len(chosen)).fit(table[chosen], labels[chosen]).predict_proba(table[len(fitted) :])[:, 1]
    truth = _labels(records)
    generators = np.array([r.generator for r in records])
    return {
        str(name): float(roc_auc_score(truth[generators == name], scores[generators == name]))
        for name in np.unique(generators)
        if len(np.unique(truth[generators == name])) == 2
    }


def generator_aucs(records: Sequence[PictureRecord]) -> dict[str, float | None]:
    """Cross-validated AUC of all trivial features, for each generator; None where it would say nothing."""
    found: dict[str, float | None] = {}
    for name in sorted({r.generator for r in records}):
        members = [r for r in records if r.generator == name]
        if not _enough(members):
            found[name] = None
            continue
        members = [members[i] for i in _evenly(len(members), MAX_PICTURES)]
        found[name] = cross_validated_auc([traits_of_record(r) for r in members], members, groups=())[0]
    return found


def set_auc(traits: Sequence[Traits], records: Sequence[PictureRecord]) -> TrivialAUC | None:
    """What trivial features reach on one set, cross-validated; None where it would say nothing.

    Args:
        traits: of the pictures.
        records: the pictures; those that share an original are in one fold.
    """
    if not _enough(records):
        return None
    chosen = _evenly(len(records), MAX_PICTURES)
    traits, records = [traits[i] for i in chosen], [records[i] for i in chosen]
    auc, low = cross_validated_auc(traits, records, groups=())
    alone = {name: cross_validated_auc(traits, records, groups=(name,)) for name in GROUPS}
    return TrivialAUC(
        auc, low, {name: pair[0] for name, pair in alone.items()}, {name: pair[1] for name, pair in alone.items()}
    )


def cross_validated_auc(
    traits: Sequence[Traits], records: Sequence[PictureRecord], *, groups: Sequence[str]
) -> tuple[float, float]:
    """Mean AUC over folds and divisions, and the lower end of its 95 % interval, counted in originals.

    Args:
        traits: of the pictures.
        records: the pictures, at least `MIN_PER_CLASS` of each class.
        groups: groups of features that the classifier may use; all where none is named.
    """
    columns = [FEATURES.index(name) for group in groups or GROUPS for name in GROUPS[group]]
    table, labels, originals = feature_table(traits)[:, columns], _labels(records), _originals(records)
    counts = [len(np.unique(originals[labels == label])) for label in (0, 1)]
    if (table == table[0]).all():
        return 0.5, 0.5 - 1.96 * auc_error(0.5, *counts)
    aucs = []
    for fitted, tested in _divisions(table, labels, originals):
        if len(np.unique(labels[tested])) == 2 and len(np.unique(labels[fitted])) == 2:
            scores = _forest(len(fitted)).fit(table[fitted], labels[fitted]).predict_proba(table[tested])[:, 1]
            aucs.append(roc_auc_score(labels[tested], scores))
    auc = float(np.mean(aucs)) if aucs else 0.5
    return auc, auc - 1.96 * auc_error(auc, *counts)


def _divisions(
    table: NDArray[np.float64], labels: NDArray[np.int64], originals: NDArray[Any]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Rows to learn from and to test on: every division into folds, several times."""
    for seed in range(REPEATS):
        splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        yield from splitter.split(table, labels, originals)


def auc_error(auc: float, real: int, fake: int) -> float:
    """Standard error of an AUC by Hanley and McNeil 1982, for that many independent pictures of each class."""
    auc = max(auc, 1 - auc)
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (fake - 1) * (first - auc**2) + (real - 1) * (second - auc**2)
    return math.sqrt(max(variance, 0.0) / (real * fake))


def feature_table(traits: Sequence[Traits]) -> NDArray[np.float64]:
    """(N, len(FEATURES)); words are numbered as they appear."""
    codes: dict[str, int] = {}

    def row(t: Traits) -> list[float]:
        words = ("format", "mode", "jpeg_tables")
        values: dict[str, float] = {n: codes.setdefault(f"{n} {getattr(t, n)}", len(codes)) for n in words}
        values["log_file_bytes"] = math.log(t.file_bytes)
        values["bytes_per_pixel"] = t.file_bytes / (t.width_px * t.height_px)
        return [float(values.get(name, getattr(t, name, 0))) for name in FEATURES]

    return np.array([row(t) for t in traits], dtype=np.float64)


def _forest(pictures: int) -> ExtraTreesClassifier:
    leaf = max(5, pictures // 20)  # larger sets could learn single files by heart
    return ExtraTreesClassifier(
        TREES, min_samples_leaf=leaf, max_features=None, class_weight="balanced", random_state=0
    )


def _enough(records: Sequence[PictureRecord]) -> bool:
    """Whether both classes have enough originals for an AUC to say something."""
    labels, originals = _labels(records), _originals(records)
    return min(len(np.unique(originals[labels == label])) for label in (0, 1)) >= MIN_PER_CLASS


def _labels(records: Sequence[PictureRecord]) -> NDArray[np.int64]:
    return np.array([r.label for r in records], dtype=np.int64)


def _originals(records: Sequence[PictureRecord]) -> NDArray[Any]:
    return np.array([r.original_id for r in records])


def _evenly(count: int, limit: int) -> NDArray[np.intp]:
    """Indices of at most `limit` of `count` items, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(np.intp))
