"""The HTTP server under wrong requests: the whole application in this process, without a socket and without a model.

A request is written as `METHOD /path`, its headers a line each, an empty line and the body.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import unquote

from benchmarks.mutation import mutated_bytes, mutated_json, with_png_checksums
from runtime.backends.base import Backend
from runtime.backends.choice import Choice
from runtime.batching import BatchObserver
from runtime.bundle import open_bundle
from runtime.detector import Detector
from runtime.serve.app import create_app
from runtime.serve.request_errors import RequestError
from runtime.serve.settings import ServeLimits, ServeSettings
from runtime.service import DetectorService

# Those of docs/serving.md but 401, as no token is asked for, and 500, which is a finding; 304 is a file's.
STATUSES = frozenset({200, 304, 404, 405, 408, 413, 415, 422, 429, 503})
LIMITS = ServeLimits(max_request_bytes=1 << 20, max_pixels=1 << 20, max_pictures=4, timeout_s=30.0)
_BOUNDARY = "fuzz"
_LENGTH = "inference-header-content-length"
# What an HTTP parser lets through (RFC 9110, 5.1 and 5.5).
_HEADER_NAME = re.compile(rb"[-!#$%&'*+.^_`|~0-9a-z]+")
_HEADER_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")


class Unexpected(Exception):
    """An answer that docs/serving.md does not know, or a server that is not as it was before."""


# Requests


def written(method: str, path: str, headers: Sequence[tuple[str, str]] = (), body: bytes = b"") -> bytes:
    """A request as bytes."""
    head = [f"{method} {path}", *(f"{name}: {value}" for name, value in headers)]
    return "\n".join(head).encode() + b"\n\n" + body


def valid_requests(pictures: Sequence[bytes], model: str, pixels: int) -> list[bytes]:
    """Requests of every kind.

    Args:
        pictures: files that can be read.
        model: name of the graph in the Open Inference Protocol.
        pixels: along each side of its input.
    """
    shape = [1, pixels, pixels, 3]
    count = 3 * pixels**2
    flat = {"name": "images", "shape": shape, "datatype": "UINT8", "data": [7] * count}
    as_bytes = {"name": "images", "shape": shape, "datatype": "UINT8", "parameters": {"binary_data_size": count}}
    wish = {"outputs": [{"name": "logits", "parameters": {"binary_data": False}}], "id": "1"}
    path = f"/v2/models/{model}/infer"
    return [
        *(envelope(pictures[:2], model) for envelope in ENVELOPES),
        _json_request(path, {"inputs": [flat]}),
        _binary_request(path, {"inputs": [as_bytes], **wish}, bytes(count)),
        *(written("GET", place) for place in ("/v1/model", "/metrics", "/page/page.js", f"/v2/models/{model}/ready")),
        written("GET", "/", [("range", "bytes=0-9"), ("host", "localhost")]),
    ]


def _nim(pictures: Sequence[bytes], _: str) -> bytes:
    urls = [_data_url(picture) for picture in pictures]
    return _json_request("/v1/infer", {"input": urls, "evidence": True})


def _form(pictures: Sequence[bytes], _: str) -> bytes:
    begin = f"--{_BOUNDARY}\r\nContent-Disposition: form-data; name="
    parts = [f'{begin}"file"; filename="{n}.png"\r\n\r\n'.encode() + data for n, data in enumerate(pictures)]
    parts.append(f'{begin}"evidence"\r\n\r\ntrue'.encode())
    body = b"\r\n".join([*parts, f"--{_BOUNDARY}--\r\n".encode()])
    return written("POST", "/v1/infer", [("content-type", f"multipart/form-data; boundary={_BOUNDARY}")], body)


def _texts(pictures: Sequence[bytes], model: str) -> bytes:
    urls = [_data_url(picture) for picture in pictures]
    tensor = {"name": "pictures", "shape": [len(urls)], "datatype": "BYTES", "data": urls}
    return _json_request(f"/v2/models/{model}_pictures/infer", {"inputs": [tensor]})


def _elements(pictures: Sequence[bytes], model: str) -> bytes:
    data = b"".join(len(picture).to_bytes(4, "little") + picture for picture in pictures)
    tensor = {"name": "pictures", "shape": [len(pictures)], "datatype": "BYTES"}
    tensor["parameters"] = {"binary_data_size": len(data)}
    return _binary_request(f"/v2/models/{model}_pictures/infer", {"inputs": [tensor]}, data)


# Ways to send pictures.
ENVELOPES: tuple[Callable[[Sequence[bytes], str], bytes], ...] = (_nim, _form, _texts, _elements)


def _data_url(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _json_request(path: str, plain: Any) -> bytes:
    return written("POST", path, [("content-type", "application/json")], json.dumps(plain).encode())


def _binary_request(path: str, plain: Any, tensors: bytes) -> bytes:
    head = json.dumps(plain).encode()
    return written("POST", path, [(_LENGTH, str(len(head)))], head + tensors)


# Wrong requests


def wrong_request(pictures: Sequence[bytes], model: str, data: bytes, random: Random) -> bytes:
    """A request made wrong: its pictures in a valid envelope, the JSON of its body, its bytes, or its head.

    Args:
        pictures: valid ones.
        model: name of the graph.
        data: a request.
        random: draws the changes.
    """
    head, _, body = data.partition(b"\n\n")
    kind = random.random()
    if kind < 0.3:
        return random.choice(ENVELOPES)(_wrong_pictures(pictures, random), model)
    if kind < 0.6:
        return head + b"\n\n" + _wrong_json(body, random)
    if kind < 0.8:
        return head + b"\n\n" + mutated_bytes(body, random, pictures)
    return mutated_bytes(head, random) + b"\n\n" + body


def _wrong_pictures(pictures: Sequence[bytes], random: Random) -> list[bytes]:
    chosen = random.choices(pictures, k=random.randrange(1, 4))
    return [with_png_checksums(mutated_bytes(data, random, pictures)) for data in chosen]


def _wrong_json(body: bytes, random: Random) -> bytes:
    """The JSON at the beginning of a body made wrong, with what is behind it."""
    try:
        text = body.decode("latin-1")  # one character a byte
        plain, length = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # a form, or a mutant that is made wrong once more
        return mutated_bytes(body, random)
    return json.dumps(mutated_json(plain, random)).encode() + body[length:]


# Reading them


class ServerReader:
    """Sends a request to the application, and looks whether the server is still alive; ended by `close`.

    Args:
        bundle: folder of the model.
        backend: that stands for its graph.
    """

    def __init__(self, bundle: Path, backend: Backend) -> None:
        self._bundle, self._backend = bundle, backend
        self._loop: asyncio.AbstractEventLoop | None = None
        self._app = create_app(ServeSettings(LIMITS), self._load)
        self._state = self._app.state.server

    def __call__(self, data: bytes) -> None:
        """Nothing for a request that is answered with what it asks for.

        Raises:
            RequestError: it is refused, as docs/serving.md says.
            Unexpected: another answer, or a server that does not go on.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop.run_until_complete(self._open())
        method, path, headers, body = taken_apart(data)
        status, content = self._loop.run_until_complete(self._asked(method, path, headers, body))
        if status not in STATUSES:
            raise Unexpected(f"status {status} for {method} {path}: {content[:300]!r}")
        alive, _ = self._loop.run_until_complete(self._asked("GET", "/healthz", [], b""))
        if alive != 200 or self._state.requests_inside or self._state.admission.inside:
            raise Unexpected(f"after {method} {path}: /healthz {alive}, {self._state.requests_inside} requests inside")
        if status >= 400:
            code = code_of(path, content)
            raise RequestError(path, got=code, wanted="200", remedy="none", status=status, code=code)

    def close(self) -> None:
        """Ends the server."""
        if self._loop is not None:
            self._loop.run_until_complete(self._state.close())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _load(self, observer: BatchObserver) -> DetectorService:
        bundle = open_bundle(self._bundle)
        choice = Choice(self._backend.name, bundle.manifest.artifacts[0], "it stands for a graph")
        detector = Detector(bundle, self._backend, choice, max_pixels=LIMITS.max_pixels)
        return DetectorService(detector, {}, max_batch_size=8, max_wait_ms=0.0, max_queue=64, observer=observer)

    async def _open(self) -> None:
        self._state.begin()
        while self._state.opening:
            await asyncio.sleep(0.01)
        self._state.require_ready()

    async def _asked(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        pieces = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not pieces:
                await asyncio.Event().wait()  # the client stays
            return pieces.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def taken_apart(data: bytes) -> tuple[str, str, list[tuple[bytes, bytes]], bytes]:
    """Method, path, headers and body of a request, without what an HTTP parser would not let through."""
    head, _, body = data.partition(b"\n\n")
    first, *lines = head.split(b"\n")
    method, _, target = first.partition(b" ")
    path = unquote(re.sub(rb"[^\x21-\x7e]", b"", target).partition(b"?")[0].decode())
    headers = []
    for line in lines:
        name, _, value = line.partition(b":")
        name, value = name.strip().lower(), value.strip()
        if _HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value):
            headers.append((name, value))
    return re.sub(rb"[^A-Z]", b"", method).decode() or "GET", "/" + path.lstrip("/"), headers, body


def code_of(path: str, content: bytes) -> str:
    """The code of an error.

    Raises:
        Unexpected: it is no error as docs/serving.md has it.
    """
    try:
        plain = json.loads(content)
        if path.startswith("/v2"):
            assert isinstance(plain["error"], str)
            return str(plain["code"])
        assert isinstance(plain["error"]["message"], str)
        return str(plain["error"]["code"])
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise Unexpected(f"an error without a code for {path}: {content[:300]!r}") from error
