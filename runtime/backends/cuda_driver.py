"""The NVIDIA driver asked directly: packages claim a GPU on machines that have none, the driver does not."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

# cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_CAPABILITY_ATTRIBUTES = (75, 76)
_NAME_BYTES = 256


@dataclass(frozen=True)
class CudaDriver:
    """How many devices the driver offers, and that in words, or why there are none."""

    devices: int
    detail: str


@dataclass(frozen=True)
class CudaDevice:
    """A GPU: its compute capability as engines name it, for example "sm89", and what it is called."""

    target: str
    name: str


def cuda_driver() -> CudaDriver:
    """What the NVIDIA driver of this machine answers; no CUDA package is needed for asking."""
    library = _library_name()
    try:
        driver = ctypes.CDLL(library)
        status = driver.cuInit(0)
        count = ctypes.c_int(0)
        if status == 0:
            status = driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):
        return CudaDriver(0, f"no NVIDIA driver ({library} is not there)")
    if status != 0:
        return CudaDriver(0, f"an NVIDIA driver that does not start (CUDA error {status})")
    return CudaDriver(count.value, f"an NVIDIA driver with {count.value} device(s)")


def cuda_device(index: int = 0) -> CudaDevice | None:
    """A GPU of this machine, in the driver's order; None where the driver has none of that index or fails."""
    if index >= cuda_driver().devices:
        return None
    driver = ctypes.CDLL(_library_name())
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(_NAME_BYTES)
    capability = [ctypes.c_int(0) for _ in _CAPABILITY_ATTRIBUTES]
    status = driver.cuDeviceGet(ctypes.byref(device), index)
    status = status or driver.cuDeviceGetName(name, _NAME_BYTES, device)
    for value, attribute in zip(capability, _CAPABILITY_ATTRIBUTES, strict=True):
        status = status or driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    if status != 0:
        return None
    return CudaDevice("sm" + "".join(str(value.value) for value in capability), name.value.decode(errors="replace"))


def _library_name() -> str:
    return "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
