"""Writing pictures."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image


def save_image(path: str | Path, image: np.ndarray) -> Path:
    """Writes an RGB picture (H, W, 3) uint8; the format follows from the suffix. No half-written file is left behind.

    Raises:
        ValueError: the suffix names no format.
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        Image.fromarray(image).save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
