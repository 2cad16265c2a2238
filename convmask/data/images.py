"""Reading images, panoptic id maps and semantic maps; everything that is wrong with a file is one kind of error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from convmask.data.errors import DatasetError

_Result = TypeVar("_Result")

FORMATS = ("BGR", "RGB")


def _read(file_name: str, what: str, convert: Callable[[Image.Image], _Result]) -> _Result:
    """Opens a file and converts it, with errors that name it.

    Untrusted files reach the decoders here: whatever they raise becomes a DatasetError.
    """
    try:
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            return convert(image)
    except DatasetError as error:
        raise DatasetError(f"{what} {file_name!r}: {error}") from error
    except FileNotFoundError as error:
        raise DatasetError(f"{what} {file_name!r} does not exist: {error.strerror or error}") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(
            f"{what} {file_name!r} is too large to be decoded: {error} (PIL.Image.MAX_IMAGE_PIXELS sets the limit)"
        ) from error
    except Exception as error:
        raise DatasetError(f"{what} {file_name!r} cannot be read: {error or type(error).__name__}") from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits (PIL modes I;16 and I) with the range 0 to 65535 scaled to 0 to 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DatasetError(f"values from {values.min()} to {values.max()} do not fit 16 bits")
    return Image.fromarray((values // 257).astype(np.uint8))


def _to_pixels(image: Image.Image, format: str) -> npt.NDArray[np.uint8]:
    if image.mode == "F":
        raise DatasetError("holds floating-point values: store it with 8 or 16 bits")
    # Before the conversion to 8 bits, which drops the tag.
    image = detection_utils._apply_exif_orientation(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    return np.ascontiguousarray(detection_utils.convert_PIL_to_numpy(image, format))


def read_image(file_name: str, format: str) -> npt.NDArray[np.uint8]:
    """Reads an image in any mode that PIL knows.

    The orientation of the EXIF tag is applied. Grey images get three equal channels, palettes and CMYK become RGB, an
    alpha channel is dropped (as Detectron2 does: colours under transparent pixels stay), and 16-bit values, whose range
    is taken as 0 to 65535, are scaled to 8 bits.

    Args:
        file_name: a path, or any name that Detectron2's ``PathManager`` opens.
        format: ``"BGR"`` or ``"RGB"``.

    Returns:
        (H, W, 3): values of 0 to 255, contiguous.

    Raises:
        DatasetError: the file is missing, truncated, no image, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``
            times two.
        ValueError: another format.
    """
    if format not in FORMATS:
        raise ValueError(f"image format is {format!r}, not one of {FORMATS}")
    return _read(file_name, "image", lambda image: _to_pixels(image, format))


def _to_ids(image: Image.Image) -> npt.NDArray[np.int32]:
    if image.mode in ("RGBA", "P"):
        image = image.convert("RGB")
    if image.mode != "RGB":
        raise DatasetError(f"is of mode {image.mode}, not a colour PNG with id = R + 256 G + 256^2 B")
    # PIL keeps four bytes a pixel: without the last one, they are those of a little-endian int32.
    packed = np.frombuffer(image.tobytes("raw", "RGBX"), dtype="<i4").reshape(image.height, image.width)
    return (packed & 0xFFFFFF).astype(np.int32, copy=False)


def read_panoptic_map(pan_seg_file_name: str) -> npt.NDArray[np.int32]:
    """Reads a panoptic id map in COCO's format.

    Args:
        pan_seg_file_name: a path, or any name that Detectron2's ``PathManager`` opens.

    Returns:
        (H, W): the segment id R + 256 G + 256^2 B of each pixel, 0 to 2^24 - 1; 0 is void.

    Raises:
        DatasetError: the file is missing, truncated, no image, or not a colour image.
    """
    return _read(pan_seg_file_name, "panoptic map", _to_ids)


def _to_labels(image: Image.Image) -> npt.NDArray[np.int32]:
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise DatasetError(f"is of mode {image.mode}, not a map with one label a pixel")
    labels = np.asarray(image).astype(np.int32)
    if labels.ndim != 2 or labels.min() < 0 or labels.max() > 65535:
        raise DatasetError("labels do not lie between 0 and 65535")
    return labels


def read_semantic_map(sem_seg_file_name: str) -> npt.NDArray[np.int32]:
    """Reads a semantic map: grey with 1, 8 or 16 bits, or a palette image, whose indices (not colours) are the labels.

    Args:
        sem_seg_file_name: a path, or any name that Detectron2's ``PathManager`` opens.

    Returns:
        (H, W): the label of each pixel, 0 to 65535.

    Raises:
        DatasetError: the file is missing, truncated, no image, or has several channels.
    """
    return _read(sem_seg_file_name, "semantic map", _to_labels)
