"""Requests and responses of the Open Inference Protocol (v2), in JSON and with tensors as bytes behind it.

The protocol is KServe's (https://github.com/kserve/open-inference-protocol); tensors as bytes are Triton's extension
(binary_tensor_data): the JSON comes first, its length in the header Inference-Header-Content-Length.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import FailFast, Field, field_validator

from runtime.serve.bodies import JsonBounds, validated
from runtime.serve.request_errors import RequestError
from runtime.serve.schemas import StrictModel

HEADER_LENGTH = "inference-header-content-length"
VERSION = "1"
# Of inputs and of outputs in a request; no model here has as many.
_MOST_TENSORS = 16
# str.isdigit takes a superscript, and int refuses thousands of digits.
_LENGTH = re.compile(r"[0-9]{1,15}")

# The protocol knows no other values, and objects in them would take many times the memory of their text.
Parameters: TypeAlias = dict[str, bool | int | float | str | None]
# float32, or texts and files as bytes
Values: TypeAlias = "NDArray[np.float32] | list[bytes]"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model: name, datatype in the protocol's words, and shape with -1 for a free size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the metadata of a model."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    def json_bounds(self, rows: int) -> JsonBounds:
        """What the JSON of a request may hold that has so many rows of this tensor, as lists of lists or as one."""
        # A data URL, the only text that is sent, has a comma.
        values = math.prod(self.shape[1:]) * (2 if self.datatype == "BYTES" else 1)
        lists = sum(math.prod(self.shape[1:depth]) for depth in range(1, len(self.shape)))
        return JsonBounds.beside(rows * values, rows * lists)


class InputTensor(StrictModel):
    """One input of a request."""

    name: str
    shape: Annotated[list[int], FailFast()] = Field(max_length=8)
    datatype: str
    parameters: Annotated[Parameters, Field(max_length=16)] = Field(default_factory=dict)
    data: list[Any] | None = None


class OutputWish(StrictModel):
    """One output that a request asks for."""

    name: str
    parameters: Annotated[Parameters, Field(max_length=16)] = Field(default_factory=dict)


class TensorRequest(StrictModel):
    """The JSON of a request."""

    id: str | None = None
    parameters: Annotated[Parameters, Field(max_length=16)] = Field(default_factory=dict)
    inputs: Annotated[list[InputTensor], FailFast()] = Field(min_length=1, max_length=_MOST_TENSORS)
    outputs: list[OutputWish] | None = None

    @field_validator("outputs", mode="before")
    @classmethod
    def _are_few(cls, wishes: object) -> object:
        if isinstance(wishes, list) and len(wishes) > _MOST_TENSORS:
            raise ValueError(f"{len(wishes)} outputs, at most {_MOST_TENSORS}")
        return wishes


@dataclass(frozen=True)
class ParsedRequest:
    """A request with the bytes of each input that came as bytes, by name."""

    request: TensorRequest
    raw: Mapping[str, bytes]

    def only_input(self, spec: TensorSpec) -> InputTensor:
        """The one input of a model, its name, datatype and shape checked.

        Raises:
            RequestError: 422 for another one.
        """
        first = self.request.inputs[0]
        if len(self.request.inputs) != 1 or first.name != spec.name:
            names = ", ".join(tensor.name[:40] for tensor in self.request.inputs[:4])
            _refuse(f"inputs {names}", f"{spec.name} alone")
        fits = len(first.shape) == len(spec.shape) and all(size > 0 for size in first.shape)
        fits = fits and all(wanted in (-1, size) for wanted, size in zip(spec.shape, first.shape, strict=True))
        if first.datatype != spec.datatype or not fits:
            _refuse(f"{first.datatype[:20]} {first.shape[:8]}", f"{spec.datatype} {list(spec.shape)}", spec.name)
        return first

    def wishes(self, outputs: Sequence[TensorSpec]) -> list[tuple[TensorSpec, bool]]:
        """The outputs to give, each with whether it goes as bytes; all of them where none is named.

        Raises:
            RequestError: 422 for an output that there is not, or one as classes.
        """
        as_bytes = bool(self.request.parameters.get("binary_data_output", False))
        if self.request.outputs is None:
            return [(spec, as_bytes) for spec in outputs]
        names = [wish.name for wish in self.request.outputs]
        if len(set(names)) != len(names):
            _refuse("a wish for one output twice", f"each of {', '.join(spec.name for spec in outputs)} at most once")
        return [self._wish(wish, outputs, as_bytes) for wish in self.request.outputs]

    def _wish(self, wish: OutputWish, outputs: Sequence[TensorSpec], as_bytes: bool) -> tuple[TensorSpec, bool]:
        spec = next((spec for spec in outputs if spec.name == wish.name), None)
        if spec is None:
            _refuse(f"a wish for {wish.name[:80]!r}", f"some of {', '.join(spec.name for spec in outputs)}")
        if "classification" in wish.parameters:
            _refuse("a wish for classes", "a wish for the tensor", spec.name)
        return spec, bool(wish.parameters.get("binary_data", as_bytes))


def parse_request(body: bytes, header_length: str | None, bounds: JsonBounds) -> ParsedRequest:
    """A request taken apart.

    Args:
        body: the JSON and, behind it, the tensors that are sent as bytes.
        header_length: of the JSON in bytes, as the header says it; None where the body is JSON alone.
        bounds: of the JSON.

    Raises:
        RequestError: 413 for a JSON beyond the bounds, 422 for lengths that do not add up, or another JSON.
    """
    length = len(body)
    if header_length is not None:
        if not _LENGTH.fullmatch(header_length) or int(header_length) > len(body):
            _refuse(f"Inference-Header-Content-Length {header_length[:20]!r}", "the length of the JSON in the body")
        length = int(header_length)
    request = validated(TensorRequest, body[:length], bounds)
    raw: dict[str, bytes] = {}
    for tensor in request.inputs:
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            continue
        if type(size) is not int or size < 0 or tensor.data is not None or tensor.name in raw:
            _refuse("binary_data_size beside data, twice, or no number", "one or the other", tensor.name[:80])
        raw[tensor.name] = body[length : length + size]
        length += size
    if length != len(body):
        _refuse(f"{len(body)} bytes", f"{length}, the JSON and every binary_data_size")
    return ParsedRequest(request, raw)


def pixels_of(tensor: InputTensor, raw: Mapping[str, bytes]) -> NDArray[np.uint8]:
    """Values of a UINT8 tensor in its shape.

    Raises:
        RequestError: 422 for another number of values, or some that are not from 0 to 255.
    """
    count = math.prod(tensor.shape)
    data = raw.get(tensor.name)
    if data is None:
        data = _bytes_of_numbers(tensor)
    if len(data) != count:
        _refuse(f"{len(data)} values", f"{count} for the shape {tensor.shape}", tensor.name)
    return np.frombuffer(data, np.uint8).reshape(tensor.shape)


def elements_of(tensor: InputTensor, raw: Mapping[str, bytes]) -> list[bytes | str]:
    """Elements of a BYTES tensor of one dimension: bytes where it came as bytes, texts where it came as JSON.

    Raises:
        RequestError: 422 for another number of elements, lengths that do not add up, or something else than texts.
    """
    elements: list[bytes | str]
    if tensor.name in raw:
        elements = [*_split(raw[tensor.name], tensor.name, most=math.prod(tensor.shape))]
    else:
        elements = [text for text in tensor.data or [] if isinstance(text, str)]
        if len(elements) != len(tensor.data or []):
            _refuse("an element that is no text", "texts", tensor.name)
    if len(elements) != tensor.shape[0]:
        _refuse(f"{len(elements)} elements", f"{tensor.shape[0]} as the shape says", tensor.name)
    return elements


def response_of(
    model: str, request_id: str | None, outputs: Sequence[tuple[TensorSpec, bool, Values]]
) -> tuple[bytes, int | None]:
    """Body of a response, and the length of its JSON where bytes come behind it.

    Args:
        model: its name.
        request_id: of the request that is answered, if it has one.
        outputs: each with whether it goes as bytes, and its values.

    Raises:
        RequestError: 500 for values that are not finite and go as JSON.
    """
    described, pieces = [], []
    for spec, as_bytes, values in outputs:
        shape = [len(values)] if isinstance(values, list) else list(values.shape)
        entry: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": shape}
        if as_bytes:
            pieces.append(_packed(values))
            entry["parameters"] = {"binary_data_size": len(pieces[-1])}
        else:
            entry["data"] = _plain(values, spec.name)
        described.append(entry)
    answer: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": described}
    if request_id is not None:
        answer["id"] = request_id
    head = json.dumps(answer, allow_nan=False).encode()
    return b"".join([head, *pieces]), len(head) if pieces else None


def _bytes_of_numbers(tensor: InputTensor) -> bytes:
    if tensor.data is None:
        _refuse("neither data nor binary_data_size", "one of them", tensor.name)
    data = tensor.data
    while data and isinstance(data[0], list):
        if not all(isinstance(row, list) for row in data):
            _refuse("rows and numbers side by side", "one or the other", tensor.name)
        data = list(chain.from_iterable(data))
    try:
        return bytes(data)
    except (TypeError, ValueError):
        _refuse("something else than whole numbers from 0 to 255", "pixels", tensor.name)


def _split(data: bytes, name: str, *, most: int) -> list[bytes]:
    """Elements of a BYTES tensor: each has its length in front, four bytes, little endian."""
    elements: list[bytes] = []
    place = 0
    while place < len(data):
        if len(elements) == most:
            _refuse(f"more than {most} elements", "as many as the shape says", name)
        if place + 4 > len(data):
            _refuse("an element without its length", "four bytes of length before each element", name)
        (size,) = struct.unpack_from("<I", data, place)
        element = data[place + 4 : place + 4 + size]
        if len(element) != size:
            _refuse(f"an element of {len(element)} bytes", f"{size} as its length says", name)
        elements.append(element)
        place += 4 + size
    return elements


def _packed(values: Values) -> bytes:
    if isinstance(values, list):
        return b"".join(struct.pack("<I", len(element)) + element for element in values)
    return values.astype("<f4").tobytes()


def _plain(values: Values, name: str) -> list[Any]:
    if isinstance(values, list):
        return [element.decode() for element in values]
    if not np.isfinite(values).all():
        raise RequestError(
            f"output {name}",
            got="values that are not finite",
            wanted="numbers that JSON can hold",
            remedy="ask for bytes, and choose another precision",
            status=500,
            code="score_not_finite",
        )
    # A flat list, as the protocol prefers it; Triton sends no other.
    return list(values.astype(np.float64).ravel().tolist())


def _refuse(got: str, wanted: str, subject: str = "request") -> NoReturn:
    remedy = "see the model's metadata"
    raise RequestError(subject, got=got, wanted=wanted, remedy=remedy, status=422, code="invalid_request")
