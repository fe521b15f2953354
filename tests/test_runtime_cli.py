from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from bundle_fixtures import random_images, write_bundle, zip_bundle
from PIL import Image

import runtime
from runtime.cli import main
from runtime.errors import UsageError
from runtime.picture_paths import expand_pictures

ROOT = Path(runtime.__file__).parent.parent
FIELDS = ["source", "fake_probability", "verdict", "trace_similarity", "evidence", "error", "stability"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep er" / "ü").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    names = ["b.png", "a.PNG", "deep er/c.png", "deep er/ü/写真.png", ".hidden/x.png", ".dot.png"]
    for name, rgb in zip(names, random_images(len(names)), strict=True):
        Image.fromarray(rgb).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Current folder with a bundle in ./models, as a user has it."""
    write_bundle(tmp_path / "work" / "models" / "tiny")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def _predict(*arguments):
    return main(["predict", "--backend", "onnxruntime", "--threads", "1", *map(str, arguments)])


def _run(*arguments, cwd, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [sys.executable, "-m", "runtime.cli", *map(str, arguments)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


# predict


def test_all_scored_gives_status_0_and_json_lines_with_the_field_names(pictures, work, capsys):
    assert _predict("--json", pictures) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [list(row) for row in rows] == [FIELDS] * 4
    assert [Path(row["source"]).name for row in rows] == ["a.PNG", "b.png", "c.png", "写真.png"]
    assert all(0 < row["fake_probability"] < 1 and row["error"] is None for row in rows)
    assert np.shape(rows[0]["evidence"]) == (4, 4)
    assert "models/tiny (tiny): fp32 on onnxruntime" in err
    assert "4 scored, 0 failed" in err


def test_json_is_ascii_whatever_the_name(pictures, work, capsys):
    assert _predict("--json", pictures / "deep er" / "ü" / "写真.png") == 0
    assert capsys.readouterr().out.isascii()


def test_some_failed_gives_status_1_and_the_rest_is_scored(pictures, work, capsys):
    assert _predict("--json", "gone.jpg", pictures / "b.png", pictures / "notes.txt") == 1
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["verdict"] is None for row in rows] == [True, False, True]
    assert "no such file" in rows[0]["error"]
    assert "no known picture format" in rows[2]["error"]
    assert "1 scored, 2 failed" in err


def test_table_is_aligned_and_shows_the_reason_of_a_failure(pictures, work, capsys):
    assert _predict("gone.jpg", pictures / "b.png") == 1
    header, failed, scored = capsys.readouterr().out.splitlines()
    column = header.index("picture")
    assert failed.startswith("error ")
    assert failed[column:].startswith("gone.jpg: got no such file")
    assert scored[column:] == str(pictures / "b.png")
    assert scored.split()[0] in {"real", "uncertain", "fake"}
    assert scored.split()[2] == "%"


def test_control_characters_in_a_name_are_shown_and_not_obeyed(pictures, work, capsys):
    evil = pictures / "x\x1b[2J\ny.png"
    (pictures / "b.png").rename(evil)
    assert _predict(evil) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2
    assert r"x\x1b[2J\ny.png" in out


def test_pattern_is_expanded_by_us(pictures, work, capsys):
    assert _predict("--json", pictures / "*.png", pictures / "**" / "c.png") == 0
    names = [Path(json.loads(line)["source"]).name for line in capsys.readouterr().out.splitlines()]
    assert names == ["b.png", "c.png"]


def test_file_whose_name_looks_like_a_pattern_is_taken_as_it_is(pictures, work, capsys):
    (pictures / "b.png").rename(pictures / "b[1].png")
    assert _predict("--json", pictures / "b[1].png") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_picture_named_twice_is_scored_once(pictures):
    assert expand_pictures([str(pictures / "b.png"), str(pictures)]).count(str(pictures / "b.png")) == 1


@pytest.mark.parametrize("name", ["empty-folder", "nothing*.jpg"])
def test_nothing_found_is_an_error_that_says_what_was_looked_for(tmp_path, name):
    (tmp_path / "empty-folder").mkdir()
    with pytest.raises(UsageError, match=r"wanted files ending in \.jpg"):
        expand_pictures([str(tmp_path / name)])


def test_nothing_found_gives_status_2_and_no_output(work, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert _predict(tmp_path / "empty") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ntf: ")
    assert "a folder without pictures" in err


def test_model_may_be_a_zip(pictures, tiny_bundle, tmp_path, capsys):
    zipped = zip_bundle(tiny_bundle, tmp_path / "m.zip")
    assert _predict("--model", zipped, pictures) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "nothing there"),
        (["--backend", "tpu"], "got 'tpu'"),
        (["--precision", "int4"], "got 'int4'"),
        (["--precision", "int8"], "these ONNX precisions: fp32"),
        (["--batch-size", "0"], "batch_size: got 0"),
        (["--threads", "-1"], "threads: got -1"),
        (["--views", "all"], "views: got 'all'"),
    ],
)
def test_option_that_cannot_be_met_gives_status_2(pictures, work, capsys, arguments, message):
    assert main(["predict", str(pictures), *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


def test_no_model_anywhere_gives_status_2(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert _predict(pictures) == 2
    assert "models: got no bundle in it" in capsys.readouterr().err


def test_damaged_bundle_gives_status_2(pictures, work, capsys):
    path = work / "models" / "tiny" / "model.fp32.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    assert _predict(pictures) == 2
    assert "model.fp32.onnx" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["predict"], ["predict", "a.jpg", "--batch-size", "x"], ["paint"], ["inspect"]]
)
def test_wrong_usage_gives_status_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: ntf" in capsys.readouterr().err


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"ntf-toolkit {runtime.__version__}\n"


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_does_not_change_the_output(pictures, work, capsys, batch_size):
    assert _predict("--json", pictures) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert _predict("--json", "--batch-size", batch_size, pictures) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for got, want in zip(found, expected, strict=True):
        assert got["fake_probability"] == pytest.approx(want["fake_probability"], abs=1e-6)


def test_views_are_those_that_were_named(pictures, work, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8)).save(pictures / "b.png")
    scores = []
    for views in ("center", "five", "grid"):
        assert _predict("--json", "--views", views, pictures / "b.png") == 0
        scores.append(json.loads(capsys.readouterr().out)["fake_probability"])
    with runtime.Detector.load(work / "models" / "tiny", backend="onnxruntime", threads=1) as detector:
        named = [
            detector.predict([pictures / "b.png"], views=v)[0].fake_probability for v in ("center", "five", "grid")
        ]
    assert scores == named
    assert len(set(scores)) == 3


def test_stability_has_columns_of_its_own_and_json_has_its_scores(pictures, work, capsys):
    assert _predict("--stability", "gone.jpg", pictures / "b.png") == 1
    header, failed, scored = capsys.readouterr().out.splitlines()
    assert header.split() == ["verdict", "fake", "similarity", "spread", "unchanged", "picture"]
    assert failed[header.index("picture") :].startswith("gone.jpg: got no such file")
    assert _predict("--stability", "--json", pictures / "b.png") == 0
    stability = json.loads(capsys.readouterr().out)["stability"]
    cells = scored.split()
    assert cells[4:7] == [f"{100 * stability['spread']:.2f}", "%", stability["verdict"]]
    assert cells[7] == str(pictures / "b.png")


# as a process


def test_module_runs_as_a_program(pictures, work):
    with _run("predict", "--json", "--backend", "onnxruntime", pictures, "gone.png", cwd=work) as process:
        out, err = process.communicate(timeout=60)
    assert [json.loads(line)["error"] is None for line in out.splitlines()] == [True] * 4 + [False]
    assert process.returncode == 1
    assert "Warning" not in err


def test_each_batch_is_printed_when_it_is_done(pictures, work):
    code = (
        "import sys, runtime.changes as v\nreal = v.decode_part\n"
        "def decode(source, *arguments, **options):\n"
        "    if 'late' in source: sys.stdin.readline()\n"
        "    return real(source, *arguments, **options)\n"
        "v.decode_part = decode\nfrom runtime.cli import main\n"
        f"sys.exit(main(['predict', '--backend', 'onnxruntime', '--batch-size', '4', {str(pictures)!r}, 'late.png']))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=work, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        watchdog = threading.Timer(20, process.kill)
        watchdog.start()
        first = [process.stdout.readline() for _ in range(5)]
        assert process.poll() is None
        watchdog.cancel()
        rest, _ = process.communicate("go\n", timeout=60)
    assert first[0].startswith("verdict")
    assert "写真.png" in first[4]
    assert rest.startswith("error ")
    assert process.returncode == 1


def test_reader_that_goes_away_is_no_traceback(pictures, work):
    many = [pictures / "b.png", *(f"gone-{index}.jpg" for index in range(3000))]
    process = _run("predict", "--backend", "onnxruntime", "--batch-size", "8", *many, cwd=work)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_ctrl_c_is_no_traceback(pictures, work):
    many = [pictures / "b.png", *(f"gone-{index}.jpg" for index in range(20000))]
    # A test run in the background inherits an ignored SIGINT, which Python would leave ignored.
    process = _run(
        "predict", "--backend", "onnxruntime", "--batch-size", "1", *many, cwd=work,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("ntf: stopped\n")
    assert "Traceback" not in err


def test_output_that_is_not_utf8_does_not_stop_the_command(pictures, work):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "runtime.cli", "predict", "--backend", "onnxruntime", str(pictures)],
        cwd=work, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"\u5199\u771f.png" in done.stdout


# inspect


def test_inspect_shows_everything_without_any_backend(work):
    code = (
        "import sys\nfor name in ('onnxruntime', 'openvino', 'torch', 'onnx'): sys.modules[name] = None\n"
        "from runtime.cli import main\nsys.exit(main(['inspect', 'models/tiny']))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for fact in ("tiny", "16x16 RGB", "fp32: logit / 0.5 -0.5", "empirical thresholds", "model.fp32.onnx", "opset 13",
                 "golden.npz", "0" * 64):  # fmt: skip
        assert fact in done.stdout


def test_inspect_shows_parity_and_engines(tmp_path, capsys):
    from dataclasses import replace

    from bundle_fixtures import parity

    from runtime.manifest import ProfileSpec, save_manifest

    manifest = write_bundle(tmp_path / "m", parities={"fp32": [parity(passed=False)]})
    engine = replace(
        manifest.artifacts[0], file="model.engine", format="engine", opset=None, flavour="rtx", targets=("sm89",),
        profile=ProfileSpec(1, 8, 64), higher_precision_layers={"/head": "flips"}, parity=(),
    )  # fmt: skip
    (tmp_path / "m" / "model.engine").write_bytes((tmp_path / "m" / "model.fp32.onnx").read_bytes())
    conformal = {"fp32": replace(manifest.calibration["fp32"], threshold_rule="conformal")}
    save_manifest(replace(manifest, artifacts=(*manifest.artifacts, engine), calibration=conformal), tmp_path / "m")
    assert main(["inspect", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    for fact in ("parity FAILED: onnxruntime against torch fp32", "engine rtx", "targets sm89; the back-end trt",
                 "batch 1 / 8 / 64", "kept above fp32: /head (flips)", "parity not checked",
                 "conformal thresholds"):  # fmt: skip
        assert fact in out


def test_inspect_as_json_is_the_manifest_itself(work, capsys):
    assert main(["inspect", "--json", "models/tiny"]) == 0
    assert capsys.readouterr().out == (work / "models" / "tiny" / "manifest.json").read_text()


def test_inspect_of_a_damaged_bundle_gives_status_2(work, capsys):
    (work / "models" / "tiny" / "golden.npz").write_bytes(b"x")
    assert main(["inspect", "models/tiny"]) == 2
    assert "golden.npz" in capsys.readouterr().err
