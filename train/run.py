"""Train a detector: `python -m train.run` (demo preset), `--preset paper --data DIR`, `--resume RUN`."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.errors import NTFError
from train.adaptation import (
    adapted_training,
    adapted_validation,
    own_pictures,
    parent_record,
    refuse_other_pictures,
)
from train.caches import detector_cache, fit_standardizer, shipped_embeddings, trace_cache
from train.checkpoint import (
    CONFIG_FILE,
    CONFIG_SHA256_KEY,
    STAGE1_FILE,
    STAGE2_FILE,
    STATE_FILE,
    TEMPORARIES,
    TRAIN_GENERATORS_KEY,
    config_sha256,
    load_detector,
    load_start,
    load_state,
    make_folder,
    remove_temporaries,
    require_run_file,
    save_calibration,
    save_json,
    save_weights,
    trim_history,
)
from train.compute import check_compute, choose_device, prepare_model
from train.config import RunConfig
from train.config_check import check_config
from train.encoder import Encoder, with_standardizer
from train.encoder_weights import check_encoder, load_exactly, read_state
from train.errors import ConfigError
from train.integrity import CORRUPT_FILE, corrupt_counts, data_source, split_of_run
from train.loss_backend import LossBackend, choose_loss_backend, resumed_loss_backend
from train.methods import METHODS, check_method
from train.metrics import fit_calibration, require_calibration_pictures
from train.model import NTFDetector, TraceModel, detector_from_traces
from train.nearest import keep_neighbours
from train.provenance import environment
from train.ranks import ALONE, Ranks, check_ranks, joined, ranks_from_environment
from train.run_options import Options, parse_options
from train.scoring import (
    mean_natural_trace,
    mean_trace_of_embeddings,
    score_embeddings,
    score_pictures,
)
from train.session import (
    CONFIG_KEY,
    Session,
    TrainingData,
    fingerprint,
    refuse_changed_config,
    refuse_changed_data,
    refuse_other_processes,
    refuse_too_few_pictures,
    uses_store,
    with_store,
)
from train.shared_traces import take_history, trace_record
from train.stages import CrossEntropyStage, DetectorStage, TraceStage
from train.validation_scores import save_validation_scores, validation_scores

RUNS = Path("runs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        ranks = ranks_from_environment()
        options = parse_options(sys.argv[1:] if arguments is None else list(arguments))
        device = choose_device(options.run.device, ranks)
        check_start(options.run, device, ranks, resume=options.resume is not None)
        with joined(ranks, device):
            run = options.resume or ranks.from_first(lambda: prepare_run_folder(options))
            train(options.run, run, resume=options.resume is not None, ranks=ranks, stage1_from=options.stage1_from)
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        remedy = "correct it and start again, or with --resume where the run has begun: its last checkpoint is whole"
        print(f"error: {error}: {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; go on with python -m train.run --resume RUN", file=sys.stderr)
        return 130
    return 0


def check_start(config: RunConfig, device: torch.device, ranks: Ranks, *, resume: bool) -> None:
    """Refuse what cannot run here before a folder is made or replaced, or another process waited for.

    Raises:
        ConfigError: naming the option.
    """
    batch_sizes = {"--stage2.batch-size": config.stage2.batch_size}
    if METHODS[config.method].natural_traces:
        batch_sizes = {"--stage1.batch-size": config.stage1.batch_size} | batch_sizes
    check_ranks(ranks, batch_sizes=batch_sizes)
    check_compute(config.compute, device, ranks)
    if config.cache.cache_features and ranks.local_size < ranks.size:
        raise ConfigError(
            "--cache-features",
            got="processes on several machines",
            wanted="one machine, whose processes map the same file",
            remedy="leave it out",
        )
    if not resume:  # a resumed run has its weights and its implementation in its checkpoint
        if not config.adapt.adapt_real:
            check_encoder(config.model.encoder, config.model.encoder_weights)
        choose_loss_backend(config.loss.loss_backend, device.type)


def prepare_run_folder(options: Options) -> Path:
    """An empty run folder.

    Raises:
        ConfigError: the folder is taken, or cannot be made.
    """
    kind = f"{Path(options.run.adapt.run).name}-adapted" if options.run.adapt.adapt_real else options.run.preset
    name = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = options.out or RUNS / name
    # A run that was killed before it had a configuration has nothing to resume and may be started again.
    if run.exists() and {path.name for path in run.iterdir()} - {path.name for path in run.glob(TEMPORARIES)}:
        if not options.overwrite or not (run / CONFIG_FILE).is_file():
            raise ConfigError(
                f"--out {run}",
                got="a folder that is not empty",
                wanted="a new folder, or an earlier run and --overwrite",
                remedy="choose another name, pass --overwrite, or go on with --resume",
            )
        shutil.rmtree(run)
    make_folder(run, option="--out")
    return run


def train(
    config: RunConfig,
    run: Path,
    *,
    resume: bool = False,
    ranks: Ranks = ALONE,
    stage1_from: Path | None = None,
) -> NTFDetector:
    """Train both stages and calibrate; everything is left in the run folder.

    Args:
        config: what to do.
        run: run folder; empty, or with `resume` one that was stopped.
        resume: go on where the last checkpoint stands, to the same numbers as without the stop.
        ranks: this process among those that train the run; inside of `train.ranks.joined`.
        stage1_from: run whose stage 1 is taken over, to the same weights as training it.

    Returns:
        The trained detector in eval mode.

    Raises:
        NTFError: a configuration, data, checkpoint or training error, in a full sentence.
    """
    check_config(config)
    check_method(config)
    device = choose_device(config.device, ranks)
    saved = load_state(run) if resume and (run / STATE_FILE).is_file() else None
    # A run that was stopped before its first checkpoint begins again, as it began.
    begun = saved if saved is not None or not resume else load_start(run)
    if begun is None:
        backend = choose_loss_backend(config.loss.loss_backend, device.type)
    else:
        refuse_changed_config(begun, config, run)
        refuse_other_processes(begun, ranks, run)
        backend = resumed_loss_backend(begun, device.type, run)
    data = ranks.from_first(lambda: load_training_data(config))
    refuse_too_few_pictures(data, ranks)
    session = Session(config, run, data, device, saved, backend, ranks)
    if begun is not None:
        refuse_changed_data(begun, data, run)
    traces = trace_record(session, stage1_from)
    if ranks.first:
        remove_temporaries(run)
        if begun is None:
            write_config(run, config, data, backend, ranks, traces)
        else:
            stage, epoch = (saved["stage"], saved["epoch"]) if saved is not None else (1, 0)
            trim_history(run, stage=stage, epoch=epoch)
        print(f"training in {run} on {device}, seed {config.seed}", ranks.describe(), sep=", ", flush=True)
        if config.cache.cache_dir and not uses_store(config):
            print("note: the encoder is trained or compiled, so its embeddings are not looked up in --cache-dir")
        if METHODS[config.method].natural_traces:
            print(backend.describe(), flush=True)

    traces = None
    if METHODS[config.method].natural_traces:
        traces = train_traces(session, stage1_from)
        detector = train_detector(session, traces)
    elif METHODS[config.method].neighbours:
        detector = keep_neighbours(session)
    else:
        detector = train_classifier(session)
    return finish(session, detector, traces) if ranks.first else detector.eval()


def train_traces(session: Session, stage1_from: Path | None = None) -> TraceModel:
    """Stage 1, or what an earlier session or another run made of it."""
    config, run, saved = session.config, session.run, session.saved
    torch.manual_seed(config.seed)
    if saved is not None and saved["stage"] > 1:
        return load_traces(config, run).to(session.device)
    if stage1_from is not None:
        model = load_traces(config, stage1_from)
        if session.ranks.first:
            save_weights(run / STAGE1_FILE, model)
            take_history(run, stage1_from)
            print(f"stage 1 taken from {stage1_from}", flush=True)
        return model.to(session.device)
    if config.adapt.adapt_real:
        model = load_traces(config, Path(config.adapt.run))
    else:
        model = TraceModel(session.encoder(), config.model.embedding_dim, head_width=config.model.head_width)
    model.encoder.last_blocks(config.stage2.train_encoder_blocks)  # too many are refused here, and not after stage 1
    model.to(session.device)
    prepare_model(model, config.compute)
    if config.model.standardize and saved is None and not config.adapt.adapt_real:
        fit_standardizer(session, model)
    cache = trace_cache(session, model)
    session.loop(TraceStage(model, session.data.traces, config, session.ranks, cache)).train()
    if session.ranks.first:
        save_weights(run / STAGE1_FILE, model)
    return model


def load_traces(config: RunConfig, run: Path) -> TraceModel:
    """What stage 1 of a run left.

    Raises:
        CheckpointError: it is not there, or does not fit.
    """
    encoder = Encoder(config.model.encoder, **config.model.encoder_options())
    with_standardizer(encoder, enabled=config.model.standardize)
    model = TraceModel(encoder, config.model.embedding_dim, head_width=config.model.head_width)
    path = require_run_file(run, STAGE1_FILE)
    load_exactly(model, read_state(path), source=path)
    with_store(encoder, config)
    return model


def train_detector(session: Session, traces: TraceModel) -> NTFDetector:
    """Stage 2 on the frozen encoder, or on one whose last blocks are trained."""
    config, model = session.config, session.config.model
    tuned = config.stage2.train_encoder_blocks > 0
    torch.manual_seed(config.seed + 1)
    detector = detector_from_traces(traces, model.embedding_dim, model.classifier_input, own_encoder=tuned)
    prepare_model(detector.to(session.device), config.compute)
    if config.adapt.adapt_real:
        parent = load_detector(Path(config.adapt.run))
        detector.projection.load_state_dict(parent.projection.state_dict())
        detector.classifier.load_state_dict(parent.classifier.state_dict())
    if not tuned:
        return run_stage2(session, detector, DetectorStage)
    prepare_model(traces.requires_grad_(False).eval(), config.compute)  # as stage 1 had it, also where it was loaded
    return run_stage2(session, detector, DetectorStage, traces)


def train_classifier(session: Session) -> NTFDetector:
    """Stage 2 of a method without natural traces; what is of them in the detector stays as it was drawn."""
    config, model = session.config, session.config.model
    torch.manual_seed(config.seed + 1)
    detector = NTFDetector(session.encoder(), model.embedding_dim, model.classifier_input, head_width=model.head_width)
    detector.to(session.device)
    prepare_model(detector, config.compute)
    if model.standardize and session.saved is None:
        fit_standardizer(session, detector)
    return run_stage2(session, detector, CrossEntropyStage)


def run_stage2(
    session: Session, detector: NTFDetector, kind: type[DetectorStage], traces: TraceModel | None = None
) -> NTFDetector:
    """Train a detector on the labelled pictures; `traces` has the natural traces' encoder where it is another one."""
    config, data = session.config, session.data
    stage = kind(
        detector,
        data.train.records,
        config,
        data.validation.records,
        session.backend.name,
        session.ranks,
        detector_cache(session, detector),
        traces,
    )
    session.loop(stage).train()
    return detector


