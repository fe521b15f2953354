"""The options of optimiser, schedule and heads: what each changes, and that a stopped run resumes to the same bits."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from training import stopping_after, tiny_config, write_pictures

from train.checkpoint import load_detector, load_state
from train.config import CacheConfig, ModelConfig, Stage1Config, Stage2Config
from train.data import load_split
from train.encoder import Encoder
from train.model import TraceModel, detector_from_traces
from train.optimizing import optimizer_of, schedule_of
from train.run import main, train
from train.scoring import embedded_batches, mean_natural_trace
from train.stage import FeatureBatch
from train.stages import DetectorStage

FROZEN = Stage1Config(epochs=1, batch_size=4, lr=0.01, train_encoder=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """8 real and 4 fake pictures to train on."""
    root = write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 8, "val": 10})
    for path in sorted((root / "train").rglob("1_fake/*.png"))[4:]:
        path.unlink()
    return root


def config_of(data, **changes):
    model = ModelConfig("test_resnet", "none", classifier_input="both")
    return tiny_config(data, model=model, stage1=FROZEN, checkpoint_steps=1, **changes)


@pytest.fixture(scope="module")
def heads(data):
    """The options for heads on a frozen encoder."""
    stage1 = dataclasses.replace(FROZEN, epochs=3, optimizer="adamw", lr=1e-3, warmup_epochs=1)
    stage2 = Stage2Config(
        epochs=3, batch_size=6, optimizer="adamw", lr=3e-3, warmup_epochs=1, class_balance=True, weight_decay=0.01
    )
    config = config_of(data, stage2=stage2, cache=CacheConfig(cached_views=2, cache_features=True))
    return dataclasses.replace(config, stage1=stage1, model=dataclasses.replace(config.model, standardize=True))


@pytest.fixture(scope="module")
def blocks(data):
    """An encoder whose last block stage 2 trains."""
    return config_of(data, stage2=Stage2Config(epochs=2, batch_size=5, lr=0.2, train_encoder_blocks=1))


@pytest.fixture(scope="module")
def with_heads(heads, tmp_path_factory):
    run = tmp_path_factory.mktemp("heads")
    train(heads, run)
    return run


@pytest.fixture(scope="module")
def with_blocks(blocks, tmp_path_factory):
    run = tmp_path_factory.mktemp("blocks")
    train(blocks, run)
    return run


@pytest.fixture(params=["heads", "blocks"])
def finished(request):
    return request.getfixturevalue(request.param), request.getfixturevalue(f"with_{request.param}")


def history(run):
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("stage", [1, 2])
def test_stopped_run_resumes_to_the_same_bits(finished, tmp_path, stage):
    config, run = finished
    first = 2 * config.stage1.epochs  # 8 real pictures in batches of 4
    with stopping_after(1 if stage == 1 else first + 2), pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    state = load_state(tmp_path)
    assert (state["stage"], state["epoch"], state["step"]) == (stage, 0, stage)
    assert main(["--resume", str(tmp_path)]) == 0
    theirs = load_file(run / "stage2.safetensors")
    for name, value in load_file(tmp_path / "stage2.safetensors").items():
        assert torch.equal(value, theirs[name]), name
    assert history(tmp_path) == history(run)
    assert (tmp_path / "calibration.json").read_bytes() == (run / "calibration.json").read_bytes()


def test_learning_rate_rises_in_equal_steps_and_falls_along_a_cosine():
    settings = Stage2Config(epochs=5, lr=0.8, warmup_epochs=1)
    optimizer = optimizer_of([{"params": [torch.zeros(1, requires_grad=True)]}], settings)
    schedule = schedule_of(optimizer, settings, steps=4)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.16, 0.32, 0.48, 0.64, 0.8])
    assert rates[4:] == pytest.approx([0.4 * (1 + math.cos(math.pi * step / 16)) for step in range(16)])


def test_optimisers_have_the_settings_of_the_stage():
    parameters = [torch.zeros(1, requires_grad=True)]
    sgd = optimizer_of([{"params": parameters}], Stage1Config(momentum=0.8))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.8, 1e-3)
    adamw = optimizer_of([{"params": parameters}], Stage2Config(optimizer="adamw", momentum=0.8, weight_decay=0.1))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["betas"], adamw.defaults["weight_decay"]) == ((0.8, 0.999), 0.1)


def test_default_schedule_is_the_cosine_it_always_was():
    settings = Stage2Config(epochs=2, lr=0.8)
    optimizer = optimizer_of([{"params": [torch.zeros(1, requires_grad=True)]}], settings)
    assert type(schedule_of(optimizer, settings, steps=4)) is torch.optim.lr_scheduler.CosineAnnealingLR


def test_standardizer_is_fitted_on_the_training_pictures_before_stage_one(with_heads, heads, data):
    first, second = (load_file(with_heads / f"stage{number}.safetensors") for number in (1, 2))
    detector = load_detector(with_heads)
    rows = torch.cat(list(embedded_batches(detector, load_split(data, "train").records, standardized=False))).double()
    for weights in (first, second):
        torch.testing.assert_close(weights["encoder.standardizer.mean"], rows.mean(0).float(), rtol=1e-4, atol=1e-5)
        expected = (1 / rows.std(0, correction=0)).float()
        kept = expected * rows.std(0).mean().float() < 500  # the others are at the floor
        assert kept.sum() > 10
        torch.testing.assert_close(weights["encoder.standardizer.scale"][kept], expected[kept], rtol=1e-3, atol=0)


def test_options_for_heads_give_the_same_with_and_without_the_cache(with_heads, heads, tmp_path):
    train(dataclasses.replace(heads, cache=CacheConfig(cached_views=2)), tmp_path)
    mine, theirs = load_file(tmp_path / "stage2.safetensors"), load_file(with_heads / "stage2.safetensors")
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_runs_with_and_without_standardized_embeddings_share_what_is_cached(heads, tmp_path):
    shared = dataclasses.replace(heads.cache, cache_dir=str(tmp_path / "cache"))
    plain = dataclasses.replace(heads, cache=shared, model=dataclasses.replace(heads.model, standardize=False))
    for name, config in (("plain", plain), ("standardized", dataclasses.replace(heads, cache=shared))):
        (tmp_path / name).mkdir()
        train(config, tmp_path / name)
    # Views and crops of both stages, and the crops of the fake training pictures, which only the fit looks at.
    assert len(list((tmp_path / "cache").glob("*.features"))) == 4 + 1


def test_epochs_with_balanced_classes_have_as_many_of_either(with_heads):
    lines = [line for line in history(with_heads) if line["stage"] == 2]
    assert len(lines) == 3
    assert all(line["one_class_batches"] == line["no_real_batches"] == 0 for line in lines)


def test_stage_two_trains_the_last_block_alone_and_keeps_its_statistics(blocks, with_blocks):
    first, second = (load_file(with_blocks / f"stage{number}.safetensors") for number in (1, 2))
    tuned = {f"encoder.{name}" for name in Encoder("test_resnet").last_blocks(1)}
    changed = {name for name, value in first.items() if name in second and not torch.equal(second[name], value)}
    assert changed == tuned
    records = load_split(blocks.data, "train").records
    traces = TraceModel(Encoder("test_resnet"), 128)
    traces.load_state_dict(first)
    reals = [record for record in records if record.label == 0]
    expected = mean_natural_trace(traces.eval(), reals)
    torch.testing.assert_close(second["mean_trace"], expected)
    assert not torch.allclose(mean_natural_trace(load_detector(with_blocks), reals), expected, atol=1e-4)


def test_natural_traces_come_from_the_encoder_as_stage_one_left_it(blocks):
    torch.manual_seed(0)
    traces = TraceModel(Encoder("test_resnet"), 16).eval()
    detector = detector_from_traces(traces, 16, "both", own_encoder=True)
    stage = DetectorStage(
        detector, load_split(blocks.data, "train").records, blocks, (), "reference", traces=traces.requires_grad_(False)
    )
    groups = stage.parameter_groups()
    assert [group.get("lr") for group in groups] == [None, pytest.approx(0.02)]
    stage.set_train_mode()
    assert not detector.encoder.training
    batch = next(stage.view_batches(0, 0))
    rows = len(batch.labels)
    with torch.no_grad():
        before = stage.natural_traces(batch, stage.features(batch), rows)
        for parameter in groups[1]["params"]:
            parameter.add_(0.1)
        moved = stage.features(batch)
        after = stage.natural_traces(batch, moved, rows)
        tuned = detector.head_hom(moved.first[batch.labels == 0])
    assert len(before) == int((batch.labels == 0).sum()) > 0
    assert torch.equal(before, after)
    assert not torch.allclose(before, tuned, atol=1e-3)
    loss = stage.losses(batch, rows)["loss"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in groups[1]["params"])
    assert all(parameter.grad is None for parameter in traces.parameters())
    # A part without a real picture has no trace, and no forward pass for one.
    fakes = FeatureBatch(moved.first, moved.second, torch.ones_like(batch.labels))
    assert stage.natural_traces(batch, fakes, rows).shape == (0, 16)
