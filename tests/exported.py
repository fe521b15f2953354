"""Tiny detectors, graphs and run folders for the tests of export; made once for each process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn
from training import tiny_config, write_pictures

from export.calibration import PreparedPictures
from export.graph import float_tensors
from export.int8 import Quantizer
from export.onnx_export import onnx_from_model
from export.precision import fp16_from_fp32, fp32_layers
from export.quantize import float_layers, layer_errors, plan_quantization, quantized_tensors
from export.ranges import clipped_ranges, largest_magnitudes, magnitude_histograms
from export.session import open_session
from export.trt import main
from runtime.manifest import INPUT_NAME, OUTPUTS
from runtime.preprocess import PreprocessSpec
from train.checkpoint import STAGE2_FILE, save_calibration, save_weights
from train.data import load_split
from train.encoder import Encoder
from train.loss_backend import LossBackend
from train.metrics import fit_calibration
from train.model import NTFDetector
from train.run import load_training_data, write_config
from train.scoring import score_pictures

EXPORT_OPTIONS = ("--calibration-pictures", "24", "--max-batch", "4", "--opt-batch", "2")
ENCODERS = ("test_resnet", "test_efficientnet")
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def scratch() -> Path:
    """A folder that lives as long as the process."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="ntf-export-"))
    return Path(_KEPT[-1].name)


@functools.cache
def pictures() -> Path:
    """Two pictures of each class for training and twenty for validation."""
    return write_pictures(scratch(), counts={"train": 2, "val": 20})


@functools.cache
def detector(encoder: str) -> NTFDetector:
    """Untrained detector whose classifier is turned and scaled until it tells the two classes apart.

    Its batch norm statistics are such that a wrong fold would show. Callers do not change it.
    """
    torch.manual_seed(0)
    made = NTFDetector(Encoder(encoder), 128, "projection")
    generator = torch.Generator().manual_seed(1)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    made.mean_trace.normal_(generator=generator)
    records = load_split(pictures(), "val").records
    logits = score_pictures(made.eval(), records, progress=False).logits
    fake = np.array([record.label == 1 for record in records])
    gain = 4.0 / float(logits[fake].mean() - logits[~fake].mean())
    with torch.no_grad():
        made.classifier.weight.mul_(gain)
        made.classifier.bias.sub_(float(logits.mean())).mul_(gain)
    return made


@functools.cache
def images(count: int = 8) -> np.ndarray:
    """Validation pictures as the model sees them, (count, 160, 160, 3) uint8."""
    found = PreparedPictures(load_split(pictures(), "val"), PreprocessSpec(160, 160), "0" * 64)
    return np.concatenate(list(found.batches()))[:: max(1, len(found) // count)][:count]


def batches():
    """The same pictures in batches of four."""
    return iter(np.split(images(), 2))


@functools.cache
def fp32_graph(encoder: str) -> onnx.ModelProto:
    """FP32 graph of `detector(encoder)`; callers do not change it."""
    return onnx_from_model(detector(encoder))


@functools.cache
def magnitudes(encoder: str) -> dict[str, float]:
    """Largest magnitude of each activation of the FP32 graph."""
    return largest_magnitudes(fp32_graph(encoder), float_tensors(fp32_graph(encoder)), batches)


@functools.cache
def quantizer(encoder: str) -> Quantizer:
    """`quantizer_of` the FP32 graph of `detector(encoder)`."""
    return quantizer_of(fp32_graph(encoder), magnitudes(encoder))


def quantizer_of(fp32: onnx.ModelProto, magnitudes: dict[str, float]) -> Quantizer:
    """Ranges and corrections of the whole plan of a graph, measured on `images()`."""
    plan = plan_quantization(fp32, float_layers(fp32))
    largest = {name: magnitudes[name] for name in quantized_tensors(fp32, plan)}
    ranges = clipped_ranges("mse", magnitude_histograms(fp32, largest, batches), largest)
    return Quantizer("minmax", fp32, plan, ranges, layer_errors(fp32, plan, ranges, batches))


@functools.cache
def graphs(encoder: str) -> dict[str, onnx.ModelProto]:
    """Graphs by precision; "int8+fp16" is INT8 with an FP16 remainder."""
    fp32, largest = fp32_graph(encoder), magnitudes(encoder)
    keep = fp32_layers(fp32, largest)
    int8 = quantizer(encoder).graph(quantizer(encoder).plan)
    return {
        "fp32": fp32,
        "fp16": fp16_from_fp32(fp32, keep),
        "int8": int8,
        "int8+fp16": fp16_from_fp32(int8, keep),
    }


def run_graph(model: onnx.ModelProto, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs of a graph by name, on the CPU."""
    return dict(zip(OUTPUTS, open_session(model).run(list(OUTPUTS), {INPUT_NAME: pixels}), strict=True))


@functools.cache
def finished_run() -> Path:
    """A run folder as training leaves it, of `detector("test_resnet")`."""
    config = tiny_config(pictures())
    run = scratch() / "tiny"
    run.mkdir()
    made = detector("test_resnet")
    write_config(run, config, load_training_data(config), LossBackend("reference", "no loss was computed"))
    save_weights(run / STAGE2_FILE, made)
    records = load_split(pictures(), "val").records
    logits = score_pictures(made, records, progress=False).logits
    labels = np.array([record.label for record in records])
    save_calibration(run, fit_calibration(logits, labels, real_flagged_rate=0.1, fake_missed_rate=0.1))
    return run


@functools.cache
def full_bundle() -> Path:
    """Bundle of all three precisions, made by the command itself; callers do not change it."""
    folder = scratch() / "models" / "tiny"
    assert main(["--run", str(finished_run()), "--model", str(folder), *EXPORT_OPTIONS]) == 0
    return folder
