"""A real server on a real socket, in a thread, and a client that speaks plain HTTP."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from PIL import Image

from runtime import detector
from runtime.serve.app import create_app
from runtime.serve.server import uvicorn_server
from runtime.serve.settings import ServeSettings
from runtime.service import DetectorService

BOUNDARY = "a boundary"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        return self.json()["error"]["code"]


class Client:
    """Requests to one server."""

    def __init__(self, port):
        self.port = port

    def request(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path, headers=None):
        return self.request("GET", path, headers=headers)

    def post_json(self, path, value, headers=None):
        return self.request("POST", path, json.dumps(value), {"Content-Type": "application/json", **(headers or {})})

    def infer(self, *pictures, **options):
        """POST /v1/infer with the pictures as data URLs."""
        return self.post_json("/v1/infer", {"input": [data_url(picture) for picture in pictures], **options})

    def upload(self, *parts, headers=None):
        """POST /v1/infer with parts (field, file name or None, content)."""
        kind = {"Content-Type": f'multipart/form-data; boundary="{BOUNDARY}"'}
        return self.request("POST", "/v1/infer", form(parts), {**kind, **(headers or {})})

    def counter(self, line):
        """Value of one line of /metrics, 0 where it is missing."""
        for found in self.get("/metrics").body.decode().splitlines():
            if found.startswith(line + " "):
                return float(found.rpartition(" ")[2])
        return 0.0


class GatedBackend:
    """A back-end that works when the test lets it."""

    def __init__(self, backend):
        self._backend = backend
        self.name, self.device, self.version = backend.name, backend.device, backend.version
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)

    def infer(self, images):
        self.entered.release()
        assert self.open.wait(30)
        return self._backend.infer(images)

    def close(self):
        self._backend.close()


def gate_into(gates):
    """What puts a gate around a back-end and into a list."""

    def gate(backend):
        gates.append(GatedBackend(backend))
        return gates[-1]

    return gate


class Hosted(Client):
    """A server in a thread."""

    def __init__(self, settings, load):
        self._listener = socket.create_server(("127.0.0.1", 0))
        super().__init__(self._listener.getsockname()[1])
        self.app = create_app(settings, load)
        self.state = self.app.state.server
        self.server = uvicorn_server(self.app)
        self._thread = threading.Thread(target=self._run, name="server")
        self._thread.start()

    def _run(self):
        asyncio.run(self.server.serve(sockets=[self._listener]))

    def wait_until_ready(self):
        wait_for(lambda: self.state.phase == "ready" or self.state.failed.done())
        assert self.state.phase == "ready", self.state.failed

    def stop(self):
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._listener.close()


@contextmanager
def hosted(bundle, *, settings=None, backend=None, **load_options):
    """A server that is ready; `backend` may put another back-end in the place of the one that was opened."""

    def load(observer):
        with mock.patch.object(detector, "open_backend", _opener(backend)):
            return DetectorService.load(bundle, backend="onnxruntime", threads=1, observer=observer, **load_options)

    server = Hosted(settings or ServeSettings(), load)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def _opener(replace):
    real = detector.open_backend
    return real if replace is None else lambda *arguments, **options: replace(real(*arguments, **options))


def png(rgb):
    """The picture as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "PNG")
    return stream.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def form(parts):
    """Body of a multipart form of parts (field, file name or None, content)."""
    pieces = []
    for field, name, content in parts:
        file = "" if name is None else f'; filename="{name}"'
        pieces += [f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"{file}\r\n\r\n'.encode(), content]
        pieces.append(b"\r\n")
    return b"".join([*pieces, f"--{BOUNDARY}--\r\n".encode()])


def wait_for(condition, seconds=60):
    """Returns when the condition holds."""
    latest = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < latest, "waited in vain"
        time.sleep(0.005)
