"""A server under load: `python -m benchmarks.serving --model models/demo` writes benchmarks/results/serving.json.

Starts `ntf serve` as a process with its own settings and sends JPEG files. First it looks for the sustainable rate:
what the server answers when more and more clients ask one picture after the other (a closed loop). Then it sends four
times that at random moments, whether or not answers come (an open loop, as the world is). What must hold: the server
refuses with 429, nothing is lost or fails otherwise, and the 99th percentile of the time of accepted requests is at
most twice that of an unloaded server plus the time that a batch waits for pictures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pictures import jpeg_bytes, photograph
from benchmarks.tables import publish
from runtime.bundle import open_bundle
from train.provenance import environment

RESULTS = Path("benchmarks/results/serving.json")
DOCUMENT = Path("docs/serving.md")
BEGIN, END = "<!-- serving: begin -->", "<!-- serving: end -->"
SIDE_PX = 256
MAX_WAIT_MS = 2.0
OVERLOAD = 4
CLIENTS = (1, 2, 3, 4)  # of the closed loop
MAX_OPEN = 1024  # requests of the client at once; beyond it the client itself would be what is measured
_STARTUP_S = 60
_BOUNDARY = b"picture"


@dataclass(frozen=True)
class Reply:
    """What became of one request; status 0 where the connection broke."""

    status: int
    seconds: float
    retry_after_s: float = 0.0


@dataclass(frozen=True)
class Phase:
    """Requests at one average rate."""

    rate_per_s: float
    replies: list[Reply]

    def share(self, status: int) -> float:
        """Share of the requests with that status, 0 to 1."""
        return sum(reply.status == status for reply in self.replies) / len(self.replies)

    def quantile_ms(self, share: float) -> float:
        """Time below which that share of the accepted requests was answered, in ms."""
        times = sorted(reply.seconds for reply in self.replies if reply.status == 200)
        return 1000 * times[min(len(times) - 1, int(share * len(times)))] if times else float("inf")

    def to_json(self) -> dict[str, Any]:
        """Figures of the phase."""
        statuses = sorted({reply.status for reply in self.replies})
        return {
            "rate_per_s": round(self.rate_per_s, 2),
            "requests": len(self.replies),
            "statuses": {str(s): sum(reply.status == s for reply in self.replies) for s in statuses},
            "accepted_p50_ms": round(self.quantile_ms(0.5), 2),
            "accepted_p99_ms": round(self.quantile_ms(0.99), 2),
        }


def request_bytes(picture: bytes) -> bytes:
    """A whole HTTP request that uploads one picture."""
    head = b'--%s\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n' % _BOUNDARY
    body = head + picture + b"\r\n--%s--\r\n" % _BOUNDARY
    lines = [
        b"POST /v1/infer HTTP/1.1",
        b"Host: localhost",
        b"Content-Type: multipart/form-data; boundary=%s" % _BOUNDARY,
        b"Content-Length: %d" % len(body),
        b"Connection: close",
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def sent(port: int, request: bytes, timeout_s: float) -> Reply:
    """The reply to one request on a connection of its own."""
    began = time.perf_counter()
    try:
        status, retry_after_s = await asyncio.wait_for(_answer_to(port, request), timeout_s)
    except (OSError, ValueError, IndexError, asyncio.TimeoutError):
        status, retry_after_s = 0, 0.0
    return Reply(status, time.perf_counter() - began, retry_after_s)


async def _answer_to(port: int, request: bytes) -> tuple[int, float]:
    """Status, and the seconds of Retry-After or 0."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        answer = await reader.read(-1)  # to the end of the connection: an answer that is cut off does not count
        head, _, body = answer.partition(b"\r\n\r\n")
        json.loads(body)
        wait = re.search(rb"(?im)^retry-after: *(\d+)", head)
        return int(head.split(b" ", 2)[1]), float(wait[1]) if wait else 0.0
    finally:
        writer.close()


async def at_rate(port: int, requests: Sequence[bytes], rate_per_s: float, seconds: float, *, seed: int = 0) -> Phase:
    """Replies to requests that arrive as independent ones do: exponential gaps with a mean of 1 / rate."""
    gaps = random.Random(seed)
    tasks: list[asyncio.Task[Reply]] = []
    began = due = time.perf_counter()
    while due < began + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if sum(not task.done() for task in tasks[-2 * MAX_OPEN :]) >= MAX_OPEN:
            raise RuntimeError(f"more than {MAX_OPEN} requests are open: the client cannot hold {rate_per_s}/s")
        tasks.append(asyncio.create_task(sent(port, requests[len(tasks) % len(requests)], timeout_s=60.0)))
        due += gaps.expovariate(rate_per_s)
    took = time.perf_counter() - began
    return Phase(len(tasks) / took, list(await asyncio.gather(*tasks)))


async def one_by_one(port: int, requests: Sequence[bytes], count: int) -> Phase:
    """Replies of an unloaded server: each request is sent when the one before is answered."""
    began = time.perf_counter()
    replies = [await sent(port, requests[index % len(requests)], timeout_s=60.0) for index in range(count)]
    return Phase(count / (time.perf_counter() - began), replies)


