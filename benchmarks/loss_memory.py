"""Extra memory of one call; on a CPU in a process of its own: `python -m benchmarks.loss_memory --help`.

On a CPU: the inputs are made, a call with 64 rows loads what is loaded once, memory that the allocator kept is given
back (malloc_trim) and the kernel's record of the largest resident set is reset (5 into /proc/self/clear_refs). Then the
resident set is read (VmRSS), the loss is called, and the largest resident set (VmHWM) is read; the difference is what
the call needed beyond its inputs, its own results and threads' buffers included.
On a GPU: torch.cuda.max_memory_allocated after the call, minus torch.cuda.memory_allocated before it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_contenders import (
    DTYPES,
    Batch,
    Loss,
    LossBenchmarkError,
    contests,
    matmul_precision,
    precisions_of,
    value_and_gradient,
)

ROOT = Path(__file__).resolve().parents[1]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5), clear_refs: reset the peak resident set size to the current one
FORWARD, BOTH = "forward", "forward and backward"
WARM_UP_ROWS = 64
MIB = 2**20


@dataclass(frozen=True)
class MemoryRow:
    """What one call needed, as it stands in the results file.

    Attributes:
        contest: name of the contest.
        contender: its name.
        n: rows of the batch.
        precision: of inputs and products.
        calls: "forward" (no gradient wanted), or "forward and backward".
        extra_mib: largest use during the call minus the use before it.
        whole_process_mib: largest resident set of the process, Python, libraries and inputs included; None on a GPU.
    """

    contest: str
    contender: str
    n: int
    precision: str
    calls: str
    extra_mib: float
    whole_process_mib: float | None


def measured_here(
    contest: str, contender: str, n: int, *, calls: str = BOTH, precision: str = "float32", device: str = "cpu"
) -> dict[str, Any]:
    """The memory row of one call in this process, which on a CPU should have done nothing else.

    Raises:
        LossBenchmarkError: the device is not there.
    """
    precisions_of(device)
    found = contests(device)[contest]
    loss = found.contenders[contender]
    kind = {"dtype": DTYPES[precision], "device": device}
    batch = found.batch(n, **kind)
    with matmul_precision(precision):
        _call(loss, found.batch(WARM_UP_ROWS, **kind), calls)
        largest_before = resident_bytes("VmHWM") if device == "cpu" else 0
        extra = extra_bytes(loss, batch, calls, device)
    whole = max(largest_before, resident_bytes("VmHWM")) if device == "cpu" else None
    return asdict(
        MemoryRow(
            contest=contest,
            contender=contender,
            n=n,
            precision=precision,
            calls=calls,
            extra_mib=round(extra / MIB, 2),
            whole_process_mib=whole and round(whole / MIB, 1),
        )
    )


def measured_elsewhere(
    contest: str, contender: str, n: int, *, calls: str = BOTH, precision: str = "float32", device: str = "cpu"
) -> dict[str, Any]:
    """The memory row of one call, from a process that does nothing else.

    Raises:
        LossBenchmarkError: the process failed.
    """
    options = {
        "contest": contest,
        "contender": contender,
        "n": n,
        "calls": calls,
        "precision": precision,
        "device": device,
    }
    command = [sys.executable, "-m", "benchmarks.loss_memory"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LossBenchmarkError(
            f"memory of {contender} with N = {n}",
            got=f"exit status {done.returncode} and {done.stderr.strip()[-500:]!r}",
            wanted="a figure",
            remedy="run " + " ".join(f"'{part}'" if " " in part else part for part in command[1:]),
        )
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def extra_bytes(loss: Loss, batch: Batch, calls: str, device: str) -> int:
    """Largest use of memory during one call, minus the use before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _call(loss, batch, calls)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text(RESET_PEAK)
    before = resident_bytes("VmRSS")
    _call(loss, batch, calls)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str, status: str | None = None) -> int:
    """VmRSS (now) or VmHWM (the largest so far) of this process.

    Raises:
        LossBenchmarkError: this system does not tell.
    """
    try:
        lines = (status if status is not None else STATUS.read_text()).splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LossBenchmarkError(
        f"{field} of this process", got=f"no such line in {STATUS}", wanted="Linux", remedy="measure memory there"
    )


def _call(loss: Loss, batch: Batch, calls: str) -> None:
    if calls == BOTH:
        value_and_gradient(loss, batch)
    else:
        with torch.no_grad():
            loss(batch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the memory row of one call as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--contest", default="with traces")
    parser.add_argument("--contender", default="fused")
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--calls", choices=(FORWARD, BOTH), default=BOTH)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = vars(parser.parse_args(arguments))
    try:
        row = measured_here(options.pop("contest"), options.pop("contender"), options.pop("n"), **options)
    except LossBenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
