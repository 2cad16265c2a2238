"""Images that strangers hand in."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convmask.data.errors import DatasetError
from convmask.demo.uploads import UploadLimits, read_upload, reduced

LIMITS = UploadLimits(bytes=200_000, pixels=1_000_000, side=100)


def _png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of this size; nothing of its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_an_image_is_read_and_reduced(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (300, 150), (10, 200, 30)).convert(mode).save(path)
    image = read_upload(path, "photo.png", LIMITS)
    assert image.shape == (150, 300, 3) and reduced(image, 300) is image
    image = reduced(image, LIMITS.side)
    assert image.shape == (50, 100, 3) and image.dtype == np.uint8
    if mode == "RGB":
        assert image[0, 0].tolist() == [30, 200, 10]


@pytest.mark.parametrize(("width", "height"), [(2000, 1000), (100_000, 100_000)])
def test_many_pixels_are_refused_by_the_header(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "secret_folder_name.png"
    path.write_bytes(_png_header(width, height))
    with pytest.raises(DatasetError, match=r"bomb\.png has .*pixels") as error:
        read_upload(path, "bomb.png", LIMITS)
    assert "secret_folder_name" not in str(error.value)


def test_large_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(b"\0" * 300_000)
    with pytest.raises(DatasetError, match=r"large\.png has 0\.3 MiB; at most 0\.19"):
        read_upload(path, "large.png", LIMITS)


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", b"\xff\xd8\xff broken", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>"],
)
def test_what_is_no_image_gives_a_message(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"photo\.jpg is no image"):
        read_upload(path, "photo.jpg", LIMITS)


def test_a_truncated_image_gives_a_message_without_the_path(tmp_path: Path) -> None:
    path = tmp_path / "stored.png"
    pixels = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DatasetError, match=r"'photo\.png' cannot be read") as error:
        read_upload(path, "photo.png", LIMITS)
    assert str(tmp_path) not in str(error.value)
