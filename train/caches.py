"""Which embeddings a run keeps on disk, in which files, and what these depend on.

Each stage on a frozen encoder keeps its training views, and the centre crops of the pictures that it looks at after an
epoch: stage 1 real training pictures, stage 2 validation pictures. The mean natural trace and the thresholds are taken
from the same crops, and with those of the fake training pictures the standardiser is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.encoder import Standardizer
from train.feature_cache import CropCache, FeatureCache, StageCache, cache_key, weights_sha256
from train.methods import METHODS
from train.model import EncodingModel, NTFDetector, TraceModel
from train.pictures import PictureRecord
from train.ranks import ALONE, Ranks
from train.scoring import BATCH_SIZE, embedded_batches, preprocess_spec
from train.session import Session
from train.stage import stage1_plan, stage2_plan


def trace_cache(session: Session, model: TraceModel) -> StageCache | None:
    """What stage 1 keeps of its encoder, or None where it keeps nothing.

    Raises:
        ConfigError: the disk has no room for it.
    """
    config = session.config
    if not config.cache.cache_features:
        return None
    if config.stage1.train_encoder:
        if session.ranks.first:
            print("note: stage 1 trains the encoder, so its embeddings are not cached; those of stage 2 are")
        return None
    files = _Files(session, model, session.ranks)
    reals = [record for record in session.data.traces if record.label == 0]
    views = stage1_plan(config, model.encoder.input_size).views()
    return StageCache(files.views(1, reals, views, config.stage1.epochs), files.crops(reals))


def detector_cache(session: Session, detector: NTFDetector) -> StageCache | None:
    """What stage 2 keeps of its encoder, or None where it keeps nothing.

    Raises:
        ConfigError: the disk has no room for it.
    """
    config, data = session.config, session.data
    if not config.cache.cache_features:
        return None
    files = _Files(session, detector, session.ranks)
    # Methods without natural traces have no use for the second view, and keep the first in its place.
    views = stage2_plan(config, detector.input_size).views() | {"traces": METHODS[config.method].natural_traces}
    kept = files.views(2, data.train.records, views, config.stage2.epochs)
    return StageCache(kept, files.crops(data.validation.records))


def shipped_embeddings(session: Session, model: EncodingModel, records: Sequence[PictureRecord]) -> Tensor | None:
    """Embeddings (N, d) of pictures as the shipped model has them, or None where none are kept.

    For the first process alone, when training is over.

    Raises:
        ConfigError: the disk has no room for them.
    """
    if not session.config.cache.cache_features:
        return None
    crops = _Files(session, model, ALONE, channels_last=False).crops(records)
    return crops.embeddings(model, workers=session.config.workers)


def fit_standardizer(session: Session, model: EncodingModel) -> None:
    """Take the mean and standard deviation of the training pictures' embeddings over into the encoder.

    The pictures are seen as the exported model sees them; each process computes its part.

    Raises:
        ConfigError: the disk has no room for what is kept of them.
    """
    config, ranks, records = session.config, session.ranks, session.data.train.records
    standardizer = model.encoder.standardizer
    assert isinstance(standardizer, Standardizer)
    model.eval()
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    files = _Files(session, model, ranks) if config.cache.cache_features else None
    # Real ones in a file of their own, from which the natural traces' mean comes as well.
    for label in (0, 1):
        own = [record for record in records if record.label == label]
        part = ranks.part(len(own))
        if files is None:
            batches = embedded_batches(model, own[part], workers=config.workers, standardized=False)
        else:
            batches = iter(files.crops(own).pooled(model, part, workers=config.workers).split(BATCH_SIZE))
        for rows in batches:
            values = rows.double().cpu()
            count, total, squares = count + len(values), total + values.sum(0), squares + values.square().sum(0)
    parts = ranks.gather_objects((count, total, squares))
    pictures = sum(part[0] for part in parts)
    mean, square = (sum((part[i] for part in parts), torch.zeros((), dtype=torch.float64)) / pictures for i in (1, 2))
    standardizer.fit(mean.float(), (square - mean.square()).clamp_min(0).sqrt().float())


class _Files:
    """The files of one encoder; the first of `ranks` makes them.

    Args:
        session: of the run.
        model: whose encoder is frozen.
        ranks: the processes that call.
        channels_last: order of the weights; by default as the run trains with.
    """

    def __init__(
        self, session: Session, model: EncodingModel, ranks: Ranks, *, channels_last: bool | None = None
    ) -> None:
        self.session, self.ranks = session, ranks
        self.encoder = model.encoder
        self.weights = weights_sha256(model.encoder.net)
        compute = session.config.compute
        self.channels_last = compute.channels_last if channels_last is None else channels_last

    def views(
        self, stage: int, records: Sequence[PictureRecord], views: Mapping[str, Any], epochs: int
    ) -> FeatureCache:
        """The training views of a stage."""
        config = self.session.config
        draws = config.cache.cached_views or epochs
        path = self._path(records, {**views, "draws": draws}, asdict(config.compute))

        def opened() -> FeatureCache:
            return FeatureCache(path, draws=draws, pictures=len(records), width=self.encoder.width)

        def make() -> None:
            size = opened().size_bytes / 1e6
            what = f"embeddings of {draws} views of {len(records):,} pictures"
            print(f"stage {stage}: caching {what} in {path}, {size:,.1f} MB")
            if draws >= epochs:
                print(f"note: no view comes twice in stage {stage}, so it is not faster: --cached-views sets how many")

        self.ranks.from_first(make)
        return opened()

    def crops(self, records: Sequence[PictureRecord]) -> CropCache:
        """The centre crops of pictures, which are computed in float32."""
        views = {"crop": asdict(preprocess_spec(self.encoder))}
        path = self._path(records, views, {"channels_last": self.channels_last})

        def make() -> None:
            CropCache(path, records, width=self.encoder.width)

        self.ranks.from_first(make)
        return CropCache(path, records, width=self.encoder.width)

    def _path(self, records: Sequence[PictureRecord], views: Mapping[str, Any], compute: Mapping[str, Any]) -> Path:
        config = self.session.config
        options = config.model.encoder_options()
        arithmetic = [compute, asdict(config.equalize), self.session.device.type, options]
        key = cache_key(records, self.weights, views, arithmetic)
        return Path(config.cache.cache_dir or self.session.run / "cache") / key.name()
