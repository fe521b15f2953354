from __future__ import annotations

import dataclasses
import json
from importlib.machinery import ModuleSpec

import pytest

import cpp_ext.library
import runtime.fused_loss
from cpp_ext.library import LIBRARY_FILE, RECORD_FILE, BuildRecord, library_problem, source_hashes
from runtime.backends import BACKENDS, Probe
from runtime.backends.cuda_driver import CudaDriver
from runtime.cli import main
from runtime.doctor import examine, report_text
from runtime.fused_loss import probe_fused_loss
from runtime.turbojpeg import TurboJpeg


def _probe(*running):
    def probe(name):
        return Probe(name, name in running, None, "cpu", "pretended", "" if name in running else "pip install it")

    return probe


def _versions(**installed):
    return lambda *names: next(
        (installed[n.replace("-", "_")] for n in names if n.replace("-", "_") in installed), None
    )


def test_report_of_this_machine_names_every_backend_and_tries_it():
    report = examine()
    assert [probe.name for probe in report.backends] == list(BACKENDS)
    running = {probe.name for probe in report.backends if probe.runs}
    assert {"onnxruntime", "openvino"} <= running
    assert report.runs()
    assert report.packages["numpy"]
    text = report_text(report)
    assert "ready: pictures can be scored here" in text
    for name in BACKENDS:
        assert name in text