async def sustained(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Phase:
    """Replies to that many clients, each of which asks for the next picture when it has the answer to the one before,
    and waits first where it is told to. The rate of the phase is that of the requests that were accepted.
    """
    began = time.perf_counter()

    async def client(first: int) -> list[Reply]:
        replies: list[Reply] = []
        while time.perf_counter() < began + seconds:
            replies.append(await sent(port, requests[(first + len(replies)) % len(requests)], timeout_s=60.0))
            await asyncio.sleep(replies[-1].retry_after_s)
        return replies

    replies = [reply for each in await asyncio.gather(*map(client, range(clients))) for reply in each]
    took = time.perf_counter() - began
    return Phase(sum(reply.status == 200 for reply in replies) / took, replies)


def checks(unloaded: Phase, overload: Phase) -> list[dict[str, Any]]:
    """What must hold under overload, each with what was wanted and found."""
    bound_ms = 2 * unloaded.quantile_ms(0.99) + MAX_WAIT_MS
    other = [reply.status for reply in overload.replies if reply.status not in (200, 429)]
    return [
        _check("requests refused with 429", "more than 0", overload.share(429), overload.share(429) > 0),
        _check("requests lost or failed otherwise", "0", len(other), not other),
        _check(
            "99th percentile of accepted requests in ms",
            f"at most {bound_ms:.1f}: twice the unloaded one and the batching wait",
            overload.quantile_ms(0.99),
            overload.quantile_ms(0.99) <= bound_ms,
        ),
    ]


def _check(what: str, wanted: str, found: float, met: bool) -> dict[str, Any]:
    return {"check": what, "wanted": wanted, "found": round(found, 3), "met": met}


@contextmanager
def served(model: Path, options: Sequence[str] = ()) -> Iterator[int]:
    """The port of an `ntf serve` process, which is ready; it is stopped by SIGTERM and must give status 0."""
    command = [sys.executable, "-m", "runtime.cli", "serve", "--model", str(model), "--port", "0"]
    command += ["--max-wait-ms", str(MAX_WAIT_MS), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            if "listening on" not in line:
                raise RuntimeError(f"the server did not start: {line}{process.stderr.read()}")
            port = int(line.rpartition(":")[2])
            asyncio.run(_until_ready(port))
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=_STARTUP_S)
    if status != 0:
        raise RuntimeError(f"the server ended with status {status}")


async def _until_ready(port: int) -> None:
    latest = time.monotonic() + _STARTUP_S
    request = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    while (await _answer_to(port, request))[0] != 200:
        if time.monotonic() > latest:
            raise RuntimeError("the server did not become ready")
        await asyncio.sleep(0.1)


async def measured(port: int, *, seconds: float, unloaded_requests: int) -> dict[str, Any]:
    """Every figure of the benchmark for a server at that port."""
    requests = [request_bytes(jpeg_bytes(photograph(SIDE_PX, SIDE_PX, seed=seed))) for seed in range(16)]
    await one_by_one(port, requests, 20)
    unloaded = await one_by_one(port, requests, unloaded_requests)
    phases = [await sustained(port, requests, clients, seconds) for clients in CLIENTS]
    best = max(phases, key=lambda phase: phase.rate_per_s)
    overload = await at_rate(port, requests, OVERLOAD * best.rate_per_s, 2 * seconds, seed=100)
    again = await one_by_one(port, requests, unloaded_requests)
    # The unloaded server before and after, so that a change of the machine in between does not pass for one of load.
    alone = Phase(unloaded.rate_per_s, unloaded.replies + again.replies)
    return {
        "unloaded": alone.to_json(),
        "clients": [{"clients": n, **phase.to_json()} for n, phase in zip(CLIENTS, phases, strict=True)],
        "sustainable": best.to_json(),
        "overload": overload.to_json(),
        "checks": checks(alone, overload),
    }


def markdown(results: dict[str, Any]) -> str:
    """The table of a results file, and what became of its checks."""
    machine, settings = results["environment"]["machine"], results["settings"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores that the client shares; {settings['encoder']}, fp32 on "
        f"{settings['backend']}; {settings['picture']}. Unloaded: one client; sustainable: the best of "
        f"{CLIENTS[0]} to {CLIENTS[-1]} clients, each of which waits for its answer, and as long as it is told to; "
        f"overload: {settings['overload']} times that, at random moments.",
        "",
        "| load | requests a second | answered | refused with 429 | otherwise | p50 of answered | p99 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in ("unloaded", "sustainable", "overload"):
        phase = results[name]
        answered, refused = (phase["statuses"].get(status, 0) for status in ("200", "429"))
        lines.append(
            f"| {name} | {phase['rate_per_s']:.1f} | {answered} | {refused} | {phase['requests'] - answered - refused}"
            f" | {phase['accepted_p50_ms']:.0f} ms | {phase['accepted_p99_ms']:.0f} ms |"
        )
    lines += ["", "| check | wanted | measured | |", "|---|---:|---:|---|"]
    for check in results["checks"]:
        lines.append(
            f"| {check['check']} | {check['wanted']} | {check['found']:g} | {'met' if check['met'] else 'NOT MET'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 every check is met, 1 one is not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/demo"), help="bundle (models/demo)")
    parser.add_argument("--backend", default="onnxruntime", help="as for ntf serve (onnxruntime)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each rate (10)")
    parser.add_argument("--unloaded-requests", type=int, default=300, help="to an unloaded server, twice (300)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"file to write ({RESULTS})")
    parser.add_argument("--document", type=Path, help=f"with the table; default: {DOCUMENT} with the default results")
    options = parser.parse_args(arguments)
    with served(options.model, ["--backend", options.backend]) as port:
        results = asyncio.run(measured(port, seconds=options.seconds, unloaded_requests=options.unloaded_requests))
    results |= {
        "environment": environment(),
        "settings": {
            "encoder": open_bundle(options.model).manifest.encoder,
            "backend": options.backend,
            "picture": f"JPEG files of {SIDE_PX} x {SIDE_PX}",
            "max_wait_ms": MAX_WAIT_MS,
            "overload": OVERLOAD,
            "seconds_per_rate": options.seconds,
        },
    }
    document = options.document or (DOCUMENT if options.results == RESULTS else None)
    publish(results, markdown(results), path=options.results, document=document, markers=(BEGIN, END))
    return 0 if all(check["met"] for check in results["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
