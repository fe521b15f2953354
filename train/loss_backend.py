"""Which implementation of Eq. (5) a run uses: chosen once, before any work, and kept through every resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpp_ext.ops import Backend, Implementation, fused_problem, loaded_record
from train.errors import CheckpointError, ConfigError

# Key of the implementation in a checkpoint. Runs from before there was a choice used the reference.
STATE_KEY = "loss_backend"


@dataclass(frozen=True)
class LossBackend:
    """The implementation of a run.

    Args:
        name: "fused" or "reference".
        detail: what the fused one was built for, or why the reference was taken.
    """

    name: Implementation
    detail: str

    def describe(self) -> str:
        """The line that training prints."""
        return f"soft contrastive loss: {self.name} ({self.detail})"


def choose_loss_backend(choice: Backend, device: str) -> LossBackend:
    """The implementation that a new run uses.

    Args:
        choice: --loss-backend.
        device: type of the torch device, "cpu" or "cuda".

    Raises:
        ConfigError: "fused" cannot run here.
    """
    if choice == "reference":
        return LossBackend("reference", "as --loss-backend says")
    problem = fused_problem(device)
    if problem is None:
        record = loaded_record()
        return LossBackend("fused", record.describe() if record else "")
    if choice == "fused":
        raise ConfigError("--loss-backend fused", got=problem.got, wanted=problem.wanted, remedy=problem.remedy)
    return LossBackend("reference", f"memory grows with the square of the batch; the fused one: {problem}")


def resumed_loss_backend(saved: dict[str, Any], device: str, run: Path) -> LossBackend:
    """The implementation that a run began with: the other one's last bits differ.

    Raises:
        CheckpointError: it cannot run here.
    """
    name: Implementation = saved.get(STATE_KEY, "reference")
    if name == "reference":
        return LossBackend("reference", "as the run began")
    try:
        return choose_loss_backend("fused", device)
    except ConfigError as error:
        raise CheckpointError(
            f"--resume {run}",
            got=error.got,
            wanted="the fused loss, with which the run began",
            remedy=f"{error.remedy}, or start a new run",
        ) from error
