"""Which variants a study has, and what is refused before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import pytest
from PIL import Image
from training import tiny_config

from cpp_ext.reference import Denominator, Form
from train.ablation_plan import changes_of, check_plan, load_plan
from train.config import preset_config
from train.errors import ConfigError, DataError
from train.losses import HomReduction, Orthogonality
from train.model import ClassifierInput


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three generators and a set of real pictures alone, of which nothing but the names is looked at."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for generator, folders in {"a": (0, 1), "b b": (0, 1), "c": (1,), "photos": (0,)}.items():
            for label in folders:
                folder = root / split / generator / ("0_real", "1_fake")[label]
                folder.mkdir(parents=True)
                for number in range(4):
                    colour = (number, label, len(split) * 10 + ord(generator[0]))
                    Image.new("RGB", (2, 2), colour).save(folder / f"{number}.png")
    return root


@pytest.fixture
def base(data):
    return tiny_config(data)


def plan(tmp_path, content, base):
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_plan(str(path), base)


def test_architecture_study_leaves_out_the_parts_of_the_papers_figure_3(base):
    variants = load_plan("architecture", base).variants
    assert {name: changes_of(base, config) for name, config in variants.items()} == {
        "full": {},
        "no-orth": {"loss.lambda_orth": 0.0},
        "no-het-no-orth": {"loss.lambda_het": 0.0, "loss.lambda_orth": 0.0},
        "no-scl": {"loss.scl_weight": 0.0},
    }


def test_options_study_has_every_other_value_of_every_named_option_once(base):
    variants = load_plan("options", base).variants
    changes = [changes_of(base, config) for config in variants.values()]
    assert changes[0] == {}
    assert all(len(change) == 1 for change in changes[1:])
    expected = {
        *(("loss.hom_reduction", value) for value in get_args(HomReduction)),
        *(("loss.orth", value) for value in get_args(Orthogonality)),
        *(("loss.scl_form", value) for value in get_args(Form)),
        *(("loss.scl_denominator", value) for value in get_args(Denominator)),
        *(("model.classifier_input", value) for value in get_args(ClassifierInput)),
        ("stage1.train_encoder", False),
        ("stage2.scl_crop", 160),
        ("stage2.trace_crop", "scl"),
    }
    own = {
        (f"{part}.{name}", value)
        for part, name, value in (
            ("loss", "hom_reduction", "max"),
            ("loss", "orth", "square"),
            ("loss", "scl_form", "log_sum"),
            ("loss", "scl_denominator", "all"),
            ("model", "classifier_input", "projection"),
        )
    }
    assert {item for change in changes for item in change.items()} == expected - own
    assert "hom-reduction=topk" in variants


def test_options_study_leaves_crops_alone_where_the_encoder_has_one_size(data):
    base = tiny_config(data, encoder="test_vit")
    base = dataclasses.replace(base, stage2=dataclasses.replace(base.stage2, scl_crop=160))
    assert not any(name.startswith("scl-crop") for name in load_plan("options", base).variants)


def test_data_study_takes_other_sources_and_fewer_originals_and_keeps_real_sets(base):
    variants = load_plan("data", base).variants
    assert {name: changes_of(base, config) for name, config in variants.items()} == {
        "all": {},
        "without-a": {"train_generators": ["b b", "c", "photos"]},
        "without-b_b": {"train_generators": ["a", "c", "photos"]},
        "without-c": {"train_generators": ["a", "b b", "photos"]},
        "only-a": {"train_generators": ["a", "photos"]},
        "only-b_b": {"train_generators": ["b b", "photos"]},
        "only-c": {"train_generators": ["c", "photos"]},
        "half-of-originals": {"train_share": 0.5},
        "quarter-of-originals": {"train_share": 0.25},
    }
    check_plan(load_plan("data", base))


def test_data_study_of_two_generators_or_one_has_no_variant_twice(base):
    two = load_plan("data", dataclasses.replace(base, train_generators=("a", "b b"))).variants
    assert list(two) == ["all", "only-a", "only-b_b", "half-of-originals", "quarter-of-originals"]
    one = load_plan("data", dataclasses.replace(base, train_generators=("a",))).variants
    assert list(one) == ["all", "half-of-originals", "quarter-of-originals"]


def test_data_study_of_a_single_original_has_no_smaller_share(tmp_path):
    for split in ("train", "val"):
        for label, folder in enumerate(("0_real", "1_fake")):
            path = tmp_path / split / "a" / folder / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (2, 2), (label, len(split), 0)).save(path)
    assert list(load_plan("data", tiny_config(tmp_path)).variants) == ["all"]


def test_plan_changes_base_and_then_variant_and_sets_what_a_method_fixes(base, tmp_path):
    found = plan(
        tmp_path,
        {
            "base": {"loss": {"eta": 0.25}, "model": {"classifier_input": "both"}},
            "variants": {"ntf": {"stage2": {"epochs": 3}}, "probe": {"method": "probe"}},
            "chosen_on": ["a"],
        },
        base,
    )
    assert (found.study, found.chosen_on) == ("plan", ("a",))
    assert {config.loss.eta for config in found.variants.values()} == {0.25}
    assert found.variants["ntf"].stage2 == dataclasses.replace(base.stage2, epochs=3)
    assert found.variants["probe"].model.classifier_input == "encoder"
    assert changes_of(found.base, found.variants["probe"]) == {"method": "probe", "model.classifier_input": "encoder"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "got text that is not JSON"),
        ([], r"plan.json: got \[\], wanted an object"),
        ({"variant": {}}, "got the unknown field 'variant'"),
        ({"variants": {}}, "got no variant"),
        ({"variants": {"x": {"loss": {"etta": 1.0}}}}, "variant 'x': changes.loss: got the unknown field 'etta'"),
        ({"variants": {"x": {"loss": {"eta": 1}}}}, "variant 'x': changes.loss.eta: got 1"),
        ({"variants": {"x": {"stage1": {"epochs": 0}}}}, "variant 'x': --stage1.epochs: got 0"),
        ({"variants": {"x": {"seed": 3}}}, "variant 'x': got the field 'seed'"),
        ({"variants": {"x": {"data": "elsewhere"}}}, "variant 'x': got the field 'data'"),
        ({"base": {"adapt": {}}, "variants": {"x": {}}}, "base: got the field 'adapt'"),
        ({"variants": {"../x": {}}}, r"variant '../x': name: got '../x'"),
        ({"variants": {"x": {"loss": {"scl_weight": 0.0, "gamma": 0.0}}}}, "--scl-weight: got 0 with --gamma 0"),
        ({"variants": {"x": {"loss": {"lambda_het": -1.0}}}}, r"--lambda-het: got -1\.0"),
    ],
)
def test_plan_that_makes_no_sense_is_refused_with_its_place(content, message, base, tmp_path):
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, content, base)


def test_study_that_is_none_is_refused_with_those_there_are(base, tmp_path):
    with pytest.raises(ConfigError, match="wanted architecture, options, data, or a plan in a JSON file"):
        load_plan(str(tmp_path / "architektur"), base)
    probe = dataclasses.replace(base, method="probe")
    with pytest.raises(ConfigError, match="--study options: got --method probe"):
        load_plan("options", probe)
    with pytest.raises(ConfigError, match="--data: got nothing"):
        load_plan("architecture", preset_config("paper"))


@pytest.mark.parametrize(
    ("changes", "chosen_on", "error", "message"),
    [
        (
            {"train_generators": ["d"]},
            [],
            ConfigError,
            "variant 'x': --train-generators: got d, wanted .* a, b b, c, photos",
        ),
        ({"val_generators": ["d"]}, [], ConfigError, "variant 'x': --val-generators: got d"),
        (
            {"train_generators": ["photos"]},
            [],
            DataError,
            "variant 'x': its part of split 'train': got 4 pictures, all",
        ),
        ({}, ["c"], ConfigError, "chosen_on: got c, wanted generators with both classes .*: a, b b: name some"),
    ],
)
def test_plan_without_the_pictures_it_needs_is_refused(changes, chosen_on, error, message, base, tmp_path):
    found = plan(tmp_path, {"variants": {"fine": {}, "x": changes}, "chosen_on": chosen_on}, base)
    with pytest.raises(error, match=message):
        check_plan(found)
