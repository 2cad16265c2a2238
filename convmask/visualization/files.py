"""Writing pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from convmask.utils.files import write_atomically


def save_image(path: str | Path, image: np.ndarray) -> Path:
    """Writes an RGB picture (H, W, 3) uint8; the format follows from the suffix. No half-written file is left behind.

    Raises:
        ValueError: the suffix names no format.
        OSError: the file cannot be written.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown file extension {path.suffix!r}")
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, encoded.getvalue())
    return path
