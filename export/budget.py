"""The accuracy budget: what a precision may cost on validation pictures, and what a graph does cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from export.errors import ExportError
from export.trt_options import Options


@dataclass(frozen=True)
class Budget:
    """What a precision may lose against PyTorch on the validation pictures, in percentage points.

    Attributes:
        ap: average precision, of the generator that loses most.
        accuracy: accuracy at each one's own threshold.
        flips: share of pictures whose verdict differs, into or out of `uncertain` included.
        ece: rise of the expected calibration error.

    Note:
        One single picture is always allowed for accuracy and flips: less cannot be resolved.
    """

    ap: float
    accuracy: float
    flips: float
    ece: float

    def __post_init__(self) -> None:
        for field in fields(self):
            points = getattr(self, field.name)
            if not 0 <= points < math.inf:
                raise ExportError(
                    f"--budget-{field.name}",
                    got=f"{points:g}",
                    wanted="percentage points, 0 or more",
                    remedy="choose some",
                )

    @classmethod
    def of(cls, options: Options) -> Budget:
        """The budget of a command line.

        Raises:
            ExportError: it is no number of points.
        """
        return cls(**{field.name: getattr(options, f"budget_{field.name}") for field in fields(cls)})


@dataclass(frozen=True)
class Cost:
    """What a graph on one back-end loses against PyTorch; negative where it gains.

    Attributes:
        backend: what ran the graph.
        pictures: how many were compared.
        ap: points of average precision by generator, and of all pictures; None for a generator without both classes.
        accuracy: points of accuracy at each one's own threshold.
        flips: points of verdicts that differ.
        ece: points of expected calibration error that are added.
        logit_rms: root mean square of the logits' differences.
        broken_limits: limits of the precision that are broken besides, in words; see `export.parity`.
    """

    backend: str
    pictures: int
    ap: dict[str, float | None]
    accuracy: float
    flips: float
    ece: float
    logit_rms: float
    broken_limits: tuple[str, ...] = ()

    @property
    def worst_ap(self) -> float:
        """Loss of the generator that loses most, or of all pictures."""
        return max(loss for loss in self.ap.values() if loss is not None)

    def excess(self, budget: Budget) -> list[str]:
        """Each figure above its budget and each broken limit, in words; empty when the graph can be shipped."""
        picture = 100.0 / self.pictures
        checks = (
            ("AP", self.worst_ap, budget.ap),
            ("accuracy", self.accuracy, max(budget.accuracy, picture)),
            ("verdict flips", self.flips, max(budget.flips, picture)),
            ("calibration error", self.ece, budget.ece),
        )
        # Written so that NaN is above every budget.
        over = [
            f"{what} {cost:.2f} points, at most {most:.2f}" for what, cost, most in checks if not cost <= most + 1e-9
        ]
        return [*over, *self.broken_limits]
