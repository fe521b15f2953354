"""The audit: what it says of a biased, an equalised and a clean set, its files, its exit status."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.audit import audit_pictures, main
from train.data import scan_pictures
from train.equalize import EqualizeConfig
from train.shards import write_shards

EQUALIZE = EqualizeConfig(enabled=True, size=64, quality=(60, 95))
PER_CLASS = 40
BIASED_PER_CLASS = 100  # so many that an AUC of chance is within 0.1 of 0.5


def pixels(seed: int, side: int = 96) -> np.ndarray:
    """A scene and its noise, some smooth and some rough; both classes are drawn from the same distribution."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
    return np.clip(smooth + rng.normal(0, rng.uniform(2, 40), smooth.shape), 0, 255).astype(np.uint8)


def write_set(root: Path, *, biased: bool, per_class: int) -> Path:
    """Real and fake pictures without any difference in content; where biased, JPEG against PNG of another size."""
    # Equal distributions still differ by chance: these seeds are those of sets of the usual kind.
    seed = 1000
    for split in ("train", "test"):
        for label, folder in enumerate(("0_real", "1_fake")):
            place = root / split / "gan" / folder
            place.mkdir(parents=True)
            for number in range(per_class):
                seed += 1
                if biased and label:
                    Image.fromarray(pixels(seed)[8:88, 8:88]).save(place / f"{number}.png")
                else:
                    Image.fromarray(pixels(seed)).save(place / f"{number}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("biased"), biased=True, per_class=BIASED_PER_CLASS)


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write_set(tmp_path / "clean", biased=False, per_class=PER_CLASS)


def test_biased_set_is_called_readable_off_format_and_size(biased: Path) -> None:
    report = audit_pictures(scan_pictures(biased))
    assert [(s.split, s.generator, s.auc) for s in report.shortcuts] == [("test", "gan", 1.0), ("train", "gan", 1.0)]
    assert report.shortcuts[0].auc_learnt_on_train == 1.0
    assert {"file format", "picture size", "JPEG tables"} <= set(report.shortcuts[0].readable_groups)
    assert report.shortcuts[0].verdict.startswith("the label can be read off the file format and off the picture size")
    assert report.findings[0].startswith("test / gan: the label can be read off the file format")


def test_equalising_takes_the_bias_away(biased: Path) -> None:
    report = audit_pictures(scan_pictures(biased), equalize=EQUALIZE)
    for found in report.shortcuts:
        assert found.auc == pytest.approx(0.5, abs=0.1)
        assert found.verdict == "these features do not give the label away"
    assert report.findings == ()
    assert "both classes alike" in report.treatment
    assert {tuple(c.sizes) for c in report.classes} == {("64x64",)}
    assert {tuple(c.formats) for c in report.classes} == {("JPEG",)}


def test_clean_set_has_no_finding_and_its_files_are_described(clean: Path) -> None:
    report = audit_pictures(scan_pictures(clean), workers=2)
    assert report.findings == ()
    first = report.classes[0]
    assert (first.split, first.generator, first.label, first.pictures) == ("test", "gan", 0, PER_CLASS)
    assert (first.formats, first.sizes, first.different_sizes) == ({"JPEG": PER_CLASS}, {"96x96": PER_CLASS}, 1)
    assert first.jpeg_quality is not None
    assert (first.jpeg_quality.smallest, first.jpeg_quality.largest) == (90, 90)
    assert (first.different_jpeg_tables, first.exif_share, first.exact_copies) == (1, 0.0, 0)


def test_shards_are_audited_like_their_folder(biased: Path, tmp_path: Path) -> None:
    write_shards(scan_pictures(biased), tmp_path / "shards")
    folder, shards = (audit_pictures(scan_pictures(p)) for p in (biased, tmp_path / "shards"))
    assert (shards.classes, shards.shortcuts, shards.findings) == (folder.classes, folder.shortcuts, folder.findings)


def test_metadata_of_one_class_are_found(clean: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    for path in (clean / "test/gan/0_real").iterdir():
        with Image.open(path) as picture:
            picture.load()
        picture.save(path, quality=90, exif=exif)
    report = audit_pictures(scan_pictures(clean))
    found = next(s for s in report.shortcuts if s.split == "test")
    assert "metadata" in found.readable_groups
    assert next(c for c in report.classes if c.split == "test" and c.label == 0).exif_share == 1.0


def test_copies_and_near_copies_across_splits_are_found(clean: Path) -> None:
    source = clean / "train/gan/0_real"
    shutil.copy(source / "0.jpg", clean / "test/gan/0_real/copy.jpg")
    with Image.open(source / "1.jpg") as picture:
        picture.resize((80, 80)).save(clean / "test/gan/0_real/smaller.jpg", quality=70)
    shutil.copy(source / "2.jpg", source / "again.jpg")
    report = audit_pictures(scan_pictures(clean))
    exact, near = report.duplicates_across_splits, report.near_duplicates_across_splits
    assert [(p.first, p.second) for p in exact] == [("test/gan/0_real/copy.jpg", "train/gan/0_real/0.jpg")]
    assert [(p.first, p.second) for p in near] == [("test/gan/0_real/smaller.jpg", "train/gan/0_real/1.jpg")]
    assert next(c for c in report.classes if c.split == "train" and c.label == 0).exact_copies == 1
    assert report.findings == (
        "1 pictures are exact copies of pictures in another split",
        "1 pictures look the same as pictures in another split",
    )


def test_same_bytes_with_both_labels_are_found(clean: Path) -> None:
    shutil.copy(clean / "train/gan/0_real/0.jpg", clean / "train/gan/1_fake/copy.jpg")
    report = audit_pictures(scan_pictures(clean))
    assert report.findings == ("1 pictures are in the set as real and as fake",)


def test_corrupt_files_are_listed(clean: Path) -> None:
    (clean / "train/gan/1_fake/3.jpg").write_bytes(b"no picture")
    report = audit_pictures(scan_pictures(clean))
    assert [(p.path, p.label) for p in report.corrupt] == [("train/gan/1_fake/3.jpg", 1)]
    assert report.findings == ("1 pictures cannot be decoded",)
    assert sum(c.pictures for c in report.classes) == report.pictures - 1


def test_few_pictures_and_one_class_get_no_verdict_instead_of_a_wrong_one(tmp_path: Path) -> None:
    for folder, count in (("few/0_real", 3), ("few/1_fake", 3), ("photographs/0_real", 12)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(pixels(number + len(folder))).save(tmp_path / folder / f"{number}.png")
    report = audit_pictures(scan_pictures(tmp_path))
    assert [(s.generator, s.auc, s.verdict) for s in report.shortcuts] == [
        ("few", None, "too few pictures of both classes to say")
    ]


def test_command_writes_json_and_markdown_and_ends_with_one_for_findings(
    biased: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"--json": tmp_path / "out" / "audit.json", "--markdown": tmp_path / "out" / "audit.md"}
    arguments = [str(part) for pair in files.items() for part in pair]
    assert main(["--data", str(biased), "--no-progress", *arguments]) == 1
    written = json.loads(files["--json"].read_text())
    assert written["pictures"] == 4 * BIASED_PER_CLASS
    assert written["shortcuts"][0]["auc"] == 1.0
    assert {"tool_version", "machine", "versions"} <= set(written["environment"])
    text = files["--markdown"].read_text()
    assert "- test / gan: the label can be read off the file format" in text
    assert "| test | gan | 100 | 100 | 1.00 | 1.00 | the label can be read" in text
    out = capsys.readouterr().out
    assert "finding: train / gan: the label can be read off the file format" in out
    assert "PNG 100 %" in out


def test_command_ends_with_zero_for_a_clean_set(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(clean), "--no-progress"]) == 0
    assert "clean: no finding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "picture collection nowhere: got nothing at that path"),
        (["--data", "SET", "--equalize", "--equalize-size", "100"], "--equalize-size 100: got 200 real and 200 fake"),
        (["--data", "SET", "--equalize", "--equalize-quality", "9", "1"], "--equalize-quality: got 9 1"),
    ],
)
def test_command_ends_with_two_where_it_cannot_be_carried_out(
    biased: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(biased) if a == "SET" else a for a in [*arguments, "--no-progress"]]) == 2
    assert message in capsys.readouterr().err


def test_equalised_audit_looks_at_the_bytes_that_training_decodes(tmp_path: Path) -> None:
    for folder in ("real", "fake"):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels(len(folder))).save(tmp_path / folder / "a.png", icc_profile=b"profile")
    report = audit_pictures(scan_pictures(tmp_path), equalize=EQUALIZE)
    assert {(tuple(c.formats), c.icc_profile_share) for c in report.classes} == {(("JPEG",), 0.0)}
    buffer = io.BytesIO()
    Image.fromarray(pixels(0)).save(buffer, "PNG")
    assert report.classes[0].file_bytes.largest < len(buffer.getvalue())
