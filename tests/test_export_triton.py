"""Triton repositories: every configuration against the manifest and Triton's own schema, files, and what is refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bundle_fixtures import parity, tiny_graph, write_bundle, zip_bundle
from google.protobuf import text_format

import export.triton
from export.errors import ExportError
from export.triton import main
from export.triton_config import parsed_config
from runtime.bundle import open_bundle
from runtime.manifest import OUTPUTS, EngineSpec, ProfileSpec, save_manifest

schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
ROOT = Path(__file__).parents[1]
# The Python types of Triton's, as a manifest has them: uint8 pictures in, float32 out.
UINT8, FLOAT32 = schema.TYPE_UINT8, schema.TYPE_FP32


def add_engine(folder, precision="fp32", *, flavour="trt", target="sm89", profile=(1, 4, 32), source_sha256=None):
    """Add a file to a bundle that stands for an engine; its content."""
    manifest = open_bundle(folder).manifest
    source = manifest.onnx_artifact(precision)
    content = f"engine {precision} {flavour} {target}".encode()
    artifact = replace(
        source,
        file=f"model.{precision}.{flavour}-{target}.engine",
        format="engine",
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        opset=None,
        profile=ProfileSpec(*profile),
        flavour=flavour,
        targets=(target,),
        builder="tensorrt 10.9.0" if flavour == "trt" else "tensorrt_rtx 1.7",
        parity=(),
        engine=EngineSpec(source.file, source_sha256 or source.sha256, "a" * 64, None, None, False, False, {}, False),
    )
    (folder / artifact.file).write_bytes(content)
    save_manifest(replace(manifest, artifacts=(*manifest.artifacts, artifact)), folder)
    return content


@pytest.fixture
def bundle(tmp_path):
    """FP32, FP16 with a passed comparison, INT8 with one that failed, and an FP32 engine of TensorRT."""
    folder = tmp_path / "models" / "tiny"
    checks = {"fp16": [parity()], "int8": [parity(passed=False)]}
    write_bundle(folder, precisions=("fp32", "fp16", "int8"), parities=checks)
    add_engine(folder)
    return folder


def write(bundle, repository, *arguments):
    return main(["--model", str(bundle), "--out", str(repository), *map(str, arguments)])


def onnx_only(bundle, repository, *arguments):
    """The repository for ONNX Runtime alone, which needs no comparison and is quick."""
    return write(bundle, repository, "--backends", "onnxruntime", *arguments)


def configs(repository):
    """ModelConfig of each model, parsed with Triton's schema."""
    texts = {path.parent.name: path.read_text() for path in repository.glob("*/config.pbtxt")}
    return {name: text_format.Parse(text, schema.ModelConfig()) for name, text in texts.items()}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model_shapes(tensors, *, batched):
    """Shapes of tensors as the graph has them, with None for the batch."""
    shapes = {}
    for tensor in tensors:
        dims = tuple(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
        shapes[tensor.name] = (None, *dims) if batched else (None, *dims[1:])
        assert batched or dims[0] == -1
    return shapes


def test_there_is_a_model_for_each_safe_precision_and_backend_and_the_rest_is_said(bundle, tmp_path, capsys):
    assert write(bundle, tmp_path / "repo") == 0
    assert set(configs(tmp_path / "repo")) == {
        "tiny_fp32_onnxruntime",
        "tiny_fp16_onnxruntime",
        "tiny_fp32_openvino",
        "tiny_fp16_openvino",
        "tiny_fp32_tensorrt_plan",
    }
    said = capsys.readouterr().out
    assert "without onnxruntime int8: model.int8.onnx has no passed comparison with PyTorch" in said
    assert "without tensorrt_plan fp16: the bundle has no engine of it" in said
    assert "tiny_fp16_openvino: OpenVINO IR, as model.fp16.onnx in openvino on 8 pictures" in said
    assert f"tritonserver --model-repository={tmp_path / 'repo'}" in said


@pytest.mark.parametrize("changes", [{}, {"embedding_dim": 2, "mean_trace": (0.6, 0.8), "evidence_shape": (7, 5)}])
def test_names_types_and_shapes_are_those_of_the_manifest(tmp_path, changes):
    # With changes the manifest no longer fits the graph, which shows that shapes come from it alone.
    manifest = write_bundle(tmp_path / "tiny", **changes)
    add_engine(tmp_path / "tiny")
    backends = ("onnxruntime", "tensorrt_plan") if changes else ("onnxruntime", "openvino", "tensorrt_plan")
    assert write(tmp_path / "tiny", tmp_path / "repo", "--backends", *backends) == 0
    found = configs(tmp_path / "repo")
    assert {name.removeprefix("tiny_fp32_") for name in found} == set(backends)
    for name, config in found.items():
        batched = not name.endswith("openvino")
        assert config.name == name
        assert (config.max_batch_size > 0) == batched
        size = manifest.preprocess
        assert model_shapes(config.input, batched=batched) == {"images": (None, size.height, size.width, 3)}
        assert [tensor.data_type for tensor in config.input] == [UINT8]
        assert [tensor.name for tensor in config.output] == list(OUTPUTS)
        assert {tensor.data_type for tensor in config.output} == {FLOAT32}
        assert model_shapes(config.output, batched=batched) == {
            "logits": (None,),
            "trace_similarity": (None,),
            "embeddings": (None, manifest.embedding_dim),
            "evidence": (None, *manifest.evidence_shape),
        }
        assert all(len(tensor.dims) == 2 - batched for tensor in config.output[:2])


def test_each_backend_has_its_names_its_file_and_its_device(bundle, tmp_path):
    assert write(bundle, tmp_path / "repo", "--precisions", "fp32") == 0
    found = configs(tmp_path / "repo")
    group = schema.ModelInstanceGroup
    for backend, (triton_name, platform, file, kind) in {
        "onnxruntime": ("onnxruntime", "onnxruntime_onnx", "model.onnx", group.KIND_CPU),
        "openvino": ("openvino", "", "model.xml", group.KIND_CPU),
        "tensorrt_plan": ("tensorrt", "tensorrt_plan", "model.plan", group.KIND_GPU),
    }.items():
        config = found[f"tiny_fp32_{backend}"]
        assert (config.backend, config.platform, config.default_model_filename) == (triton_name, platform, file)
        assert [(g.kind, g.count) for g in config.instance_group] == [(kind, 1)]
        assert config.version_policy.latest.num_versions == 1
        assert (tmp_path / "repo" / config.name / "1" / file).is_file()


def test_files_are_those_of_the_bundle_under_the_names_that_triton_wants(bundle, tmp_path):
    assert write(bundle, tmp_path / "repo", "--precisions", "fp32", "--version", 3) == 0
    files = contents(tmp_path / "repo")
    assert files["tiny_fp32_onnxruntime/3/model.onnx"] == tiny_graph()
    assert files["tiny_fp32_tensorrt_plan/3/model.plan"] == b"engine fp32 trt sm89"
    assert {name for name in files if not name.endswith("config.pbtxt")} == {
        "tiny_fp32_onnxruntime/3/model.onnx",
        "tiny_fp32_openvino/3/model.xml",
        "tiny_fp32_openvino/3/model.bin",
        "tiny_fp32_tensorrt_plan/3/model.plan",
    }


def test_parameters_hold_the_calibration_of_the_very_precision_and_where_the_file_is_from(bundle, tmp_path):
    assert onnx_only(bundle, tmp_path / "repo") == 0
    manifest = open_bundle(bundle).manifest
    for precision in ("fp32", "fp16"):
        parameters = configs(tmp_path / "repo")[f"tiny_{precision}_onnxruntime"].parameters
        facts = {key.removeprefix("ntf_"): parameters[key].string_value for key in parameters}
        calibration = manifest.calibration[precision]
        for name in ("temperature", "bias", "real_threshold", "fake_threshold"):
            assert float(facts[name]) == getattr(calibration, name)
        assert facts["labels"].split(",") == list(manifest.labels)
        assert facts["source_sha256"] == manifest.onnx_artifact(precision).sha256
        assert facts["manifest_sha256"] == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    assert manifest.calibration["fp32"] != manifest.calibration["fp16"]


def test_triton_joins_requests_and_warms_up_at_the_sizes_that_were_asked_for(bundle, tmp_path):
    asked = ("--max-batch-size", 24, "--preferred-batch-sizes", 12, 4, "--max-queue-delay-us", 900, "--instances", 2)
    assert write(bundle, tmp_path / "repo", *asked) == 0
    found = configs(tmp_path / "repo")
    config = found["tiny_fp32_onnxruntime"]
    assert config.max_batch_size == 24
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 12]
    assert config.dynamic_batching.max_queue_delay_microseconds == 900
    assert config.instance_group[0].count == 2
    assert [(w.batch_size, list(w.inputs["images"].dims)) for w in config.model_warmup] == [
        (size, [16, 16, 3]) for size in (1, 4, 12)
    ]
    unbatched = found["tiny_fp32_openvino"]
    assert not unbatched.HasField("dynamic_batching")
    assert [(w.batch_size, list(w.inputs["images"].dims)) for w in unbatched.model_warmup] == [
        (1, [size, 16, 16, 3]) for size in (1, 4, 12)
    ]
    for warmup in (*config.model_warmup, *unbatched.model_warmup):
        assert warmup.inputs["images"].data_type == UINT8
        assert warmup.inputs["images"].random_data


