"""Request bodies: read within their limit, then taken apart into pictures, which may be done in any thread."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
import re
import sys
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from runtime.serve.request_errors import RequestError
from runtime.serve.schemas import InferRequest
from runtime.serve.settings import ServeLimits
from runtime.serve.workers import deadline_error

_DATA_URL = re.compile(r"data:(image/[a-zA-Z0-9.+-]+);base64,")
_OPTIONS = ("evidence", "stability")
_SWITCH = {"true": True, "1": True, "on": True, "false": False, "0": False, "": False}
# A client that has sent too much hears of it if it reads after it has sent; for so long it may go on sending.
_LINGER_S = 2.0
_PIECE_BYTES = 1 << 16
# Beside pictures and pixels; no request needs a hundredth of it, and it takes no memory to speak of.
_FEW = 10_000

_Model = TypeVar("_Model", bound=BaseModel)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Picture:
    """One picture of a request: the content of its file, and the name that came with it."""

    data: bytes
    name: str | None


@dataclass(frozen=True)
class PictureRequest:
    """Pictures of one request with what is wanted of them."""

    pictures: list[Picture]
    evidence: bool
    stability: bool


@dataclass(frozen=True)
class JsonBounds:
    """How much a JSON text may hold: three characters of it can be an object of many times that memory.

    Args:
        values: in lists and objects, counted by the commas; those in texts count as well.
        lists: and objects, counted by their brackets.
    """

    values: int
    lists: int

    @classmethod
    def beside(cls, values: int, lists: int = 0) -> JsonBounds:
        """Bounds of a text with so many values and lists of content."""
        return cls(values + _FEW, lists + _FEW)

    def require(self, body: bytes) -> None:
        """Nothing for a text within the bounds.

        Raises:
            RequestError: 413 for another one.
        """
        values, lists = body.count(b","), body.count(b"[") + body.count(b"{")
        if values > self.values or lists > self.lists:
            got = f"JSON of {values} values and {lists} lists and objects"
            wanted = f"at most {self.values} and {self.lists}"
            _refuse(413, "too_many_values", got, wanted, "send less at once, or tensors as bytes")


async def read_body(request: Request, limits: ServeLimits, deadline_s: float) -> bytes:
    """The whole body; bytes are counted as they come, whatever Content-Length says.

    Args:
        request: whose body was not read.
        limits: of a request.
        deadline_s: on the clock of `time.monotonic`.

    Raises:
        RequestError: 413, 408, or 415 for a compressed body.
        ClientDisconnect: the client went away.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        _refuse(415, "compressed_body", "a compressed body", "one that is sent as it is", "drop Content-Encoding")
    stream = request.stream()
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_request_bytes:
        # Whoever asks first is answered before sending.
        if "expect" not in request.headers:
            await _linger(stream, limits.max_request_bytes)
        _refuse_size(f"{declared} bytes", limits)
    try:
        return await asyncio.wait_for(_collected(stream, limits), deadline_s - time.monotonic())
    except asyncio.TimeoutError:
        got, wanted = f"a body that is not complete after {limits.timeout_s:g} s", "the whole body by then"
        _refuse(408, "slow_body", got, wanted, "send less at once, or over a faster line", close=True)


def picture_request(headers: Headers, body: bytes, limits: ServeLimits, deadline_s: float) -> PictureRequest:
    """Pictures of a JSON or multipart body.

    Args:
        headers: of the request.
        body: of the request.
        limits: of a request.
        deadline_s: on the clock of `time.monotonic`; a form that looks like boundaries all over takes very long.

    Raises:
        DeadlineError: that passed.
        RequestError: 415 for another type, 422 for a body that is not as it says, 413 for too many pictures.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _from_json(body, limits)
    if kind != "multipart/form-data":
        wanted = "application/json or multipart/form-data"
        _refuse(415, "unsupported_media_type", f"Content-Type {kind[:80]!r}", wanted, "see the examples on /docs")
    return _finished(_from_form(headers, body, limits, deadline_s))


def validated(model: type[_Model], body: bytes, bounds: JsonBounds) -> _Model:
    """The model of a JSON text.

    Args:
        model: to make.
        body: UTF-8.
        bounds: of the text. Pydantic's own reader would take 280 bytes for an empty list; this one takes 64.

    Raises:
        RequestError: 413 beyond the bounds; 422, with the place of the first mistake and never what was sent there.
    """
    bounds.require(body)
    try:
        plain = json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        _refuse(422, "invalid_request", f"Invalid JSON in the body: {error}", "JSON as on /docs", "correct it")
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"][:6]) or "the body"
        got = f"{place[:120]}: {first['msg'][:300]}"
        _refuse(422, "invalid_request", got, "JSON as on /docs", "correct it")


def picture_from_data_url(url: str, subject: str) -> bytes:
    """Content of a data URL.

    Raises:
        RequestError: 422, or 415 for one that is not of a picture.
    """
    head = _DATA_URL.match(url)
    if head is None:
        wanted = "data:image/...;base64,..."
        if url.startswith("data:"):
            _refuse(415, "unsupported_media_type", "another data URL", wanted, "send a picture in base64", subject)
        _refuse(422, "no_data_url", "no data URL", wanted, "send the picture itself, in base64", subject)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        _refuse(422, "bad_base64", f"base64 that is damaged ({error})", "base64", "encode it again", subject)


def require_few(pictures: int, limits: ServeLimits) -> None:
    """Nothing for as many pictures as one request may hold.

    Raises:
        RequestError: 413 for more.
    """
    if pictures > limits.max_pictures:
        got, wanted = f"{pictures} pictures", f"at most {limits.max_pictures}"
        _refuse(413, "too_many_pictures", got, wanted, "send them in several requests")


def _from_json(body: bytes, limits: ServeLimits) -> PictureRequest:
    # Each has a comma behind it and one within.
    parsed = validated(InferRequest, body, JsonBounds.beside(2 * limits.max_pictures))
    require_few(len(parsed.input), limits)
    pictures = [Picture(picture_from_data_url(url, f"input.{index}"), None) for index, url in enumerate(parsed.input)]
    return PictureRequest(pictures, parsed.evidence, parsed.stability)


def _finished(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine that never waits, as those of a form that is in memory; so no event loop is needed."""
    try:
        work.send(None)
    except StopIteration as done:
        result: _T = done.value
        return result
    raise AssertionError("a form in memory was waited for")


