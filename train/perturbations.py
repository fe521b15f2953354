"""What happens to a picture on its way: blur, compression, noise, scaling, a messenger's thumbnail.

Pure functions of (h, w, 3) uint8 arrays; the same input gives the same output. Blur, JPEG, noise and scaling are the
four operations of Fig. 5 of Liang et al. 2024 (arXiv:2403.16513), which does not say how they were done.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from runtime.errors import PictureError

Pixels: TypeAlias = NDArray[np.uint8]
Operation: TypeAlias = Literal["blur", "jpeg", "noise", "scale", "webp", "thumbnail"]

SUBSAMPLING = "4:2:0"  # what cameras, browsers and messengers write
WEBP_MAX_SIDE = 16383  # of the format
THUMBNAIL_QUALITY = 80  # JPEG quality of a preview, about what messengers use


@dataclass(frozen=True)
class OperationSpec:
    """One operation over its strengths.

    Attributes:
        title: what it is called.
        axis: the strength with its unit.
        identity: strength at which nothing happens; infinite where no strength does that.
        lowest: smallest strength that makes sense, inclusive.
        highest: largest, inclusive.
        whole: strengths are whole numbers.
        rising: a larger strength is farther from the untouched picture; curves begin with what is nearest.
    """

    title: str
    axis: str
    identity: float
    lowest: float
    highest: float
    whole: bool
    rising: bool


OPERATIONS: dict[Operation, OperationSpec] = {
    "blur": OperationSpec("Gaussian blur", "standard deviation in pixels", 0.0, 0.0, 100.0, False, True),
    "jpeg": OperationSpec("JPEG", "quality", np.inf, 1.0, 100.0, True, False),
    "noise": OperationSpec("Gaussian noise", "standard deviation in levels of 255", 0.0, 0.0, 255.0, False, True),
    "scale": OperationSpec("Scaling", "factor of both sides", 1.0, 0.01, 16.0, False, True),
    "webp": OperationSpec("WebP", "quality", np.inf, 1.0, 100.0, True, False),
    "thumbnail": OperationSpec(
        f"Thumbnail and back, JPEG {THUMBNAIL_QUALITY}", "largest side in pixels", np.inf, 1.0, 16384.0, True, False
    ),
}


def perturbed(rgb: Pixels, operation: Operation, strength: float, *, key: str, seed: int = 0) -> Pixels:
    """Picture after one operation; the identity's strength gives back `rgb` itself.

    Args:
        rgb: (h, w, 3) uint8.
        operation: a key of `OPERATIONS`.
        strength: within the operation's `lowest` and `highest`.
        key: hexadecimal digest of the picture's content; with `seed` it decides the noise.
        seed: of the noise.
    """
    if strength == OPERATIONS[operation].identity:
        return rgb
    if operation == "noise":
        return gaussian_noise(rgb, strength, np.random.default_rng([seed, int(key, 16)]))
    keyless: dict[str, Callable[[Pixels, float], Pixels]] = {
        "blur": gaussian_blur,
        "jpeg": lambda pixels, quality: jpeg_round_trip(pixels, int(quality)),
        "scale": rescaled,
        "webp": lambda pixels, quality: webp_round_trip(pixels, int(quality)),
        "thumbnail": lambda pixels, side: thumbnail_round_trip(pixels, int(side)),
    }
    return keyless[operation](rgb, strength)


def gaussian_blur(rgb: Pixels, sigma: float) -> Pixels:
    """Picture of the same size, blurred in rows and columns, mirrored at its borders.

    Args:
        rgb: (h, w, 3) uint8.
        sigma: standard deviation in pixels, 0 or more.
    """
    return _levels(gaussian_filter(rgb.astype(np.float32), sigma=(sigma, sigma, 0.0)))


def gaussian_noise(rgb: Pixels, std: float, rng: np.random.Generator) -> Pixels:
    """Picture of the same size with independent noise on every pixel and channel.

    Args:
        rgb: (h, w, 3) uint8.
        std: standard deviation in levels of 0..255.
        rng: gives one standard normal field; the same state scales the same field, so that a curve over `std` shows the
            strength and not the draw.
    """
    return _levels(rgb + np.float32(std) * rng.standard_normal(rgb.shape, dtype=np.float32))


def jpeg_round_trip(rgb: Pixels, quality: int) -> Pixels:
    """Picture of the same size as a baseline JPEG with 4:2:0 chroma holds it.

    Args:
        rgb: (h, w, 3) uint8.
        quality: libjpeg's, 1 to 100.
    """
    return _pixels(_encoded(Image.fromarray(rgb), "JPEG", quality=quality, subsampling=SUBSAMPLING))


def webp_round_trip(rgb: Pixels, quality: int) -> Pixels:
    """Picture of the same size as a lossy WebP holds it.

    Args:
        rgb: (h, w, 3) uint8.
        quality: libwebp's, 1 to 100.

    Raises:
        PictureError: WebP cannot hold a picture of this size.
    """
    if max(rgb.shape[:2]) > WEBP_MAX_SIDE:
        raise PictureError(
            "WebP",
            got=f"{rgb.shape[1]}x{rgb.shape[0]} pixels",
            wanted=f"at most {WEBP_MAX_SIDE} on a side",
            remedy="leave the operation or the picture out",
        )
    return _pixels(_encoded(Image.fromarray(rgb), "WEBP", quality=quality))


def rescaled(rgb: Pixels, factor: float) -> Pixels:
    """Picture of another size, at least 1x1, bicubic and without aliasing when it is made smaller.

    Args:
        rgb: (h, w, 3) uint8.
        factor: of both sides, above 0.
    """
    height, width = (max(1, round(side * factor)) for side in rgb.shape[:2])
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))


def thumbnail_round_trip(rgb: Pixels, side: int) -> Pixels:
    """Picture of the same size after a messenger's preview: made smaller, stored as JPEG, enlarged again.

    Args:
        rgb: (h, w, 3) uint8.
        side: largest side of the preview in pixels; a picture that is no larger is stored as JPEG alone.
    """
    small = Image.fromarray(rgb)
    small.thumbnail((side, side))
    stored = _pixels(_encoded(small, "JPEG", quality=THUMBNAIL_QUALITY, subsampling=SUBSAMPLING))
    if stored.shape == rgb.shape:
        return stored
    return np.asarray(Image.fromarray(stored).resize((rgb.shape[1], rgb.shape[0]), Image.Resampling.BICUBIC))


def _levels(values: NDArray[np.float32]) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _encoded(image: Image.Image, form: str, **options: int | str) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    buffer.seek(0)
    return buffer


def _pixels(stream: io.BytesIO) -> Pixels:
    with Image.open(stream) as picture:
        return np.asarray(picture.convert("RGB"))
