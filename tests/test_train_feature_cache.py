"""Cached embeddings of the frozen encoder give the results that computed ones give, and are never of another run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import stopping_after, tiny_config, write_pictures

from train.config import AugmentConfig, CacheConfig, ModelConfig, Stage1Config, Stage2Config
from train.data import load_split
from train.encoder import Encoder
from train.errors import ConfigError
from train.feature_cache import FeatureCache, cache_key, weights_sha256
from train.loading import Key, ViewPlan
from train.run import main, train

# Relative to the largest weight. A cached row was computed in a batch of its first epoch, and batches of another size
# may end in other last bits; measured 0 with the same views, in batches of 5 and 2.
SAME = 1e-6
KEYS = [Key(0, 2), Key(0, 0)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = write_pictures(tmp_path_factory.mktemp("pictures"), counts={"train": 6, "val": 10})
    return tiny_config(
        data,
        model=ModelConfig("test_resnet", "none", classifier_input="both"),
        stage1=Stage1Config(epochs=3, batch_size=4, lr=0.01, train_encoder=False),
        stage2=Stage2Config(epochs=4, batch_size=5, lr=0.2),
        cache=CacheConfig(cached_views=2),
        checkpoint_steps=1,
    )


@pytest.fixture(scope="module")
def cached_config(config):
    return dataclasses.replace(config, cache=CacheConfig(cached_views=2, cache_features=True))


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain")
    train(config, run)
    return run


@pytest.fixture(scope="module")
def cached(cached_config, tmp_path_factory):
    run = tmp_path_factory.mktemp("cached")
    train(cached_config, run)
    return run


@pytest.fixture
def encoded(monkeypatch):
    """Pictures that an encoder is given, one entry for each batch."""
    seen, parts = [], Encoder.parts

    def counting(encoder, pixels):
        seen.append(len(pixels))
        return parts(encoder, pixels)

    monkeypatch.setattr(Encoder, "parts", counting)
    return seen


def history(run):
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def difference(mine, theirs, file="stage2.safetensors"):
    mine, theirs = load_file(mine / file), load_file(theirs / file)
    return max(
        float((mine[name].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(1e-6))
        for name, value in theirs.items()
    )


def test_cached_run_gives_the_results_of_one_without(plain, cached):
    print("weights differ by", difference(cached, plain))
    assert difference(cached, plain) <= SAME
    assert difference(cached, plain, "stage1.safetensors") <= SAME
    mine, theirs = history(cached), history(plain)
    assert len(mine) == 7
    assert mine[:2] == theirs[:2]  # the epochs of stage 1 in which the views are new
    for cached_epoch, epoch in zip(mine[2:], theirs[2:], strict=True):
        assert cached_epoch == pytest.approx(epoch, rel=1e-5)


def test_views_that_were_seen_are_not_computed_again(cached_config, tmp_path, encoded):
    train(cached_config, tmp_path)
    # Two draws with two views each, of 6 real pictures in stage 1 and of 12 in stage 2; the centre crops of the real
    # and of the validation pictures once, of which the report of each epoch and `finish` take theirs.
    assert sum(encoded) == 2 * 6 * 2 + 6 + 2 * 12 * 2 + 20


def test_views_are_drawn_anew_in_each_epoch_unless_told_otherwise(config):
    def draws(views):
        plan = ViewPlan(0, 2, (8, 8), (8, 8), AugmentConfig(), views)
        return [plan.draw(epoch) for epoch in range(5)]

    assert draws(0) == [0, 1, 2, 3, 4]
    assert draws(2) == [0, 1, 0, 1, 0]


def test_without_a_number_of_views_the_results_are_those_of_the_default(config, tmp_path, capsys):
    for name, cache in (("plain", CacheConfig()), ("cached", CacheConfig(cache_features=True))):
        (tmp_path / name).mkdir()
        train(dataclasses.replace(config, cache=cache), tmp_path / name)
    assert difference(tmp_path / "cached", tmp_path / "plain") == 0
    assert history(tmp_path / "cached") == history(tmp_path / "plain")
    told = capsys.readouterr().out
    assert "note: no view comes twice in stage 1" in told
    assert "note: no view comes twice in stage 2" in told


# In the middle of an epoch of stage 1 whose views are new, and known; the same of stage 2.
@pytest.mark.parametrize("batches", [3, 5, 8, 14])
def test_cached_run_that_was_stopped_resumes_to_the_same_weights(cached_config, cached, tmp_path, batches):
    with stopping_after(batches), pytest.raises(KeyboardInterrupt):
        train(cached_config, tmp_path)
    assert main(["--resume", str(tmp_path)]) == 0
    assert difference(tmp_path, cached) == 0
    assert history(tmp_path) == history(cached)


def test_runs_on_the_same_pictures_and_encoder_share_a_folder(cached_config, tmp_path, encoded):
    folder, weights = tmp_path / "cache", tmp_path / "weights.safetensors"
    encoder = Encoder("test_resnet")
    save_file(encoder.net.state_dict(), weights)
    shared = CacheConfig(cached_views=2, cache_features=True, cache_dir=str(folder), view_seed=5)
    model = dataclasses.replace(cached_config.model, encoder_weights=str(weights))
    base = dataclasses.replace(cached_config, cache=shared, model=model)
    counts = {}
    for name, seed in (("first", 0), ("again", 0), ("other seed", 1)):
        (tmp_path / name).mkdir()
        encoded.clear()
        train(dataclasses.replace(base, seed=seed), tmp_path / name)
        counts[name] = sum(encoded)
    assert counts == {"first": 98, "again": 0, "other seed": 0}
    assert difference(tmp_path / "again", tmp_path / "first") == 0
    assert difference(tmp_path / "other seed", tmp_path / "first") > 0.1
    rows = 2 * 6, 6, 2 * 12, 20  # views and crops of stage 1, which sees real pictures alone; of stage 2
    sizes = [n * (4 + views * encoder.width * 4) for n, views in zip(rows, (2, 1, 2, 1), strict=True)]
    assert sorted(path.stat().st_size for path in folder.glob("*.features")) == sorted(sizes)
    (tmp_path / "third").mkdir()
    train(dataclasses.replace(base, augment=AugmentConfig(flip=False)), tmp_path / "third")
    assert len(list(folder.glob("*.features"))) == 4 + 2  # other views, the same crops


def test_only_stage_two_is_cached_where_stage_one_trains_the_encoder(cached_config, tmp_path, encoded, capsys):
    trained = dataclasses.replace(cached_config.stage1, epochs=1, train_encoder=True)
    train(dataclasses.replace(cached_config, stage1=trained), tmp_path)
    assert "note: stage 1 trains the encoder, so its embeddings are not cached" in capsys.readouterr().out
    # Stage 1 sees 6 pictures twice and reports on them; stage 2 as ever; `finish` computes the real pictures' crops.
    assert sum(encoded) == 6 * 2 + 6 + 2 * 12 * 2 + 20 + 6


def test_key_names_everything_that_embeddings_depend_on(config):
    records = load_split(config.data, "train").records
    weights, plan = weights_sha256(Encoder("test_resnet")), ViewPlan(0, 2, (8, 8), (4, 4), AugmentConfig(), 2)

    def name(records=records, weights=weights, arithmetic="fp32", **changes):
        return cache_key(records, weights, dataclasses.replace(plan, **changes).views(), arithmetic).name()

    names = {name(), name(records[::-1]), name(records[1:]), name(arithmetic="bf16"), name(seed=1)}
    names |= {name(weights=weights_sha256(Encoder("test_resnet"))), name(stage=1), name(augment=AugmentConfig(False))}
    assert len(names) == 8
    assert name() in names
    # The order of the batches is no part of a view, and neither is the folder that the pictures lie in.
    assert name(seed=3, view_seed=0) == name()
    moved = [dataclasses.replace(record, path=record.path.parent / "moved" / record.path.name) for record in records]
    assert (
        name([dataclasses.replace(m, sha256=r.content_sha256()) for m, r in zip(moved, records, strict=True)]) == name()
    )


def test_rows_come_back_as_written_also_from_another_process(tmp_path):
    first, second = torch.randn(2, 7), torch.randn(2, 7)
    cache = FeatureCache(tmp_path / "c", draws=2, pictures=3, width=7)
    assert not cache.holds(1, KEYS)
    cache.write(1, KEYS, first, second)
    for opened in (cache, FeatureCache(tmp_path / "c", draws=2, pictures=3, width=7)):
        assert opened.holds(1, KEYS)
        assert not opened.holds(0, KEYS)
        assert not opened.holds(1, [*KEYS, Key(0, 1)])
        assert all(torch.equal(a, b) for a, b in zip(opened.read(1, KEYS), (first, second), strict=True))
    assert (tmp_path / "c").stat().st_size == cache.size_bytes == 2 * 3 * (4 + 2 * 7 * 4)


def test_row_that_is_damaged_or_half_written_counts_as_missing(tmp_path):
    options = {"draws": 1, "pictures": 3, "width": 7}
    FeatureCache(tmp_path / "c", **options).write(0, KEYS, torch.randn(2, 7), torch.randn(2, 7))
    content = bytearray((tmp_path / "c").read_bytes())
    content[-1] ^= 1
    (tmp_path / "c").write_bytes(content)
    opened = FeatureCache(tmp_path / "c", **options)
    assert not opened.holds(0, KEYS[:1])
    assert opened.holds(0, KEYS[1:])


def test_cache_that_does_not_fit_the_disk_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--cache-features: got .* GB free in .*, wanted .* GB: lower"):
        FeatureCache(tmp_path / "c", draws=1 << 20, pictures=1 << 20, width=2048)
    assert list(tmp_path.iterdir()) == []
