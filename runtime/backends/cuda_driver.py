"""The NVIDIA driver asked directly: packages claim a GPU on machines that have none, the driver does not."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class CudaDriver:
    """How many devices the driver offers, and that in words, or why there are none."""

    devices: int
    detail: str


def cuda_driver() -> CudaDriver:
    """What the NVIDIA driver of this machine answers; no CUDA package is needed for asking."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
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