def test_an_engine_keeps_to_the_batches_that_it_was_built_for(bundle, tmp_path):
    assert write(bundle, tmp_path / "repo", "--backends", "tensorrt_plan") == 0
    config = configs(tmp_path / "repo")["tiny_fp32_tensorrt_plan"]
    assert config.max_batch_size == 32
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert config.parameters["ntf_engine_builder"].string_value == "tensorrt 10.9.0"
    assert config.parameters["ntf_engine_targets"].string_value == "sm89"


def test_onnx_graphs_run_on_a_gpu_where_that_is_asked_for(bundle, tmp_path):
    assert write(bundle, tmp_path / "repo", "--device", "gpu", "--precisions", "fp32") == 0
    kinds = {name: config.instance_group[0].kind for name, config in configs(tmp_path / "repo").items()}
    assert kinds == {
        "tiny_fp32_onnxruntime": schema.ModelInstanceGroup.KIND_GPU,
        "tiny_fp32_openvino": schema.ModelInstanceGroup.KIND_CPU,
        "tiny_fp32_tensorrt_plan": schema.ModelInstanceGroup.KIND_GPU,
    }


def test_a_precision_that_failed_its_comparison_is_served_where_it_is_named(bundle, tmp_path):
    assert onnx_only(bundle, tmp_path / "repo", "--precisions", "int8", "--name", "other.name") == 0
    assert set(configs(tmp_path / "repo")) == {"other.name_int8_onnxruntime"}


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ({"flavour": "rtx", "target": "portable"}, "an engine of tensorrt_rtx 1.7, which Triton's TensorRT cannot"),
        ({"profile": (2, 4, 8)}, "takes at least 2 pictures at once"),
        (None, "the bundle has no engine of it"),
    ],
)
def test_an_engine_that_triton_cannot_serve_is_left_out_with_the_reason_or_refused(tmp_path, capsys, engine, reason):
    write_bundle(tmp_path / "tiny")
    if engine is not None:
        add_engine(tmp_path / "tiny", **engine)
    assert write(tmp_path / "tiny", tmp_path / "repo", "--precisions", "fp32") == 0
    assert reason in capsys.readouterr().out
    assert write(tmp_path / "tiny", tmp_path / "repo", "--backends", "tensorrt_plan") == 1
    assert reason in capsys.readouterr().err
    assert "tiny_fp32_onnxruntime" in configs(tmp_path / "repo")


