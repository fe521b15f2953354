"""The benchmark of JPEG files to verdicts: its ratios, its checks, and that docs/speed.md shows what is committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_speed
from benchmarks.bench_speed import (
    BEGIN,
    DOCUMENT,
    END,
    LARGE,
    PROMISES,
    RESULTS,
    STREAM,
    SpeedBenchmarkError,
    Timing,
    checks,
    main,
    markdown,
    raced,
    require_same_verdicts,
    rows,
)
from benchmarks.torch_scoring import REFERENCE

ROOT = Path(__file__).parents[1]


def made_rows(times_faster):
    numbers = {"median_ms": 1.0, "iqr_ms": 0.2, "times_faster": times_faster, "times_less_processor": 2.0, "rounds": 3}
    return [{"workload": promise.workload, "contender": promise.contender} | numbers for promise in PROMISES]


def test_ratio_is_taken_within_a_round_and_time_for_one_picture():
    base, fast = [(4.0, 6.0), (40.0, 6.0), (8.0, 9.0)], [(1.0, 2.0), (20.0, 3.0), (1.0, 1.0)]
    timings = {REFERENCE: [Timing(*pair) for pair in base], "fast": [Timing(*pair) for pair in fast]}
    found = rows(LARGE, timings, pictures=2)
    assert [row["times_faster"] for row in found] == [1.0, 4.0]
    assert [row["times_less_processor"] for row in found] == [1.0, 3.0]
    assert [row["median_ms"] for row in found] == [4000.0, 500.0]


def test_contenders_take_turns_and_another_one_begins_each_round():
    order = []
    taking_part = {name: lambda files, name=name: order.append(name) for name in "abc"}
    timings = raced(taking_part, [], rounds=3)
    assert "".join(order) == "abcbcacab"
    assert [len(found) for found in timings.values()] == [3, 3, 3]


def test_contenders_that_decide_otherwise_are_not_timed():
    require_same_verdicts({REFERENCE: ["real", "fake"], "other": ["real", "fake"]})
    with pytest.raises(SpeedBenchmarkError, match="other: 1 of 2 verdicts are not those of Pillow"):
        require_same_verdicts({REFERENCE: ["real", "fake"], "other": ["real", "uncertain"]})
    with pytest.raises(SpeedBenchmarkError, match="calls every picture real"):
        require_same_verdicts({REFERENCE: ["real", "real"]})


def test_promise_is_met_from_its_bound_on():
    assert all(check["met"] for check in checks(made_rows(4.0)))
    missed = [check for check in checks(made_rows(3.99)) if not check["met"]]
    assert {(check["workload"], check["at_least"]) for check in missed} == {(LARGE, 4.0)}
    assert {check["workload"] for check in checks(made_rows(1.0))} == {LARGE, STREAM}


@pytest.mark.parametrize(("times_faster", "status", "word"), [(9.0, 0, "| met |"), (1.0, 1, "| NOT MET |")])
def test_command_writes_everything_and_fails_where_a_promise_is_not_kept(
    tmp_path, monkeypatch, times_faster, status, word
):
    monkeypatch.setattr(bench_speed, "measured", lambda folder, **options: made_rows(times_faster))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    document = tmp_path / "speed.md"
    document.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    arguments = ["--results", str(tmp_path / "speed.json"), "--document", str(document)]
    assert main(arguments) == status
    written = json.loads((tmp_path / "speed.json").read_text())
    assert markdown(written) in document.read_text()
    assert word in document.read_text()
    assert document.read_text().endswith("after\n")


@pytest.mark.parametrize("arguments", [["--rounds", "1"], ["--pictures", "5"], ["--pictures", "2"]])
def test_too_few_rounds_or_pictures_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "wanted 2 --rounds or more" in capsys.readouterr().err


def test_threads_that_would_spin_are_refused(monkeypatch, capsys):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "wanted OMP_WAIT_POLICY=passive" in capsys.readouterr().err


def test_document_shows_the_committed_results_and_every_promise_is_kept_in_them():
    results = json.loads((ROOT / RESULTS).read_text(encoding="utf-8"))
    assert markdown(results) in (ROOT / DOCUMENT).read_text(encoding="utf-8")
    assert results["checks"] == checks(results["rows"])
    assert all(check["met"] for check in results["checks"])
