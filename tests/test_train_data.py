"""Folders and CSV files of labelled pictures: what is found, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from train.data import PictureSet, load_split, scan_pictures
from train.errors import DataError


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(path)
    return path


def labels_by_name(found: PictureSet) -> dict[str, int]:
    return {r.path.name: r.label for r in found.records}


@pytest.mark.parametrize(("real", "fake"), [("0_real", "1_fake"), ("real", "fake"), ("nature", "ai"), ("Real", "FAKE")])
@pytest.mark.parametrize("depth", ["", "biggan", "train/biggan/cat"])
def test_label_folders_are_read_at_any_depth(tmp_path: Path, real: str, fake: str, depth: str) -> None:
    picture(tmp_path / depth / real / "a.png")
    picture(tmp_path / depth / fake / "sub" / "b.JPG")
    found = scan_pictures(tmp_path)
    assert labels_by_name(found) == {"a.png": 0, "b.JPG": 1}
    assert found.layout == f"{real.lower()} | {fake.lower()}"
    assert all(r.path.is_absolute() for r in found.records)


def test_generator_is_the_first_folder_below_the_split(tmp_path: Path) -> None:
    picture(tmp_path / "test/progan/cat/0_real/a.png")
    picture(tmp_path / "test/progan/dog/1_fake/b.png")
    picture(tmp_path / "sd/valid/ai/c.png")
    picture(tmp_path / "0_real/coco/d.png")
    records = {r.path.name: (r.split, r.generator) for r in scan_pictures(tmp_path).records}
    assert records == {
        "a.png": ("test", "progan"),
        "b.png": ("test", "progan"),
        "c.png": ("val", "sd"),
        "d.png": (None, tmp_path.name),
    }


@pytest.mark.parametrize("archive", ["", "imagenet_ai_0419_biggan"])
def test_genimage_is_read_as_it_is_distributed(tmp_path: Path, archive: str) -> None:
    for split in ("train", "val"):
        picture(tmp_path / "BigGAN" / archive / split / "ai" / "000_biggan_00001.png")
        picture(tmp_path / "BigGAN" / archive / split / "nature" / "n01440764_10026.JPEG.png")
    assert {(r.split, r.generator, r.label) for r in scan_pictures(tmp_path).records} == {
        (split, "BigGAN", label) for split in ("train", "val") for label in (0, 1)
    }
    assert {r.generator for r in load_split(tmp_path / "BigGAN" / archive, "val").records} == {archive or "BigGAN"}


def test_generator_folders_with_real_and_fake_are_read(tmp_path: Path) -> None:
    for generator in ("sdxl", "dalle3"):
        picture(tmp_path / generator / "real/a.png")
        picture(tmp_path / generator / "fake/b.png")
    found = {(r.generator, r.label, r.split) for r in scan_pictures(tmp_path).records}
    assert found == {(generator, label, None) for generator in ("sdxl", "dalle3") for label in (0, 1)}


def test_family_and_original_default_to_generator_and_relative_path(tmp_path: Path) -> None:
    picture(tmp_path / "gan/0_real/a.png")
    picture(tmp_path / "gan/1_fake/b.png")
    first = scan_pictures(tmp_path).records[0]
    assert (first.family, first.original_id) == ("gan", "gan/0_real/a.png")


def test_sources_file_gives_originals_and_the_fakes_family(tmp_path: Path) -> None:
    picture(tmp_path / "sd/0_real/a.png")
    picture(tmp_path / "sd/1_fake/b.png")
    (tmp_path / "sources.csv").write_text(
        "path,label,generator,family,original_id,extra\n"
        "sd/0_real/a.png,0_real,photos,photos,one,x\n"
        "sd/1_fake/b.png,1_fake,sd,diffusion,two,x\n"
    )
    records = scan_pictures(tmp_path).records
    assert [(r.generator, r.family, r.original_id) for r in records] == [
        ("sd", "diffusion", "one"),
        ("sd", "diffusion", "two"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("sd/0_real/a.png,1", "line 2: label 1, but its folder says 0"),
        ("sd/0_real/gone.png,0", "line 2: sd/0_real/gone.png is not there"),
        ("sd/0_real/a.png,maybe", "line 2: label 'maybe'"),
        ("sd/0_real/a.png,0\nsd/0_real/a.png,0", "line 3: sd/0_real/a.png is already on line 2"),
        ("sd/0_real/a.png", "line 2: 1 fields under 2 columns"),
    ],
)
def test_sources_file_that_contradicts_the_folders_is_refused(tmp_path: Path, row: str, message: str) -> None:
    picture(tmp_path / "sd/0_real/a.png")
    picture(tmp_path / "sd/1_fake/b.png")
    (tmp_path / "sources.csv").write_text(f"path,label\n{row}\n")
    with pytest.raises(DataError, match=message):
        scan_pictures(tmp_path)


def test_hidden_and_other_files_are_left_out_and_counted(tmp_path: Path) -> None:
    picture(tmp_path / "0_real/a.png")
    picture(tmp_path / "1_fake/b.png")
    picture(tmp_path / "1_fake/._b.png")
    picture(tmp_path / ".cache/1_fake/c.png")
    (tmp_path / "1_fake/notes.txt").write_text("x")
    found = scan_pictures(tmp_path)
    assert labels_by_name(found) == {"a.png": 0, "b.png": 1}
    assert found.skipped == 1
    assert "1 other files left out" in found.describe()


def test_links_are_followed_and_a_link_upwards_ends(tmp_path: Path) -> None:
    picture(tmp_path / "store/x.png")
    root = tmp_path / "set"
    picture(root / "1_fake/b.png", 9)
    (root / "0_real").symlink_to(tmp_path / "store")
    (root / "1_fake/again").symlink_to(root)
    assert labels_by_name(scan_pictures(root)) == {"x.png": 0, "b.png": 1}


def test_link_without_a_target_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "0_real/a.png")
    (tmp_path / "1_fake").mkdir()
    (tmp_path / "1_fake/b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"b\.png: got a link whose target is not there"):
        scan_pictures(tmp_path)


def test_one_file_under_both_labels_is_refused(tmp_path: Path) -> None:
    real = picture(tmp_path / "0_real/a.png")
    (tmp_path / "1_fake").mkdir()
    (tmp_path / "1_fake/b.png").symlink_to(real)
    with pytest.raises(DataError, match="is both real and fake"):
        scan_pictures(tmp_path)


def test_one_file_in_two_splits_is_refused(tmp_path: Path) -> None:
    real = picture(tmp_path / "train/0_real/a.png")
    picture(tmp_path / "train/1_fake/b.png")
    (tmp_path / "test/0_real").mkdir(parents=True)
    (tmp_path / "test/0_real/a.png").symlink_to(real)
    with pytest.raises(DataError, match="is in the splits test and train"):
        scan_pictures(tmp_path)


def test_folder_without_pictures_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no picture at all, wanted pictures in folders 0_real \| 1_fake"):
        scan_pictures(tmp_path)


def test_unknown_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    picture(tmp_path / "authentic/a.png")
    picture(tmp_path / "synthetic/b.png")
    with pytest.raises(DataError, match=r"2 pictures in no label folder .*authentic/a.png.*nature \| ai"):
        scan_pictures(tmp_path)


def test_one_stray_picture_is_not_dropped_silently(tmp_path: Path) -> None:
    picture(tmp_path / "0_real/a.png")
    picture(tmp_path / "1_fake/b.png")
    picture(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"1 pictures in no label folder \(stray.png\)"):
        scan_pictures(tmp_path)


def test_folders_of_both_classes_in_one_path_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "fake/real/a.png")
    with pytest.raises(DataError, match=r"both classes in one path \(fake, real\)"):
        scan_pictures(tmp_path)


@pytest.mark.parametrize(("folder", "only", "missing"), [("0_real", "real", "fake"), ("1_fake", "fake", "real")])
def test_one_class_is_refused_unless_allowed(tmp_path: Path, folder: str, only: str, missing: str) -> None:
    picture(tmp_path / "val" / folder / "a.png")
    with pytest.raises(DataError, match=f"all of them {only} .*looked for {missing} ones"):
        scan_pictures(tmp_path)
    assert len(load_split(tmp_path, "val", require_both=False)) == 1


def test_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got nothing at that path, wanted pictures in folders"):
        scan_pictures(tmp_path / "nowhere")


def test_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got a file that is no CSV, JSON or tar"):
        scan_pictures(picture(tmp_path / "a.png"))


def test_split_is_loaded_by_its_name_and_by_its_alias(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        picture(tmp_path / split / "g/0_real/a.png")
        picture(tmp_path / split / "g/1_fake/b.png")
    assert {r.split for r in load_split(tmp_path, "val").records} == {"val"}
    assert [r.path for r in load_split(tmp_path, "valid").records] == [
        r.path for r in load_split(tmp_path, "val").records
    ]


def test_absent_split_names_those_that_are_there(tmp_path: Path) -> None:
    picture(tmp_path / "train/g/0_real/a.png")
    picture(tmp_path / "train/g/1_fake/b.png")
    with pytest.raises(DataError, match=r"split 'test' of .*splits there: train"):
        load_split(tmp_path, "test")


def test_split_with_one_class_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "train/g/0_real/a.png")
    picture(tmp_path / "train/g/1_fake/b.png")
    picture(tmp_path / "test/g/1_fake/b.png")
    with pytest.raises(DataError, match=r"split 'test' of .*all of them fake"):
        load_split(tmp_path, "test")


def test_csv_is_read_with_all_its_columns(tmp_path: Path) -> None:
    picture(tmp_path / "p/a.png")
    elsewhere = picture(tmp_path / "b b ü.webp")
    table = tmp_path / "p" / "list.csv"
    table.write_text(
        "\ufeffpath,label,Generator,family,original_id,split\n"
        f'a.png,real,sd,diffusion,o1,train\n\n"{elsewhere}",1,sd,diffusion,,validation\n',
        encoding="utf-8",
    )
    found = scan_pictures(table)
    assert found.root == tmp_path / "p"
    assert [(r.path, r.label, r.generator, r.family, r.original_id, r.split) for r in found.records] == [
        (tmp_path / "p/a.png", 0, "sd", "diffusion", "o1", "train"),
        (elsewhere, 1, "sd", "diffusion", "../b b ü.webp", "val"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,0\nb.png,fakee\n", "line 3: label 'fakee' is none of 0, 1, 0_real"),
        ("path,label\na.png,0\n\ngone.png,1\n", "line 4: gone.png is not there"),
        ("path,label\na.png,0\na.png,0\n", "line 3: a.png is already on line 2"),
        ("path,label\n,0\n", "line 2: empty path"),
        ("path,label\na.png,0,x\n", "line 2: 3 fields under 2 columns"),
        ("path,label,split\na.png,0,trian\n", "line 2: split 'trian' is none of train, val"),
        ("path,label\nlist.csv,0\n", "line 2: list.csv has no picture suffix"),
        ("file,label\na.png,0\n", "line 1: columns file, label"),
        ("path,label\n", "no row below the header"),
        ("", "line 1: columns none"),
        ("path,label\n" + "gone.png,1\n" * 6, "line 5: gone.png is not there and 2 more"),
    ],
)
def test_bad_csv_rows_are_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        scan_pictures(tmp_path / "list.csv")


def test_csv_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"path,label\n\xff\xfe,0\n")
    with pytest.raises(DataError, match=r"got a list that cannot be read .*wanted UTF-8 CSV"):
        scan_pictures(tmp_path / "list.csv")


@pytest.mark.parametrize("suffix", [".csv", ".json", ".tar"])
def test_file_that_gives_an_error_when_it_is_read_is_refused(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"list{suffix}"
    source.symlink_to("/proc/self/mem")  # opens, and then fails as a broken disk does
    with pytest.raises(DataError, match=rf"list\{suffix}: got a \w+ that cannot be read .*Input/output error"):
        scan_pictures(source)


def test_description_counts_by_split_and_generator(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / f"test/sd/0_real/{name}.png")
    picture(tmp_path / "test/sd/1_fake/c.png")
    lines = scan_pictures(tmp_path).describe().splitlines()
    assert "3 pictures, 2 real, 1 fake" in lines[0]
    assert lines[1].split() == ["split", "generator", "family", "real", "fake", "originals"]
    assert lines[2].split() == ["test", "sd", "sd", "2", "1", "3"]


def test_content_hash_follows_bytes_labels_and_paths_but_not_the_place(tmp_path: Path) -> None:
    root = tmp_path / "one"
    picture(root / "g/0_real/a.png", 1)
    picture(root / "g/1_fake/b.png", 2)
    before = scan_pictures(root).content_sha256()
    shutil.copytree(root, tmp_path / "two")
    assert scan_pictures(tmp_path / "two").content_sha256() == before
    picture(root / "g/1_fake/b.png", 3)
    changed = scan_pictures(root).content_sha256()
    (root / "g/1_fake/b.png").rename(root / "g/1_fake/c.png")
    assert len({before, changed, scan_pictures(root).content_sha256()}) == 3
