"""`ntf serve`: arguments, token, socket, signals; FastAPI and uvicorn are imported when it runs."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UsageError
from runtime.limits import MAX_PIXELS
from runtime.serve.settings import LOOPBACK_HOSTS, ServeLimits, ServeSettings

if TYPE_CHECKING:
    from runtime.batching import BatchObserver
    from runtime.service import DetectorService

TOKEN_VARIABLE = "NTF_TOKEN"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "fastapi_offline", "httptools")
_DEFAULTS = ServeLimits()


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Describes the command to a parser."""
    parser.description = (
        "Serves verdicts over HTTP: a page for people at /, JSON and uploads at /v1/infer, the Open Inference"
        " Protocol at /v2, counters at /metrics, the API's description at /docs. Exit status: 0 stopped by SIGTERM"
        " or Ctrl-C after what was inside ended, 2 usage, bad bundle or busy port."
    )
    parser.epilog = (
        f"A token comes from --token-file or the variable {TOKEN_VARIABLE}; /, /docs, /healthz, /readyz and"
        " /v2/health/* are open without it. docs/serving.md has examples."
    )
    parser.add_argument("--model", metavar="MODEL", help="bundle folder or .zip; default: newest in ./models")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for any free one (%(default)s)")
    parser.add_argument("--token-file", metavar="FILE", help="file with the token that requests must carry")
    _add_model_options(parser.add_argument_group("model"))
    _add_limits(parser.add_argument_group("limits"))
    parser.add_argument(
        "--shutdown-delay", type=float, default=0.0, metavar="S",
        help="seconds from the signal to stop, with /readyz at 503, to the end of accepting connections (0)",
    )  # fmt: skip
    parser.add_argument("--access-log", action="store_true", help="write a line for each request to standard error")
    parser.set_defaults(run=serve)


def serve(options: argparse.Namespace) -> int:
    """Runs the server until a signal; returns the exit status.

    Raises:
        NTFError: wrong usage, a package that is missing, or a model that cannot be opened.
    """
    settings = ServeSettings(_limits(options), _token(options.token_file, os.environ), options.shutdown_delay)
    _require_packages()
    from runtime.bundle import newest_bundle
    from runtime.serve.app import create_app
    from runtime.serve.server import run_server

    model = Path(options.model) if options.model else newest_bundle(Path("models"))

    def load(observer: BatchObserver) -> DetectorService:
        return _load(model, options, observer)

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="ntf: %(message)s")
    listener = _listening(options.host, options.port)
    with listener:
        url = _url(listener)
        print(f"ntf: listening on {url}", file=sys.stderr, flush=True)
        if options.host not in LOOPBACK_HOSTS and settings.token is None:
            print("ntf: WARNING: reachable from other machines without a token", file=sys.stderr, flush=True)
        asyncio.run(run_server(create_app(settings, load), listener, access_log=options.access_log))
    print("ntf: stopped", file=sys.stderr)
    return 0


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--backend", default="auto", help="auto, onnxruntime, onnxruntime-cuda or openvino")
    group.add_argument("--precision", default="auto", help="auto, fp32, fp16 or int8")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of one inference")
    group.add_argument("--max-batch-size", type=int, default=32, metavar="N", help="pictures scored at once (32)")
    group.add_argument(
        "--max-wait-ms", type=float, default=2.0, metavar="MS",
        help="how long a picture waits for others while the engine is free (2)",
    )  # fmt: skip
    group.add_argument("--check-golden", action="store_true", help="first check that the golden inputs give the same")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.description = "What is beyond them is refused with 408, 413, 429 or 503 and a JSON error."
    mib = _DEFAULTS.max_request_bytes >> 20
    group.add_argument("--max-request-mib", type=int, default=mib, metavar="N", help="MiB of a body (%(default)s)")
    group.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="height times width of a picture (%(default)s)"
    )
    group.add_argument(
        "--max-pictures", type=int, default=_DEFAULTS.max_pictures, metavar="N", help="of one request (%(default)s)"
    )
    group.add_argument(
        "--max-requests", type=int, default=_DEFAULTS.max_requests, metavar="N",
        help="inside at once, those that are still being read included (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=float, default=_DEFAULTS.timeout_s, metavar="S",
        help="seconds of a request, its upload included (%(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--max-latency-ms", type=float, metavar="MS",
        help="refuse a request that would take longer with the pictures before it;"
        " default: 1.5 times what a picture takes alone, measured",
    )  # fmt: skip


def _limits(options: argparse.Namespace) -> ServeLimits:
    return ServeLimits(
        max_request_bytes=options.max_request_mib << 20,
        max_pixels=options.max_pixels,
        max_pictures=options.max_pictures,
        max_requests=options.max_requests,
        timeout_s=options.timeout,
        max_latency_ms=options.max_latency_ms,
    )


def _load(model: Path, options: argparse.Namespace, observer: BatchObserver) -> DetectorService:
    from runtime.service import DetectorService

    return DetectorService.load(
        model,
        backend=options.backend,
        precision=options.precision,
        max_pixels=options.max_pixels,
        threads=options.threads,
        check_golden=options.check_golden,
        max_batch_size=options.max_batch_size,
        max_wait_ms=options.max_wait_ms,
        # Pictures of all requests that may be inside: what is refused is refused by them, with a better sentence.
        max_queue=options.max_requests * options.max_pictures,
        observer=observer,
    )


def _token(file: str | None, environment: Mapping[str, str]) -> str | None:
    """The token that requests must carry, or None.

    Raises:
        UsageError: it is named twice, or its file cannot be read.
    """
    from_environment = environment.get(TOKEN_VARIABLE)
    if file is None:
        return from_environment
    if from_environment is not None:
        got = f"--token-file and {TOKEN_VARIABLE}"
        raise UsageError("token", got=got, wanted="one of them", remedy="drop the other")
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        got = f"a file that cannot be read ({error})"
        raise UsageError(file, got=got, wanted="a text file with the token", remedy="check the path") from error


def _require_packages() -> None:
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UsageError(
                "ntf serve",
                got=f"no package {error.name}",
                wanted="the packages of the extra serve",
                remedy='pip install "ntf-toolkit[serve]"',
            ) from error


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UsageError: the address or the port cannot be had.
    """
    try:
        if not 0 <= port <= 0xFFFF:  # the resolver would take the rest of a division
            raise OverflowError(f"port {port}")
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"{host}:{port}",
            got=f"an address that cannot be listened on ({error})",
            wanted="a free port of this machine",
            remedy="choose another with --host and --port",
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
