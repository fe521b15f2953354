"""The load test of the server: what it counts, what it calls met, and a small run of it."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from bundle_fixtures import random_images
from serve_fixtures import hosted

from benchmarks.pictures import jpeg_bytes
from benchmarks.serving import (
    BEGIN,
    END,
    OVERLOAD,
    Phase,
    Reply,
    at_rate,
    checks,
    main,
    one_by_one,
    request_bytes,
    sustained,
)

SECONDS_PER_PICTURE = 0.05


class SleepingBackend:
    """An engine that takes a known time and no processor, so that its queue does not depend on the machine."""

    def __init__(self, backend):
        self._backend = backend
        self.name, self.device, self.version = backend.name, backend.device, backend.version

    def infer(self, images):
        time.sleep(SECONDS_PER_PICTURE * len(images))
        return self._backend.infer(images)

    def close(self):
        self._backend.close()


def _phase(*replies):
    return Phase(1.0, [Reply(status, seconds) for status, seconds in replies])


@pytest.fixture
def requests():
    return [request_bytes(jpeg_bytes(image)) for image in random_images(4)]


def test_phase_counts_statuses_and_times_of_accepted_requests_alone():
    phase = _phase(*[(200, 0.001 * index) for index in range(1, 101)], (429, 9.0), (0, 60.0))
    assert phase.quantile_ms(0.5) == pytest.approx(51)
    assert phase.quantile_ms(0.99) == pytest.approx(100)
    assert phase.to_json()["statuses"] == {"0": 1, "200": 100, "429": 1}
    assert phase.share(200) == pytest.approx(100 / 102)
    assert _phase((429, 0.1)).quantile_ms(0.5) == float("inf")


@pytest.mark.parametrize(
    ("overload", "met"),
    [
        (_phase((200, 0.2), (429, 0.001)), [True, True, True]),
        (_phase((200, 0.2)), [False, True, True]),
        (_phase((200, 0.2), (429, 0.001), (0, 60.0)), [True, False, True]),
        (_phase((200, 0.2), (429, 0.001), (500, 0.1)), [True, False, True]),
        (_phase((200, 0.203), (429, 0.001)), [True, True, False]),
        (_phase((429, 0.001)), [True, True, False]),
    ],
)
def test_checks_see_what_is_not_met(overload, met):
    assert [check["met"] for check in checks(_phase((200, 0.1)), overload)] == met


def test_overloaded_server_refuses_loses_nothing_and_keeps_its_time(tiny_bundle, requests):
    with hosted(tiny_bundle, backend=SleepingBackend) as server:
        unloaded = asyncio.run(one_by_one(server.port, requests, 20))
        overload = asyncio.run(at_rate(server.port, requests, OVERLOAD / SECONDS_PER_PICTURE, 2.0))
    assert unloaded.share(200) == 1
    assert {reply.status for reply in overload.replies} == {200, 429}
    assert overload.share(200) > 0.1
    # The median, because a busy machine may delay single requests; the benchmark holds the 99th percentile.
    assert overload.quantile_ms(0.5) <= 2 * unloaded.quantile_ms(0.99)


def test_connection_that_breaks_counts_as_lost(requests):
    async def hang_up(reader, writer):
        await reader.read(10)
        writer.close()

    async def lost():
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            return await one_by_one(server.sockets[0].getsockname()[1], requests, 2)

    assert [reply.status for reply in asyncio.run(lost()).replies] == [0, 0]


def test_sustained_rate_counts_what_was_accepted_and_each_client_waits_for_its_answer(monkeypatch):
    open_now, most_open = 0, 0

    async def every_third_refused(port, request, timeout_s):
        nonlocal open_now, most_open
        open_now += 1
        most_open = max(most_open, open_now)
        await asyncio.sleep(0.01)
        open_now -= 1
        return Reply(429, 0.01, retry_after_s=0.02) if request == b"refused" else Reply(200, 0.01)

    monkeypatch.setattr("benchmarks.serving.sent", every_third_refused)
    began = time.perf_counter()
    phase = asyncio.run(sustained(0, [b"taken", b"taken", b"refused"], 3, 0.3))
    took = time.perf_counter() - began
    assert most_open == 3
    assert 3 * took >= 0.01 * len(phase.replies) + 0.02 * sum(reply.status == 429 for reply in phase.replies)
    assert phase.share(429) == pytest.approx(1 / 3, abs=0.05)
    assert 0.2 < len(phase.replies) * phase.share(200) / phase.rate_per_s < 1.0


@pytest.mark.slow
def test_a_small_run_writes_the_results_and_the_table(tiny_bundle, tmp_path):
    document, results = tmp_path / "serving.md", tmp_path / "serving.json"
    document.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    arguments = ["--model", str(tiny_bundle), "--seconds", "0.5", "--unloaded-requests", "20"]
    status = main([*arguments, "--results", str(results), "--document", str(document)])
    found = json.loads(results.read_text())
    assert status == (0 if all(check["met"] for check in found["checks"]) else 1)
    assert found["overload"]["requests"] >= 100
    assert set(found["overload"]["statuses"]) <= {"200", "429"}
    assert "| overload |" in document.read_text()
    assert document.read_text().endswith(f"{END}\nafter\n")
