"""Request bodies: read within their limit, then taken apart into pictures."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from runtime.serve.request_errors import RequestError
from runtime.serve.schemas import InferRequest
from runtime.serve.settings import ServeLimits

_DATA_URL = re.compile(r"data:(image/[a-zA-Z0-9.+-]+);base64,")
_OPTIONS = ("evidence", "stability")
_SWITCH = {"true": True, "1": True, "on": True, "false": False, "0": False, "": False}
# A client that has sent too much hears of it if it reads after it has sent; for so long it may go on sending.
_LINGER_S = 2.0

_Model = TypeVar("_Model", bound=BaseModel)


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


async def picture_request(request: Request, body: bytes, limits: ServeLimits) -> PictureRequest:
    """Pictures of a JSON or multipart body.

    Raises:
        RequestError: 415 for another type, 422 for a body that is not as it says, 413 for too many pictures.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _from_json(body, limits)
    if kind != "multipart/form-data":
        wanted = "application/json or multipart/form-data"
        _refuse(415, "unsupported_media_type", f"Content-Type {kind[:80]!r}", wanted, "see the examples on /docs")
    return await _from_form(request, body, limits)


def validated(model: type[_Model], body: bytes) -> _Model:
    """The model of a JSON text.

    Raises:
        RequestError: 422, with the place of the first mistake and never what was sent there.
    """
    try:
        return model.model_validate_json(body)
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
    parsed = validated(InferRequest, body)
    require_few(len(parsed.input), limits)
    pictures = [Picture(picture_from_data_url(url, f"input.{index}"), None) for index, url in enumerate(parsed.input)]
    return PictureRequest(pictures, parsed.evidence, parsed.stability)


async def _from_form(request: Request, body: bytes, limits: ServeLimits) -> PictureRequest:
    if not body.rstrip(b"\r\n").endswith(b"--"):
        _refuse(422, "invalid_form", "a form that is cut off", "the whole form", "send it again")
    parser = _InMemory(request.headers, _in_one_piece(body), max_fields=len(_OPTIONS))
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError) as error:
        wanted = "files and the fields evidence and stability"
        _refuse(422, "invalid_form", f"a form that is damaged ({str(error)[:200]})", wanted, "send it again")
    try:
        return await _pictures_of(form, limits)
    finally:
        await form.close()


async def _pictures_of(form: FormData, limits: ServeLimits) -> PictureRequest:
    options = dict.fromkeys(_OPTIONS, False)
    pictures: list[Picture] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            pictures.append(Picture(await value.read(), value.filename or None))
        else:
            options[_option_name(name)] = _switch(name, value)
    require_few(len(pictures), limits)
    if not pictures:
        _refuse(422, "invalid_form", "no file", "one picture or more", "send it as a file: curl -F file=@a.jpg")
    return PictureRequest(pictures, **options)


class _InMemory(MultiPartParser):
    """A parser that writes nothing to disk: the body is in memory already, and no larger than its limit."""

    spool_max_size = sys.maxsize


async def _in_one_piece(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


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


def _refuse_size(got: str, limits: ServeLimits) -> NoReturn:
    wanted = f"at most {limits.max_request_bytes} bytes"
    _refuse(413, "request_too_large", got, wanted, "send fewer or smaller pictures", close=True)


def _refuse(
    status: int, code: str, got: str, wanted: str, remedy: str, subject: str = "request", *, close: bool = False
) -> NoReturn:
    raise RequestError(subject, got=got, wanted=wanted, remedy=remedy, status=status, code=code, close=close)
