"""Which TensorRT is installed here, whether it would run, and which engines of a bundle fit it."""

from __future__ import annotations

import importlib
from contextlib import ExitStack, suppress
from typing import Any, Literal, TypeAlias

from runtime.backends.base import Probe
from runtime.backends.cuda_api import INSTALL as INSTALL_CUDA
from runtime.backends.cuda_api import CudaApi, installed_cuda_api, open_cuda_api
from runtime.backends.cuda_driver import cuda_device, cuda_driver
from runtime.engine_check import EngineRuntime, check_engine
from runtime.errors import BackendError, BundleError
from runtime.manifest import ArtifactSpec, ModelManifest

NAME = "trt"

Flavour: TypeAlias = Literal["trt", "rtx"]
FLAVOURS: tuple[Flavour, ...] = ("trt", "rtx")
MODULES: dict[Flavour, str] = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}

INSTALL = 'pip install "ntf-toolkit[trt]" or "ntf-toolkit[rtx]", whichever built the engine'


def import_tensorrt(flavour: Flavour) -> Any:
    """The TensorRT module of a flavour.

    Raises:
        BackendError: it is missing or does not import.
    """
    name = MODULES[flavour]
    try:
        module = importlib.import_module(name)
        _ = module.__version__  # the package on the index without libraries imports, and is empty
    except Exception as error:  # a broken native library raises more than ImportError
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        raise BackendError(
            f"back-end {NAME}",
            got=f"no package {name}" if missing else f"a {name} that does not import ({error})",
            wanted="a working installation",
            remedy=f'pip install "ntf-toolkit[{flavour}]"',
        ) from error
    return module


def installed_runtimes() -> list[EngineRuntime]:
    """What engines would run on here: each TensorRT that imports, with the GPU; empty where there is none.

    Note:
        TensorRT is imported only where there is a GPU.
    """
    device = cuda_device()
    found: list[EngineRuntime] = []
    for flavour in FLAVOURS if device is not None else ():
        with suppress(BackendError):
            found.append(EngineRuntime(flavour, str(import_tensorrt(flavour).__version__), device))
    return found


def fitting_engines(manifest: ModelManifest) -> tuple[list[ArtifactSpec], str]:
    """Engines of a bundle that fit the GPU and a TensorRT of this machine, and why the others do not."""
    engines = [artifact for artifact in manifest.artifacts if artifact.format == "engine"]
    if not engines:
        return [], "the bundle has no engine"
    runtimes = installed_runtimes()
    if not runtimes:
        driver = cuda_driver()
        return [], driver.detail if driver.devices == 0 else f"neither tensorrt nor tensorrt_rtx imports: {INSTALL}"
    fitting: list[ArtifactSpec] = []
    reasons: list[str] = []
    for engine in engines:
        here = next((runtime for runtime in runtimes if runtime.flavour == engine.flavour), runtimes[0])
        try:
            fitting.append(check_engine(manifest, engine.file, here))
        except (BackendError, BundleError) as error:
            reasons.append(f"{engine.file}: got {error.got}, wanted {error.wanted}")
    return fitting, "; ".join(reasons)


def probe_trt() -> Probe:
    """Whether TensorRT engines would run here, as far as can be said without one."""
    driver = cuda_driver()
    reasons: list[str] = []
    versions: list[str] = []
    for flavour in FLAVOURS:
        try:
            versions.append(f"{MODULES[flavour]} {import_tensorrt(flavour).__version__}")
        except BackendError as error:
            reasons.append(error.got)
    version = ", ".join(versions) or None
    if driver.devices == 0:
        return Probe(NAME, False, version, None, driver.detail, "run where there is an NVIDIA GPU with its driver")
    if version is None:
        return Probe(NAME, False, None, None, "; ".join(reasons), INSTALL)
    api = installed_cuda_api()
    if api is None:
        return Probe(NAME, False, version, None, "neither cuda-bindings nor pycuda is installed", INSTALL_CUDA)
    try:
        _try_device(open_cuda_api(api))
    except BackendError as error:
        return Probe(NAME, False, version, None, f"{error.subject}: {error.got}", error.remedy)
    return Probe(NAME, True, version, "cuda:0", f"{version} with {api}; engines that fit run", "")


def _try_device(cuda: CudaApi) -> None:
    """A copy there and back, which must give the same bytes."""
    with ExitStack() as stack:
        stack.callback(cuda.close)
        stack.enter_context(cuda.on_device())
        stream = cuda.open_stream()
        stack.callback(cuda.close_stream, stream)
        address = cuda.allocate(2)
        stack.callback(cuda.free, address)
        sent = cuda.allocate_pinned(2)
        stack.callback(cuda.free_pinned, sent)
        received = cuda.allocate_pinned(2)
        stack.callback(cuda.free_pinned, received)
        sent[:] = (1, 2)
        cuda.upload(address, sent, stream)
        cuda.download(received, address, stream)
        cuda.synchronize(stream)
        if received.tolist() != [1, 2]:
            raise BackendError(
                "the GPU",
                got=f"{received.tolist()} after a copy there and back",
                wanted="[1, 2]",
                remedy="check it with nvidia-smi",
            )
