"""`ntf score`, from the command line to the rows."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest
from bundle_fixtures import CALIBRATION, numpy_outputs, random_images, write_bundle
from PIL import Image

from runtime import Detector
from runtime.cli import main
from runtime.detector import MAX_DECODE_THREADS
from runtime.file_part import FilePart
from runtime.scoring.progress import Progress, duration
from runtime.scoring.rows import rows_of
from runtime.scoring.sources import Picture, pictures_of
from runtime.scoring.tar_shards import Member

IMAGES = random_images(6, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_bundle(folder, precisions=("fp32", "fp16"))
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Current folder with six pictures, a broken one among them."""
    (tmp_path / "pictures").mkdir()
    for number, rgb in enumerate(IMAGES):
        Image.fromarray(rgb).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "pictures" / "2.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def score(model, *arguments):
    return main(["score", "--model", str(model), "--backend", "onnxruntime", "--threads", "1", *map(str, arguments)])


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_rows_of_the_pictures(found, prefix):
    outputs = numpy_outputs(IMAGES)
    assert [row["source"] for row in found] == [f"{prefix}/{number}.png" for number in range(6)]
    for number, row in enumerate(found):
        if number == 2:
            assert "no known picture format" in row["error"]
            assert (row["verdict"], row["fake_probability"], row["trace_similarity"]) == ("", "", "")
            continue
        logit = outputs["logits"][number]
        assert (row["verdict"], row["error"]) == (str(CALIBRATION.verdicts(logit)), "")
        assert float(row["fake_probability"]) == pytest.approx(float(CALIBRATION.fake_probability(logit)), abs=1e-6)
        assert float(row["trace_similarity"]) == pytest.approx(outputs["trace_similarity"][number], abs=1e-6)


@pytest.mark.parametrize("part_size", [1, 4, 100])
def test_every_picture_is_a_row_in_order_and_a_broken_one_says_why(work, model, capsys, part_size):
    assert score(model, "pictures", "--out", "r.csv", "--part-size", part_size, "--batch-size", 3) == 1
    assert_rows_of_the_pictures(rows("r.csv"), "pictures")
    assert sorted(os.listdir()) == ["pictures", "r.csv"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "model tiny: fp32 on onnxruntime, 6 pictures" in err
    assert "6 of 6 (100 %)" in err
    assert err.endswith("5 scored, 1 failed\n")


def test_shards_lists_and_tables_give_the_rows_of_the_folder(work, model):
    with tarfile.open("pictures.tar", "w") as archive:
        for number in range(6):
            archive.add(f"pictures/{number}.png", f"{number}.png")
    (work / "list.txt").write_text("".join(f"pictures/{number}.png\n" for number in range(6)))
    (work / "table.csv").write_text("path\n" + (work / "list.txt").read_text())
    for source, prefix in (("pictures.tar", "pictures.tar"), ("list.txt", "pictures"), ("table.csv", "pictures")):
        assert score(model, source, "--out", "r.csv", "--overwrite") == 1
        assert_rows_of_the_pictures(rows("r.csv"), prefix)


def test_a_list_is_read_from_its_own_folder(work, model):
    (work / "pictures" / "list.txt").write_text("0.png\n1.png\n")
    assert score(model, "pictures/list.txt", "--out", "r.jsonl") == 0
    assert [json.loads(line)["source"] for line in (work / "r.jsonl").read_text().splitlines()] == ["0.png", "1.png"]


def test_a_name_that_is_not_utf8_is_escaped_in_every_form(work, model):
    os.rename(b"pictures/0.png", b"pictures/caf\xe9.png")
    for out in ("r.csv", "r.jsonl", "r.parquet"):
        assert score(model, "pictures", "--out", out) == 1
    assert rows("r.csv")[-1]["source"] == r"pictures/caf\udce9.png"
    assert json.loads((work / "r.jsonl").read_text().splitlines()[-1])["source"] == r"pictures/caf\udce9.png"
    assert b"caf\\udce9.png" in (work / "r.parquet").read_bytes()


def test_another_precision_does_not_go_on_with_the_rows_of_this_one(work, model, monkeypatch, capsys):
    def stop(work):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("runtime.scoring.work.Work.finish", stop)
        assert score(model, "pictures", "--out", "r.csv") == 130
    assert score(model, "pictures", "--out", "r.csv", "--precision", "fp16") == 2
    assert "precision was fp32 and is fp16" in capsys.readouterr().err
    (work / "pictures" / "6.png").touch()
    assert score(model, "pictures", "--out", "r.csv") == 2
    assert "pictures was 6 and is 7; listing_sha256 was" in capsys.readouterr().err
    (work / "pictures" / "6.png").unlink()
    assert score(model, "pictures", "--out", "r.csv") == 1
    assert_rows_of_the_pictures(rows("r.csv"), "pictures")


def test_ctrl_c_keeps_what_is_done_and_says_so(work, model, monkeypatch, capsys):
    from runtime.scoring import local

    real, calls = local.rows_of, []

    def interrupted(*arguments, **options):
        for row in real(*arguments, **options):
            calls.append(row.source)
            if len(calls) == 5:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(local, "rows_of", interrupted)
        assert score(model, "pictures", "--out", "r.csv", "--part-size", 2, "--batch-size", 1) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert len(list((work / "r.csv.parts").glob("part-*.jsonl"))) == 2
    assert score(model, "pictures", "--out", "r.csv", "--part-size", 2) == 1
    assert "6 of 6" in capsys.readouterr().err
    assert_rows_of_the_pictures(rows("r.csv"), "pictures")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "--out", "r.csv"], "gone: got nothing there"),
        (["empty", "--out", "r.csv"], "empty: got a collection without pictures"),
        (["pictures", "--out", "r.csv", "--part-size", "0"], "--part-size: got 0"),
        (["pictures", "--out", "r.csv", "--batch-size", "-1"], "--batch-size: got -1"),
        (["pictures", "--out", "r.csv", "--workers", "2"], "--workers: got an option of the Ray engine"),
        (["pictures", "--out", "r.csv", "--gpus", "-1"], "--gpus: got -1"),
        (["pictures", "--out", "r.csv", "--precision", "int8"], "these ONNX precisions: fp32, fp16"),
        (["pictures", "--out", "old.csv"], "a file that is already there"),
    ],
)
def test_what_cannot_be_done_gives_status_2_and_leaves_nothing(work, model, capsys, arguments, message):
    (work / "empty").mkdir()
    (work / "old.csv").write_text("mine")
    assert score(model, *arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir()) == ["empty", "old.csv", "pictures"]
    assert (work / "old.csv").read_text() == "mine"


