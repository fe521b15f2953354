"""A study trains every variant with every seed, goes on after a stop, records failures, and tests at the very end."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import statistics

import pytest
from PIL import Image
from training import stopping_after, tiny_config, write_pictures

import train.ablate
import train.evaluation_measures
from train.ablate import main
from train.config import Stage1Config, Stage2Config
from train.errors import TrainingError

VARIANTS = {"full": {}, "no-scl": {"loss": {"scl_weight": 0.0}}}
FAILING = {"fine": {}, "explodes": {"stage1": {"lr": 1e30}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10, "test": 4})


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    config = tiny_config(
        data, stage1=Stage1Config(epochs=1, batch_size=3, lr=0.01), stage2=Stage2Config(epochs=1, batch_size=6, lr=0.05)
    )
    path = tmp_path_factory.mktemp("start") / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    return path


def plan_of(folder, variants, **more):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "methods.json"
    path.write_text(json.dumps({"variants": variants} | more))
    return path


def command(start, out, plan, *more, seeds=(0, 1)):
    seeds = [str(seed) for seed in seeds]
    arguments = ["--study", str(plan), "--config", str(start), "--out", str(out), "--draws", "5"]
    return [*arguments, "--seeds", *seeds, *more]


@pytest.fixture(scope="module", autouse=True)
def trivial():
    """Stands in for the AUC of trivial features, which takes longer than training here; notes when it is asked."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train.evaluation_measures, "generator_aucs", lambda records: asked.append(len(records)) or {"halved": 0.5}
        )
        yield asked


@pytest.fixture(scope="module")
def study(start, trivial, tmp_path_factory):
    """Two variants with two seeds, validated."""
    folder = tmp_path_factory.mktemp("study")
    trivial.clear()
    assert main(command(start, folder / "out", plan_of(folder, VARIANTS))) == 0
    assert trivial == [20]
    return folder


def written(out):
    return json.loads((out / "ablation.json").read_text())


def comparable(out):
    """The report without what two machines or moments differ in."""
    report = written(out)
    del report["environment"]
    for variant in report["variants"]:
        for run in variant["runs"]:
            for name in ("seconds", "stage1_from", "commit"):
                del run[name]
    return report


def evaluation(out, variant, seed, split="val"):
    return json.loads((out / "runs" / variant / f"seed-{seed}" / "report" / split / "evaluation.json").read_text())


@pytest.fixture
def trained(monkeypatch):
    """Folders of the runs that are trained, in their order."""
    folders = []
    plain = train.ablate.train

    def counting(config, folder, **named):
        folders.append(f"{folder.parent.name}/{folder.name}")
        return plain(config, folder, **named)

    monkeypatch.setattr(train.ablate, "train", counting)
    return folders


def test_report_has_mean_and_standard_deviation_over_seeds_of_what_evaluation_found(study):
    out = study / "out"
    report = written(out)
    assert (report["seeds"], report["failed"], report["chosen_on"]) == ([0, 1], 0, ["halved"])
    assert [v["name"] for v in report["variants"]] == ["full", "no-scl"]
    for variant in report["variants"]:
        for metric in ("ap", "accuracy_at_half", "fake_missed_rate"):
            found = [evaluation(out, variant["name"], seed)["generators"][0]["metrics"][metric] for seed in (0, 1)]
            for group in ("halved", "mean over generators"):
                figure = variant["figures"]["val"][group][metric]
                assert figure["mean"] == pytest.approx(statistics.mean(found))
                assert figure["std"] == pytest.approx(statistics.stdev(found))
    aps = {v["name"]: v["criterion"]["mean"] for v in report["variants"]}
    assert report["chosen"] == max(aps, key=aps.get)
    assert report["variants"][1]["changes"] == {"loss.scl_weight": 0.0}


def test_tables_and_picture_are_written(study):
    text = (study / "out" / "ablation.md").read_text()
    assert re.search(r"\| no-scl \| 2 \| [\d.]+ ± [\d.]+ \|", text)
    assert "The test pictures were not looked at" in text
    assert "| no-scl | loss.scl_weight = 0.0 | 12 |" in text
    with Image.open(study / "out" / "ablation.png") as picture:
        assert picture.size[0] > 600
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_small_files_alone_are_kept_and_stage_one_is_trained_once_for_each_seed(study):
    out = study / "out"
    assert not list(out.rglob("*.safetensors"))
    assert not list(out.rglob("state.pt"))
    assert not list(out.rglob("report/test"))
    sources = {(v["name"], run["seed"]): run["stage1_from"] for v in written(out)["variants"] for run in v["runs"]}
    assert [sources["full", 0], sources["full", 1]] == [None, None]
    assert sources["no-scl", 1] == str(out / "runs" / "full" / "seed-1")
    losses = [json.loads(line) for line in (out / "runs/no-scl/seed-0/history.jsonl").read_text().splitlines()]
    assert "contrastive" not in losses[-1]


def test_finished_runs_are_kept_and_further_variants_and_seeds_are_added(study, start, tmp_path, trained):
    out = shutil.copytree(study / "out", tmp_path / "out")
    assert main(command(start, out, study / "methods.json")) == 0
    assert trained == []
    assert comparable(out) == comparable(study / "out")
    more = plan_of(tmp_path / "more", {"eta": {"loss": {"eta": 0.1}}, "full": {}})
    assert main(command(start, out, more, "--keep-weights", seeds=(1,))) == 0
    assert trained == ["eta/seed-1"]
    assert sorted(path.name for path in (out / "runs/eta/seed-1").glob("*.safetensors")) == [
        "stage1.safetensors",
        "stage2.safetensors",
    ]
    assert evaluation(out, "eta", 1)["trivial_auc"] == {"halved": 0.5}
    assert set(json.loads((out / "plan.json").read_text())["variants"]) == {"full", "no-scl", "eta"}


