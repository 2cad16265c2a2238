"""Test-time augmentation: the views of an image, that is, its scales and their mirror images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge

from convmask.utils.random_state import seeded


@dataclass(frozen=True)
class ViewOptions:
    """Detectron2's keys ``TEST.AUG``.

    Attributes:
        min_sizes: shorter sides of the views in pixels; 0: the image as it is given.
        max_size: limit of the longer side, in pixels; the shorter one then follows.
        flip: each size also mirrored.

    Raises:
        ValueError: no size, or one that is not positive; the message names the key.
    """

    min_sizes: tuple[int, ...]
    max_size: int
    flip: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        if not self.min_sizes:
            raise ValueError("TEST.AUG.MIN_SIZES is empty: there is no view of an image")
        if min(self.min_sizes) < 0:
            raise ValueError(f"TEST.AUG.MIN_SIZES has {min(self.min_sizes)}, which is negative")
        if self.max_size < 1:
            raise ValueError(f"TEST.AUG.MAX_SIZE is {self.max_size}; it has to be at least 1")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ViewOptions:
        """The values of ``TEST.AUG``."""
        node = cfg.TEST.AUG
        return cls(tuple(int(size) for size in node.MIN_SIZES), int(node.MAX_SIZE), bool(node.FLIP))


class View(NamedTuple):
    """What the model sees of an image.

    Attributes:
        inputs: Detectron2's dict of the image, of which ``image`` is another; ``height`` and ``width``, of the output,
            are the same in all views.
        flipped: it is mirrored, left to right.
    """

    inputs: dict[str, Any]
    flipped: bool


def views_of(inputs: dict[str, Any], options: ViewOptions) -> Iterator[View]:
    """The views of one image, size after size, each followed by its mirror image.

    They are made from ``inputs["image"]``: with an ``INPUT.MIN_SIZE_TEST`` of 0 that is the image of the file.

    Args:
        inputs: Detectron2's dict of one image: ``image`` (C, H, W), perhaps ``height`` and ``width`` of the output.
        options: see :class:`ViewOptions`.
    """
    image = inputs["image"]
    height, width = image.shape[-2:]
    size = {"height": inputs.get("height", height), "width": inputs.get("width", width)}
    for min_size in options.min_sizes:
        resized = _resized(image, min_size, options.max_size) if min_size else image
        yield View({**inputs, **size, "image": resized}, False)
        if options.flip:
            yield View({**inputs, **size, "image": resized.flip(2)}, True)


def _resized(image: torch.Tensor, min_size: int, max_size: int) -> torch.Tensor:
    """As the mapper resizes for INPUT.MIN_SIZE_TEST."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    with seeded(0):  # Detectron2 draws the size from a list of one
        transform = ResizeShortestEdge(min_size, max_size).get_transform(pixels)
    pixels = transform.apply_image(pixels)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).to(image.device)
