"""Which back-end and which artifact run, and why: the rules behind `backend="auto"` and `precision="auto"`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from runtime.backends import AUTO_BACKENDS, BACKENDS, probe_backend
from runtime.engine_check import check_batch
from runtime.errors import BackendError
from runtime.manifest import PRECISIONS, ArtifactSpec, ModelManifest
from runtime.tuning import Timing, kept_tuning

# As measured on a CPU without VNNI (benchmarks/results/cpu.json): there INT8 is slower than FP32 on both CPU back-ends,
# and float16 is emulated. A CPU with VNNI may be faster with INT8; it is taken when it is named, or when `ntf tune`
# found it faster. FP16 on a GPU uses the tensor cores.
PREFERRED_PRECISIONS = {
    "trt": ("fp16", "fp32", "int8"),
    "onnxruntime-cuda": ("fp16", "fp32", "int8"),
    "onnxruntime-tensorrt": ("fp16", "fp32", "int8"),
    "onnxruntime-tensorrt-rtx": ("fp16", "fp32", "int8"),
    "onnxruntime": ("fp32", "int8", "fp16"),
    "openvino": ("fp32", "int8", "fp16"),
}
# This one allows TensorRT to compute in other types than the graph says, so a comparison elsewhere shows nothing.
_OWN_PARITY = "onnxruntime-tensorrt"
# These build an engine for some batches when they are opened.
_BUILT_WHEN_OPENED = ("onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx")


class _Batches(NamedTuple):
    """Batches that are scored, or that can be: all from the smallest to the largest."""

    smallest: int
    largest: int


# Batch of `Detector.predict`. What is taken without being named must score it, and a last batch of one picture.
_USUAL = _Batches(1, 32)


@dataclass(frozen=True)
class Choice:
    """A back-end and an artifact, with the reason in a sentence."""

    backend: str
    artifact: ArtifactSpec
    reason: str


def choose(manifest: ModelManifest, *, backend: str, precision: str, max_batch: int | None = None) -> Choice:
    """What will run for a request.

    Args:
        manifest: of the bundle.
        backend: one of BACKENDS, or "auto": the fastest by `ntf tune` where it measured this bundle on this machine
            with these versions, otherwise the first of AUTO_BACKENDS that runs here.
        precision: one of PRECISIONS, or "auto" for the back-end's first choice that is safe: FP32, or one whose parity
            check passed. A precision that is named outright is taken whatever its parity.
        max_batch: largest batch that will be asked for; "auto" passes over what does not take it. None is the usual
            largest one for "auto", and leaves it to each call where the back-end is named.

    Raises:
        BackendError: nothing fits, or the engine of a named back-end does not take `max_batch`.
    """
    if precision != "auto":
        _require_precision(manifest, precision, backend)
    if backend != "auto":
        probe = probe_backend(backend)
        if not probe.runs:
            _refuse_backend(backend, probe.reason, probe.install)
        return _named(manifest, backend, precision, max_batch)
    batches = _USUAL if max_batch is None else _Batches(1, max_batch)
    tuned, note = _tuned(manifest, precision, batches)
    return tuned or _first_that_runs(manifest, precision, batches, note)


def safe_artifacts(manifest: ModelManifest, backend: str) -> list[ArtifactSpec]:
    """What a back-end may run without being told the precision, in the order of its preference.

    Args:
        manifest: of the bundle.
        backend: one of BACKENDS; for "trt" these are engines that fit the GPU and TensorRT of this machine.
    """
    found = (_artifact(manifest, backend, precision, _USUAL) for precision in PREFERRED_PRECISIONS[backend])
    return [
        artifact
        for artifact in found
        if artifact is not None and _why_not_safe(manifest, artifact, backend, _USUAL) is None
    ]


def parity_passed(artifact: ArtifactSpec, backend: str) -> bool:
    """Whether every parity check of the artifact on this back-end passed; on any, where none names this one."""
    mine = [parity for parity in artifact.parity if parity.backend == backend]
    checks = mine if backend == _OWN_PARITY else mine or list(artifact.parity)
    return bool(checks) and all(parity.passed for parity in checks)


def compared_artifact(manifest: ModelManifest, artifact: ArtifactSpec) -> ArtifactSpec | None:
    """What was compared with PyTorch for an artifact: itself, or the graph that an engine is built from.

    None where the bundle has that graph no more, or another one under its name.
    """
    if artifact.engine is None or artifact.parity:
        return artifact if artifact.format == "onnx" or artifact.parity else None
    built = (artifact.engine.source, artifact.engine.source_sha256)
    return next((a for a in manifest.artifacts if (a.file, a.sha256) == built), None)


def _named(manifest: ModelManifest, backend: str, precision: str, max_batch: int | None) -> Choice:
    """What a named back-end runs: what takes the largest batch before anything else, which is refused."""
    why = f"back-end {backend} as asked"
    if max_batch is not None:
        # Whoever names the back-end minds the smallest batch.
        fitting = _found(manifest, backend, precision, why, _Batches(max_batch, max_batch))
        if fitting is not None:
            return fitting
    choice = _with_artifact(manifest, backend, precision, why, None)
    if max_batch is not None and choice.artifact.format == "engine":
        check_batch(choice.artifact, max_batch)
    return choice


def _tuned(manifest: ModelManifest, precision: str, batches: _Batches) -> tuple[Choice | None, str]:
    """The fastest that was measured here and may be taken; or None, and why a measurement does not count."""
    tuning, note = kept_tuning(manifest)
    if tuning is None:
        return None, note
    fitting = [timing for timing in tuning.by_speed() if precision in ("auto", timing.precision)]
    passed_over: list[str] = []
    for timing in fitting:
        why_not = _why_not_tuned(manifest, timing, batches, named=precision != "auto")
        if why_not is None:
            artifact = next(a for a in manifest.artifacts if a.file == timing.artifact)
            others = "".join(f", {other.described()}" for other in fitting if other is not timing)
            aside = f" ({'; '.join(passed_over)})" if passed_over else ""
            reason = f"fastest by `ntf tune` of {tuning.measured}: {timing.described()}{others}{aside}"
            return Choice(timing.backend, artifact, reason), ""
        passed_over.append(f"{timing.backend} {timing.precision}: {why_not}")
    return None, f"`ntf tune` measured nothing that runs now ({'; '.join(passed_over) or f'nothing in {precision}'})"


def _why_not_tuned(manifest: ModelManifest, timing: Timing, batches: _Batches, *, named: bool) -> str | None:
    artifact = _artifact(manifest, timing.backend, timing.precision, batches)
    if artifact is None or artifact.file != timing.artifact:
        return f"{timing.artifact} does not fit any more"
    if named:
        why_not = _why_not_batches(artifact, timing.backend, batches)
    else:
        why_not = _why_not_safe(manifest, artifact, timing.backend, batches)
    if why_not is None and not (probe := probe_backend(timing.backend)).runs:
        return probe.reason
    return why_not


def _first_that_runs(manifest: ModelManifest, precision: str, batches: _Batches, note: str) -> Choice:
    passed_over = [note] if note else []
    for name in AUTO_BACKENDS:
        if name == "trt" and (why_not := _why_no_engine(manifest, precision, batches)) is not None:
            passed_over += [f"{name}: {why_not}"] if why_not else []
            continue
        if name != "trt" and precision != "auto" and manifest.onnx_artifact(precision) is None:
            continue
        probe = probe_backend(name)
        if probe.runs:
            aside = f" ({'; '.join(passed_over)})" if passed_over else ""
            why = f"back-end {name} is the first that runs here{aside}"
            return _with_artifact(manifest, name, precision, why, batches)
        passed_over.append(f"{name}: {probe.reason}")
    raise BackendError(
        "backend auto",
        got=f"none that runs here ({'; '.join(passed_over)})",
        wanted=f"one of {', '.join(BACKENDS)}",
        remedy='pip install "ntf-toolkit[cpu]", or "ntf-toolkit[gpu]" with an NVIDIA GPU',
    )


def _why_no_engine(manifest: ModelManifest, precision: str, batches: _Batches) -> str | None:
    """Why `auto` takes no engine of a bundle, or None; "" where it has none that one could speak of."""
    engines = [a for a in manifest.artifacts if a.format == "engine" and precision in ("auto", a.precision)]
    if not engines:
        return ""
    fitting, why_not = _fitting_engines(manifest)
    if not (usable := [engine for engine in engines if engine in fitting]):
        return why_not
    # A named precision is taken whatever its parity, as with every back-end.
    if precision != "auto":
        reasons = [_why_not_batches(engine, "trt", batches) for engine in usable]
    else:
        reasons = [_why_not_safe(manifest, engine, "trt", batches) for engine in usable]
    if None in reasons:
        return None
    return "; ".join(f"{engine.file} {reason}" for engine, reason in zip(usable, reasons, strict=True))


def _with_artifact(
    manifest: ModelManifest, backend: str, precision: str, why_backend: str, batches: _Batches | None
) -> Choice:
    """What a back-end runs, or the error that says that there is nothing."""
    choice = _found(manifest, backend, precision, why_backend, batches)
    if choice is None:
        _refuse_precision(manifest, precision, backend)
    return choice


def _found(
    manifest: ModelManifest, backend: str, precision: str, why_backend: str, batches: _Batches | None
) -> Choice | None:
    """What a back-end runs that takes these batches, or any where they are None; None where there is nothing."""
    if precision == "auto":
        artifact, why = _first_safe(manifest, backend, batches)
    else:
        artifact, why = _artifact(manifest, backend, precision, batches), f"precision {precision} as asked"
        if artifact is not None and _why_not_batches(artifact, backend, batches) is not None:
            artifact = None
    return None if artifact is None else Choice(backend, artifact, f"{why_backend}; {why}")


def _first_safe(manifest: ModelManifest, backend: str, batches: _Batches | None) -> tuple[ArtifactSpec | None, str]:
    passed_over: list[str] = []
    for precision in PREFERRED_PRECISIONS[backend]:
        artifact = _artifact(manifest, backend, precision, batches)
        if artifact is None:
            continue
        why_not = _why_not_safe(manifest, artifact, backend, batches)
        if why_not is None:
            note = f" ({'; '.join(passed_over)})" if passed_over else ""
            return artifact, f"precision {precision} is the first choice for it{note}"
        passed_over.append(f"{precision} {why_not}")
    return None, ""


def _artifact(manifest: ModelManifest, backend: str, precision: str, batches: _Batches | None) -> ArtifactSpec | None:
    """What a back-end runs of a precision on this machine; the engine with the fewest drawbacks.

    Args:
        manifest: of the bundle.
        backend: one of BACKENDS.
        precision: one of PRECISIONS.
        batches: that should be taken; None is the usual ones.
    """
    if backend != "trt":
        return manifest.onnx_artifact(precision)
    fitting = [engine for engine in _fitting_engines(manifest)[0] if engine.precision == precision]

    def drawbacks(engine: ArtifactSpec) -> tuple[bool, bool]:
        return _why_not_batches(engine, backend, batches or _USUAL) is not None, _may_round(engine)

    return min(fitting, key=drawbacks, default=None)


def _fitting_engines(manifest: ModelManifest) -> tuple[list[ArtifactSpec], str]:
    """Engines that fit the GPU and the TensorRT of this machine, and why the others do not."""
    from runtime.backends.trt_installed import fitting_engines

    return fitting_engines(manifest)


def _why_not_safe(
    manifest: ModelManifest, artifact: ArtifactSpec, backend: str, batches: _Batches | None
) -> str | None:
    """Why an artifact is not taken without being named, or None.

    Args:
        manifest: of the bundle.
        artifact: of it.
        backend: that would run it.
        batches: that it has to take; None where whoever named the back-end minds them.
    """
    why_not = _why_not_batches(artifact, backend, batches)
    if why_not is not None:
        return why_not
    if _may_round(artifact):
        return "may compute in TF32, unlike the graph that was compared"
    compared = compared_artifact(manifest, artifact)
    if artifact.precision != "fp32" and (compared is None or not parity_passed(compared, backend)):
        return "has no passed parity check"
    return None


def _may_round(artifact: ArtifactSpec) -> bool:
    """Whether an engine may multiply in TF32, and was not compared with PyTorch itself."""
    return artifact.engine is not None and artifact.engine.tf32 and not artifact.parity


def _why_not_batches(artifact: ArtifactSpec, backend: str, batches: _Batches | None) -> str | None:
    """Why an artifact does not take every one of some batches on a back-end, or None."""
    taken = _taken_batches(artifact, backend)
    if batches is None or taken is None:
        return None
    if taken.smallest <= batches.smallest and batches.largest <= taken.largest:
        return None
    wanted = f"{batches.largest}" if batches.smallest == batches.largest else f"{batches.smallest} to {batches.largest}"
    return f"takes batches of {taken.smallest} to {taken.largest}, not {wanted}"


def _taken_batches(artifact: ArtifactSpec, backend: str) -> _Batches | None:
    """Batches that an artifact takes on a back-end; None where it takes any."""
    if backend in _BUILT_WHEN_OPENED:
        from runtime.backends.ort import TENSORRT_BATCHES

        return _Batches(TENSORRT_BATCHES[0], TENSORRT_BATCHES[2])
    profile = artifact.profile
    return None if profile is None else _Batches(profile.min_batch, profile.max_batch)


def _refuse_backend(name: str, reason: str, install: str) -> NoReturn:
    others = [other for other in BACKENDS if other != name and probe_backend(other).runs]
    raise BackendError(
        f"back-end {name}",
        got=reason,
        wanted=f"a back-end that runs here ({', '.join(others) or 'none is installed'})",
        remedy=install,
    )


def _require_precision(manifest: ModelManifest, precision: str, backend: str) -> None:
    if precision not in PRECISIONS:
        raise BackendError(
            "precision",
            got=repr(precision),
            wanted=f"auto or one of {', '.join(PRECISIONS)}",
            remedy="choose one of these",
        )
    engines = backend in ("auto", "trt") and any(
        a.format == "engine" and a.precision == precision for a in manifest.artifacts
    )
    if not engines and (backend == "trt" or manifest.onnx_artifact(precision) is None):
        _refuse_precision(manifest, precision, backend)


def _refuse_precision(manifest: ModelManifest, precision: str, backend: str) -> NoReturn:
    if backend == "trt":
        _refuse_engines(manifest, precision)
    there = ", ".join(manifest.onnx_precisions()) or "none"
    engines = sum(artifact.format == "engine" for artifact in manifest.artifacts)
    note = f"; {engines} engine(s), which the back-end trt runs" if engines else ""
    safe = " that is FP32 or passed its parity check" if precision == "auto" else ""
    raise BackendError(
        f"precision {precision}",
        got=f"a bundle with these ONNX precisions: {there}{note}",
        wanted=f"an ONNX graph{safe}",
        remedy="name a precision that is there, or export and verify the one that is wanted",
    )


def _refuse_engines(manifest: ModelManifest, precision: str) -> NoReturn:
    fitting, why_not = _fitting_engines(manifest)
    there = ", ".join(f"{engine.file} in {engine.precision}" for engine in fitting) or why_not
    safe = ", without TF32, FP32 or of a graph that passed its parity check" if precision == "auto" else ""
    flag = "fp16" if precision == "auto" else precision
    raise BackendError(
        f"engine of precision {precision}",
        got=there,
        wanted=f"an engine that fits this machine{safe}",
        remedy=f"name a precision that is there, or build one here: python -m export.trt --model BUNDLE --{flag}",
    )
