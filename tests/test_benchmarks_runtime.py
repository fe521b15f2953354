"""The benchmark of what the runtime costs: its rows and limits, its table, and a small run of all of it."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_runtime
from benchmarks.bench_runtime import BEGIN, END, FIRST, IMPORT, OVERHEAD, SERVICE, main, row


@pytest.mark.parametrize(
    ("what", "values", "kept"),
    [
        (OVERHEAD, [1.0, 1.05, 9.0], True),
        (OVERHEAD, [1.0, 1.2, 1.3], False),
        (FIRST, [1500.0], True),
        (IMPORT, [100.1], False),
        (SERVICE, [3.0], True),
    ],
)
def test_median_is_held_to_its_limit(what, values, kept):
    found = row(what, "case", values)
    assert found["kept"] is kept
    assert found["rounds"] == len(values)
    assert found["median"] == sorted(values)[len(values) // 2]


def test_table_is_written_and_broken_limits_are_named(tiny_bundle, tmp_path, capsys, monkeypatch):
    document = tmp_path / "runtime.md"
    document.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    rows = [row(FIRST, "openvino", [900.0]), row(OVERHEAD, "onnxruntime, batch 8", [1.0, 1.25, 1.25])]
    monkeypatch.setattr(bench_runtime, "measured", lambda model, rounds: rows)
    arguments = ["--model", str(tiny_bundle), "--results", str(tmp_path / "r.json"), "--document", str(document)]
    assert main(arguments) == 1
    assert capsys.readouterr().err == "Detector / engine, onnxruntime, batch 8: 1.25, wanted at most 1.1\n"
    assert "| first verdict | openvino | 900 ± 0 ms | 1500 ms |" in document.read_text()
    assert "| Detector / engine | onnxruntime, batch 8 | 1.25 ± 0.12 | 1.10 |" in document.read_text()
    del rows[1]
    assert main(arguments) == 0


@pytest.mark.slow
def test_small_run_measures_every_row_on_a_real_bundle(tiny_bundle, tmp_path, monkeypatch):
    # A tiny graph takes no time, so its overhead is any number; a limit below every ratio has to be reported.
    monkeypatch.setattr(bench_runtime, "LIMITS", {IMPORT: 1e6, FIRST: 1e6, OVERHEAD: 0.0})
    results = tmp_path / "runtime.json"
    assert main(["--model", str(tiny_bundle), "--rounds", "1", "--results", str(results)]) == 1
    found = json.loads(results.read_text())
    assert {(r["what"], r["kept"]) for r in found["rows"]} == {
        (IMPORT, True), (FIRST, True), (OVERHEAD, False), (SERVICE, True)
    }  # fmt: skip
    assert len(found["rows"]) == 3 + 2 + 2 * 2 * 2
    assert all(r["median"] > 0 for r in found["rows"])
    assert found["settings"] == {"model": "tiny", "rounds": 1, "picture_px": 256}


def test_program_that_fails_is_not_timed():
    with pytest.raises(bench_runtime.subprocess.CalledProcessError):
        bench_runtime.output_of("-c", "raise SystemExit(3)")
