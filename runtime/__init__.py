"""Detection of generated images on the machine where it is used: NumPy, Pillow and one back-end, no PyTorch.

    from runtime import Detector

    with Detector.load("models/demo") as detector:
        for detection in detector.predict(["a.jpg", "b.png"]):
            print(detection.source, detection.verdict, detection.fake_probability)

Public names are resolved when they are first used, so importing this package costs next to nothing and needs no
back-end.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.batching import BatchObserver
    from runtime.bundle import Bundle, open_bundle
    from runtime.decode import decode_picture
    from runtime.detector import Detection, Detector, DetectorInfo
    from runtime.errors import (
        BackendError,
        BundleError,
        ClosedError,
        DeadlineError,
        NTFError,
        PictureError,
        QueueFullError,
        UsageError,
    )
    from runtime.manifest import ModelManifest
    from runtime.preprocess import PreprocessSpec, prepare
    from runtime.service import DetectorService

    __version__: str

_HOME = {
    "BackendError": "runtime.errors",
    "BatchObserver": "runtime.batching",
    "Bundle": "runtime.bundle",
    "BundleError": "runtime.errors",
    "ClosedError": "runtime.errors",
    "DeadlineError": "runtime.errors",
    "Detection": "runtime.detector",
    "Detector": "runtime.detector",
    "DetectorInfo": "runtime.detector",
    "DetectorService": "runtime.service",
    "ModelManifest": "runtime.manifest",
    "NTFError": "runtime.errors",
    "PictureError": "runtime.errors",
    "PreprocessSpec": "runtime.preprocess",
    "QueueFullError": "runtime.errors",
    "UsageError": "runtime.errors",
    "decode_picture": "runtime.decode",
    "open_bundle": "runtime.bundle",
    "prepare": "runtime.preprocess",
}

__all__ = [
    "BackendError",
    "BatchObserver",
    "Bundle",
    "BundleError",
    "ClosedError",
    "DeadlineError",
    "Detection",
    "Detector",
    "DetectorInfo",
    "DetectorService",
    "ModelManifest",
    "NTFError",
    "PictureError",
    "PreprocessSpec",
    "QueueFullError",
    "UsageError",
    "__version__",
    "decode_picture",
    "open_bundle",
    "prepare",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata  # most of the time that importing this package would take

    try:
        return metadata.version("ntf-toolkit")
    except metadata.PackageNotFoundError:
        return "0+unknown"  # a bare checkout on the path, never installed
