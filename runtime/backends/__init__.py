"""Back-ends, imported when they are opened: none is needed to import this package.

`BACKENDS` is also the order of preference of `backend="auto"`: a GPU that really runs, then ONNX Runtime, which was
the faster of the two with FP32 on the CPU that benchmarks/results/cpu.json names, then OpenVINO.
"""

from __future__ import annotations

from runtime.backends.base import Backend, Outputs, Probe
from runtime.errors import BackendError
from runtime.manifest import ModelManifest
from runtime.onnx_guard import require_self_contained

BACKENDS = ("onnxruntime-cuda", "onnxruntime", "openvino")

__all__ = ["BACKENDS", "Backend", "Outputs", "Probe", "open_backend", "probe_backend"]


def probe_backend(name: str) -> Probe:
    """Whether a back-end would run here, found out by importing it and trying its device.

    Raises:
        BackendError: there is no back-end of that name.
    """
    _require_known(name)
    if name == "openvino":
        from runtime.backends.openvino import probe_openvino

        return probe_openvino()
    from runtime.backends.ort import probe_ort

    return probe_ort(name)


def open_backend(name: str, model: bytes, manifest: ModelManifest, *, file: str, threads: int | None = None) -> Backend:
    """An ONNX graph opened on exactly the back-end that was asked for.

    Args:
        name: one of BACKENDS.
        model: content of an .onnx file.
        manifest: of the bundle; the graph's inputs and outputs are checked against it.
        file: name of the artifact, for messages.
        threads: CPU threads of one inference; None leaves it to the back-end.

    Raises:
        BackendError: no such back-end, its package is missing, or it cannot run the graph on its device.
        BundleError: the graph is not what the manifest promises, or asks for another file.
    """
    _require_known(name)
    require_self_contained(model, file)
    if name == "openvino":
        from runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(model, manifest, file=file, threads=threads)
    from runtime.backends.ort import OrtBackend

    return OrtBackend(model, manifest, file=file, name=name, threads=threads)


def _require_known(name: str) -> None:
    if name not in BACKENDS:
        raise BackendError(
            "backend", got=repr(name), wanted=f"auto or one of {', '.join(BACKENDS)}", remedy="choose one of these"
        )
