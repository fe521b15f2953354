"""Engines built into a bundle that is there already, with numpy and TensorRT alone."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import pytest
from bundle_fixtures import zip_bundle

import export
from export.engine import EngineSettings
from export.engine_artifacts import cache_key
from export.engine_flavours import FLAVOURS, TensorRT
from export.engine_targets import Target
from export.trt import builds_from_bundle, main
from export.trt_options import Options, engine_settings, parse_options
from runtime.bundle import open_bundle
from runtime.cli import main as ntf
from runtime.manifest import ProfileSpec, save_manifest

ROOT = Path(export.__file__).parents[1]
BLOCKED = ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "tyro", "rich", "PIL", "timm", "sklearn")
RUN = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from export.trt import main
sys.exit(main({arguments!r}))
"""


@pytest.fixture
def with_engine(tiny_bundle):
    """The tiny bundle with an FP32 engine, built by the command itself."""
    pytest.importorskip("tensorrt_rtx")
    assert main(command(tiny_bundle)) == 0
    return tiny_bundle


def command(bundle, *options):
    return ["--model", str(bundle), "--fp32", "--max-batch", "4", "--opt-batch", "2", "--target", "sm89", *options]


def files(bundle):
    return {path.name: path.read_bytes() for path in bundle.iterdir()}


def engines(bundle):
    return [artifact for artifact in open_bundle(bundle).manifest.artifacts if artifact.format == "engine"]


def run_blocked(bundle, *options):
    """The command in a process where only numpy and TensorRT can be imported."""
    code = RUN.format(blocked=BLOCKED, arguments=command(bundle, *options))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_an_engine_is_built_from_a_bundle_where_nothing_but_numpy_and_tensorrt_imports(tiny_bundle):
    pytest.importorskip("tensorrt_rtx")
    before = files(tiny_bundle)
    done = run_blocked(tiny_bundle)
    assert done.returncode == 0, done.stderr
    assert "fp32 engine: Building engine: 1 of " in done.stderr
    manifest = open_bundle(tiny_bundle).manifest
    (engine,) = engines(tiny_bundle)
    assert (engine.precision, engine.flavour, engine.file) == ("fp32", "rtx", "model.fp32.rtx-sm89.engine")
    assert (engine.targets, engine.profile) == (("sm89",), ProfileSpec(1, 2, 4))
    assert engine.engine.source_sha256 == manifest.onnx_artifact("fp32").sha256
    assert sum(engine.engine.layers.values()) > 3
    after = files(tiny_bundle)
    assert after.keys() - before.keys() == {engine.file}
    assert all(after[name] == before[name] for name in before if name != "manifest.json")


