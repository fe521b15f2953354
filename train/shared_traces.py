"""Stage 1 taken over from another run, where training it again would give the same weights.

Stage 1 is a function of its part of the configuration, the real training pictures in their order, the encoder's
weights and the arithmetic. A run records all of that as its trace basis; another run may take its weights over where
the two bases are equal. Options that are not known to touch stage 2 alone count as part of stage 1, so that a new one
prevents sharing until it is listed here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.manifest import sha256_of
from train.checkpoint import (
    CONFIG_FILE,
    HISTORY_FILE,
    STAGE1_FILE,
    require_run_file,
    write_atomically,
)
from train.config import RunConfig
from train.errors import CheckpointError, ConfigError
from train.methods import METHODS
from train.pictures import PictureRecord
from train.ranks import Ranks
from train.session import Session, flat

BASIS_KEY = "trace_basis"
SOURCE_KEY = "stage1_from"
# Parts of a configuration that stage 1 does not read. Where the pictures lie and which were chosen is covered by the
# hash of the real ones.
WITHOUT_STAGE1 = (
    "preset",
    "data",
    "corrupt",
    "train_generators",
    "val_generators",
    "train_share",
    "model.classifier_input",
    "model.encoder_weights",
    "loss.eta",
    "loss.gamma",
    "loss.scl_weight",
    "loss.scl_form",
    "loss.scl_denominator",
    "loss.loss_backend",
    "decision.",
    "stage2.",
    "device",
    "workers",
    "checkpoint_steps",
    "checkpoint_epochs",
)


def trace_record(session: Session, stage1_from: Path | None) -> dict[str, Any]:
    """What config.json says of stage 1: all it depends on, and the run that it is taken from.

    Raises:
        CheckpointError: that run's stage 1 would be another one.
        ConfigError: there is no stage 1 to take over.
    """
    config = session.config
    if not METHODS[config.method].natural_traces or config.adapt.adapt_real:
        if stage1_from is None:
            return {}
        raise ConfigError(
            f"--stage1-from {stage1_from}",
            got="--adapt-real" if config.adapt.adapt_real else f"--method {config.method}",
            wanted="a run of --method ntf that trains stage 1 from the encoder's weights",
            remedy="leave it out",
        )
    basis = trace_basis(config, session.data.traces, session.device.type, session.ranks)
    if config.model.standardize:  # over all training pictures, the fakes as well
        basis["standardized over"] = session.data.hashes["train_sha256"]
    source = {} if stage1_from is None else {SOURCE_KEY: require_same_basis(stage1_from, basis)}
    return {BASIS_KEY: basis} | source


def trace_options(config: RunConfig) -> dict[str, Any]:
    """The options that stage 1 depends on, by their dotted names."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in flat(plain).items() if not _without_stage1(name)}


def _without_stage1(name: str) -> bool:
    return any(name.startswith(part) if part.endswith(".") else name == part for part in WITHOUT_STAGE1)


def trace_basis(config: RunConfig, records: Sequence[PictureRecord], device: str, ranks: Ranks) -> dict[str, Any]:
    """Everything that the weights of stage 1 depend on, as JSON types.

    Args:
        config: of the run.
        records: that stage 1 is given, in their order.
        device: type of the torch device.
        ranks: the processes of the run.
    """
    digest = hashlib.sha256()
    for record in records:
        if record.label == 0:
            digest.update(record.content_sha256().encode())
    weights = Path(config.model.encoder_weights)
    return trace_options(config) | {
        "encoder weights": sha256_of(weights) if weights.is_file() else config.model.encoder_weights,
        "real training pictures": digest.hexdigest(),
        "device": device,
        "processes": ranks.size,
    }


def require_same_basis(source: Path, basis: Mapping[str, Any]) -> dict[str, str]:
    """Refuse a run whose stage 1 is not the one that would be trained.

    Args:
        source: run to take stage 1 from.
        basis: of the run to train.

    Returns:
        The record of where stage 1 comes from.

    Raises:
        CheckpointError: stage 1 is not there, or differs in what is named.
    """
    weights = require_run_file(source, STAGE1_FILE)
    recorded = json.loads(require_run_file(source, CONFIG_FILE).read_text(encoding="utf-8")).get(BASIS_KEY)
    if recorded is None:
        raise _refusal(source, "a run that does not say what its stage 1 depends on", "one of this version")
    changed = sorted(name for name in recorded.keys() | basis.keys() if recorded.get(name) != basis.get(name))
    if changed:
        theirs, ours = (
            ", ".join(f"{name} = {values.get(name)}" for name in changed[:3]) for values in (recorded, basis)
        )
        raise _refusal(source, theirs, ours)
    return {"run": str(source), "stage1_sha256": sha256_of(weights)}


def take_history(run: Path, source: Path) -> None:
    """Put the source's lines of stage 1 into the history of a run that has none of stage 2 yet."""
    lines = require_run_file(source, HISTORY_FILE).read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["stage"] == 1]
    write_atomically(run / HISTORY_FILE, "".join(f"{line}\n" for line in kept).encode())


def _refusal(source: Path, got: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"--stage1-from {source}", got=got, wanted=wanted, remedy="leave it out to train stage 1, or name another run"
    )