def test_stopped_study_goes_on_to_the_same_figures(study, start, tmp_path, trained, capsys):
    out = tmp_path / "out"
    arguments = command(start, out, study / "methods.json", seeds=(0,))
    with stopping_after(5):  # full has four batches; no-scl takes its stage 1 over
        assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (out / "ablation.json").exists()
    assert main(arguments) == 0
    assert trained == ["full/seed-0", "no-scl/seed-0", "no-scl/seed-0"]
    mine, theirs = comparable(out), comparable(study / "out")
    for variant, expected in zip(mine["variants"], theirs["variants"], strict=True):
        assert variant["runs"] == expected["runs"][:1]


def test_run_that_fails_is_recorded_and_the_others_go_on(start, tmp_path, trained, capsys):
    plan, out = plan_of(tmp_path, dict(reversed(FAILING.items()))), tmp_path / "out"
    arguments = command(start, out, plan, seeds=(0,))
    assert main(arguments) == 1
    assert "FAILED: explodes, seed 0: stage 1, epoch 0" in capsys.readouterr().err
    report = written(out)
    assert (report["failed"], report["chosen"]) == (1, "fine")
    text = (out / "ablation.md").read_text()
    assert "| explodes | 0, 1 FAILED | FAILED |" in text
    assert re.search(r"- explodes, seed 0: stage 1, epoch 0.*wanted a finite loss", text)
    assert "Not considered, for a seed that failed: explodes." in text
    assert trained == ["explodes/seed-0", "fine/seed-0"]
    assert main(arguments) == 1
    assert len(trained) == 2
    assert main([*arguments, "--retry-failed"]) == 1
    assert trained[2:] == ["explodes/seed-0"]


def test_changed_variant_of_a_known_name_is_refused(study, start, tmp_path, trained, capsys):
    out = shutil.copytree(study / "out", tmp_path / "out")
    changed = plan_of(tmp_path, VARIANTS | {"full": {"loss": {"eta": 0.1}}})
    assert main(command(start, out, changed)) == 2
    assert "variant 'full' of" in (told := capsys.readouterr().err)
    assert "got loss.eta = 0.1, wanted what the study began with, loss.eta = 0.5" in told
    assert main(command(start, out, plan_of(tmp_path, VARIANTS, chosen_on=["halved"]))) == 2
    assert "got chosen_on = ('halved',), wanted what the study began with, chosen_on = ()" in capsys.readouterr().err
    assert trained == []


def test_test_pictures_are_evaluated_last_by_runs_that_are_trained_again_where_weights_were_not_kept(
    study, start, tmp_path, trained, monkeypatch
):
    out = shutil.copytree(study / "out", tmp_path / "out")
    before = evaluation(out, "full", 0)
    order, plain = [], train.ablate.evaluate_run

    def noting(run, data, config, **named):
        order.append((config.split, run.parent.name))
        return plain(run, data, config, **named)

    monkeypatch.setattr(train.ablate, "evaluate_run", noting)
    arguments = command(start, out, study / "methods.json", "--final", seeds=(0,))
    assert main(arguments) == 0
    assert order == [("val", "full"), ("val", "no-scl"), ("test", "full"), ("test", "no-scl")]
    assert trained == ["full/seed-0", "no-scl/seed-0"]
    assert evaluation(out, "full", 0)["generators"] == before["generators"]
    assert not list(out.rglob("*.safetensors"))
    found = evaluation(out, "full", 0, "test")["generators"][0]["metrics"]["ap"]
    assert written(out)["variants"][0]["figures"]["test"]["halved"]["ap"] == {"mean": found, "std": None, "seeds": 1}
    assert "## Test pictures: AP by generator" in (out / "ablation.md").read_text()
    assert main(arguments) == 0
    assert len(trained) == 2


def test_pictures_that_changed_between_runs_are_refused(study, start, tmp_path, data, capsys):
    out = shutil.copytree(study / "out", tmp_path / "out")
    picture = data / "val" / "halved" / "0_real" / "000.png"
    content = picture.read_bytes()
    try:
        picture.write_bytes(content + b"\0")
        assert main(command(start, out, plan_of(tmp_path, {"full": {}}), seeds=(0, 2))) == 2
    finally:
        picture.write_bytes(content)
    assert "split 'val' of the study: got runs with different ones" in capsys.readouterr().err


def test_error_that_would_meet_every_run_stops_the_study(study, start, tmp_path, monkeypatch, capsys):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.ablate, "train", full_disk)
    assert main(command(start, tmp_path / "out", study / "methods.json")) == 2
    assert "No space left on device: correct it and start the same command again" in capsys.readouterr().err


def test_study_without_a_finished_run_has_a_report(study, start, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise TrainingError("all", got="nothing", wanted="something", remedy="none")

    monkeypatch.setattr(train.ablate, "train", failing)
    assert main(command(start, tmp_path / "out", study / "methods.json")) == 1
    assert "None: every variant has a seed that failed." in (tmp_path / "out" / "ablation.md").read_text()
    assert written(tmp_path / "out")["chosen"] is None


@pytest.mark.parametrize("seeds", [(0, 0), (-1,)])
def test_seeds_that_make_no_sense_are_refused(study, start, tmp_path, seeds, capsys):
    arguments = [f"--seeds={seeds[0]}"] if seeds == (-1,) else ["--seeds", "0", "0"]
    given = ["--study", str(study / "methods.json"), "--config", str(start), "--out", str(tmp_path / "out"), *arguments]
    assert main(given) == 2
    assert "wanted different numbers from 0 up" in capsys.readouterr().err
