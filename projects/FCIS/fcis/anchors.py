"""The releases' anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    BufferList,
    DefaultAnchorGenerator,
)

from .convention import MXNET, Convention, convention_named

# Anchors of this size have their sides rounded; all others are multiples of them.
BASE_SIZE = 16


@ANCHOR_GENERATOR_REGISTRY.register()
class FCISAnchorGenerator(DefaultAnchorGenerator):
    """Anchors by the convention: ratios outside, sizes inside, cell (0, 0) at the image's corner.

    MXNet's have the sides round(sqrt(256 / ratio)) and round(width x ratio), times size / 16, around (stride - 1) / 2,
    both ends included. ChainerCV's are not rounded, around stride / 2, ends excluded.
    """

    @configurable
    def __init__(
        self,
        *,
        sizes: Sequence[Any],
        aspect_ratios: Sequence[Any],
        strides: Sequence[int],
        convention: Convention = MXNET,
    ) -> None:
        """As Detectron2's; ``sizes`` are 16 times the releases' scales.

        Args:
            sizes: of each level, or of all.
            aspect_ratios: height / width, of each level or of all.
            strides: of the levels, in pixels.
            convention: see the class.
        """
        self._convention = convention
        super().__init__(sizes=sizes, aspect_ratios=aspect_ratios, strides=strides, offset=0.0)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        return {
            "sizes": cfg.MODEL.ANCHOR_GENERATOR.SIZES,
            "aspect_ratios": cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            "strides": [shape.stride for shape in input_shape],
            "convention": convention_named(cfg.MODEL.FCIS.CONVENTION),
        }

    def _calculate_anchors(self, sizes: Sequence[Any], aspect_ratios: Sequence[Any]) -> BufferList:
        levels = zip(self.strides, sizes, aspect_ratios, strict=True)
        return BufferList([cell_anchors(*level, self._convention) for level in levels])


def cell_anchors(
    stride: int, sizes: Sequence[float], ratios: Sequence[float], convention: Convention = MXNET
) -> torch.Tensor:
    """(A, 4) anchors of cell (0, 0).

    Args:
        stride: of the level, in pixels.
        sizes: roots of the areas.
        ratios: height / width.
        convention: see :class:`FCISAnchorGenerator`.
    """
    ratio = torch.tensor(ratios, dtype=torch.float64)
    width = (BASE_SIZE**2 / ratio).sqrt()
    if convention.rounded:
        width = width.round()
        height = (width * ratio).round()
    else:
        height = width * ratio
    scale = torch.tensor(sizes, dtype=torch.float64) / BASE_SIZE
    size = torch.stack([width, height], dim=1)[:, None] * scale[None, :, None]
    half = (size.flatten(0, 1) - convention.offset) / 2
    centre = (stride - convention.offset) / 2
    return torch.cat([centre - half, centre + half], dim=1).float()
