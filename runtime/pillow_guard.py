"""Pillow's process-wide settings held at known values while we decode, and put back afterwards.

`ImageFile.LOAD_TRUNCATED_IMAGES`, `Image.MAX_IMAGE_PIXELS` and the warning filters belong to the program that
embeds us: they must not change a score, and we must not change them. Pillow offers no per-call form, so they
are set aside while a picture is being decoded, and only where the host's values would change the result.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from PIL import Image, ImageFile

_lock = threading.Lock()
_depth = 0
_restore: ExitStack | None = None


@contextmanager
def neutral_pillow(max_pixels: int) -> Iterator[None]:
    """Context in which Pillow is silent, refuses truncated files and lets pictures of `max_pixels` pass.

    Args:
        max_pixels: largest picture, in pixels, that the caller accepts; the caller checks it itself.

    Note:
        Safe to enter from several threads at once: the first one in sets, the last one out restores. Other
        threads of the host see the changed values meanwhile, if any had to be changed.
    """
    global _depth, _restore
    with _lock:
        if _depth == 0:
            _restore = _silence_pillow()
        _depth += 1
        assert _restore is not None
        _set_aside(_restore, max_pixels)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0 and _restore is not None:
                _restore.close()
                _restore = None


def _silence_pillow() -> ExitStack:
    stack = ExitStack()
    stack.enter_context(warnings.catch_warnings())
    # Pillow warns with its own module as the origin; warnings of other modules stay as the host wants them.
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
    return stack


def _set_aside(stack: ExitStack, max_pixels: int) -> None:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        stack.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    limit = Image.MAX_IMAGE_PIXELS
    # Up to twice its limit Pillow only warns; above that it refuses.
    if limit is not None and 2 * limit < max_pixels:
        stack.callback(setattr, Image, "MAX_IMAGE_PIXELS", limit)
        Image.MAX_IMAGE_PIXELS = max_pixels
