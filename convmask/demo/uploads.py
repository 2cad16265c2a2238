"""Images that strangers hand in: nothing is decoded before it is known to be small enough and of a harmless format."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from convmask.data.errors import DatasetError
from convmask.data.images import read_image

# Formats that Pillow decodes itself. Others (EPS) would be handed to programs that execute what is in the file.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


@dataclass(frozen=True)
class UploadLimits:
    """What is accepted.

    Attributes:
        bytes: size of a file.
        pixels: of an image, read from its header before anything is decoded.
        side: what :func:`reduced` leaves of the longer side, of a data set's images too.
    """

    bytes: int = 20 * 2**20
    pixels: int = 40_000_000
    side: int = 1280


def read_upload(path: str | Path, name: str, limits: UploadLimits) -> np.ndarray:
    """Reads an uploaded image; see :func:`~convmask.data.images.read_image` for modes and orientation.

    Args:
        path: of the file.
        name: that the user knows it by; messages have it instead of the path.
        limits: see :class:`UploadLimits`.

    Returns:
        (H, W, 3) uint8 BGR, in its own size.

    Raises:
        DatasetError: the file is larger, has more pixels, is of another format, or cannot be read.
    """
    size = Path(path).stat().st_size
    if size > limits.bytes:
        raise DatasetError(f"{name} has {size / 2**20:.1f} MiB; at most {limits.bytes / 2**20:g} MiB are read")
    width, height = _size_by_header(path, name)
    if width * height > limits.pixels:
        raise DatasetError(
            f"{name} has {width} x {height} pixels; at most {limits.pixels / 1e6:g} million are decoded: reduce it"
        )
    try:
        return read_image(str(path), "BGR")
    except DatasetError as error:
        raise DatasetError(str(error).replace(repr(str(path)), repr(name))) from error


def reduced(image: np.ndarray, side: int) -> np.ndarray:
    """An image (H, W, 3) uint8 in the same proportions, its longer side ``side`` pixels at most."""
    longest = max(image.shape[:2])
    if longest <= side:
        return image
    scale = side / longest
    smaller = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return np.ascontiguousarray(cv2.resize(image, smaller, interpolation=cv2.INTER_AREA))


def _size_by_header(path: str | Path, name: str) -> tuple[int, int]:
    """(width, height), nothing decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return image.size
    except Image.DecompressionBombError as error:
        raise DatasetError(f"{name} has too many pixels: {error}") from error
    # whatever a decoder makes of a header that is not what it should be
    except Exception as error:
        known = ", ".join(FORMATS)
        raise DatasetError(f"{name} is no image that can be read, or is damaged (formats: {known})") from error
