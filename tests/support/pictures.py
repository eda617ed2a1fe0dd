"""Pictures for the tests of reading images."""

import io
from typing import Any

import numpy as np
from PIL import Image


def noise(height: int = 40, width: int = 48) -> Image.Image:
    """Make an image of noise, which compresses badly, so that a truncated file lacks pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the bytes of a file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
