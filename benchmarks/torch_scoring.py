"""What the runtime is timed against: Pillow, torchvision's crop and the same model in eager PyTorch, FP32."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from train.model import NTFDetector

REFERENCE = "Pillow + torchvision + PyTorch"


@torch.inference_mode()
def torch_logits(detector: NTFDetector, files: Sequence[bytes], *, size: int) -> NDArray[np.float32]:
    """Raw logits (N,) of N JPEG files, scored as one batch of their middles of size x size pixels."""
    crops = [
        v2.functional.center_crop(
            v2.functional.pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB")), [size, size]
        )
        for data in files
    ]
    logits: NDArray[np.float32] = detector(torch.stack(crops).permute(0, 2, 3, 1)).logits.numpy()
    return logits
