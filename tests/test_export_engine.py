"""Engines: real ones from TensorRT-RTX, which builds without a GPU, TensorRT 10 and 11 on stand-ins, and refusals."""

from __future__ import annotations

import errno
import json
import os

import pytest
from exported import graphs
from onnx import TensorProto, helper
from tensorrt_fakes import fake_tensorrt

from export.engine import EngineSettings, _apply, check_settings, engine_from_onnx
from export.engine_flavours import TensorRT, find_tensorrt, flavour_of
from export.engine_log import recorded_messages
from export.engine_plan import CONVOLUTION_KINDS
from export.errors import ExportError
from export.graph import copy_of, initializers, model_bytes, producers
from runtime.backends.cuda_driver import CudaDevice
from runtime.errors import BundleError
from runtime.manifest import ProfileSpec

PROFILE = ProfileSpec(1, 2, 4)
PRECISIONS = ("fp32", "fp16", "int8", "int8+fp16")


@pytest.fixture(scope="module")
def tensorrt():
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx here")
    return find_tensorrt()


@pytest.fixture(scope="module")
def engines(tensorrt):
    """A real engine of each precision, all for one GPU."""
    settings = EngineSettings(target="sm89")
    return {
        name: engine_from_onnx(
            model_bytes(graphs("test_resnet")[name]), PROFILE, tensorrt=tensorrt, label=name, settings=settings
        )
        for name in PRECISIONS
    }


def graph_bytes(precision="fp32", change=lambda graph: None):
    """A graph of the test encoder, changed."""
    model = copy_of(graphs("test_resnet")[precision])
    change(model.graph)
    return model_bytes(model)


def convolutions(engine):
    return [layer for layer in engine.layers if layer.kind in CONVOLUTION_KINDS]


def nodes(precision, kind):
    return [node for node in graphs("test_resnet")[precision].graph.node if node.op_type == kind]


def types_of(engine):
    return {
        name for layer in engine.layers for name in (*layer.input_types, *layer.constant_types, *layer.output_types)
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_real_engine_is_built_with_the_types_of_its_graph(engines, tensorrt, precision):
    engine = engines[precision]
    assert len(engine.content) > 100_000
    assert len(engine.layers) > 20
    assert (engine.profile, engine.builder, engine.target.name) == (PROFILE, tensorrt.builder, "sm89")
    assert "UInt8" in {name for layer in engine.layers for name in layer.input_types}
    assert ("Int8" in types_of(engine)) == precision.startswith("int8")
    assert ("Half" in types_of(engine)) == (precision in ("fp16", "int8+fp16"))


def test_every_convolution_of_an_fp16_engine_computes_in_half(engines):
    found = convolutions(engines["fp16"])
    assert len(found) == len(nodes("fp16", "Conv"))
    assert {layer.types for layer in found} == {"Half"}
    assert all("Half" in layer.constant_types for layer in found)


@pytest.mark.parametrize("precision", ["int8", "int8+fp16"])
def test_every_quantised_convolution_of_an_int8_engine_reads_int8(engines, precision):
    model = graphs("test_resnet")[precision]
    makers = producers(model)
    quantised = [n for n in nodes(precision, "Conv") if "DequantizeLinear" in _behind_casts(makers, n.input[0])]
    in_int8 = [layer for layer in convolutions(engines[precision]) if set(layer.input_types) == {"Int8"}]
    assert len(in_int8) == len(quantised) > 10
    assert all("Int8" in layer.constant_types for layer in in_int8)


def test_residual_adds_of_an_fp16_engine_are_part_of_the_convolution_in_front_of_them(engines):
    weights = initializers(graphs("test_resnet")["fp16"])
    adds = [node for node in nodes("fp16", "Add") if not weights.keys() & set(node.input)]
    fused = [layer for layer in convolutions(engines["fp16"]) if layer.input_types == ("Half", "Half")]
    assert len(fused) == len(adds) > 1
    alone = [x for x in engines["fp16"].layers if x.kind not in CONVOLUTION_KINDS and x.input_types.count("Half") > 1]
    assert not alone


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"", "got an empty file, wanted an ONNX graph"),
        (lambda: b"not an ONNX file", "Failed to parse the ONNX model"),
        (lambda: graph_bytes()[:50_000], "Failed to parse the ONNX model"),
        (lambda: graph_bytes(change=_drop_outputs), "outputs logits, trace_similarity, embeddings, evidence"),
        (lambda: graph_bytes(change=_drop_channels), r"got node Transpose_1 \(Transpose\): .*`input` has 3 dimensions"),
        (
            lambda: graph_bytes(change=_fix_batch),
            r"got input images of shape \(2, 160, 160, 3\), wanted \(N, H",
        ),
        (lambda: _flat_input(), r"got input images of shape \(-1, 9\), wanted \(N, H, W, 3\) with any N"),
        (lambda: graph_bytes(change=_unknown_operator), r"got node frob \(Frobnicate\): .*Plugin not found"),
    ],
    ids=["empty", "garbage", "truncated", "outputs", "rank", "batch", "flat", "operator"],
)
def test_a_file_that_is_no_graph_of_the_contract_is_refused_with_the_reason(tensorrt, content, reason):
    with pytest.raises(ExportError, match=f"TensorRT engine demo: .*{reason}") as error:
        engine_from_onnx(content(), PROFILE, tensorrt=tensorrt, label="demo")
    assert "cudaError" not in str(error.value)


def test_a_build_that_fails_is_an_error_with_tensorrts_own_reason(tensorrt):
    tight = EngineSettings(target="sm89", workspace_mib=1)
    with pytest.raises(ExportError, match=r"TensorRT engine demo: got .*no tactics .* within workspace limit"):
        engine_from_onnx(graph_bytes(), PROFILE, tensorrt=tensorrt, label="demo", settings=tight)


