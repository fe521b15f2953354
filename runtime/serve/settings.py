"""What a server accepts, and how long it may take over it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from runtime.errors import UsageError
from runtime.limits import MAX_PIXELS

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
# Shorter ones are guessed; `openssl rand -hex 16` gives 32 characters.
MIN_TOKEN_CHARACTERS = 16


@dataclass(frozen=True)
class ServeLimits:
    """Bounds of one request and of all together; what is beyond them is refused with a status and a code.

    Args:
        max_request_bytes: of a body, counted while it is read (413).
        max_pixels: height times width of a picture (413).
        max_pictures: of one request (413).
        max_requests: that are inside the server at once, reading their bodies included (429).
        timeout_s: seconds from the first byte to the answer, reading included (408 while reading, 503 after).
        max_latency_ms: a request is refused (429) when the pictures inside would make it take longer; None lets the
            server hold 1.5 times what a picture takes alone, which it measures.
    """

    max_request_bytes: int = 32 << 20
    max_pixels: int = MAX_PIXELS
    max_pictures: int = 32
    max_requests: int = 64
    timeout_s: float = 30.0
    max_latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_request_bytes", "max_pixels", "max_pictures", "max_requests", "timeout_s", "max_latency_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(name, got=str(value), wanted="a number above 0", remedy="leave it out for the default")


@dataclass(frozen=True)
class ServeSettings:
    """How a server is run besides its model.

    Args:
        limits: of requests.
        token: that a request must carry as `Authorization: Bearer TOKEN`; None asks for none.
        shutdown_delay_s: seconds between the signal to stop, from which on /readyz gives 503, and the end of
            accepting connections.
    """

    limits: ServeLimits = field(default_factory=ServeLimits)
    token: str | None = field(default=None, repr=False)
    shutdown_delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.token is not None:
            _check_token(self.token)
        if not 0 <= self.shutdown_delay_s < float("inf"):
            got = f"{self.shutdown_delay_s} seconds"
            raise UsageError("shutdown delay", got=got, wanted="0 or more", remedy="leave it out for none")


def _check_token(token: str) -> None:
    # What a header can carry without quoting; the token itself must not show up in a message.
    if len(token) < MIN_TOKEN_CHARACTERS or not all("!" <= char <= "~" for char in token):
        raise UsageError(
            "token",
            got=f"{len(token)} characters, or some that a header cannot carry",
            wanted=f"at least {MIN_TOKEN_CHARACTERS} printable ASCII characters without spaces",
            remedy="make one with `openssl rand -hex 16`",
        )
