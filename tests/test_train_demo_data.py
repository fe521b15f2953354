"""The demo data: what is built, what is cached, and that nothing but the synthesis tells real from fake."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train import demo_data
from train.data import load_split, scan_pictures
from train.demo_data import GENERATORS, DemoDataConfig, ensure_demo_data
from train.demo_photographs import PHOTOGRAPHS, load_photograph
from train.errors import ConfigError, DataError
from train.resynthesis import ResynthesisConfig
from train.trivial_features import trivial_auc

TINY = DemoDataConfig(
    train_crops=30,
    val_crops=4,
    test_crops=20,
    size_px=96,
    networks=ResynthesisConfig(steps=60, batch=2, patch_px=32, width=8, code_channels=8),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_data(tmp_path_factory.mktemp("demo") / "data", config=TINY, progress=False)


@pytest.fixture
def counted_builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Folders that were built, with the build replaced by two files."""
    builds: list[Path] = []

    def build(root: Path, config: DemoDataConfig, bars: object) -> dict[str, float]:
        builds.append(root)
        (root / "picture.png").write_bytes(b"picture")
        (root / "LICENSES.md").write_text(demo_data.licences_markdown(()), encoding="utf-8")
        return {}

    monkeypatch.setattr(demo_data, "_build", build)
    return builds


def test_layout_and_counts_are_as_configured(built: Path) -> None:
    found = scan_pictures(built)
    counts = {
        (split, generator, label): sum(
            (r.split, r.generator, r.label) == (split, generator, label) for r in found.records
        )
        for split, generator in {(r.split, r.generator) for r in found.records}
        for label in (0, 1)
    }
    expected = {("train", "transposed_conv", label): 30 for label in (0, 1)}
    expected |= {("val", "transposed_conv", label): 4 for label in (0, 1)}
    expected |= {("test", generator, label): 20 for generator in GENERATORS for label in (0, 1)}
    assert counts == expected
    assert {p.name for p in built.iterdir()} == {
        "train",
        "val",
        "test",
        "sources.csv",
        "LICENSES.md",
        "manifest.json",
    }


def test_no_photograph_is_in_two_splits(built: Path) -> None:
    originals = {split: {r.original_id for r in load_split(built, split).records} for split in ("train", "val", "test")}
    assert originals == {
        "train": set(TINY.train_photographs),
        "val": set(TINY.val_photographs),
        "test": set(TINY.test_photographs),
    }
    assert len(set.union(*originals.values())) == 6


def test_each_fake_has_its_real_crop_beside_it(built: Path) -> None:
    records = load_split(built, "test").records
    for generator in GENERATORS:
        names = [{r.path.name for r in records if (r.generator, r.label) == (generator, k)} for k in (0, 1)]
        assert names[0] == names[1]
    name = min(r.path.name for r in records)
    reals = {(built / "test" / generator / "0_real" / name).read_bytes() for generator in GENERATORS}
    fakes = {(built / "test" / generator / "1_fake" / name).read_bytes() for generator in GENERATORS}
    assert (len(reals), len(fakes)) == (1, len(GENERATORS))


def test_all_files_have_one_size_and_one_format(built: Path) -> None:
    paths = [r.path for r in scan_pictures(built).records]
    assert len({path.stat().st_size for path in paths}) == 1
    for path in paths[::17]:
        with Image.open(path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (96, 96))


def test_trivial_features_are_at_chance_on_every_generator(built: Path) -> None:
    aucs = trivial_auc(load_split(built, "train"), load_split(built, "test"))
    assert aucs.keys() == GENERATORS.keys()
    assert all(abs(auc - 0.5) < 0.02 for auc in aucs.values()), aucs


