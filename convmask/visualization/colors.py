"""Colours that stay the same for a class, and nearly the same for an object, from picture to picture."""

from __future__ import annotations

import colorsys

from detectron2.data import Metadata

Color = tuple[int, int, int]
"""RGB, 0 to 255."""

_GOLDEN_RATIO = 0.6180339887498949


def class_color(metadata: Metadata, index: int, is_thing: bool) -> Color:
    """The colour of a class: that of the data set if it has any, else one of a sequence of well separated hues.

    Args:
        metadata: of the data set; ``thing_colors`` and ``stuff_colors`` are used.
        index: contiguous class number, of ``thing_classes`` or of ``stuff_classes``.
        is_thing: which of the two.
    """
    colors = metadata.get("thing_colors" if is_thing else "stuff_colors", None)
    if colors is not None and index < len(colors):
        red, green, blue = (int(value) for value in colors[index])
        return red, green, blue
    hue = (index + (0 if is_thing else 0.5)) * _GOLDEN_RATIO % 1.0
    return _from_hsv(hue, 0.75 if is_thing else 0.4, 0.95 if is_thing else 0.75)


def object_color(base: Color, center: tuple[float, float], one_class: bool) -> Color:
    """A variation of the class's colour by the place of the object.

    Neighbours of one class differ, while an object and its ground truth, or the same object one video frame later, look
    alike, because the variation is a continuous function of the centre.

    Args:
        base: the class's colour.
        center: (x, y), each relative to the image's size, 0 to 1.
        one_class: all objects are of one class, so that the hue is free to tell them apart.
    """
    x, y = center
    phase = (3.7 * x + 5.3 * y) % 1.0
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in base))
    if one_class:
        return _from_hsv(phase, 0.7, 0.95)
    # A triangle wave: no jump where the phase wraps around.
    swing = 4 * abs(phase - 0.5) - 1
    return _from_hsv((hue + 0.035 * swing) % 1.0, saturation, min(1.0, max(0.3, value * (1 + 0.18 * swing))))


def blend(color: Color, other: Color, share: float) -> Color:
    """``share`` of ``other`` mixed into ``color``; 0 gives ``color``."""
    red, green, blue = (round((1 - share) * a + share * b) for a, b in zip(color, other, strict=True))
    return red, green, blue


def _from_hsv(hue: float, saturation: float, value: float) -> Color:
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue
