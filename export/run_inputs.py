"""What an export and a verification need from a run: detector, calibration, validation pictures and hashes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from export.errors import ExportError
from runtime.manifest import CalibrationSpec, sha256_of
from runtime.preprocess import PreprocessSpec
from train.adaptation import adapted_validation
from train.checkpoint import (
    CONFIG_FILE,
    STAGE2_FILE,
    load_calibration,
    load_config,
    load_detector,
    require_run_file,
)
from train.config import RunConfig
from train.integrity import data_source, split_of_run
from train.model import NTFDetector
from train.pictures import PictureSet
from train.scoring import preprocess_spec


@dataclass(frozen=True)
class RunInputs:
    """A finished run, loaded.

    Attributes:
        run: its folder.
        detector: the PyTorch model, on the CPU, in evaluation mode.
        calibration: of the PyTorch model.
        validation: the pictures that thresholds and INT8 ranges are fitted on.
        spec: preprocessing of the model.
        checkpoint_sha256: of the weights.
        training_data_sha256: of the training pictures, as the run recorded it.
        validation_sha256: of the validation pictures.
    """

    run: Path
    detector: NTFDetector
    calibration: CalibrationSpec
    validation: PictureSet
    spec: PreprocessSpec
    checkpoint_sha256: str
    training_data_sha256: str
    validation_sha256: str


def load_run(run: Path, *, data: Path | None = None) -> RunInputs:
    """Everything that an export needs from a run folder.

    Args:
        run: run folder.
        data: folder or CSV whose `val` split takes the place of the run's own.

    Raises:
        ExportError: the run's validation pictures are not those it was calibrated on.
        NTFError: the run or the pictures cannot be read.
    """
    config = load_config(run)
    detector = load_detector(run)
    recorded = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))["data"]
    validation = validation_pictures(config) if data is None else split_of_run(config, data, "val", own=False)
    digest = validation.content_sha256()
    if data is None and digest != recorded["val_sha256"]:
        raise ExportError(
            f"validation pictures in {validation.root}",
            got=f"sha256 {digest}",
            wanted=f"{recorded['val_sha256']}, the pictures that {run} was calibrated on",
            remedy="restore them, or pass --data DIR to calibrate on other pictures",
        )
    return RunInputs(
        run=run,
        detector=detector,
        calibration=load_calibration(run),
        validation=validation,
        spec=preprocess_spec(detector.encoder),
        checkpoint_sha256=sha256_of(run / STAGE2_FILE),
        training_data_sha256=str(recorded["train_sha256"]),
        validation_sha256=digest,
    )


def validation_pictures(config: RunConfig) -> PictureSet:
    """The pictures that a run was calibrated on.

    Raises:
        DataError: they cannot be read.
    """
    return adapted_validation(config, split_of_run(config, data_source(config.data), "val"))


def run_of_checkpoint(checkpoint_sha256: str, runs: Path) -> Path:
    """The run below `runs` whose weights have this hash.

    Raises:
        ExportError: there is none.
    """
    for path in sorted(runs.glob(f"*/{STAGE2_FILE}")):
        if sha256_of(path) == checkpoint_sha256:
            return path.parent
    raise ExportError(
        str(runs),
        got="no run with the weights of this model",
        wanted=f"a {STAGE2_FILE} with sha256 {checkpoint_sha256}",
        remedy="name the run with --run",
    )


def require_checkpoint(run: Path, checkpoint_sha256: str, *, model: Path) -> None:
    """Refuse to compare a model with a run that it was not exported from.

    Raises:
        ExportError: the weights differ.
    """
    digest = sha256_of(require_run_file(run, STAGE2_FILE))
    if digest != checkpoint_sha256:
        raise ExportError(
            f"--run {run}",
            got=f"weights with sha256 {digest}",
            wanted=f"{checkpoint_sha256}, the checkpoint that {model} was exported from",
            remedy="name the run it was exported from, or export again",
        )
