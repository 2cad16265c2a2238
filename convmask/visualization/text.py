"""Small, sharp text on images."""

from __future__ import annotations

from functools import lru_cache

from matplotlib import font_manager
from PIL import ImageFont

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""


@lru_cache(maxsize=32)
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along, at ``size`` pixels."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def text_size(text: str, size: int) -> tuple[float, float]:
    """(width, height) in pixels of one line of ``text``."""
    left, top, right, bottom = font(size).getbbox(text, anchor="ls")
    return right - left, bottom - top


def overlaps(box: Box, others: list[Box]) -> bool:
    """Whether ``box`` shares an area with any of ``others``."""
    x0, y0, x1, y1 = box
    return any(x0 < right and left < x1 and y0 < bottom and top < y1 for left, top, right, bottom in others)
