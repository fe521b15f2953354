"""JPEG bytes to the model's input: the runtime's decoding and cropping against Pillow with torchvision."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.pictures import jpeg_bytes, photograph
from runtime.changes import UNCHANGED, Looks, picture_crops
from runtime.limits import MAX_PIXELS
from runtime.preprocess import PreprocessSpec

SPEC = PreprocessSpec()
SIZES = {"256 px": (256, 256), "12 MP": (3000, 4000)}


def with_torchvision(data: bytes) -> torch.Tensor:
    """Centre crop (3, H, W) uint8 as a PyTorch project makes it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return v2.functional.center_crop(v2.functional.pil_to_tensor(image), [SPEC.height, SPEC.width])


def with_runtime(data: bytes) -> np.ndarray:
    """Centre crop (H, W, 3) uint8 as the runtime makes it."""
    (crop,) = picture_crops(data, SPEC, Looks("center", UNCHANGED), max_pixels=MAX_PIXELS)
    return crop


@pytest.fixture(params=SIZES)
def picture(request):
    data = jpeg_bytes(photograph(*SIZES[request.param]))
    expected = with_torchvision(data).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(with_runtime(data), expected)
    return request.param, data


@pytest.mark.parametrize("way", [with_torchvision, with_runtime])
def bench_preprocess(benchmark, picture, way):
    size, data = picture
    benchmark.group = f"decode and crop, {size} JPEG"
    benchmark.name = {with_torchvision: "Pillow + torchvision", with_runtime: "ntf runtime"}[way]
    benchmark.extra_info["baseline"] = way is with_torchvision
    benchmark(way, data)
