"""Errors that a client sees: a status, a code for programs, a sentence for people, nothing of the inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.errors import ClosedError, DeadlineError, NTFError, PictureError, QueueFullError

TOO_BUSY_REMEDY = "send it again after the seconds in Retry-After"


class RequestError(NTFError):
    """A request that is refused.

    Args:
        subject: what the error is about.
        got: what was sent.
        wanted: what would have been accepted.
        remedy: what the sender can do.
        status: of the response.
        code: for programs; it stays when the words change.
        retry_after_s: seconds after which it is worth trying again; None where that will not help.
        close: whether the connection ends with the response, because the rest of the body is not wanted.
        pictures: what is wrong with each picture, where that differs.
    """

    def __init__(
        self,
        subject: str,
        *,
        got: str,
        wanted: str,
        remedy: str,
        status: int,
        code: str,
        retry_after_s: float | None = None,
        close: bool = False,
        pictures: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(subject, got=got, wanted=wanted, remedy=remedy)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
        self.close = close
        self.pictures = tuple(pictures)

    def headers(self) -> dict[str, str]:
        """Headers that go with the status."""
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="ntf"'
        if self.close:
            headers["Connection"] = "close"
        return headers

    def body(self) -> dict[str, Any]:
        """JSON body: {"error": {"code", "message"}} and, where pictures differ, {"pictures": [...]} in it."""
        error: dict[str, Any] = {"code": self.code, "message": str(self)}
        if self.pictures:
            error["pictures"] = list(self.pictures)
        return {"error": error}


def request_error_from(error: Exception) -> RequestError:
    """What a client is told about an error that came up while its request was served."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        return _retold(error, 429, "queue_full", retry_after_s=1)
    if isinstance(error, DeadlineError):
        return _retold(error, 503, "deadline_exceeded", retry_after_s=1)
    if isinstance(error, ClosedError):
        return not_ready("shutting down")
    if isinstance(error, PictureError):
        return _retold(error, 422, "unreadable_picture")
    if isinstance(error, MemoryError):
        return RequestError(
            "server",
            got="no memory left",
            wanted="a request that fits",
            remedy=TOO_BUSY_REMEDY,
            status=503,
            code="out_of_memory",
            retry_after_s=1,
        )
    # A back-end's own words may name paths; they stand in the log.
    return RequestError(
        "server",
        got="an error inside",
        wanted="a result",
        remedy="look at the server's log, and report it",
        status=500,
        code="internal_error",
    )


def not_ready(state: str) -> RequestError:
    """The refusal of a server that is starting or stopping."""
    return RequestError(
        "server",
        got=f"a request while it is {state}",
        wanted="one that /readyz answers with 200",
        remedy=TOO_BUSY_REMEDY,
        status=503,
        code="not_ready",
        retry_after_s=1,
    )


def _retold(error: NTFError, status: int, code: str, *, retry_after_s: float | None = None) -> RequestError:
    return RequestError(
        error.subject,
        got=error.got,
        wanted=error.wanted,
        remedy=error.remedy,
        status=status,
        code=code,
        retry_after_s=retry_after_s,
    )
