"""The tables of a study: spread over seeds, undefined figures, collapse, and how clear the choice is."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from train.ablation_figure import write_ablation_figure
from train.ablation_plan import Plan
from train.ablation_report import OVER_GENERATORS, Figure, RunReport, SplitFigures, Traces, ablation_report, run_report
from train.ablation_tables import ablation_json, ablation_markdown, choice
from train.bootstrap import METRICS
from train.config import preset_config
from train.errors import CheckpointError

BASE = preset_config("demo")
PLAN = Plan("made up", BASE, {"one": BASE, "two": dataclasses.replace(BASE, train_share=0.5)})


def run(seed, aps, *, failure=None, train="t", val="v", traces=None):
    generators = {
        name: dict.fromkeys(METRICS, 0.5) | {"ap": ap, **({} if ap is not None else {"fake_missed_rate": None})}
        for name, ap in aps.items()
    }
    splits = {} if failure else {"val": SplitFigures(val, 40, generators)}
    return RunReport(seed, failure, 12, train, None, 1.5, traces, "c0ffee", splits)


def report(one, two, chosen_on=("a", "b")):
    return ablation_report(PLAN, {"one": one, "two": two}, chosen_on, {"machine": {"cpu": "some"}, "versions": {}})


@pytest.fixture
def clear():
    return report(
        [run(0, {"a": 0.9, "b": 0.7, "photos": None}), run(1, {"a": 0.8, "b": 0.6, "photos": None})],
        [
            run(0, {"a": 0.5, "b": 0.4, "photos": None}, train="h"),
            run(1, {"a": 0.5, "b": 0.4, "photos": None}, train="i"),
        ],
    )


def test_mean_over_generators_is_taken_first_and_then_over_seeds(clear):
    figures = clear.variants[0].figures["val"]
    assert figures["a"]["ap"] == Figure(pytest.approx(0.85), pytest.approx(math.sqrt(0.005)), 2)
    assert figures[OVER_GENERATORS]["ap"] == Figure(pytest.approx(0.75), pytest.approx(math.sqrt(0.005)), 2)
    assert figures["photos"]["ap"] is None
    assert clear.chosen == "one"
    assert "**one** with 75.0 ± 7.1, before two with 45.0 ± 0.0" in choice(clear)
    assert "does not tell them apart" not in choice(clear)
    assert "| one | 75.0 ± 7.1 | 85.0 ± 7.1 | 65.0 ± 7.1 | n/a |" in ablation_markdown(clear)
    assert json.loads(ablation_json(clear))["variants"][1]["changes"] == {"train_share": 0.5}


def test_difference_within_the_spread_and_single_seeds_are_said():
    near = report(
        [run(0, {"a": 0.9}), run(1, {"a": 0.7})],
        [run(0, {"a": 0.79}, train="h"), run(1, {"a": 0.77}, train="i")],
        ("a",),
    )
    assert near.chosen == "one"
    assert "it does not tell them apart" in choice(near)
    single = report([run(0, {"a": 0.9})], [run(0, {"a": 0.7}, train="h")], ("a",))
    assert "One seed says nothing" in choice(single)
    assert "| one | 90.0 |" in ablation_markdown(single)


def test_choice_counts_the_named_generators_alone():
    runs = [run(0, {"a": 0.9, "b": 0.5})], [run(0, {"a": 0.6, "b": 0.9}, train="h")]
    assert report(*runs, ("a",)).chosen == "one"
    assert report(*runs, ("a", "b")).chosen == "two"


def test_variant_with_a_failed_seed_keeps_its_figures_and_is_not_chosen():
    found = report(
        [run(0, {"a": 0.9}), run(1, {"a": 0.9}, failure="loss: got nan")],
        [run(0, {"a": 0.6}, train="h"), run(1, {"a": 0.6}, train="i")],
        ("a",),
    )
    assert (found.failed, found.chosen) == (1, "two")
    text = ablation_markdown(found)
    assert "| one | 1, 1 FAILED | 90.0 |" in text
    assert "- one, seed 1: loss: got nan" in text


def test_collapsed_traces_are_named(tmp_path):
    collapsed = report([run(0, {"a": 0.9}, traces=Traces(0.001, 1.2, True))], [run(0, {"a": 0.9}, train="h")], ("a",))
    assert "| 0.0010 | 1.2, 1 COLLAPSED |" in ablation_markdown(collapsed)
    line = {"stage": 1, "epoch": 0, "seconds": 2.0, "hom_std": 0.05, "hom_effective_rank": 1.5}
    (tmp_path / "history.jsonl").write_text(
        json.dumps(line | {"hom_effective_rank": 9.0}) + "\n" + json.dumps(line) + "\n"
    )
    assert run_report(tmp_path, 0, "failed", 128).traces == Traces(0.05, 1.5, True)
    (tmp_path / "history.jsonl").write_text(json.dumps(line | {"hom_effective_rank": 9.0}) + "\n")
    assert run_report(tmp_path, 0, "failed", 128).traces == Traces(0.05, 9.0, False)


def test_runs_of_other_pictures_are_refused():
    with pytest.raises(CheckpointError, match="split 'val' of the study: got runs with different ones"):
        report([run(0, {"a": 0.9})], [run(0, {"a": 0.9}, train="h", val="w")], ("a",))
    with pytest.raises(CheckpointError, match=r"training pictures \(all, 1, seed any\) of the study"):
        report([run(0, {"a": 0.9}), run(1, {"a": 0.9}, train="u")], [run(0, {"a": 0.9})], ("a",))


def test_bars_stand_at_the_means_with_the_spread_beside_them(clear, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plain = [], Axes.bar
    monkeypatch.setattr(
        Axes,
        "bar",
        lambda axes, x, height, *a, **k: (drawn.append((height, k["yerr"])), plain(axes, x, height, *a, **k))[1],
    )
    write_ablation_figure(clear, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5_000
    heights, spreads = drawn[0]
    assert heights[:3] == pytest.approx([75.0, 85.0, 65.0])
    assert spreads[1] == pytest.approx(100 * math.sqrt(0.005))
    assert math.isnan(heights[3])
    assert len(drawn) == 4  # two variants, AP and accuracy
