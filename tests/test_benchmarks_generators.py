"""The comparison on real generators: what is held out, what is chosen, what the document says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from exported import finished_run
from exported import pictures as tiny_pictures
from torch.nn.functional import normalize

from benchmarks.diagnosis import alignment, diagnose, margin, uniformity
from benchmarks.generators_ideas import IDEAS, ideas_section
from benchmarks.generators_report import RESULTS, document
from benchmarks.real_generators import RECIPES, main, write_hold_out
from train.ablation_plan import load_plan
from train.config import config_from_dict, preset_config
from train.data import load_split, scan_pictures
from train.errors import ConfigError
from train.pictures import PictureRecord, PictureSet

IDEA_VARIANTS = {
    recipe: {name for idea in IDEAS for name in (*idea.variants.get(recipe, ()), idea.beside.get(recipe)) if name}
    for recipe in ("edge", "server")
}


@pytest.fixture
def pictures(tmp_path):
    records = tuple(
        PictureRecord(tmp_path / f"{split}-{name}-{label}-{n}.png", label, name, name, f"{name}{n}", split)
        for split in ("train", "val", "test")
        for name in ("a", "b")
        for label in (0, 1)
        for n in range(2)
    )
    for record in records:
        record.path.write_bytes(b"picture")
    return PictureSet(tmp_path, "list", records)


def test_held_out_generator_is_the_validation_split_and_no_test_picture_is_listed(pictures, tmp_path):
    listed = write_hold_out(pictures, "a", tmp_path / "without-a.csv")
    train, held_out = (load_split(listed, split).records for split in ("train", "val"))
    assert {record.generator for record in train} == {"b"}
    assert {record.generator for record in held_out} == {"a"}
    assert (len(train), len(held_out)) == (4, 8)
    names = {record.path.name for record in scan_pictures(listed).records}
    assert not any(name.startswith("test") for name in names)


def test_fakes_made_from_an_original_of_the_held_out_generator_are_in_neither_split(pictures, tmp_path):
    made = []
    for original in ("a0", "b0"):
        record = PictureRecord(tmp_path / f"rebuilt {original}.png", 1, "rebuilt", "rebuilt", original, "train")
        record.path.write_bytes(b"picture")
        made.append(record)
    listed = write_hold_out(PictureSet(tmp_path, "list", (*pictures.records, *made)), "a", tmp_path / "without-a.csv")
    found = scan_pictures(listed).records
    assert [r.path.name for r in found if r.generator == "rebuilt"] == ["rebuilt b0.png"]
    assert len([r for r in found if r.generator == "b"]) == 4


def test_generator_that_is_not_there_cannot_be_held_out(pictures, tmp_path):
    with pytest.raises(ConfigError, match="hold_out: got c, wanted one of a, b"):
        write_hold_out(pictures, "c", tmp_path / "list.csv")


def test_alignment_uniformity_and_margin_of_hand_computed_cases():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert alignment(rows) == pytest.approx((2 + 2 + 4) / 3)
    assert alignment(rows[[0, 0]]) == pytest.approx(0, abs=1e-6)
    assert uniformity(rows) == pytest.approx(np.log((2 * np.exp(-4) + np.exp(-8)) / 3), rel=1e-5)
    many = normalize(torch.randn(50, 8, generator=torch.manual_seed(0)), dim=1)
    assert alignment(many) == pytest.approx(float(torch.pdist(many).square().mean()), rel=1e-5)
    assert margin(np.array([0.0, 2, 4, 6], np.float32), np.array([0, 0, 1, 1])) == pytest.approx(4.0)


def test_runs_on_one_encoder_look_at_each_picture_once(monkeypatch):
    sets, known = {"held out": load_split(tiny_pictures(), "val").records}, {}
    first = diagnose(finished_run(), sets, known)
    assert first["held out"]["margin"] > 1
    assert len(known) == 1
    monkeypatch.setattr("benchmarks.diagnosis.embedded_batches", None)
    assert diagnose(finished_run(), sets, known) == first


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.json")))
def test_every_recipe_is_a_plan(name, tmp_path):
    values = json.loads((RECIPES / f"{name}.json").read_text())
    variants = values["baselines"] | values["paper"] | values["candidates"] | values["controls"]
    plan = tmp_path / "plan.json"
    base = values["base"] | {"cache": values["base"].get("cache", {}) | {"cache_dir": str(tmp_path)}}
    base["model"]["encoder_weights"] = base["model"]["encoder_weights"] or "none"
    plan.write_text(json.dumps({"base": base, "variants": variants}))
    loaded = load_plan(str(plan), preset_config("paper"), data=str(tmp_path))
    assert list(loaded.variants) == list(variants)
    assert len(values["paper"]) == 1


def test_unknown_recipe_and_missing_choice_are_refused(tmp_path, capsys):
    assert main(["--recipe", "none", "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "--recipe: got none, wanted one of edge" in capsys.readouterr().err


def figure(mean, std=None):
    return {"mean": mean, "std": std}


def test_document_says_what_won_on_validation_and_counts_the_unseen_generators_alone():
    metrics = {"real_flagged_rate": figure(0.02), "fake_missed_rate": figure(0.4), "accuracy_at_threshold": figure(0.8)}
    aps = {"seen": 0.9, "new": 0.7, "newer": 0.8, "faces": 1.0}
    machine = {"cpu": "a CPU", "cores": 2}
    where = {"machine": machine, "versions": {"torch": "2"}, "tool_commit": "abc"}
    variant = {
        "generators": {name: {"ap": figure(ap, 0.01)} | metrics for name, ap in aps.items()},
        "by_seed": {"0": aps, "1": {name: ap - 0.1 for name, ap in aps.items()}},
        "ap_interval_of_first_seed": {"new": {"low": 0.65, "high": 0.75}},
        "validation_ap": figure(0.95),
        "seconds": [10.0, 20.0],
        "failures": [],
        "changes": {},
    }
    choice = {
        "hold_out": ["seen"],
        "variants": {
            "probe": {"seen": figure(0.8), "mean": 0.8, "failures": [], "changes": {"method": "probe"}},
            "ntf": {"seen": figure(0.7), "mean": 0.7, "failures": [], "changes": {"loss": {"eta": 0.1}}},
            "broken": {"seen": None, "mean": None, "failures": ["a sentence"], "changes": {}},
        },
        "chosen": "ntf",
        "best_control": "no-scl",
        "best_of_all": "probe",
        "seeds": [0],
        "environment": where,
    }
    results = {
        "recipe": "edge",
        "encoder": "lite",
        "unseen": ["new", "newer"],
        "not_in_means": {"faces": "no real faces"},
        "choice": choice,
        "final": {
            "variants": {"ntf": variant},
            "trivial_auc": {"new": 0.55},
            "pictures": {name: [10, 12] for name in aps},
            "seeds": [0, 1],
            "environment": where,
        },
    }
    text = document([results])
    assert "| ntf | 70.0 ± 1.0 | 80.0 ± 1.0 | 90.0 ± 1.0 | 100.0 ± 1.0 | 70.0 ± 7.1 | 75.0 ± 7.1 |" in text
    assert "| trivial features, AUC | 55.0 | n/a | n/a | n/a |" in text
    assert "Chosen for the test: **ntf**" in text
    assert "| Edge encoder, held out | 70.0 | 80.0 | n/a | n/a | n/a |" in text
    assert "| Edge encoder, unseen test | 70.0 ± 7.1 | n/a | n/a | n/a | n/a |" in text
    assert "**probe** is best on the held-out generators" in text
    assert "| ntf | loss.eta = 0.1 | 70.0 | 70.0 |" in text
    assert "- broken: a sentence" in text
    assert "65.0 to 75.0" in text
    assert "chosen since" not in text
    later = results | {"choice": choice | {"chosen": "probe"}}
    assert "**probe**, which was chosen since, is not in the table: `--step final` evaluates it." in document([later])
    variants = {"ntf": choice["variants"]["ntf"] | {"mean": 0.81}, "alone": choice["variants"]["probe"]}
    rebuilt = results | {"recipe": "edge_resynthesis", "choice": choice | {"variants": variants}}
    both = document([results, rebuilt])
    assert "| ntf | 70.0 | 81.0 | 70.0 ± 7.1 | 70.0 ± 7.1 |" in both
    assert "| alone | 80.0 |" not in both.partition("held out, without")[2].partition("###")[0]
    assert "held out, without" not in document([rebuilt])


def test_each_idea_says_what_it_gained_or_lost_beside_the_variant_without_it():
    means = {"depths+eta=0.02": 0.7, "depths+eta=0.02+residual": 0.6, "depths+eta=0.02+rgb-residual": None}

    def text(**changes):
        found = {name: {"mean": mean} for name, mean in (means | changes).items()}
        return ideas_section("edge", {"variants": found})

    assert "depths+eta=0.02+residual 60.0, depths+eta=0.02+rgb-residual failed; depths+eta=0.02 70.0." in text()
    assert "It loses 10.00 points at best, with depths+eta=0.02+residual." in text()
    assert "It gains 5.00 points at best, with depths+eta=0.02+rgb-residual." in text(
        **{"depths+eta=0.02+rgb-residual": 0.75}
    )
    assert "at best" not in text(**{"depths+eta=0.02+residual": None})


def test_ideas_that_a_study_has_not_tried_are_left_out():
    assert ideas_section("edge", {"variants": {"depths+eta=0.02": {"mean": 0.7}}}) == ""


@pytest.mark.parametrize("name", sorted(IDEA_VARIANTS))
def test_variants_of_the_ideas_are_candidates_of_the_recipe(name):
    assert IDEA_VARIANTS[name] <= json.loads((RECIPES / f"{name}.json").read_text())["candidates"].keys()


@pytest.mark.parametrize("name", ["edge", "server"])
def test_preset_is_the_variant_that_was_best_on_held_out_generators(name):
    values = json.loads((RECIPES / f"{name}.json").read_text())
    results = json.loads((RESULTS / f"generators_{name}.json").read_text())
    base = config_from_dict(values["base"], source=name, defaults=preset_config("paper"))
    variants = values["baselines"] | values["paper"] | values["candidates"] | values["controls"]
    found = config_from_dict(variants[results["choice"]["best_of_all"]], source=name, defaults=base)
    preset = preset_config(name)
    for part in ("method", "model", "loss", "augment", "stage1", "stage2", "decision"):
        assert getattr(preset, part) == getattr(found, part), part
