"""The augmentations that a config asks for, from Detectron2's where they serve."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from convmask.data.color_augmentation import SSDColorAugmentation
from convmask.data.targets import IGNORE_LABEL, SegmentationInput

Array = npt.NDArray[Any]
_FLIPS = ("horizontal", "vertical", "none")


class _AtLeastOnePixel:
    """Mixed into a resizing augmentation: a long, thin image does not shrink to a side of 0 pixels."""

    def get_transform(self, image: Array) -> T.Transform:
        """The base's transform, with sides of at least one pixel."""
        tfm = super().get_transform(image)  # type: ignore[misc]
        if not isinstance(tfm, T.ResizeTransform):
            return tfm
        return T.ResizeTransform(tfm.h, tfm.w, max(int(tfm.new_h), 1), max(int(tfm.new_w), 1), tfm.interp)


class ResizeShortestEdge(_AtLeastOnePixel, T.ResizeShortestEdge):
    """Detectron2's ``ResizeShortestEdge``."""


class ResizeScale(_AtLeastOnePixel, T.ResizeScale):
    """Detectron2's ``ResizeScale``."""


class RandomSegmentationCrop(T.RandomCrop):
    """A random crop with demands on what is in it. Its input is a :class:`SegmentationInput`."""

    TRIALS = 10

    def __init__(
        self,
        crop_type: str,
        crop_size: tuple[float, float],
        require_instance: bool = False,
        single_category_max_area: float = 1.0,
    ) -> None:
        """Args as for Detectron2's ``RandomCrop``.

        Args:
            crop_type: "relative_range", "relative", "absolute" or "absolute_range".
            crop_size: in pixels or as a share, see ``RandomCrop``.
            require_instance: a random pixel of a random instance is in the crop, if the image has an instance.
            single_category_max_area: the crop is drawn up to ten times while one semantic class has more than this
                share of its labelled pixels, or while there is none. At 1 any crop will do, as where there is no
                semantic map.
        """
        super().__init__(crop_type, crop_size)
        self._init({"require_instance": require_instance, "single_category_max_area": single_category_max_area})

    def __call__(self, aug_input: SegmentationInput) -> T.Transform:
        """Draws the crop and applies it to the input."""
        sem_seg = aug_input.sem_seg if self.single_category_max_area < 1 else None
        for _ in range(self.TRIALS):
            pixel = aug_input.random_instance_pixel() if self.require_instance else None
            tfm = self._draw(aug_input.size, pixel)
            if sem_seg is None or self._is_mixed(tfm.apply_segmentation(sem_seg)):
                break
        aug_input.transform(tfm)
        return tfm

    def _draw(self, size: tuple[int, int], pixel: tuple[int, int] | None) -> T.CropTransform:
        crop_size = self.get_crop_size(size)
        corner = []
        for axis in (0, 1):
            low, high = 0, size[axis] - crop_size[axis]
            if pixel is not None:
                low, high = max(low, pixel[axis] - crop_size[axis] + 1), min(high, pixel[axis])
            corner.append(int(np.random.randint(low, high + 1)))
        return T.CropTransform(corner[1], corner[0], crop_size[1], crop_size[0])

    def _is_mixed(self, labels: Array) -> bool:
        counts = np.unique(labels[labels != IGNORE_LABEL], return_counts=True)[1]
        return len(counts) > 0 and counts.max() <= self.single_category_max_area * counts.sum()


class Rotate90Transform(T.Transform):
    """Turns by a multiple of 90 degrees counter-clockwise, without resampling."""

    def __init__(self, height: int, width: int, turns: int) -> None:
        """Takes the size of the image before, in pixels, and the number of quarter turns."""
        super().__init__()
        self._set_attributes({"height": height, "width": width, "turns": turns % 4})

    def apply_image(self, img: Array) -> Array:
        """(H, W) or (H, W, C) to (W, H) or (W, H, C), or to the same shape for half and no turns."""
        return np.ascontiguousarray(np.rot90(img, self.turns))

    def apply_coords(self, coords: Array) -> Array:
        """(N, 2) x, y to (N, 2) x, y."""
        x, y = coords[:, 0].copy(), coords[:, 1].copy()
        columns = {
            0: (x, y),
            1: (y, self.width - x),
            2: (self.width - x, self.height - y),
            3: (self.height - y, x),
        }[self.turns]
        return np.stack(columns, axis=1)

    def inverse(self) -> T.Transform:
        """The turn back."""
        height, width = (self.width, self.height) if self.turns % 2 else (self.height, self.width)
        return Rotate90Transform(height, width, -self.turns)


class RandomRotate90(T.Augmentation):
    """No turn, or one by 90, 180 or 270 degrees, each as likely."""

    def __init__(self) -> None:
        """Takes nothing."""
        super().__init__()

    def get_transform(self, image: Array) -> T.Transform:
        """The transform for an image (H, W, C)."""
        return Rotate90Transform(image.shape[0], image.shape[1], int(np.random.randint(4)))


def _scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    jitter = cfg.INPUT.SCALE_JITTER
    sizes = (*jitter.TARGET_SIZE, *jitter.CROP_SIZE)
    if not 0 < jitter.MIN_SCALE <= jitter.MAX_SCALE or len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(
            f"INPUT.SCALE_JITTER needs 0 < MIN_SCALE <= MAX_SCALE and sizes (height, width): {dict(jitter)}"
        )
    resize = ResizeScale(jitter.MIN_SCALE, jitter.MAX_SCALE, jitter.TARGET_SIZE[0], jitter.TARGET_SIZE[1])
    # What it pads is void in an id map, whether this version of Detectron2 pads segmentation with 0 or with 255.
    return [resize, T.FixedSizeCrop(tuple(jitter.CROP_SIZE))]


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations of ``cfg.INPUT``, in Detectron2's order: crop, resizing, flip; then turns and colour.

    Args:
        cfg: INPUT.CROP, MIN_SIZE_*, MAX_SIZE_*, SCALE_JITTER, RANDOM_FLIP, ROTATE_90, COLOR_AUG_SSD, FORMAT.
        is_train: otherwise the image is only resized, by MIN_SIZE_TEST and MAX_SIZE_TEST.

    Returns:
        Augmentations for a :class:`SegmentationInput`; without INPUT.CROP for Detectron2's ``AugInput`` as well.

    Raises:
        ValueError: a key has a value that makes no sense; the message names it.
    """
    if not is_train:
        return [ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")]
    if cfg.INPUT.RANDOM_FLIP not in _FLIPS:
        raise ValueError(f"INPUT.RANDOM_FLIP is {cfg.INPUT.RANDOM_FLIP!r}, not one of {_FLIPS}")
    augmentations: list[T.Augmentation] = []
    crop = cfg.INPUT.CROP
    if crop.ENABLED:
        demands = (crop.REQUIRE_INSTANCE, crop.SINGLE_CATEGORY_MAX_AREA)
        augmentations.append(RandomSegmentationCrop(crop.TYPE, crop.SIZE, *demands))
    if cfg.INPUT.SCALE_JITTER.ENABLED:
        augmentations += _scale_jitter(cfg)
    else:
        sampling = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        augmentations.append(ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, sampling))
    if cfg.INPUT.RANDOM_FLIP != "none":
        horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
        augmentations.append(T.RandomFlip(horizontal=horizontal, vertical=not horizontal))
    if cfg.INPUT.ROTATE_90:
        augmentations.append(RandomRotate90())
    if cfg.INPUT.COLOR_AUG_SSD:
        augmentations.append(SSDColorAugmentation(cfg.INPUT.FORMAT))
    return augmentations
