"""Pictures that cannot be decoded: listed, counted, refused or left out on request; each is decoded once."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from training import tiny_config, write_pictures

import train.integrity as integrity
from runtime.errors import PictureError
from train.config import EqualizeConfig
from train.data import scan_pictures
from train.errors import CheckpointError, DataError
from train.evaluate import main as evaluate_main
from train.integrity import cache_path, checked, checked_split, corrupt_counts, split_of_run
from train.run import main as train_main
from train.run import train


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_path()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "data", counts={"train": 6, "val": 11})


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.fixture
def damaged(data: Path) -> Path:
    damage(data / "train/halved/0_real/003.png")
    (data / "val/halved/1_fake/002.png").write_bytes(b"no picture")
    return data


def test_whole_collection_passes_and_carries_its_hashes(data: Path) -> None:
    found = scan_pictures(data)
    usable = checked(found)
    assert usable.records == found.records
    assert all(len(r.sha256) == 64 for r in usable.records)
    assert usable.content_sha256() == found.content_sha256()
    assert usable.corrupt == ()


def test_corrupt_pictures_are_refused_with_count_class_and_reason(damaged: Path) -> None:
    with pytest.raises(DataError) as caught:
        checked(scan_pictures(damaged))
    text = str(caught.value)
    assert "got 2 of 34 that cannot be decoded (1 fake of halved, 1 real of halved)" in text
    assert "train/halved/0_real/003.png: damaged data" in text
    assert "val/halved/1_fake/002.png: data of no known picture format" in text
    assert "--corrupt skip" in text


def test_skipped_pictures_are_listed_with_their_reasons(damaged: Path) -> None:
    usable = checked(scan_pictures(damaged), corrupt="skip")
    assert len(usable) == 32
    assert [(p.path, p.label, p.generator, p.split) for p in usable.corrupt] == [
        ("train/halved/0_real/003.png", 0, "halved", "train"),
        ("val/halved/1_fake/002.png", 1, "halved", "val"),
    ]
    assert "2 corrupt pictures left out" in usable.describe()
    assert corrupt_counts(usable.corrupt)[1] == {"split": "val", "generator": "halved", "label": 1, "pictures": 1}
    assert len(usable.split("val").corrupt) == 1


def test_other_pictures_that_are_skipped_are_another_data_set(damaged: Path) -> None:
    before = checked_split(damaged, "train", corrupt="skip").content_sha256()
    damage(damaged / "train/halved/0_real/004.png")
    assert checked_split(damaged, "train", corrupt="skip").content_sha256() != before


def test_set_whose_pictures_are_all_corrupt_is_refused(tmp_path: Path) -> None:
    for label in ("real", "fake"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").write_bytes(label.encode())
    with pytest.raises(DataError, match=r"got 2, none of which can be decoded \(fake/a\.png: data of no known"):
        checked(scan_pictures(tmp_path), corrupt="skip")


def test_class_that_is_left_without_pictures_is_refused(data: Path) -> None:
    for path in (data / "train/halved/1_fake").iterdir():
        path.write_bytes(b"no picture" + path.name.encode())
    with pytest.raises(DataError, match=r"split 'train' of .* without its corrupt pictures: got 6 .* all of them real"):
        checked_split(data, "train", corrupt="skip")


def count_decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    plain = integrity.pixels_of

    def counting(record, content):  # type: ignore[no-untyped-def]
        calls.append(record.path.name)
        return plain(record, content)

    monkeypatch.setattr(integrity, "pixels_of", counting)
    return calls


@pytest.mark.parametrize("workers", [0, 3])
def test_each_content_is_decoded_once_and_never_again(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    calls = count_decodings(monkeypatch)
    first = checked(scan_pictures(damaged), corrupt="skip", workers=workers)
    assert len(calls) == 34
    again = checked(scan_pictures(damaged), corrupt="skip", workers=workers)
    assert len(calls) == 34
    assert again == first
    damage(damaged / "train/halved/0_real/004.png")
    checked(scan_pictures(damaged), corrupt="skip", workers=workers)
    assert len(calls) == 35


def test_results_of_another_decoder_do_not_count(data: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    calls = count_decodings(monkeypatch)
    checked(scan_pictures(data))
    assert own_cache.is_file()
    monkeypatch.setattr(integrity, "decoder_id", lambda: "another")
    checked(scan_pictures(data))
    assert len(calls) == 68


def test_cache_that_cannot_be_used_is_said_and_not_needed(
    data: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_bytes(b"no database " * 100)
    assert len(checked(scan_pictures(data))) == 34
    assert "note: checks of pictures are not kept in" in capsys.readouterr().err
    own_cache.unlink()
    own_cache.mkdir()
    assert len(checked(scan_pictures(data))) == 34


def test_lack_of_memory_is_not_a_corrupt_picture(data: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    def exhausted(record, content):  # type: ignore[no-untyped-def]
        raise PictureError("a", got="no memory left", wanted="b", remedy="c") from MemoryError()

    monkeypatch.setattr(integrity, "pixels_of", exhausted)
    with pytest.raises(PictureError, match="no memory left"):
        checked(scan_pictures(data), corrupt="skip")
    with sqlite3.connect(own_cache) as database:
        assert database.execute("SELECT count(*) FROM checks").fetchone() == (0,)
    database.close()


def test_training_refuses_corrupt_pictures_before_it_begins(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main(["--data", str(damaged), "--out", str(tmp_path / "run"), "--encoder-weights", "none"]) == 2
    assert "got 1 of 12 that cannot be decoded (1 real of halved)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.fixture
def run(damaged: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "skipping"
    folder.mkdir(parents=True)
    train(tiny_config(damaged, corrupt="skip"), folder)
    return folder


def test_run_lists_what_was_left_out_and_counts_it(run: Path) -> None:
    listed = json.loads((run / "corrupt.json").read_text())
    assert [p["path"] for p in listed["pictures"]] == ["train/halved/0_real/003.png", "val/halved/1_fake/002.png"]
    written = json.loads((run / "config.json").read_text())
    assert written["config"]["corrupt"] == "skip"
    assert written["data"]["train_pictures"] == 11
    assert written["data"]["corrupt_left_out"] == listed["counts"]


def test_resume_with_another_set_of_skipped_pictures_is_refused(run: Path, damaged: Path) -> None:
    config = tiny_config(damaged, corrupt="skip")
    train(config, run, resume=True)
    damage(damaged / "train/halved/1_fake/000.png")
    with pytest.raises(CheckpointError, match="got pictures with train_sha256"):
        train(config, run, resume=True)


def test_evaluation_refuses_or_lists_corrupt_pictures(
    run: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--run", str(run), "--data", str(damaged), "--split", "val", "--draws", "10", "--no-progress"]
    assert evaluate_main(command) == 2
    assert "got 1 of 22 that cannot be decoded" in capsys.readouterr().err
    assert evaluate_main([*command, "--corrupt", "skip"]) == 0
    listed = json.loads((run / "report" / "corrupt.json").read_text())
    assert listed["counts"] == [{"split": "val", "generator": "halved", "label": 1, "pictures": 1}]
    assert json.loads((run / "report" / "evaluation.json").read_text())["corrupt_left_out"] == 1


def test_pictures_of_a_run_are_those_it_was_trained_on(run: Path, damaged: Path) -> None:
    config = tiny_config(damaged, corrupt="skip", equalize=EqualizeConfig(enabled=True, size=96))
    found = split_of_run(config, damaged, "val")
    assert len(found) == 21
    assert {r.equalize for r in found.records} == {config.equalize}
    recorded = json.loads((run / "config.json").read_text())["data"]["val_sha256"]
    assert found.content_sha256() == recorded
