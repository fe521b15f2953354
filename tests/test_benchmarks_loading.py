"""The benchmark of the loader: its table, and that it refuses to time batches that differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.bench_loading import BEGIN, END, README, main, require_same_batches, row
from train.loading import ViewBatch

ROOT = Path(__file__).parents[1]


def batch(value: int) -> ViewBatch:
    return ViewBatch(torch.full((2, 4, 4, 3), value), torch.zeros(2, 2, 2, 3), torch.zeros(2))


def test_sources_that_give_other_batches_are_not_timed() -> None:
    require_same_batches([batch(1), torch.ones(2)], [batch(1), torch.ones(2)])
    with pytest.raises(AssertionError, match="shards and folder give different batches"):
        require_same_batches([batch(1)], [batch(2)])
    with pytest.raises(ValueError, match="shorter"):
        require_same_batches([batch(1), batch(1)], [batch(1)])


def test_row_holds_median_and_spread() -> None:
    assert row("scoring", "model", 2, [1.0, 5.0, 3.0]) == {
        "what": "scoring",
        "source": "model",
        "count": 2,
        "images_per_s": 3.0,
        "iqr": 4.0,
        "rounds": 3,
    }
    assert row("scoring", "model", 1, [7.0])["iqr"] == 0.0


def test_readme_has_the_place_for_the_table() -> None:
    text = (ROOT / README).read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1


@pytest.mark.slow
def test_a_small_run_writes_every_row_and_the_table(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    results = tmp_path / "loading.json"
    threads = torch.get_num_threads()
    try:
        arguments = ["--pictures", "12", "--batch-size", "4", "--rounds", "1"]
        assert main([*arguments, "--results", str(results), "--readme", str(readme)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 + 3 * 2
    assert all(r["images_per_s"] > 0 for r in rows)
    text = readme.read_text()
    assert "| loader: training views, from shards |" in text
    assert "| stage 1 step, from folder |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
