"""What the steps of a run share, and what a resume must find as the run began with it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import CONFIG_FILE
from train.config import RunConfig, config_from_dict
from train.embedding_store import EmbeddingStore
from train.encoder import Encoder, with_standardizer
from train.encoder_weights import load_encoder
from train.errors import CheckpointError, ConfigError
from train.feature_cache import weights_sha256
from train.loop import Position, StageLoop
from train.loss_backend import STATE_KEY, LossBackend
from train.methods import encoder_stays_frozen
from train.pictures import PictureRecord, PictureSet
from train.ranks import Ranks
from train.stage import Stage

# Key of the number of processes in a checkpoint; other numbers sum gradients in another order.
PROCESSES_KEY = "processes"
# Key of the configuration in a checkpoint, as JSON.
CONFIG_KEY = "config"


@dataclass(frozen=True)
class TrainingData:
    """Both splits and their hashes.

    Attributes:
        train: of stage 2.
        validation: for the report after each epoch, and for the thresholds.
        hashes: of both, and of the weights that an adapted run begins with.
        traces: of stage 1, which takes the real ones.
    """

    train: PictureSet
    validation: PictureSet
    hashes: dict[str, str]
    traces: tuple[PictureRecord, ...]


@dataclass(frozen=True)
class Session:
    """One start or resume of a run, in one process.

    Attributes:
        config: of the run.
        run: its folder.
        data: both splits.
        device: where this process computes.
        saved: the checkpoint to go on from, or None.
        backend: implementation of Eq. (5).
        ranks: the processes of the run.
    """

    config: RunConfig
    run: Path
    data: TrainingData
    device: torch.device
    saved: dict[str, Any] | None
    backend: LossBackend
    ranks: Ranks

    def encoder(self) -> Encoder:
        """The encoder that the run begins with, and its store where the run has one."""
        model = self.config.model
        encoder = load_encoder(model.encoder, model.encoder_weights, **model.encoder_options())
        with_standardizer(encoder, enabled=model.standardize)
        return with_store(encoder, self.config)

    def loop(self, stage: Stage) -> StageLoop:
        """The loop that trains `stage`, from where the checkpoint stands."""
        saved = self.saved if self.saved is not None and self.saved["stage"] == stage.number else None
        position = Position(stage.number) if saved is None else position_of(saved)
        carried = fingerprint(self.config, self.data, self.backend, self.ranks)
        return StageLoop(stage, self.run, self.config, position, saved, carried)


def uses_store(config: RunConfig) -> bool:
    """Whether a run can look embeddings up: its encoder never changes, and no compiled graph stands in between."""
    return encoder_stays_frozen(config) and not config.compute.compile


def with_store(encoder: Encoder, config: RunConfig) -> Encoder:
    """The encoder, with the store of `--cache-dir` where there is one and the run never changes the encoder.

    Raises:
        TrainingError: the store cannot be opened.
    """
    if config.cache.cache_dir and uses_store(config):
        encoder.store = EmbeddingStore(Path(config.cache.cache_dir), weights_sha256(encoder.net))
    return encoder


def fingerprint(config: RunConfig, data: TrainingData, backend: LossBackend, ranks: Ranks) -> dict[str, Any]:
    """What every checkpoint carries, so that a resume goes on with the same pictures and the same arithmetic."""
    arithmetic = {STATE_KEY: backend.name, PROCESSES_KEY: ranks.size}
    return data.hashes | arithmetic | {CONFIG_KEY: json.dumps(dataclasses.asdict(config))}


def refuse_changed_config(begun: dict[str, Any], config: RunConfig, run: Path) -> None:
    """Refuse to go on with another configuration than the run began with.

    Raises:
        CheckpointError: naming what differs.
    """
    if CONFIG_KEY not in begun:  # checkpoints from before it was kept
        return
    source = f"--resume {run}"
    kept = flat(dataclasses.asdict(config_from_dict(json.loads(begun[CONFIG_KEY]), source=source)))
    now = flat(dataclasses.asdict(config))
    changed = [name for name in now if now[name] != kept[name]]
    if changed:
        shown = changed[:3]
        raise CheckpointError(
            source,
            got=", ".join(f"{name} = {now[name]}" for name in shown),
            wanted="what the run began with, " + ", ".join(f"{name} = {kept[name]}" for name in shown),
            remedy=f"restore its {CONFIG_FILE}, or start a new run with --config {run / CONFIG_FILE}",
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def refuse_changed_data(saved: dict[str, Any], data: TrainingData, run: Path) -> None:
    """Refuse to go on with other pictures than the run began with.

    Raises:
        CheckpointError: a hash differs.
    """
    for name, digest in data.hashes.items():
        if saved[name] != digest:
            raise CheckpointError(
                f"--resume {run}",
                got=f"{'weights' if name.startswith('parent') else 'pictures'} with {name} {digest[:12]}",
                wanted=f"the ones it began with, {saved[name][:12]}",
                remedy="restore them, or start a new run",
            )


def refuse_other_processes(saved: dict[str, Any], ranks: Ranks, run: Path) -> None:
    """Refuse to go on with another number of processes, whose sums end in other bits.

    Raises:
        CheckpointError: the number differs.
    """
    began = int(saved.get(PROCESSES_KEY, 1))  # checkpoints from before there could be several do not say
    if began != ranks.size:
        start = f"torchrun --nproc-per-node {began} -m train.run" if began > 1 else "python -m train.run"
        raise CheckpointError(
            f"--resume {run}",
            got=f"{ranks.size} processes",
            wanted=f"{began}, with which the run began",
            remedy=f"resume it with {start} --resume {run}, or start a new run",
        )


def refuse_too_few_pictures(data: TrainingData, ranks: Ranks) -> None:
    """Refuse a data set that has fewer real training pictures than there are processes.

    Raises:
        ConfigError: naming both numbers.
    """
    reals = sum(record.label == 0 for record in data.train.records)
    if ranks.size > reals:
        raise ConfigError(
            f"{ranks.size} processes",
            got=f"{reals} real training pictures",
            wanted="at least one for every process",
            remedy="start fewer processes with torchrun --nproc-per-node",
        )


def position_of(saved: dict[str, Any]) -> Position:
    """Where a checkpoint stands."""
    return Position(saved["stage"], saved["epoch"], saved["step"], dict(saved["sums"]), dict(saved.get("counts", {})))
