"""Probes, counters, the description of the API, and what every response carries."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time

import pytest
from bundle_fixtures import random_images
from serve_fixtures import Hosted, png, wait_for

from runtime.errors import BundleError
from runtime.serve.settings import ServeSettings
from runtime.service import DetectorService

# probes


def test_server_is_not_ready_before_its_model_is_and_not_once_it_was_told_to_stop(bundle):
    opened = threading.Event()

    def load(observer):
        assert opened.wait(30)
        return DetectorService.load(bundle, backend="onnxruntime", threads=1, observer=observer)

    server = Hosted(ServeSettings(), load)
    try:
        wait_for(lambda: server.server.started)
        assert server.get("/healthz").status == 200
        for path in ("/readyz", "/v2/health/ready", "/v1/model", "/v2/models/tiny/ready"):
            assert server.get(path).status == 503, path
        refused = server.infer(png(random_images(1)[0]))
        assert (refused.status, refused.code) == (503, "not_ready")
        assert "starting up" in refused.json()["error"]["message"]
        opened.set()
        wait_for(lambda: server.get("/readyz").status == 200)
        assert server.infer(png(random_images(1)[0])).status == 200
        server.state.begin_to_stop()
        assert server.get("/readyz").status == 503
        assert server.get("/healthz").status == 200
        assert "shutting down" in server.infer(png(random_images(1)[0])).json()["error"]["message"]
        assert server.counter("ntf_ready") == 0
    finally:
        opened.set()
        server.stop()


def test_model_that_cannot_be_opened_is_told_to_whoever_runs_the_server(tmp_path):
    server = Hosted(ServeSettings(), lambda observer: DetectorService.load(tmp_path / "nothing", observer=observer))
    try:
        with pytest.raises(BundleError, match="nothing there"):
            server.state.failed.result(timeout=10)
        assert server.get("/readyz").status == 503
    finally:
        server.stop()


def test_model_route_says_what_a_client_must_know(server):
    answer = server.get("/v1/model").json()
    assert (answer["name"], answer["precision"], answer["backend"]) == ("tiny", "fp32", "onnxruntime")
    assert (answer["input_height"], answer["input_width"]) == (16, 16)
    assert 0 < answer["real_below"] < answer["fake_above"] < 1
    assert answer["limits"]["pictures"] == 32


# counters


def test_metrics_count_requests_pictures_batches_verdicts_and_errors(server):
    pictures = [png(image) for image in random_images(3)]
    before = {name: server.counter(name) for name in ("ntf_batch_size_sum", "ntf_picture_wait_seconds_count")}
    verdicts = [row["verdict"] for row in server.infer(*pictures).json()["data"]]
    server.infer(pictures[0], b"no picture")
    server.infer(b"no picture")
    server.get("/made-up-by-a-client")
    infer = 'route="/v1/infer"'
    assert server.counter(f'ntf_requests_total{{method="POST",{infer},status="200"}}') == 2
    assert server.counter(f'ntf_requests_total{{method="POST",{infer},status="415"}}') == 1
    assert server.counter('ntf_requests_total{method="GET",route="(none)",status="404"}') == 1
    assert server.counter(f"ntf_request_seconds_count{{{infer}}}") == 3
    assert server.counter('ntf_errors_total{code="unknown_format"}') == 3  # two pictures, and the request of one
    scored = [*verdicts, verdicts[0]]
    for verdict in set(scored):
        assert server.counter(f'ntf_verdicts_total{{verdict="{verdict}"}}') == scored.count(verdict)
    for name, value in before.items():
        assert server.counter(name) - value == 4
    assert server.counter('ntf_inference_seconds_bucket{le="+Inf"}') >= 2
    assert server.counter('ntf_errors_total{code="not_found"}') == 1
    assert server.counter("ntf_queue_length") == 0
    assert server.counter("ntf_latency_bound_seconds") > 0
    assert "made-up" not in server.get("/metrics").body.decode()


# the description, and every response


def test_description_names_every_route_and_both_forms_of_a_request(server):
    described = server.get("/openapi.json").json()
    assert {"/v1/infer", "/v1/model", "/healthz", "/readyz", "/metrics", "/v2/models/{name}/infer"} <= set(
        described["paths"]
    )
    infer = described["paths"]["/v1/infer"]["post"]
    assert set(infer["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert set(infer["responses"]) == {"200", "401", "408", "413", "415", "422", "429", "500", "503"}
    # Whatever the description points to is in it.
    for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(described)):
        assert name in described["components"]["schemas"]


def test_pages_load_nothing_from_elsewhere(server):
    for path in ("/", "/docs"):
        answer = server.get(path)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        linked = re.findall(r'(?:src|href)="([^"]+)"', answer.body.decode())
        assert linked
        for link in linked:
            assert link == "data:," or link.startswith("/"), link
            assert link == "data:," or server.get(link).status == 200, link


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/nothing", "/page/page.css", "/page/index.html", "/page/docs.html", "/docs/nothing"]
)
def test_every_response_tells_browsers_to_trust_it_with_nothing(server, path):
    headers = server.get(path).headers
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert headers["Content-Security-Policy"].endswith("frame-ancestors 'none'")
    assert "unsafe" not in headers["Content-Security-Policy"] or path.startswith("/docs")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Server"] is None


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/page/../app.py", 404, "not_found"),
        ("GET", "/page/%2e%2e/app.py", 404, "not_found"),
        ("DELETE", "/v1/infer", 405, "method_not_allowed"),
        ("GET", "/v1/infer", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("GET", "/v1/model/", 404, "not_found"),
        ("GET", "/page/%00", 404, "not_found"),
    ],
)
def test_other_paths_and_methods_give_the_same_kind_of_error_and_are_counted(server, method, path, status, code):
    counter = f'ntf_errors_total{{code="{code}"}}'
    before = server.counter(counter)
    answer = server.request(method, path, headers={"Host": "[", "Range": "bytes=x"})
    assert (answer.status, answer.code) == (status, code)
    assert set(answer.json()) == {"error"}
    assert server.counter(counter) == before + 1


def test_wrong_range_of_a_file_is_not_looked_at(server):
    assert server.get("/page/page.css", {"Range": "bytes=x"}).body == server.get("/page/page.css").body


def test_bytes_that_are_no_request_get_the_same_kind_of_error(server):
    for data in (b"\0" * 100, b"POST /v1/infer HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(data)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))  # to the end: the connection is closed
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"content-security-policy: default-src 'none'" in head.lower()
        assert json.loads(body)["error"]["code"] == "malformed_request"
    assert server.counter('ntf_errors_total{code="malformed_request"}') == 2
    assert server.get("/readyz").status == 200


def test_head_that_does_not_end_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: ")
        answer = b""
        for _ in range(1000):  # 16 MiB at most
            try:
                connection.sendall(b"a" * (1 << 14))
                time.sleep(0.001)
            except OSError:
                break
        with contextlib.suppress(OSError):  # the rest of what was sent may reset the connection
            answer = connection.recv(4096)
    assert not answer or b'"head_too_large"' in answer
    assert server.counter('ntf_errors_total{code="head_too_large"}') == 1
