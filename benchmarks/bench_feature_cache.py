"""One epoch of stage 2, validation included: on embeddings that are computed, and on those that are cached."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
from PIL import Image

from benchmarks.pictures import photograph
from train.config import CacheConfig, Stage1Config, Stage2Config, preset_config
from train.data import scan_pictures
from train.encoder_weights import load_encoder
from train.feature_cache import CropCache, FeatureCache, StageCache
from train.loop import Position, StageLoop
from train.model import TraceModel, detector_from_traces
from train.stages import DetectorStage

TRAIN, VALIDATION = 48, 16
LEAST_RATIO = 5.0
median_s: dict[str, float] = {}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", TRAIN), ("val", VALIDATION)):
        for index in range(count):
            folder = root / split / "blurred" / ("0_real", "1_fake")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(np.roll(photograph(256, 256), index, axis=0))
            image.save(folder / f"{index:03}.jpg", quality=90)
    found = scan_pictures(root)
    return found.split("train").records, found.split("val").records


def loop_of(records, folder, cache):
    config = dataclasses.replace(
        preset_config("demo"),
        stage1=Stage1Config(train_encoder=False),
        stage2=Stage2Config(epochs=1000, batch_size=24, lr=0.01),
        cache=CacheConfig(cached_views=1, cache_features=cache),
    )
    traces = TraceModel(load_encoder(config.model.encoder, config.model.encoder_weights), 128)
    detector = detector_from_traces(traces, 128, "both")
    kept = None
    if cache:
        width = detector.encoder.width
        views = FeatureCache(folder / "views", draws=1, pictures=TRAIN, width=width)
        kept = StageCache(views, CropCache(folder / "crops", records[1], width=width))
    stage = DetectorStage(detector, records[0], config, records[1], "reference", cache=kept)
    return StageLoop(stage, folder, config, Position(2), None, {})


@pytest.mark.parametrize("way", ["computed", "cached"])
def bench_feature_cache(benchmark, records, tmp_path, way):
    loop = loop_of(records, tmp_path, way == "cached")

    def epoch():
        with contextlib.redirect_stdout(None):
            loop._train_epoch(lambda _: None)
            loop._finish_epoch(0.0, lambda _: None)

    benchmark.group = f"one epoch of stage 2, {TRAIN} pictures and {VALIDATION} for validation"
    benchmark.name = {"computed": "decoded and encoded", "cached": "--cache-features"}[way]
    benchmark.extra_info["baseline"] = way == "computed"
    benchmark.pedantic(epoch, rounds=3 if way == "computed" else 10, warmup_rounds=1)
    median_s[way] = benchmark.stats.stats.median
    if len(median_s) == 2:
        assert median_s["computed"] / median_s["cached"] >= LEAST_RATIO
