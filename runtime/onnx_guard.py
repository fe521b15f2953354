"""What an ONNX graph may not ask a back-end for: files beside it.

A tensor may say that its data lie in another file, and a node that its engine does. Back-ends that are handed a graph's
bytes look for such a file from the current folder on. A bundle has nothing to look for outside itself, so such a graph
is refused before any back-end sees it; the few messages that matter are found in protobuf's wire format, without onnx.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from runtime.errors import BundleError

# Field numbers of onnx.proto that lead from a message to one that may name a file.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14
_NODE_OP_TYPE = 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_MAX_TAG = 0xFFFFFFFF


def require_self_contained(model: bytes, file: str) -> None:
    """Nothing for a graph that names no other file.

    Args:
        model: content of an .onnx file.
        file: its name, for messages.

    Raises:
        BundleError: a tensor's data or a node's engine lie elsewhere, or the file is no ONNX graph.
    """
    pending: list[tuple[str, memoryview]] = [("model", memoryview(model))]
    try:
        while pending:
            kind, message = pending.pop()
            for number, value in _fields(message):
                if kind == "tensor" and number in (_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION) and value:
                    _refuse(file, "a graph that has data in another file", "all data in the graph")
                if kind == "node" and number == _NODE_OP_TYPE and value == memoryview(b"EPContext"):
                    _refuse(file, "a graph that wraps what another program compiled", "plain ONNX operators")
                if number in _INSIDE[kind]:
                    if isinstance(value, int):
                        raise ValueError(f"field {number} of a {kind} is a number")
                    pending.append((_INSIDE[kind][number], value))
    except (ValueError, IndexError) as error:
        _refuse(file, f"a file that is no ONNX graph ({error})", "an ONNX graph")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message: an integer, or the bytes of anything longer.

    Raises:
        ValueError: a field goes beyond the message, or is of a kind that ONNX does not use.
        IndexError: the message ends within a number.
    """
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, kind = tag >> 3, tag & 7
        if tag > _MAX_TAG:  # of which readers keep 32 bits, and would see another field than this one
            raise ValueError(f"a field numbered {number}")
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        if kind == _BYTES:
            length, place = _varint(message, place)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of kind {kind}")
        if length > len(message) - place:
            raise ValueError("a field that goes beyond its end")
        yield number, message[place : place + length]
        place += length


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """An integer and the place behind it."""
    value = 0
    for position in range(_MAX_VARINT_BYTES):
        byte = message[place + position]
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, place + position + 1
    raise ValueError("a number that does not end")


def _refuse(file: str, got: str, wanted: str) -> NoReturn:
    raise BundleError(file, got=got, wanted=wanted, remedy="do not use this bundle; export the model again")
