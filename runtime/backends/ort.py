"""ONNX Runtime on the CPU, and on CUDA, TensorRT or TensorRT-RTX where these really run.

ONNX Runtime falls back to the CPU without a word when a provider cannot start or lacks a node, so a session on a GPU is
opened with that fallback disabled and with one provider alone, and the provider that it ended up with is checked as
well: a graph runs on what was asked for, completely, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
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
    output_shapes,
    refuse_to_open,
    refuse_to_run,
)
from runtime.backends.cuda_driver import cuda_driver
from runtime.errors import BackendError
from runtime.manifest import INPUT_NAME, OUTPUTS, ModelManifest
from runtime.user_cache import made_cache

CPU, CUDA = "onnxruntime", "onnxruntime-cuda"
TENSORRT, TENSORRT_RTX = "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"

_INSTALL_CPU = 'pip install "ntf-toolkit[cpu]"'
_INSTALL_GPU = 'pip install "ntf-toolkit[gpu]"'


@dataclass(frozen=True)
class _Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        name: that ONNX Runtime gives it.
        distributions: packages that have it.
        install: what brings the package.
        libraries: what brings the libraries that it loads.
    """

    name: str
    distributions: tuple[str, ...]
    install: str
    libraries: str


_PROVIDERS: Mapping[str, _Provider] = {
    CPU: _Provider("CPUExecutionProvider", ("onnxruntime", "onnxruntime-gpu"), _INSTALL_CPU, _INSTALL_CPU),
    CUDA: _Provider(
        "CUDAExecutionProvider",
        ("onnxruntime-gpu",),
        _INSTALL_GPU,
        'pip install "onnxruntime-gpu[cuda,cudnn]" for the CUDA libraries, or choose another backend',
    ),
    TENSORRT: _Provider(
        "TensorrtExecutionProvider",
        ("onnxruntime-gpu",),
        _INSTALL_GPU,
        "install the TensorRT 10 whose libraries this onnxruntime-gpu loads (11 is not), or choose another backend",
    ),
    TENSORRT_RTX: _Provider(
        "NvTensorRTRTXExecutionProvider",
        ("onnxruntime-trt-rtx", "onnxruntime-gpu"),
        "install an onnxruntime that was built with TensorRT-RTX",
        "install the TensorRT-RTX whose libraries this onnxruntime loads, or choose another backend",
    ),
}
_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
_ERRORS_ONLY = 3
# Read by the CUDA libraries when they start. The TensorRT providers have no option of their own for it, as of 1.31.
_TF32_VARIABLE = "NVIDIA_TF32_OVERRIDE"
# Batches that the TensorRT providers build for: smallest, preferred, largest.
TENSORRT_BATCHES = (1, 8, 64)

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
        name: "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt" or "onnxruntime-tensorrt-rtx".
        threads: CPU threads inside one operator; None leaves it to ONNX Runtime.
        max_batch: largest batch that will be asked for; None leaves it to each call.

    Raises:
        BackendError: the package is missing, the graph cannot run on that device, or TF32 would be used.
        BundleError: the graph is not what the manifest promises.
        UsageError: a TensorRT provider has no folder to keep what it builds.

    Note:
        `infer` may be called from several threads at once. The TensorRT providers build an engine when they are
        opened, which may take minutes; what can be kept of it for the next time is in the user's cache folder.
    """

    def __init__(
        self,
        model: bytes,
        manifest: ModelManifest,
        *,
        file: str,
        name: str = CPU,
        threads: int | None = None,
        max_batch: int | None = None,
    ) -> None:
        _require_batch(name, max_batch or 1)
        ort = _import_onnxruntime(name)
        self.name = name
        self.device = _device(name)
        self.version = str(ort.__version__)
        self._manifest = manifest
        self._session: Any = _open_session(ort, model, name, threads, _tensorrt_options(name, model, manifest, file))
        check_graph(_tensors(self._session.get_inputs()), _tensors(self._session.get_outputs()), manifest, file)

    def infer(self, images: NDArray[np.uint8]) -> Outputs:
        """Outputs for images (N, H, W, 3) uint8.

        Raises:
            BackendError: ONNX Runtime fails, or the batch is larger than a TensorRT provider was built for.
        """
        _require_batch(self.name, len(images))
        try:
            arrays = self._run(images) if self.name == CPU else self._run_bound(images)
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            refuse_to_run(self.name, error)
        return checked_outputs(arrays, len(images), self._manifest)

    def close(self) -> None:
        """Releases the session."""
        self._session = None

    def _run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        return dict(zip(OUTPUTS, self._session.run(list(OUTPUTS), {INPUT_NAME: images}), strict=True))

    def _run_bound(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """The same by IO binding: the pictures go to the device, and outputs come straight into arrays of our own."""
        shapes = output_shapes(len(images), self._manifest)
        arrays = {name: np.empty(shapes[name], np.float32) for name in OUTPUTS}
        binding = self._session.io_binding()
        binding.bind_cpu_input(INPUT_NAME, images)
        for name, array in arrays.items():
            binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return arrays


def probe_ort(name: str) -> Probe:
    """Whether ONNX Runtime would run here on the provider of a back-end, found out by running a graph."""
    provider = _PROVIDERS[name]
    version = installed_version(*provider.distributions)
    try:
        ort = _import_onnxruntime(name)
        session = _open_session(ort, RELU_GRAPH, name, 1, {})
        session.run(None, {"x": np.ones(1, np.float32)})
    except BackendError as error:
        return Probe(name, False, version, None, error.got, error.remedy)
    except Exception as error:  # what a broken installation raises is not ours to list
        return Probe(name, False, version, None, f"{type(error).__name__}: {error}", provider.install)
    return Probe(name, True, str(ort.__version__), _device(name), f"{provider.name} ran a graph", "")


def _device(name: str) -> str:
    return "cpu" if name == CPU else "cuda:0"


def _import_onnxruntime(name: str) -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except Exception as error:  # a broken native library raises more than ImportError
        missing = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
        raise BackendError(
            f"back-end {name}",
            got="no package onnxruntime" if missing else f"an onnxruntime that does not import ({error})",
            wanted="a working installation",
            remedy=_PROVIDERS[name].install,
        ) from error


def _open_session(ort: Any, model: bytes, name: str, threads: int | None, settings: Mapping[str, str]) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if name != CPU:
        _require_gpu_provider(ort, name)
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # TF32 keeps 10 bits of a product: scores would differ from every other back-end.
    provider = (_PROVIDERS[name].name, {"use_tf32": "0"} if name == CUDA else dict(settings))
    try:
        session = ort.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        if "fallback to CPU EP" in str(error):
            _refuse_fallback(name, error)
        refuse_to_open(name, error)
    if session.get_providers()[0] != _PROVIDERS[name].name:
        raise BackendError(
            f"back-end {name}",
            got=f"a session on {session.get_providers()[0]}",
            wanted=_PROVIDERS[name].name,
            remedy=_PROVIDERS[name].libraries,
        )
    return session


def _tensorrt_options(name: str, model: bytes, manifest: ModelManifest, file: str) -> dict[str, str]:
    """What a TensorRT provider is told: its batches, where it keeps what it built, and the types of this artifact."""
    if name not in (TENSORRT, TENSORRT_RTX):
        return {}
    size = manifest.preprocess
    rest = f"{size.height}x{size.width}x3"
    prefix = "trt" if name == TENSORRT else "nv"
    told = {
        f"{prefix}_profile_{which}_shapes": f"{INPUT_NAME}:{batch}x{rest}"
        for which, batch in zip(("min", "opt", "max"), TENSORRT_BATCHES, strict=True)
    }
    # Not where an engine may lie that was built while TF32 was allowed.
    folder = made_cache(name, "without-tf32", hashlib.sha256(model).hexdigest())
    if name == TENSORRT_RTX:
        return told | {"nv_runtime_cache_path": str(folder)}
    precision = next((artifact.precision for artifact in manifest.artifacts if artifact.file == file), "fp32")
    # This provider builds weakly typed networks, in which a type has to be allowed before it is used.
    types = {"fp32": (), "fp16": ("fp16",), "int8": ("int8", "fp16")}[precision]
    told |= {f"trt_{allowed}_enable": "1" for allowed in types}
    return told | {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}


def _refuse_fallback(name: str, error: Exception) -> NoReturn:
    provider = _PROVIDERS[name].name.removesuffix("ExecutionProvider")
    raise BackendError(
        f"back-end {name}",
        got=f"{provider} libraries that do not load, or a graph of which {provider} cannot run every node",
        wanted="a graph that runs on the GPU completely",
        remedy=_PROVIDERS[name].libraries,
    ) from error


def _require_batch(name: str, pictures: int) -> None:
    if name in (TENSORRT, TENSORRT_RTX) and pictures > TENSORRT_BATCHES[2]:
        raise BackendError(
            f"back-end {name}",
            got=f"a batch of {pictures}",
            wanted=f"{TENSORRT_BATCHES[0]} to {TENSORRT_BATCHES[2]}, which its engine is built for",
            remedy="score fewer pictures at once",
        )


def _require_gpu_provider(ort: Any, name: str) -> None:
    provider = _PROVIDERS[name]
    if provider.name not in ort.get_available_providers():
        raise BackendError(
            f"back-end {name}",
            got=f"an onnxruntime that was built without {provider.name.removesuffix('ExecutionProvider')}",
            wanted=f"the package {provider.distributions[0]}",
            remedy=f"pip uninstall onnxruntime, then {provider.install}; both in one environment do not work",
        )
    driver = cuda_driver()
    if driver.devices == 0:
        raise BackendError(
            f"back-end {name}",
            got=driver.detail,
            wanted="an NVIDIA GPU with its driver",
            remedy="run where there is one (`ntf doctor` shows what is seen), or choose another backend",
        )
    _require_no_tf32(name)
    if hasattr(ort, "preload_dlls"):
        # Finds CUDA libraries that were installed by pip; it prints what it misses, the session says it better.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _require_no_tf32(name: str) -> None:
    """Refuses a TensorRT provider that would build with TF32: its scores would not be those that were compared."""
    if name in (TENSORRT, TENSORRT_RTX) and os.environ.get(_TF32_VARIABLE) != "0":
        raise BackendError(
            f"back-end {name}",
            got=f"{_TF32_VARIABLE} = {os.environ.get(_TF32_VARIABLE)}, which lets FP32 products be rounded to 10 bits",
            wanted=f"{_TF32_VARIABLE}=0, the only way to keep ONNX Runtime's TensorRT from it",
            remedy="set it before the program starts, or choose onnxruntime-cuda or trt",
        )


def _tensors(values: Any) -> list[TensorInfo]:
    return [
        TensorInfo(
            value.name,
            _DTYPES.get(value.type, value.type),
            tuple(size if isinstance(size, int) else None for size in value.shape),
        )
        for value in values
    ]
