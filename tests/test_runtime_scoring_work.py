"""What a stopped scoring leaves, how it goes on, and what is not taken for it."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from bundle_fixtures import random_images
from PIL import Image

from runtime.cli import main
from runtime.errors import CollectionError, UsageError
from runtime.scoring.results import require_results_path, write_results
from runtime.scoring.rows import COLUMNS, Row
from runtime.scoring.sources import Picture
from runtime.scoring.work import Configuration, Work, is_begun

KILLER = Path(__file__).with_name("killed_scorer.py")
TIMEOUT_S = 120
ROWS = [
    Row("0.png", "real", 0.1, -0.25, None),
    Row('1 "ü",\n.png', "fake", 1 / 3, 1e-9, None),
    Row("2.png", None, None, None, "2.png: got no such file"),
]


def begun(out, *, pictures=3, **changes):
    """An open Work that holds `pictures` pictures in parts of two."""
    work = Work(out)
    spec = work.list_pictures(Picture(row.source) for row in ROWS[:pictures])
    configuration = Configuration("/s", spec.pictures, spec.sha256, 2, "m", "0" * 64, "onnxruntime", "fp32", "1")
    try:
        work.begin(dataclasses.replace(configuration, **changes))
    except BaseException:
        work.close()
        raise
    return work


def run_killer(*arguments):
    done = subprocess.run(
        [sys.executable, str(KILLER), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_scoring_killed_at_any_line_ends_with_each_row_once_and_scores_no_part_twice(tmp_path):
    outcomes = run_killer("lines", tmp_path / "r.csv")
    header = ",".join(f'"{column}"' for column in COLUMNS)
    expected = "".join(f'"{n}.png","real",0.5,0.25,""\n' for n in range(3))
    assert len(outcomes) > 150
    assert [killed for killed, *_ in outcomes].count(False) == 1
    for _, results, beside, scored in outcomes:
        assert results == f"{header}\n{expected}"
        assert set(beside) <= {"r.csv", "scored", "r.csv.parts"}
        # A part may be missing in the log, which is written after it is kept; it must not be there twice.
        assert scored in (["0", "1"], ["0"], ["1"])


def test_a_scoring_killed_at_random_moments_ends_with_the_rows_of_an_undisturbed_one(tiny_bundle, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number, rgb in enumerate(random_images(300)):
        Image.fromarray(rgb).save(tmp_path / "pictures" / f"{number:03}.png")
    (tmp_path / "out").mkdir()
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    (left,) = run_killer("random", tiny_bundle, tmp_path / "pictures", tmp_path / "out" / "r.csv", 4, seed)
    assert os.listdir(tmp_path / "out") == ["r.csv"]
    assert len(left) == 4
    options = ["--model", str(tiny_bundle), "--backend", "onnxruntime", "--threads", "1"]
    assert main(["score", str(tmp_path / "pictures"), "--out", str(tmp_path / "whole.csv"), *options]) == 0
    stopped, whole = (
        list(csv.DictReader((tmp_path / name).read_text().splitlines())) for name in ("out/r.csv", "whole.csv")
    )
    assert len(whole) == 300
    for got, want in zip(stopped, whole, strict=True):
        assert (got["source"], got["verdict"], got["error"]) == (want["source"], want["verdict"], "")
        assert float(got["fake_probability"]) == pytest.approx(float(want["fake_probability"]), abs=1e-6)


def test_only_missing_parts_are_scored_when_it_goes_on(tmp_path):
    with begun(tmp_path / "r.csv") as work:
        work.commit(1, ROWS[2:])
        assert work.missing() == {0}
    with begun(tmp_path / "r.csv") as work:
        assert work.missing() == {0}
        assert [(number, len(list(lines))) for number, lines in work.listed(work.missing())] == [(0, 2)]
        work.commit(0, ROWS[:2])
        assert work.finish() == 1
    assert os.listdir(tmp_path) == ["r.csv"]


@pytest.mark.parametrize(
    "change",
    [
        {"source": "/t"}, {"pictures": 2}, {"part_size": 3}, {"model_sha256": "1" * 64}, {"precision": "int8"},
        {"backend": "openvino"}, {"tool_version": "2"},
    ],
)  # fmt: skip
def test_a_changed_configuration_is_refused_with_what_changed(tmp_path, change):
    with begun(tmp_path / "r.csv") as work:
        work.commit(1, ROWS[2:])
    (name,) = change
    with pytest.raises(CollectionError, match=rf"another configuration \(.*{name} was .* and is .*\).*remove .*parts"):
        begun(tmp_path / "r.csv", **change)
    with begun(tmp_path / "r.csv") as work:
        assert work.missing() == {0}


def test_a_second_process_on_the_same_results_is_refused(tmp_path):
    with begun(tmp_path / "r.csv"), pytest.raises(CollectionError, match="a scoring in progress"):
        Work(tmp_path / "r.csv")
    begun(tmp_path / "r.csv").close()


def test_a_folder_that_its_last_owner_has_just_removed_is_refused(tmp_path, monkeypatch):
    from runtime.scoring import work as work_module

    def locked_too_late(descriptor, operation):
        (tmp_path / "r.csv.parts").rmdir()

    monkeypatch.setattr(work_module.fcntl, "flock", locked_too_late)
    with pytest.raises(CollectionError, match="a scoring that ended this very moment"):
        Work(tmp_path / "r.csv")


def test_nothing_is_left_where_nothing_was_begun(tmp_path):
    with Work(tmp_path / "r.csv") as work:
        work.list_pictures([])
    assert os.listdir(tmp_path) == []


def test_rows_that_are_not_those_of_the_part_are_not_kept(tmp_path):
    with begun(tmp_path / "r.csv") as work, pytest.raises(CollectionError, match="got 1 rows of part 0, wanted 2 rows"):
        work.commit(0, ROWS[:1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:1],
        lambda lines: lines[:1] * 2,
        lambda lines: lines[::-1],
        lambda lines: [lines[0], lines[1][:-9]],
        lambda lines: [*lines, lines[0]],
        lambda lines: [lines[0], "[1]"],
    ],
)
def test_a_part_that_does_not_hold_its_rows_is_refused_and_the_results_are_not_written(tmp_path, damage):
    with begun(tmp_path / "r.csv") as work:
        work.commit(0, ROWS[:2])
        work.commit(1, ROWS[2:])
        path = tmp_path / "r.csv.parts" / "part-00000000.jsonl"
        path.write_text("\n".join(damage(path.read_text().splitlines())))
        with pytest.raises(CollectionError, match=r"part-00000000\.jsonl: got .* remove this file and run"):
            work.finish()
    assert not (tmp_path / "r.csv").exists()
    path.unlink()
    with begun(tmp_path / "r.csv") as work:
        assert work.missing() == {0}


@pytest.mark.parametrize("text", ["", "{}", '{"failed": null}', "\0"])
def test_a_damaged_journal_is_refused(tmp_path, text):
    begun(tmp_path / "r.csv").close()
    (tmp_path / "r.csv.parts" / "journal.json").write_text(text)
    with pytest.raises(CollectionError, match=r"a journal that cannot be read .* begin again"):
        Work(tmp_path / "r.csv")


def test_a_full_disk_is_refused_in_words_and_the_part_is_not_there(tmp_path, monkeypatch):
    with begun(tmp_path / "r.csv") as work:

        def full(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(CollectionError, match="No space left on device"):
                work.commit(0, ROWS[:2])
            with pytest.raises(CollectionError, match="No space left on device"):
                work.list_pictures([Picture("a.png")])
        assert work.missing() == {0, 1}


# The results file


def test_csv_keeps_a_name_with_line_ends_in_one_row(tmp_path):
    rows = [Row("a\rb\nc.png", None, None, None, "x\r\ny")]
    write_results(tmp_path / "csv", rows, suffix=".csv")
    with (tmp_path / "csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1:] == [["a\rb\nc.png", "", "", "", "x\r\ny"]]


def test_csv_and_json_lines_hold_the_rows(tmp_path):
    write_results(tmp_path / "csv", ROWS, suffix=".csv")
    with (tmp_path / "csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == list(COLUMNS)
    assert [
        Row(s, v or None, float(p) if p else None, float(t) if t else None, e or None) for s, v, p, t, e in rows
    ] == ROWS
    write_results(tmp_path / "jsonl", ROWS, suffix=".jsonl")
    lines = (tmp_path / "jsonl").read_text().splitlines()
    assert [Row(**json.loads(line)) for line in lines] == ROWS


def test_parquet_holds_the_rows_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.scoring.results._GROUP_ROWS", 2)
    write_results(tmp_path / "r", iter(ROWS), suffix=".parquet")
    with pyarrow.parquet.ParquetFile(tmp_path / "r") as file:
        assert [Row(**row) for row in file.read().to_pylist()] == ROWS
        assert file.metadata.num_row_groups == 2
        assert [str(kind) for kind in file.schema_arrow.types] == ["string", "string", "double", "double", "string"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("r.txt", r"ends in '\.txt'"), ("no/r.csv", "make the folder"), ("old.csv", "--overwrite"), ("f.csv", "a folder")],
)
def test_a_results_path_that_cannot_be_served_is_refused_early(tmp_path, name, message):
    (tmp_path / "old.csv").touch()
    (tmp_path / "f.csv").mkdir()
    with pytest.raises(UsageError, match=message):
        require_results_path(tmp_path / name, overwrite=False)
    require_results_path(tmp_path / "old.csv", overwrite=True)


def test_parquet_without_pyarrow_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r'no package pyarrow.*pip install "ntf-toolkit\[score\]"'):
        require_results_path(tmp_path / "r.parquet", overwrite=False)


def test_is_begun_says_whether_there_is_something_to_go_on_with(tmp_path):
    assert not is_begun(tmp_path / "r.csv")
    begun(tmp_path / "r.csv").close()
    assert is_begun(tmp_path / "r.csv")
