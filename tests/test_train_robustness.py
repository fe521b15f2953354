"""Curves of changed pictures: sampling, verdicts that flip, means, what is refused, Markdown and figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

import train.variants as variants
from runtime.manifest import CalibrationSpec
from runtime.preprocess import PreprocessSpec, prepare
from runtime.strict_json import from_jsonable
from train.errors import ConfigError
from train.perturbations import perturbed
from train.pictures import PictureRecord, load_pixels
from train.robustness import (
    RobustnessConfig,
    RobustnessReport,
    check_robustness,
    mean_figures,
    measure_robustness,
    robustness_figures,
    sample_rows,
)
from train.robustness_report import robustness_section, write_robustness_figure
from train.variants import VariantDataset, variant_logits

SPEC = CalibrationSpec(2.0, 0.25, -1.0, 1.0, 0.1, 0.1)
SIZE = PreprocessSpec(height=16, width=16)
GENERATORS = ("flat", "grainy", "photos")
CONFIG = RobustnessConfig(
    enabled=True, operations=("blur", "scale", "noise"), blur=(2.0, 0.0, 1.0), scale=(2.0, 0.5), noise=(8.0,)
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[PictureRecord]:
    """Two generators of six pictures in each class, and a set of real pictures alone; fakes have less grain."""
    root, rng, made = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for generator, fakes, grain in (("flat", 6, 4.0), ("grainy", 6, 14.0), ("photos", 0, 0.0)):
        for label, count in ((0, 6), (1, fakes)):
            for number in range(count):
                pixels = np.clip(128 + rng.normal(0, grain if label else 20.0, (20, 24, 3)), 0, 255).astype(np.uint8)
                path = root / f"{generator}-{label}-{number}.png"
                Image.fromarray(pixels).save(path)
                made.append(PictureRecord(path, label, generator, generator, path.name, "test"))
    return made


def score(images: Tensor) -> np.ndarray:
    """Less grain, more likely fake."""
    return (8.0 - 0.5 * images.float().flatten(1).std(dim=1)).numpy()


def plain_logits(records: Sequence[PictureRecord]) -> np.ndarray:
    pictures = [prepare(load_pixels(record), SIZE) for record in records]
    return score(Tensor(np.stack(pictures)))


@pytest.fixture(scope="module")
def report(records: list[PictureRecord]) -> RobustnessReport:
    return measured(records, CONFIG)


def measured(records: Sequence[PictureRecord], config: RobustnessConfig, **options: object) -> RobustnessReport:
    logits = plain_logits(records)
    arguments = {"generators": GENERATORS, "score": score, "spec": SIZE, "progress": False} | options
    return measure_robustness(records, logits, SPEC, config, **arguments)


def test_figures_of_a_hand_computed_case() -> None:
    untouched = np.array([-2.0, -2.0, 0.0, 2.0, -2.0, 0.0, 2.0, 2.0])
    changed = np.array([-2.0, 2.0, 2.0, -2.0, 0.0, 0.0, 2.0, -2.0])
    figures = robustness_figures(changed, untouched, np.repeat([0, 1], 4), SPEC)
    assert figures.logit_change == pytest.approx((4 + 2 + 4 + 2 + 4) / 2.0 / 8)  # calibrated: logits over 2
    assert (figures.real_flips, figures.real_opposite) == (3 / 4, 2 / 4)
    assert (figures.fake_flips, figures.fake_opposite) == (2 / 4, 1 / 4)
    assert (figures.real_flagged_rate, figures.fake_missed_rate) == (2 / 4, 3 / 4)
    assert figures.accuracy_at_threshold == 3 / 8


def test_means_are_over_the_sets_with_both_classes_or_over_all_where_none_has() -> None:
    logits, labels = np.array([-2.0, 2.0, 0.0, 2.0]), np.array([0, 1, 0, 1])
    both, one = (robustness_figures(logits[i], -logits[i], labels[i], SPEC) for i in ([0, 1], [0, 2]))
    assert mean_figures({"both": both, "one": one}) == both
    alone = mean_figures({"one": one, "again": replace(one, real_flips=0.0)})
    assert (alone.ap, alone.fake_flips, alone.real_flips) == (None, None, 0.25)


def test_untouched_pictures_are_the_plain_evaluation(report: RobustnessReport, records: list[PictureRecord]) -> None:
    labels = np.array([record.label for record in records])
    rows = np.array([record.generator == "grainy" for record in records])
    logits = plain_logits(records)
    expected = robustness_figures(logits[rows], logits[rows], labels[rows], SPEC)
    for curve in report.curves:
        (untouched,) = [point for point in curve.points if point.strength is None]
        assert untouched.generators["grainy"] == expected
        assert untouched.mean.logit_change == untouched.mean.real_flips == untouched.mean.fake_flips == 0.0


def test_identity_through_the_curves_gives_the_plain_logits_to_the_bit(records: list[PictureRecord]) -> None:
    dataset = VariantDataset(records, [("blur", 0.0), ("jpeg", 50.0), ("scale", 1.0)], SIZE)
    logits = variant_logits(dataset, score, batch_size=7, progress=False)
    assert np.array_equal(logits[0], plain_logits(records))
    assert np.array_equal(logits[2], plain_logits(records))
    assert not np.array_equal(logits[1], plain_logits(records))


def test_each_strength_is_the_changed_picture_cropped_as_any(
    report: RobustnessReport, records: list[PictureRecord]
) -> None:
    rows = [row for row, record in enumerate(records) if record.generator == "flat"]
    changed = [perturbed(load_pixels(records[row]), "scale", 0.5, key="") for row in rows]
    logits = score(Tensor(np.stack([prepare(pixels, SIZE) for pixels in changed])))
    labels = np.array([records[row].label for row in rows])
    expected = robustness_figures(logits, plain_logits(records)[rows], labels, SPEC)
    assert report.curves[1].points[0].strength == 0.5
    assert report.curves[1].points[0].generators["flat"] == expected
    assert expected.real_flips == 1.0  # half the size has half the grain


def test_curves_run_from_the_mildest_strength_with_the_untouched_picture_in_its_place(report: RobustnessReport) -> None:
    strengths = {curve.operation: [point.strength for point in curve.points] for curve in report.curves}
    assert strengths == {"blur": [None, 1.0, 2.0], "scale": [0.5, None, 2.0], "noise": [None, 8.0]}
    assert RobustnessConfig().strengths("jpeg")[0] == 95.0
    assert RobustnessConfig().strengths("thumbnail") == (256.0, 128.0)


def test_picture_is_decoded_once_for_all_strengths(
    records: list[PictureRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def counting(record: PictureRecord) -> np.ndarray:
        decoded.append(record.path)
        return load_pixels(record)

    monkeypatch.setattr(variants, "load_pixels", counting)
    measured(records, CONFIG)
    assert decoded == [record.path for record in records]


def test_noise_follows_the_content_and_not_the_place_in_the_collection(records: list[PictureRecord]) -> None:
    forward, backward = (VariantDataset(order, [("noise", 8.0)], SIZE) for order in (records, records[::-1]))
    assert np.array_equal(forward[0], backward[len(records) - 1])
    other = VariantDataset(records, [("noise", 8.0)], SIZE, seed=1)
    assert not np.array_equal(forward[0], other[0])
    first, second = (forward[row][0].astype(int) - prepare(load_pixels(records[row]), SIZE) for row in (0, 1))
    assert np.abs(first - second).mean() > 4  # another picture, another field


def test_sample_is_the_same_pictures_of_every_stratum_in_any_order(records: list[PictureRecord]) -> None:
    rows = sample_rows(records, 2)
    chosen = [records[row] for row in rows]
    assert rows.tolist() == sorted(rows.tolist())
    assert [(r.generator, r.label) for r in chosen] == [
        (generator, label)
        for generator in GENERATORS
        for label in (0, 1)
        for _ in range(2)
        if (generator, label) != ("photos", 1)
    ]
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    assert {shuffled[row].path for row in sample_rows(shuffled, 2)} == {record.path for record in chosen}
    assert {records[row].path for row in sample_rows(records, 2, seed=1)} != {record.path for record in chosen}
    assert sample_rows(records, 0).tolist() == sample_rows(records, 6).tolist() == list(range(len(records)))


def test_sample_is_said_in_the_report(records: list[PictureRecord], report: RobustnessReport) -> None:
    few = measured(records, replace(CONFIG, pictures=2))
    assert {name: (c.real, c.real_of, c.fake, c.fake_of) for name, c in few.sample.items()} == {
        "flat": (2, 6, 2, 6), "grainy": (2, 6, 2, 6), "photos": (2, 6, 0, 0)
    }  # fmt: skip
    text = robustness_section(few)
    assert "A sample of 10 of the 30 scored pictures: at most 2 of each generator and class" in text
    assert "All 30 pictures." in robustness_section(report)


def test_markdown_has_a_table_for_each_operation(report: RobustnessReport) -> None:
    text = robustness_section(report)
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        "### Gaussian blur",
        "### Scaling",
        "### Gaussian noise",
    ]
    assert text.count("| untouched |") == 3
    assert "![AP and verdict flips over the strength of each operation](robustness.png)" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jpeg": (0,)}, "--robustness-jpeg: got 0, wanted whole numbers from 1 to 100"),
        ({"blur": (0.0,)}, "--robustness-blur: got 0, wanted numbers from 0 to 100 .*changes the picture"),
        ({"scale": (-1.0,)}, "--robustness-scale: got -1"),
        ({"webp": ()}, "--robustness-webp: got nothing"),
        ({"noise": (float("nan"),)}, "--robustness-noise: got nan"),
        ({"operations": ()}, "--robustness-operations: got nothing"),
        ({"pictures": -1}, "--robustness-pictures: got -1, wanted 0 or more"),
        ({"enabled": False, "seed": 3}, "--robustness-seed: got no --robustness, wanted both"),
    ],
)
def test_options_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    check_robustness(RobustnessConfig(enabled=True))
    check_robustness(RobustnessConfig())
    with pytest.raises(ConfigError, match=message):
        check_robustness(replace(RobustnessConfig(enabled=True), **change))


def test_strengths_of_operations_that_are_left_out_are_not_looked_at() -> None:
    without = RobustnessConfig(enabled=True, operations=("blur",), jpeg=())
    check_robustness(without)
    with pytest.raises(ConfigError, match="jpeg"):
        check_robustness(replace(without, operations=("blur", "jpeg")))


def test_pillow_that_cannot_write_webp_is_refused_before_work_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.robustness.features.check", lambda name: name != "webp")
    with pytest.raises(ConfigError, match="got webp, which this Pillow cannot write"):
        check_robustness(RobustnessConfig(enabled=True))
    check_robustness(RobustnessConfig(enabled=True, operations=("jpeg",)))


def test_report_comes_back_from_its_json(report: RobustnessReport) -> None:
    plain = json.loads(json.dumps(asdict(report), allow_nan=False))
    assert from_jsonable(RobustnessReport, plain) == report


@pytest.mark.parametrize("curves", [1, 3])
def test_figure_is_a_picture_for_few_and_many_operations(report: RobustnessReport, tmp_path: Path, curves: int) -> None:
    write_robustness_figure(tmp_path / "f.png", replace(report, curves=report.curves[:curves]))
    with Image.open(tmp_path / "f.png") as figure:
        assert figure.size[0] == (700 if curves == 1 else 1400)
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 20
