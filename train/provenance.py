"""Where a result comes from: toolkit version and commit, machine, library versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

DISTRIBUTION = "ntf-toolkit"
UNKNOWN = "unknown"


def tool_version() -> str:
    """Version of the installed toolkit, or "unknown" when it runs from a folder that was never installed."""
    return package_versions([DISTRIBUTION])[DISTRIBUTION] or UNKNOWN


def tool_commit() -> str:
    """Git commit of the checkout this file lies in, with "-dirty" when tracked files differ; "unknown" elsewhere."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return UNKNOWN
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return UNKNOWN
    return f"{commit}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit


def package_versions(names: list[str]) -> dict[str, str | None]:
    """Installed version of each distribution, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, str | int]:
    """Processor, number of usable cores, operating system and Python: what a measured figure depends on."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def environment() -> dict[str, object]:
    """Everything that is written beside a result: tool, machine and the versions of the libraries that matter."""
    libraries = [
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "pillow",
        "scikit-learn",
        "onnx",
        "onnxruntime",
        "openvino",
    ]
    versions = package_versions([*libraries, "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"])
    return {
        "tool_version": tool_version(),
        "tool_commit": tool_commit(),
        "machine": machine(),
        "versions": {name: version for name, version in versions.items() if version is not None},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or UNKNOWN


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
