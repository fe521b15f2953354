"""The INT8 graph that a run keeps, and what makes it that of another search."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from bundle_fixtures import CALIBRATION, tiny_graph
from exported import pictures

from export.budget import Budget, Cost
from export.calibration import PreparedPictures
from export.errors import ExportError
from export.graph import copy_of, initializers, model_bytes, store
from export.int8 import Int8Search, LayerSensitivity, Step
from export.int8_kept import KeptInt8, saying_what_is_kept, search_key
from runtime.preprocess import PreprocessSpec
from train.data import load_split
from train.equalize import EqualizeConfig

MODEL = onnx.load_from_string(tiny_graph())
UNUSABLE = Cost("openvino", 40, {"all": math.inf}, math.inf, 100.0, math.inf, math.inf, ("logits that differ",))
SEARCH = Int8Search(
    calibrators={"mse": 0.1, "minmax": 0.2},
    calibrator="mse",
    sensitivities=(LayerSensitivity("conv", 21.5, 0.3, 0.25), LayerSensitivity("add", None, 0.1, 0.0)),
    steps=(
        Step(0, 0.9, 1000, (UNUSABLE,), ("AP inf points, at most 0.50 on openvino",)),
        Step(1, 0.8, 1100, (Cost("onnxruntime", 40, {"gan": None, "all": 0.25}, -0.5, 0.0, 0.125, 0.1),), ()),
    ),
    returned={"conv": "returned by the accuracy budget"},
)


@pytest.fixture(scope="module")
def calibration():
    return PreparedPictures(load_split(pictures(), "val"), PreprocessSpec(160, 160), "0" * 64).evenly_spaced(8)


class Told:
    """What a key asks of a judge."""

    def __init__(self, pictures):
        self.pictures, self.backends = pictures, ["onnxruntime", "openvino"]
        self.budget = Budget(ap=0.5, accuracy=1.0, flips=0.5, ece=2.0)
        self.run_calibration = CALIBRATION


def test_a_graph_comes_back_with_how_it_was_found(tmp_path):
    kept, said = KeptInt8(tmp_path / "report" / "kept.npz", "a" * 64), []
    assert kept.load(said.append) is None
    kept.save(MODEL, SEARCH, said.append)
    assert said == []
    model, search = kept.load(said.append)
    assert model_bytes(model) == model_bytes(MODEL)
    assert search == SEARCH
    assert said == [f"INT8 as an earlier export of the same found it: {kept.path}"]
    assert replace(kept, key="b" * 64).load(said.append) is None
    assert [path.name for path in kept.path.parent.iterdir()] == ["kept.npz"]


def test_a_damaged_file_is_said_and_not_used(tmp_path):
    kept, said = KeptInt8(tmp_path / "kept.npz", "a" * 64), []
    kept.save(MODEL, SEARCH, said.append)
    whole = kept.path.read_bytes()
    middle = len(whole) // 2
    for data in (b"", b"no archive", whole[:-100], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        kept.path.write_bytes(data)
        assert kept.load(said.append) is None
        assert "kept.npz cannot be used" in said.pop()


def test_a_graph_that_cannot_be_kept_is_a_note(tmp_path):
    (tmp_path / "report").write_text("in the way")
    said = []
    KeptInt8(tmp_path / "report" / "kept.npz", "a" * 64).save(MODEL, SEARCH, said.append)
    assert "note: the INT8 graph could not be kept" in said[0]


def test_the_key_changes_with_everything_that_a_search_depends_on(calibration, monkeypatch):
    judge = Told(calibration)
    options = {"calibrator": "auto", "smallest_share": 0.5}

    def key(model=MODEL, pictures=calibration, judge=judge, **changes):
        return search_key(model, pictures, judge, **options | changes)

    def judged(**changes):
        other = Told(calibration)
        vars(other).update(changes)
        return key(judge=other)

    other_weights = copy_of(MODEL)
    name = next(iter(initializers(other_weights)))
    store(other_weights, name, np.zeros(initializers(other_weights)[name].dims, np.float32))
    fewer = calibration.evenly_spaced(4)
    equalized = tuple(replace(record, equalize=EqualizeConfig()) for record in calibration.pictures.records)
    keys = [
        key(),
        key(other_weights),
        key(pictures=fewer),
        key(pictures=replace(calibration, pictures=replace(calibration.pictures, records=equalized))),
        key(pictures=replace(calibration, spec=PreprocessSpec(128, 128))),
        key(calibrator="mse"),
        key(smallest_share=0.4),
        judged(pictures=fewer),
        judged(backends=["onnxruntime"]),
        judged(budget=replace(judge.budget, flips=1.0)),
        judged(run_calibration=replace(judge.run_calibration, bias=9.0)),
    ]
    assert key() == keys[0]
    monkeypatch.setattr("export.int8_kept.environment", lambda: {"versions": {"onnxruntime": "0"}})
    keys.append(key())
    monkeypatch.setattr("export.int8_kept.machine", lambda: {"cpu": "another"})
    keys.append(key())
    monkeypatch.setattr("export.int8_kept._code_sha256", lambda: "edited")
    keys.append(key())
    assert len(set(keys)) == len(keys) == 14


@pytest.mark.parametrize("there", [True, False])
def test_what_fails_after_a_search_says_that_its_result_is_kept(tmp_path, there):
    path = tmp_path / "kept.npz"
    if there:
        path.touch()
    for named in (path, None):
        with pytest.raises(ExportError, match="int8 engine: got nothing") as error, saying_what_is_kept(named):
            raise ExportError("int8 engine", got="nothing", wanted="an engine", remedy="try again")
        assert (f"is kept in {path}: the same export takes it" in error.value.remedy) == (there and named is not None)
        assert error.value.remedy.startswith("try again")
