"""Which back-end and which artifact run, and why: the rules behind `backend="auto"` and `precision="auto"`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from runtime.backends import BACKENDS, probe_backend
from runtime.errors import BackendError
from runtime.manifest import PRECISIONS, ArtifactSpec, ModelManifest

# As measured on a CPU without VNNI (benchmarks/results/cpu.json): there INT8 is slower than FP32 on both CPU back-ends,
# and float16 is emulated. A CPU with VNNI may be faster with INT8; it is taken when it is named. FP16 on CUDA uses the
# tensor cores.
PREFERRED_PRECISIONS = {
    "onnxruntime-cuda": ("fp16", "fp32", "int8"),
    "onnxruntime": ("fp32", "int8", "fp16"),
    "openvino": ("fp32", "int8", "fp16"),
}


@dataclass(frozen=True)
class Choice:
    """A back-end and an artifact, with the reason in a sentence."""

    backend: str
    artifact: ArtifactSpec
    reason: str


def choose(manifest: ModelManifest, *, backend: str, precision: str) -> Choice:
    """What will run for a request.

    Args:
        manifest: of the bundle.
        backend: one of BACKENDS, or "auto" for the first of them that runs here.
        precision: one of PRECISIONS, or "auto" for the back-end's first choice that is safe: FP32, or one whose parity
            check passed. A precision that is named outright is taken whatever its parity.

    Raises:
        BackendError: nothing fits; the message lists what there is.
    """
    if precision != "auto":
        _require_precision(manifest, precision)
    name, why_backend = _choose_backend(backend)
    if precision != "auto":
        artifact, why_precision = manifest.onnx_artifact(precision), f"precision {precision} as asked"
    else:
        artifact, why_precision = _choose_artifact(manifest, name)
    if artifact is None:
        _refuse_precision(manifest, precision)
    return Choice(name, artifact, f"{why_backend}; {why_precision}")


def parity_passed(artifact: ArtifactSpec, backend: str) -> bool:
    """Whether every parity check of the artifact on this back-end passed; on any, where none names this one."""
    mine = [parity for parity in artifact.parity if parity.backend == backend]
    checks = mine or list(artifact.parity)
    return bool(checks) and all(parity.passed for parity in checks)


def _choose_backend(backend: str) -> tuple[str, str]:
    if backend != "auto":
        probe = probe_backend(backend)
        if not probe.runs:
            _refuse_backend(backend, probe.reason, probe.install)
        return backend, f"back-end {backend} as asked"
    passed_over: list[str] = []
    for name in BACKENDS:
        probe = probe_backend(name)
        if probe.runs:
            note = f" ({'; '.join(passed_over)})" if passed_over else ""
            return name, f"back-end {name} is the first that runs here{note}"
        passed_over.append(f"{name}: {probe.reason}")
    raise BackendError(
        "backend auto",
        got=f"none that runs here ({'; '.join(passed_over)})",
        wanted=f"one of {', '.join(BACKENDS)}",
        remedy='pip install "ntf-toolkit[cpu]", or "ntf-toolkit[gpu]" with an NVIDIA GPU',
    )


def _choose_artifact(manifest: ModelManifest, backend: str) -> tuple[ArtifactSpec | None, str]:
    passed_over: list[str] = []
    for precision in PREFERRED_PRECISIONS[backend]:
        artifact = manifest.onnx_artifact(precision)
        if artifact is None:
            continue
        if precision == "fp32" or parity_passed(artifact, backend):
            note = f" ({'; '.join(passed_over)})" if passed_over else ""
            return artifact, f"precision {precision} is the first choice for it{note}"
        passed_over.append(f"{precision} has no passed parity check")
    return None, ""


def _refuse_backend(name: str, reason: str, install: str) -> NoReturn:
    others = [other for other in BACKENDS if other != name and probe_backend(other).runs]
    raise BackendError(
        f"back-end {name}",
        got=reason,
        wanted=f"a back-end that runs here ({', '.join(others) or 'none is installed'})",
        remedy=install,
    )


def _require_precision(manifest: ModelManifest, precision: str) -> None:
    if precision not in PRECISIONS:
        raise BackendError(
            "precision",
            got=repr(precision),
            wanted=f"auto or one of {', '.join(PRECISIONS)}",
            remedy="choose one of these",
        )
    if manifest.onnx_artifact(precision) is None:
        _refuse_precision(manifest, precision)


def _refuse_precision(manifest: ModelManifest, precision: str) -> NoReturn:
    there = ", ".join(manifest.onnx_precisions()) or "none"
    engines = sum(artifact.format == "engine" for artifact in manifest.artifacts)
    note = f"; {engines} engine(s), which this version cannot run" if engines else ""
    safe = " that is FP32 or passed its parity check" if precision == "auto" else ""
    raise BackendError(
        f"precision {precision}",
        got=f"a bundle with these ONNX precisions: {there}{note}",
        wanted=f"an ONNX graph{safe}",
        remedy="name a precision that is there, or export and verify the one that is wanted",
    )
