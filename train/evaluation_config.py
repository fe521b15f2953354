"""What an evaluation is asked for: the options of `python -m train.evaluate` beyond its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from train.calibration import check_rates
from train.equalize import EqualizeConfig, check_equalize
from train.errors import ConfigError
from train.evaluation_figures import FigureConfig, check_figures
from train.pictures import CorruptPolicy
from train.robustness import RobustnessConfig, check_robustness

ALL = "all"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is scored, measured and shown."""

    split: str = "test"
    """Split to score; "all" for a collection without splits."""
    corrupt: CorruptPolicy = "refuse"
    """Pictures that cannot be decoded: refuse to evaluate, or leave them out and list them in the report."""
    equalize: Annotated[EqualizeConfig, tyro.conf.arg(name="")] = field(default_factory=EqualizeConfig)
    cache_dir: Path | None = None
    """Folder in which training runs keep the embeddings of this encoder (train.run --cache-dir)."""
    real_flagged_rates: tuple[float, ...] | None = None
    """Wanted shares of real pictures flagged in the table of thresholds, for which the run must have kept its
    validation scores; by default 0.1 % to 10 %, where it has."""
    robustness: Annotated[RobustnessConfig, tyro.conf.arg(name="")] = field(default_factory=RobustnessConfig)
    figures: Annotated[FigureConfig, tyro.conf.arg(name="")] = field(default_factory=FigureConfig)
    paper_tables: bool = False
    """Add tables in the form of the paper's Tables 2 to 5 also where no generator is one of the paper's."""
    batch_size: int = 32
    """Pictures in a forward pass."""
    workers: int = 0
    """Processes that decode."""
    draws: int = 1000
    """Bootstrap resamplings."""

    @property
    def needs_detector(self) -> bool:
        """Whether anything is asked for that logits alone do not say."""
        return self.robustness.enabled or self.figures.tsne or self.figures.gradcam


def check_evaluation(config: EvaluationConfig, *, has_detector: bool = True) -> None:
    """Refuse values that do not make sense.

    Args:
        config: to check.
        has_detector: whether the run's own detector scores the pictures.

    Raises:
        ConfigError: naming the option.
    """
    check_equalize(config.equalize)
    check_robustness(config.robustness)
    check_figures(config.figures)
    if config.real_flagged_rates is not None:
        check_rates(config.real_flagged_rates)
    if config.needs_detector and not has_detector:
        raise ConfigError(
            "robustness, tsne and gradcam",
            got="a scorer",
            wanted="the run's own detector",
            remedy="leave one of them out",
        )
