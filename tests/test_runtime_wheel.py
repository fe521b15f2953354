"""The wheel in a fresh environment, outside the checkout: what a user of the deploy side gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bundle_fixtures import CALIBRATION, numpy_outputs, random_images, write_bundle
from PIL import Image

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "train", "export", "cpp_ext")


def _run(*command, cwd):
    # Neither the checkout nor the environment of the tests may help.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from a copy: setuptools leaves build folders in the tree that it builds.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", target, source, cwd=target)
    (built,) = target.glob("ntf_toolkit-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("venv")
    _run(sys.executable, "-m", "venv", folder, cwd=folder)
    _run(folder / "bin" / "python", "-m", "pip", "install", "-q", f"{wheel}[cpu]", cwd=folder)
    return folder / "bin"


def test_wheel_holds_every_module_and_nothing_else(wheel):
    expected = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed" or path.parent.name in ("csrc", "page")
    }
    assert {"cpp_ext/csrc/soft_contrastive.cpp", "runtime/serve/page/index.html"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert expected - names == set()
    assert not {name for name in names if name.endswith((".so", ".json", ".log")) and name.startswith("cpp_ext/")}
    assert {name.split("/")[0].split("-")[0] for name in names} == {*PACKAGES, "ntf_toolkit"}


def test_ntf_predict_runs_outside_the_checkout(environment, tmp_path):
    images = random_images(3)
    write_bundle(tmp_path / "deployed" / "models" / "tiny")
    (tmp_path / "my pictures").mkdir()
    for index, rgb in enumerate(images):
        Image.fromarray(rgb).save(tmp_path / "my pictures" / f"{index} ü.png")
    for backend in ("onnxruntime", "openvino"):
        out = _run(
            environment / "ntf", "predict", "--json", "--backend", backend, "../my pictures", cwd=tmp_path / "deployed"
        )  # fmt: skip
        rows = [json.loads(line) for line in out.splitlines()]
        expected = numpy_outputs(images)["logits"]
        assert [row["verdict"] for row in rows] == CALIBRATION.verdicts(expected).tolist()
        probabilities = [row["fake_probability"] for row in rows]
        assert probabilities == pytest.approx(CALIBRATION.fake_probability(expected).tolist(), abs=1e-5)


def test_embedded_api_comes_from_the_wheel_and_needs_no_torch(environment, tmp_path):
    write_bundle(tmp_path / "tiny")
    code = (
        "import sys, runtime; from runtime import Detector\n"
        "with Detector.load('tiny') as detector: print(detector.info.backend)\n"
        "print(runtime.__version__, 'torch' in sys.modules, runtime.__file__)"
    )
    backend, last = _run(environment / "python", "-c", code, cwd=tmp_path).splitlines()
    version, torch_loaded, location = last.split(maxsplit=2)
    assert backend == "onnxruntime"
    assert version[0].isdigit()
    assert version != "0+unknown"
    assert torch_loaded == "False"
    assert not Path(location).is_relative_to(ROOT)


def test_environment_holds_no_training_packages(environment, tmp_path):
    listed = json.loads(_run(environment / "python", "-m", "pip", "list", "--format", "json", cwd=tmp_path))
    names = {package["name"].lower() for package in listed}
    assert "ntf-toolkit" in names
    assert not names & {"torch", "torchvision", "timm", "scikit-learn", "onnx", "tyro", "rich", "tensorrt"}


def test_doctor_finds_the_cpu_backends(environment, tmp_path):
    report = json.loads(_run(environment / "ntf", "doctor", "--json", cwd=tmp_path))
    assert {probe["name"] for probe in report["backends"] if probe["runs"]} >= {"onnxruntime", "openvino"}
    assert report["packages"]["torch"] is None
