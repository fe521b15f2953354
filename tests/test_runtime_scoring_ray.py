"""`ntf score --engine ray`: what a node does and what comes back, and the whole on a local cluster."""

from __future__ import annotations

import csv
import os
import sys

import pytest
from bundle_fixtures import random_images, write_bundle
from PIL import Image

from runtime.cli import main
from runtime.errors import BackendError, CollectionError, UsageError
from runtime.scoring import on_ray
from runtime.scoring.listing import picture_to_line
from runtime.scoring.on_ray import DetectorOptions, PartScorer, RayOptions
from runtime.scoring.rows import row_from_line
from runtime.scoring.sources import Picture
from runtime.scoring.tar_shards import Member
from runtime.scoring.work import Work

OPTIONS = DetectorOptions("onnxruntime", "fp32", base="", batch_size=4, threads=1)


class Store:
    """What a node uses of Ray: its object store, which here is the object itself."""

    get = staticmethod(lambda reference: reference)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_bundle(folder)
    return folder


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for number, rgb in enumerate(random_images(11)):
        Image.fromarray(rgb).save(tmp_path / "pictures" / f"{number:02}.png")
    (tmp_path / "pictures" / "05.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pictures"


@pytest.fixture
def packed(model, monkeypatch):
    monkeypatch.setattr(on_ray, "_import_ray", lambda: Store)
    return [on_ray._packed(model)]


def score(model, *arguments):
    options = ["--model", str(model), "--backend", "onnxruntime", "--threads", "1", "--part-size", "4"]
    return main(["score", "pictures", *options, *map(str, arguments)])


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same_rows(mine, theirs):
    for got, want in zip(read(mine), read(theirs), strict=True):
        assert [got[name] for name in ("source", "verdict", "error")] == [
            want[name] for name in ("source", "verdict", "error")
        ]
        for name in ("fake_probability", "trace_similarity"):
            assert (got[name] == want[name] == "") or float(got[name]) == pytest.approx(float(want[name]), abs=1e-6)


def test_a_node_gives_the_rows_of_its_part_as_the_local_engine_does(model, pictures, packed):
    assert score(model, "--out", "local.csv") == 1
    scorer = PartScorer(packed, DetectorOptions("onnxruntime", "fp32", os.getcwd(), 4, 1))
    lines = "\n".join(picture_to_line(Picture(f"pictures/{number:02}.png")) for number in range(11))
    answer = scorer({"part": [7], "lines": [lines]})
    assert (answer["part"], answer["error"]) == ([7], [""])
    rows = [row_from_line(line) for line in answer["rows"][0].splitlines()]
    with open("ray.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0]._fields)
        writer.writerows(rows)
    assert_same_rows("ray.csv", "local.csv")


def test_an_error_on_a_node_comes_back_as_it_was_raised(tmp_path, packed):
    refused = PartScorer(packed, DetectorOptions("onnxruntime", "int8", "", 4, 1))({"part": [0], "lines": ["[1]"]})
    with pytest.raises(BackendError, match="precision int8: got a bundle with these ONNX precisions: fp32"):
        on_ray._raise_error(refused["error"][0])
    shard = picture_to_line(Picture("s.tar/a.png", str(tmp_path / "s.tar"), Member("a.png", 0, 9)))
    with pytest.raises(CollectionError, match=r"s\.tar: got a file that cannot be read"):
        on_ray._raise_error(PartScorer(packed, OPTIONS)({"part": [0], "lines": [shard]})["error"][0])
    on_ray._raise_error("")


def test_what_auto_means_is_found_out_on_a_worker(model):
    from runtime.bundle import open_bundle

    manifest = open_bundle(model).manifest
    assert '"backend": "onnxruntime", "precision": "fp32"' in on_ray._resolved(manifest, "onnxruntime", "auto", 8)
    assert "BackendError" in on_ray._resolved(manifest, "onnxruntime", "fp16", 8)


@pytest.mark.parametrize(
    ("resources", "options", "workers"),
    [
        ({"CPU": 9.0}, RayOptions(threads=4), 2),
        ({"CPU": 64.0, "GPU": 2.0}, RayOptions(gpus=0.5), 4),
        ({"CPU": 1.0}, RayOptions(threads=4), 1),
        ({}, RayOptions(gpus=1), 1),
    ],
)
def test_there_are_as_many_detectors_as_there_is_room_for(resources, options, workers):
    class Cluster:
        available_resources = staticmethod(lambda: resources)

    assert on_ray._free_workers(Cluster, options) == workers


def test_ray_that_is_not_installed_is_named_with_the_command(model, pictures, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert score(model, "--out", "r.csv", "--engine", "ray") == 2
    assert 'no package ray, wanted a working installation: pip install "ntf-toolkit[ray]"' in capsys.readouterr().err
    assert sorted(os.listdir()) == ["pictures"]


def test_a_cluster_that_is_not_there_is_refused(monkeypatch):
    class Absent:
        is_initialized = staticmethod(lambda: False)

        @staticmethod
        def init(address, **options):
            assert address == "10.0.0.1:6379"
            assert "include_dashboard" not in options
            raise ConnectionError("nobody answers")

    monkeypatch.setattr(on_ray, "_import_ray", lambda: Absent)
    with (
        pytest.raises(UsageError, match=r"--ray-address 10\.0\.0\.1:6379: got no cluster \(nobody answers\)"),
        on_ray.ray_cluster(RayOptions("10.0.0.1:6379")),
    ):
        pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_local_cluster_gives_the_rows_of_the_local_engine_and_goes_on_where_that_one_stopped(
    model, pictures, monkeypatch, capsys
):
    kept = []

    def stop_after_one(work, number, rows):
        if kept:
            raise KeyboardInterrupt
        kept.append(number)
        commit(work, number, rows)

    assert score(model, "--out", "local.csv") == 1
    commit = Work.commit
    with monkeypatch.context() as patch:
        patch.setattr(Work, "commit", stop_after_one)
        assert score(model, "--out", "both.csv") == 130
    capsys.readouterr()
    with on_ray.ray_cluster(RayOptions()):  # one for both runs
        assert score(model, "--out", "ray.csv", "--engine", "ray", "--workers", "2") == 1
        assert score(model, "--out", "both.csv", "--engine", "ray") == 1
    assert capsys.readouterr().err.count("11 of 11 (100 %)") == 2
    assert kept == [0]
    assert_same_rows("ray.csv", "local.csv")
    assert_same_rows("both.csv", "local.csv")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
