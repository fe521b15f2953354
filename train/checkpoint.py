"""The run folder on disk: configuration, weights, the state of an exact resume, history.

    config.json          resolved configuration, data hashes, versions, commit
    stage1.safetensors   encoder and both trace heads
    stage2.safetensors   the detector, with the mean natural trace
    state.pt             optimiser, random numbers and position, for `--resume`; --method nearest has none
    validation_scores.json  logits and labels of the validation pictures
    calibration.json     temperature, bias and thresholds fitted on the validation pictures
    history.jsonl        one line for each epoch
    report/              what `train.evaluate` writes

Every file but the history is written to a temporary file first and renamed, so a killed run leaves whole files.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from runtime.manifest import CalibrationSpec
from runtime.strict_json import canonical_json, from_jsonable, parse_json, to_jsonable
from train.config import RunConfig, config_from_file
from train.encoder import Encoder, with_standardizer
from train.encoder_weights import load_exactly, read_state
from train.errors import CheckpointError, ConfigError
from train.methods import METHODS
from train.model import NearestNeighbours, NTFDetector, freeze_natural_traces

CONFIG_FILE = "config.json"
STAGE1_FILE = "stage1.safetensors"
STAGE2_FILE = "stage2.safetensors"
STATE_FILE = "state.pt"
CALIBRATION_FILE = "calibration.json"
HISTORY_FILE = "history.jsonl"
TEMPORARIES = ".*.tmp"
# Entry of the start in config.json, for runs that have no checkpoint to compare the configuration with.
CONFIG_SHA256_KEY = "config_sha256"
# Key, beside the data hashes in config.json, of the generators whose fakes were trained on.
TRAIN_GENERATORS_KEY = "train_generators"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between.

    Raises:
        CheckpointError: the disk is full, or cannot be written for another reason; the old file is whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error, len(content)) from error
        raise


def make_folder(folder: Path, *, option: str) -> None:
    """Make a folder for results, with those above it; one that is there already will do.

    Raises:
        ConfigError: it cannot be made or written, naming the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = error.strerror or str(error)
    else:
        if os.access(folder, os.W_OK):
            return
        got = "a folder that cannot be written"
    raise ConfigError(f"{option} {folder}", got=got, wanted="a folder to write into", remedy="name another one")


def remove_temporaries(run: Path) -> None:
    """Remove what a kill in the middle of `write_atomically` left."""
    for path in run.glob(TEMPORARIES):
        path.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError, size_bytes: int) -> CheckpointError:
    return CheckpointError(
        str(path),
        got=error.strerror or str(error),
        wanted=f"room for {size_bytes:,} bytes",
        remedy="free some space and start the command again; training goes on with --resume, since what stood there "
        "before is whole",
    )


def save_json(path: Path, value: Mapping[str, Any]) -> None:
    """Canonical JSON, atomically."""
    write_atomically(path, canonical_json(value).encode())


def save_weights(path: Path, module: nn.Module) -> None:
    """The module's state dictionary as safetensors, atomically."""
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    write_atomically(path, safetensors_bytes(state))


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Resume state: tensors, numbers, strings and containers of them; atomically."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomically(path, buffer.getvalue())


def load_state(run: Path) -> dict[str, Any]:
    """What `save_state` wrote; nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = run / STATE_FILE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            str(path),
            got=str(error).split("\n", 1)[0],
            wanted="the state that training writes at the end of each epoch",
            remedy="start the run again; a run that was stopped in its first epoch has nothing to resume",
        ) from error
    return state


def load_start(run: Path) -> dict[str, Any]:
    """What the run began with, for one that was stopped before its first checkpoint: entries as in a checkpoint.

    Raises:
        CheckpointError: config.json does not say, or was changed.
    """
    path = require_run_file(run, CONFIG_FILE)
    recorded = json.loads(path.read_text(encoding="utf-8"))
    try:
        start: dict[str, Any] = recorded["start"] | {"config": json.dumps(recorded["config"])}
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            str(path), got="no record of a start", wanted="what train.run wrote", remedy="start the run again"
        ) from error
    digest = config_sha256(recorded["config"])
    if start.get(CONFIG_SHA256_KEY, digest) != digest:  # not in runs from before it was recorded
        raise CheckpointError(
            f"--resume {run}",
            got=f"a {CONFIG_FILE} that was changed",
            wanted="the configuration that the run began with",
            remedy=f"restore it, or start a new run with --config {path}",
        )
    return start


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hash of a configuration as it stands in config.json."""
    return hashlib.sha256(canonical_json(config).encode()).hexdigest()


