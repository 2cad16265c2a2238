from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convmask.data.errors import DatasetError
from convmask.data.images import read_image, read_panoptic_map, read_semantic_map

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)


def save(image: Image.Image | np.ndarray, path: Path, **options: object) -> str:
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return str(path)


def test_formats_differ_in_the_order_of_channels(tmp_path: Path) -> None:
    name = save(COLOR, tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(name, "RGB"), COLOR)
    np.testing.assert_array_equal(read_image(name, "BGR"), COLOR[:, :, ::-1])
    assert read_image(name, "BGR").flags.c_contiguous
    with pytest.raises(ValueError, match="YUV"):
        read_image(name, "YUV-BT.601")


# What a camera held in the way of each EXIF orientation stores for the upright picture.
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(STORED[orientation](COLOR))
    name = save(stored, tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(name, "RGB"), COLOR)


def test_grey_gets_three_equal_channels(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(save(GREY, tmp_path / "a.png"), "RGB"), np.stack([GREY] * 3, axis=-1))


def test_bilevel_is_black_and_white(tmp_path: Path) -> None:
    name = save(Image.fromarray(GREY > 127), tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(name, "RGB")[..., 1], (GREY > 127) * np.uint8(255))


def test_alpha_is_dropped(tmp_path: Path) -> None:
    name = save(np.dstack([COLOR, GREY]), tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(name, "RGB"), COLOR)


def test_palette_becomes_its_colours(tmp_path: Path) -> None:
    indices = (GREY % 4).astype(np.uint8)
    palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    assert image.mode == "P"
    np.testing.assert_array_equal(read_image(save(image, tmp_path / "a.png"), "RGB"), palette[indices])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 65535], [256, 32896, 65278]], dtype=np.uint16)
    name = save(values, tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read_image(name, "RGB")[..., 0], [[0, 1, 255], [0, 128, 254]])


def test_16_bits_keep_their_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    values = (GREY.astype(np.uint16)) * 257
    name = save(values[::-1, ::-1].copy(), tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(name, "RGB")[..., 0], GREY)


def test_integers_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    name = save(np.array([[0, 70000]], dtype=np.int32), tmp_path / "a.tif")
    with pytest.raises(DatasetError, match=r"a\.tif.*70000"):
        read_image(name, "RGB")


def test_floats_are_refused(tmp_path: Path) -> None:
    name = save(np.ones((2, 2), dtype=np.float32), tmp_path / "a.tif")
    with pytest.raises(DatasetError, match=r"a\.tif.*floating"):
        read_image(name, "RGB")


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = Image.new("CMYK", (4, 3), (0, 255, 255, 0))
    pixels = read_image(save(image, tmp_path / "a.jpg", quality=100), "RGB")
    assert pixels.shape == (3, 4, 3)
    np.testing.assert_allclose(pixels[0, 0], (255, 0, 0), atol=3)


@pytest.mark.parametrize("read", [lambda name: read_image(name, "BGR"), read_panoptic_map, read_semantic_map])
@pytest.mark.parametrize("content", ["truncated", "text", "empty", "absent", "folder"])
def test_what_cannot_be_read_is_named(tmp_path: Path, read: object, content: str) -> None:
    path = tmp_path / "broken.png"
    if content == "truncated":
        save(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), path)
        path.write_bytes(path.read_bytes()[:4000])
    elif content == "folder":
        path.mkdir()
    elif content != "absent":
        path.write_bytes(b"" if content == "empty" else b"not an image")
    with pytest.raises(DatasetError, match=r"broken\.png"):
        read(str(path))  # type: ignore[operator]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp"])
def test_damaged_bytes_never_crash(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    save(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8), path)
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    rng = np.random.default_rng(1)
    for _ in range(40):
        damaged = whole.copy()
        damaged[rng.integers(len(whole), size=8)] = rng.integers(256, size=8)
        path.write_bytes(damaged.tobytes())
        try:
            assert read_image(str(path), "RGB").shape[2] == 3
        except DatasetError as error:
            assert path.name in str(error)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save(np.zeros((100, 100), dtype=np.uint8), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DatasetError, match=r"bomb\.png.*too large"):
        read_image(name, "RGB")


def test_panoptic_ids_use_three_bytes(tmp_path: Path) -> None:
    ids = read_panoptic_map(save(COLOR, tmp_path / "a.png"))
    expected = COLOR.astype(np.int64) @ (1, 256, 65536)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected)
    with_alpha = save(np.dstack([COLOR, GREY]), tmp_path / "b.png")
    np.testing.assert_array_equal(read_panoptic_map(with_alpha), expected)


def test_a_grey_panoptic_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"a\.png.*mode L"):
        read_panoptic_map(save(GREY, tmp_path / "a.png"))


def test_semantic_labels_are_palette_indices(tmp_path: Path) -> None:
    image = Image.fromarray(GREY)
    np.testing.assert_array_equal(read_semantic_map(save(image, tmp_path / "grey.png")), GREY)
    image.putpalette(bytes(range(256)) * 3)
    np.testing.assert_array_equal(read_semantic_map(save(image, tmp_path / "palette.png")), GREY)
    wide = GREY.astype(np.uint16) * 200
    np.testing.assert_array_equal(read_semantic_map(save(wide, tmp_path / "wide.png")), wide)
    with pytest.raises(DatasetError, match="mode RGB"):
        read_semantic_map(save(COLOR, tmp_path / "color.png"))
