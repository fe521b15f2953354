"""What is installed here, what would run, and what to install: `ntf doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from runtime.backends import BACKENDS, GPU_BACKENDS, Probe, probe_backend
from runtime.backends.base import installed_version
from runtime.backends.cuda_driver import CudaDriver, cuda_driver
from runtime.fused_loss import FusedLoss, probe_fused_loss
from runtime.jpeg_region import why_in_full
from runtime.turbojpeg import find_turbojpeg

_PACKAGES = (
    "ntf-toolkit", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "onnxruntime-trt-rtx", "openvino", "tensorrt",
    "tensorrt-rtx", "cuda-bindings", "pycuda", "pylibjxl", "onnx", "torch", "timm",
)  # fmt: skip
_TOOLS = ("c++", "g++", "clang++", "nvcc", "ninja")
# flavour, package on the index, extra of this distribution
_ENGINE_BUILDERS = (("trt", "tensorrt", "trt"), ("rtx", "tensorrt-rtx", "rtx"))


@dataclass(frozen=True)
class EngineBuilder:
    """A TensorRT flavour: its package's version, or None where it is not installed."""

    flavour: str
    package: str
    version: str | None


@dataclass(frozen=True)
class JpegDecoding:
    """Library that decodes the wanted part of a JPEG file alone, or why Pillow decodes every file in full."""

    library: str | None
    why_in_full: str


