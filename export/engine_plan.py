"""The layers of a built engine, as TensorRT's log lists them when profiling is detailed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from export.engine_log import PLAN_START

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)$", re.MULTILINE)
# A section ends where the next one starts: TensorRT 10 has no Constants, TensorRT-RTX no ParameterType.
_SECTION = re.compile(r"(?:^|, )(Inputs|Constants|Outputs|ParameterType|TacticName|TacticValue|StreamId|Metadata): ")
_DATATYPE = re.compile(r"Data[Tt]ype: ([^,}]*)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# Types come as a word, or within a description such as "Channel major FP16 format where channel % 8 == 0".
_WORDS = {
    "Half": "Half", "FP16": "Half", "Float": "Float", "FP32": "Float", "Int8": "Int8", "INT8": "Int8", "UInt8": "UInt8",
    "UINT8": "UInt8", "BFloat16": "BFloat16", "BF16": "BFloat16", "Int32": "Int32", "INT32": "Int32", "Int64": "Int64",
    "INT64": "Int64", "Bool": "Bool", "BOOL": "Bool", "FP8": "FP8",
}  # fmt: skip
# How a convolution is called: by TensorRT-RTX, then by TensorRT.
CONVOLUTION_KINDS = ("correlation", "CaskConvolution")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: as TensorRT gave it.
        kind: for example "correlation", "gemm" or "kgen".
        input_types: data type of each tensor that it reads, for example "Half".
        constant_types: data type of each weight.
        output_types: data type of each tensor that it writes.
        nodes: names of the ONNX nodes that became part of it, as far as TensorRT says.
    """

    name: str
    kind: str
    input_types: tuple[str, ...]
    constant_types: tuple[str, ...]
    output_types: tuple[str, ...]
    nodes: tuple[str, ...] = ()

    @property
    def types(self) -> str:
        """What it reads and writes, for example "Half" or "Int8>Float"; "" for one without tensors."""
        read, written = ("+".join(sorted(set(types))) for types in (self.input_types, self.output_types))
        return read if read == written else f"{read}>{written}"


def read_layers(messages: Sequence[tuple[str, str]]) -> tuple[EngineLayer, ...]:
    """Layers of an engine from the messages of a build with detailed profiling; empty where the log has no plan."""
    plan = next((text for _, text in reversed(messages) if text.startswith(PLAN_START)), "")
    return tuple(_layer(match["name"], match["kind"], match["rest"]) for match in _LAYER.finditer(plan))


def count_layers(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """How many layers there are of each kind with each types, by "kind types"; waits and signals are left out."""
    return dict(Counter(f"{layer.kind} {layer.types}" for layer in layers if layer.types))


def _layer(name: str, kind: str, rest: str) -> EngineLayer:
    parts = _SECTION.split(rest)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    types = {
        section: tuple(_type(text) for text in _DATATYPE.findall(sections.get(section, "")))
        for section in ("Inputs", "Constants", "Outputs")
    }
    nodes = tuple(_NODE.findall(sections.get("Metadata", "")))
    return EngineLayer(name, kind, types["Inputs"], types["Constants"], types["Outputs"], nodes)


def _type(text: str) -> str:
    return next((_WORDS[word] for word in text.split() if word in _WORDS), text.strip())
