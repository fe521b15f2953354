"""The table at the end of the demo is made from the reports, and says which one is missing."""

from __future__ import annotations

import pytest

from export.errors import ExportError
from export.summary import graph_sizes, main, precision_table, read_report
from runtime.bundle import open_bundle

COMPARISON = {
    "precision": "fp32",
    "backend": "onnxruntime",
    "pictures": 20,
    "logit_diff_max": 0.00123,
    "ap_change_points": None,
    "verdict_flips": 1,
    "opposite_verdicts": 0,
    "passed": True,
}


def test_precision_table_has_one_line_per_comparison(tiny_bundle):
    sizes = graph_sizes(open_bundle(tiny_bundle).manifest.artifacts)
    failed = COMPARISON | {"backend": "openvino", "ap_change_points": -0.5, "passed": False}
    head, first, second = precision_table([COMPARISON, failed], sizes).splitlines()
    assert head.split()[0] == "precision"
    assert first.split()[:2] == ["fp32", "onnxruntime"]
    assert "1.2e-03" in first
    assert "n/a" in first
    assert "1 of 20" in first
    assert first.endswith("pass")
    assert "-0.50" in second
    assert second.endswith("FAIL")


def test_an_int8_graph_for_engines_has_a_line_and_a_size_of_its_own():
    rows = [COMPARISON | {"precision": "int8", "remainder": remainder} for remainder in ("fp32", "fp16")]
    _, first, second = precision_table(rows, {"int8": 4_000_000, "int8+fp16": 3_000_000}).splitlines()
    assert (first.split()[0], first.split()[2]) == ("int8", "4.0")
    assert (second.split()[0], second.split()[2]) == ("int8+fp16", "3.0")


def test_missing_report_names_the_command_that_writes_it(tmp_path, tiny_bundle, capsys):
    with pytest.raises(ExportError, match=r"run python -m train\.evaluate first"):
        read_report(tmp_path, tmp_path / "evaluation.json", "train.evaluate")
    assert main(["--run", str(tmp_path), "--model", str(tiny_bundle)]) == 1
    assert "run python -m train.evaluate first" in capsys.readouterr().err