def test_an_older_file_stands_until_the_new_one_is_complete(work, model, monkeypatch):
    (work / "r.csv").write_text("older")

    def stop(work):
        assert (work.out).read_text() == "older"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("runtime.scoring.work.Work.finish", stop)
        assert score(model, "pictures", "--out", "r.csv", "--overwrite") == 130
    assert score(model, "pictures", "--out", "r.csv") == 1
    assert_rows_of_the_pictures(rows("r.csv"), "pictures")


def test_members_that_are_too_large_are_rows_in_their_place_and_are_not_read(tmp_path, model, monkeypatch):
    small = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(small, "PNG")
    size = len(small.getvalue())
    (tmp_path / "s.tar").write_bytes(small.getvalue() + b"\0")
    fits, large = Member("fits", 0, size), Member("large", 0, size + 1)
    order = [large, fits, large, large, fits, large]
    pictures = [Picture(f"s.tar/{place}", "s.tar", member) for place, member in enumerate(order)]
    monkeypatch.setattr("runtime.decode.MAX_STREAM_BYTES", size)
    read, read_part = [], FilePart.read
    monkeypatch.setattr(FilePart, "read", lambda part: read.append(part.name) or read_part(part))
    with Detector.load(model, backend="onnxruntime") as detector:
        for batch_size in (1, 2, 6):
            found = list(rows_of(detector, pictures, str(tmp_path), batch_size=batch_size))
            assert [row.source for row in found] == [f"s.tar/{place}" for place in range(6)]
            assert [row.error is None for row in found] == [member is fits for member in order]
    assert f"large: got {size + 1} bytes, wanted at most {size} bytes" in found[0].error
    assert read == ["fits"] * 6
    assert np.isclose(found[1].fake_probability, CALIBRATION.fake_probability(numpy_outputs(IMAGES[:1])["logits"])[0])


def test_members_that_wait_for_their_batch_are_not_in_memory(tmp_path, model):
    picture, count = io.BytesIO(), 60
    Image.new("RGB", (1000, 400)).save(picture, "BMP")
    content = picture.getvalue()
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for number in range(count):
            info = tarfile.TarInfo(f"{number}.bmp")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    pictures = list(pictures_of(str(tmp_path / "s.tar")))
    with Detector.load(model, backend="onnxruntime", threads=1) as detector:
        tracemalloc.start()
        try:
            found = list(rows_of(detector, pictures, str(tmp_path), batch_size=count // 3))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert [row.error for row in found] == [None] * count
    # Each decoding thread holds a file, and its pixels a second time; reading ahead would hold all sixty files.
    assert peak < (3 * MAX_DECODE_THREADS + 3) * len(content) < count * len(content) / 2


# Progress


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_gives_rate_and_remaining_time_and_a_log_gets_a_line_now_and_then(terminal):
    now = [0.0]
    stream = Stream(terminal)
    progress = Progress(1000, 400, stream, clock=lambda: now[0])
    for _ in range(300):
        now[0] += 0.25
        progress.advance(1, 0)
    progress.advance(100, 3)
    assert progress.line() == "800 of 1,000 (80 %), 5.33 a second, 38 s left, 3 failed"
    progress.close()
    text = stream.getvalue()
    assert text.count("\n") == (1 if terminal else 3)
    assert text.count("\r") == (151 if terminal else 0)
    assert "(52 %), 4 a second, 2 min left" in text


def test_progress_of_nothing_yet_claims_no_rate():
    assert Progress(10, 0, Stream(False), clock=lambda: 0.0).line() == "0 of 10 (0 %)"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (600, "10 min"), (12_000, "3 h 20 min"), (442_800, "5 d 3 h")]
)
def test_duration_is_told_in_units_for_people(seconds, text):
    assert duration(seconds) == text


def test_the_command_line_loads_nothing_more_for_the_new_command():
    code = "import sys, runtime.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "pyarrow", "ray", "PIL", "tarfile"} & {name.partition(".")[0] for name in loaded}
