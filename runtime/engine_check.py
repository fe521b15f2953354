"""Whether an engine of a bundle would run here, asked before TensorRT is given a byte of it.

TensorRT answers a wrong version, a wrong GPU, a damaged file and a missing driver alike: with nothing. The manifest
says enough about an engine to tell them apart first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from runtime.backends.cuda_driver import CudaDevice, cuda_driver
from runtime.errors import BackendError, BundleError
from runtime.manifest import AMPERE_PLUS, ArtifactSpec, ModelManifest

_BUILD_HERE = "build one here: python -m export.trt --model BUNDLE --{precision}"
# Members of tensorrt_rtx.EngineInvalidityDiagnostics, which are bits, with what each means; the gravest first.
_MALFORMED = 32
_DIAGNOSTICS = {
    _MALFORMED: "a file that is no engine",
    1: "an engine of another version",
    2: "an engine for other GPUs",
    4: "a CUDA driver that is too old for it",
    8: "a CUDA runtime that is too old for it",
    16: "a GPU with too little memory for it",
    64: "a CUDA error",
}


@dataclass(frozen=True)
class EngineRuntime:
    """What engines would run on here.

    Args:
        flavour: "trt" or "rtx".
        version: of the TensorRT that is installed.
        device: the GPU; None where there is none.
    """

    flavour: Literal["trt", "rtx"]
    version: str
    device: CudaDevice | None


def check_engine(
    manifest: ModelManifest, file: str, runtime: EngineRuntime, *, max_batch: int | None = None
) -> ArtifactSpec:
    """The engine of that name, which fits this runtime as far as the manifest can say.

    Args:
        manifest: of the bundle.
        file: name of the engine in it.
        runtime: what would run it.
        max_batch: largest batch that will be asked for; None asks for no more than the engine has.

    Raises:
        BundleError: there is no such engine, or the bundle's graph is another one than it was built from.
        BackendError: it is of another flavour or version, for another GPU, or its batches are too small.
    """
    artifact = _engine_named(manifest, file)
    _check_source(manifest, artifact)
    _check_flavour(artifact, runtime)
    _check_version(artifact, runtime)
    _check_target(artifact, runtime.device)
    if max_batch is not None or artifact.profile is None:
        check_batch(artifact, max_batch or 1)
    return artifact


def check_batch(artifact: ArtifactSpec, pictures: int) -> None:
    """Nothing when an engine takes a batch of that many pictures; asked at load with the largest, and at each call.

    Raises:
        BackendError: the batch is outside the optimization profile.
    """
    profile = artifact.profile
    if profile is not None and profile.min_batch <= pictures <= profile.max_batch:
        return
    wanted = "a profile" if profile is None else f"{profile.min_batch} to {profile.max_batch}, its optimization profile"
    raise BackendError(
        artifact.file,
        got=f"a batch of {pictures}",
        wanted=wanted,
        remedy="score fewer pictures at once, or build it with another --min-batch or --max-batch",
    )


def deserialized_engine(runtime: Any, content: bytes, artifact: ArtifactSpec) -> Any:
    """The engine that TensorRT makes of a file, or the reason why it makes none.

    Args:
        runtime: a `Runtime` of tensorrt or tensorrt_rtx.
        content: of the file, as `Bundle.read` gives it.
        artifact: the engine.

    Raises:
        BundleError: the file is no engine, or a damaged one.
        BackendError: there is no GPU, or the engine does not fit what is installed.
    """
    if hasattr(runtime, "get_engine_validity"):
        _check_diagnostics(int(runtime.get_engine_validity(content)[1]), artifact)
    driver = cuda_driver()
    if driver.devices == 0:
        _refuse_missing_gpu(artifact, driver.detail)
    if artifact.engine is not None and artifact.engine.version_compatible:
        runtime.engine_host_code_allowed = True  # the lean runtime inside the file is such code
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BundleError(
            artifact.file,
            got="a file that TensorRT cannot read, though there is a GPU and the manifest fits",
            wanted="an engine",
            remedy=_BUILD_HERE.format(precision=artifact.precision),
        )
    return engine


def _check_diagnostics(diagnostics: int, artifact: ArtifactSpec) -> None:
    # Without a driver the answer is invalid with no bit set: nothing is known against the file.
    for bit, got in _DIAGNOSTICS.items():
        if diagnostics & bit:
            kind = BundleError if bit == _MALFORMED else BackendError
            remedy = _BUILD_HERE.format(precision=artifact.precision)
            raise kind(artifact.file, got=got, wanted="an engine that runs here", remedy=remedy)


def _engine_named(manifest: ModelManifest, file: str) -> ArtifactSpec:
    engines = {artifact.file: artifact for artifact in manifest.artifacts if artifact.format == "engine"}
    if file not in engines:
        raise BundleError(
            f"bundle of {manifest.name}",
            got=f"no engine {file}",
            wanted=f"one of {', '.join(engines) or 'none that is there'}",
            remedy=_BUILD_HERE.format(precision="fp16"),
        )
    return engines[file]


def _check_source(manifest: ModelManifest, artifact: ArtifactSpec) -> None:
    """The thresholds of a precision belong to its graph, so an engine of an earlier graph must not use them."""
    graphs = {other.sha256 for other in manifest.artifacts if other.format == "onnx"}
    if artifact.engine is not None and artifact.engine.source_sha256 not in graphs:
        raise BundleError(
            artifact.file,
            got=f"an engine of a graph with sha256 {artifact.engine.source_sha256}",
            wanted="one of a graph in the bundle",
            remedy=_BUILD_HERE.format(precision=artifact.precision),
        )


def _check_flavour(artifact: ArtifactSpec, runtime: EngineRuntime) -> None:
    if artifact.flavour != runtime.flavour:
        got = f"an engine of {artifact.builder}"
        _refuse(artifact, got, f"one of flavour {runtime.flavour}, which is installed here")


def _check_version(artifact: ArtifactSpec, runtime: EngineRuntime) -> None:
    built = artifact.builder.rpartition(" ")[2]
    if built == runtime.version:
        return
    compatible = artifact.engine is not None and artifact.engine.version_compatible
    if compatible and _runs_older(runtime.version, built):
        return
    note = ", version compatible" if compatible else ""
    _refuse(artifact, f"an engine of version {built}{note}", f"one of version {runtime.version}, which is installed")


def _runs_older(installed: str, built: str) -> bool:
    """Whether a version-compatible engine runs: on the same major version or the next, and never on an older one."""
    here, there = (tuple(int(part) for part in text.split(".") if part.isdigit()) for text in (installed, built))
    return here >= there and here[0] - there[0] <= 1


def _check_target(artifact: ArtifactSpec, device: CudaDevice | None) -> None:
    if device is None:
        _refuse_missing_gpu(artifact, "no GPU")
    if device.target in artifact.targets:
        return
    if AMPERE_PLUS in artifact.targets and int(device.target.removeprefix("sm")) >= 80:
        return
    _refuse(artifact, f"an engine for {', '.join(artifact.targets)}", f"one for {device.target} ({device.name})")


def _refuse_missing_gpu(artifact: ArtifactSpec, detail: str) -> NoReturn:
    raise BackendError(
        artifact.file,
        got=detail,
        wanted="an NVIDIA GPU with its driver",
        remedy="run where there is one, or score with a back-end that runs here (`ntf doctor` shows them)",
    )


def _refuse(artifact: ArtifactSpec, got: str, wanted: str) -> NoReturn:
    raise BackendError(artifact.file, got=got, wanted=wanted, remedy=_BUILD_HERE.format(precision=artifact.precision))
