"""JSON lists of pictures: what is read, and what is refused entry by entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_train_data import picture

from train.data import load_split, scan_pictures
from train.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "sub/b.png", 2)
    return tmp_path


def write(folder: Path, value: object) -> Path:
    path = folder / "list.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_list_is_read_with_all_its_keys_and_paths_count_from_it(folder: Path) -> None:
    entries = [
        {"path": "a.png", "label": 0, "prompt": "a cat"},
        {
            "path": "sub/b.png",
            "label": 1,
            "generator": "sd",
            "family": "diffusion",
            "original_id": "o",
            "split": "valid",
        },
    ]
    found = scan_pictures(write(folder, entries))
    assert found.layout == "JSON list.json"
    assert [(r.path, r.label, r.generator, r.family, r.original_id, r.split) for r in found.records] == [
        (folder / "a.png", 0, folder.name, folder.name, "a.png", None),
        (folder / "sub/b.png", 1, "sd", "diffusion", "o", "val"),
    ]


def test_split_of_a_list_is_loaded_by_name(folder: Path) -> None:
    entries = [{"path": p, "label": i, "split": "test"} for i, p in enumerate(("a.png", "sub/b.png"))]
    assert len(load_split(write(folder, entries), "test")) == 2


def test_list_hashes_like_the_folder_it_lists(tmp_path: Path) -> None:
    picture(tmp_path / "g/real/a.png", 1)
    picture(tmp_path / "g/fake/b.png", 2)
    expected = scan_pictures(tmp_path).content_sha256()
    listed = write(tmp_path, [{"path": "g/fake/b.png", "label": 1}, {"path": "g/real/a.png", "label": 0}])
    assert scan_pictures(listed).content_sha256() == expected


GOOD = {"path": "a.png", "label": 0}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", r"got a list that cannot be read \(.*save it again as UTF-8 JSON"),
        ({"images": []}, "got an object at the top, wanted .*put the entries into one list"),
        ([], "got an empty list, no pictures"),
        ([GOOD, ["a.png", 1]], "entry 2: a list, wanted an object"),
        ([GOOD, {"path": "sub/b.png"}], "entry 2: no label"),
        ([{}], "entry 1: no path and no label"),
        ([GOOD, {"path": "sub/b.png", "label": 2}], r"entry 2: label 2 is neither 0 \(real\) nor 1 \(fake\)"),
        ([GOOD, {"path": "sub/b.png", "label": "1"}], "entry 2: label is text '1', wanted the number 0 or 1"),
        ([GOOD, {"path": "sub/b.png", "label": True}], "entry 2: label is a boolean True"),
        ([GOOD, {"path": "sub/b.png", "label": 1.0}], "entry 2: label is a number 1.0"),
        ([GOOD, {"path": 7, "label": 1}], "entry 2: path is a number 7, wanted text"),
        ([GOOD, {"path": None, "label": 1}], "entry 2: path is null, wanted text"),
        ([GOOD, {"path": "sub/b.png", "label": 1, "split": 3}], "entry 2: split is a number 3, wanted text"),
        ([GOOD, {"path": "sub/b.png", "label": 1, "split": "trian"}], "entry 2: split 'trian' is none of train"),
        ([GOOD, {"path": "gone.png", "label": 1}], "entry 2: gone.png is not there"),
        ([GOOD, {"path": "list.json", "label": 1}], "entry 2: list.json has no picture suffix"),
        ([GOOD, GOOD], "entry 2: a.png is already entry 1"),
        ([GOOD], "1 pictures, all of them real .*looked for fake ones"),
    ],
)
def test_bad_list_is_refused_with_a_sentence(folder: Path, value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        scan_pictures(write(folder, value))


def test_list_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "list.json").write_bytes(b'[{"path": "\xff"}]')
    with pytest.raises(DataError, match="got a list that cannot be read"):
        scan_pictures(folder / "list.json")


def test_one_file_under_both_labels_is_refused(folder: Path) -> None:
    entries = [{"path": "a.png", "label": 0, "generator": "x"}, {"path": "a.png", "label": 1, "generator": "y"}]
    with pytest.raises(DataError, match="is both real and fake"):
        scan_pictures(write(folder, entries))
