"""The code of docs/runtime.md runs as it stands there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench_runtime import BEGIN, DOCUMENT, END

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / DOCUMENT).read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
VERDICTS = ("real", "uncertain", "fake")


@pytest.fixture
def folder(tiny_bundle, tmp_path, monkeypatch):
    """What the document says is there."""
    for model in ("demo", "next"):
        shutil.copytree(tiny_bundle, tmp_path / "models" / model)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)


def test_code_of_the_document_runs_and_prints_verdicts(folder, capsys):
    names = {}
    for block in BLOCKS:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    first, second, third, waited, both, swapped, counted = capsys.readouterr().out.splitlines()
    assert (first.split()[0], second.split()[0]) == ("a.png", "b.jpg")
    assert {first.split()[1], second.split()[1], waited} <= set(VERDICTS)
    assert third.startswith("missing.png missing.png: got no such file")
    assert [verdict in VERDICTS for verdict in re.findall(r"\w+", both)] == [True, True]
    assert swapped == "tiny None None"
    assert counted == "2 0 True"
    assert names["metrics"].pictures == 2


def test_table_has_its_place():
    assert TEXT.count(BEGIN) == TEXT.count(END) == 1
