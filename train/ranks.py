"""The processes that train one run together: who they are, and what passes between them (torchrun; gloo or NCCL).

Each batch of the run is dealt to the processes in consecutive parts, and losses are computed over the joint batch, so
that several processes do what one does. Without torchrun there is one process, and nothing here communicates.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpp_ext import gather_rows
from train.errors import ConfigError, TrainingError

# A process waits so long for the others; scoring and checkpoints, where the first one works alone, take less.
TIMEOUT = timedelta(minutes=30)
# What gloo and NCCL say when another process has gone.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket", "timed out")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: 0 to size - 1; the first one writes the run folder.
        size: number of processes.
        local_rank: the same on this machine.
        local_size: number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder and speaks to the reader."""
        return self.rank == 0

    def describe(self) -> str:
        """What training prints."""
        return "1 process" if self.size == 1 else f"{self.size} processes"

    def counts(self, rows: int) -> list[int]:
        """Rows of each process when `rows` are dealt; they differ by one at most, the first ones have more."""
        return [rows // self.size + (rank < rows % self.size) for rank in range(self.size)]

    def part(self, rows: int) -> slice:
        """This process's rows among `rows`."""
        counts = self.counts(rows)
        begin = sum(counts[: self.rank])
        return slice(begin, begin + counts[self.rank])

    def joint(self, own: Tensor, rows: int) -> Tensor:
        """The `rows` rows of the joint batch in the order that one process has them, with gradient.

        Args:
            own: this process's rows, or one row to leave out where its part is empty.
            rows: rows of the joint batch.
        """
        if self.size == 1:
            return own
        counts = self.counts(rows)
        return gather_rows(own[: counts[self.rank]], counts)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in every process.

        Raises:
            TrainingError: in the other processes, where `make` fails in the first.
        """
        if self.size == 1:
            return make()
        told: list[Any] = [False, None]
        try:
            if self.first:
                told = [True, make()]
        finally:
            dist.broadcast_object_list(told)
        if not told[0]:
            raise self._error("an error in process 0", "its answer", "see its message")
        result: T = told[1]
        return result

    def gather_objects(self, own: T) -> list[T]:
        """What each process passes, in the order of their ranks."""
        if self.size == 1:
            return [own]
        received: list[Any] = [None] * self.size
        dist.all_gather_object(received, own)
        return received

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's buffers, such as batch-norm statistics."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def _error(self, got: str, wanted: str, remedy: str) -> TrainingError:
        return TrainingError(f"process {self.rank} of {self.size}", got=got, wanted=wanted, remedy=remedy)

    def lost(self, reason: str) -> TrainingError:
        """The error of a process whose companions have gone."""
        return self._error(
            f"no answer from another process ({reason})",
            "all processes of the run",
            "look for the first message of the process that ended; the last checkpoint is whole: go on with --resume",
        )


ALONE = Ranks()


def ranks_from_environment() -> Ranks:
    """What torchrun says of this process; one process where it did not start it."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return ALONE
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Ranks(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def check_ranks(ranks: Ranks, *, batch_sizes: dict[str, int]) -> None:
    """Refuse more processes than a full batch has pictures.

    Args:
        ranks: of this run.
        batch_sizes: pictures in a full batch, by option.

    Raises:
        ConfigError: naming the option.
    """
    for option, pictures in batch_sizes.items():
        if ranks.size > pictures:
            raise ConfigError(
                f"{ranks.size} processes",
                got=f"{pictures} pictures in a batch of {option}",
                wanted="at least one picture of each batch for every process",
                remedy=f"start fewer processes with torchrun --nproc-per-node, or raise {option}",
            )


@contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The process group of the run, for as long as the context lasts; nothing for one process.

    Raises:
        TrainingError: another process has gone.
    """
    if ranks.size == 1:
        yield
        return
    # Buckets must not change after the first batch, or a resumed run would sum gradients in another order; this is
    # DistributedDataParallel's way to say so, and it warns that it is slower where every parameter is used.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
    before = _end_on_sigterm(ranks)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, **options)
        yield
        dist.destroy_process_group()
    except RuntimeError as error:
        text = str(error).strip().split("\n", 1)[0]
        if not isinstance(error, dist.DistError) and not any(word in text.lower() for word in _LOST):
            raise
        raise ranks.lost(text) from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _end_on_sigterm(ranks: Ranks) -> Any:
    """Raise where torchrun ends this process because another one has ended; returns the handler before."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def end(*_: object) -> None:
        raise ranks.lost("torchrun ended this process")

    return signal.signal(signal.SIGTERM, end)
