"""The table of quantised encoders, and the list of pictures that it is measured on."""

from __future__ import annotations

import csv
import json

from training import write_pictures

from benchmarks import quantization
from benchmarks.quantization import Options, save_results, table, write_list


def entry(encoder, weights):
    cost = {"ap": {"a": 0.25, "b": None}, "flips": 1.5}
    steps = [
        {"returned": 0, "int8_share": 0.98, "excess": ["AP"], "costs": [cost]},
        {"returned": 2, "int8_share": 0.9, "excess": [], "costs": [cost, cost | {"flips": 2.0}]},
        {"returned": 1, "int8_share": 0.95, "excess": ["AP"], "costs": [cost]},
    ]
    graph = {"format": "onnx", "remainder": "fp32"}
    return {
        "encoder": encoder, "weights": weights, "budget": {"ap": 1.0, "flips": 3.5},
        "validation_ap": 0.875, "calibrator": "mse", "steps": steps,
        "artifacts": [
            graph | {"precision": "fp32", "size_bytes": 2_000_000},
            graph | {"precision": "int8", "size_bytes": 600_000},
            {"format": "engine", "precision": "int8", "remainder": "fp32", "size_bytes": 1, "layers": {"a": 3, "b": 4}},
        ],
    }  # fmt: skip


def test_a_row_shows_the_graph_that_fits_and_where_it_costs_most():
    environment = {"machine": {"cpu": "a CPU"}, "versions": {"onnxruntime": "1.31", "openvino": "2026.4"}}
    results = {"encoders": [entry("resnet50", "none")], "pictures": 60, "environment": environment}
    text = table(results)
    assert "| resnet50, random | 87.5 | mse | 2 | 90 % | +0.25 (1) | 2.00 (3.5) | 2.0 / 0.6 | 7 |" in text
    assert "a CPU, 60 validation pictures" in text
    assert "onnxruntime 1.31, openvino 2026.4." in text


def test_the_list_has_half_of_each_class_and_no_picture_twice(tmp_path):
    data = write_pictures(tmp_path / "data", counts={"train": 4, "val": 6})
    path = write_list(Options(data=data, out=tmp_path / "out", train=4, val=100))
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len({row["path"] for row in rows}) == len(rows)
    assert [row["split"] for row in rows].count("train") == 4
    assert [row["label"] for row in rows if row["split"] == "val"] == ["0"] * 6 + ["1"] * 6


def test_figures_of_other_encoders_stay_where_they_were_measured_likewise(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "RESULTS", tmp_path / "quantization.json")
    options = Options(data=tmp_path)
    for name in ("legacy_xception", "resnet50", "resnet50"):
        save_results(options, entry(name, "none"))
    assert encoders_in(tmp_path) == ["resnet50", "legacy_xception"]
    save_results(Options(data=tmp_path, val=30), entry("vit_tiny_patch16_224", "none"))
    assert encoders_in(tmp_path) == ["vit_tiny_patch16_224"]


def encoders_in(folder):
    return [row["encoder"] for row in json.loads((folder / "quantization.json").read_text())["encoders"]]
