"""What every request passes on its way in and out: token, room, headers, counters, and the last word on errors."""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.request_errors import RequestError, request_error_from
from runtime.serve.state import ServerState

# Probes carry no token, and a person needs the page to enter one; none of these tells anything of a picture.
_OPEN_PATHS = ("/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json")
_OPEN_FOLDERS = ("/page/", "/docs/")
# nginx's word for it, in the counters alone: nobody is there to read it.
_CLIENT_GONE = 499
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# Nothing from elsewhere, nothing inline. Pictures are shown from memory (blob:).
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI writes style attributes.
_DOCS_POLICY = _PAGE_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
# What is no page needs nothing, should a browser take it for one.
_DATA_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, security_headers(scope["path"]))
        # Starlette answers a wrong one in words of its own; whoever serves files may ignore them all (RFC 9110, 14.2).
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"range"]
        started = time.perf_counter()
        # Time that the sender takes is bounded too, so the clock starts before the body.
        scope["deadline_s"] = time.monotonic() + self._state.settings.limits.timeout_s
        try:
            await self._pass(scope, receive, answer)
        except ClientDisconnect:
            answer.status = _CLIENT_GONE
        except Exception as error:
            await self._answer_error(error, scope, receive, answer)
        finally:
            self._count(scope, answer.status, time.perf_counter() - started)

    async def _pass(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        self._require_token(scope)
        # Starlette's routes match a path with a line's end behind it as well.
        if scope["method"] != "POST" or not scope["path"].rstrip("\n").endswith("/infer"):
            await self._app(scope, receive, answer)
            return
        self._state.enter()
        try:
            await self._app(scope, receive, answer)
        finally:
            self._state.leave()

    def _require_token(self, scope: Scope) -> None:
        token, path = self._state.settings.token, scope["path"]
        if token is None or path in _OPEN_PATHS or path.startswith(_OPEN_FOLDERS):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, carried = given.partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(carried.strip(), token.encode()):
            return
        raise RequestError(
            "request",
            got="no token" if not given else "another token",
            wanted="the header Authorization: Bearer TOKEN",
            remedy="ask whoever runs the server for its token",
            status=401,
            code="unauthorized",
        )

    async def _answer_error(self, error: Exception, scope: Scope, receive: Receive, answer: _Answer) -> None:
        told = request_error_from(error)
        if told.status == 500:
            logging.getLogger(__name__).error("%s %s failed", scope["method"], scope["path"], exc_info=error)
        if answer.status:
            raise error  # too late for another answer: the connection breaks off
        self._state.metrics.errors.labels(told.code).inc()
        await problem(scope["path"], told)(scope, receive, answer)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = _route_label(scope)
        self._state.metrics.requests.labels(route, _method_label(scope), str(status)).inc()
        self._state.metrics.latency.labels(route).observe(seconds)


class _Answer:
    """`send` that adds our headers and remembers the status; 0 until there is one."""

    def __init__(self, send: Send, added: Mapping[str, str]) -> None:
        self.status = 0
        self._send = send
        self._added = added

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(self._added)
        await self._send(message)


def security_headers(path: str) -> dict[str, str]:
    """What every answer carries, so that a browser trusts it with nothing and keeps nothing of it."""
    policy = _DATA_POLICY
    if path == "/" or path.startswith("/page/"):
        policy = _PAGE_POLICY
    elif path == "/docs" or path.startswith("/docs/"):
        policy = _DOCS_POLICY
    return {**_HEADERS, "Cache-Control": "no-store", "Content-Security-Policy": policy}


def problem(path: str, error: RequestError) -> Response:
    """Response that tells a client of an error; under /v2 in the words of that protocol, where `error` is a text."""
    body: dict[str, Any] = error.body()
    if path.startswith("/v2"):
        body = {"error": str(error), "code": error.code}
    # A name that was sent in JSON may hold half of a surrogate pair, which UTF-8 does not have.
    content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode(errors="replace")
    return Response(content, error.status, error.headers(), media_type="application/json")


def _route_label(scope: Scope) -> str:
    """Path as it was declared: what clients make up must not become a series of its own."""
    route = getattr(scope.get("route"), "path", None)
    if isinstance(route, str):
        return route
    return next((folder for folder in _OPEN_FOLDERS if scope["path"].startswith(folder)), "(none)")


def _method_label(scope: Scope) -> str:
    method = str(scope["method"])
    return method if method in ("GET", "HEAD", "POST") else "(other)"
