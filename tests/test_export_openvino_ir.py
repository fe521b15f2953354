"""OpenVINO IR of a bundle's graphs: scores, names, facts and bytes, and what is refused."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import onnx
import pytest
from bundle_fixtures import CALIBRATION, numpy_outputs, random_images, tiny_graph, write_bundle
from training import write_pictures

import export.openvino_ir
from export.calibration import PreparedPictures
from export.errors import ExportError
from export.openvino_ir import checked_ir, ir_from_onnx, main, opened_ir
from runtime.bundle import open_bundle
from runtime.manifest import OUTPUTS
from train.data import load_split

openvino = pytest.importorskip("openvino")


def run_main(bundle, out, *arguments):
    return main(["--model", str(bundle), "--out", str(out), *arguments])


def test_the_ir_gives_the_scores_of_the_graph_at_every_batch_size(tmp_path, tiny_bundle):
    assert run_main(tiny_bundle, tmp_path / "ir") == 0
    images = random_images(5)
    infer = opened_ir(*((tmp_path / "ir" / f"model.fp32.{ending}").read_bytes() for ending in ("xml", "bin")))
    for batch in (images, images[:1], images[:3]):
        outputs = infer(batch)._asdict()
        for name, expected in numpy_outputs(batch).items():
            np.testing.assert_allclose(outputs[name], expected, atol=1e-5, err_msg=name)


def test_every_precision_is_written_unless_some_are_asked_for(tmp_path, capsys):
    write_bundle(tmp_path / "tiny", precisions=("fp32", "int8"))
    assert run_main(tmp_path / "tiny", tmp_path / "ir") == 0
    names = {f"model.{precision}.{ending}" for precision in ("fp32", "int8") for ending in ("xml", "bin")}
    assert {path.name for path in (tmp_path / "ir").iterdir()} == names
    assert "as model.int8.onnx in openvino on 8 pictures" in capsys.readouterr().out
    assert run_main(tmp_path / "tiny", tmp_path / "ir", "--precisions", "int8") == 0
    assert {path.name for path in (tmp_path / "ir").iterdir()} == {"model.int8.xml", "model.int8.bin"}


def test_thresholds_and_hashes_stand_in_the_ir(tmp_path, tiny_bundle):
    assert run_main(tiny_bundle, tmp_path / "ir") == 0
    graph = openvino.Core().read_model(tmp_path / "ir" / "model.fp32.xml")
    facts = {key: graph.get_rt_info(["ntf", key]).astype(str) for key in graph.get_rt_info(["ntf"]).astype(dict)}
    model, manifest = ((tiny_bundle / name).read_bytes() for name in ("model.fp32.onnx", "manifest.json"))
    assert float(facts["temperature"]) == CALIBRATION.temperature
    assert float(facts["real_threshold"]) == CALIBRATION.real_threshold
    assert float(facts["fake_threshold"]) == CALIBRATION.fake_threshold
    assert facts["source_sha256"] == hashlib.sha256(model).hexdigest()
    assert facts["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert facts["labels"] == "real,fake"


def test_equal_graphs_give_equal_bytes():
    assert ir_from_onnx(tiny_graph(), {"b": "1", "a": "2"}) == ir_from_onnx(tiny_graph(), {"a": "2", "b": "1"})
    assert ir_from_onnx(tiny_graph(), {}) != ir_from_onnx(tiny_graph(offset=1.0), {})


def test_tensors_have_the_names_of_the_contract_and_no_others():
    model = onnx.load_from_string(tiny_graph())
    for node in model.graph.node:
        node.output[:] = ["a_second_name" if name == "logits" else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Identity", ["a_second_name"], ["logits"]))
    graph = openvino.Core().read_model(*ir_from_onnx(model.SerializeToString(), {}))
    assert [port.get_names() for port in graph.inputs] == [{"images"}]
    assert [port.get_names() for port in graph.outputs] == [{name} for name in OUTPUTS]
    assert str(graph.inputs[0].partial_shape) == "[?,16,16,3]"


def test_pictures_of_a_run_are_compared_beside_the_golden_inputs(tmp_path, tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    pictures = load_split(write_pictures(tmp_path, counts={"val": 3}), "val")
    prepared = PreparedPictures(pictures, bundle.manifest.preprocess, "0" * 64)
    parity = checked_ir(bundle, bundle.manifest.artifacts[0], prepared).parity
    assert parity.pictures == 8 + len(pictures)
    assert parity.passed
    assert parity.backend == "openvino IR"
    assert parity.reference == "model.fp32.onnx in openvino"


@pytest.mark.parametrize(("index", "what"), [(0, "largest logit difference"), (2, "embeddings differ by")])
def test_an_ir_with_other_outputs_is_refused_and_nothing_is_written(
    tmp_path, tiny_bundle, monkeypatch, capsys, index, what
):
    real = export.openvino_ir.opened_ir

    def wrong(xml, weights):
        infer = real(xml, weights)

        def changed(images):
            outputs = list(infer(images))
            outputs[index] = outputs[index] + np.float32(0.1)
            return export.openvino_ir.Outputs(*outputs)

        return changed

    monkeypatch.setattr(export.openvino_ir, "opened_ir", wrong)
    assert run_main(tiny_bundle, tmp_path / "ir") == 1
    error = capsys.readouterr().err
    assert "OpenVINO IR of model.fp32.onnx: got scores unlike those of the graph" in error
    assert what in error
    assert not (tmp_path / "ir").exists()


def test_scores_that_are_no_numbers_are_refused(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    outputs = opened_ir(*ir_from_onnx(tiny_graph(), {}))(random_images(2))
    with pytest.raises(ExportError, match="evidence differ by nan"):
        export.openvino_ir.compared(
            bundle, bundle.manifest.artifacts[0], [(outputs._replace(evidence=outputs.evidence * np.nan), outputs)]
        )


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, tiny_bundle, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run_main(tiny_bundle, tmp_path) == 1
    assert "holds something else than IR files" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_precision_that_the_bundle_lacks_is_an_error(tmp_path, tiny_bundle, capsys):
    assert run_main(tiny_bundle, tmp_path / "ir", "--precisions", "fp16") == 1
    assert "--precisions fp16: got a bundle with fp32" in capsys.readouterr().err


def test_a_run_that_the_bundle_is_not_from_is_an_error(tmp_path, tiny_bundle, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stage2.safetensors").write_bytes(b"others")
    assert run_main(tiny_bundle, tmp_path / "ir", "--run", str(tmp_path / "run")) == 1
    assert "the checkpoint that" in capsys.readouterr().err


def test_without_openvino_the_error_says_what_to_install(tmp_path, tiny_bundle, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert run_main(tiny_bundle, tmp_path / "ir") == 1
    assert 'pip install "ntf-toolkit[cpu]"' in capsys.readouterr().err