def test_trivial_features_would_tell_plain_jpeg_files_apart(built: Path, tmp_path: Path) -> None:
    for record in scan_pictures(built).records:
        path = (tmp_path / record.path.relative_to(built)).with_suffix(".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(record.path) as picture:
            picture.save(path, quality=TINY.jpeg_quality)
    aucs = trivial_auc(load_split(tmp_path, "train"), load_split(tmp_path, "test"))
    assert aucs.keys() == GENERATORS.keys()
    assert all(abs(auc - 0.5) > 0.1 for auc in aucs.values()), aucs


def test_both_classes_took_the_jpeg_round_trip(built: Path) -> None:
    """Another round trip of the same quality changes far less than the first one does."""
    for folder in ("0_real", "1_fake"):
        with Image.open(min((built / "train/transposed_conv" / folder).iterdir())) as picture:
            pixels = np.asarray(picture)
        again = demo_data.jpeg_round_trip(pixels, TINY.jpeg_quality)
        shifted = np.roll(pixels, (3, 5), axis=(0, 1))
        off_grid = demo_data.jpeg_round_trip(shifted, TINY.jpeg_quality)
        change = np.abs(again.astype(int) - pixels).mean()
        assert change < 0.7 * np.abs(off_grid.astype(int) - shifted).mean(), folder


def test_sources_name_every_picture_and_its_photograph(built: Path) -> None:
    with (built / "sources.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["path"] for row in rows} == {p.relative_to(built).as_posix() for p in built.rglob("*.png")}
    assert {row["original_id"] for row in rows} == set(PHOTOGRAPHS)


def test_licences_are_laid_beside_the_pictures(built: Path) -> None:
    text = (built / "LICENSES.md").read_text(encoding="utf-8")
    for photograph in PHOTOGRAPHS.values():
        assert f"| {photograph.name} | {photograph.package} | {photograph.author} | {photograph.licence} |" in text


@pytest.mark.parametrize("name", sorted(PHOTOGRAPHS))
def test_photographs_are_in_the_installed_packages(name: str) -> None:
    picture = load_photograph(name)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert min(picture.shape[:2]) >= 300


def test_second_call_builds_nothing_and_is_fast(built: Path, counted_builds: list[Path]) -> None:
    start = time.perf_counter()
    ensure_demo_data(built, config=TINY, progress=False)
    assert counted_builds == []
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("picture.png", b"other", r"1 files are damaged \(picture.png\)"),
        ("picture.png", None, r"1 files are missing \(picture.png\)"),
        ("more.png", b"x", r"1 files are surplus \(more.png\)"),
        ("manifest.json", b"{", "its manifest.json is damaged"),
        ("manifest.json", b"[]", "its manifest.json is damaged"),
        ("manifest.json", None, "it has no manifest.json"),
    ],
)
def test_damage_is_named_and_repaired(
    tmp_path: Path,
    counted_builds: list[Path],
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: bytes | None,
    reason: str,
) -> None:
    root = ensure_demo_data(tmp_path / "demo", config=TINY, progress=False)
    if damage is None:
        (root / name).unlink()
    else:
        (root / name).write_bytes(damage)
    capsys.readouterr()
    ensure_demo_data(root, config=TINY, progress=False)
    assert reason.replace("\\", "") in capsys.readouterr().out
    assert len(counted_builds) == 2
    assert (root / "picture.png").read_bytes() == b"picture"
    assert not (root / "more.png").exists()
    ensure_demo_data(root, config=TINY, progress=False)
    assert len(counted_builds) == 2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (replace(TINY, jpeg_quality=80), "config.jpeg_quality: 92 -> 80"),
        (replace(TINY, networks=replace(TINY.networks, steps=61)), "config.networks.steps: 60 -> 61"),
    ],
)
def test_changed_recipe_is_named_and_built(
    tmp_path: Path,
    counted_builds: list[Path],
    capsys: pytest.CaptureFixture[str],
    config: DemoDataConfig,
    reason: str,
) -> None:
    root = ensure_demo_data(tmp_path / "demo", config=TINY, progress=False)
    ensure_demo_data(root, config=config, progress=False)
    assert f"the recipe has changed ({reason})" in capsys.readouterr().out
    assert len(counted_builds) == 2


def test_failed_build_leaves_the_old_data_and_nothing_else(
    tmp_path: Path, counted_builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = ensure_demo_data(tmp_path / "demo", config=TINY, progress=False)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_data, "_build", fail)
    with pytest.raises(KeyboardInterrupt):
        ensure_demo_data(root, config=replace(TINY, seed=1), progress=False)
    assert (root / "picture.png").read_bytes() == b"picture"
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("name", ["thesis.txt", "manifest.json", "LICENSES.md"])
def test_folder_of_somebody_else_is_never_replaced(tmp_path: Path, counted_builds: list[Path], name: str) -> None:
    (tmp_path / name).write_text("years of work")
    with pytest.raises(DataError, match="got something that is no demo data"):
        ensure_demo_data(tmp_path, config=TINY, progress=False)
    assert (tmp_path / name).read_text() == "years of work"
    assert counted_builds == []


def test_photograph_in_two_splits_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of them twice"):
        DemoDataConfig(val_photographs=("astronaut",))


def test_size_off_the_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 250 px, wanted a multiple of 16"):
        DemoDataConfig(size_px=250)


def test_full_demo_has_enough_real_validation_pictures_for_one_percent() -> None:
    assert DemoDataConfig().val_crops >= 100