def test_an_engine_is_served_where_the_graph_that_it_was_built_from_passed(bundle, tmp_path, capsys):
    for precision in ("fp16", "int8"):
        add_engine(bundle, precision)
    assert write(bundle, tmp_path / "repo", "--backends", "tensorrt_plan") == 0
    assert set(configs(tmp_path / "repo")) == {"tiny_fp32_tensorrt_plan", "tiny_fp16_tensorrt_plan"}
    assert "without tensorrt_plan int8: model.int8.onnx has no passed comparison" in capsys.readouterr().out
    assert write(bundle, tmp_path / "repo", "--backends", "tensorrt_plan", "--precisions", "int8") == 0
    assert set(configs(tmp_path / "repo")) == {"tiny_int8_tensorrt_plan"}


def test_an_engine_of_a_graph_that_the_bundle_has_no_more_is_left_out(bundle, tmp_path, capsys):
    add_engine(bundle, "fp16", source_sha256="e" * 64)
    assert write(bundle, tmp_path / "repo", "--backends", "tensorrt_plan") == 0
    assert "the graph of model.fp16.trt-sm89.engine has no passed comparison" in capsys.readouterr().out
    assert set(configs(tmp_path / "repo")) == {"tiny_fp32_tensorrt_plan"}


def test_two_engines_of_one_precision_are_not_chosen_between(bundle, tmp_path, capsys):
    add_engine(bundle, target="sm90")
    assert write(bundle, tmp_path / "repo", "--backends", "tensorrt_plan") == 1
    assert "of which one would have to be chosen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--precisions", "fp32", "int8", "--backends", "onnxruntime", "tensorrt_plan"), "tensorrt_plan int8: got"),
        (("--preferred-batch-sizes", 65), "got 65, wanted 1 to 64, the largest batch"),
        (("--max-batch-size", 0), "--max-batch-size: got 0"),
        (("--max-queue-delay-us", -1), "--max-queue-delay-us: got -1"),
        (("--instances", 0), "--instances: got 0"),
        (("--version", 0), "--version: got 0"),
        (("--name", "my model"), "model name: got 'my model'"),
    ],
)
def test_what_makes_no_sense_is_an_error_and_nothing_is_written(bundle, tmp_path, capsys, arguments, error):
    asked = arguments if "--backends" in arguments else ("--backends", "onnxruntime", *arguments)
    assert write(bundle, tmp_path / "repo", *asked) == 1
    assert error in capsys.readouterr().err
    assert not (tmp_path / "repo").exists()


