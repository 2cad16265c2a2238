"""The colour augmentation of SSD (Liu et al., ECCV 2016, section 2.2; its Caffe code), drawn from numpy's generator.

Detectron2 has one in its project PointRend. Importing that registers PointRend's models, and the transform draws anew
at each application, so it is not a function of what it was built with.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.data import transforms as T

Image = npt.NDArray[np.uint8]

BRIGHTNESS = 32
CONTRAST = SATURATION = (0.5, 1.5)
# In OpenCV's hue, where the circle has 180 steps.
HUE = 18


def _scale(values: Image, factor: float, shift: float = 0.0) -> Image:
    """(...): each value times ``factor`` plus ``shift``, cut to 0 to 255."""
    table = np.clip(np.arange(256) * factor + shift, 0, 255).astype(np.uint8)
    return np.take(table, values)


def _scale_saturation(image: Image, factor: float, to_hsv: int, from_hsv: int) -> Image:
    hsv = cv2.cvtColor(image, to_hsv)
    hsv[..., 1] = _scale(hsv[..., 1], factor)  # type: ignore[arg-type]
    return cv2.cvtColor(hsv, from_hsv)  # type: ignore[return-value]


def _turn_hue(image: Image, steps: int, to_hsv: int, from_hsv: int) -> Image:
    hsv = cv2.cvtColor(image, to_hsv)
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + steps) % 180
    return cv2.cvtColor(hsv, from_hsv)  # type: ignore[return-value]


class SSDColorAugmentation(T.Augmentation):
    """Changes brightness, saturation, hue and contrast (first or last of the three), each with probability 1/2."""

    def __init__(self, image_format: str) -> None:
        """``image_format`` is ``"BGR"`` or ``"RGB"``.

        Raises:
            ValueError: another format.
        """
        super().__init__()
        if image_format not in ("BGR", "RGB"):
            raise ValueError(f"colour augmentation takes BGR or RGB images, not {image_format!r}")
        self.image_format = image_format
        rgb = image_format == "RGB"
        self._codes = (
            cv2.COLOR_RGB2HSV if rgb else cv2.COLOR_BGR2HSV,
            cv2.COLOR_HSV2RGB if rgb else cv2.COLOR_HSV2BGR,
        )

    def get_transform(self, image: Image) -> T.Transform:
        """The transform for an image (H, W, 3) uint8; all its random numbers are drawn here."""
        shift = self._rand_range(-BRIGHTNESS, BRIGHTNESS)
        contrast = self._rand_range(*CONTRAST)
        saturation = self._rand_range(*SATURATION)
        turn = int(np.random.randint(-HUE, HUE + 1))
        brightness_on, contrast_on, saturation_on, hue_on, contrast_first = np.random.randint(2, size=5)
        steps: list[Callable[[Image], Image]] = []
        if saturation_on:
            steps.append(lambda image: _scale_saturation(image, saturation, *self._codes))
        if hue_on:
            steps.append(lambda image: _turn_hue(image, turn, *self._codes))
        if contrast_on:
            steps.insert(0 if contrast_first else len(steps), lambda image: _scale(image, contrast))
        if brightness_on:
            steps.insert(0, lambda image: _scale(image, 1.0, shift))

        def apply(image: Image) -> Image:
            image = np.ascontiguousarray(image)
            for step in steps:
                image = step(image)
            return image

        return T.ColorTransform(apply)