def save_calibration(run: Path, calibration: CalibrationSpec) -> None:
    """Write the calibration of the PyTorch model."""
    save_json(run / CALIBRATION_FILE, to_jsonable(calibration, subject="calibration"))


def load_calibration(run: Path) -> CalibrationSpec:
    """Calibration of the PyTorch model.

    Raises:
        CheckpointError: the run was not finished, so there is none.
        BundleError: the file is damaged.
    """
    path = require_run_file(run, CALIBRATION_FILE)
    content = parse_json(path.read_text(encoding="utf-8", errors="replace"), subject=str(path))
    return from_jsonable(CalibrationSpec, content, subject=str(path))


def load_config(run: Path) -> RunConfig:
    """Configuration of a run.

    Raises:
        CheckpointError: the folder is not a run.
        ConfigError: its config.json does not fit this version.
    """
    return config_from_file(require_run_file(run, CONFIG_FILE))


def load_train_generators(run: Path) -> tuple[str, ...] | None:
    """Generators whose fakes the run was trained on; None for a run from before they were recorded.

    Raises:
        CheckpointError: the folder is not a run.
    """
    recorded = json.loads(require_run_file(run, CONFIG_FILE).read_text(encoding="utf-8"))
    data = recorded["data"]  # a path where the file holds the configuration alone
    names = data.get(TRAIN_GENERATORS_KEY) if isinstance(data, dict) else None
    return None if names is None else tuple(names)


def load_detector(run: Path) -> NTFDetector:
    """The trained detector, on the CPU and in eval mode.

    Raises:
        CheckpointError: the run is not finished, or its weights do not fit its configuration.
    """
    config = load_config(run)
    model = config.model
    path = require_run_file(run, STAGE2_FILE)
    state = read_state(path)
    encoder = with_standardizer(Encoder(model.encoder, **model.encoder_options()), enabled=model.standardize)
    classifier = _room_for_neighbours(config, state) if METHODS[config.method].neighbours else None
    detector = NTFDetector(
        encoder, model.embedding_dim, model.classifier_input, classifier, head_width=model.head_width
    )
    load_exactly(detector, state, source=path)
    return freeze_natural_traces(detector).eval()


def _room_for_neighbours(config: RunConfig, state: Mapping[str, Tensor]) -> NearestNeighbours:
    """A bank of the size that is stored; where none is stored, `load_exactly` will say so."""
    real, fake = (torch.zeros_like(state.get(f"classifier.{name}", torch.empty(0))) for name in ("real", "fake"))
    return NearestNeighbours(real, fake, config.nearest.nearest_k)


def newest_run(root: Path = Path("runs")) -> Path:
    """The finished run below `root` that was trained last.

    Raises:
        CheckpointError: there is none.
    """
    finished = [path.parent for path in root.glob(f"*/{CALIBRATION_FILE}")]
    if not finished:
        raise CheckpointError(
            str(root),
            got="no finished run",
            wanted="a folder that python -m train.run left",
            remedy="train first, or name the run with --run",
        )
    return max(finished, key=lambda run: (run / CALIBRATION_FILE).stat().st_mtime)


def require_run_file(run: Path, name: str) -> Path:
    """Path of a file that a finished run has.

    Raises:
        CheckpointError: it is not there.
    """
    path = run / name
    if not path.is_file():
        wanted, remedy = f"a run with {name}", "name a folder that python -m train.run left"
        if (run / CONFIG_FILE).is_file():
            wanted = f"a finished run with {name}"
            remedy = f"finish it with python -m train.run --resume {run}, or name another run"
        found = "no such folder" if not run.is_dir() else f"a folder without {name}"
        raise CheckpointError(str(run), got=found, wanted=wanted, remedy=remedy)
    return path


def append_history(run: Path, record: Mapping[str, Any]) -> None:
    """Add one line to the history.

    Raises:
        CheckpointError: the disk is full.
    """
    path, line = run / HISTORY_FILE, json.dumps(record, sort_keys=True) + "\n"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise _unwritable(path, error, len(line)) from error


def trim_history(run: Path, *, stage: int, epoch: int) -> None:
    """Drop the lines of epochs that a resume from (stage, epoch) will train again."""
    path = run / HISTORY_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]  # a crash may cut the last line short
    kept = [r for r in records if (r["stage"], r["epoch"]) < (stage, epoch)]
    write_atomically(path, "".join(json.dumps(r, sort_keys=True) + "\n" for r in kept).encode())
