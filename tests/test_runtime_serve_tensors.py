"""The Open Inference Protocol, spoken by Triton's own client and by hand."""

from __future__ import annotations

import json
import re
import tracemalloc

import numpy as np
import pytest
from bundle_fixtures import CALIBRATION, numpy_outputs, random_images
from serve_fixtures import data_url, hosted, png

from runtime.manifest import OUTPUTS
from runtime.serve.open_inference import TensorSpec, parse_request
from runtime.serve.request_errors import RequestError
from runtime.serve.settings import ServeLimits, ServeSettings

tritonhttp = pytest.importorskip("tritonclient.http", reason="needs tritonclient and geventhttpclient")


@pytest.fixture(scope="module")
def server(bundle):
    with hosted(bundle, settings=ServeSettings(ServeLimits(max_pictures=8))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with tritonhttp.InferenceServerClient(f"127.0.0.1:{server.port}") as opened:
        yield opened


def _pixels(images, *, binary):
    tensor = tritonhttp.InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return tensor


def _post(server, path, value):
    return server.post_json(f"/v2/models/{path}/infer", value)


# Triton's client


def test_client_finds_the_server_and_both_models_ready(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny_pictures", "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]


def test_metadata_are_the_contract_of_the_graph(client):
    metadata = client.get_model_metadata("tiny")
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}]
    assert [(o["name"], o["datatype"], o["shape"]) for o in metadata["outputs"]] == [
        ("logits", "FP32", [-1]),
        ("trace_similarity", "FP32", [-1]),
        ("embeddings", "FP32", [-1, 128]),
        ("evidence", "FP32", [-1, 4, 4]),
    ]
    assert metadata["versions"] == ["1"]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_pixels_give_the_raw_outputs_of_the_graph(client, binary_in, binary_out):
    images = random_images(5)
    wishes = [tritonhttp.InferRequestedOutput(name, binary_data=binary_out) for name in OUTPUTS]
    result = client.infer("tiny", [_pixels(images, binary=binary_in)], outputs=wishes, request_id="7")
    assert result.get_response()["id"] == "7"
    for name, wanted in numpy_outputs(images).items():
        found = result.as_numpy(name)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_without_a_wish_all_outputs_come_as_bytes(client):
    images = random_images(1)
    result = client.infer("tiny", [_pixels(images, binary=True)], model_version="1")
    assert [output["name"] for output in result.get_response()["outputs"]] == list(OUTPUTS)
    assert all("binary_data_size" in output["parameters"] for output in result.get_response()["outputs"])
    np.testing.assert_allclose(result.as_numpy("logits"), numpy_outputs(images)["logits"], atol=1e-5)


def test_files_give_verdicts(client):
    images = random_images(4)
    files = np.array([png(image) for image in images], dtype=object)
    tensor = tritonhttp.InferInput("pictures", [4], "BYTES")
    tensor.set_data_from_numpy(files, binary_data=True)
    result = client.infer("tiny_pictures", [tensor])
    logits = numpy_outputs(images)["logits"]
    assert [verdict.decode() for verdict in result.as_numpy("verdict")] == CALIBRATION.verdicts(logits).tolist()
    np.testing.assert_allclose(result.as_numpy("fake_probability"), CALIBRATION.fake_probability(logits), atol=1e-5)


def test_client_shows_the_sentence_of_an_error(client):
    tensor = _pixels(random_images(9), binary=True)
    with pytest.raises(Exception, match="got 9 pictures, wanted at most 8"):
        client.infer("tiny", [tensor])


# by hand


def test_files_may_be_data_urls_in_json(server):
    image = random_images(1)
    tensor = {"name": "pictures", "shape": [1], "datatype": "BYTES", "data": [data_url(png(image[0]))]}
    answer = _post(server, "tiny_pictures", {"inputs": [tensor], "outputs": [{"name": "fake_probability"}]})
    (output,) = answer.json()["outputs"]
    wanted = CALIBRATION.fake_probability(numpy_outputs(image)["logits"])
    assert output["data"] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert output["shape"] == [1]


def test_nested_and_flat_data_are_the_same(server):
    image = random_images(1)
    head = {"name": "images", "shape": [1, 16, 16, 3], "datatype": "UINT8"}
    answers = [
        _post(server, "tiny", {"inputs": [{**head, "data": data}]}).json()["outputs"][0]["data"]
        for data in (image.tolist(), image.ravel().tolist())
    ]
    assert answers[0] == pytest.approx(answers[1])
    assert answers[0] == pytest.approx(numpy_outputs(image)["logits"].tolist(), abs=1e-5)


