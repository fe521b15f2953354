"""The limit that commands name before anything heavy is imported."""

from __future__ import annotations

# 100 megapixels are a 400 MB Pillow image: the largest that one decoding thread may hold.
MAX_PIXELS = 100_000_000