def test_a_repository_of_this_command_is_replaced_as_a_whole_with_equal_bytes_for_equal_bundles(bundle, tmp_path):
    zipped = zip_bundle(bundle, tmp_path / "tiny.zip")
    assert write(bundle, tmp_path / "repo") == 0
    first = contents(tmp_path / "repo")
    assert onnx_only(bundle, tmp_path / "repo", "--precisions", "fp32") == 0
    assert [path.name for path in (tmp_path / "repo").iterdir()] == ["tiny_fp32_onnxruntime"]
    assert write(zipped, tmp_path / "repo") == 0
    assert contents(tmp_path / "repo") == first


@pytest.mark.parametrize("foreign", ["notes.txt", "resnet/config.pbtxt", "resnet/1/model.onnx"])
def test_a_folder_with_anything_else_in_it_is_left_as_it_is(bundle, tmp_path, capsys, foreign):
    assert onnx_only(bundle, tmp_path / "repo") == 0
    path = tmp_path / "repo" / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('name: "resnet"')
    before = contents(tmp_path / "repo")
    assert onnx_only(bundle, tmp_path / "repo") == 1
    assert f"({foreign.split('/')[0]})" in capsys.readouterr().err
    assert contents(tmp_path / "repo") == before


def test_a_file_in_the_place_of_the_repository_is_left_as_it_is(bundle, tmp_path, capsys):
    (tmp_path / "repo").write_text("mine")
    assert onnx_only(bundle, tmp_path / "repo") == 1
    assert "something else in it" in capsys.readouterr().err
    assert (tmp_path / "repo").read_text() == "mine"


def test_a_write_that_fails_leaves_the_earlier_repository_and_nothing_beside_it(bundle, tmp_path, monkeypatch, capsys):
    out = tmp_path / "served" / "repo"
    assert onnx_only(bundle, out) == 0
    before = contents(out)
    monkeypatch.setattr(export.triton, "config_text", lambda config: 'name: "other"')
    assert onnx_only(bundle, out, "--precisions", "fp32") == 1
    assert "another text than was written" in capsys.readouterr().err
    assert contents(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["repo"]


def test_a_damaged_bundle_is_refused(bundle, tmp_path, capsys):
    (bundle / "model.fp32.onnx").write_bytes(b"damaged")
    assert onnx_only(bundle, tmp_path / "repo") == 1
    assert "model.fp32.onnx" in capsys.readouterr().err


def test_a_text_outside_the_schema_is_an_error_with_its_place():
    with pytest.raises(ExportError, match=r'1:1 : .*no field named "nmae"'):
        parsed_config('nmae: "x"')


def test_without_tritonclient_the_error_says_what_to_install(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    assert onnx_only(bundle, tmp_path / "repo") == 1
    assert 'pip install "ntf-toolkit[train,export,cpu,triton]"' in capsys.readouterr().err


def test_without_pytorch_the_openvino_backend_says_what_to_install(bundle, tmp_path, monkeypatch, capsys):
    for name in ("export.openvino_ir", "export.onnx_export"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert write(bundle, tmp_path / "repo", "--backends", "openvino") == 1
    error = capsys.readouterr().err
    assert "Triton backend openvino: got import of torch halted" in error
    assert 'pip install "ntf-toolkit[train,export,cpu]", or --backends onnxruntime' in error


def test_a_repository_without_openvino_needs_no_pytorch(bundle, tmp_path):
    arguments = ["--model", str(bundle), "--out", str(tmp_path / "repo"), "--backends", "onnxruntime"]
    program = (
        f"import sys; from export.triton import main; assert main({arguments!r}) == 0; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr
    assert set(configs(tmp_path / "repo")) == {"tiny_fp32_onnxruntime", "tiny_fp16_onnxruntime"}
