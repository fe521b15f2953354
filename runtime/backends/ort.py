"""ONNX Runtime on the CPU, and on CUDA where CUDA really runs.

ONNX Runtime falls back to the CPU without a word when a provider cannot start, so a CUDA session is opened with
that fallback disabled, and the provider that it ended up with is checked as well.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import (
    Outputs,
    Probe,
    TensorInfo,
    check_graph,
    checked_outputs,
    installed_version,
    refuse_to_open,
)
from runtime.backends.cuda_driver import cuda_driver
from runtime.errors import BackendError
from runtime.manifest import INPUT_NAME, OUTPUTS, ModelManifest

CPU, CUDA = "onnxruntime", "onnxruntime-cuda"

_INSTALL = {CPU: 'pip install "ntf-toolkit[cpu]"', CUDA: 'pip install "ntf-toolkit[gpu]"'}
_PROVIDER = {CPU: "CPUExecutionProvider", CUDA: "CUDAExecutionProvider"}
_DISTRIBUTIONS = {CPU: ("onnxruntime", "onnxruntime-gpu"), CUDA: ("onnxruntime-gpu",)}
_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
_ERRORS_ONLY = 3
_CUDA_REMEDY = 'pip install "onnxruntime-gpu[cuda,cudnn]" for the CUDA libraries, or choose another backend'

# Serialised ONNX graph of one Relu, x (1,) -> y (1,), float32, opset 13: the smallest thing to try a device with.
RELU_GRAPH = bytes.fromhex(
    "08083a330a0c0a0178120179220452656c751201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a02"
    "080142040a00100d"
)


class OrtBackend:
    """A graph in ONNX Runtime.

    Args:
        model: content of an .onnx file.
        manifest: of the bundle, which the graph must fit.
        file: name of the artifact, for messages.
        name: "onnxruntime" or "onnxruntime-cuda".
        threads: CPU threads inside one operator; None leaves it to ONNX Runtime.

    Raises:
        BackendError: the package is missing, or the graph cannot run on that device.
        BundleError: the graph is not what the manifest promises.

    Note:
        `infer` may be called from several threads at once.
    """

    def __init__(
        self, model: bytes, manifest: ModelManifest, *, file: str, name: str = CPU, threads: int | None = None
    ) -> None:
        ort = _import_onnxruntime(name)
        self.name = name
        self.device = "cpu" if name == CPU else "cuda:0"
        self.version = str(ort.__version__)
        self._manifest = manifest
        self._session: Any = _open_session(ort, model, name, threads)
        check_graph(_tensors(self._session.get_inputs()), _tensors(self._session.get_outputs()), manifest, file)

    def infer(self, images: NDArray[np.uint8]) -> Outputs:
        """Outputs for images (N, H, W, 3) uint8."""
        arrays = self._session.run(list(OUTPUTS), {INPUT_NAME: images})
        return checked_outputs(dict(zip(OUTPUTS, arrays, strict=True)), len(images), self._manifest)

    def close(self) -> None:
        """Releases the session."""
        self._session = None


def probe_ort(name: str) -> Probe:
    """Whether ONNX Runtime would run here on the CPU ("onnxruntime") or on CUDA ("onnxruntime-cuda")."""
    version = installed_version(*_DISTRIBUTIONS[name])
    try:
        ort = _import_onnxruntime(name)
        session = _open_session(ort, RELU_GRAPH, name, 1)
        session.run(None, {"x": np.ones(1, np.float32)})
    except BackendError as error:
        return Probe(name, False, version, None, error.got, error.remedy)
    except Exception as error:  # what a broken installation raises is not ours to list
        return Probe(name, False, version, None, f"{type(error).__name__}: {error}", _INSTALL[name])
    device = "cpu" if name == CPU else "cuda:0"
    return Probe(name, True, str(ort.__version__), device, f"{_PROVIDER[name]} ran a graph", "")


def _import_onnxruntime(name: str) -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except Exception as error:  # a broken native library raises more than ImportError
        missing = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
        raise BackendError(
            f"back-end {name}",
            got="no package onnxruntime" if missing else f"an onnxruntime that does not import ({error})",
            wanted="a working installation",
            remedy=_INSTALL[name],
        ) from error


def _open_session(ort: Any, model: bytes, name: str, threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if name == CUDA:
        _require_cuda_provider(ort)
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # TF32 keeps 10 bits of a product: scores would differ from every other back-end.
    provider = (_PROVIDER[name], {"use_tf32": "0"} if name == CUDA else {})
    try:
        session = ort.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        if "fallback to CPU EP" in str(error):
            _refuse_fallback(error)
        refuse_to_open(name, error)
    if session.get_providers()[0] != _PROVIDER[name]:
        raise BackendError(
            f"back-end {name}",
            got=f"a session on {session.get_providers()[0]}",
            wanted=_PROVIDER[name],
            remedy=_CUDA_REMEDY,
        )
    return session


def _refuse_fallback(error: Exception) -> NoReturn:
    raise BackendError(
        f"back-end {CUDA}",
        got="CUDA libraries that do not load, or a graph of which CUDA cannot run every node",
        wanted="a graph that runs on the GPU completely",
        remedy=_CUDA_REMEDY,
    ) from error


def _require_cuda_provider(ort: Any) -> None:
    if _PROVIDER[CUDA] not in ort.get_available_providers():
        raise BackendError(
            f"back-end {CUDA}",
            got="an onnxruntime that was built without CUDA",
            wanted="the package onnxruntime-gpu",
            remedy=f"pip uninstall onnxruntime, then {_INSTALL[CUDA]}; both in one environment do not work",
        )
    driver = cuda_driver()
    if driver.devices == 0:
        raise BackendError(
            f"back-end {CUDA}",
            got=driver.detail,
            wanted="an NVIDIA GPU with its driver",
            remedy="run where there is one (`ntf doctor` shows what is seen), or choose another backend",
        )
    if hasattr(ort, "preload_dlls"):
        # Finds CUDA libraries that were installed by pip; it prints what it misses, the session says it better.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _tensors(values: Any) -> list[TensorInfo]:
    return [
        TensorInfo(
            value.name,
            _DTYPES.get(value.type, value.type),
            tuple(size if isinstance(size, int) else None for size in value.shape),
        )
        for value in values
    ]