@dataclass(frozen=True)
class DoctorReport:
    """Everything `ntf doctor` found.

    Args:
        python: version of the interpreter.
        platform: operating system and processor.
        cpus: logical processors.
        packages: version of each package of interest; None where it is not installed.
        backends: each back-end, tried.
        cuda: the NVIDIA driver.
        tools: first line that each compiler prints about itself; None where it is not on the path.
        engine_builders: TensorRT flavours for the export.
        fused_loss: the training extension.
        jpeg: how JPEG files are decoded.
        warnings: what is wrong.
        advice: what to install for what is missing.
    """

    python: str
    platform: str
    cpus: int
    packages: dict[str, str | None]
    backends: tuple[Probe, ...]
    cuda: CudaDriver
    tools: dict[str, str | None]
    engine_builders: tuple[EngineBuilder, ...]
    fused_loss: FusedLoss
    jpeg: JpegDecoding
    warnings: tuple[str, ...]
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary, ready for `json.dumps`."""
        return asdict(self)

    def runs(self) -> bool:
        """Whether at least one back-end would run here."""
        return any(probe.runs for probe in self.backends)


def examine() -> DoctorReport:
    """Report on this machine and this environment; each back-end is imported and tried.

    Note:
        Takes a second or two. Nothing is written, downloaded or changed.
    """
    packages = {name: installed_version(name) for name in _PACKAGES}
    probes = tuple(probe_backend(name) for name in BACKENDS)
    builders = tuple(EngineBuilder(flavour, package, packages[package]) for flavour, package, _ in _ENGINE_BUILDERS)
    cuda = cuda_driver()
    fused_loss = probe_fused_loss()
    jpeg = JpegDecoding(find_turbojpeg().path, why_in_full())
    return DoctorReport(
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cpus=os.cpu_count() or 1,
        packages=packages,
        backends=probes,
        cuda=cuda,
        tools={tool: _tool_version(tool) for tool in _TOOLS},
        engine_builders=builders,
        fused_loss=fused_loss,
        jpeg=jpeg,
        warnings=tuple(_warnings(packages, probes, cuda, fused_loss)),
        advice=(*_advice(packages, probes, builders, cuda, fused_loss), *_jpeg_advice(jpeg)),
    )


def report_text(report: DoctorReport) -> str:
    """The report as text for a terminal."""
    lines = [f"python   {report.python}", f"system   {report.platform}, {report.cpus} logical CPUs"]
    lines += [f"CUDA     {report.cuda.detail}", "packages"]
    lines += [f"  {name:<24} {version or '-'}" for name, version in report.packages.items()]
    lines.append("back-ends")
    for probe in report.backends:
        state = f"runs on {probe.device}" if probe.runs else "does not run"
        lines.append(f"  {probe.name:<24} {state}: {probe.reason}")
    lines.append("JPEG files (either way gives the same pixels)")
    lines.append(
        f"  decoded in full: {report.jpeg.why_in_full}"
        if report.jpeg.why_in_full
        else f"  only the wanted part of a plain, complete file is decoded, with {report.jpeg.library}"
    )
    lines.append("TensorRT (builds engines for the export; the back-end trt runs them)")
    lines += [f"  {b.flavour:<4} {b.package:<14} {b.version or 'not installed'}" for b in report.engine_builders]
    lines.append("compilers (for the training extension)")
    lines += [f"  {tool:<16} {version or 'not found'}" for tool, version in report.tools.items()]
    lines.append(f"fused loss (the training extension)\n  {report.fused_loss.describe()}")
    lines += [f"WARNING  {warning}" for warning in report.warnings]
    lines += [f"advice   {advice}" for advice in report.advice]
    lines.append("ready: pictures can be scored here" if report.runs() else "NOT READY: no back-end runs here")
    return "\n".join(lines)


def _warnings(
    packages: dict[str, str | None], probes: tuple[Probe, ...], cuda: CudaDriver, fused_loss: FusedLoss
) -> list[str]:
    found = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed, and they are one module: the one installed last"
            " has overwritten the other. Run: pip uninstall onnxruntime onnxruntime-gpu, then install one of them"
        )
    found += [
        f"{probe.name} {probe.version} is installed but does not run: {probe.reason}"
        for probe in probes
        if probe.version is not None and not probe.runs and (cuda.devices or probe.name not in GPU_BACKENDS)
    ]
    if fused_loss.state in ("stale", "damaged"):
        found.append(f"the fused loss is {fused_loss.state}, and training does not use it: {fused_loss.detail}")
    return found


def _advice(
    packages: dict[str, str | None],
    probes: tuple[Probe, ...],
    builders: tuple[EngineBuilder, ...],
    cuda: CudaDriver,
    fused_loss: FusedLoss,
) -> list[str]:
    advice: list[str] = []
    missing = {probe.name for probe in probes if not probe.runs}
    advice += [
        f'for the back-end {name}: pip install "ntf-toolkit[cpu]"'
        for name in ("openvino", "onnxruntime")
        if name in missing
    ]
    if "onnxruntime-cuda" in missing and cuda.devices:
        advice.append(
            'for the back-end onnxruntime-cuda: pip uninstall onnxruntime, then pip install "ntf-toolkit[gpu]"'
        )
    if cuda.devices:
        advice += [
            f"for the back-end trt: {probe.install}" for probe in probes if probe.name == "trt" and not probe.runs
        ]
    if not any(builder.version for builder in builders):
        extras = " or ".join(f'"ntf-toolkit[{extra}]"' for _, _, extra in _ENGINE_BUILDERS)
        advice.append(f"to build engines with `python -m export.trt`: pip install {extras}")
    if packages["torch"] and fused_loss.state == "missing":
        advice.append("for a contrastive loss whose memory is linear in the batch: python -m cpp_ext.build")
    if packages["torch"] and fused_loss.state == "built" and cuda.devices and not fused_loss.cuda_targets:
        advice.append(f"for the fused loss on this GPU ({fused_loss.detail}): python -m cpp_ext.build")
    return advice


def _jpeg_advice(jpeg: JpegDecoding) -> list[str]:
    if jpeg.library is not None:
        return []
    return [
        'to read large JPEG files several times faster: pip install "ntf-toolkit[jpeg]", or libjpeg-turbo 3 by hand'
    ]


def _tool_version(tool: str) -> str | None:
    path = shutil.which(tool)
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not start ({error})"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    # nvcc says its release in a later line than the others.
    return next((line for line in lines if "release" in line), lines[0] if lines else "says nothing")
