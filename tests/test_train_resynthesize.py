"""`python -m train.resynthesize`: fakes stored as their photographs are, in a list that training takes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from training import tiny_config, write_pictures

from train.data import load_split, scan_pictures
from train.resynthesize import main
from train.run import train
from train.shards import write_shards

SMALL = ["--steps", "3", "--batch", "2", "--patch-px", "32", "--width", "6", "--code-channels", "4", "--no-progress"]
COUNTS = {"train": 5, "val": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("folder") / "set", counts=COUNTS)


def resynthesize(data: Path, out: Path, *options: str) -> int:
    return main(["--data", str(data), "--out", str(out), *SMALL, *options])


def rebuilt_of(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.suffix in {".jpg", ".png"})


def photographs(folder: Path, save: dict[str, object], suffix: str, size: tuple[int, int] = (70, 45)) -> Path:
    """Three real pictures of this width and height and one fake, all in the train split."""
    rng = np.random.default_rng(0)
    for number in range(4):
        place = folder / "train" / "cats" / ("0_real" if number < 3 else "1_fake")
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (9, 14, 3), np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(place / f"{number}{suffix}", **save)
    return folder


def test_real_training_pictures_alone_are_rebuilt_and_the_list_holds_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert resynthesize(folder, out) == 0
    assert f"wrote 5 rebuilt pictures; train with --data {out / 'pictures.csv'}" in capsys.readouterr().out
    before, after = scan_pictures(folder), scan_pictures(out / "pictures.csv")
    known = {record.path: (record.label, record.split, record.original_id) for record in before.records}
    added = [record for record in after.records if record.path not in known]
    kept = {r.path: (r.label, r.split, r.original_id) for r in after.records if r.path in known}
    assert kept == known
    assert {(r.label, r.split, r.generator, r.family) for r in added} == {
        (1, "train", "resynthesis_transposed_conv", "resynthesis")
    }
    real = sorted(r.original_id for r in before.split("train").records if r.label == 0)
    assert sorted(record.original_id for record in added) == real


def test_training_takes_the_list(folder: Path, tmp_path: Path) -> None:
    assert resynthesize(folder, tmp_path / "out") == 0
    run = tmp_path / "run"
    run.mkdir()
    train(tiny_config(tmp_path / "out" / "pictures.csv"), run)
    assert (run / "stage2.safetensors").is_file()
    assert len(load_split(tmp_path / "out" / "pictures.csv", "train")) == len(load_split(folder, "train")) + 5


@pytest.mark.parametrize(("quality", "sampling"), [(60, "4:4:4"), (93, "4:2:0")])
def test_jpeg_keeps_size_tables_and_sampling_of_its_photograph(tmp_path: Path, quality: int, sampling: str) -> None:
    data = photographs(tmp_path / "set", {"quality": quality, "subsampling": sampling}, ".jpg")
    assert resynthesize(data, tmp_path / "out") == 0
    source = next(data.rglob("0_real/*.jpg"))
    found = rebuilt_of(tmp_path / "out")
    assert len(found) == 3
    with Image.open(source) as real, Image.open(found[0]) as fake:
        assert fake.size == real.size == (70, 45)  # neither is a multiple of 4
        assert fake.quantization == real.quantization
        assert JpegImagePlugin.get_sampling(fake) == JpegImagePlugin.get_sampling(real)
        assert np.abs(np.asarray(real, np.int16) - np.asarray(fake, np.int16)).mean() > 1  # not a copy


def test_any_other_picture_becomes_a_png(tmp_path: Path) -> None:
    data = photographs(tmp_path / "set", {"lossless": True}, ".webp")
    assert resynthesize(data, tmp_path / "out") == 0
    assert [path.suffix for path in rebuilt_of(tmp_path / "out")] == [".png"] * 3


def test_grey_photograph_gives_a_grey_jpeg(tmp_path: Path) -> None:
    data = photographs(tmp_path / "set", {"quality": 90}, ".jpg")
    for path in data.rglob("*.jpg"):
        Image.open(path).convert("L").save(path, quality=90)
    assert resynthesize(data, tmp_path / "out") == 0
    with Image.open(rebuilt_of(tmp_path / "out")[0]) as fake:
        assert fake.mode == "L"


def test_share_and_up_samplers_deal_the_pictures_and_the_seed_repeats_them(folder: Path, tmp_path: Path) -> None:
    options = ("--share", "0.8", "--upsamplers", "nearest_conv", "pixel_shuffle")
    for name in ("one", "two"):
        assert resynthesize(folder, tmp_path / name, *options) == 0
    with (tmp_path / "one" / "pictures.csv").open(encoding="utf-8") as file:
        made = [row["generator"] for row in csv.DictReader(file) if row["family"] == "resynthesis"]
    assert sorted(made) == ["resynthesis_nearest_conv"] * 2 + ["resynthesis_pixel_shuffle"] * 2
    first, second = rebuilt_of(tmp_path / "one"), rebuilt_of(tmp_path / "two")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--share", "0"), "--share: got 0.0, wanted more than 0 and at most 1"),
        (("--share", "1.5"), "--share: got 1.5, wanted more than 0 and at most 1"),
        (("--learn-from", "0"), "--learn-from: got 0, wanted 1 or more"),
        (("--steps", "0"), "--steps: got 0, wanted 1 or more"),
        (("--batch", "0"), "--batch: got 0, wanted 1 or more"),
        (("--code-channels", "0"), "--code-channels: got 0, wanted 1 or more"),
        (("--learning-rate", "0"), "--learning-rate: got 0.0, wanted more than 0"),
        (("--patch-px", "30"), "--patch-px: got 30, wanted a multiple of 4, 20 or more"),
        (("--patch-px", "16"), "--patch-px: got 16, wanted a multiple of 4, 20 or more"),
        (("--upsamplers", "nearest_conv", "nearest_conv"), "wanted one or more, each once"),
        (("--patch-px", "4000"), "wanted at least 4000 px on each side, the patches of the networks"),
    ],
)
def test_options_that_make_no_sense_are_refused_and_leave_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], sentence: str
) -> None:
    assert resynthesize(folder, tmp_path / "out", *options) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_shards_a_taken_folder_and_fakes_alone_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(scan_pictures(folder), tmp_path / "shards")
    assert resynthesize(tmp_path / "shards", tmp_path / "out") == 2
    assert "got 30 pictures in shards, which a list cannot name" in capsys.readouterr().err
    assert resynthesize(folder, tmp_path / "shards") == 2
    assert "got a folder that is not empty, wanted a new folder" in capsys.readouterr().err
    data = photographs(tmp_path / "fakes", {}, ".png")
    for path in data.rglob("0_real/*"):
        path.unlink()
    assert resynthesize(data, tmp_path / "out") == 2
    assert "got no real picture in its train split" in capsys.readouterr().err


def test_corrupt_pictures_are_refused_or_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = photographs(tmp_path / "set", {}, ".png")
    broken = min(data.rglob("0_real/*.png"))
    broken.write_bytes(broken.read_bytes()[:200])
    assert resynthesize(data, tmp_path / "out") == 2
    assert "--corrupt skip" in capsys.readouterr().err
    assert resynthesize(data, tmp_path / "out", "--corrupt", "skip") == 0
    assert len(rebuilt_of(tmp_path / "out")) == 2
    listed = json.loads((tmp_path / "out" / "corrupt.json").read_text())
    assert [picture["path"] for picture in listed["pictures"]] == [broken.relative_to(data).as_posix()]


def test_full_disk_is_told_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert resynthesize(folder, tmp_path / "out") == 2
    assert "got No space left on device, wanted a folder that can be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
