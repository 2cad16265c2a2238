"""The pixels of a synthetic image: textures, colours, shadows, light and noise over a layout.

Colours of things and stuff come from one palette at random: shape gives the class of a thing, texture that of stuff.
All arithmetic is on integers, so an image is the same on every platform.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from convmask.data.synthetic_layout import COSINES, VERSION, IntArray, Layout, smooth_fields

# RGB. Any two can be told apart, in brightness or hue.
PALETTE = np.array(
    [
        (232, 76, 61),
        (243, 156, 52),
        (250, 214, 88),
        (120, 190, 72),
        (28, 138, 96),
        (52, 190, 188),
        (64, 142, 226),
        (44, 72, 152),
        (140, 92, 200),
        (226, 98, 170),
        (134, 84, 58),
        (240, 232, 214),
        (168, 176, 184),
        (70, 78, 90),
    ],
    dtype=np.int32,
)

# The length of one period of a texture, in pixels: least and greatest.
_PERIODS = {"stripes": (11, 17), "checker": (22, 32), "dots": (14, 19), "grain": (4, 4)}


def _rotated_phases(rng: np.random.Generator, height: int, width: int, period: int) -> tuple[IntArray, IntArray]:
    """Two (H, W) maps, along a random direction and across it, of which 256 steps are one period."""
    # cos is in 1/4096, so along and across are in 1/16 of such a step.
    angle = int(rng.integers(360))
    along, across = (int(value) for value in COSINES[[angle, (angle + 270) % 360]] // period)
    x, y = np.arange(width, dtype=np.int32)[None], np.arange(height, dtype=np.int32)[:, None]
    shift = rng.integers(0, 4096, 2)
    return (x * along + y * across + int(shift[0])) >> 4, (y * along - x * across + int(shift[1])) >> 4


def texture(rng: np.random.Generator, name: str, height: int, width: int) -> IntArray:
    """(H, W): how much of the second of two colours a pixel of a stuff class has, 0 to 256."""
    low, high = _PERIODS[name]
    period = int(rng.integers(low, high + 1))
    if name == "grain":
        cells = rng.integers(0, 257, (height // period + 1, width // period + 1), dtype=np.int32)
        return np.repeat(np.repeat(cells, period, axis=0), period, axis=1)[:height, :width]
    u, v = _rotated_phases(rng, height, width, period)
    if name == "stripes":
        return (u & 128) << 1
    if name == "checker":
        return ((u ^ v) & 128) << 1
    du, dv = (u & 255) - 128, (v & 255) - 128
    return np.where(du * du + dv * dv < 76 * 76, 256, 0).astype(np.int32)


def _mix(first: IntArray, second: IntArray, share: IntArray) -> IntArray:
    """(H, W, 3): between two colours (3,), by ``share`` (H, W) from 0 to 256."""
    return first + (((second - first) * share[..., None]) >> 8)


def _paint_stuff(image: IntArray, layout: Layout, rng: np.random.Generator, colors: IntArray) -> None:
    """Each stuff region in one colour of the palette and a darker or lighter tone of it, by a random amount.

    Which of the two is the ground is random, too: else the mean colour would tell textures apart.
    """
    height, width = layout.order.shape
    for number, segment in enumerate(layout.segments, start=1):
        if segment.isthing:
            continue
        base = colors[number % len(colors)]
        darker = int(base.sum()) > 240 + int(rng.integers(200))
        amount = int(rng.integers(84, 164))
        tone = base * (256 - amount) >> 8 if darker else base + ((255 - base) * amount >> 8)
        pair = (base, tone) if rng.integers(2) else (tone, base)
        where = layout.order == number
        share = texture(rng, segment.name, height, width)
        image[where] = _mix(*pair, share[where])


def _paint_things(image: IntArray, layout: Layout, rng: np.random.Generator, colors: IntArray) -> None:
    """Each object in one colour, with a gradient across it that may be strong or absent."""
    height, width = layout.order.shape
    field = smooth_fields(rng, 1, (height, width), knots=7)[0]
    for number, segment in enumerate(layout.segments, start=1):
        if not segment.isthing:
            continue
        color = colors[number % len(colors)]
        strength = int(rng.integers(0, 160))
        where = layout.order == number
        light = 256 + ((field[where] - 512) * strength >> 9)
        image[where] = color * light[:, None] >> 8


def _darken_borders(image: IntArray, layout: Layout) -> None:
    """A dark line inside the border of each object, and a shadow to its lower right."""
    isthing = np.array([False, *(segment.isthing for segment in layout.segments)])[layout.order]
    edge = np.zeros_like(isthing)
    for axis in (0, 1):
        differs = np.diff(layout.order, axis=axis) != 0
        before, after = ((slice(None), slice(None, -1)), (slice(None), slice(1, None)))
        if axis == 0:
            before, after = before[::-1], after[::-1]
        edge[before] |= differs
        edge[after] |= differs
    outline = edge & isthing
    image[outline] = image[outline] * 100 >> 8
    shadow = np.zeros_like(isthing)
    shadow[2:, 2:] = isthing[:-2, :-2]
    shadow &= ~isthing
    image[shadow] = image[shadow] * 170 >> 8


def _soften(image: IntArray) -> IntArray:
    """The image filtered by (1, 4, 1) / 6 along both axes, which anti-aliases every border."""
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if axis == a else (0, 0) for a in range(3)], mode="edge")
        before, after = (padded[:-2], padded[2:]) if axis == 0 else (padded[:, :-2], padded[:, 2:])
        image = (before + 4 * image + after) // 6
    return image


def draw_image(layout: Layout, split: int, index: int) -> npt.NDArray[np.uint8]:
    """(H, W, 3): the RGB picture of a layout; ``split`` and ``index`` are those that the layout was drawn for."""
    rng = np.random.default_rng([VERSION, split, index, 1])
    height, width = layout.order.shape
    palette = PALETTE[rng.permutation(len(PALETTE))]
    # What nobody labelled looks like static: it has no texture of a class.
    image: IntArray = rng.integers(40, 216, (height, width, 1), dtype=np.int32) + np.zeros(3, dtype=np.int32)
    # An object never has a colour of the stuff around it.
    _paint_stuff(image, layout, rng, palette[:4])
    _paint_things(image, layout, rng, palette[4:])
    _darken_borders(image, layout)
    image = _soften(image)
    light = 224 + (smooth_fields(rng, 1, (height, width))[0] >> 4)
    image = image * light[..., None] >> 8
    amplitude = int(rng.integers(3, 13))
    image += rng.integers(-amplitude, amplitude + 1, image.shape, dtype=np.int16)
    return np.clip(image, 0, 255).astype(np.uint8)
