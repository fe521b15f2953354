from __future__ import annotations

import json

import pytest

from runtime.backends import BACKENDS, Probe
from runtime.cli import main
from runtime.doctor import examine, report_text


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
    assert plain["backends"][1]["name"] == "onnxruntime"


def test_nothing_installed_gives_status_1_and_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("runtime.doctor.probe_backend", _probe())
    monkeypatch.setattr("runtime.doctor.installed_version", _versions())
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "NOT READY" in out
    assert 'for the back-end openvino: pip install "ntf-toolkit[cpu]"' in out
    assert 'to build engines with `python -m export.trt`: pip install "ntf-toolkit[trt]"' in out


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
def test_cuda_package_is_advised_only_where_there_is_a_gpu(monkeypatch, devices, advised):
    from runtime.backends.cuda_driver import CudaDriver

    monkeypatch.setattr("runtime.doctor.probe_backend", _probe("onnxruntime", "openvino"))
    monkeypatch.setattr("runtime.doctor.cuda_driver", lambda: CudaDriver(devices, "pretended"))
    assert any("onnxruntime-cuda" in line for line in examine().advice) is advised


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
