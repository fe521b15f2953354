"""Calibration pictures and what is measured on them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from exported import pictures

from export.calibration import PreparedPictures, calibration_pictures
from export.errors import ExportError
from runtime.preprocess import PreprocessSpec
from train.data import load_split

SPEC = PreprocessSpec(160, 160)


@pytest.fixture
def validation():
    return load_split(pictures(), "val")


def test_the_list_is_fixed_evenly_spaced_and_hashed(validation):
    chosen = calibration_pictures(validation, SPEC, limit=8)
    assert chosen == calibration_pictures(validation, SPEC, limit=8)
    assert len(chosen) == 8
    assert [record.label for record in chosen.pictures.records].count(1) == 4
    assert chosen.pictures.records[0] == validation.records[0]
    assert chosen.pictures.records[-1] == validation.records[-1]
    assert chosen.sha256 != calibration_pictures(validation, SPEC, limit=7).sha256


def test_a_limit_above_the_number_of_pictures_takes_each_once(validation):
    chosen = calibration_pictures(validation, SPEC, limit=1000)
    assert chosen.pictures.records == validation.records
    assert chosen.sha256 == validation.content_sha256()


def test_batches_are_prepared_in_order_and_again_at_each_call(validation):
    chosen = calibration_pictures(validation, SPEC, limit=5)
    first, second = (list(chosen.batches(2)) for _ in range(2))
    assert [batch.shape for batch in first] == [(2, 160, 160, 3), (2, 160, 160, 3), (1, 160, 160, 3)]
    assert all(batch.dtype == np.uint8 for batch in first)
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))


def test_a_picture_that_does_not_decode_stops_the_export(tmp_path):
    folder = shutil.copytree(pictures(), tmp_path / "pictures")
    broken = sorted(folder.rglob("val/**/*.png"))[3]
    broken.write_bytes(b"not a picture")
    chosen = PreparedPictures(load_split(folder, "val"), SPEC, "0" * 64)
    with pytest.raises(ExportError, match=f"picture .*{broken.name}: got"):
        list(chosen.batches())


def test_the_listing_names_every_picture_with_its_label_and_hash(validation):
    chosen = calibration_pictures(validation, SPEC, limit=4)
    listed = json.loads(chosen.listing())
    assert listed["sha256"] == chosen.sha256
    assert [(e["name"], e["label"]) for e in listed["pictures"]] == [
        (r.path.relative_to(validation.root).as_posix(), r.label) for r in chosen.pictures.records
    ]
    first = chosen.pictures.records[0]
    assert listed["pictures"][0]["sha256"] == hashlib.sha256(first.path.read_bytes()).hexdigest()


def test_another_picture_changes_the_hash(validation):
    fewer = replace(validation, records=validation.records[1:])
    assert calibration_pictures(fewer, SPEC).sha256 != calibration_pictures(validation, SPEC).sha256