def test_json_report_has_the_fields_of_the_report(capsys):
    assert main(["doctor", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert {"python", "packages", "backends", "cuda", "tools", "engine_builders", "warnings", "advice"} <= set(plain)
    assert {"state", "instruction_sets", "cuda_targets", "detail"} == set(plain["fused_loss"])
    assert [probe["name"] for probe in plain["backends"]] == list(BACKENDS)
    assert {"library", "why_in_full"} == set(plain["jpeg"])


def test_nothing_installed_gives_status_1_and_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("runtime.doctor.probe_backend", _probe())
    monkeypatch.setattr("runtime.doctor.installed_version", _versions())
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "NOT READY" in out
    assert 'for the back-end openvino: pip install "ntf-toolkit[cpu]"' in out
    assert 'to build engines with `python -m export.trt`: pip install "ntf-toolkit[trt]"' in out


def test_missing_jpeg_library_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setattr("runtime.doctor.find_turbojpeg", lambda: TurboJpeg(None, "no libjpeg-turbo 3 was found", None))
    monkeypatch.setattr("runtime.doctor.why_in_full", lambda: "no libjpeg-turbo 3 was found")
    text = report_text(examine())
    assert "decoded in full: no libjpeg-turbo 3 was found" in text
    assert 'to read large JPEG files several times faster: pip install "ntf-toolkit[jpeg]"' in text


def test_jpeg_library_that_is_there_is_named(monkeypatch):
    monkeypatch.setattr("runtime.doctor.find_turbojpeg", lambda: TurboJpeg("libturbojpeg.so.0", "", object()))
    monkeypatch.setattr("runtime.doctor.why_in_full", lambda: "")
    text = report_text(examine())
    assert "only the wanted part of a plain, complete file is decoded, with libturbojpeg.so.0" in text
    assert "ntf-toolkit[jpeg]" not in text


def test_both_onnxruntime_packages_are_warned_about(monkeypatch):
    monkeypatch.setattr("runtime.doctor.installed_version", _versions(onnxruntime="1", onnxruntime_gpu="1"))
    report = examine()
    assert any("onnxruntime and onnxruntime-gpu are both installed" in warning for warning in report.warnings)


def test_one_onnxruntime_package_is_not_warned_about(monkeypatch):
    monkeypatch.setattr("runtime.doctor.installed_version", _versions(onnxruntime="1"))
    assert not any("both installed" in warning for warning in examine().warnings)


def test_installed_backend_that_does_not_run_is_warned_about(monkeypatch):
    broken = Probe("openvino", False, "2026.1", None, "OSError: libtbb is missing", "pip install it")
    monkeypatch.setattr(
        "runtime.doctor.probe_backend", lambda name: broken if name == "openvino" else _probe(name)(name)
    )
    report = examine()
    assert "openvino 2026.1 is installed but does not run: OSError: libtbb is missing" in report.warnings


@pytest.mark.parametrize(("devices", "advised"), [(0, False), (2, True)])
def test_packages_for_a_gpu_are_advised_only_where_there_is_one(monkeypatch, devices, advised):
    monkeypatch.setattr("runtime.doctor.probe_backend", _probe("onnxruntime", "openvino"))
    monkeypatch.setattr("runtime.doctor.cuda_driver", lambda: CudaDriver(devices, "pretended"))
    advice = examine().advice
    assert any("onnxruntime-cuda" in line for line in advice) is advised
    assert ("for the back-end trt: pip install it" in advice) is advised


@pytest.mark.parametrize(("devices", "warned"), [(0, False), (1, True)])
def test_a_back_end_for_gpus_is_warned_about_only_where_there_is_one(monkeypatch, devices, warned):
    """TensorRT is installed where engines are built for other machines, and nothing is wrong with that."""
    broken = Probe("trt", False, "tensorrt_rtx 1.7", None, "neither cuda-bindings nor pycuda", "pip install it")
    monkeypatch.setattr("runtime.doctor.probe_backend", lambda name: broken if name == "trt" else _probe(name)(name))
    monkeypatch.setattr("runtime.doctor.cuda_driver", lambda: CudaDriver(devices, "pretended"))
    assert any("trt tensorrt_rtx 1.7 is installed but does not run" in line for line in examine().warnings) is warned


def test_driver_that_does_not_start_is_reported_with_its_error(monkeypatch):
    class Driver:
        def cuInit(self, flags):
            return 100

    monkeypatch.setattr("runtime.backends.cuda_driver.ctypes.CDLL", lambda name: Driver())
    report = examine()
    assert report.cuda.devices == 0
    assert "CUDA error 100" in report.cuda.detail


def test_compiler_that_does_not_start_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("no program")
    broken.chmod(0o755)
    monkeypatch.setattr("runtime.doctor.shutil.which", lambda tool: str(broken) if tool == "nvcc" else None)
    tools = examine().tools
    assert tools["nvcc"].startswith("does not start")
    assert tools["g++"] is None


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """A package cpp_ext with a library that was just built."""
    (tmp_path / "csrc").mkdir()
    for name in ("__init__.py", "build.py", "csrc/loss.cpp", "csrc/loss.h"):
        (tmp_path / name).write_text(name)
    (tmp_path / LIBRARY_FILE).write_bytes(b"library")
    record = BuildRecord(
        sources_sha256=source_hashes(tmp_path),
        library_sha256=cpp_ext.library.file_sha256(tmp_path / LIBRARY_FILE),
        torch="2.14.1",
        torch_cuda="13.0",
        cxx=("c++",),
        compilers={"c++": "12"},
        instruction_sets=("sse2", "avx2"),
        cuda_targets=("75", "90"),
        cpu_only_reason="",
    )
    (tmp_path / RECORD_FILE).write_text(record.to_json())
    spec = ModuleSpec("cpp_ext", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("runtime.fused_loss.find_spec", lambda name: spec)
    return tmp_path


def test_fused_loss_that_is_built_is_told_with_its_targets(extension):
    assert probe_fused_loss().state == "built"
    assert "built for sse2 avx2; CUDA 75 90" in report_text(examine())
    assert not any("cpp_ext.build" in advice for advice in examine().advice)


def test_fused_loss_without_cuda_says_why(extension, monkeypatch):
    record = json.loads((extension / RECORD_FILE).read_text()) | {"cuda_targets": [], "cpu_only_reason": "no nvcc"}
    (extension / RECORD_FILE).write_text(json.dumps(record))
    assert probe_fused_loss().describe() == "built for sse2 avx2; no CUDA (no nvcc)"


def rewrite(folder, change):
    record = json.loads((folder / RECORD_FILE).read_text())
    change(record)
    (folder / RECORD_FILE).write_text(json.dumps(record))


def test_doctor_goes_by_the_fields_and_the_sources_of_the_library():
    assert {field.name for field in dataclasses.fields(BuildRecord)} == runtime.fused_loss._RECORD_FIELDS
    assert cpp_ext.library.SOURCE_SUFFIXES == runtime.fused_loss._SOURCE_SUFFIXES


@pytest.mark.parametrize(
    ("change", "state", "detail"),
    [
        (lambda folder: None, "built", ""),
        (lambda folder: (folder / "csrc" / "loss.h").write_text("other"), "stale", "csrc/loss.h has changed"),
        (lambda folder: (folder / "csrc" / "loss.h").unlink(), "stale", "csrc/loss.h has changed"),
        (lambda folder: (folder / "csrc" / "new.h").write_text("new"), "stale", "csrc/new.h has changed"),
        (lambda folder: (folder / "build.py").write_text("other"), "stale", "build.py has changed"),
        (lambda folder: (folder / LIBRARY_FILE).write_bytes(b"half"), "damaged", "not the file that was built"),
        (lambda folder: (folder / LIBRARY_FILE).unlink(), "missing", "run python -m cpp_ext.build"),
        (lambda folder: (folder / RECORD_FILE).unlink(), "missing", "run python -m cpp_ext.build"),
        (lambda folder: (folder / "csrc" / ".loss.h.swp").write_text("swap"), "built", ""),
        (lambda folder: (folder / RECORD_FILE).write_text("{"), "stale", "its record is of another version"),
        (lambda folder: (folder / RECORD_FILE).write_text("[]"), "stale", "its record is of another version"),
        (lambda folder: rewrite(folder, lambda record: record.pop("cxx")), "stale", "its record is of another version"),
        (lambda folder: rewrite(folder, lambda record: record.update(new=1)), "stale", "of another version"),
        (lambda folder: (folder / RECORD_FILE).write_text("{}"), "stale", "its record is of another version"),
    ],
)
def test_state_of_the_fused_loss_is_the_one_that_training_goes_by(extension, change, state, detail):
    change(extension)
    found = probe_fused_loss()
    assert (found.state, detail in found.detail) == (state, True)
    assert (found.state == "built") == (library_problem(extension) is None)
    warned = any(f"the fused loss is {state}" in warning for warning in examine().warnings)
    assert warned == (state in ("stale", "damaged"))


def test_fused_loss_is_advised_where_torch_is_there_and_it_is_not_built(extension, monkeypatch):
    (extension / LIBRARY_FILE).unlink()
    advice = "for a contrastive loss whose memory is linear in the batch: python -m cpp_ext.build"
    assert advice in examine().advice
    monkeypatch.setattr("runtime.doctor.installed_version", _versions())
    assert advice not in examine().advice


def test_package_that_is_not_installed_is_absent(monkeypatch):
    monkeypatch.setattr("runtime.fused_loss.find_spec", lambda name: None)
    assert probe_fused_loss().describe() == "absent: the package cpp_ext is not installed"
