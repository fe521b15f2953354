"""`ntf serve` as it is started and stopped: arguments, token, signals, exit status."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from bundle_fixtures import random_images
from serve_fixtures import Client, png, wait_for

import runtime
from runtime.cli import main
from runtime.serve.command import TOKEN_VARIABLE

ROOT = Path(runtime.__file__).parent.parent
TOKEN = "a-token-of-the-tests"

# The engine waits for a line on standard input, so that a request can be inside when the signal comes.
_WAITING_ENGINE = """
import sys
from unittest import mock
from runtime import detector
from runtime.cli import main
real = detector.open_backend

def opened(*arguments, **options):
    backend = real(*arguments, **options)
    infer = backend.infer
    def waiting(images):
        if images.any() and (images == images[0, 0, 0, 0]).all():
            sys.stdin.readline()
        return infer(images)
    backend.infer = waiting
    return backend

detector.open_backend = opened
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _no_token_of_the_environment(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@contextmanager
def _process(*arguments, code=None, **environment):
    """A server as a process that listens, and a client of it."""
    command = [sys.executable, "-W", "error", *(["-c", code] if code else ["-m", "runtime.cli"]), "serve"]
    command += ["--port", "0", "--backend", "onnxruntime", "--threads", "1", *map(str, arguments)]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            line = process.stderr.readline()
            assert line.startswith("ntf: listening on http://127.0.0.1:"), line + process.stderr.read()
            yield process, Client(int(line.rpartition(":")[2]))
        finally:
            process.kill()
            watchdog.cancel()


@contextmanager
def _started(*arguments, **options):
    """A server as a process, ready, and a client of it."""
    with _process(*arguments, **options) as (process, client):
        wait_for(lambda: client.get("/readyz").status == 200)
        yield process, client


def test_sigterm_ends_what_is_inside_first_and_gives_status_0(tiny_bundle):
    grey = png(random_images(1)[0] * 0 + 128)
    with _started("--model", tiny_bundle, code=_WAITING_ENGINE) as (process, client):
        answers = []
        inside = threading.Thread(target=lambda: answers.append(client.infer(grey)))
        inside.start()
        wait_for(lambda: client.counter("ntf_pictures_inside") == 1)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/readyz").status == 503)
        time.sleep(0.5)  # long enough for a server that does not wait to be gone
        assert client.infer(grey).code == "not_ready"
        assert client.get("/healthz").status == 200
        process.stdin.write("\n")
        process.stdin.flush()
        inside.join()
        assert [answer.status for answer in answers] == [200]
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == "ntf: stopped\n"


def test_second_signal_does_not_wait(tiny_bundle):
    grey = png(random_images(1)[0] * 0 + 128)
    with _started("--model", tiny_bundle, "--shutdown-delay", 60, code=_WAITING_ENGINE) as (process, client):
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/readyz").status == 503)
        assert client.infer(grey).status == 503
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


# The model is never open: the thread that opens it says so and sleeps.
_OPENING_FOR_EVER = """
import sys, time
from runtime import detector
from runtime.cli import main

def opened(*arguments, **options):
    print("opening", file=sys.stderr, flush=True)
    time.sleep(3600)

detector.open_backend = opened
sys.exit(main(sys.argv[1:]))
"""


def test_second_signal_ends_a_server_whose_model_is_still_being_opened(tiny_bundle):
    with _process("--model", tiny_bundle, code=_OPENING_FOR_EVER) as (process, client):
        assert process.stderr.readline() == "opening\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "ntf: stopping when the model is open; a second signal does not wait\n"
        assert client.get("/healthz").status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 128 + signal.SIGINT
        assert process.stderr.read() == "ntf: ended while the model was being opened\n"


def test_token_of_the_environment_is_asked_for(tiny_bundle):
    with _started("--model", tiny_bundle, NTF_TOKEN=TOKEN) as (process, client):
        assert client.get("/v1/model").status == 401
        assert client.get("/v1/model", {"Authorization": f"Bearer {TOKEN}"}).status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "nothing there"),
        (["--max-pictures", "0"], "max_pictures: got 0"),
        (["--timeout", "nan"], "timeout_s: got nan"),
        (["--shutdown-delay", "-1"], "shutdown delay"),
        (["--port", "99999"], "wanted a free port"),
        (["--token-file", "nothing"], "a file that cannot be read"),
        (["--backend", "tpu"], "got 'tpu'"),
    ],
)
def test_what_cannot_be_done_gives_status_2_and_a_sentence(tiny_bundle, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tiny_bundle.parent)
    assert main(["serve", "--model", str(tiny_bundle), "--port", "0", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_model_gives_status_2_before_anything_listens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--port", "0"]) == 2
    err = capsys.readouterr().err
    assert "no bundle in it" in err
    assert "listening" not in err


def test_port_that_is_taken_gives_status_2(tiny_bundle, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--model", str(tiny_bundle), "--port", str(taken.getsockname()[1])]) == 2
    assert "an address that cannot be listened on" in capsys.readouterr().err


@pytest.mark.parametrize("token", ["short", "with a space in the middle", "umläut-umläut-umläut", ""])
def test_token_that_is_none_is_refused_and_not_shown(tiny_bundle, tmp_path, capsys, token):
    (tmp_path / "token").write_text(token + "\n", encoding="utf-8")
    assert main(["serve", "--model", str(tiny_bundle), "--port", "0", "--token-file", str(tmp_path / "token")]) == 2
    err = capsys.readouterr().err
    assert "openssl rand" in err
    assert not token or token not in err


def test_token_that_is_named_twice_is_refused(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    (tmp_path / "token").write_text(TOKEN)
    assert main(["serve", "--model", str(tiny_bundle), "--token-file", str(tmp_path / "token")]) == 2
    assert "drop the other" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["fastapi", "uvicorn", "prometheus_client", "python_multipart", "fastapi_offline", "httptools"]
)
def test_missing_package_names_the_extra(tiny_bundle, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["serve", "--model", str(tiny_bundle), "--port", "0"]) == 2
    assert f'no package {name}, wanted the packages of the extra serve: pip install "ntf-toolkit[serve]"' in (
        capsys.readouterr().err
    )


def test_rest_of_the_runtime_needs_none_of_the_servers_packages():
    blocked = ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "python_multipart")
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "runtime").rglob("*.py"))
        if path.parent.name != "serve" or path.stem in {"__init__", "command", "settings"}
    ]
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport importlib\n"
    code += f"for name in {names!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
    code += "from runtime.cli import main\nmain(['serve', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in (
        "--model", "--host", "--port", "--token-file", "--max-request-mib", "--max-pixels", "--max-pictures",
        "--max-requests", "--timeout", "--max-latency-ms", "--shutdown-delay",
    ):  # fmt: skip
        assert option in done.stdout


def test_reachable_from_other_machines_without_a_token_is_warned_of(tmp_path, capsys):
    assert main(["serve", "--model", str(tmp_path / "nothing"), "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "WARNING: reachable from other machines without a token" in capsys.readouterr().err
