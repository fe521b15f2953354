"""Compiles the fused loss into the library beside this file: `python -m cpp_ext.build`.

A C++ compiler is all it needs. The CUDA part is built as well where torch is a CUDA build and there is an nvcc of the
same major version; otherwise the build says in a sentence why there is none. The sources use torch's stable ABI, so a
library that was built with one torch loads in every later one.

Environment: CXX, CUDACXX or NVCC, CUDA_HOME, and NTF_CUDA_ARCHS (compute capabilities, "75 80 90").
Exit status: 0 built or up to date, 1 failed, 2 no C++ compiler (nothing is wrong with the sources). With --check: 0 the
library loads, 1 it does not.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpp_ext.library import (
    BUILD_COMMAND,
    FOLDER,
    LIBRARY_FILE,
    RECORD_FILE,
    BuildError,
    BuildRecord,
    file_sha256,
    library_problem,
    loadable_record,
    read_record,
    reading_lock,
    source_hashes,
)
from cpp_ext.toolchain import (
    DEFAULT_CUDA_ARCHS,
    MINIMUM_TORCH,
    CudaToolkit,
    NoCompilerError,
    Toolchain,
    find_toolchain,
    find_torch,
)

PTXAS_LOG_FILE = "soft_contrastive.ptxas.log"
OPTIMISE = ("-O3", "-DNDEBUG")
CXX_FLAGS = (
    *OPTIMISE,
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    f"-DTORCH_TARGET_VERSION=0x{MINIMUM_TORCH[0]:02x}{MINIMUM_TORCH[1]:02x}000000000000ULL",
)
# Lanes may be added in any order and exp sets no errno; NaN and infinity keep their meaning.
TILE_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
NVCC_FLAGS = (*OPTIMISE, "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v")
LINK_FLAGS = ("-shared", "-Wl,--no-undefined", "-Wl,--as-needed")


@dataclass(frozen=True)
class Step:
    """One compiler run: the source it is about, the command, and the file that it makes."""

    source: str
    command: tuple[str, ...]
    output: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=BUILD_COMMAND, description="Compile the fused soft contrastive loss.")
    parser.add_argument("--cpu-only", action="store_true", help="leave the CUDA part out")
    parser.add_argument("--cuda-archs", help=f'compute capabilities, default NTF_CUDA_ARCHS or "{DEFAULT_CUDA_ARCHS}"')
    parser.add_argument(
        "--verbose", action="store_true", help="print every command, what the compilers say, and the kernels' registers"
    )
    parser.add_argument("--check", action="store_true", help="build nothing; exit 0 if the library loads")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            print(f"{FOLDER / LIBRARY_FILE} loads: {check().describe()}")
            return 0
        toolchain = find_toolchain(cpu_only=options.cpu_only, cuda_archs=options.cuda_archs)
        build(toolchain, verbose=options.verbose)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, NoCompilerError) else 1
    return 0


def check(folder: Path = FOLDER) -> BuildRecord:
    """Record of the library in `folder`, which this process can load and has loaded.

    Raises:
        BuildError: there is no torch, or the library cannot be loaded beside it.
    """
    torch = find_torch()
    with reading_lock(folder):
        record = loadable_record(folder, torch_version=torch.version, torch_cuda=torch.cuda)
    from cpp_ext.ops import load_library  # imports torch, without which the rest of this module runs

    load_library(folder)
    return record


def build(toolchain: Toolchain, folder: Path = FOLDER, *, verbose: bool = False) -> BuildRecord:
    """Library in `folder`, compiled unless the one that is there was made from the same by the same.

    Args:
        toolchain: from `find_toolchain`.
        folder: the package's, with csrc in it.
        verbose: print every command, what the compilers say, and the resources of the CUDA kernels.

    Raises:
        BuildError: a compiler failed, or the folder cannot be written to; an earlier library stays as it was.
    """
    with _one_build_at_a_time(folder):
        sources = source_hashes(folder)
        if (old := read_record(folder)) and _is_current(old, toolchain, folder):
            print(f"{folder / LIBRARY_FILE} is up to date: {old.describe()}", flush=True)
            return old
        if toolchain.cpu_only_reason:
            print(f"building without the CUDA part: {toolchain.cpu_only_reason}", flush=True)
        began = time.perf_counter()
        # In the package's folder, so that the rename at the end stays on one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
            library, ptxas_log = _compile(toolchain, folder, Path(scratch), verbose)
            record = BuildRecord(
                sources_sha256=sources,
                library_sha256=file_sha256(library),
                torch=toolchain.torch.version,
                torch_cuda=toolchain.torch.cuda,
                cxx=toolchain.cxx,
                compilers=toolchain.compilers(),
                instruction_sets=tuple(toolchain.instruction_sets),
                cuda_targets=toolchain.cuda.targets if toolchain.cuda else (),
                cpu_only_reason=toolchain.cpu_only_reason,
            )
            (Path(scratch) / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
            # Between the two renames the old record does not fit the new library, which a reader refuses as damaged.
            library.replace(folder / LIBRARY_FILE)
            (Path(scratch) / RECORD_FILE).replace(folder / RECORD_FILE)
        if ptxas_log:
            (folder / PTXAS_LOG_FILE).write_text(ptxas_log, encoding="utf-8")
            if verbose:
                _print_resources(ptxas_log)
        print(f"built {folder / LIBRARY_FILE} in {time.perf_counter() - began:.0f} s: {record.describe()}", flush=True)
        return record


def _is_current(record: BuildRecord, toolchain: Toolchain, folder: Path) -> bool:
    """Whether the library may be loaded and would come out the same again."""
    return (
        library_problem(folder) is None
        and record.cxx == toolchain.cxx
        and record.compilers == toolchain.compilers()
        and record.torch_cuda == toolchain.torch.cuda
        and record.instruction_sets == tuple(toolchain.instruction_sets)
        and record.cuda_targets == (toolchain.cuda.targets if toolchain.cuda else ())
    )


def _compile(toolchain: Toolchain, folder: Path, scratch: Path, verbose: bool) -> tuple[Path, str]:
    """Path of the linked library in `scratch`, and what ptxas said."""
    steps = compile_steps(toolchain, folder / "csrc", scratch)
    print(f"compiling {len(steps)} objects with {toolchain.cxx_version}", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The last ones take longest: the CUDA part, then the widest instruction set.
        running = {step: pool.submit(_run, step, verbose) for step in reversed(steps)}
        try:
            said = {step: future.result() for step, future in running.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    library = scratch / LIBRARY_FILE
    libraries = [f"-L{toolchain.torch.folder / 'lib'}", "-ltorch_cpu"]
    if toolchain.cuda:
        libraries += ["-ltorch_cuda", str(toolchain.cuda.runtime)]
    objects = [str(step.output) for step in steps]
    link = (*toolchain.cxx, *LINK_FLAGS, "-o", str(library), *objects, *libraries)
    _run(Step(LIBRARY_FILE, link, library), verbose)
    return library, "".join(text for step, text in said.items() if step.source.endswith(".cu"))


def compile_steps(toolchain: Toolchain, csrc: Path, scratch: Path) -> list[Step]:
    """The compiler runs that make the objects, in the order in which they are linked.

    Code for any processor comes first: where an inline function was compiled several times over, the linker keeps the
    first, and that one must run everywhere.
    """
    # Not with -I: warnings in torch's headers are not ours.
    cxx = (*toolchain.cxx, *CXX_FLAGS, "-isystem", str(toolchain.torch.folder / "include"))
    plain, tiles, cuda = [], [], []

    def step(command: tuple[str, ...], source: Path, variant: str = "") -> Step:
        output = scratch / f"{source.name}{variant}.o"
        return Step(source.name, (*command, "-c", str(source), "-o", str(output)), output)

    for source in sorted([*csrc.glob("*.cpp"), *csrc.glob("*.cu")]):
        if source.stem.endswith("_tiles") and source.suffix == ".cpp":
            for name, flags in toolchain.instruction_sets.items():
                tiles.append(step((*cxx, *TILE_FLAGS, f"-DNTF_ISA={name}", *flags), source, f".{name}"))
        elif source.stem.endswith("_cuda") or source.suffix == ".cu":
            if toolchain.cuda:
                cuda.append(step(_cuda_command(toolchain, toolchain.cuda, cxx, source), source))
        else:
            plain.append(step(cxx, source))
    return [*plain, *tiles, *cuda]


def _cuda_command(toolchain: Toolchain, cuda: CudaToolkit, cxx: tuple[str, ...], source: Path) -> tuple[str, ...]:
    if source.suffix != ".cu":
        return (*cxx, "-DUSE_CUDA", "-isystem", str(cuda.include))
    host = ("-ccbin", *toolchain.cxx) if len(toolchain.cxx) == 1 else ()
    return (cuda.nvcc, *NVCC_FLAGS, *_gencode(cuda.targets), "--threads", "0", *host)


def _gencode(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Machine code for each target, and PTX of the newest for the GPUs after it."""
    newest = targets[-1]
    pairs = [f"arch=compute_{target},code=sm_{target}" for target in targets]
    pairs.append(f"arch=compute_{newest},code=compute_{newest}")
    return tuple(f"-gencode={pair}" for pair in pairs)