def finish(session: Session, detector: NTFDetector, traces: TraceModel | None) -> NTFDetector:
    """Store the mean natural trace and fit temperature, bias and thresholds on the validation pictures.

    Args:
        session: of the run.
        detector: trained.
        traces: what stage 1 left; None for a method without natural traces.
    """
    config, run, validation = session.config, session.run, session.data.validation.records
    # As `load_detector` has it, so that thresholds are those of the model that is shipped.
    detector.eval().to(memory_format=torch.contiguous_format)
    if traces is not None:
        reals = [record for record in session.data.traces if record.label == 0]
        traces.eval().to(memory_format=torch.contiguous_format)
        kept = shipped_embeddings(session, traces, reals)
        detector.mean_trace.copy_(
            mean_natural_trace(traces, reals, workers=config.workers)
            if kept is None
            else mean_trace_of_embeddings(traces, kept)
        )
    save_weights(run / STAGE2_FILE, detector)
    kept = shipped_embeddings(session, detector, validation)
    if kept is None:
        scores = score_pictures(detector, validation, workers=config.workers)
    else:
        scores = score_embeddings(detector, kept)
    labels = np.array([record.label for record in validation])
    calibration = fit_calibration(
        scores.logits,
        labels,
        real_flagged_rate=config.decision.real_flagged_rate,
        fake_missed_rate=config.decision.fake_missed_rate,
        rule=config.decision.threshold_rule,
    )
    save_validation_scores(run, validation_scores(session.data.validation, scores.logits))
    save_calibration(run, calibration)
    print(
        f"{run}: trained and calibrated; real up to logit {calibration.real_threshold:.3f}, "
        f"fake above {calibration.fake_threshold:.3f}"
    )
    return detector


