"""The accuracy budget: what a precision may cost on validation pictures, and what a graph does cost."""

from __future__ import annotations

from dataclasses import dataclass, fields

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

    @classmethod
    def of(cls, options: Options) -> Budget:
        """The budget of a command line."""
        return cls(**{field.name: getattr(options, f"budget_{field.name}") for field in fields(cls)})


@dataclass(frozen=True)
class Cost:
    """What a graph on one back-end loses against PyTorch; negative where it gains.

    Attributes:
        backend: what ran the graph.
        pictures: how many were compared.
        ap: points of average precision by generator; None for one without both classes.
        accuracy: points of accuracy at each one's own threshold.
        flips: points of verdicts that differ.
        ece: points of expected calibration error that are added.
        logit_rms: root mean square of the logits' differences.
    """

    backend: str
    pictures: int
    ap: dict[str, float | None]
    accuracy: float
    flips: float
    ece: float
    logit_rms: float

    @property
    def worst_ap(self) -> float:
        """Loss of the generator that loses most; 0 where none can be judged."""
        return max((loss for loss in self.ap.values() if loss is not None), default=0.0)

    def excess(self, budget: Budget) -> list[str]:
        """Each figure above its budget, in words; empty when all keep within."""
        picture = 100.0 / self.pictures
        checks = (
            ("AP", self.worst_ap, budget.ap),
            ("accuracy", self.accuracy, max(budget.accuracy, picture)),
            ("verdict flips", self.flips, max(budget.flips, picture)),
            ("calibration error", self.ece, budget.ece),
        )
        # Written so that NaN is above every budget.
        return [
            f"{what} {cost:.2f} points, at most {most:.2f}" for what, cost, most in checks if not cost <= most + 1e-9
        ]
