"""HTTP/1.1 connections: uvicorn's, with a bound on heads and an answer of ours to what is no request."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from runtime.serve.gate import problem, security_headers
from runtime.serve.request_errors import RequestError
from runtime.serve.state import ServerState

# What h11 and most proxies allow; httptools keeps whatever comes.
_MOST_HEAD_BYTES = 1 << 16


def protocol_of(state: ServerState) -> type[HttpToolsProtocol]:
    """The protocol of a server's connections, which counts its errors."""

    class BoundedProtocol(HttpToolsProtocol):
        # Of a head that goes on in another piece; the first piece is never larger than the buffer of a socket.
        _head_bytes: int | None = None

        def data_received(self, data: bytes) -> None:
            if self._head_bytes is not None:
                self._head_bytes += len(data)
                if self._head_bytes > _MOST_HEAD_BYTES:
                    self._refuse(_head_too_large())
                    return
            super().data_received(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_bytes = 0

        def on_headers_complete(self) -> None:
            self._head_bytes = None
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            self._refuse(_malformed())

        def _refuse(self, error: RequestError) -> None:
            response = problem("", error)
            response.headers.update(security_headers(""))
            lines = [f"HTTP/1.1 {error.status} Refused".encode()]
            lines += [name + b": " + value for name, value in response.raw_headers]
            self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
            self.transport.close()
            state.metrics.errors.labels(error.code).inc()

    return BoundedProtocol


def _malformed() -> RequestError:
    return RequestError(
        "connection",
        got="bytes that are no HTTP/1.1 request",
        wanted="one",
        remedy="use an HTTP client, and https:// only with a proxy in front",
        status=400,
        code="malformed_request",
        close=True,
    )


def _head_too_large() -> RequestError:
    return RequestError(
        "request",
        got=f"a head of more than {_MOST_HEAD_BYTES} bytes",
        wanted="fewer or shorter headers",
        remedy="send pictures in the body",
        status=431,
        code="head_too_large",
        close=True,
    )