_HEAD = {"name": "images", "shape": [1, 16, 16, 3], "datatype": "UINT8"}
_DATA = [0] * 768


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [{**_HEAD, "name": "pixels", "data": _DATA}]}, "got inputs pixels, wanted images alone"),
        ({"inputs": [{**_HEAD, "data": _DATA}] * 2}, "wanted images alone"),
        ({"inputs": [{**_HEAD, "datatype": "FP32", "data": _DATA}]}, "got FP32"),
        ({"inputs": [{**_HEAD, "shape": [0, 16, 16, 3], "data": []}]}, r"\[0, 16, 16, 3\]"),
        ({"inputs": [{**_HEAD, "shape": [-1, 16, 16, 3], "data": _DATA}]}, r"\[-1, 16, 16, 3\]"),
        ({"inputs": [{**_HEAD, "shape": [768], "data": _DATA}]}, r"\[768\]"),
        ({"inputs": [{**_HEAD, "data": _DATA[1:]}]}, "got 767 values, wanted 768"),
        ({"inputs": [{**_HEAD, "data": [256, *_DATA[1:]]}]}, "0 to 255"),
        ({"inputs": [{**_HEAD, "data": [0.5, *_DATA[1:]]}]}, "0 to 255"),
        ({"inputs": [{**_HEAD, "data": ["a" * 99, *_DATA[1:]]}]}, "0 to 255"),
        ({"inputs": [{**_HEAD, "data": [[0], *_DATA[1:]]}]}, "side by side"),
        ({"inputs": [_HEAD]}, "neither data nor binary_data_size"),
        ({"inputs": [{**_HEAD, "data": _DATA}], "outputs": [{"name": "labels"}]}, "wish for 'labels'"),
        (
            {
                "inputs": [{**_HEAD, "data": _DATA}],
                "outputs": [{"name": "logits", "parameters": {"classification": 1}}],
            },
            "classes",
        ),
        ({"inputs": [{**_HEAD, "parameters": {"binary_data_size": 768}}]}, "bytes"),
        ({"inputs": [{**_HEAD, "parameters": {"binary_data_size": -1}}]}, "binary_data_size"),
    ],
)
def test_request_that_does_not_fit_gives_422_with_a_text(server, request_, message):
    answer = _post(server, "tiny", request_)
    assert answer.status == 422
    assert answer.json()["code"] == "invalid_request"
    assert re.search(message, answer.json()["error"]), answer.body


@pytest.mark.parametrize("length", ["-1", "x", "99999", "3", "²", "9" * 5000])
def test_wrong_length_of_the_json_gives_422(server, length):
    body = json.dumps({"inputs": [{**_HEAD, "data": _DATA}]})
    header = {"Inference-Header-Content-Length": length.encode("latin-1")}
    answer = server.request("POST", "/v2/models/tiny/infer", body, header)
    assert answer.status == 422


@pytest.mark.parametrize("data", [b"\x01", b"\x05\0\0\0abc", b"\xff\xff\xff\xff", b""])
def test_bytes_tensor_whose_lengths_do_not_add_up_gives_422(server, data):
    tensor = {"name": "pictures", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    answer = server.request(
        "POST", "/v2/models/tiny_pictures/infer", head + data, {"Inference-Header-Content-Length": str(len(head))}
    )
    assert answer.status == 422


def test_name_with_half_a_surrogate_pair_is_told_without_it(server):
    answer = _post(server, "tiny", {"inputs": [{**_HEAD, "name": "a\ud800", "data": _DATA}], "id": "\ud800"})
    assert answer.status == 422
    assert "got inputs a?, wanted images alone" in answer.json()["error"]


def test_one_file_that_cannot_be_read_fails_the_request(server):
    urls = [data_url(png(random_images(1)[0])), data_url(b"no picture")]
    tensor = {"name": "pictures", "shape": [2], "datatype": "BYTES", "data": urls}
    answer = _post(server, "tiny_pictures", {"inputs": [tensor]})
    assert (answer.status, answer.json()["code"]) == (422, "unknown_format")
    assert answer.json()["error"].startswith("pictures.1:")


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/tiny/versions/2", "/v2/models/tiny/nothing"])
def test_model_or_version_that_there_is_not_gives_404(server, path):
    answer = server.get(path)
    assert answer.status == 404
    assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": [{"name": "logits"}, {"name": "logits"}]}, "one output twice"),
        ({"outputs": [{"name": "logits"}] * 17}, "outputs"),
        ({"parameters": {f"p{index}": 1 for index in range(17)}}, "parameters"),
        ({"parameters": {"p": [{}]}}, "parameters"),
        ({f"key{index}": 1 for index in range(100)}, "keys, at most 64"),
    ],
)
def test_request_that_would_cost_more_than_it_says_gives_422(server, change, message):
    pixels = {"name": "images", "shape": [1, 8, 8, 3], "datatype": "UINT8", "data": [0] * 192}
    answer = _post(server, "tiny", {"inputs": [pixels]} | change)
    assert answer.status == 422
    assert message in answer.json()["error"]


def test_memory_of_a_json_body_is_bounded_by_the_pixels_that_a_request_may_have():
    bounds = TensorSpec("images", "UINT8", (-1, 16, 16, 3)).json_bounds(8)
    head = b'{"inputs": [{"name": "images", "shape": [8, 16, 16, 3], "datatype": "UINT8", "data": ['
    for value, count, most in ((b"[]", 12_000, 30), (b'"ab"', 16_000, 30), (b"[]", 300_000, 2), (b"1", 300_000, 2)):
        body = head + b",".join([value] * count) + b"]}]}"
        tracemalloc.start()
        try:
            if most > 2:
                parse_request(body, None, bounds)
            else:
                with pytest.raises(RequestError, match="at most 16144 and 12184"):
                    parse_request(body, None, bounds)
            assert tracemalloc.get_traced_memory()[1] < most * len(body)
        finally:
            tracemalloc.stop()


def test_elements_beyond_the_shape_are_not_taken_apart(server):
    head = json.dumps({"inputs": [{"name": "pictures", "shape": [1], "datatype": "BYTES",
                                   "parameters": {"binary_data_size": 4000}}]}).encode()  # fmt: skip
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = server.request("POST", "/v2/models/tiny_pictures/infer", head + bytes(4000), headers)
    assert answer.status == 422
    assert "more than 1 elements" in answer.json()["error"]
