"""POST /v1/infer: what goes in, what comes out, and what is refused with which status and code."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from bundle_fixtures import CALIBRATION, numpy_outputs, random_images, write_bundle
from PIL import Image
from serve_fixtures import Client, GatedBackend, data_url, form, gate_into, hosted, png, wait_for
from starlette.datastructures import Headers

from runtime import Detector, decode
from runtime.errors import DeadlineError
from runtime.serve import bodies, open_inference_routes, scoring
from runtime.serve.settings import ServeLimits, ServeSettings

LIMITS = ServeLimits(max_request_bytes=200_000, max_pixels=10_000, max_pictures=3, timeout_s=5.0)
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def server(bundle):
    with hosted(bundle, settings=ServeSettings(LIMITS)) as running:
        yield running


@pytest.fixture
def gated(bundle):
    """A server with a short time limit whose engine waits for the test, and that engine."""
    gates = []
    limits = ServeLimits(timeout_s=1.0, max_latency_ms=1e6)
    with hosted(bundle, settings=ServeSettings(limits), backend=gate_into(gates), max_batch_size=1) as running:
        while gates[0].entered.acquire(blocking=False):  # those of the warm-up
            pass
        yield running, gates[0]
        gates[0].open.set()


def _jpeg(size=(20, 20)):
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "JPEG")
    return stream.getvalue()


# what comes out


def test_answer_has_the_fields_of_nims_payload_and_the_numbers_of_the_graph(server):
    images = random_images(3)
    answer = server.infer(*map(png, images))
    assert answer.status == 200
    logits, similarity = (numpy_outputs(images)[name] for name in ("logits", "trace_similarity"))
    rows = answer.json()["data"]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["status"] for row in rows] == ["SUCCESS"] * 3
    assert [row["possible_sources"] for row in rows] == [{}] * 3
    probabilities = CALIBRATION.fake_probability(logits).tolist()
    assert [row["is_ai_generated"] for row in rows] == pytest.approx(probabilities, abs=1e-5)
    assert [row["fake_probability"] for row in rows] == [row["is_ai_generated"] for row in rows]
    assert [row["verdict"] for row in rows] == CALIBRATION.verdicts(logits).tolist()
    assert [row["trace_similarity"] for row in rows] == pytest.approx(similarity.tolist(), abs=1e-5)
    assert [row["error"] for row in rows] == [None] * 3
    assert answer.json()["model"] == {"name": "tiny", "precision": "fp32", "backend": "onnxruntime"}


def test_evidence_is_given_on_request_alone(server):
    (image,) = random_images(1)
    assert server.infer(png(image)).json()["data"][0]["evidence"] is None
    evidence = server.infer(png(image), evidence=True).json()["data"][0]["evidence"]
    wanted = CALIBRATION.calibrated(numpy_outputs(image[None])["evidence"][0])
    np.testing.assert_allclose(evidence, wanted, atol=1e-4)


def test_stability_is_checked_on_request_alone(server, bundle):
    picture = png(np.kron(random_images(1)[0], np.ones((3, 3, 1), np.uint8)))
    assert server.infer(picture).json()["data"][0]["stability"] is None
    for answer in (
        server.infer(picture, stability=True),
        server.upload(("file", "a.png", picture), ("stability", None, b"true")),
    ):
        (row,) = answer.json()["data"]
        with Detector.load(bundle, backend="onnxruntime") as detector:
            (wanted,) = detector.predict([picture], stability=True)
        assert row["stability"]["flips"] == wanted.stability.flips
        assert row["stability"]["fake_probabilities"] == pytest.approx(wanted.stability.fake_probabilities, abs=1e-5)
        assert row["stability"]["spread"] > 0
        assert row["verdict"] == wanted.verdict


def test_uploaded_files_give_the_same_with_their_names(server):
    images = random_images(2)
    uploaded = server.upload(
        ("file", "a.png", png(images[0])), ("evidence", None, b"true"), ("other", "ü.png", png(images[1]))
    )
    sent = server.infer(*map(png, images), evidence=True)
    assert uploaded.status == 200
    assert [row.pop("name") for row in uploaded.json()["data"]] == ["a.png", "ü.png"]
    assert [row["fake_probability"] for row in uploaded.json()["data"]] == pytest.approx(
        [row["fake_probability"] for row in sent.json()["data"]], abs=1e-6
    )
    assert np.shape(uploaded.json()["data"][1]["evidence"]) == (4, 4)


def test_picture_that_fails_costs_only_itself(server):
    answer = server.infer(png(random_images(1)[0]), b"no picture", png(random_images(1)[0])[:-400])
    rows = answer.json()["data"]
    assert answer.status == 200
    assert [row["status"] for row in rows] == ["SUCCESS", "ERROR", "ERROR"]
    assert [(row["error"] or {}).get("code") for row in rows] == [None, "unknown_format", "unreadable_picture"]
    assert rows[1]["is_ai_generated"] is None
    assert "no known picture format" in rows[1]["error"]["message"]


# what is refused


@pytest.mark.parametrize(
    ("picture", "status", "code"),
    [
        (b"no picture", 415, "unknown_format"),
        (_jpeg((101, 100)), 413, "too_many_pixels"),
        (_jpeg()[:-30], 422, "unreadable_picture"),
        (b"", 422, "unreadable_picture"),
    ],
)
def test_lone_picture_that_fails_gives_its_own_status(server, picture, status, code):
    answer = server.infer(picture)
    assert (answer.status, answer.code) == (status, code)
    assert answer.json()["error"]["pictures"][0]["code"] == code


def test_files_that_are_no_pictures_do_not_make_pictures_look_fast(server):
    before = server.state.admission.bound_s
    for _ in range(5):
        assert server.infer(b"no picture").status == 415
    assert server.state.admission.bound_s == before


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"{", "invalid_request", "Invalid JSON"),
        (b"[" * 9_000, "invalid_request", "Invalid JSON"),
        (b'{"input": ["x"], "evidence": NaN}', "invalid_request", "NaN is no number"),
        (b'{"input": ["x"], "\\ud800": 1}', "invalid_request", "unable to parse"),
        (b'{"input": []}', "invalid_request", "input"),
        (b'{"input": "x"}', "invalid_request", "input"),
        (b'{"input": ["http://example.org/a.png"]}', "no_data_url", "wanted data:image"),
        (b'{"input": ["data:image/png;base64,%"]}', "bad_base64", "input.0"),
        (b'{"input": ["data:image/png;base64,AA"]}', "bad_base64", "input.0"),
        (b'{"input": ["x"], "threshold": 1}', "invalid_request", "threshold"),
        (b'{"input": [' + b"1," * 9_000 + b"1]}", "invalid_request", "input.0"),
        (b'{"input": ["x"], "evidence": "perhaps"}', "invalid_request", "evidence"),
        (b"\xff\xfe", "invalid_request", "Invalid JSON"),
    ],
)
def test_body_that_is_not_as_it_says_gives_422(server, body, code, message):
    answer = server.request("POST", "/v1/infer", body, {"Content-Type": "application/json"})
    assert (answer.status, answer.code) == (422, code)
    assert message in answer.json()["error"]["message"]


def test_message_does_not_repeat_what_was_sent(server):
    answer = server.post_json("/v1/infer", {"input": [12345678]})
    assert b"12345678" not in answer.body


@pytest.mark.parametrize("kind", ["text/plain", "", "application/json-seq", "multipart/mixed"])
def test_other_content_type_gives_415(server, kind):
    answer = server.request("POST", "/v1/infer", b"x", {"Content-Type": kind} if kind else {})
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


def test_data_url_of_another_type_gives_415(server):
    answer = server.post_json("/v1/infer", {"input": ["data:text/html;base64,AAAA"]})
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


def test_compressed_body_gives_415(server):
    answer = server.post_json("/v1/infer", {"input": ["x"]}, {"Content-Encoding": "gzip"})
    assert (answer.status, answer.code) == (415, "compressed_body")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no file"),
        ([("evidence", None, b"true")], "no file"),
        ([("evidence", None, b"perhaps"), ("file", "a.png", b"x")], "true or false"),
        ([("threshold", None, b"1"), ("file", "a.png", b"x")], "threshold"),
    ],
)
def test_form_that_makes_no_sense_gives_422(server, parts, message):
    answer = server.upload(*parts)
    assert (answer.status, answer.code) == (422, "invalid_form")
    assert message in answer.json()["error"]["message"]


def test_form_in_an_unknown_charset_gives_422(server):
    kind = "multipart/form-data; boundary=b; charset=undefined"
    body = b'--b\r\nContent-Disposition: form-data; name="evidence"\r\n\r\ntrue\r\n--b--\r\n'
    answer = server.request("POST", "/v1/infer", body, {"Content-Type": kind})
    assert (answer.status, answer.code) == (422, "invalid_form")


def test_form_that_is_cut_off_gives_422(server):
    body = form([("file", "a.png", _jpeg())])[:-60]
    kind = {"Content-Type": 'multipart/form-data; boundary="a boundary"'}
    answer = server.request("POST", "/v1/infer", body, kind)
    assert answer.status == 422


def test_form_that_looks_like_boundaries_all_over_is_read_and_takes_no_more_than_its_time():
    headers = Headers({"content-type": "multipart/form-data; boundary=b"})
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"\r\n--bx" * 30_000
    body += b"\r\n--b--\r\n"
    request = bodies.picture_request(headers, body, ServeLimits(), time.monotonic() + 60)
    assert request.pictures[0].data == b"\r\n--bx" * 30_000
    with pytest.raises(DeadlineError):
        bodies.picture_request(headers, body, ServeLimits(), time.monotonic())


def test_too_many_pictures_give_413(server):
    picture = png(random_images(1)[0])
    for answer in (server.infer(*[picture] * 4), server.upload(*[("file", "a.png", picture)] * 4)):
        assert (answer.status, answer.code) == (413, "too_many_pictures")


def test_more_files_than_any_form_parser_takes_give_413_as_well(server):
    answer = server.upload(*[("file", "a", b"")] * 1001)
    assert (answer.status, answer.code) == (413, "too_many_pictures")
    assert answer.json()["error"]["message"].startswith("request: got 4 pictures")


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1"])
def test_json_of_very_many_values_gives_413(server, value):
    body = b'{"input": [' + b",".join([value] * 20_000) + b"]}"
    answer = server.request("POST", "/v1/infer", body, {"Content-Type": "application/json"})
    assert (answer.status, answer.code) == (413, "too_many_values")


# bytes and time


def test_declared_size_beyond_the_limit_gives_413_and_ends_the_connection(server):
    answer = server.request("POST", "/v1/infer", b"x" * 300_000, {"Content-Type": "application/json"})
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert answer.headers["Connection"] == "close"


def test_bytes_are_counted_where_no_size_is_declared(server):
    pieces = (b"x" * 50_000 for _ in range(5))
    answer = server.request("POST", "/v1/infer", pieces, {"Content-Type": "application/json"})
    assert (answer.status, answer.code) == (413, "request_too_large")


def test_body_of_exactly_the_limit_is_read(server):
    head = json.dumps({"input": [data_url(png(random_images(1)[0]))]})
    answer = server.request(
        "POST", "/v1/infer", head + " " * (LIMITS.max_request_bytes - len(head)), {"Content-Type": "application/json"}
    )
    assert answer.status == 200


def test_whoever_asks_before_sending_too_much_is_refused_before_it_sends(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = "POST /v1/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_body_that_does_not_come_gives_408(gated):
    server, _ = gated
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))  # to the end: the connection is closed
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"slow_body"' in answer
    wait_for(lambda: server.state.requests_inside == 0)


def test_picture_that_is_not_scored_in_time_gives_503(gated):
    server, gate = gated
    gate.open.clear()
    answer = server.infer(png(random_images(1)[0]))
    assert (answer.status, answer.code) == (503, "deadline_exceeded")
    assert int(answer.headers["Retry-After"]) >= 1
    gate.open.set()
    assert server.infer(png(random_images(1)[0])).status == 200


def test_header_that_takes_too_long_gives_503_in_time(gated, monkeypatch):
    server, _ = gated
    with _held(monkeypatch, scoring, "check_header") as held:
        answer = server.infer(png(random_images(1)[0]))
        assert (answer.status, answer.code) == (503, "deadline_exceeded")
        assert held.entered.is_set()
        assert not held.over.is_set()
    assert server.infer(png(random_images(1)[0])).status == 200


@pytest.mark.parametrize(
    ("path", "kind", "module", "reader"),
    [
        ("/v1/infer", "application/json", bodies, "validated"),
        ("/v1/infer", 'multipart/form-data; boundary="a boundary"', bodies, "_InMemory"),
        ("/v2/models/tiny/infer", "application/json", open_inference_routes, "parse_request"),
    ],
)
def test_server_is_alive_while_it_takes_a_large_body_apart(bundle, monkeypatch, path, kind, module, reader):
    # Larger than what is taken apart at once; it makes no sense, and is refused in the end.
    body = b"{" + b" " * 100_000 + b"--"
    with hosted(bundle) as server, _held(monkeypatch, module, reader) as held:
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(server.request("POST", path, body, {"Content-Type": kind}))
        )
        thread.start()
        assert held.entered.wait(10)
        assert server.get("/healthz").status == 200
        assert not held.over.is_set()
        held.go.set()
        thread.join()
    assert [answer.status for answer in answers] == [422]


class _Held:
    """A function that waits for the test, though not for ever."""

    def __init__(self, function):
        self._function = function
        self.entered, self.go, self.over = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, *arguments, **options):
        self.entered.set()
        self.go.wait(5)
        self.over.set()
        return self._function(*arguments, **options)


@contextmanager
def _held(monkeypatch, module, name):
    held = _Held(getattr(module, name))
    monkeypatch.setattr(module, name, held)
    try:
        yield held
    finally:
        held.go.set()


# concurrency


def _in_background(client, picture):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.infer(picture)))
    thread.start()
    return thread, answers


@pytest.mark.parametrize(
    ("limits", "fit", "code"),
    [
        (ServeLimits(max_requests=2, max_latency_ms=1e6), 2, "too_many_requests"),
        (ServeLimits(max_latency_ms=0.001), 1, "too_busy"),
    ],
)
def test_what_there_is_no_room_for_gives_429_and_what_is_inside_is_answered(bundle, limits, fit, code):
    gates = []
    picture = png(random_images(1)[0])
    with hosted(bundle, settings=ServeSettings(limits), backend=gate_into(gates)) as server:
        gates[0].open.clear()
        inside = []
        for count in range(1, fit + 1):
            inside.append(_in_background(server, picture))
            wait_for(lambda count=count: server.state.admission.inside == count)
        # The body is not waited for: a server with too much to do must not read it first.
        refused = server.request("POST", "/v1/infer", b"{", {"Content-Type": "application/json"})
        assert (refused.status, refused.code) == (429, code)
        assert int(refused.headers["Retry-After"]) >= 1
        gates[0].open.set()
        for thread, found in inside:
            thread.join()
            assert [answer.status for answer in found] == [200]
        assert server.infer(picture).status == 200
        assert server.counter(f'ntf_errors_total{{code="{code}"}}') == 1


def test_client_that_goes_away_takes_its_picture_out_of_the_queue(gated):
    server, gate = gated
    gate.open.clear()
    thread, answers = _in_background(server, png(random_images(1)[0]))
    assert gate.entered.acquire(timeout=10)
    body = json.dumps({"input": [data_url(png(random_images(1)[0]))]}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = f"POST /v1/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_for(lambda: server.state.service.queue_length == 1)
    wait_for(lambda: server.state.service.queue_length == 0)
    assert server.state.admission.inside == 1
    gate.open.set()
    thread.join()
    assert answers[0].status == 200
    assert server.counter('ntf_requests_total{method="POST",route="/v1/infer",status="499"}') == 1


# errors inside


def test_error_inside_gives_500_without_a_word_of_it_and_stands_in_the_log(bundle, caplog):
    class Broken(GatedBackend):
        def infer(self, images):
            if self.broken:
                raise RuntimeError("secret path /srv/models")
            return super().infer(images)

        broken = False

    with hosted(bundle, backend=Broken) as server:
        Broken.broken = True
        answer = server.infer(png(random_images(1)[0]))
        assert (answer.status, answer.code) == (500, "internal_error")
        assert b"secret" not in answer.body
        assert "secret path" in caplog.text
        Broken.broken = False
        assert server.infer(png(random_images(1)[0])).status == 200


class _NotFinite(GatedBackend):
    def infer(self, images):
        outputs = super().infer(images)
        return outputs._replace(logits=np.where((images == 0).all((1, 2, 3)), np.nan, outputs.logits))


def test_score_that_is_not_finite_is_the_servers_fault_and_stands_in_its_log(bundle, caplog):
    black, grey = (png(np.full((16, 16, 3), value, np.uint8)) for value in (0, 128))
    # Warming up with black pictures looks at no score.
    with hosted(bundle, backend=_NotFinite) as server:
        for pictures in ([black], [black, b"no picture"]):
            answer = server.infer(*pictures)
            assert (answer.status, answer.code) == (500, "score_not_finite")
        for urls in ([data_url(black)], [data_url(grey), data_url(black)]):
            tensor = {"name": "pictures", "shape": [len(urls)], "datatype": "BYTES", "data": urls}
            answer = server.post_json("/v2/models/tiny_pictures/infer", {"inputs": [tensor]})
            assert (answer.status, answer.json()["code"]) == (500, "score_not_finite")
        caplog.clear()
        rows = server.infer(black, grey).json()["data"]
        assert "got a score that is not a finite number" in caplog.text
        assert [row["status"] for row in rows] == ["ERROR", "SUCCESS"]
        assert rows[0]["error"]["code"] == "score_not_finite"
        assert server.counter('ntf_errors_total{code="score_not_finite"}') > 0


def test_memory_that_is_not_there_is_the_servers_fault(server, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    picture = png(random_images(1)[0])
    for module, name in ((decode, "_decoded_part"), (decode, "_identified"), (bodies, "picture_from_data_url")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, no_memory)
            answer = server.infer(picture)
        assert (answer.status, answer.code) == (503, "out_of_memory")
        assert answer.headers["Retry-After"]
    assert server.infer(picture).status == 200


def test_model_without_natural_traces_has_no_similarity(tmp_path):
    write_bundle(tmp_path / "tiny", mean_trace=(0.0,) * 128)
    with hosted(tmp_path / "tiny") as server:
        assert server.get("/v1/model").json()["natural_traces"] is False
        (row,) = server.infer(png(random_images(1)[0])).json()["data"]
        assert (row["verdict"] is None, row["trace_similarity"]) == (False, None)
        outputs = server.get("/v2/models/tiny_pictures").json()["outputs"]
        assert [output["name"] for output in outputs] == ["verdict", "fake_probability"]
        tensor = {"name": "pictures", "shape": [1], "datatype": "BYTES", "data": [data_url(png(random_images(1)[0]))]}
        answer = server.post_json("/v2/models/tiny_pictures/infer", {"inputs": [tensor]})
        assert len(answer.json()["outputs"]) == 2


# token


def test_token_is_asked_for_everywhere_but_on_probes_and_pages(bundle):
    with hosted(bundle, settings=ServeSettings(token=TOKEN)) as server:
        picture = base64.b64encode(png(random_images(1)[0])).decode()
        payload = {"input": [f"data:image/png;base64,{picture}"]}
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": f"Basic {TOKEN}"}):
            answer = server.post_json("/v1/infer", payload, headers)
            assert (answer.status, answer.code) == (401, "unauthorized")
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert server.post_json("/v1/infer", payload, {"Authorization": f"Bearer {TOKEN}"}).status == 200
        statuses = {path: server.get(path).status for path in ("/metrics", "/v1/model", "/v2", "/nothing")}
        assert set(statuses.values()) == {401}, statuses
        for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/v2/health/ready", "/page/docs.js"):
            assert Client(server.port).get(path).status == 200, path
