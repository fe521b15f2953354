"""The search for the INT8 graph that keeps within the accuracy budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from exported import fp32_graph, images, magnitudes, pictures, quantizer, run_graph

import export.int8
from export.budget import Budget, Cost
from export.calibration import PreparedPictures
from export.errors import ExportError
from export.int8 import BudgetError, int8_within_budget, layer_sensitivities, operations
from export.int8_report import search_markdown
from export.ranges import CALIBRATORS
from runtime.preprocess import PreprocessSpec
from train.data import load_split

ENCODER = "test_resnet"
BUDGET = Budget(ap=0.5, accuracy=1.0, flips=0.5, ece=2.0)


def calibration():
    return PreparedPictures(load_split(pictures(), "val"), PreprocessSpec(160, 160), "0" * 64).evenly_spaced(8)


class FakeJudge:
    """Calls a graph too expensive while any of the `sensitive` nodes computes in integers."""

    budget = BUDGET

    def __init__(self, *sensitive):
        self.sensitive = set(sensitive)
        self.judged = 0

    def costs(self, candidates):
        self.judged += 1
        assert [c.remainder for c in candidates] == ["fp32", "fp16"]
        model = onnx.load_from_string(candidates[0].content)
        integer = {n.name for n in model.graph.node if n.input and n.input[0].endswith(".dq")}
        flips = 50.0 if integer & self.sensitive else 0.0
        return (Cost("onnxruntime", 40, {"g": 0.0}, 0.0, flips, 0.0, 0.1),)


def search(judge, **options):
    return int8_within_budget(
        fp32_graph(ENCODER), magnitudes(ENCODER), calibration(), judge, for_engines=lambda model: model, **options
    )


@pytest.fixture(scope="module")
def order():
    """Nodes of the plan, the most sensitive first."""
    made = quantizer(ENCODER)
    return [s.name for s in layer_sensitivities(made, operations(made.model), calibration())]


def test_within_the_budget_the_whole_plan_is_quantised_and_no_layer_is_measured_by_itself():
    judge = FakeJudge()
    model, found = search(judge, calibrator="mse")
    assert judge.judged == 1
    assert found.returned == {}
    assert found.sensitivities == ()
    assert found.steps[0].int8_share > 0.9
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)


@pytest.mark.parametrize(("needed", "judged"), [(1, [0, 1]), (3, [0, 1, 2, 4, 3]), (6, [0, 1, 2, 4, 8, 6, 5])])
def test_as_few_of_the_most_sensitive_layers_are_returned_as_the_budget_needs(order, needed, judged, monkeypatch):
    order = [name for name in order if not name.startswith("Add")]  # the fake judge looks at first inputs alone
    monkeypatch.setattr(export.int8, "layer_sensitivities", lambda *arguments: sensitivities_in(order))
    model, found = search(FakeJudge(order[needed - 1]), calibrator="mse", smallest_share=0.0)
    assert list(found.returned) == order[:needed]
    assert [step.returned for step in found.steps] == judged
    assert [step.returned for step in found.steps if not step.excess][-1] == needed
    float_nodes = {n.name: n for n in model.graph.node}
    assert all(not float_nodes[name].input[0].endswith(".dq") for name in order[:needed])


def sensitivities_in(order):
    return tuple(export.int8.LayerSensitivity(name, 30.0, 1.0 - 0.01 * place, 0.01) for place, name in enumerate(order))


def test_a_budget_that_cannot_be_met_is_an_error_that_keeps_the_search(order):
    with pytest.raises(BudgetError, match=r"still verdict flips 50.00 points, at most 2.50 on onnxruntime") as caught:
        search(FakeJudge(*order), calibrator="mse", smallest_share=0.5)
    found = caught.value.search
    assert found.returned == {}
    assert all(step.excess for step in found.steps)
    assert all(step.int8_share >= 0.5 for step in found.steps)
    work, plan = operations(fp32_graph(ENCODER)), quantizer(ENCODER).plan
    further = plan.without([layer.name for layer in found.sensitivities[: found.steps[-1].returned + 1]])
    assert sum(work[name] for name in further.layers) < 0.5 * sum(work.values())
    table = search_markdown(found, BUDGET)
    assert order[0] in table
    assert table.count("| no |") == len(found.steps)


@pytest.mark.parametrize("share", [-0.1, 0.999, 50.0, float("nan")])
def test_a_share_that_the_network_does_not_have_is_refused(share):
    with pytest.raises(ExportError, match=r"--int8-share: got .*wanted 0 to 0\.9"):
        search(FakeJudge(), calibrator="mse", smallest_share=share)


def test_the_layer_whose_range_is_wrong_becomes_the_most_sensitive(order):
    made = quantizer(ENCODER)
    name = [name for name in order if name in made.errors][3]
    tensor = next(n.input[0] for n in made.model.graph.node if n.name == name)
    damaged = replace(made, ranges=made.ranges | {tensor: made.ranges[tensor] / 50})
    found = layer_sensitivities(damaged, operations(made.model), calibration())
    readers = {n.name for n in made.model.graph.node if tensor in n.input}
    assert {layer.name for layer in found[: len(readers)]} <= readers
    assert [layer.logit_std for layer in found] == sorted((layer.logit_std for layer in found), reverse=True)


def test_auto_takes_the_calibrator_that_changes_the_logits_least():
    _, found = search(FakeJudge())
    assert set(found.calibrators) == set(CALIBRATORS)
    assert found.calibrators[found.calibrator] == min(found.calibrators.values())
    _, named = search(FakeJudge(), calibrator="minmax")
    assert named.calibrators == {"minmax": pytest.approx(found.calibrators["minmax"])}


def test_operations_of_a_convolution_are_counted_by_hand():
    node = next(n for n in fp32_graph(ENCODER).graph.node if n.op_type == "Conv")
    weight = next(t for t in fp32_graph(ENCODER).graph.initializer if t.name == node.input[1])
    seen = onnx.shape_inference.infer_shapes(fp32_graph(ENCODER), data_prop=True)
    shape = next(v for v in seen.graph.value_info if v.name == node.output[0]).type.tensor_type.shape.dim
    rows, columns = shape[2].dim_value, shape[3].dim_value
    assert operations(fp32_graph(ENCODER))[node.name] == np.prod(weight.dims) * rows * columns


def test_a_graph_without_layers_cannot_be_quantised(monkeypatch):
    monkeypatch.setattr(export.int8, "float_layers", lambda model: {n.name: "kept" for n in model.graph.node})
    with pytest.raises(ExportError, match="without a convolution or matrix product"):
        search(FakeJudge())


def test_what_is_returned_is_what_fp32_computes(order, monkeypatch):
    monkeypatch.setattr(export.int8, "layer_sensitivities", lambda *arguments: sensitivities_in(order))
    model, _ = search(FakeJudge(order[-1]), calibrator="mse", smallest_share=0.0)
    np.testing.assert_allclose(
        run_graph(model, images())["logits"], run_graph(fp32_graph(ENCODER), images())["logits"], atol=1e-4
    )
