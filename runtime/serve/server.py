"""The process: uvicorn on a socket that is open already, stopped by SIGTERM without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from runtime.serve.protocol import protocol_of
from runtime.serve.state import ServerState

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_POLL_S = 0.02
# Beyond the time of a request, for answers on their way.
_GRACE_S = 5


class QuietServer(uvicorn.Server):
    """A server that leaves signals to whoever runs it: uvicorn's ends the process by the signal, not with status 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def uvicorn_server(app: FastAPI, *, access_log: bool = False) -> QuietServer:
    """A server of an application that is not running."""
    state: ServerState = app.state.server
    config = uvicorn.Config(
        app,
        http=protocol_of(state),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning" if not access_log else "info",
        access_log=access_log,
        server_header=False,
        timeout_graceful_shutdown=int(state.settings.limits.timeout_s) + _GRACE_S,
    )
    return QuietServer(config)


async def run_server(app: FastAPI, listener: socket.socket, *, access_log: bool = False) -> None:
    """Serves until a signal to stop, and then until what is inside has ended; a second signal does not wait.

    Opening a model cannot be interrupted, so a second signal meanwhile ends the process, with the status of the signal.

    Args:
        app: from `create_app`.
        listener: that clients connect to.
        access_log: whether each request is logged.

    Raises:
        NTFError: the model could not be opened.
    """
    state: ServerState = app.state.server
    server = uvicorn_server(app, access_log=access_log)
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    def stop(number: int) -> None:
        if stopping.is_set() and state.opening:
            _tell("ended while the model was being opened")
            os._exit(128 + number)  # nothing was taken in yet, and threads of back-ends cannot be ended otherwise
        if stopping.is_set():
            server.force_exit = server.should_exit = True
        elif state.opening:
            _tell("stopping when the model is open; a second signal does not wait")
        begin_to_stop()

    def begin_to_stop() -> None:
        state.begin_to_stop()
        stopping.set()

    # Not loop.add_signal_handler, which Windows does not have.
    before = {
        number: signal.signal(number, lambda found, _: loop.call_soon_threadsafe(stop, found))
        for number in _STOP_SIGNALS
    }
    state.failed.add_done_callback(lambda _: loop.call_soon_threadsafe(begin_to_stop))
    ending = asyncio.ensure_future(_end(state, server, stopping))
    try:
        await server.serve(sockets=[listener])
    finally:
        ending.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    if state.failed.done():
        state.failed.result()


def _tell(text: str) -> None:
    print(f"ntf: {text}", file=sys.stderr, flush=True)


async def _end(state: ServerState, server: uvicorn.Server, stopping: asyncio.Event) -> None:
    """Ends the server when it was told to stop: /readyz says so to the end, so connections are taken until then."""
    await stopping.wait()
    latest = time.monotonic() + state.settings.limits.timeout_s
    await asyncio.sleep(0.0 if state.failed.done() else state.settings.shutdown_delay_s)
    while state.requests_inside and time.monotonic() < latest:
        await asyncio.sleep(_POLL_S)
    server.should_exit = True