@pytest.mark.slow  # its twin is the test above; this one installs TensorRT-RTX into an environment of its own
def test_an_engine_is_built_in_an_environment_of_numpy_and_tensorrt_rtx_alone(tiny_bundle, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    subprocess.run([*install, "numpy", "tensorrt-rtx"], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [python, "-W", "error", "-m", "export.trt", *command(tiny_bundle)]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [engine.file for engine in engines(tiny_bundle)] == ["model.fp32.rtx-sm89.engine"]
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout.split()
    assert not set(BLOCKED) & set(listed)


@pytest.mark.parametrize("stranger", ["MODEL_CARD.md", "times.cache"])
def test_a_file_that_would_be_lost_is_refused_before_anything_is_built(tiny_bundle, monkeypatch, capsys, stranger):
    monkeypatch.setattr("export.bundle_engines.find_tensorrt", None)
    path = tiny_bundle / stranger
    options = ["--timing-cache", str(path)] if stranger == "times.cache" else []
    if not options:
        path.write_text("mine")
    before = files(tiny_bundle)
    assert main(command(tiny_bundle, *options)) == 1
    assert f"got {stranger} in it, which would be lost" in capsys.readouterr().err
    assert files(tiny_bundle) == before


def test_an_identical_build_is_not_made_again(with_engine, capsys, monkeypatch):
    before = files(with_engine)
    monkeypatch.setattr("export.engine_artifacts.engine_from_onnx", None)
    capsys.readouterr()
    assert main(command(with_engine)) == 0
    assert "fp32 engine is already built: model.fp32.rtx-sm89.engine" in capsys.readouterr().out
    assert files(with_engine) == before


def test_another_profile_replaces_the_engine_and_another_target_joins_it(with_engine):
    (first,) = engines(with_engine)
    assert main(command(with_engine, "--max-batch", "8")) == 0
    (second,) = engines(with_engine)
    assert (second.file, second.profile.max_batch) == (first.file, 8)
    assert main(command(with_engine, "--target", "sm80,sm86")) == 0
    assert [engine.targets for engine in engines(with_engine)] == [("sm80", "sm86"), ("sm89",)]


def test_the_cache_key_changes_with_everything_that_an_engine_depends_on():
    profile, target, settings = ProfileSpec(1, 2, 4), Target("sm89", ("sm89",), "NVIDIA L4"), EngineSettings()
    tensorrt = TensorRT(None, FLAVOURS[0], "10.9")
    keys = [
        cache_key("a" * 64, profile, target, settings, tensorrt),
        cache_key("b" * 64, profile, target, settings, tensorrt),
        cache_key("a" * 64, ProfileSpec(1, 2, 5), target, settings, tensorrt),
        cache_key("a" * 64, profile, replace(target, capabilities=("sm86",)), settings, tensorrt),
        cache_key("a" * 64, profile, replace(target, gpu="NVIDIA L40"), settings, tensorrt),
        cache_key("a" * 64, profile, target, replace(settings, workspace_mib=64), tensorrt),
        cache_key("a" * 64, profile, target, replace(settings, version_compatible=True), tensorrt),
        cache_key("a" * 64, profile, target, replace(settings, hardware_compatible=True), tensorrt),
        cache_key("a" * 64, profile, target, replace(settings, tf32=True), tensorrt),
        cache_key("a" * 64, profile, target, settings, replace(tensorrt, version="10.10")),
        cache_key("a" * 64, profile, target, settings, replace(tensorrt, flavour=FLAVOURS[-1])),
    ]
    assert len(set(keys)) == len(keys)
    timed = replace(settings, timing_cache=Path("times"))
    assert cache_key("a" * 64, profile, target, timed, tensorrt) == keys[0]


PRESS_ONCE = """
import os, signal, sys
import export.engine_progress
from export.trt import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # it would stay ignored in a test run in the background

def press_once(display, phase, done):
    if not sent:
        sent.append(phase)
        os.kill(os.getpid(), signal.SIGINT)

sent = []
export.engine_progress.RichDisplay.step_done = press_once
status = main(sys.argv[1:])
print("pressed in", *sent)
sys.exit(status)
"""


def test_ctrl_c_stops_a_real_build_and_leaves_the_bundle_as_it_was(tiny_bundle):
    """In a process of its own, as it is used."""
    pytest.importorskip("tensorrt_rtx")
    before = files(tiny_bundle)
    stopped = subprocess.run(
        [sys.executable, "-c", PRESS_ONCE, *command(tiny_bundle)], capture_output=True, text=True, timeout=120
    )
    assert stopped.returncode == 130, stopped.stderr
    assert "pressed in fp32 engine: Building engine" in stopped.stdout
    assert "an earlier bundle stands as it was" in stopped.stderr
    assert files(tiny_bundle) == before
    assert [path.name for path in tiny_bundle.parent.iterdir()] == ["tiny"]


def test_a_full_disk_is_an_error_and_leaves_the_bundle_as_it_was(tiny_bundle, capsys, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    before = files(tiny_bundle)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("export.bundling.os.fsync", full)
    assert main(command(tiny_bundle)) == 1
    assert "got No space left on device while it was written, wanted a folder beside it" in capsys.readouterr().err
    assert files(tiny_bundle) == before
    assert [path.name for path in tiny_bundle.parent.iterdir()] == ["tiny"]


def test_inspect_shows_how_an_engine_was_built(with_engine, capsys):
    capsys.readouterr()
    assert ntf(["inspect", str(with_engine)]) == 0
    out = capsys.readouterr().out
    (engine,) = engines(with_engine)
    for fact in ("engine rtx", f"built by {engine.builder}", "targets sm89", "batch 1 / 2 / 4", "built without a GPU",
                 "workspace no limit, not version compatible, not hardware compatible, FP32 products in full",
                 engine.engine.cache_key,
                 f"from model.fp32.onnx, sha256 {engine.engine.source_sha256}", "kgen UInt8>Float"):  # fmt: skip
        assert fact in out


def test_without_tensorrt_the_message_says_what_to_install(tiny_bundle, capsys, monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(command(tiny_bundle)) == 1
    assert 'pip install "ntf-toolkit[rtx]"' in capsys.readouterr().err


def test_a_profile_and_a_target_that_make_no_sense_are_refused_before_anything_is_built(tiny_bundle, capsys):
    pytest.importorskip("tensorrt_rtx")
    assert main(command(tiny_bundle, "--min-batch", "8")) == 1
    assert "got 8/2/4, wanted 1 <= min_batch <= opt_batch <= max_batch" in capsys.readouterr().err
    assert main(command(tiny_bundle, "--target", "sm87")) == 1
    assert "sm87 is a Jetson" in capsys.readouterr().err


def test_an_option_that_tensorrt_lacks_is_refused_for_an_engine_that_is_there_as_well(with_engine, capsys):
    assert main(command(with_engine, "--timing-cache", "times")) == 1
    assert "its timing cache does nothing" in capsys.readouterr().err


def test_a_precision_that_the_bundle_has_no_graph_of_is_refused(tiny_bundle, capsys):
    assert main(["--model", str(tiny_bundle), "--int8"]) == 1
    assert "int8 engine: got a bundle with ONNX graphs of fp32, wanted one of int8" in capsys.readouterr().err


def test_a_bundle_without_any_graph_is_refused(tiny_bundle, capsys):
    save_manifest(replace(open_bundle(tiny_bundle).manifest, artifacts=()), tiny_bundle)
    assert main(["--model", str(tiny_bundle)]) == 1
    assert "fp32 engine: got a bundle with ONNX graphs of no precision" in capsys.readouterr().err


def test_options_of_an_export_are_refused_for_a_bundle_that_is_there(tiny_bundle, capsys):
    assert main(["--model", str(tiny_bundle), "--fp32", "--no-engine"]) == 1
    assert "add --run RUN to export it again" in capsys.readouterr().err


def test_a_zip_is_not_written_into(tiny_bundle, tmp_path, capsys):
    archive = zip_bundle(tiny_bundle, tmp_path / "tiny.zip")
    assert main(["--model", str(archive), "--fp32"]) == 1
    assert "unpack it, and build the engines in the folder" in capsys.readouterr().err


def test_a_run_is_exported_unless_the_model_is_a_bundle_and_no_run_is_named(tiny_bundle, tmp_path):
    assert builds_from_bundle(Options(model=tiny_bundle))
    assert not builds_from_bundle(Options(model=tiny_bundle, run=tmp_path))
    assert not builds_from_bundle(Options(model=tmp_path / "new"))
    assert not builds_from_bundle(Options())


def test_options_keep_the_defaults_that_the_command_line_does_not_name(tmp_path):
    assert parse_options([]) == Options()
    given = parse_options(["--int8", "--run", str(tmp_path), "--no-engine", "--max-batch", "16"])
    assert given == Options(int8=True, run=tmp_path, engine=False, max_batch=16)


def test_options_of_engines_become_settings(tmp_path):
    given = parse_options(
        ["--target", "sm80,sm89", "--workspace-mib", "64", "--timing-cache", str(tmp_path), "--version-compatible",
         "--hardware-compatible", "--tf32"]
    )  # fmt: skip
    assert engine_settings(given) == EngineSettings("sm80,sm89", 64, tmp_path, True, True, True)
    assert engine_settings(Options()) == EngineSettings()
