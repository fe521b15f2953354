"""The command line of `python -m train.run`."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

import tyro

from train.adaptation import adaptable_config
from train.checkpoint import load_config, newest_run
from train.config import AdaptConfig, Preset, RunConfig, config_from_file, preset_config
from train.config_check import check_config
from train.errors import ConfigError
from train.methods import METHODS, check_method, with_method


@dataclass(frozen=True)
class Options:
    """Train a detector of generated images in two stages; without arguments, the demo."""

    preset: Preset = "demo"
    """Starting values of all other options."""
    config: Path | None = None
    """Starting values from a run's config.json, instead of a preset."""
    out: Path | None = None
    """Run folder to make; default runs/<preset>-<date and time>."""
    resume: Path | None = None
    """Run folder to go on with, with its own configuration."""
    overwrite: bool = False
    """Replace the run in --out."""
    stage1_from: Path | None = None
    """Take stage 1 over from this run instead of training it; refused where it would end in other weights."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def parse_options(arguments: list[str]) -> Options:
    """Options from the command line, on top of a preset, a configuration file or the run that is resumed.

    Raises:
        ConfigError: values that do not make sense, or a resumed run with changed options.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=get_args(Preset))
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path)
    first.add_argument("--adapt-real")
    first.add_argument("--run", type=Path)
    first.add_argument("--method")
    known, _ = first.parse_known_args(arguments)
    base = _starting_values(known)
    default = Options(preset=known.preset or "demo", run=base)
    options = tyro.cli(Options, prog="python -m train.run", args=arguments, default=default)
    if known.resume is None:
        _refuse_unfit_adaptation(options, base, known.preset)
    further = options.config or options.out or options.overwrite or options.stage1_from
    if known.resume is not None and (options.run != base or further):
        raise ConfigError(
            f"--resume {known.resume}",
            got="further options",
            wanted="the run's own configuration",
            remedy="pass --resume alone, or start a new run with --config",
        )
    check_config(options.run)
    check_method(options.run)
    return options


def _starting_values(known: argparse.Namespace) -> RunConfig:
    """What all other options are changes of."""
    if known.resume is not None:
        return load_config(known.resume)
    if known.adapt_real is not None:
        parent = known.run or newest_run()
        return dataclasses.replace(adaptable_config(parent), adapt=AdaptConfig(known.adapt_real, str(parent)))
    base = preset_config(known.preset or "demo") if known.config is None else config_from_file(known.config)
    # A file that has this method already has its values, or others on purpose; tyro refuses a method of no name.
    if known.method in METHODS and known.method != base.method:
        return with_method(base, known.method)
    return base


def _refuse_unfit_adaptation(options: Options, base: RunConfig, preset: str | None) -> None:
    adapt = options.run.adapt
    if adapt.run and not adapt.adapt_real:
        raise ConfigError(
            f"--run {adapt.run}",
            got="no --adapt-real",
            wanted="a folder of real pictures to adapt the run to",
            remedy="pass --adapt-real DIR, or --resume to go on with a run that was stopped",
        )
    if not adapt.adapt_real:
        return
    fixed = ("method", "model", "data")
    changed = [name for name in fixed if getattr(options.run, name) != getattr(base, name)]
    if options.config is not None or preset is not None:
        changed.append("preset or configuration")
    if changed:
        raise ConfigError(
            f"--adapt-real {adapt.adapt_real}",
            got=f"another {', '.join(changed)} than {adapt.run} has",
            wanted="options of stages, loss, decision and computation alone",
            remedy="leave them out, or train a new run",
        )
