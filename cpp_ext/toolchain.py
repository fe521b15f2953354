"""What the fused loss is compiled with on this machine: C++ compiler, torch, CUDA toolkit and targets."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cpp_ext.library import BuildError

# Turing to Blackwell: every GPU that CUDA 13 still compiles for, one target a generation; later ones run the PTX.
DEFAULT_CUDA_ARCHS = "75 80 86 89 90 100 120"
# 2.10 is the first torch whose stable ABI has parallel_for and tensor allocation with a device.
MINIMUM_TORCH = (2, 10)
X86_INSTRUCTION_SETS = {
    "sse2": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"),
}


class NoCompilerError(BuildError):
    """There is no C++ compiler."""


@dataclass(frozen=True)
class Torch:
    """The torch to build for: version, CUDA version or None, folder."""

    version: str
    cuda: str | None
    folder: Path


@dataclass(frozen=True)
class CudaToolkit:
    """nvcc, where its headers and the runtime library are, and the targets to compile for."""

    nvcc: str
    version: str
    include: Path
    runtime: Path
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Toolchain:
    """Everything that decides what is built; `cuda` is None for the reason that `cpu_only_reason` gives."""

    cxx: tuple[str, ...]
    cxx_version: str
    torch: Torch
    instruction_sets: dict[str, tuple[str, ...]]
    cuda: CudaToolkit | None
    cpu_only_reason: str

    def compilers(self) -> dict[str, str]:
        """Version of each compiler that will run."""
        return {"c++": self.cxx_version} | ({"nvcc": self.cuda.version} if self.cuda else {})


def find_toolchain(*, cpu_only: bool = False, cuda_archs: str | None = None) -> Toolchain:
    """Compilers, torch and targets of this machine.

    Args:
        cpu_only: leave the CUDA part out.
        cuda_archs: compute capabilities, "75 80 90"; None or "" takes NTF_CUDA_ARCHS, then the default.

    Raises:
        NoCompilerError: no C++ compiler, or the operating system is not Linux.
        BuildError: torch is missing or too old, or CXX, CUDACXX, NVCC, CUDA_HOME or a target makes no sense.
    """
    if sys.platform != "linux":
        raise NoCompilerError(
            "the fused loss", got=f"the system {sys.platform}", wanted="Linux", remedy="train with the reference loss"
        )
    targets, source = ((), "") if cpu_only else _wanted_targets(cuda_archs)
    cxx = find_cxx()
    torch = find_torch()
    cuda, reason = (None, "--cpu-only") if cpu_only else _find_cuda(torch, targets, source)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return Toolchain(
        cxx=cxx,
        cxx_version=_first_line([*cxx, "--version"]),
        torch=torch,
        instruction_sets=dict(X86_INSTRUCTION_SETS) if x86 else {"generic": ()},
        cuda=cuda,
        cpu_only_reason=reason,
    )


def _wanted_targets(option: str | None) -> tuple[tuple[str, ...], str]:
    """The targets to compile for, and the option or variable that names them, "" for the default."""
    for source, text in (("--cuda-archs", option), ("NTF_CUDA_ARCHS", os.environ.get("NTF_CUDA_ARCHS"))):
        if text and text.strip():
            return parse_targets(text, source), source
    return parse_targets(DEFAULT_CUDA_ARCHS, "DEFAULT_CUDA_ARCHS"), ""


def parse_targets(text: str, source: str) -> tuple[str, ...]:
    """Compute capabilities in ascending order from "75 80 90" or "75;80,90".

    Args:
        text: at least one of them.
        source: the option or variable that holds the text, for the error.

    Raises:
        BuildError: something that is not two or three digits.
    """
    words = re.split(r"[\s,;]+", text.strip())
    for word in words:
        if not re.fullmatch(r"\d{2,3}", word):
            raise BuildError(
                source,
                got=repr(word),
                wanted=f'compute capabilities without a dot, for example "{DEFAULT_CUDA_ARCHS}"',
                remedy="correct it, or leave it out for the default",
            )
    return tuple(sorted(set(words), key=int))


def find_cxx() -> tuple[str, ...]:
    """The C++ compiler as the beginning of a command: CXX, or the first of c++, g++ and clang++.

    Raises:
        NoCompilerError: there is none, and none is named.
        BuildError: CXX is no command, or names a compiler that is not there.
    """
    if named := _words_of_cxx():
        if shutil.which(named[0]):
            return named
        raise BuildError(
            "CXX",
            got=f"{named[0]}, which is not on the path",
            wanted="a compiler for C++20",
            remedy="correct it, or unset it for the first of c++, g++ and clang++",
        )
    for candidate in ("c++", "g++", "clang++"):
        if shutil.which(candidate):
            return (candidate,)
    raise NoCompilerError(
        "the C++ compiler",
        got="none of c++, g++ and clang++",
        wanted="a compiler for C++20",
        remedy="install g++ (Debian: apt install g++) or set CXX; until then training takes the reference loss",
    )


def _words_of_cxx() -> tuple[str, ...]:
    text = os.environ.get("CXX", "")
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise BuildError(
            "CXX",
            got=f"{text}, which cannot be split into words ({error})",
            wanted="a command as a shell reads it",
            remedy="close the quotation, or unset it for the first of c++, g++ and clang++",
        ) from error


def find_torch() -> Torch:
    """The torch to build for.

    Raises:
        BuildError: it is missing, or too old for its stable ABI.
    """
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            "torch", got=str(error), wanted="an installed torch", remedy='pip install "ntf-toolkit[train]"'
        ) from error
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        raise BuildError(
            "torch",
            got=version,
            wanted=f"{MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]} or newer, for its stable ABI",
            remedy="pip install --upgrade torch",
        )
    return Torch(version, torch.version.cuda, Path(torch.__file__).resolve().parent)


def _find_cuda(torch: Torch, targets: tuple[str, ...], source: str) -> tuple[CudaToolkit | None, str]:
    """The CUDA toolkit that fits torch, or None and why there is none; `source` as in `_wanted_targets`."""
    if torch.cuda is None:
        return None, f"torch {torch.version} is a CPU build"
    nvcc = find_nvcc()
    if nvcc is None:
        return None, "no nvcc in CUDACXX, NVCC, CUDA_HOME, PATH or /usr/local/cuda"
    version = next((line for line in _output([nvcc, "--version"]).splitlines() if "release" in line), "")
    release = re.search(r"release (\d+)\.", version)
    if release is None:
        return None, f"{nvcc} does not say its release"
    major = torch.cuda.partition(".")[0]
    if release[1] != major:
        return None, f"nvcc is of CUDA {release[1]} and torch {torch.version} of CUDA {torch.cuda}"
    home = Path(nvcc).resolve().parents[1]
    homes = [home, Path(os.environ.get("CUDA_HOME") or home), Path("/usr/local/cuda")]
    homes += sorted((torch.folder.parent / "nvidia").glob("*"))  # where torch's wheels keep CUDA
    include = next((h / "include" for h in homes if (h / "include" / "cuda_runtime_api.h").is_file()), None)
    name = f"libcudart.so.{major}"
    # torch's own copy first: it is the one that is loaded.
    runtimes = [h / folder / name for h in reversed(homes) for folder in ("lib", "lib64")]
    runtime = next((path for path in runtimes if path.is_file()), None)
    if include is None or runtime is None:
        return None, f"{'cuda_runtime_api.h' if include is None else name} is neither beside nvcc nor in torch's wheels"
    return CudaToolkit(nvcc, version, include, runtime, _known_targets(nvcc, targets, source)), ""


def find_nvcc() -> str | None:
    """Path of nvcc: CUDACXX, NVCC, CUDA_HOME, PATH, /usr/local/cuda; None where there is none.

    Raises:
        BuildError: CUDACXX or NVCC names something that is not there, or CUDA_HOME a folder without nvcc.
    """
    for variable in ("CUDACXX", "NVCC"):
        if named := os.environ.get(variable):
            if found := shutil.which(named):
                return found
            raise BuildError(
                variable, got=f"{named}, which is not there", wanted="the path of nvcc", remedy="correct or unset it"
            )
    if home := os.environ.get("CUDA_HOME"):
        if found := shutil.which(f"{home}/bin/nvcc"):
            return found
        raise BuildError(
            "CUDA_HOME",
            got=f"{home}, in which there is no bin/nvcc",
            wanted="the folder of a CUDA toolkit",
            remedy="correct or unset it, or build with --cpu-only",
        )
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _known_targets(nvcc: str, targets: tuple[str, ...], source: str) -> tuple[str, ...]:
    """The targets that this nvcc compiles for; those named by a person must all be among them."""
    known = re.findall(r"compute_(\d+)", _output([nvcc, "--list-gpu-arch"]))
    unknown = [target for target in targets if target not in known]
    if unknown and (source or len(unknown) == len(targets)):
        raise BuildError(
            source or "the default CUDA targets",
            got=f"{unknown[0]}, which {nvcc} does not know",
            wanted=f"some of {' '.join(sorted(set(known), key=int))}",
            remedy="leave it out, or install a CUDA toolkit that knows it"
            if source
            else "name some with NTF_CUDA_ARCHS, or install a CUDA toolkit that knows them",
        )
    return tuple(target for target in targets if target in known)


def _first_line(command: list[str]) -> str:
    return next((line.strip() for line in _output(command).splitlines() if line.strip()), "unknown")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not start: {error}"
    return done.stdout