def test_a_setting_that_the_builder_lacks_is_refused_before_it_is_tried(tensorrt):
    compatible = EngineSettings(target="sm89", version_compatible=True)
    with pytest.raises(ExportError, match=r"--version-compatible: got tensorrt_rtx .*its engines fit one release only"):
        engine_from_onnx(graph_bytes(), PROFILE, tensorrt=tensorrt, label="demo", settings=compatible)


def test_a_profile_whose_smallest_batch_is_above_its_largest_is_refused():
    with pytest.raises(BundleError, match="min_batch <= opt_batch <= max_batch"):
        ProfileSpec(8, 4, 2)


def test_a_profile_that_tensorrt_refuses_is_an_error_with_its_reason(tensorrt):
    class Unchecked:
        min_batch, opt_batch, max_batch = 4, 2, 1

    with pytest.raises(ExportError, match=r"got shapes \[\(4, .*satisfy MIN<=OPT<=MAX"):
        engine_from_onnx(graph_bytes(), Unchecked(), tensorrt=tensorrt, label="demo")


@pytest.fixture(params=[10, 11])
def fake(request, monkeypatch):
    """TensorRT 10 or 11 on a machine with a GPU."""
    monkeypatch.setattr("export.engine_targets.cuda_device", lambda: CudaDevice("sm87", "Orin"))
    module = fake_tensorrt(request.param)
    return TensorRT(module, flavour_of("tensorrt", module.__version__), module.__version__)


def built(fake, **settings):
    """An engine of a stand-in, and what it was told."""
    engine = engine_from_onnx(b"any", PROFILE, tensorrt=fake, label="demo", settings=EngineSettings(**settings))
    return engine, json.loads(engine.content)


def test_tensorrt_10_and_11_build_a_strongly_typed_network_for_this_gpu(fake):
    engine, told = built(fake)
    assert told == {"flags": [], "pools": {}, "batches": [1, 2, 4], "level": None}
    assert (engine.flavour, engine.builder) == ("trt", f"tensorrt {fake.version}")
    assert (engine.target.name, engine.target.gpu) == ("sm87", "Orin")
    assert [layer.types for layer in convolutions(engine)] == ["Half"]


def test_the_modes_of_tensorrt_are_set_where_they_are_asked_for(fake):
    engine, told = built(fake, version_compatible=True, hardware_compatible=True, workspace_mib=256)
    assert told["flags"] == ["VERSION_COMPATIBLE"]
    assert told["level"] == "AMPERE_PLUS"
    assert told["pools"] == {"WORKSPACE": 256 << 20}
    assert engine.target.capabilities == ("ampere-plus",)


def test_tf32_is_allowed_only_where_it_is_asked_for(fake):
    assert built(fake)[1]["flags"] == []
    assert built(fake, tf32=True)[1]["flags"] == ["TF32"]


def test_tensorrt_itself_allows_tf32_until_it_is_told_not_to(tensorrt):
    trt = tensorrt.module
    with recorded_messages(trt) as (log, _):
        builder = trt.Builder(log)
        for allowed in (True, False):
            config = builder.create_builder_config()
            assert config.get_flag(trt.BuilderFlag.TF32)
            _apply(trt, config, EngineSettings(tf32=allowed))
            assert config.get_flag(trt.BuilderFlag.TF32) == allowed


def test_a_timing_cache_is_read_and_written(fake, tmp_path):
    path = tmp_path / "times"
    built(fake, timing_cache=path)
    assert path.read_bytes() == b"+timed"
    built(fake, timing_cache=path)
    assert path.read_bytes() == b"+timed+timed"
    assert [entry.name for entry in tmp_path.iterdir()] == ["times"]


def test_a_timing_cache_that_tensorrt_refuses_is_an_error_and_stands_as_it_was(fake, tmp_path):
    path = tmp_path / "times"
    path.write_bytes(b"damaged")
    with pytest.raises(ExportError, match=r"got a cache that TensorRT refuses: .* delete it") as error:
        built(fake, timing_cache=path)
    assert path.read_bytes() == b"damaged"
    assert "damaged, or of another version or GPU" in error.value.got
    with pytest.raises(ExportError, match=r"Is a directory, wanted a readable file"):
        built(fake, timing_cache=tmp_path)


def test_a_timing_cache_in_no_folder_is_refused_with_the_other_settings(fake, tmp_path):
    with pytest.raises(ExportError, match=r"got no folder .*none, wanted a file in a folder that is there"):
        check_settings(fake, EngineSettings(timing_cache=tmp_path / "none" / "times"))


def test_timings_that_cannot_be_written_are_a_note_and_the_engine_stays(fake, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    engine, _ = built(fake, timing_cache=tmp_path / "times")
    assert engine.content
    assert "times was not written (No space left on device); the engine is whole" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def _behind_casts(makers, name):
    """Operator that makes a tensor, casts looked through."""
    while name in makers and makers[name].op_type == "Cast":
        name = makers[name].input[0]
    return makers[name].op_type if name in makers else ""


def _drop_outputs(graph):
    del graph.output[1:]


def _drop_channels(graph):
    del graph.input[0].type.tensor_type.shape.dim[3]


def _fix_batch(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def _unknown_operator(graph):
    graph.node.append(helper.make_node("Frobnicate", ["logits"], ["more"], name="frob"))


def _flat_input():
    """A graph with the names of the contract, for rows of nine values."""
    names = ("logits", "trace_similarity", "embeddings", "evidence")
    cast = [helper.make_node("Cast", ["images"], [name], to=TensorProto.FLOAT) for name in names]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 9]) for name in names]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 9])
    graph = helper.make_graph(cast, "flat", [images], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