def load_training_data(config: RunConfig) -> TrainingData:
    """Both splits, after printing what was found.

    Raises:
        DataError: a split is missing, empty, has one class only, or corrupt pictures that may not be left out; or the
            validation pictures are too few for the rates.
        ConfigError: a selected generator is not there.
    """
    source = data_source(config.data)
    train, validation = (split_of_run(config, source, split) for split in ("train", "val"))
    traces = train.records
    if config.adapt.adapt_real:
        refuse_other_pictures(config, train, validation)
        traces = own_pictures(config).learnt
        train, validation = adapted_training(config, train), adapted_validation(config, validation)
    print(train.describe(), validation.describe(), config.equalize.describe(), sep="\n")
    require_calibration_pictures(
        np.array([record.label for record in validation.records]),
        real_flagged_rate=config.decision.real_flagged_rate,
        fake_missed_rate=config.decision.fake_missed_rate,
        rule=config.decision.threshold_rule,
    )
    hashes = {"train_sha256": train.content_sha256(), "val_sha256": validation.content_sha256()}
    if config.adapt.adapt_real:
        hashes |= {f"parent_{name}": value for name, value in parent_record(config).items() if name != "run"}
    return TrainingData(train, validation, hashes, traces)


def write_config(
    run: Path,
    config: RunConfig,
    data: TrainingData,
    backend: LossBackend,
    ranks: Ranks = ALONE,
    traces: Mapping[str, Any] | None = None,
) -> None:
    """The resolved configuration with everything that a reader needs to repeat the run; `traces` says it of stage 1."""
    corrupt = data.train.corrupt + data.validation.corrupt
    pictures: dict[str, Any] = {"train_pictures": len(data.train), "val_pictures": len(data.validation)}
    pictures |= {"treatment": config.equalize.describe(), "corrupt_left_out": corrupt_counts(corrupt)}
    pictures[TRAIN_GENERATORS_KEY] = sorted({r.generator for r in data.train.records if r.label == 1})
    if corrupt:
        listed = [dataclasses.asdict(picture) for picture in corrupt]
        save_json(run / CORRUPT_FILE, {"counts": corrupt_counts(corrupt), "pictures": listed})
    plain = dataclasses.asdict(config)
    start = {name: value for name, value in fingerprint(config, data, backend, ranks).items() if name != CONFIG_KEY}
    start[CONFIG_SHA256_KEY] = config_sha256(plain)
    content: dict[str, Any] = {
        "config": plain,
        "data": data.hashes | pictures,
        "environment": environment() | {"loss_backend": dataclasses.asdict(backend)},
        "start": start,
    } | dict(traces or {})
    if config.adapt.adapt_real:
        content["parent"] = parent_record(config)
    save_json(run / CONFIG_FILE, content)


if __name__ == "__main__":
    status = main()
    if status and "WORLD_SIZE" in os.environ:
        # Threads of a broken process group would keep this process from ending, and torchrun from ending the others.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
