"""What each TensorRT has and lacks: one table that the build reads and docs/deploy.md shows."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from export.errors import ExportError
from runtime.errors import BackendError

INSTALL = 'pip install "ntf-toolkit[rtx]" (builds without a GPU) or "ntf-toolkit[trt]" from NVIDIA\'s index'

VERSION_COMPATIBLE = "--version-compatible"
HARDWARE_COMPATIBLE = "--hardware-compatible"
TIMING_CACHE = "--timing-cache"
WORKSPACE = "--workspace-mib"
TF32 = "--tf32"


@dataclass(frozen=True)
class Flavour:
    """One major version of a TensorRT.

    Attributes:
        name: for people.
        module: Python module.
        major: its major version.
        kind: "trt", which builds for the GPU it runs on, or "rtx", which names its targets.
        typing_flag: whether a network is strongly typed by a flag; without one every network is.
        precision_flags: whether the builder has FP16 and INT8 flags, which strongly typed networks do not use.
        validity_check: whether the runtime tells what is wrong with an engine before it is deserialised.
        lacks: options that it cannot serve, each with the reason.
    """

    name: str
    module: str
    major: int
    kind: Literal["trt", "rtx"]
    typing_flag: bool
    precision_flags: bool
    validity_check: bool
    lacks: Mapping[str, str] = field(default_factory=dict)


# The two tensorrt rows: NVIDIA's guide for migrating from 10.x to 11.x. The third was tried with tensorrt_rtx 1.7.
FLAVOURS = (
    Flavour("TensorRT 10", "tensorrt", 10, "trt", typing_flag=True, precision_flags=True, validity_check=False),
    Flavour("TensorRT 11", "tensorrt", 11, "trt", typing_flag=False, precision_flags=False, validity_check=False),
    Flavour(
        "TensorRT-RTX 1",
        "tensorrt_rtx",
        1,
        "rtx",
        typing_flag=True,
        precision_flags=False,
        validity_check=True,
        lacks={
            VERSION_COMPATIBLE: "its engines fit one release only, and it has no lean runtime to put into them",
            HARDWARE_COMPATIBLE: "it names its targets instead: --target portable covers every GPU it knows",
            TIMING_CACHE: "it times nothing when it builds, and its timing cache does nothing",
        },
    ),
)


@dataclass(frozen=True)
class TensorRT:
    """An installed TensorRT.

    Attributes:
        module: the Python module.
        flavour: its row of the table.
        version: of the module.
    """

    module: Any
    flavour: Flavour
    version: str

    @property
    def builder(self) -> str:
        """Module and version, as the manifest names them."""
        return f"{self.flavour.module} {self.version}"


def find_tensorrt() -> TensorRT:
    """The first of `tensorrt`, `tensorrt_rtx` that imports.

    Raises:
        BackendError: neither does; the message says what to install.
        ExportError: its version is in no row of the table.
    """
    reasons = []
    for name in dict.fromkeys(flavour.module for flavour in FLAVOURS):
        try:
            module = importlib.import_module(name)
            version = str(module.__version__)
        except (ImportError, OSError, AttributeError) as error:  # a stub package, or libraries that do not load
            reasons.append(f"{name}: {error}")
            continue
        return TensorRT(module, flavour_of(name, version), version)
    raise BackendError(
        "TensorRT",
        got=f"no module that imports ({'; '.join(reasons)})",
        wanted="tensorrt or tensorrt_rtx",
        remedy=INSTALL,
    )


def flavour_of(module: str, version: str) -> Flavour:
    """The row of a module and its version.

    Raises:
        ExportError: there is none.
    """
    for flavour in FLAVOURS:
        if flavour.module == module and version.partition(".")[0] == str(flavour.major):
            return flavour
    raise ExportError(
        module,
        got=f"version {version}, of which is not known what it has",
        wanted=f"one of {', '.join(flavour.name for flavour in FLAVOURS)}",
        remedy="install one of these; a run can be exported without engines (--no-engine)",
    )


def flavours_markdown() -> str:
    """The table for people, as Markdown."""

    def has(flavour: Flavour, option: str) -> str:
        return f"no: {flavour.lacks[option]}" if option in flavour.lacks else "yes"

    rows = {
        "strongly typed networks": ["by a flag" if f.typing_flag else "always" for f in FLAVOURS],
        "FP16 and INT8 builder flags": ["there, not used" if f.precision_flags else "none" for f in FLAVOURS],
        "`--target`": ["this GPU" if f.kind == "trt" else "named, or portable" for f in FLAVOURS],
        "builds without a GPU": ["no" if f.kind == "trt" else "yes" for f in FLAVOURS],
        **{
            f"`{option}`": [has(f, option) for f in FLAVOURS]
            for option in (WORKSPACE, TIMING_CACHE, VERSION_COMPATIBLE, HARDWARE_COMPATIBLE, TF32)
        },
        "progress, and Ctrl-C in a build": ["yes" for _ in FLAVOURS],
        "tells what is wrong with an engine": ["yes" if f.validity_check else "no" for f in FLAVOURS],
    }
    lines = ["| | " + " | ".join(f.name for f in FLAVOURS) + " |", "|---" * (1 + len(FLAVOURS)) + "|"]
    return "\n".join([*lines, *(f"| {what} | {' | '.join(cells)} |" for what, cells in rows.items())])
