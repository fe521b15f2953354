"""What `auto` takes of engines and of measurements, and how measurements are made, kept and ignored."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
from bundle_fixtures import add_engine, parity, write_bundle
from PIL import Image

from runtime.backends import BACKENDS, Probe, open_backend
from runtime.backends.choice import choose, compared_artifact, safe_artifacts
from runtime.backends.cuda_driver import CudaDevice, CudaDriver
from runtime.backends.trt_installed import fitting_engines
from runtime.bundle import open_bundle
from runtime.cli import main
from runtime.detector import Detector
from runtime.engine_check import EngineRuntime
from runtime.errors import BackendError, UsageError
from runtime.manifest import ProfileSpec
from runtime.serve.command import _load, add_serve
from runtime.service import DetectorService
from runtime.tune import measured, tuning_text
from runtime.tuning import (
    BATCHES,
    SCHEMA_VERSION,
    BatchTime,
    Timing,
    Tuning,
    bundle_sha256,
    clear_tuning,
    keep_tuning,
    kept_tuning,
    these_versions,
    this_machine,
    tuning_path,
)

L4 = CudaDevice("sm89", "NVIDIA L4")
WIDE = ProfileSpec(1, 8, 64)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def running(monkeypatch):
    """Says which back-ends run; all the others do not."""

    def put(*names):
        def probe(name):
            return Probe(name, name in names, "1", "cpu", "pretended", "" if name in names else "pip install it")

        monkeypatch.setattr("runtime.backends.choice.probe_backend", probe)
        monkeypatch.setattr("runtime.tune.probe_backend", probe)

    return put


@pytest.fixture
def l4(monkeypatch):
    """A machine with an L4 and TensorRT 10.9."""
    runtimes = [EngineRuntime("trt", "10.9.0.34", L4)]
    monkeypatch.setattr("runtime.backends.trt_installed.installed_runtimes", lambda: runtimes)
    return runtimes


def engines(folder, *, precisions=("fp32", "fp16"), parities=None, **changes):
    """Manifest of a bundle whose first graph has an engine."""
    write_bundle(folder, precisions=precisions, parities=parities)
    return add_engine(folder, b"an engine", **({"profile": WIDE} | changes)).manifest


# Engines


def test_auto_takes_an_engine_that_fits_before_every_graph(tmp_path, running, l4):
    running(*BACKENDS)
    choice = choose(engines(tmp_path / "m"), backend="auto", precision="auto")
    assert (choice.backend, choice.artifact.file) == ("trt", "model.fp32.engine")
    assert "back-end trt is the first that runs here; precision fp32 is the first choice for it" in choice.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"targets": ("sm86",)}, r"model.fp32.engine: got an engine for sm86, wanted one for sm89 (NVIDIA L4)"),
        ({"builder": "tensorrt 10.8"}, "model.fp32.engine: got an engine of version 10.8"),
        ({"profile": ProfileSpec(2, 8, 64)}, "takes batches of 2 to 64, not 1 to 32"),
        ({"profile": ProfileSpec(1, 8, 16)}, "takes batches of 1 to 16, not 1 to 32"),
    ],
)
def test_auto_passes_over_an_engine_that_does_not_fit_and_says_why(tmp_path, running, l4, changes, reason):
    running(*BACKENDS)
    choice = choose(engines(tmp_path / "m", **changes), backend="auto", precision="auto")
    assert choice.backend == "onnxruntime-cuda"
    assert reason in choice.reason


def test_auto_says_nothing_of_engines_where_the_bundle_has_none(tmp_path, running):
    running("onnxruntime")
    assert "trt" not in choose(write_bundle(tmp_path / "m"), backend="auto", precision="auto").reason


def test_auto_says_that_there_is_no_gpu_for_the_engines_of_a_bundle(tmp_path, running, monkeypatch):
    running("onnxruntime")
    monkeypatch.setattr("runtime.backends.trt_installed.cuda_device", lambda: None)
    monkeypatch.setattr("runtime.backends.trt_installed.cuda_driver", lambda: CudaDriver(0, "no NVIDIA driver"))
    reason = choose(engines(tmp_path / "m"), backend="auto", precision="auto").reason
    assert "(trt: no NVIDIA driver; onnxruntime-cuda: pretended)" in reason


@pytest.mark.parametrize(("passed", "backend"), [(True, "trt"), (False, "onnxruntime")])
def test_an_engine_is_as_safe_as_the_graph_that_it_was_built_from(tmp_path, running, l4, passed, backend):
    running("trt", "onnxruntime")
    manifest = engines(tmp_path / "m", precisions=("fp16",), parities={"fp16": [parity(passed=passed)]})
    if passed:
        assert choose(manifest, backend="auto", precision="auto").backend == backend
    else:
        with pytest.raises(BackendError, match="precision auto"):
            choose(manifest, backend="auto", precision="auto")
        assert choose(manifest, backend="auto", precision="fp16").backend == "trt"


def test_a_precision_that_only_an_engine_has_is_refused_with_why_it_does_not_fit(tmp_path, running, l4):
    running(*BACKENDS)
    manifest = engines(tmp_path / "m", targets=("sm86",), precisions=("fp32", "fp16"))
    only = replace(manifest, artifacts=(manifest.artifacts[0], replace(manifest.artifacts[2], precision="fp16")))
    with pytest.raises(BackendError, match=r"got none that runs here \(trt: .*got an engine for sm86"):
        choose(only, backend="auto", precision="fp16")


def test_a_named_trt_takes_any_batches_and_refuses_a_precision_without_an_engine(tmp_path, running, l4):
    running("trt")
    manifest = engines(tmp_path / "m", profile=ProfileSpec(2, 4, 8))
    assert choose(manifest, backend="trt", precision="auto").artifact.file == "model.fp32.engine"
    with pytest.raises(BackendError, match=r"got model.fp32.engine in fp32, wanted an engine .*BUNDLE --fp16"):
        choose(manifest, backend="trt", precision="fp16")


def test_a_named_trt_without_a_fitting_engine_says_how_to_build_one(tmp_path, running, l4):
    running("trt")
    manifest = engines(tmp_path / "m", targets=("sm86",))
    with pytest.raises(BackendError, match=r"got model.fp32.engine: got an engine for sm86.*export.trt --model BUNDLE"):
        choose(manifest, backend="trt", precision="auto")
    with pytest.raises(BackendError, match="got the bundle has no engine, wanted an engine that fits this machine"):
        choose(write_bundle(tmp_path / "n"), backend="trt", precision="auto")


def test_an_engine_of_the_flavour_that_is_installed_is_the_one_that_fits(tmp_path, l4):
    engines(tmp_path / "m")
    bundle = add_engine(tmp_path / "m", b"rtx", file="rtx.engine", flavour="rtx", builder="tensorrt_rtx 1.7.1.116")
    l4[:] = [EngineRuntime("rtx", "1.7.1.116", L4)]
    fitting, reasons = fitting_engines(bundle.manifest)
    assert [engine.file for engine in fitting] == ["rtx.engine"]
    assert "model.fp32.engine: got an engine of tensorrt 10.9.0.34" in reasons


def test_what_was_compared_for_an_engine_is_its_own_or_that_of_its_graph(tmp_path):
    manifest = engines(tmp_path / "m")
    graph, engine = manifest.artifacts[0], manifest.artifacts[-1]
    assert compared_artifact(manifest, graph) == graph
    assert compared_artifact(manifest, engine) == graph
    own = replace(engine, parity=(parity(backend="trt"),))
    assert compared_artifact(manifest, own) == own
    stale = replace(engine, engine=replace(engine.engine, source_sha256="d" * 64))
    assert compared_artifact(manifest, stale) is None


def test_a_provider_that_may_change_types_needs_a_comparison_of_its_own(tmp_path):
    for records, safe in (([parity()], ["fp32"]), ([parity(backend="onnxruntime-tensorrt")], ["fp16", "fp32"])):
        manifest = write_bundle(tmp_path / "m", precisions=("fp32", "fp16"), parities={"fp16": records})
        assert [a.precision for a in safe_artifacts(manifest, "onnxruntime-tensorrt")] == safe
        assert [a.precision for a in safe_artifacts(manifest, "onnxruntime-tensorrt-rtx")] == ["fp16", "fp32"]


def test_auto_passes_over_an_engine_that_may_compute_in_tf32_and_takes_it_when_it_is_named(tmp_path, running, l4):
    running(*BACKENDS)
    write_bundle(tmp_path / "m")
    manifest = add_engine(tmp_path / "m", b"an engine", tf32=True, profile=WIDE).manifest
    choice = choose(manifest, backend="auto", precision="auto")
    assert choice.backend == "onnxruntime-cuda"
    assert "model.fp32.engine may compute in TF32, unlike the graph that was compared" in choice.reason
    assert choose(manifest, backend="auto", precision="fp32").artifact.file == "model.fp32.engine"
    with pytest.raises(BackendError, match="wanted an engine that fits this machine, without TF32, FP32 or of a graph"):
        choose(manifest, backend="trt", precision="auto")
    compared = replace(manifest.artifacts[-1], parity=(parity(backend="trt"),))
    proven = replace(manifest, artifacts=(*manifest.artifacts[:-1], compared))
    assert choose(proven, backend="auto", precision="auto").backend == "trt"


def test_of_two_engines_the_one_that_may_not_compute_in_tf32_is_taken(tmp_path, running, l4):
    running("trt")
    write_bundle(tmp_path / "m")
    add_engine(tmp_path / "m", b"before", tf32=True, profile=WIDE, file="a.engine")
    manifest = add_engine(tmp_path / "m", b"now", profile=WIDE, file="b.engine").manifest
    for backend, precision in (("auto", "auto"), ("auto", "fp32"), ("trt", "auto"), ("trt", "fp32")):
        assert choose(manifest, backend=backend, precision=precision).artifact.file == "b.engine"


# The largest batch that will be asked for


@pytest.mark.parametrize(
    ("profile", "max_batch", "backend", "reason"),
    [
        (ProfileSpec(1, 8, 64), 64, "trt", "; precision fp32 "),
        (ProfileSpec(1, 8, 64), 128, "onnxruntime-cuda", "model.fp32.engine takes batches of 1 to 64, not 1 to 128"),
        (ProfileSpec(1, 8, 16), 16, "trt", "; precision fp32 "),
        (ProfileSpec(2, 8, 64), 8, "onnxruntime-cuda", "model.fp32.engine takes batches of 2 to 64, not 1 to 8"),
    ],
)
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_auto_takes_what_scores_the_largest_batch(
    tmp_path, running, l4, profile, max_batch, backend, reason, precision
):
    running(*BACKENDS)
    manifest = engines(tmp_path / "m", profile=profile)
    choice = choose(manifest, backend="auto", precision=precision, max_batch=max_batch)
    assert choice.backend == backend
    assert reason in choice.reason


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_a_named_trt_that_does_not_take_the_largest_batch_is_refused(tmp_path, running, l4, precision):
    running(*BACKENDS)
    manifest = engines(tmp_path / "m", profile=ProfileSpec(2, 8, 64))
    assert choose(manifest, backend="trt", precision=precision, max_batch=64).artifact.file == "model.fp32.engine"
    with pytest.raises(BackendError, match=r"model.fp32.engine: got a batch of 65, wanted 2 to 64"):
        choose(manifest, backend="trt", precision=precision, max_batch=65)


def test_a_named_trt_takes_the_engine_that_scores_the_largest_batch(tmp_path, running, l4):
    running(*BACKENDS)
    engines(tmp_path / "m")
    wide = add_engine(tmp_path / "m", b"wide", file="wide.engine", profile=ProfileSpec(1, 8, 128)).manifest
    for precision in ("auto", "fp32"):
        assert choose(wide, backend="trt", precision=precision, max_batch=64).artifact.file == "model.fp32.engine"
        assert choose(wide, backend="trt", precision=precision, max_batch=128).artifact.file == "wide.engine"


# Options that a back-end does not have


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        (
            "onnxruntime",
            {"hint": "throughput"},
            "hint: got 'throughput' for the back-end onnxruntime, .* trt, op",
        ),
        ("openvino", {"cuda_graphs": True}, "cuda_graphs: got True for the back-end openvino"),
        ("trt", {"threads": 2}, "threads: got 2 for the back-end trt"),
        ("openvino", {"hint": "fast"}, "hint: got 'fast', wanted one of latency, throughput"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path, name, option, message):
    with pytest.raises(UsageError, match=message):
        open_backend(name, b"", write_bundle(tmp_path / "m"), file="model.onnx", **option)


def test_a_detector_hands_its_options_to_the_back_end(tiny_bundle):
    with Detector.load(tiny_bundle, backend="openvino", hint="throughput", threads=1) as detector:
        assert str(detector._backend.hint) == "throughput"
    with pytest.raises(UsageError, match="cuda_graphs: got True for the back-end onnxruntime"):
        Detector.load(tiny_bundle, backend="onnxruntime", cuda_graphs=True)


def test_who_opens_a_model_says_which_batch_is_the_largest(tiny_bundle, monkeypatch, tmp_path):
    asked = []

    def noted(manifest, *, backend, precision, max_batch=None):
        asked.append(max_batch)
        return choose(manifest, backend=backend, precision=precision, max_batch=max_batch)

    monkeypatch.setattr("runtime.detector.choose", noted)
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    model = ["--model", str(tiny_bundle), "--backend", "onnxruntime"]
    assert main(["predict", *model, "--batch-size", "3", str(folder)]) == 0
    assert main(["score", *model, "--batch-size", "5", "--out", str(tmp_path / "r.csv"), str(folder)]) == 0
    with DetectorService.load(tiny_bundle, backend="onnxruntime", max_batch_size=7) as service:
        service.swap(tiny_bundle)
    parser = argparse.ArgumentParser()
    add_serve(parser)
    _load(tiny_bundle, parser.parse_args(["--backend", "onnxruntime", "--max-batch-size", "11"]), None).close()
    assert asked == [3, 5, 7, 7, 11]


# Measurements


def times(picture_ms):
    return tuple(BatchTime(batch, 5, picture_ms * batch, picture_ms * batch, picture_ms * batch) for batch in BATCHES)


def tuning_of(manifest, *timings, **changes):
    """A measurement of this machine: each timing is (back-end, precision, ms a picture)."""
    tuning = Tuning(
        SCHEMA_VERSION,
        bundle_sha256(manifest),
        this_machine(),
        these_versions(),
        "2026-11-26",
        tuple(Timing(name, precision, f"model.{precision}.onnx", times(ms)) for name, precision, ms in timings),
        {},
    )
    return replace(tuning, **changes)


@pytest.fixture
def proven(tmp_path):
    """Manifest of a bundle whose INT8 passed its parity check."""
    return write_bundle(tmp_path / "m", precisions=("fp32", "int8"), parities={"int8": [parity()]})


def test_auto_takes_the_fastest_that_was_measured_and_says_so(proven, running):
    running("onnxruntime", "openvino")
    keep_tuning(
        proven,
        tuning_of(proven, ("onnxruntime", "fp32", 7.0), ("openvino", "int8", 5.0), ("openvino", "fp32", 8.0)),
    )
    choice = choose(proven, backend="auto", precision="auto")
    assert (choice.backend, choice.artifact.precision) == ("openvino", "int8")
    assert choice.reason == (
        "fastest by `ntf tune` of 2026-11-26: openvino int8 at 5 ms a picture in batches of 8, "
        "onnxruntime fp32 at 7 ms a picture in batches of 8, openvino fp32 at 8 ms a picture in batches of 8"
    )
    assert choose(proven, backend="auto", precision="fp32").backend == "onnxruntime"
    assert choose(proven, backend="openvino", precision="auto").artifact.precision == "fp32"


def test_auto_passes_over_what_was_fast_and_does_not_run_now(proven, running):
    running("onnxruntime")
    keep_tuning(proven, tuning_of(proven, ("onnxruntime", "fp32", 7.0), ("openvino", "int8", 5.0)))
    choice = choose(proven, backend="auto", precision="auto")
    assert choice.backend == "onnxruntime"
    assert choice.reason.endswith("(openvino int8: pretended)")
    keep_tuning(proven, tuning_of(proven, ("openvino", "int8", 5.0)))
    reason = choose(proven, backend="auto", precision="auto").reason
    assert "`ntf tune` measured nothing that runs now (openvino int8: pretended)" in reason


def test_a_measured_back_end_that_does_not_take_the_largest_batch_is_passed_over(tmp_path, running):
    running(*BACKENDS)
    manifest = write_bundle(tmp_path / "m")
    keep_tuning(manifest, tuning_of(manifest, ("onnxruntime-tensorrt", "fp32", 1.0), ("openvino", "fp32", 5.0)))
    for precision in ("auto", "fp32"):
        fastest = choose(manifest, backend="auto", precision=precision, max_batch=64)
        assert fastest.backend == "onnxruntime-tensorrt"
        choice = choose(manifest, backend="auto", precision=precision, max_batch=65)
        assert choice.backend == "openvino"
        assert "(onnxruntime-tensorrt fp32: takes batches of 1 to 64, not 1 to 65)" in choice.reason


def test_a_measured_file_that_is_not_what_would_run_is_passed_over(proven, running):
    running("onnxruntime", "openvino")
    tuning = tuning_of(proven, ("openvino", "int8", 5.0), ("onnxruntime", "fp32", 7.0))
    other = replace(tuning.timings[0], artifact="model.int8.engine")
    keep_tuning(proven, replace(tuning, timings=(other, tuning.timings[1])))
    choice = choose(proven, backend="auto", precision="auto")
    assert choice.backend == "onnxruntime"
    assert "(openvino int8: model.int8.engine does not fit any more)" in choice.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"machine": {**this_machine(), "gpu": "NVIDIA L4 (sm89)"}}, r"gpu was NVIDIA L4 \(sm89\) and is none"),
        ({"versions": {**these_versions(), "openvino": "2025.0"}}, r"openvino was 2025\.0 and is "),
        ({"versions": {**these_versions(), "tensorrt": "10.9"}}, r"tensorrt was 10\.9 and is absent"),
        ({"bundle_sha256": "0" * 64}, "it is of another bundle"),
        ({"schema_version": 99}, "it has schema 99"),
        ({"timings": ()}, "it has no times"),
    ],
)
def test_a_measurement_that_does_not_count_is_ignored_with_the_reason(proven, running, changes, reason):
    if "gpu" in reason and this_machine()["gpu"] != "none":
        pytest.skip("there is a GPU here")
    running("onnxruntime", "openvino")
    keep_tuning(proven, tuning_of(proven, ("openvino", "int8", 5.0), **changes))
    tuning, note = kept_tuning(proven)
    assert tuning is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(note)
    choice = choose(proven, backend="auto", precision="auto")
    assert choice.backend == "onnxruntime"
    assert note in choice.reason


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}', "\xff"])
def test_a_file_that_is_no_measurement_is_ignored_with_the_reason(proven, running, text):
    running("onnxruntime")
    path = tuning_path(proven)
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    choice = choose(proven, backend="auto", precision="auto")
    assert "`ntf tune` is ignored" in choice.reason
    assert str(path) in choice.reason


def test_an_artifact_that_lost_its_parity_is_not_taken_for_its_speed(proven, running):
    running("openvino")
    keep_tuning(proven, tuning_of(proven, ("openvino", "int8", 5.0), ("openvino", "fp32", 8.0)))
    lost = replace(proven, artifacts=(proven.artifacts[0], replace(proven.artifacts[1], parity=())))
    tuning_path(proven).rename(tuning_path(lost))
    assert "it is of another bundle" in choose(lost, backend="auto", precision="auto").reason
    keep_tuning(lost, tuning_of(lost, ("openvino", "int8", 5.0), ("openvino", "fp32", 8.0)))
    choice = choose(lost, backend="auto", precision="auto")
    assert choice.artifact.precision == "fp32"
    assert "int8: has no passed parity check" in choice.reason
    named = choose(lost, backend="auto", precision="int8")
    assert (named.backend, named.reason[:21]) == ("openvino", "fastest by `ntf tune`")


def test_tuning_times_every_back_end_that_runs_with_every_safe_precision(tmp_path, running):
    running("onnxruntime", "openvino")
    write_bundle(tmp_path / "m", precisions=("fp32", "fp16", "int8"), parities={"int8": [parity()]})
    bundle, said = open_bundle(tmp_path / "m"), []
    tuning = measured(bundle, repeats=3, say=said.append)
    assert {(timing.backend, timing.precision) for timing in tuning.timings} == {
        (name, precision) for name in ("onnxruntime", "openvino") for precision in ("fp32", "int8")
    }
    for timing in tuning.timings:
        assert [time.batch for time in timing.times] == list(BATCHES)
        for time in timing.times:
            assert 0 < time.low_ms <= time.median_ms <= time.high_ms
            assert time.repeats == 3
    assert set(tuning.failed) == set(BACKENDS) - {"onnxruntime", "openvino"}
    assert kept_tuning(bundle.manifest) == (tuning, "")
    best = tuning.by_speed()[0]
    choice = choose(bundle.manifest, backend="auto", precision="auto")
    assert (choice.backend, choice.artifact.precision) == (best.backend, best.precision)
    text = tuning_text(tuning)
    assert text.splitlines()[2].startswith(f"{best.backend} {best.precision} ")
    assert "trt: not measured: pretended" in text


def test_a_back_end_that_fails_is_named_and_the_others_are_measured(tiny_bundle, running, monkeypatch):
    running("onnxruntime", "openvino")
    bundle = open_bundle(tiny_bundle)

    def breaks(*arguments):
        raise BackendError("openvino", got="a failure", wanted="none", remedy="none")

    monkeypatch.setattr("runtime.backends.openvino.OpenVinoBackend.infer", breaks)
    tuning = measured(bundle, repeats=1, say=lambda text: None)
    assert [timing.backend for timing in tuning.timings] == ["onnxruntime"]
    assert "got a failure" in tuning.failed["openvino fp32"]
    running()
    with pytest.raises(BackendError, match=r"got nothing that could be measured \(trt: pretended"):
        measured(bundle, repeats=1, say=lambda text: None)


def test_a_cache_folder_that_cannot_be_written_is_a_named_error(proven, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="wanted a writable cache folder: set XDG_CACHE_HOME"):
        keep_tuning(proven, tuning_of(proven, ("openvino", "int8", 5.0)))


def test_a_user_without_a_home_can_load_a_model_and_cannot_tune(proven, running, monkeypatch):
    running("onnxruntime")
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("runtime.user_cache.Path.home", no_home)
    assert choose(proven, backend="auto", precision="auto").backend == "onnxruntime"
    with pytest.raises(UsageError, match="cache folder: got Could not determine home directory"):
        keep_tuning(proven, tuning_of(proven, ("openvino", "int8", 5.0)))


def test_ntf_tune_measures_shows_and_clears(tiny_bundle, running, capsys):
    running("onnxruntime")
    model = ["--model", str(tiny_bundle)]
    assert main(["tune", *model, "--show"]) == 1
    assert "nothing was measured: run `ntf tune`" in capsys.readouterr().out
    assert main(["tune", *model, "--repeats", "2"]) == 0
    shown = capsys.readouterr()
    assert "onnxruntime fp32" in shown.out
    assert "where --backend auto reads it" in shown.err
    assert main(["tune", *model, "--show"]) == 0
    assert capsys.readouterr().out == shown.out
    assert main(["tune", *model, "--show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["timings"][0]["backend"] == "onnxruntime"
    with Detector.load(tiny_bundle) as detector:
        assert detector.info.reason.startswith("fastest by `ntf tune` of ")
    assert main(["tune", *model, "--clear"]) == 0
    assert main(["tune", *model, "--clear"]) == 0
    assert capsys.readouterr().out == "the times are forgotten\nnothing was measured\n"
    assert not clear_tuning(open_bundle(tiny_bundle).manifest)


def test_ntf_tune_refuses_to_measure_nothing(tiny_bundle, capsys):
    assert main(["tune", "--model", str(tiny_bundle), "--repeats", "0"]) == 2
    assert "--repeats: got 0, wanted at least 1" in capsys.readouterr().err
