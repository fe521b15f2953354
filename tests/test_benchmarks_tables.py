"""The README's tables come from the committed results file, and the condensing is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import demo_table
from benchmarks.tables import BEGIN, END, README, RESULTS, condensed, main, markdown, with_tables

ROOT = Path(__file__).parents[1]


def entry(group, name, median, *, baseline=False):
    return {
        "group": group,
        "name": name,
        "extra_info": {"baseline": baseline},
        "stats": {"median": median, "iqr": median / 10, "rounds": 7},
    }


def test_ratios_are_taken_to_the_baseline_of_the_same_group():
    raw = [entry("a", "slow", 0.2, baseline=True), entry("a", "fast", 0.05), entry("b", "other", 1.0, baseline=True)]
    rows = condensed({"benchmarks": raw})
    assert [(row["name"], row["times_faster"]) for row in rows] == [("slow", 1.0), ("fast", 4.0), ("other", 1.0)]
    assert rows[1]["median_ms"] == 50.0


@pytest.mark.parametrize("baselines", [0, 2])
def test_group_without_exactly_one_baseline_is_refused(baselines):
    raw = [entry("a", str(i), 0.1, baseline=i < baselines) for i in range(3)]
    with pytest.raises(ValueError, match=f"has {baselines} baselines"):
        condensed({"benchmarks": raw})


def test_tables_replace_what_stood_between_the_markers():
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_tables(document, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="once each, in this order"):
        with_tables("no markers", "new")


def test_command_writes_results_and_readme(tmp_path):
    raw, results, readme = tmp_path / "raw.json", tmp_path / "out" / "cpu.json", tmp_path / "README.md"
    raw.write_text(json.dumps({"benchmarks": [entry("a", "only", 0.01, baseline=True)]}))
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert main([str(raw), "--results", str(results), "--readme", str(readme)]) == 0
    written = json.loads(results.read_text())
    assert written["environment"]["machine"]["cores"] >= 1
    assert "| only | 10.00 ms | 1.00 ms | 1.00 |" in readme.read_text()


def test_readme_shows_the_committed_results():
    results = json.loads((ROOT / RESULTS).read_text())
    assert markdown(results) in (ROOT / README).read_text()


def test_readme_shows_the_committed_demo():
    results = json.loads((ROOT / demo_table.RESULTS).read_text())
    assert demo_table.markdown(results) in (ROOT / README).read_text()
