"""Back-ends, imported when they are opened: none is needed to import this package.

`AUTO_BACKENDS` is the order of preference of `backend="auto"` where nothing was measured: engines that fit the GPU,
ONNX Runtime on a GPU that really runs, then ONNX Runtime on the CPU, which was the faster of the two with FP32 where
benchmarks/results/cpu.json was measured, then OpenVINO. The TensorRT providers of ONNX Runtime build an engine when
they are opened, which may take minutes, so they are for whoever names them.
"""

from __future__ import annotations

from runtime.backends.base import Backend, Outputs, Probe
from runtime.errors import BackendError, UsageError
from runtime.manifest import ModelManifest
from runtime.onnx_guard import require_self_contained

AUTO_BACKENDS = ("trt", "onnxruntime-cuda", "onnxruntime", "openvino")
BACKENDS = (*AUTO_BACKENDS, "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx")
# Those that run ONNX graphs.
GRAPH_BACKENDS = BACKENDS[1:]
# Those that need an NVIDIA GPU.
GPU_BACKENDS = tuple(name for name in BACKENDS if name not in ("onnxruntime", "openvino"))
HINTS = ("latency", "throughput")
# Which back-ends an option of `open_backend` has an effect on.
_HAVE = {
    "threads": GRAPH_BACKENDS,
    "hint": ("trt", "openvino"),
    "cuda_graphs": ("trt",),
}

__all__ = [
    "AUTO_BACKENDS",
    "BACKENDS",
    "GPU_BACKENDS",
    "GRAPH_BACKENDS",
    "HINTS",
    "Backend",
    "Outputs",
    "Probe",
    "open_backend",
    "probe_backend",
]


def probe_backend(name: str) -> Probe:
    """Whether a back-end would run here, found out by importing it and trying its device.

    Raises:
        BackendError: there is no back-end of that name.
    """
    _require_known(name)
    if name == "trt":
        from runtime.backends.trt_installed import probe_trt

        return probe_trt()
    if name == "openvino":
        from runtime.backends.openvino import probe_openvino

        return probe_openvino()
    from runtime.backends.ort import probe_ort

    return probe_ort(name)


def open_backend(
    name: str,
    model: bytes,
    manifest: ModelManifest,
    *,
    file: str,
    threads: int | None = None,
    hint: str | None = None,
    cuda_graphs: bool = False,
    max_batch: int | None = None,
) -> Backend:
    """An ONNX graph or an engine opened on exactly the back-end that was asked for.

    Args:
        name: one of BACKENDS.
        model: content of an .onnx file; for "trt" of an .engine file.
        manifest: of the bundle; inputs and outputs are checked against it.
        file: name of the artifact, for messages; for "trt" the manifest describes it.
        threads: CPU threads of one inference; None leaves it to the back-end.
        hint: "latency" or "throughput", for "trt" and "openvino"; None is "latency".
        cuda_graphs: launch each batch size as a CUDA graph, for "trt".
        max_batch: largest batch that will be asked for, refused at once where the back-end takes no such batch; None
            leaves it to each call.

    Raises:
        BackendError: no such back-end, its package is missing, or it cannot run the artifact on its device.
        BundleError: the artifact is not what the manifest promises.
        UsageError: the back-end does not have an option.
    """
    _require_known(name)
    _require_options(name, threads=threads, hint=hint, cuda_graphs=cuda_graphs or None)
    if name == "trt":
        from runtime.backends.trt import TrtBackend

        return TrtBackend(
            model, manifest, file=file, hint=hint or "latency", cuda_graphs=cuda_graphs, max_batch=max_batch
        )
    require_self_contained(model, file)
    if name == "openvino":
        from runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(model, manifest, file=file, threads=threads, hint=hint or "latency")
    from runtime.backends.ort import OrtBackend

    return OrtBackend(model, manifest, file=file, name=name, threads=threads, max_batch=max_batch)


def _require_known(name: str) -> None:
    if name not in BACKENDS:
        raise BackendError(
            "backend", got=repr(name), wanted=f"auto or one of {', '.join(BACKENDS)}", remedy="choose one of these"
        )


def _require_options(name: str, **given: object) -> None:
    """Nothing where the back-end has each option that was given; an option without effect is refused."""
    for option, value in given.items():
        if value is not None and name not in _HAVE[option]:
            raise UsageError(
                option,
                got=f"{value!r} for the back-end {name}",
                wanted=f"an option that it has; {option} is for {', '.join(_HAVE[option])}",
                remedy="leave it out, or name one of these as the backend",
            )
    hint = given["hint"]
    if hint is not None and hint not in HINTS:
        raise UsageError("hint", got=repr(hint), wanted=f"one of {', '.join(HINTS)}", remedy="choose one of these")
