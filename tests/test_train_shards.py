"""Tar shards: the same pictures, hashes and batches as from the folder, and damage that is always noticed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from training import tiny_config, write_pictures

from train.config import AugmentConfig
from train.data import load_split, scan_pictures
from train.errors import ConfigError, DataError
from train.integrity import checked
from train.loading import ViewPlan, view_loader
from train.pictures import load_pixels
from train.run import train
from train.shards import main, write_shards

PLAN = ViewPlan(seed=3, stage=1, first=(64, 64), second=(32, 32), augment=AugmentConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("folder") / "set", counts={"train": 5, "val": 10})


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    write_shards(scan_pictures(folder), tmp_path / "shards", shard_mb=4)
    return tmp_path / "shards"


def described(path: Path) -> list[tuple[object, ...]]:
    found = scan_pictures(path)
    return sorted(
        (r.path.relative_to(found.root).as_posix(), r.label, r.generator, r.family, r.original_id, str(r.split))
        for r in found.records
    )


def test_shards_hold_what_the_folder_holds(folder: Path, shards: Path) -> None:
    assert described(shards) == described(folder)
    for split in ("train", "val"):
        assert load_split(shards, split).content_sha256() == load_split(folder, split).content_sha256()
    names = sorted(path.name for path in shards.iterdir())
    assert names == ["shards.json", "train-000000.tar", "val-000000.tar"]


def test_a_shard_ends_when_it_is_large_enough(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.shards.BYTES_PER_MB", 100_000)
    paths = write_shards(scan_pictures(folder), tmp_path / "many", shard_mb=2)
    assert len(paths) > 4
    assert all(path.stat().st_size < 2 * 100_000 + 200_000 for path in paths)
    assert described(tmp_path / "many") == described(folder)


def test_members_have_the_layout_of_webdataset(shards: Path) -> None:
    with tarfile.open(shards / "train-000000.tar") as tar:
        names = tar.getnames()
        content = json.load(tar.extractfile(names[1]))  # type: ignore[arg-type]
    assert names[:4] == ["000000.png", "000000.json", "000001.png", "000001.json"]
    assert content["label"] == 0
    assert set(content) == {"path", "label", "generator", "family", "original_id", "split", "sha256"}


def test_same_collection_gives_the_same_shards_to_the_byte(folder: Path, shards: Path, tmp_path: Path) -> None:
    write_shards(scan_pictures(folder), tmp_path / "again", shard_mb=4)
    for path in shards.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("workers", "start"), [(0, 0), (2, 0), (1, 2)])
def test_batches_are_those_of_the_folder(folder: Path, shards: Path, workers: int, start: int) -> None:
    def batches(source: Path, **options: int) -> list[object]:
        return list(view_loader(load_split(source, "train").records, PLAN, batch_size=4, epoch=1, **options))

    expected = batches(folder)[start:]
    found = batches(shards, workers=workers, start=start)
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_training_from_shards_gives_the_weights_of_training_from_the_folder(
    folder: Path, shards: Path, tmp_path: Path
) -> None:
    weights = []
    for name, source in (("folder", folder), ("shards", shards)):
        run = tmp_path / f"run of {name}"
        run.mkdir()
        train(tiny_config(source), run)
        weights.append((run / "stage2.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_command_writes_shards_and_says_how_many(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(folder), "--out", str(tmp_path / "s"), "--no-progress"]) == 0
    assert "wrote 30 pictures into 2 shards" in capsys.readouterr().out
    assert main(["--data", str(folder), "--out", str(tmp_path / "s"), "--no-progress"]) == 2
    assert "got a folder that is not empty, wanted a new folder" in capsys.readouterr().err


def test_shard_size_below_one_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shard-mb: got 0, wanted 1 or more"):
        write_shards(scan_pictures(folder), tmp_path / "s", shard_mb=0)


def test_nothing_is_left_when_writing_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.shards._write_picture", full)
    with pytest.raises(OSError, match="No space left"):
        write_shards(scan_pictures(folder), tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def shorten(path: Path, bytes_left: int) -> None:
    path.write_bytes(path.read_bytes()[:bytes_left])


def test_truncated_shard_is_refused(shards: Path) -> None:
    shorten(shards / "val-000000.tar", 100_000)
    with pytest.raises(DataError, match=r"val-000000\.tar has 100,000 of [\d,]+ bytes.*copy the shards again"):
        scan_pictures(shards)


def test_missing_and_foreign_shards_are_refused(shards: Path) -> None:
    (shards / "val-000000.tar").rename(shards / "extra.tar")
    with pytest.raises(DataError, match=r"val-000000\.tar is not there; extra\.tar is not listed"):
        scan_pictures(shards)


@pytest.mark.parametrize("place", ["in a picture", "between two members", "before the end marker"])
def test_truncated_shard_without_a_list_is_refused(shards: Path, place: str) -> None:
    (shards / "shards.json").unlink()
    path = shards / "val-000000.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    last = members[-1]
    end = {
        "in a picture": members[2].offset_data + 100,
        "between two members": members[4].offset,
        "before the end marker": last.offset_data + -(-last.size // 512) * 512,
    }[place]
    shorten(path, end)
    with pytest.raises(DataError, match=r"val-000000\.tar: got a file that (is cut short|cannot be read as tar)"):
        scan_pictures(shards)


def test_damaged_header_is_not_taken_for_the_end(shards: Path) -> None:
    path = shards / "val-000000.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[4].offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(DataError, match="cut short or damaged behind byte"):
        scan_pictures(shards)


@pytest.mark.parametrize("reader", ["hash", "check"])
def test_damaged_picture_is_refused_even_where_corrupt_ones_may_be_skipped(shards: Path, reader: str) -> None:
    path = shards / "val-000000.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[2]
    content = bytearray(path.read_bytes())
    content[member.offset_data + member.size // 2] ^= 1
    path.write_bytes(content)
    found = scan_pictures(shards)
    with pytest.raises(DataError, match=r"000011\.png of .*val-000000\.tar.*got bytes with sha256.*shard is damaged"):
        found.content_sha256() if reader == "hash" else checked(found, corrupt="skip", progress=False)


def test_shard_that_shrinks_after_it_was_listed_is_refused(shards: Path) -> None:
    records = load_split(shards, "val").records
    shorten(shards / "val-000000.tar", 100_000)
    with pytest.raises(DataError, match=r"val-000000\.tar .*: got [\d,]+ bytes, wanted [\d,]+ bytes"):
        load_pixels(records[-1])


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_shards_of_others_are_read_with_cls_and_json_labels(tmp_path: Path) -> None:
    root = tmp_path / "sets"
    write_tar(root / "train-0.tar", {"x/1.png": png(1), "x/1.cls": b"0\n", "x/2.png": png(2), "x/2.cls": b"1"})
    write_tar(
        root / "val_0.tar", {"1.png": png(3), "1.json": b'{"label": 0}', "2.json": b'{"label": 1}', "2.png": png(4)}
    )
    found = scan_pictures(root)
    assert [(r.split, r.label, r.generator) for r in found.records] == [
        ("train", 0, "sets"),
        ("train", 1, "sets"),
        ("val", 0, "sets"),
        ("val", 1, "sets"),
    ]
    assert load_pixels(found.records[3])[0, 0].tolist() == [4, 0, 0]
    assert len(scan_pictures(root / "train-0.tar")) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.png": b"x"}, "1: no label beside it"),
        ({"1.png": b"x", "1.json": b'{"label": 2}'}, r"1: label 2 is neither 0 \(real\) nor 1 \(fake\)"),
        ({"1.png": b"x", "1.json": b'{"label": true}'}, "1: label True is neither"),
        ({"1.png": b"x", "1.cls": b"cat"}, r"cannot be read as tar \(invalid literal"),
        ({"1.png": b"x", "1.json": b"[0]"}, "1.json is no JSON object"),
        ({"1.png": b"x", "1.json": b'{"label": 0, "split": "trian"}'}, "1: split 'trian' is none of train"),
        ({"1.png": b"x", "1.json": b'{"label": 0, "generator": 5}'}, "1: generator is 5, wanted text"),
        ({"1.png": b"x", "1.jpg": b"y", "1.cls": b"0"}, "1.jpg and 1.png are two pictures of one key"),
        ({"1.txt": b"x"}, "got shards without a picture"),
    ],
)
def test_shards_without_usable_labels_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        scan_pictures(tmp_path)


def test_compressed_shard_and_unreadable_list_are_refused(tmp_path: Path, shards: Path) -> None:
    write_tar(tmp_path / "z" / "a.tar", {"1.png": png(1), "1.cls": b"0"}, "w:gz")
    with pytest.raises(DataError, match=r"a\.tar: got a file that cannot be read as tar.*uncompressed"):
        scan_pictures(tmp_path / "z")
    (shards / "shards.json").write_text("[]")
    with pytest.raises(DataError, match=r"shards\.json: got no list of shards"):
        scan_pictures(shards)


def test_archives_beside_label_folders_leave_the_folders_a_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "download.tar", {"1.png": png(1), "1.cls": b"0"})
    for label in ("real", "fake"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").write_bytes(png(9))
    assert scan_pictures(tmp_path).layout == "real | fake"
