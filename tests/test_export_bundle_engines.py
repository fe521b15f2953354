"""Engines built into a bundle that is there already, with numpy and TensorRT alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import export
from export.trt import builds_from_bundle, main
from export.trt_options import Options, parse_options
from runtime.bundle import open_bundle

ROOT = Path(export.__file__).parents[1]
BLOCKED = ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "tyro", "rich", "PIL", "timm", "sklearn")
RUN = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from export.trt import main
sys.exit(main({arguments!r}))
"""


def build(bundle, *options):
    """The command in a process where only numpy and TensorRT can be imported."""
    code = RUN.format(
        blocked=BLOCKED, arguments=["--model", str(bundle), "--max-batch", "4", "--opt-batch", "2", *options]
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_an_engine_is_built_from_a_bundle_where_nothing_but_numpy_and_tensorrt_imports(tiny_bundle):
    pytest.importorskip("tensorrt_rtx")
    before = {path.name: path.read_bytes() for path in tiny_bundle.iterdir()}
    done = build(tiny_bundle, "--fp32")
    assert done.returncode == 0, done.stderr
    manifest = open_bundle(tiny_bundle).manifest
    (engine,) = [artifact for artifact in manifest.artifacts if artifact.format == "engine"]
    assert (engine.precision, engine.flavour, engine.file) == ("fp32", "rtx", "model.fp32.rtx-portable.engine")
    assert engine.engine.source_sha256 == manifest.onnx_artifact("fp32").sha256
    after = {path.name: path.read_bytes() for path in tiny_bundle.iterdir()}
    assert after.keys() - before.keys() == {engine.file}
    assert all(after[name] == before[name] for name in before if name != "manifest.json")


def test_a_precision_that_the_bundle_has_no_graph_of_is_refused(tiny_bundle, capsys):
    assert main(["--model", str(tiny_bundle), "--int8"]) == 1
    assert "int8 engine: got a bundle with ONNX graphs of fp32, wanted one of int8" in capsys.readouterr().err


def test_options_of_an_export_are_refused_for_a_bundle_that_is_there(tiny_bundle, capsys):
    assert main(["--model", str(tiny_bundle), "--fp32", "--no-engine"]) == 1
    assert "add --run RUN to export it again" in capsys.readouterr().err


def test_a_zip_is_not_written_into(tiny_bundle, tmp_path, capsys):
    from bundle_fixtures import zip_bundle

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