async def _from_form(headers: Headers, body: bytes, limits: ServeLimits, deadline_s: float) -> PictureRequest:
    if not body.rstrip(b"\r\n").endswith(b"--"):
        _refuse(422, "invalid_form", "a form that is cut off", "the whole form", "send it again")
    parser = _InMemory(headers, _in_pieces(body, deadline_s), limits)
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError) as error:
        wanted = "files and the fields evidence and stability"
        _refuse(422, "invalid_form", f"a form that is damaged ({str(error)[:200]})", wanted, "send it again")
    try:
        return await _pictures_of(form)
    finally:
        await form.close()


async def _pictures_of(form: FormData) -> PictureRequest:
    options = dict.fromkeys(_OPTIONS, False)
    pictures: list[Picture] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            pictures.append(Picture(await value.read(), value.filename or None))
        else:
            options[_option_name(name)] = _switch(name, value)
    if not pictures:
        _refuse(422, "invalid_form", "no file", "one picture or more", "send it as a file: curl -F file=@a.jpg")
    return PictureRequest(pictures, **options)


class _InMemory(MultiPartParser):
    """A parser that writes nothing to disk, as the body is in memory already, and ends at the first file too many."""

    spool_max_size = sys.maxsize

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], limits: ServeLimits) -> None:
        super().__init__(headers, stream, max_files=math.inf, max_fields=len(_OPTIONS))
        self._limits = limits
        self._files = 0

    def on_part_end(self) -> None:
        """Takes down a part that is complete."""
        super().on_part_end()
        self._files += isinstance(self.items[-1][1], UploadFile)
        require_few(self._files, self._limits)


async def _in_pieces(body: bytes, deadline_s: float) -> AsyncGenerator[bytes, None]:
    """A body piece by piece, with a look at the clock before each."""
    for place in range(0, len(body), _PIECE_BYTES):
        if time.monotonic() > deadline_s:
            raise deadline_error()
        yield body[place : place + _PIECE_BYTES]


def _option_name(name: str) -> str:
    if name not in _OPTIONS:
        _refuse(422, "invalid_form", f"a field {name[:80]!r}", " or ".join(_OPTIONS), "send pictures as files")
    return name


def _switch(name: str, value: str) -> bool:
    if value.lower() not in _SWITCH:
        _refuse(422, "invalid_form", f"{value[:80]!r} as {name}", "true or false", "send one of these")
    return _SWITCH[value.lower()]


async def _collected(stream: AsyncGenerator[bytes, None], limits: ServeLimits) -> bytes:
    pieces, size = [], 0
    async for piece in stream:
        size += len(piece)
        if size > limits.max_request_bytes:
            await _linger(stream, limits.max_request_bytes)
            _refuse_size(f"more than {limits.max_request_bytes} bytes", limits)
        pieces.append(piece)
    return b"".join(pieces)


async def _linger(stream: AsyncGenerator[bytes, None], most_bytes: int) -> None:
    """Reads on and forgets, so that a client which reads late gets the answer and not a broken connection."""

    async def forget() -> None:
        size = 0
        async for piece in stream:
            size += len(piece)
            if size > most_bytes:
                return

    try:
        await asyncio.wait_for(forget(), _LINGER_S)
    except (asyncio.TimeoutError, ClientDisconnect):
        return


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _refuse_size(got: str, limits: ServeLimits) -> NoReturn:
    wanted = f"at most {limits.max_request_bytes} bytes"
    _refuse(413, "request_too_large", got, wanted, "send fewer or smaller pictures", close=True)


def _refuse(
    status: int, code: str, got: str, wanted: str, remedy: str, subject: str = "request", *, close: bool = False
) -> NoReturn:
    raise RequestError(subject, got=got, wanted=wanted, remedy=remedy, status=status, code=code, close=close)
