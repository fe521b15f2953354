"""Which pictures of a split a run takes: named generators, a share of the originals, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from training import tiny_config, write_pictures

from train.checkpoint import load_config
from train.config import config_from_dict
from train.errors import CheckpointError, ConfigError, DataError
from train.integrity import split_of_run
from train.pictures import PictureRecord, PictureSet
from train.run import load_training_data, main, train
from train.run_options import parse_options
from train.selection import Selection, selection_of


def record(generator: str, label: int, original: str) -> PictureRecord:
    path = Path("/data/train") / generator / str(label) / f"{original}.png"
    return PictureRecord(path, label, generator, generator, original, "train")


def pictures(*records: PictureRecord) -> PictureSet:
    return PictureSet(Path("/data"), "made up", records)


BOTH = pictures(
    *(record(generator, label, f"{i}") for generator in ("a", "b") for i in range(10) for label in (0, 1)),
    *(record("photos", 0, f"p{i}") for i in range(7)),
)


def test_named_generators_are_taken_in_their_order_and_real_sets_may_be_named() -> None:
    found = Selection("--train-generators", ("photos", "b")).of(BOTH).records
    assert found == tuple(r for r in BOTH.records if r.generator != "a")


def test_unknown_generator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="--train-generators: got c, wanted generators of that split: a, b, photos"):
        Selection("--train-generators", ("a", "c")).of(BOTH)


def test_share_takes_whole_originals_of_each_generator_alike() -> None:
    found = Selection(share=0.5, seed=3).of(BOTH).records
    taken = {g: {r.original_id for r in found if r.generator == g} for g in ("a", "b", "photos")}
    assert [len(originals) for originals in taken.values()] == [5, 5, 4]
    assert taken["a"] == taken["b"]
    assert [sum(r.label == label for r in found if r.generator == "a") for label in (0, 1)] == [5, 5]


def test_share_keeps_the_classes_in_proportion_where_they_have_no_original_in_common() -> None:
    apart = pictures(*(record("a", 0, f"real{i}") for i in range(40)), *(record("a", 1, f"fake{i}") for i in range(8)))
    found = Selection(share=0.25).of(apart).records
    assert [sum(r.label == label for r in found) for label in (0, 1)] == [10, 2]


def test_smaller_share_lies_within_a_larger_one_and_another_seed_draws_others() -> None:
    quarter, half = (set(Selection(share=share).of(BOTH).records) for share in (0.25, 0.5))
    assert quarter < half
    assert set(Selection(share=0.5, seed=1).of(BOTH).records) != half


def test_configuration_decides_for_training_and_validation_apart() -> None:
    values = {"train_generators": ["a"], "val_generators": ["b"], "train_share": 0.5, "seed": 4}
    config = config_from_dict(values, source="test")
    assert selection_of(config, "train") == Selection("--train-generators", ("a",), 0.5, 4)
    assert selection_of(config, "val") == Selection("--val-generators", ("b",))
    assert selection_of(config, "test").of(BOTH) == BOTH


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The generators `halved` and `other`, which has the same pictures with another noise."""
    root = write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10})
    other = write_pictures(tmp_path_factory.mktemp("more"), counts={"train": 4, "val": 10}, seed=1)
    for split in ("train", "val"):
        (other / split / "halved").rename(root / split / "other")
    for picture in sorted((root / "train" / "other" / "1_fake").iterdir())[1:]:
        picture.unlink()
    return root


def test_run_trains_and_validates_on_what_it_names(data) -> None:
    config = tiny_config(data, train_generators=("halved",), val_generators=("other",))
    found = load_training_data(config)
    assert {r.generator for r in found.train.records} == {"halved"}
    assert {r.generator for r in found.validation.records} == {"other"}
    everything = load_training_data(tiny_config(data))
    assert everything.hashes["train_sha256"] != found.hashes["train_sha256"]
    assert len(everything.train) == len(found.train) + 5


def test_other_collection_than_the_runs_own_is_taken_whole(data) -> None:
    config = tiny_config(data, val_generators=("elsewhere",))
    with pytest.raises(ConfigError, match="--val-generators: got elsewhere"):
        split_of_run(config, data, "val")
    assert len(split_of_run(config, data, "val", own=False)) == 40


def test_selection_without_fakes_says_what_was_selected(data, tmp_path) -> None:
    fakes, elsewhere = data / "train" / "other" / "1_fake", tmp_path / "fakes"
    fakes.rename(elsewhere)
    try:
        with pytest.raises(DataError, match=r"--train-generators other\): got 4 pictures, all of them real"):
            load_training_data(tiny_config(data, train_generators=("other",)))
    finally:
        elsewhere.rename(fakes)


def test_command_line_names_generators_and_the_run_records_them(data, tmp_path, capsys) -> None:
    arguments = ["--data", str(data), "--train-generators", "halved", "other", "--val-generators", "halved"]
    options = parse_options([*arguments, "--train-share", "0.5"])
    assert (options.run.train_generators, options.run.val_generators) == (("halved", "other"), ("halved",))
    assert options.run.train_share == 0.5
    assert main(["--data", str(data), "--train-generators", "halved", "gone", "--out", str(tmp_path / "run")]) == 2
    assert "wanted generators of that split: halved, other" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--train-share: got 1\.5"):
        parse_options([*arguments, "--train-share", "1.5"])


def test_resume_with_another_selection_is_refused(data, tmp_path) -> None:
    one_epoch = {"epochs": 1, "batch_size": 6, "lr": 0.05}
    config = config_from_dict(
        {"stage1": one_epoch, "stage2": one_epoch, "train_generators": ["halved"]},
        source="test",
        defaults=tiny_config(data),
    )
    train(config, tmp_path)
    assert load_config(tmp_path) == config
    assert json.loads((tmp_path / "config.json").read_text())["data"]["train_pictures"] == 12
    with pytest.raises(CheckpointError, match=r"got train_generators = \('halved', 'other'\)"):
        train(dataclasses.replace(config, train_generators=("halved", "other")), tmp_path, resume=True)
