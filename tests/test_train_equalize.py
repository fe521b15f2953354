"""Equal treatment of both classes: the same draws everywhere, one size, one format, and no padding."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import tiny_config, write_pictures

from train.config import EqualizeConfig, config_from_file
from train.config_check import check_config
from train.data import scan_pictures
from train.equalize import equalized_jpeg
from train.errors import ConfigError, DataError
from train.evaluate import main as evaluate_main
from train.integrity import checked
from train.pictures import load_pixels
from train.run import train
from train.run_options import parse_options
from train.shards import write_shards
from train.trivial_features import traits_of

CONFIG = EqualizeConfig(enabled=True, size=96, quality=(60, 90))
KEY = "0123456789abcdef" * 4
NOISE = np.random.default_rng(0).integers(0, 256, (130, 150, 3), dtype=np.uint8)


def equalized(rgb: np.ndarray = NOISE, *, key: str = KEY) -> bytes:
    return equalized_jpeg(rgb, CONFIG, key=key, name="a.png")


def test_result_is_a_jpeg_of_the_one_size_at_a_quality_within_the_range() -> None:
    qualities = set()
    for number in range(40):
        traits = traits_of(equalized(key=f"{number:064x}"))
        assert (traits.format, traits.mode, traits.width_px, traits.height_px) == ("JPEG", "RGB", 96, 96)
        assert traits.jpeg_subsampling == 2
        qualities.add(traits.jpeg_quality)
    assert len(qualities) > 10
    assert min(qualities) >= 60
    assert max(qualities) <= 90


def test_draws_depend_on_the_key_alone() -> None:
    assert equalized() == equalized()
    assert equalized(key="f" * 64) != equalized()


def test_pictures_pass_one_jpeg_on_their_own_grid_before_the_crop() -> None:
    fixed = EqualizeConfig(enabled=True, size=96, quality=(75, 75))

    def stored(rgb: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(rgb).save(buffer, "JPEG", quality=75, subsampling="4:2:0")
        return np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))

    top, left = (130 - 96) // 2, (150 - 96) // 2
    expected = stored(np.ascontiguousarray(stored(NOISE)[top : top + 96, left : left + 96])).astype(int)
    found = equalized_jpeg(NOISE, fixed, key=KEY, name="a.png")
    pixels = np.asarray(Image.open(io.BytesIO(found))).astype(int)
    # Chroma is smoothed across the cut-out blocks' outer edge, which only the rim of the crop can see.
    np.testing.assert_array_equal(pixels[16:-16, 16:-16], expected[16:-16, 16:-16])


def test_crop_is_the_middle() -> None:
    ramp = np.broadcast_to(np.arange(150, dtype=np.uint8)[None, :, None], (130, 150, 3))
    pixels = np.asarray(Image.open(io.BytesIO(equalized(ramp)))).astype(int)
    assert abs(int(pixels[48, 0, 0]) - 27) <= 3
    assert abs(int(pixels[48, 95, 0]) - 122) <= 3


def test_smaller_picture_is_refused_rather_than_padded() -> None:
    with pytest.raises(DataError, match=r"a\.png: got 150x90 pixels, wanted at least 96 .*--equalize-size 90"):
        equalized(NOISE[:90])


def test_small_pictures_of_a_set_are_refused_with_the_size_that_would_do(tmp_path: Path) -> None:
    for label, side in (("real", 120), ("fake", 64)):
        (tmp_path / label).mkdir()
        for number in range(2):
            Image.fromarray(NOISE[:side, number : side + number]).save(tmp_path / label / f"{number}.png")
    with pytest.raises(DataError, match=r"got 0 real and 2 fake pictures .*0\.png: 64x64.*pass --equalize-size 64"):
        checked(scan_pictures(tmp_path), equalize=CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "--equalize-size: got 0, wanted 1 or more"),
        ({"quality": (90, 60)}, "--equalize-quality: got 90 60, wanted two qualities from 1 to 100"),
        ({"quality": (0, 60)}, "--equalize-quality: got 0 60"),
        ({"quality": (60, 101)}, "--equalize-quality: got 60 101"),
    ],
)
def test_senseless_values_are_refused_by_option(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(tiny_config(Path("x"), equalize=replace(CONFIG, **change)))


def test_options_are_read_from_the_command_line() -> None:
    run = parse_options(["--data", "x", "--equalize", "--equalize-size", "96", "--equalize-quality", "60", "90"]).run
    assert run.equalize == CONFIG
    assert parse_options(["--data", "x"]).run.equalize.enabled is False


def test_pixels_are_the_same_from_folder_and_shards_and_follow_the_configuration(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", counts={"train": 2})
    write_shards(scan_pictures(folder), tmp_path / "shards")
    one, two = (checked(scan_pictures(p), equalize=CONFIG) for p in (folder, tmp_path / "shards"))
    for mine, theirs in zip(one.records, two.records, strict=True):
        assert load_pixels(mine).shape == (96, 96, 3)
        np.testing.assert_array_equal(load_pixels(mine), load_pixels(theirs))
        np.testing.assert_array_equal(load_pixels(replace(mine, sha256="")), load_pixels(mine))
    assert one.content_sha256() == scan_pictures(folder).content_sha256()


def test_run_and_report_say_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pictures(tmp_path / "data", counts={"train": 6, "val": 10})
    run = tmp_path / "run"
    run.mkdir()
    config = tiny_config(data, equalize=replace(CONFIG, size=160))
    train(config, run)
    assert config_from_file(run / "config.json") == config
    words = "both classes alike: JPEG, centre 160 px, JPEG, at drawn qualities of 60 to 90"
    assert json.loads((run / "config.json").read_text())["data"]["treatment"] == words
    command = ["--run", str(run), "--data", str(data), "--split", "val", "--draws", "10", "--no-progress"]
    assert evaluate_main([*command, "--equalize", "--equalize-size", "160", "--equalize-quality", "60", "90"]) == 0
    assert json.loads((run / "report" / "evaluation.json").read_text())["treatment"] == words
    assert words in (run / "report" / "evaluation.md").read_text()
    assert words in capsys.readouterr().out
    assert evaluate_main(command) == 0
    assert json.loads((run / "report" / "evaluation.json").read_text())["treatment"] == "pictures as they are stored"
