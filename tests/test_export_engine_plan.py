"""Layer plans, as TensorRT-RTX and TensorRT 10 print them."""

from __future__ import annotations

from tensorrt_fakes import PLAN

from export.engine_plan import EngineLayer, count_layers, read_layers

# As tensorrt_rtx 1.7 prints it, shortened.
RTX_PLAN = (
    "Layers:\n"
    "Name: shape, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0\n"
    "Name: conv, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [-1,4,8,8], Datatype: Half, Format: (NHWC) "
    "Channel major format }, { Name: r, Datatype: Half, Format: (Linear) Row major linear format }], Constants: [ { "
    "Name: w, Datatype: Int8, Format: (NHWC) }], Outputs: [ { Name: y, Datatype: Float, Format: (Linear) }], "
    "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: conv][ONNX Layer: Add_1]\n"
    "\nI/O Tensors:\n Name: images, IOMode: Input, DataType: UInt8, Dimensions: [-1,8,8,3]\n"
)


def test_layers_are_read_from_the_last_plan_of_the_log():
    messages = [("VERBOSE", "Layers:\n"), ("ERROR", "other"), ("VERBOSE", RTX_PLAN)]
    shape, conv = read_layers(messages)
    assert shape == EngineLayer("shape", "shape_call", (), (), ())
    assert conv == EngineLayer("conv", "correlation", ("Half", "Half"), ("Int8",), ("Float",), ("conv", "Add_1"))
    assert read_layers([("VERBOSE", RTX_PLAN), ("VERBOSE", "Layers:\n")]) == ()


def test_types_within_the_descriptions_of_tensorrt_10_are_read():
    reformat, conv = read_layers([("VERBOSE", PLAN)])
    assert (reformat.kind, reformat.types) == ("Reformat", "UInt8>Half")
    assert (conv.kind, conv.types, conv.nodes) == ("CaskConvolution", "Half", ("conv1", "Relu_1"))


def test_layers_are_counted_by_kind_and_types_without_those_that_move_no_data():
    layers = read_layers([("VERBOSE", RTX_PLAN)])
    assert count_layers([*layers, *layers]) == {"correlation Half>Float": 2}
    assert EngineLayer("add", "kgen", ("Int8", "Float"), (), ("Float",)).types == "Float+Int8>Float"
