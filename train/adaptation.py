"""Adapting a finished run to a user's own unlabelled real pictures: `--adapt-real DIR --run RUN`.

Stage 1 goes on from the run's weights, on these pictures alone. Since that moves the natural traces, stage 2 follows on
the run's own pictures with these beside them as real, from the run's projection and classifier. Part of the user's
pictures is held out: with the run's validation fakes it gives temperature, bias and thresholds, so that the rate of
real pictures flagged is that of the user's kind of picture.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.decode import PICTURE_SUFFIXES
from runtime.manifest import sha256_of
from train.checkpoint import CONFIG_FILE, STAGE1_FILE, STAGE2_FILE, load_config, require_run_file
from train.config import RunConfig
from train.data_csv import LABEL_WORDS
from train.errors import CheckpointError, ConfigError, DataError
from train.integrity import checked
from train.methods import METHODS
from train.pictures import PictureRecord, PictureSet

HELD_OUT_SHARE = 0.2
GENERATOR = "adapted"


class OwnPictures(NamedTuple):
    """A user's real pictures: those to learn from, and those for the thresholds."""

    learnt: tuple[PictureRecord, ...]
    held_out: tuple[PictureRecord, ...]


def own_pictures(config: RunConfig) -> OwnPictures:
    """The pictures below `--adapt-real`, dealt by the seed.

    Raises:
        DataError: no folder, too few pictures for the wanted rate, a folder for fakes among them, or pictures that
            cannot be decoded and may not be left out.
    """
    root = Path(os.path.abspath(config.adapt.adapt_real))
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    for path in paths:
        if any(LABEL_WORDS.get(part.lower()) == 1 for part in path.relative_to(root).parts[:-1]):
            raise DataError(
                f"--adapt-real {root}",
                got=f"{path.relative_to(root)}, in a folder for fakes",
                wanted="real pictures alone",
                remedy="name the folder of the real pictures",
            )
    needed = math.ceil(1 / config.decision.real_flagged_rate)
    if len(paths) < 2 * needed:
        raise DataError(
            f"--adapt-real {root}",
            got=f"{len(paths)} pictures" if root.is_dir() else "no such folder",
            wanted=f"at least {2 * needed}: half to learn from, half for a rate of "
            f"{config.decision.real_flagged_rate:g} of real pictures flagged",
            remedy="add pictures, or choose a larger --real-flagged-rate",
        )
    held_out = max(needed, math.ceil(HELD_OUT_SHARE * len(paths)))
    order = np.random.default_rng(config.seed).permutation(len(paths))
    chosen = set(order[:held_out].tolist())
    records = tuple(
        PictureRecord(
            path, 0, GENERATOR, GENERATOR, path.relative_to(root).as_posix(), "val" if i in chosen else "train"
        )
        for i, path in enumerate(paths)
    )
    pictures = PictureSet(root, "real pictures alone", records)
    usable = checked(pictures, corrupt=config.corrupt, equalize=config.equalize, workers=config.workers).records
    return OwnPictures(
        tuple(record for record in usable if record.split == "train"),
        tuple(record for record in usable if record.split == "val"),
    )


def adapted_training(config: RunConfig, train: PictureSet) -> PictureSet:
    """The run's training pictures with the user's beside them."""
    return replace(train, records=train.records + own_pictures(config).learnt)


def adapted_validation(config: RunConfig, validation: PictureSet) -> PictureSet:
    """The fakes of the run's validation pictures with the user's held-out real ones; unchanged for other runs."""
    if not config.adapt.adapt_real:
        return validation
    fakes = tuple(record for record in validation.records if record.label == 1)
    return replace(validation, records=fakes + own_pictures(config).held_out)


def adaptable_config(parent: Path) -> RunConfig:
    """Configuration of a run that can be adapted.

    Raises:
        CheckpointError: the run is not finished.
        ConfigError: it is an adapted one itself, or its method has no natural traces.
    """
    config = load_config(parent)
    if not METHODS[config.method].natural_traces:
        raise ConfigError(
            f"--run {parent}",
            got=f"a run of --method {config.method}",
            wanted="one with natural traces",
            remedy="adapt a run of --method ntf",
        )
    if config.stage2.train_encoder_blocks:
        raise ConfigError(
            f"--run {parent}",
            got=f"a run whose stage 2 trained the encoder (train_encoder_blocks {config.stage2.train_encoder_blocks})",
            wanted="one whose stage 2 left it as it was: projection and classifier would go on with another encoder",
            remedy="adapt a run without --stage2.train-encoder-blocks",
        )
    for name in (STAGE2_FILE, STAGE1_FILE, "calibration.json"):
        require_run_file(parent, name)
    if config.adapt.adapt_real:
        raise ConfigError(
            f"--run {parent}",
            got=f"a run that was adapted to {config.adapt.adapt_real}",
            wanted="a run that was not",
            remedy=f"adapt {config.adapt.run} to a folder that holds all your pictures",
        )
    return config


def parent_record(config: RunConfig) -> dict[str, str]:
    """Where an adapted run comes from: the parent and the hashes of its weights."""
    parent = Path(config.adapt.run)
    return {
        "run": str(parent),
        "stage1_sha256": sha256_of(require_run_file(parent, STAGE1_FILE)),
        "stage2_sha256": sha256_of(require_run_file(parent, STAGE2_FILE)),
    }


def refuse_other_pictures(config: RunConfig, train: PictureSet, validation: PictureSet) -> None:
    """Refuse to adapt a run whose own pictures are not those it was trained on.

    Raises:
        CheckpointError: a hash differs.
    """
    parent = Path(config.adapt.run)
    recorded = json.loads(require_run_file(parent, CONFIG_FILE).read_text(encoding="utf-8"))["data"]
    for name, pictures in (("train_sha256", train), ("val_sha256", validation)):
        digest = pictures.content_sha256()
        if digest != recorded[name]:
            raise CheckpointError(
                f"--run {parent}",
                got=f"pictures in {pictures.root} with {name} {digest[:12]}",
                wanted=f"the ones it was trained on, {recorded[name][:12]}: stage 2 needs them",
                remedy="restore the data",
            )
