"""What a verification found as gates, JSON, Markdown and pictures; made by hand, so that nothing is trained."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from bundle_fixtures import CALIBRATION, parity
from PIL import Image

from export.batch_invariance import BatchInvariance
from export.latency import Latency, LatencySweep, LeftOut
from export.layer_comparison import EQUAL_DB, WORST_DB, LayerComparison, TensorError
from export.report import check_table, latency_table
from export.verification import Scores, Verification, verification_json
from export.verification_report import verification_markdown, write_verification
from runtime.golden import GoldenCheck

ABOUT = {
    "model": "a_b *model*",
    "checkpoint_sha256": "c" * 64,
    "data_sha256": "d" * 64,
    "environment": {
        "machine": {"cpu": "a CPU", "cores": 2, "system": "Linux", "python": "3.11"},
        "versions": {"onnxruntime": "1.2"},
        "tool_version": "0.1",
        "tool_commit": "unknown",
    },
}
LAYERS = LayerComparison(
    "int8",
    16,
    10.0,
    (
        TensorError("images", "images", "cast", "Cast", EQUAL_DB, EQUAL_DB, 0.0, 0.0),
        TensorError("a", "a", "conv_1", "Conv", 12.0, 12.0, 0.3, 0.2),
        TensorError("a", "a.dq", "a.dequantize", "DequantizeLinear", 11.0, 18.0, 0.3, 0.2),
    ),
    (),
    ("extra",),
)
SWEEP = LatencySweep(
    (
        Latency("int8", "onnxruntime", "graph", 1, 9, 1.5, None, None, None, 0.1, 666.7),
        Latency("int8", "onnxruntime", "graph", 2, 9, 2.5, None, None, None, 0.1, 800.0),
    ),
    (LeftOut("int8", "onnxruntime", "end to end", 1, "5 calls of 1 s at batch 1 do not fit into 3 s"),),
)


@pytest.fixture
def sound():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=8).astype(np.float32)
    scores = Scores(np.arange(8) % 2, reference, CALIBRATION, {("int8", "onnxruntime"): reference + np.float32(0.1)})
    return Verification(
        scores,
        (("int8", parity()),),
        {"int8 on onnxruntime": []},
        (
            GoldenCheck(
                "int8", "onnxruntime", {"logits": 0.01, "embeddings": 0.002}, {"logits": 0.1, "embeddings": 0.01}, "why"
            ),
        ),
        (BatchInvariance("int8", "onnxruntime", 64, 0.0, 0.01, "black", 3),),
    )


def test_a_sound_bundle_breaks_no_gate(sound):
    assert (sound.failures, sound.passed) == ({}, True)


def broken_golden(result):
    (check,) = result.golden
    return replace(result, golden=(replace(check, differences=check.differences | {"logits": float("nan")}),))


def broken_batches(result):
    (check,) = result.invariance
    return replace(result, invariance=(replace(check, logit_diff_max=float("inf")),))


def broken_layers(result):
    first, second, last = LAYERS.layers
    return replace(result, layers=(replace(LAYERS, layers=(first, replace(second, sqnr_db=WORST_DB), last)),))


def broken_parity(result):
    return replace(result, broken={"int8 on onnxruntime": ["AP loss in points 3, at most 1"]})


GATES = {
    broken_golden: ("golden inputs of int8 on onnxruntime", "logits off by nan %, at most 10 %"),
    broken_batches: ("batch invariance of int8 on onnxruntime", "the logit of black moves by inf at place 3"),
    broken_layers: (
        "layers of int8",
        "tensor a of node conv_1 (Conv) is the first with too much noise: SQNR -200.0 dB",
    ),
    broken_parity: ("int8 on onnxruntime", "AP loss in points 3, at most 1"),
}


@pytest.mark.parametrize("breaking", GATES)
def test_each_gate_fails_the_verification_and_is_named(sound, breaking):
    where, words = GATES[breaking]
    result = breaking(sound)
    assert not result.passed
    assert list(result.failures) == [where]
    assert result.failures[where][0].startswith(words)
    assert f"FAIL {where}: " in verification_markdown(result, ABOUT).replace("\\", "")
    found = json.loads(verification_json(result, ABOUT))
    assert (found["passed"], list(found["failures"])) == (False, [where])


def test_json_has_every_figure_and_null_where_one_is_not_finite(sound):
    result = replace(broken_batches(sound), layers=(LAYERS,), latency=SWEEP)
    found = json.loads(verification_json(result, ABOUT), parse_constant=lambda name: pytest.fail(name))
    assert found["batch_invariance"]["checks"][0]["logit_diff_max"] is None
    assert found["comparisons"][0] | {"broken": []} == found["comparisons"][0]
    assert [layer["sqnr_db"] for layer in found["layers"][0]["layers"]] == [200.0, 12.0, 11.0]
    assert found["layers"][0]["graph_only"] == ["extra"]
    assert found["latency"]["measured"][0]["p50_ms"] == 1.5
    assert found["latency"]["left_out"][0]["stage"] == "end to end"
    assert found["logits"]["labels"] == [0, 1] * 4
    assert found["logits"]["int8 on onnxruntime"] == pytest.approx(np.array(found["logits"]["torch fp32"]) + 0.1)
    assert found["environment"] == ABOUT["environment"]


def test_markdown_has_a_section_for_each_check_and_says_where_it_was_measured(sound):
    text = verification_markdown(replace(sound, layers=(LAYERS,), latency=SWEEP), ABOUT)
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == [
        r"# Verification of a_b \*model\*",
        "## Against PyTorch FP32",
        "## Golden inputs",
        "## Batch invariance",
        "## Layers of int8 against fp32",
        "## Latency",
        "## Where this comes from",
    ]
    assert "Passed: every gate holds." in text
    assert "| int8 | onnxruntime | 1 of 10 % | 0.2 of 1 % | pass |" in text
    assert "| a.dq | a.dequantize | DequantizeLinear | 11.0 | 18.0 | 0.3 | 0.2 |" in text
    assert "Without a counterpart in fp32: extra; in int8: none." in text
    assert "| int8 on onnxruntime | 1.50 ± 0.10 | 2.50 ± 0.10 |" in text
    assert "- left out: int8 on onnxruntime, end to end, from batch 1 on: 5 calls" in text
    assert "machine: a CPU, 2 cores" in text


def test_an_output_that_was_not_stored_is_said_to_be_missing(sound):
    partial = GoldenCheck("fp32", "openvino", {"logits": 1e-6}, {"logits": 1e-4}, "other sums")
    text = verification_markdown(replace(sound, golden=(*sound.golden, partial)), ABOUT)
    assert "| fp32 | openvino | 0.0001 of 0.01 % | not stored | pass |" in text
    assert "- fp32 on openvino: other sums" in text


def test_pictures_are_written_for_what_was_done_and_older_ones_go(sound, tmp_path):
    everything = write_verification(tmp_path / "new", replace(sound, layers=(LAYERS,), latency=SWEEP), ABOUT)
    assert [path.name for path in everything] == [
        "verify.json",
        "verify.md",
        "verify_logits.png",
        "verify_layers.png",
        "verify_latency.png",
    ]
    text = (tmp_path / "new" / "verify.md").read_text()
    for path in everything[2:]:
        assert f"]({path.name})" in text
        with Image.open(path) as picture:
            assert min(picture.size) > 400
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    again = write_verification(tmp_path / "new", replace(sound, latency=LatencySweep((), SWEEP.left_out)), ABOUT)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {path.name for path in again}
    assert "verify_layers.png" not in {path.name for path in again}


def test_tables_for_the_screen_show_the_worst_and_what_was_left_out(sound):
    table = check_table(sound.golden, sound.invariance)
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["int8", "onnxruntime", "2.0e-03", "1e-02", "0.0e+00", "1e-02", "pass"]
    failed = check_table(broken_golden(sound).golden, sound.invariance)
    assert list(failed.columns[-1].cells) == ["FAIL"]
    cells = [next(iter(column.cells)) for column in latency_table(SWEEP).columns]
    assert cells == ["int8", "onnxruntime", "1.50", "left out", "left out", "left out"]