def _run(step: Step, verbose: bool) -> str:
    """What the compiler said on its way to success."""
    if verbose:
        print(shlex.join(step.command), flush=True)
    done = subprocess.run(step.command, capture_output=True, text=True, errors="replace", check=False)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        print(said.rstrip(), file=sys.stderr, flush=True)
        raise BuildError(
            step.source,
            got=f"exit status {done.returncode} from {step.command[0]}, whose message stands above",
            wanted="a compiled file",
            remedy="name the C++ driver in CXX, g++ or clang++ and not gcc or clang, which leave the C++ library out, "
            "or correct what the message names; --verbose prints the command"
            if step.source == LIBRARY_FILE
            else "correct what the message names; --verbose prints the command, --cpu-only leaves CUDA out, and CXX "
            "or CUDACXX choose another compiler",
        )
    if verbose and said.strip():
        print(said.rstrip(), flush=True)
    return said


@contextmanager
def _one_build_at_a_time(folder: Path) -> Iterator[None]:
    """Holds a lock on the sources' folder, so that a second build waits and then finds the first one's library."""
    if not os.access(folder, os.W_OK):
        raise BuildError(
            str(folder), got="a folder that cannot be written to", wanted="the right to write the library there",
            remedy="build as the user who installed the package, or from a checkout",
        )  # fmt: skip
    handle = os.open(folder / "csrc", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _print_resources(ptxas_log: str) -> None:
    from cpp_ext.ptxas import resource_table

    try:
        print(resource_table(ptxas_log), flush=True)
    except BuildError as error:
        print(f"no table of the kernels' resources: {error}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
