"""Runs the CUDA kernels on the CPU: builds them with the host compiler and tests/cuda_emulation, feeds them cases."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import torch

CSRC = Path(__file__).parents[1] / "cpp_ext" / "csrc"
EMULATION = Path(__file__).parent / "cuda_emulation"
FORMS = ("log_sum", "log_mean", "literal")
DENOMINATORS = ("all", "negatives")
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# With the optimisation that makes compiling and running together shortest.
SANITIZERS = {
    "none": ["-O2"],
    "address": ["-O0", "-fsanitize=address,undefined"],
    "thread": ["-O1", "-fsanitize=thread"],
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One call of all three entry points. `tf32` means tensor cores for float32; half types always take them."""

    embeddings: torch.Tensor
    labels: torch.Tensor
    traces: torch.Tensor
    grad_loss: torch.Tensor
    temperature: float = 0.07
    eta: float = 0.5
    form: str = "log_sum"
    denominator: str = "all"
    tf32: bool = False
    save: bool = True
    multiprocessors: int = 4
    tensor_cores: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What the harness wrote for a case; without `save` only the first four are meant."""

    loss: torch.Tensor
    log_keys: torch.Tensor
    log_positives: torch.Tensor
    log_traces: torch.Tensor
    pull: torch.Tensor
    grad_embeddings: torch.Tensor
    grad_traces: torch.Tensor
    workspace_bytes: tuple[int, int, int]  # forward, backward, backward to the traces
    errors: tuple[int, int, int]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def reason_to_skip() -> str:
    """Why there is no emulation on this machine, or ""."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulation switches stacks by x86-64 instructions, this is {platform.machine()}"
    return "" if compiler() else "no C++ compiler to build the emulation with"


def build(folder: Path, *, csrc: Path = CSRC, sanitizer: str = "none") -> Path:
    """Path of the harness, built from the kernels in `csrc`."""
    executable = folder / f"harness_{sanitizer}"
    options = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror"]
    options += ["-Wno-unknown-pragmas", "-fno-sanitize-recover=all", *SANITIZERS[sanitizer]]
    # Quoted includes look beside the including file first: only CUDA's own headers come from the emulation.
    command = [compiler() or "g++", *options, f"-I{EMULATION}", f"-I{csrc}"]
    command += ["-x", "c++", str(csrc / "soft_contrastive.cu"), str(EMULATION / "harness.cpp"), "-o", str(executable)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return executable


def copied_sources(folder: Path) -> Path:
    """A copy of the kernels that a test may change."""
    return Path(shutil.copytree(CSRC, folder / "csrc"))


def patched_sources(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the kernels in which `old`, which must stand once in `file`, is `new`."""
    csrc = copied_sources(folder)
    replace_once(csrc / file, old, new)
    return csrc


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))


def execute(executable: Path, cases: list[Case], folder: Path) -> subprocess.CompletedProcess[str]:
    """The finished process; its results lie in `folder`."""
    (folder / "cases").write_bytes(b"".join(_bytes_of_case(case) for case in cases))
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [str(executable), str(folder / "cases"), str(folder / "results")]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def run(executable: Path, cases: list[Case], folder: Path) -> list[Result]:
    done = execute(executable, cases, folder)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-6000:]}"
    return _read_results((folder / "results").read_bytes(), cases)


def _bytes_of_case(case: Case) -> bytes:
    rows, width = case.embeddings.shape
    numbers = [TYPES.index(case.embeddings.dtype), rows, len(case.traces), width, FORMS.index(case.form)]
    numbers += [DENOMINATORS.index(case.denominator), int(case.tf32), int(case.save)]
    numbers += [case.multiprocessors, int(case.tensor_cores)]
    head = struct.pack("<10q2d", *numbers, case.temperature, case.eta)
    arrays = (case.labels, case.embeddings, case.traces, case.grad_loss)
    return head + b"".join(_bytes_of(array) for array in arrays)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _read_results(data: bytes, cases: list[Case]) -> list[Result]:
    place = 0
    results = []

    def take(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        nonlocal place
        count = int(np.prod(shape)) * dtype.itemsize
        array = torch.frombuffer(bytearray(data[place : place + count]), dtype=dtype) if count else torch.empty(0)
        place += count
        return array.reshape(shape) if count else torch.empty(shape, dtype=dtype)

    for case in cases:
        (rows, width), dtype = case.embeddings.shape, case.embeddings.dtype
        wide = wide_of(dtype)
        report = take(torch.int64, 6).tolist()
        rowwise = [take(wide, rows) for _ in range(4)]
        pull = take(wide, rows if case.save and case.form != "log_mean" else 0, width)
        gradients = [take(dtype, rows, width), take(dtype, len(case.traces), width)]
        results.append(Result(*rowwise, pull, *gradients, tuple(report[:3]), tuple(report[3:])))
    assert place == len(data), "the harness wrote more than was read"
    return results
