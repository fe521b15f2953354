"""The examples of docs/serving.md, run against a server, and its lists against the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_fixtures import random_images
from PIL import Image
from serve_fixtures import png

from benchmarks import fuzz_server
from benchmarks.serving import BEGIN, END
from runtime.serve.scoring import STATUSES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.png").write_bytes(png(random_images(1)[0]))
    Image.fromarray(random_images(1)[0]).save(tmp_path / "a.jpg")
    return tmp_path


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_curl_command_is_answered(server, folder):
    blocks = _blocks("sh")
    assert sum(block.count("curl ") for block in blocks) == 5
    answers = []
    for block in blocks:
        for line in block.replace("localhost:8000", f"127.0.0.1:{server.port}").splitlines():
            line = line.replace("curl ", "curl --fail --max-time 20 ")
            done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            answers += [done.stdout] if done.stdout else []
    one, two, in_json, ready, metrics = answers
    assert [len(json.loads(answer)["data"]) for answer in (one, two, in_json)] == [1, 2, 1]
    assert json.loads(two)["data"][1]["stability"]["fake_probabilities"]
    assert json.loads(ready) == {"status": "ready"}
    assert "ntf_requests_total{" in metrics


def test_example_of_tritons_client_prints_a_verdict(server, folder):
    pytest.importorskip("geventhttpclient", reason="tritonclient's HTTP client needs it")
    (code,) = _blocks("python")
    code = code.replace("localhost:8000", f"127.0.0.1:{server.port}").replace('"demo"', '"tiny"')
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip() in {"[b'real']", "[b'uncertain']", "[b'fake']"}, done.stderr


def test_every_code_and_field_and_metric_is_listed(server):
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "runtime" / "serve").glob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', sources)) | set(re.findall(r'_refuse\(\d+, "(\w+)"', sources))
    codes |= set(re.findall(r'_retold\(error, \d+, "(\w+)"', sources)) | set(STATUSES)
    assert len(codes) > 15
    (row,) = server.infer(png(random_images(1)[0])).json()["data"]
    metrics = re.findall(r"^# HELP (ntf_\w+) ", server.get("/metrics").body.decode(), flags=re.MULTILINE)
    metrics = [name for name in metrics if not name.endswith("_created")]
    assert "ntf_batch_size" in metrics
    for name in (*codes, *row, *metrics):
        assert re.search(rf"`{name}[`{{]", TEXT), name


def test_every_status_that_the_fuzzer_lets_pass_is_listed_and_no_fault_of_the_server_is():
    listed = {int(status) for status in re.findall(r"^\| (\d{3}) \|", TEXT, flags=re.MULTILINE)}
    assert {status for status in fuzz_server.STATUSES if status >= 400} == listed - {400, 401, 431, 500}


def test_every_option_is_one_of_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "runtime.cli", "serve", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    options = set(re.findall(r"`(--[a-z-]+)", TEXT)) | set(re.findall(r"ntf serve (--[a-z-]+)", TEXT))
    assert len(options) >= 10
    for option in options:
        assert option in done.stdout, option


def test_there_is_a_place_for_the_measured_table():
    assert TEXT.count(BEGIN) == TEXT.count(END) == 1
