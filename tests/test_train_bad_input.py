"""What cannot be trained on, evaluated or audited ends each command with status 2 and one sentence, before any work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.manifest import CalibrationSpec
from train.audit import main as audit
from train.checkpoint import save_calibration
from train.evaluate import main as evaluate
from train.run import main as train

TRAIN, EVALUATE, AUDIT = "train.run", "train.evaluate", "train.audit"
ALL = (TRAIN, EVALUATE, AUDIT)
LAYOUTS = r"wanted pictures in folders 0_real \| 1_fake"


def write(folder: Path, *names: str) -> None:
    for name in names:
        for number in range(4):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), len(name) + number, np.uint8)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Collections that cannot be used, and the calibration of a run, all that is looked at before they are."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    write(root / "one", "train/0_real", "val/0_real", "test/0_real")
    write(root / "noval", "train/0_real", "train/1_fake")
    write(root / "oneval", "train/0_real", "train/1_fake", "val/0_real", "test/0_real")
    write(root / "few", "train/0_real", "train/1_fake", "val/0_real", "val/1_fake")
    fake = "few/train/1_fake/0.png"
    (root / "unreadable.csv").symlink_to("/proc/self/mem")  # opens, and then fails as a broken disk does
    (root / "unreadable.json").symlink_to("/proc/self/mem")
    (root / "latin.csv").write_bytes("path,label\ncaf\xe9.png,0\n".encode("latin-1"))
    (root / "header.csv").write_text(f"file,class\n{fake},1\n")
    (root / "broken.json").write_text('[{"path": ')
    (root / "label.csv").write_text(f"path,label\n{fake},2\n")
    (root / "label.json").write_text(json.dumps([{"path": fake, "label": 2}]))
    (root / "run").mkdir()
    save_calibration(root / "run", CalibrationSpec(1.0, 0.0, 0.0, 0.0, 0.1, 0.1))
    return root


def status_of(command: str, data: Path, place: Path, out: Path) -> int:
    if command == TRAIN:
        return train(["--data", str(data), "--device", "cpu", "--out", str(out)])
    if command == EVALUATE:
        return evaluate(["--data", str(data), "--run", str(place / "run"), "--out", str(out), "--no-progress"])
    return audit(["--data", str(data), "--no-progress"])


CASES = [
    (ALL, "gone", rf"picture collection \S+gone: got nothing at that path, {LAYOUTS}.*: check the path"),
    (ALL, "empty", rf"folder \S+empty: got no picture at all, {LAYOUTS}.*: check the path; suffixes looked for: "),
    ((TRAIN, EVALUATE), "one", r"one: got 12 pictures, all of them real .*: add the fake pictures or check the"),
    (ALL, "unreadable.csv", r"\.csv: got a list that cannot be read .*Input/output error.*, wanted UTF-8 CSV: save"),
    (ALL, "unreadable.json", r"\.json: got a list that cannot be read .*Input/output error.*, wanted \[.*: save it"),
    (ALL, "latin.csv", r"latin\.csv: got a list that cannot be read \('utf-8' .*, wanted UTF-8 CSV: save it again"),
    (ALL, "header.csv", r"got line 1: columns file, class, wanted a header with each column once, path and label amo"),
    (ALL, "broken.json", r"broken\.json: got a list that cannot be read .*, wanted \[.*: save it again as UTF-8 JSON"),
    (ALL, "label.csv", r"label\.csv: got line 2: label '2' is none of 0, 1, .*: correct those lines; paths count from"),
    (ALL, "label.json", r"label\.json: got entry 1: label 2 is neither 0 \(real\) nor 1 \(fake\), wanted \[.*: cor"),
    ((TRAIN,), "noval", r"split 'val' of \S+noval: got .*splits there: train"),
    ((EVALUATE,), "noval", r"split 'test' of \S+noval: got .*splits there: train"),
    ((TRAIN,), "oneval", r"split 'val' of \S+oneval: got 4 pictures, all of them real"),
    ((TRAIN,), "few", r"calibration: got 4 real images cannot resolve a rate of 0.01, 100 are needed for empirical "
     r"thresholds, wanted .*: add validation pictures, or choose larger rates with --real-flagged-rate"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        pytest.param(command, name, message, id=f"{command}-{name}")
        for commands, name, message in CASES
        for command in commands
    ],
)
def test_bad_data_end_the_command_with_a_sentence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str, message: str
) -> None:
    assert status_of(command, place / name, place, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert re.search(message, told), told
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"temperature": "hot"}'])
def test_damaged_calibration_ends_the_evaluation_with_a_sentence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "calibration.json").write_text(content)
    assert evaluate(["--data", str(place / "few"), "--run", str(tmp_path)]) == 2
    assert "error: " in (told := capsys.readouterr().err)
    assert "calibration.json" in told
    assert ": got " in told


def test_place_for_results_that_cannot_be_written_is_said_before_the_work(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, below_a_file = ["--data", str(place / "few")], place / "label.csv" / "out"
    done = [
        train([*few, "--out", str(below_a_file)]),
        evaluate([*few, "--split", "all", "--run", str(place / "run"), "--no-progress", "--out", str(below_a_file)]),
        audit([*few, "--json", str(below_a_file / "audit.json"), "--no-progress"]),
    ]
    assert done == [2, 2, 2]
    told = capsys.readouterr().err.splitlines()
    options = ("--out", "--out", "--json")
    assert told == [
        f"error: {option} {below_a_file}: got Not a directory, wanted a folder to write into: name another one"
        for option in options
    ]


def test_resume_of_nothing_says_what_was_looked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, found in (("gone", "no such folder"), ("empty", "a folder without config.json")):
        assert train(["--resume", str(place / name)]) == 2
        told = capsys.readouterr().err
        assert f"{name}: got {found}, wanted a run with config.json: name a folder that python -m train.run" in told
